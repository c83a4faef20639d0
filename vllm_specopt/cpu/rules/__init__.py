"""Verification rules of the CPU backend, one file each, as in ``kernels/rules`` and ``kernels/reference``."""
