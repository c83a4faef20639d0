"""An extension of vLLM's worker (``--worker-extension-cls``): how much of the C heap is in use, apart from its gaps."""

import ctypes

NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of the same name: sizes in bytes, or counts."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


class MallocInUse:
    """Adds one method that ``POST /collective_rpc`` of a server in development mode can call."""

    def malloc_in_use_mib(self) -> float:
        """MiB handed out by glibc's malloc and not given back: from all its arenas, and mapped on their own."""
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = _Mallinfo2
        now = mallinfo2()
        return (now.uordblks + now.hblkhd) / 2**20
