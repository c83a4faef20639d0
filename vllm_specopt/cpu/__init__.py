"""Verification on a CPU, compiled by numba: each verified row is read once, and one tile of it once more to draw.

Import it only once vLLM's worker is set up: on a CPU, vLLM 0.32 scans all loaded modules when it registers its kernels,
and the scan fails on llvmlite's.
"""

from vllm_specopt.cpu.backend import verify_batch, warm_up

__all__ = ["verify_batch", "warm_up"]
