"""On ``PYTHONPATH`` with TRITON_INTERPRET=1: what vLLM's V2 runner lacks to run under Triton's interpreter on a CPU.

Python imports this file in every process, so that engine and workers agree.
"""

import types

import one_patch  # noqa: F401
from triton import backends
from triton.runtime.interpreter import InterpreterBuilder

# vLLM looks for a CPU backend in Triton's list of backends, which only special builds have; the interpreter needs none.
driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)

# A mask made from a block and a scalar may reach the interpreter's loads and stores as integers.
load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def create_masked_load(self, ptrs, mask, *args):
    mask.data = mask.data.astype(bool)
    return load(self, ptrs, mask, *args)


def create_masked_store(self, ptrs, value, mask, *args):
    mask.data = mask.data.astype(bool)
    return store(self, ptrs, value, mask, *args)


InterpreterBuilder.create_masked_load = create_masked_load
InterpreterBuilder.create_masked_store = create_masked_store
