"""Logits processors of one's own, as V1 takes them."""

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

VOCAB = 60


class NotTwice(AdapterLogitsProcessor):
    """A request's processor that looks at the tokens so far: forbids the last one, and prefers the one after it."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        def forbid(output, logits):
            if output:
                logits[output[-1]] = -torch.inf
                logits[(output[-1] + 1) % VOCAB] += 2.5
            return logits

        return forbid if (params.extra_args or {}).get("not_twice") else None


class Ban(LogitsProcessor):
    """A processor of the batch, whose state is its members' parameters."""

    def __init__(self):
        self.bans = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(self.bans, batch_update, lambda params, *_: (params.extra_args or {}).get("ban"))

    def apply(self, logits):
        for row, ids in self.bans.items():
            logits[row, ids] = -float("inf")
        return logits


class Steep(LogitsProcessor):
    """Works on logits after temperature, leaves the argmax where it is."""

    def __init__(self, above):
        self.above = above

    def is_argmax_invariant(self):
        return True

    def update_state(self, batch_update):
        """Has no state."""

    def apply(self, logits):
        return logits.masked_fill_(logits < logits.amax(1, keepdim=True) - self.above, -torch.inf)
