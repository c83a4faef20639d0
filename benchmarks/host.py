"""The CPU that the benchmarks run on: its name, and the number type in which it multiplies fastest."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Return the CPU's name."""
    return _field("model name") or platform.machine()


def small_model_dtype() -> str:
    """Return ``float32`` where the CPU would compute bfloat16 products by emulation, else ``bfloat16``.

    An x86 processor without AVX-512 has no fast bfloat16 product; for models as small as the shipped ones float32 is
    then much the faster type, though it moves twice the bytes.
    """
    flags = _field("flags").split()
    return "float32" if flags and "avx512f" not in flags else "bfloat16"


def _field(name: str) -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() == name), "")
