"""Triton's interpreter replaces the language's functions anew at every call of a device function; once is enough."""

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patched = set()


def _patch_once(fn):
    langs = {name for name, lang in (("tl", tl), ("core", tl.core)) if any(v is lang for v in fn.__globals__.values())}
    if langs <= _patched:
        return interpreter._LangPatchScope()
    scope = _patch_lang(fn)
    if not _patched:
        restore = scope.restore

        def restore_all():
            _patched.clear()
            restore()

        scope.restore = restore_all
    _patched.update(langs)
    return scope


interpreter._patch_lang = _patch_once
