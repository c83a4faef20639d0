"""The counts of machine code are right where they are known by hand, and our kernels keep within their budgets."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specopt.benchmarks.kernels import budgets, cost, cost_model
from vllm_specopt.benchmarks.kernels.counting import Count
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.steps import OURS, STOCK, Step
from vllm_specopt.cli.main import app

SCRIPT = Path(__file__).parents[1] / "support" / "count_kernels.py"
ROUNDS, BLOCK, THREADS = (0, 5, 8, 2), 1024, 128
H100 = next(card for card in cost_model.CARDS if card.name == "H100")


def run(tmp_path: Path, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("architecture", [90, *(pytest.param(each, marks=pytest.mark.long) for each in (80, 100))])
def test_counts_are_those_known_by_hand(architecture: int, tmp_path: Path) -> None:
    answer = json.loads(run(tmp_path, "toy", str(architecture)))
    sweep, scale, search = answer["counts"]
    # One exponential per element and round, two more in the program with an odd number of rounds.
    assert sweep["pipes"]["mufu"] == pytest.approx((sum(ROUNDS) + 2) * BLOCK / 32)
    # 8 elements of a thread are two loads of 16 bytes; the number of rounds is one more load of every program.
    assert sweep["pipes"]["load"] == pytest.approx((2 * sum(ROUNDS) + len(ROUNDS)) * THREADS / 32)
    assert sweep["loaded"] == sum(ROUNDS) * BLOCK * 4 + len(ROUNDS) * 4
    assert sweep["stored"] == 3 * BLOCK * 4
    assert (scale["kernel"], scale["num_warps"], scale["loaded"]) == ("mul_", 0, max(ROUNDS) * BLOCK * 4)
    # Bisection of 0..16 by a sum over four warps, which is two barriers.
    assert search["pipes"]["barrier"] / 4 / 2 in (4, 5)
    assert sweep["spilled"] == search["spilled"] == 0
    # A body without a frequency is an error, and so is a weight with which too little is loaded.
    nothing, no_condition, everything = answer["undescribed"]
    loop, condition = "toy_kernel -> sweep: for step in range(rounds)", "toy_kernel: if rounds % 2 == 1"
    assert loop in nothing and condition in nothing
    assert loop not in no_condition and condition in no_condition
    assert everything == ""
    assert "the interpreter" in answer["lying"] and answer["loads_found"] < 0.95
    assert all(count["loads_found"] == 1 for count in answer["counts"])


def test_our_kernels_keep_within_their_budgets(tmp_path: Path) -> None:
    filtered = "top-k 50, top-p 0.9"
    settings = ("one-hot T=0.7", "one-hot T=0.7, fp32", "draft logits", filtered, f"{filtered}, flat rows")
    settings += ("audited one-hot T=1", "audited draft logits")
    assert run(tmp_path, "ours", *settings).splitlines() == []


@pytest.mark.long
def test_all_cases_of_the_command(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [str(Path(sys.executable).with_name("specopt")), "cost", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = json.loads((tmp_path / cost.JSON_NAME).read_text())["steps"]
    assert {(step["setting"], step["who"], step["architecture"]) for step in steps} >= {
        (setting, who, arch) for setting in cost.SETTINGS for who in (OURS, STOCK) for arch in cost.ARCHITECTURES
    }


def count(kernel: str, instructions: float, *, case: Case, **changes) -> Count:
    """A launch that issues so many instructions per logit of the target rows."""
    elements = case.batch * (case.num_drafts + 1) * case.vocab
    plain = Count(kernel, 1000, 4, 64, 0, 0, 32, 100.0, {"fp32": instructions * elements / 32}, elements * 2.0, 0.0)
    return replace(plain, **changes)


def counted(setting: str, counts: list[Count], case: Case, flat: bool = False) -> cost.Counted:
    return cost.Counted(setting, Step(OURS, case, flat), 90, tuple(counts))


def test_budgets_catch_what_exceeds_them() -> None:
    case = Case(64, 7, temperature=0.7)
    fine = [count("statistics_kernel", 9.9, case=case), count("decide_kernel", 0.6, case=case)]
    assert budgets.violations([counted("one-hot T=0.7", fine, case)]) == []
    worse = {
        "10.1 per element": [count("statistics_kernel", 10.1, case=case), fine[1]],
        "23 warps per SM": [replace(fine[0], warps=23), fine[1]],
        "spills 8 bytes": [fine[0], replace(fine[1], spilled=8)],
        "per row, budget 3000": [fine[0], count("decide_kernel", 0.7, case=case)],
        "no kernel is called decide": [fine[0]],
    }
    for words, counts in worse.items():
        (line,) = budgets.violations([counted("one-hot T=0.7", counts, case)])
        assert words in line
    wide = replace(case, dtype="fp32")
    assert (
        budgets.violations(
            [counted("one-hot T=0.7, fp32", [count("statistics_kernel", 14.9, case=wide), fine[1]], wide)]
        )
        == []
    )
    filtered = replace(case, top_p=0.9)
    for flat, limit in ((False, 30), (True, 90)):
        for used, exceeded in ((limit - 1, False), (limit + 1, True)):
            lines = budgets.violations(
                [counted("top-p 0.9", [count("decide_kernel", used, case=filtered)], filtered, flat)]
            )
            assert bool(lines) == exceeded


def test_the_share_of_the_audit_is_bound_where_launches_are_not_most_of_a_step() -> None:
    case = Case(64, 7, temperature=1.0)
    verification = [count("statistics_kernel", 10.0, case=case), count("decide_kernel", 0.5, case=case)]
    alone = cost_model.model(verification, H100, 1.0)
    for part, found in ((0.1, 0), (0.6, 1)):
        more = count("audit_kernel", 0.0, case=case, loaded=part * verification[0].loaded)
        step = counted("audited one-hot T=1", [*verification, more], case)
        lines = budgets.violations([step])
        assert len(lines) == found and all("audit" in line and "share" in line for line in lines)
        whole = step.modelled(H100)
        assert step.audit_share(H100) == pytest.approx(max(whole.low / alone.low, whole.high / alone.high) - 1)
    launches = [replace(each, pipes={}, loaded=0.0) for each in [*verification, more]]
    step = counted("audited one-hot T=1", launches, case)
    assert step.audit_share(H100) == pytest.approx(0.5) and budgets.violations([step]) == []


def test_model_is_bound_by_the_slowest_resource_and_by_launches() -> None:
    case = Case(256, 3)
    sweep = count("statistics_kernel", 1.0, case=case)
    modelled = cost_model.model([sweep], H100, sweep.loaded)
    assert modelled.floor == pytest.approx(sweep.loaded / 3.35e6)
    assert modelled.low == pytest.approx(modelled.floor + cost_model.LAUNCH_US)
    assert modelled.high > modelled.low
    slow = replace(sweep, pipes={"mufu": sweep.pipes["fp32"]})
    elements = case.batch * 4 * case.vocab
    assert cost_model.model([slow], H100, 1).low == pytest.approx(
        max(elements / 16 / 132 / 1755, modelled.floor) + cost_model.LAUNCH_US
    )
    assert cost_model.model([sweep, sweep], H100, 1).low == pytest.approx(2 * modelled.low)


def test_record_and_bad_input(tmp_path: Path) -> None:
    case = Case(1, 3, temperature=0.7)
    steps = [counted("one-hot T=0.7", [count("statistics_kernel", 8.0, case=case)], case)]
    cost.write(steps, tmp_path)
    (row,) = csv.DictReader((tmp_path / cost.CSV_NAME).open())
    assert (row["kernel"], row["instructions_per_element"], row["architecture"]) == ("statistics_kernel", "8.0", "90")
    document = json.loads((tmp_path / cost.JSON_NAME).read_text())
    assert set(document["steps"][0]["model_us"]) == {"H100", "H200"}
    assert "no GPU ran this" in document["note"]
    for arguments, words in ((["--case", "nothing"], "one-hot T=0.7"), (["--arch", "75"], "80, 90 or 100")):
        result = CliRunner().invoke(app, ["cost", *arguments])
        assert result.exit_code == 2 and words in " ".join(result.output.split())
