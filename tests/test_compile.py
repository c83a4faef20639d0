"""The kernels' variants compile for GPUs that are not there, and none spills registers at V = 151,936."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support" / "compile_kernels.py"
ARCHITECTURES = (80, 90, 100)
KERNELS = {"row_statistics_kernel", "filter_threshold_kernel", "emission_kernel", "token_output_kernel"}
CALIBRATED = {"row_shift_kernel", "emitting_row_kernel"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile for all architectures side by side: {architecture: list of results}."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = {}
    for architecture in ARCHITECTURES:
        env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"sm{architecture}"))
        command = [sys.executable, str(SCRIPT), str(architecture)]
        running[architecture] = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    results = {}
    for architecture, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        results[architecture] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(compiled, architecture):
    results = compiled[architecture]
    assert {result["kernel"] for result in results} == KERNELS | (CALIBRATED if architecture == 90 else set())
    assert len(results) >= (80 if architecture == 90 else 60)
    methods = ("sigmoid", "mixed", "calibrated")
    by_scores = {result["variant"] for result in results if result["variant"].endswith(methods)}
    assert bool(by_scores) == (architecture == 90)
    spilling = [(r["kernel"], r["variant"], r["spilled_bytes"]) for r in results if r["spilled_bytes"]]
    assert not spilling
    assert all(r["cubin_bytes"] > 0 and r["registers"] <= 255 for r in results)
