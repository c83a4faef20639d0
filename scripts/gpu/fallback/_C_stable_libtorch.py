"""Stands in for vLLM's compiled operators where they do not load: what its V2 runner cannot do without, in Python.

All operators are declared (vLLM looks many up while it is imported), these few exist. With them the samplers work, and
engines with custom_ops=["none"], TRITON_ATTN and native RMSNorm (see steps.py).
"""

from pathlib import Path

import torch

_libraries = {}
for _schema in (Path(__file__).with_name("_C_schemas.txt")).read_text().splitlines():
    _namespace, _, _rest = _schema.partition("::")
    if _namespace not in _libraries:
        _libraries[_namespace] = torch.library.Library(_namespace, "FRAGMENT")
    _libraries[_namespace].define(_rest)


class _Pinned:
    """Pinned host memory has the same address on the device."""

    def __init__(self, tensor):
        kind = "|b1" if tensor.dtype is torch.bool else tensor.numpy().dtype.str
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": kind, "data": (tensor.data_ptr(), False), "version": 3,
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
        }  # fmt: skip
        self.owner = tensor


def _view(cpu_tensor):
    if not cpu_tensor.numel():
        return torch.empty(cpu_tensor.shape, dtype=cpu_tensor.dtype, device="cuda")
    return torch.as_tensor(_Pinned(cpu_tensor), device="cuda")


_libraries["_C"].impl("get_cuda_view_from_cpu_tensor", _view, "CPU")
for _name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8"):
    _libraries["_C"].impl(_name, lambda capability: False, "CompositeExplicitAutograd")
