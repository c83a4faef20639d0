"""The same custom logits processor for both runners: ``extra_args={"ban": ids}`` forbids those token ids."""

import numpy as np
import torch
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
