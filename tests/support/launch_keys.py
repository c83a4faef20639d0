"""What Triton would compile for each launch of our kernels, recorded without a GPU.

Triton compiles a kernel once per key: the types of its arguments, which of them are None, 1 or multiples of 16 (for
pointers: of 16 bytes), and the values of its constants. The key is Triton's own, from the function it generates for
each kernel to compute it.
"""

import contextlib
import inspect
from functools import cache

from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelParam, create_function_from_signature

OURS = "vllm_specopt.kernels."


@cache
def _binder(function, unspecialised: tuple, unaligned: tuple):
    signature = inspect.signature(function)
    params = [
        KernelParam(index, param, param.name in unspecialised, param.name in unaligned)
        for index, param in enumerate(signature.parameters.values())
    ]
    return create_function_from_signature(signature, params, BaseBackend)


def launch_key(function, options: dict, args, kwargs) -> tuple:
    """Key of one launch: the kernel's name, each argument's specialisation, and the launch options."""
    excluded = (tuple(options.get(f"do_not_specialize{suffix}") or ()) for suffix in ("", "_on_alignment"))
    params, specialisation, launch = _binder(function, *excluded)(*args, **kwargs)
    return (function.__name__, tuple(zip(params, map(str, specialisation), strict=True)), tuple(sorted(launch.items())))


@contextlib.contextmanager
def recorded(run: bool = True):
    """Yield the set of keys launched within the block; needs Triton's interpreter.

    Args:
        run: Whether the kernels run. If not, their outputs stay as they were allocated.
    """
    keys: set[tuple] = set()
    original = InterpretedFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        if self.fn.__module__.startswith(OURS):
            keys.add(launch_key(self.fn, self.kwargs, args, kwargs))
            if not run:
                return None
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = launch
    try:
        yield keys
    finally:
        InterpretedFunction.run = original


def unexpected(served: set, warmed: set) -> list[str]:
    """Keys of ``served`` not in ``warmed``, each beside the nearest that is."""
    lines = []
    for name, arguments, launch in sorted(served - warmed):
        others = [dict(key[1]) for key in warmed if key[0] == name and key[2] == launch]
        differences = [[f"{k}: {v} (warm: {o[k]})" for k, v in arguments if o[k] != v] for o in others]
        lines.append(f"{name}: {min(differences, key=len, default='never launched')}")
    return lines
