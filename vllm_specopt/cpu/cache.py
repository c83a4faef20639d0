"""Compiling the entry point, and keeping the result on disk until any file of this package changes.

numba's own cache looks at the file of the entry point alone. The digest of all of them goes into the entry point's
name, of which numba makes the name of its cache files.
"""

import hashlib
from pathlib import Path

from numba import cfunc, types


def digest(folder: Path) -> str:
    """Digest of the Python sources in a folder and those below, names included."""
    sources = sorted(folder.rglob("*.py"))
    lines = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sources]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def compile_entry(function):
    """Compile a function of one address to a C function.

    Kept in ``__pycache__`` beside the function's file, or in numba's per-user directory where that is read-only
    (``NUMBA_CACHE_DIR`` overrides both); compiled in every process where neither can be written.
    """
    signature, options = types.void(types.intp), {"nopython": True, "error_model": "numpy"}
    function.__qualname__ += "_" + digest(Path(__file__).parent)
    try:
        return cfunc(signature, cache=True, **options)(function)
    except RuntimeError:
        return cfunc(signature, **options)(function)
