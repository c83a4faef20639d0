"""Drop-in verification for vLLM's speculative decoding.

Importing this package loads neither torch, Triton nor vLLM.
"""

__version__ = "0.1.0"


def register() -> None:
    """vLLM's plugin entry point (group ``vllm.general_plugins``): installs the hooks; safe to call repeatedly."""
    from vllm_specopt.integration.plugin import register as install

    install()
