"""Compile Triton kernels for GPUs that are not there: ptxas ships in Triton's wheel."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32


@dataclass(frozen=True)
class Resident:
    """What one SM holds: registers, shared memory in bytes, warps, blocks."""

    registers: int
    shared: int
    warps: int
    blocks: int


RESIDENT = {
    80: Resident(65536, 167936, 64, 32),
    90: Resident(65536, 233472, 64, 32),
    100: Resident(65536, 233472, 64, 32),
}
# The driver keeps this much shared memory of every block for itself.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    registers: Per thread.
    spilled: Bytes that ptxas stores and loads per thread because registers ran out.
    shared: Bytes of shared memory per program.
    """

    name: str
    architecture: int
    num_warps: int
    registers: int
    spilled: int
    shared: int
    ttgir: str
    ptx: str
    cubin: bytes

    @property
    def warps(self) -> int:
        """Warps that an SM can hold at once; registers are handed out in eights per thread."""
        limits = RESIDENT[self.architecture]
        per_block = -(-self.registers // 8) * 8 * WARP * self.num_warps
        blocks = min(
            limits.registers // per_block,
            limits.warps // self.num_warps,
            limits.blocks,
            limits.shared // (self.shared + RESERVED_SHARED),
        )
        return blocks * self.num_warps


def compile_kernel(
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    num_warps: int,
    architecture: int = 90,
    aligned: Collection[str] = (),
    num_stages: int = 3,
    max_registers: int | None = None,
) -> Compiled:
    """Compile one variant of a kernel.

    types: Argument name to Triton's type ("*bf16", "i32"). Arguments without type or constant are None.
    constants: Values of the constexpr arguments.
    architecture: 80, 90 (compiled as sm_90a) or 100.
    aligned: Arguments that are multiples of 16, which a launch would find out by itself.
    """
    signature, constexprs, attributes = {}, dict(constants), {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name not in types:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
        else:
            signature[name] = types[name]
            if name in aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options=options)
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    assert registers is not None, "ptxas did not say how many registers it used"
    return Compiled(
        name=kernel.__name__,
        architecture=architecture,
        num_warps=num_warps,
        registers=int(registers[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
        shared=binary.metadata.shared,
        ttgir=binary.asm["ttgir"],
        ptx=binary.asm["ptx"],
        cubin=binary.asm["cubin"],
    )
