"""Launches of variants that are compiled already, without Triton's look at every argument of every launch.

Triton compiles a kernel once per combination of its arguments' types, alignments and constants, and finds the variant
of a launch by looking at all of them. For kernels with 40 arguments that takes the host four times as long as the
launch. What the launches of one step are compiled for follows from a few properties of the step, so that one key,
:func:`variant_of`, serves all of them.
"""

import torch

ALIGNMENT = 16
"""Bytes; all that Triton's CUDA backend looks at in a pointer (AMD's also looks at the size of what is there)."""


def variant_of(given: list[torch.Tensor | None], aligned: list[torch.Tensor | None], values: tuple) -> tuple:
    """What a step's kernels are compiled for.

    Args:
        given: All tensors that the step was given. Scratch follows from them.
        aligned: Those of which a kernel is specialised on the alignment.
        values: All else that an argument or a constant of a kernel follows from.
    """
    return (
        *values,
        *[None if tensor is None else tensor.dtype for tensor in given],
        *[tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in aligned],
    )


class Launcher:
    """Launches one kernel."""

    def __init__(self, kernel):
        self._kernel, self._compiled = kernel, {}

    def __call__(self, variant: tuple, grid: tuple[int, ...], options: dict[str, int], *args, **constants) -> None:
        """Launch with Triton's ``options``; ``args`` and ``constants`` in the kernel's order."""
        compiled = self._compiled.get(variant)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*args, *constants.values())
            return
        # Triton compiles it or finds what it has; None under its interpreter.
        self._compiled[variant] = self._kernel[grid](*args, **constants, **options)
