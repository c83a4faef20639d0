"""Triton's interpreter without what it does anew at each operation though it never changes.

It replaces the language's functions at every call of a device function, looks numpy's types up in a dictionary built
for the purpose, works out each block's shape and name from the start, and copies CPU tensors onto themselves after a
launch. It finds out what two operands have in common where they are alike, makes each constant anew, and computes sums
in 64 bits for an assertion that is switched off. Results stay bit for bit the same.
"""

import math

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_get_np_dtype = interpreter._get_np_dtype
_convert_float = interpreter._convert_float
_restore_args = interpreter.GridExecutor._restore_args_dev
_init_block = tl.block_type.__init__
_match = TritonSemantic.binary_op_type_checking_impl
_match_bits = TritonSemantic.bitwise_op_type_checking_impl
_sanitize = TritonSemantic.binary_op_sanitize_overflow_impl
_unwrap = tl.core._unwrap_if_constexpr
# What the language's own functions are wrapped in, which asks whether they are called in a kernel.
_CHECKED = tl.core.builtin(lambda: None).__code__
_PLAIN = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)}
_CPU = torch.device("cpu")
_INTEGERS = {"int1", "int32", "uint32", "int64", "uint64"}
# Of these, two operands of one type are added, multiplied, compared and divided as they are.
_AS_THEY_ARE = _INTEGERS | {"fp32", "fp64"}
_MOST_CONSTANTS = 10_000
_constants = {}
_langs, _patched, _np_dtypes, _blocks, _shapes = {}, set(), {}, {}, {}


def _patch_once(fn):
    if fn not in _langs:
        known = {"tl": tl, "core": tl.core}
        _langs[fn] = {name for name, lang in known.items() if any(v is lang for v in fn.__globals__.values())}
    if _langs[fn] <= _patched:
        return interpreter._LangPatchScope()
    scope = _patch_lang(fn)
    if not _patched:
        restore = scope.restore

        def restore_all():
            _patched.clear()
            restore()

        scope.restore = restore_all
    _patched.update(_langs[fn])
    return scope


def _np_dtype(dtype):
    found = _np_dtypes.get(dtype.name)
    if found is None:
        found = _np_dtypes[dtype.name] = _get_np_dtype(dtype)
    return found


def _convert(data, source, target, rounding_mode):
    if source is tl.bfloat16 and target is tl.float32:
        # The one conversion that all rows of logits go through.
        return data.astype(np.uint32) << np.uint32(16)
    return _convert_float(data, source, target, rounding_mode)


def _init_known_block(self, element_ty, shape):
    key = element_ty.name, *(getattr(size, "value", size) for size in shape)
    if key in _blocks:
        self.element_ty = element_ty
        self.shape, self.numel, self.name = _blocks[key]
    else:
        _init_block(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name


def _init_tensor(self, handle, type):
    shape = (*type.shape,) if type.is_block() else ()
    if shape not in _shapes:
        _shapes[shape] = tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
    self.shape, self.numel = _shapes[shape]
    self.handle, self.type, self.dtype = handle, type, type.scalar


def _restore(self, args_dev, args_hst, kwargs, kwargs_hst):
    if any(getattr(arg, "device", _CPU) != _CPU for arg in (*args_dev, *kwargs.values())):
        _restore_args(self, args_dev, args_hst, kwargs, kwargs_hst)


def _patch_member(obj, name, member, builder, scope):
    inner = member.__wrapped__ if member.__code__ is _CHECKED else member

    def call(*args, **kwargs):
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return inner(*args, **kwargs)

    scope.set_attr(obj, name, call)


def _unwrapped(value):
    kind = type(value)
    return value if kind in _PLAIN else value.value if kind is tl.constexpr else _unwrap(value)


def _matched(self, lhs, rhs, *flags):
    if not isinstance(lhs, tl.tensor) or lhs.dtype.name not in _AS_THEY_ARE:
        return _match(self, lhs, rhs, *flags)
    name = lhs.type.name
    if isinstance(rhs, tl.tensor):
        return (lhs, rhs) if rhs.type.name == name else _match(self, lhs, rhs, *flags)
    if type(rhs) not in (int, float, bool):
        return _match(self, lhs, rhs, *flags)
    # Minus zero equals zero, NaN does not equal itself.
    key = name, type(rhs), rhs.hex() if isinstance(rhs, float) else rhs, flags
    if key not in _constants:
        matched, constant = _match(self, lhs, rhs, *flags)
        if matched is not lhs:
            return matched, constant
        if len(_constants) == _MOST_CONSTANTS:
            _constants.clear()
        _constants[key] = constant
    return lhs, _constants[key]


def _matched_bits(self, lhs, rhs):
    alike = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and lhs.type.name == rhs.type.name
    return (lhs, rhs) if alike and lhs.dtype.name in _INTEGERS else _match_bits(self, lhs, rhs)


def _sanitized(self, lhs, rhs, operation):
    if self.builder.options.debug:
        _sanitize(self, lhs, rhs, operation)


interpreter._patch_lang = _patch_once
interpreter._patch_attr = _patch_member
interpreter._get_np_dtype = _np_dtype
interpreter._convert_float = _convert
interpreter.GridExecutor._restore_args_dev = _restore
tl.core._unwrap_if_constexpr = _unwrapped
tl.block_type.__init__ = _init_known_block
tl.tensor.__init__ = _init_tensor
TritonSemantic.binary_op_type_checking_impl = _matched
TritonSemantic.bitwise_op_type_checking_impl = _matched_bits
TritonSemantic.binary_op_sanitize_overflow_impl = _sanitized
