"""The definition of correct: verification in float64, one token at a time, with the kernels' random numbers.

Every backend must return the token ids that :func:`verify_ref` returns, except where its ``margin`` says that two
outcomes lie closer together than single precision can tell apart. Imported by tests and benchmarks only.
"""

from vllm_specopt.kernels.reference.verify import Reference, verify_ref

__all__ = ["Reference", "verify_ref"]
