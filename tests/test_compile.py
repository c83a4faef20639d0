"""The kernels' variants compile for GPUs that are not there, and none spills registers at V = 151,936."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support" / "compile_kernels.py"
KERNELS = {
    *("statistics_kernel", "decide_kernel", "residual_kernel", "audit_sweep_kernel", "audit_kernel"),
    *("shard_sweep_kernel", "cut_tiles_kernel", "shard_decide_kernel", "shard_end_kernel"),
    *("shard_residual_kernel", "shard_recover_kernel", "shard_write_kernel"),
    *("shard_filter_kernel", "shard_pack_kernel", "shard_flat_kernel"),
}
# Of a rank among several, and of a single one.
ALIKE = {
    "shard_sweep_kernel": "statistics_kernel",
    "cut_tiles_kernel": "statistics_kernel",
    "shard_decide_kernel": "decide_kernel",
    "shard_residual_kernel": "residual_kernel",
    "shard_recover_kernel": "residual_kernel",
}
ALIKE_FILTERED = dict.fromkeys(
    ("shard_decide_kernel", "shard_filter_kernel", "shard_flat_kernel"), "decide_kernel"
) | dict.fromkeys(("shard_sweep_kernel", "cut_tiles_kernel"), "statistics_kernel")


@pytest.mark.parametrize(
    ("architecture", "which", "least"),
    [
        (90, [], 30),
        pytest.param(90, ["all"], 80, marks=pytest.mark.long),
        pytest.param(80, [], 30, marks=pytest.mark.long),
        pytest.param(100, [], 30, marks=pytest.mark.long),
    ],
)
def test_every_variant_compiles_without_spills(architecture, which, least, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), str(architecture), *which]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {result["kernel"] for result in results} == KERNELS
    assert len(results) >= least
    assert any(result["variant"].endswith("mixed") for result in results)
    spilling = [(r["kernel"], r["variant"], r["spilled_bytes"]) for r in results if r["spilled_bytes"]]
    assert not spilling
    assert_shards_add_up_alike(results)
    assert all(r["cubin_bytes"] > 0 and r["registers"] <= 255 for r in results)


def assert_shards_add_up_alike(results: list[dict]) -> None:
    """A rank's kernels add up tiles in the layouts of a single rank's: that is why their sums have the same bits."""
    for filtered, alike in ((False, ALIKE), (True, ALIKE_FILTERED)):
        orders: dict[tuple[str, str], set[str]] = {}
        for result in results:
            dtype, *_, rule = result["variant"].split("-")
            if rule == "exact" and ("filtered" in result["variant"]) == filtered:
                # How many tiles are added up side by side does not change how one of them is.
                kinds = {re.sub(r" \d+x(?=\d)", " ", order) for order in result["orders"]}
                orders.setdefault((dtype, result["kernel"]), set()).update(kinds)
        compared = [key for key in orders if key[1] in alike]
        assert {kernel for _, kernel in compared} == set(alike)
        for dtype, kernel in compared:
            found = orders[dtype, kernel]
            assert found
            assert found <= orders[dtype, alike[kernel]], (dtype, kernel)
