"""The same custom logits processors for both runners.

``extra_args={"ban": ids}`` forbids those token ids, ``extra_args={"not_twice": True}`` that a token follows itself.
"""

import numpy as np
import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2


def banned(params) -> list[int] | None:
    return (params.extra_args or {}).get("ban")


class BanV1(LogitsProcessorV1):
    """For model runner V1."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.bans = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(self.bans, batch_update, lambda params, prompt, output: banned(params))

    def apply(self, logits):
        for row, ids in self.bans.items():
            logits[row, ids] = -float("inf")
        return logits


class BanV2(LogitsProcessorV2):
    """For model runner V2."""

    def __init__(self, vllm_config, req_states):
        self.bans = np.zeros((req_states.max_num_reqs, req_states.vocab_size), dtype=bool)

    def add_request(self, req_idx, sampling_params):
        self.bans[req_idx] = False
        self.bans[req_idx, banned(sampling_params) or []] = True
        return bool(self.bans[req_idx].any())

    def apply(self, logits, ctx):
        mask = torch.from_numpy(self.bans[ctx.expanded_idx_mapping.cpu().numpy()])
        return logits.masked_fill(mask.to(logits.device), -float("inf"))


class NotTwiceV1(AdapterLogitsProcessor):
    """For model runner V1: a processor per request, which is given the tokens so far."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        def forbid(prompt, output, logits):
            logits[(output or prompt)[-1]] = -float("inf")
            return logits

        return forbid if (params.extra_args or {}).get("not_twice") else None


class NotTwiceV2(LogitsProcessorV2):
    """For model runner V2, which says what token was fed to the model at each row."""

    def __init__(self, vllm_config, req_states):
        self.used = np.zeros(req_states.max_num_reqs, dtype=bool)

    def add_request(self, req_idx, sampling_params):
        self.used[req_idx] = bool((sampling_params.extra_args or {}).get("not_twice"))
        return bool(self.used[req_idx])

    def apply(self, logits, ctx):
        rows = np.flatnonzero(self.used[ctx.expanded_idx_mapping.cpu().numpy()])
        logits[rows, ctx.input_ids[rows].long()] = -float("inf")
        return logits
