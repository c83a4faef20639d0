"""Importing a module of ours, whichever it is, leaves vLLM as it was: only the entry point and a command change it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[1]
CODE = """
import importlib, pkgutil, sys
import vllm.engine.arg_utils, vllm.v1.engine.input_processor, vllm.v1.worker.gpu_model_runner
import vllm.v1.sample.rejection_sampler, vllm.v1.worker.worker_base, vllm.utils.cpu_triton_utils
import vllm_specopt

def snapshot():
    found = {}
    for name in [m for m in sys.modules if m.split(".")[0] == "vllm"]:
        for key, value in list(vars(sys.modules[name]).items()):
            if getattr(value, "__module__", None) == name:
                found[name, key] = value
                if isinstance(value, type):
                    found.update({(name, key, member): vars(value)[member] for member in list(vars(value))})
    return {where: value for where, value in found.items() if callable(value)}

before = snapshot()
modules = [m.name for m in pkgutil.walk_packages(vllm_specopt.__path__, "vllm_specopt.")]
for module in modules:
    importlib.import_module(module)
after = snapshot()
changed = [where for where, value in before.items() if after.get(where) is not value]
assert not changed, changed
assert {"vllm_specopt.integration.plugin", "vllm_specopt.benchmarks.serve.repaired"} <= set(modules)
assert any(module.startswith("vllm_specopt.kernels.") for module in modules)
assert len(before) > 5000, len(before)
if "repair" in sys.argv:
    from vllm_specopt.benchmarks.serve.engine import repair_expand_kernel
    repair_expand_kernel()
    assert snapshot() != before
"""


def test_importing_any_module_leaves_vllm_alone():
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CODE, "repair"], capture_output=True, text=True, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
