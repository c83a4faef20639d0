"""One engine run (benchmarks/serve/engine.py) on the stand-in GPU: every request gets one token a step.

Our samplers run in PyTorch's mode that makes a synchronisation an error, as does a copy that waits.
"""

import functools
import sys

import torch
from vllm.v1.worker.gpu import async_utils

from vllm_specopt.benchmarks.serve import engine
from vllm_specopt.integration import v2, v2_sampler

TOKEN = 5


def give_a_token() -> None:
    """Have vLLM read one token per request, whatever the kernels did not write."""
    original = async_utils.AsyncOutput.get_output

    def get_output(self):
        self.num_sampled_tokens_np[:] = 1
        self.sampled_token_ids[:] = TOKEN
        return original(self)

    async_utils.AsyncOutput.get_output = get_output


def forbid_waiting(owner: type, name: str) -> None:
    """Make a synchronisation within a method an error."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args, **keywords):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*args, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    setattr(owner, name, watched)


if __name__ == "__main__":
    give_a_token()
    forbid_waiting(v2.RejectionSampler, "_verify")
    forbid_waiting(v2_sampler.Sampler, "sample")
    engine.main(*sys.argv[1:])
