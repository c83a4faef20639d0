"""Run a verification step in Triton's interpreter and write down what it launches and how often each part runs.

A launch is recorded with what Triton specialises on: dtypes, alignment, constants, number of warps, grid. Into each
kernel and each function it calls counters are put: rounds and entries of every loop, which side of every condition was
taken. So nobody has to say how often a body runs on given rows, and a record cannot lag behind the code. Loads and
stores are counted in bytes, operations of torch as launches.

The interpreter patches here belong to Triton 3.6 to 3.9; a later one that lacks them fails with an AttributeError.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.language.extra import libdevice
from triton.runtime import interpreter

LIBRARY = str(Path(triton.__file__).parent)
COUNTER = "_specopt_seen"
OUR_KERNELS = "vllm_specopt.kernels"
# A grid of others with more programs than this along something that is neither requests nor rows is run in part.
MOST_PROGRAMS = 64
FEW_PROGRAMS = 2


@dataclass
class Launch:
    """One kernel launch, or one operation of torch (``module`` is empty then).

    arguments: Name to ("pointer", dtype, is a multiple of 16 bytes), ("int", value), ("float", value), ("constant",
        value) or ("none",).
    grid: All programs; ``sampled`` of them ran.
    counts: (functions from the kernel inwards, line, "round" | "entry" | "then" | "else") to a number.
    loaded, stored: Bytes, of all programs: those counted, scaled.
    """

    module: str
    kernel: str
    arguments: dict[str, tuple] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    grid: tuple[int, ...] = (1,)
    sampled: int = 1
    counts: dict[tuple, int] = field(default_factory=collections.Counter)
    loaded: float = 0.0
    stored: float = 0.0

    @property
    def programs(self) -> int:
        return int(np.prod(self.grid))

    def as_json(self) -> dict:
        """As an object that JSON holds; ``from_json`` turns it back."""
        return {**vars(self), "counts": list(self.counts.items())}

    @classmethod
    def from_json(cls, fields: dict) -> Launch:
        counts = {(tuple(calls), line, kind): number for (calls, line, kind), number in fields["counts"]}
        arguments = {name: tuple(value) for name, value in fields["arguments"].items()}
        return cls(**fields | {"counts": counts, "arguments": arguments, "grid": tuple(fields["grid"])})


class _Recorder:
    """Where the patches below report; one at a time."""

    def __init__(self, batch: int, num_rows: int, sampled_requests: int) -> None:
        self.launches: list[Launch] = []
        self.current: Launch | None = None
        self.share = sampled_requests / batch
        self.scaled_lengths = {batch, num_rows, num_rows - batch} if sampled_requests < batch else set()

    def sample(self, module: str, grid: tuple[int, ...]) -> list[range]:
        """Programs to run along each axis: those of the first requests where an axis counts requests or rows.

        The last axis of our kernels counts requests.
        """
        if module.startswith(OUR_KERNELS):
            return [*map(range, grid[:-1]), range(round(grid[-1] * self.share))]
        ranges = [range(round(n * self.share)) if n in self.scaled_lengths and n > 1 else range(n) for n in grid]
        if len(grid) == 1 and ranges[0] == range(grid[0]) and grid[0] > MOST_PROGRAMS:
            ranges = [range(FEW_PROGRAMS)]
        return ranges

    def seen(self, line: int, kind: str) -> None:
        calls: list[str] = []
        frame: types.FrameType | None = sys._getframe(2)
        while frame and frame.f_code.co_name != "_run_programs":
            if COUNTER in frame.f_globals and not frame.f_code.co_filename.startswith(LIBRARY):
                calls.append(frame.f_code.co_name)
            frame = frame.f_back
        if self.current is not None:
            self.current.counts[tuple(reversed(calls)), line, kind] += 1


_recorder: _Recorder | None = None


def _seen(line: int, kind: str) -> None:
    if _recorder is not None and _recorder.current is not None:
        _recorder.seen(line, kind)


@contextlib.contextmanager
def watch(batch: int, num_rows: int, sampled_requests: int) -> Iterator[list[Launch]]:
    """Record what runs inside; kernels run only the programs of the first ``sampled_requests`` of ``batch`` requests.

    Raises:
        RuntimeError: Triton does not interpret its kernels.
    """
    global _recorder
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is not 1, expected the interpreter")
    _recorder = _Recorder(batch, num_rows, sampled_requests)
    try:
        with _TorchOperations():
            yield _recorder.launches
    finally:
        _recorder = None


def install() -> None:
    """Put the counters and recorders into Triton's interpreter; before a kernel first runs."""
    interpreter.FunctionRewriter._transform_ast = _transform_ast(interpreter.FunctionRewriter._transform_ast)
    interpreter.InterpretedFunction.run = _run
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _counting_load(builder.create_masked_load)
    builder.create_masked_store = _counting_store(builder.create_masked_store)
    libdevice.log1p = _log1p


def _run(self, *args, grid, warmup, **kwargs):
    if warmup:
        return
    function = self.rewrite()
    if _recorder is None:
        interpreter.GridExecutor(function, self.arg_names, grid, self.pre_run_hooks)(*args, **kwargs)
        return
    names = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
    shape = tuple(grid(names)) if callable(grid) else tuple(grid)
    constants = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}
    launch = Launch(
        module=self.fn.__module__,
        kernel=self.fn.__name__,
        arguments={name: _argument(value, name in constants) for name, value in names.items()},
        num_warps=kwargs.get("num_warps", 4),
        num_stages=kwargs.get("num_stages", 3),
        max_registers=kwargs.get("maxnreg"),
        grid=shape,
    )
    ranges = _recorder.sample(launch.module, shape)
    launch.sampled = int(np.prod([len(each) for each in ranges]))
    _recorder.launches.append(launch)
    _recorder.current = launch
    try:
        with mock.patch.object(interpreter, "_patch_lang", _once_per_module(interpreter._patch_lang)):
            _run_programs(function, self.arg_names, names, shape, ranges)
    finally:
        _recorder.current = None
    scale = launch.programs / launch.sampled
    launch.loaded *= scale
    launch.stored *= scale


def _run_programs(function, arg_names, names, shape, ranges):
    """As ``GridExecutor`` does, for some programs only, on tensors that are on the host already."""
    executor = interpreter.GridExecutor(function, arg_names, shape)
    scope = interpreter._patch_lang(function)
    try:
        converted = {n: v if n in executor.constexprs else interpreter._implicit_cvt(v) for n, v in names.items()}
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*shape, *[1] * (3 - len(shape)))
        ranges = [*ranges, *[range(1)] * (3 - len(ranges))]
        for x in ranges[0]:
            for y in ranges[1]:
                for z in ranges[2]:
                    builder.set_grid_idx(x, y, z)
                    function(**converted)
    finally:
        if scope is not None:
            scope.restore()


def _once_per_module(original):
    """Triton patches its language before each call of a function, which takes longer than most calls."""
    patched = set()

    def patch(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return original(function)

    return patch


def _argument(value: object, is_constant: bool) -> tuple:
    if is_constant:
        return ("constant", value)
    if value is None:
        return ("none",)
    if isinstance(value, torch.Tensor):
        return ("pointer", str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0)
    return ("int" if isinstance(value, int) else "float", value)


def _transform_ast(original):
    def transform(self, source):
        tree = original(self, source)
        if not self.filename.startswith(LIBRARY):
            self.fn.__globals__[COUNTER] = _seen
            _Counters().visit(tree)
            ast.fix_missing_locations(tree)
        return tree

    return transform


class _Counters(ast.NodeTransformer):
    """Insert calls that count."""

    def _call(self, node: ast.stmt, kind: str) -> ast.Expr:
        name, line = ast.Name(COUNTER, ast.Load()), ast.Constant(node.lineno)
        return ast.copy_location(ast.Expr(ast.Call(name, [line, ast.Constant(kind)], [])), node)

    def visit_For(self, node):
        if "static_range" not in ast.unparse(node.iter):
            # The compiler's loop variable is a tensor; the interpreter's is a number, which lacks a tensor's methods.
            convert = f"{node.target.id} = interpreter_semantic.to_tensor({node.target.id}, False)"
            node.body.insert(0, ast.copy_location(ast.parse(convert).body[0], node))
        return self.visit_While(node)

    def visit_While(self, node):
        self.generic_visit(node)
        node.body.insert(0, self._call(node, "round"))
        return [self._call(node, "entry"), node]

    def visit_If(self, node):
        self.generic_visit(node)
        node.body.insert(0, self._call(node, "then"))
        node.orelse.insert(0, self._call(node, "else"))
        return node


def _size(element) -> int:
    return max(element.primitive_bitwidth // 8, 1)


def _counting_load(original):
    def load(self, ptrs, mask, *args):
        if _recorder is not None and _recorder.current is not None:
            _recorder.current.loaded += np.count_nonzero(mask.data) * _size(ptrs.get_element_ty())
        return original(self, ptrs, mask, *args)

    return load


def _counting_store(original):
    def store(self, ptrs, value, mask, *args):
        if _recorder is not None and _recorder.current is not None:
            _recorder.current.stored += np.count_nonzero(mask.data) * _size(ptrs.get_element_ty())
        return original(self, ptrs, value, mask, *args)

    return store


def _log1p(value):
    """The one function of CUDA's library that stock calls; the interpreter has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        handle = interpreter.TensorHandle(np.log1p(value.handle.data), value.handle.dtype.scalar)
    return triton.language.core.tensor(handle, value.type)


class _TorchOperations(TorchDispatchMode):
    """Records operations that launch a kernel on a GPU: those that compute or copy, not views or allocations."""

    WITHOUT_LAUNCH = (
        *(
            "view",
            "empty",
            "empty_like",
            "empty_strided",
            "as_strided",
            "slice",
            "select",
            "expand",
            "detach",
            "alias",
            "unsqueeze",
            "set_",
        ),
        *("squeeze", "permute", "transpose", "t", "reshape", "split", "unbind", "lift_fresh", "resize_"),
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        plain = name.removeprefix("_").removeprefix("new_")
        if _recorder is not None and _recorder.current is None and plain not in self.WITHOUT_LAUNCH:
            read = _tensors((args, kwargs))[name in ("copy_", "fill_", "zero_") :]
            loaded, stored = (float(sum(each.nbytes for each in tensors)) for tensors in (read, _tensors(result)))
            _recorder.launches.append(Launch("", name, loaded=loaded, stored=stored))
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
