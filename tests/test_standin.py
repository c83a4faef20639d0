"""Real V2 engines with CUDA graphs and async scheduling on the stand-in GPU: what can go wrong on the host's side.

The libraries of scripts/gpu/standin/ pretend that an H100 is there and compute nothing; PyTorch, Triton and vLLM take
their whole CUDA path. A launch that a driver would refuse, and a synchronisation in our step, fail there.
"""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_specopt.benchmarks.serve.engine import KERNELS

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "gpu"
PYTHON = os.environ.get("SPECOPT_STANDIN_PYTHON", "")
UNPACKED = Path(os.environ.get("SPECOPT_UNPACKED", "/tmp/specopt-gpu"))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_the_stand_in_driver_refuses_what_a_driver_would(tmp_path):
    library = tmp_path / "libcuda.so"
    source = SCRIPTS / "standin" / "drv.c"
    subprocess.run(["gcc", "-w", "-fPIC", "-shared", "-fno-builtin", "-o", library, source], check=True)
    launch = ctypes.CDLL(library).cuLaunchKernelEx

    def status(*config: int) -> int:
        return launch((ctypes.c_uint * 16)(*config), ctypes.c_void_p(8), None, None)

    assert status(19456, 1, 1, 32, 1, 1, 0) == 0 and status(2**31 - 1, 1, 1, 1024, 1, 1, 232448) == 0
    for grid, threads, shared in (
        ((0, 1, 1), 32, 0),
        ((1, 65536, 1), 32, 0),
        ((1, 1, 1), 2048, 0),
        ((1, 1, 1), 32, 1 << 20),
    ):
        assert status(*grid, threads, 1, 1, shared) != 0


@pytest.mark.long
@pytest.mark.skipif(
    not (os.access(PYTHON, os.X_OK) and (UNPACKED / "env.sh").is_file()),
    reason="SPECOPT_STANDIN_PYTHON names no Python 3.12 with torch 2.11 for CUDA, or no bundle is unpacked",
)
def test_v2_engines_wait_for_nothing_and_compile_nothing_after_the_warm_up(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environ |= {"PYTHON": PYTHON, "OUT": str(tmp_path), "ONLY": "engines", "SPECOPT_ENGINES": "exact.*V2"}
    environ |= {"SPECOPT_STANDIN": "1", "SPECOPT_UNPACKED": str(UNPACKED)}
    subprocess.run(["bash", str(SCRIPTS / "standin" / "build.sh")], env=environ, check=True)
    command = ["bash", str(SCRIPTS / "standin" / "run.sh"), "bash", str(SCRIPTS / "first_run.sh")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    runs = json.loads((tmp_path / "engines.json").read_text())["runs"]
    assert [run["drafting"] for run in runs] == ["greedy", "no", "probabilistic"]
    for run in runs:
        assert run["status"] == 0 and run["warmed_up"] and "runner=V2" in run["active"][0]
        assert run["async_scheduling"] and run["cudagraph_mode"] == "FULL_DECODE_ONLY"
        assert not set(run["compiled_in_flight"]) & set(KERNELS)
