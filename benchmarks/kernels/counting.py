"""Compile a recorded launch for an architecture and count the instructions that its programs issue."""

from __future__ import annotations

import collections
import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from unittest import mock

import triton
from triton import backends

from vllm_specopt.benchmarks.kernels.compiling import WARP, compile_kernel
from vllm_specopt.benchmarks.kernels.machine_code import MachineCode, pipe
from vllm_specopt.benchmarks.kernels.watching import Launch
from vllm_specopt.benchmarks.kernels.weights import Frequency, counted, weigh

TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bool": "i1",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
}
LOADS_FOUND = 0.95
LOAD_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Count:
    """What one launch costs on an architecture.

    pipes: Warp instructions of all programs, by what issues them.
    per_thread: Instructions that a thread of a program issues in the mean: a program's length.
    loads_found: Share of the bytes that the interpreter loaded which the instructions counted load, 1 at most. Below
        LOADS_FOUND the weights miss something, and the instructions are a lower bound.
    """

    kernel: str
    programs: int
    num_warps: int
    registers: int
    spilled: int
    shared: int
    warps: int
    per_thread: float
    pipes: Mapping[str, float]
    loaded: float
    stored: float
    loads_found: float = 1.0

    @property
    def warp_instructions(self) -> float:
        return sum(self.pipes.values())

    @property
    def bytes(self) -> float:
        return self.loaded + self.stored


def count_launch(launch: Launch, architecture: int, strict: bool = True) -> Count:
    """Count a launch; one of torch's own operations has bytes only.

    Raises:
        Undescribed: the machine code holds a loop that the source lacks.
        ValueError: the instructions counted load less than the interpreter did, so a body's weight must be wrong; not
            raised unless ``strict``.
    """
    if not launch.module:
        return Count(launch.kernel, 1, 0, 0, 0, 0, 0, 0.0, {}, launch.loaded, launch.stored)
    code = machine_code(launch, architecture)
    compiled = code.compiled
    pipes, loaded = instructions(code, counted(launch.counts))
    found = loaded * launch.programs * launch.num_warps * WARP
    share = min(1.0, found / launch.loaded) if launch.loaded else 1.0
    if strict and share < LOADS_FOUND:
        raise ValueError(
            f"{launch.kernel}: its instructions load {found:.0f} bytes, the interpreter {launch.loaded:.0f}"
        )
    return Count(
        kernel=launch.kernel,
        programs=launch.programs,
        num_warps=launch.num_warps,
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared=compiled.shared,
        warps=compiled.warps,
        per_thread=sum(pipes.values()),
        pipes={name: number * launch.programs * launch.num_warps for name, number in pipes.items()},
        loaded=launch.loaded,
        stored=launch.stored,
        loads_found=share,
    )


def instructions(code: MachineCode, frequency: Frequency) -> tuple[dict[str, float], float]:
    """Instructions that a thread issues in the mean, by pipe, and the bytes that these load from global memory."""
    pipes: collections.defaultdict[str, float] = collections.defaultdict(float)
    loaded = 0.0
    for weighted in weigh(code, frequency):
        for instruction in weighted.block.instructions:
            kind = pipe(instruction.name)
            pipes[kind] += weighted.weight
            if kind == "load" or instruction.name.startswith("ATOM"):
                sizes = [LOAD_BYTES[part] for part in instruction.name.split(".") if part in LOAD_BYTES]
                loaded += weighted.weight * (sizes[0] if sizes else 4)
    return dict(pipes), loaded


def machine_code(launch: Launch, architecture: int) -> MachineCode:
    """Compile what a launch would make Triton compile: same types, alignment and constants.

    What modules decide for the interpreter, such as ``HAS_PTX``, they decide anew in this process, which compiles.
    """
    kernel = _kernel(launch.module, launch.kernel)
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        kind, *value = launch.arguments.get(parameter.name, ("default", parameter.default))
        specialised = not parameter.do_not_specialize
        alignable = specialised and not parameter.do_not_specialize_on_alignment
        if kind in ("constant", "default"):
            constants[parameter.name] = value[0]
        elif kind == "none":
            constants[parameter.name] = None
        elif kind == "pointer":
            signature[parameter.name] = "*" + TYPES[value[0]]
            aligned += [parameter.name] * (value[1] and alignable)
        elif kind == "float":
            signature[parameter.name] = "fp32"
        elif isinstance(value[0], bool):
            signature[parameter.name] = "i1"
        elif value[0] == 1 and specialised:
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value[0] < 2**31 else "i64"
            aligned += [parameter.name] * (value[0] % 16 == 0 and alignable)
    frozen = (tuple(signature.items()), tuple(constants.items()), tuple(aligned))
    options = (launch.num_warps, launch.num_stages, launch.max_registers)
    return _machine_code(launch.module, launch.kernel, *frozen, options, architecture)


@cache
def _machine_code(module, name, signature, constants, aligned, options, architecture) -> MachineCode:
    arguments = (_kernel(module, name), dict(signature), dict(constants))
    num_warps, num_stages, max_registers = options
    return MachineCode(compile_kernel(*arguments, num_warps, architecture, aligned, num_stages, max_registers))


@cache
def _kernel(module: str, name: str) -> triton.JITFunction:
    # vLLM leaves Triton alone where no backend is active; the stand-in must be gone when Triton compiles.
    driver = types.SimpleNamespace(is_active=lambda: True)
    with mock.patch.dict(backends.backends, cpu=types.SimpleNamespace(driver=driver, compiler=None)):
        kernel = getattr(importlib.import_module(module), name)
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{module}.{name} is {type(kernel).__name__}, expected a JITFunction")
    return kernel
