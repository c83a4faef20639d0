"""The progress of a run with a known plan: the time left follows the pace of the stages that are done."""

import io

import pytest
from rich.console import Console

from vllm_specopt.benchmarks import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def told(clock, seconds: list[float], is_known: bool = True) -> list[str]:
    """What a run of four stages, planned with 10 seconds each, says when they take other times."""
    console = Console(file=io.StringIO(), width=80)
    with progress.Stages(console, [(f"stage {number}", 10.0) for number in range(4)], is_known) as stages:
        for taken in seconds:
            with stages.next():
                clock[0] += taken
                stages.tick()
    return console.file.getvalue().splitlines()


def test_as_planned(clock):
    assert told(clock, [10.0] * 4) == [f"stage {n} ({n + 1}/4), about {40 - 10 * n} s left" for n in range(4)]


def test_a_slow_machine_is_believed_step_by_step(clock):
    left = [int(line.split()[-3]) for line in told(clock, [30.0] * 4)]
    assert left[0] == 40 and 50 < left[1] < 90 and 40 < left[2] < 60 and 20 < left[3] < 30


def test_stages_that_were_done_before_do_not_promise_the_rest_for_nothing(clock):
    left = [int(line.split()[-3]) for line in told(clock, [0.0, 0.0, 10.0, 10.0])]
    assert left[2] > 5


def test_a_guess_is_not_told_before_half_is_done(clock):
    lines = told(clock, [30.0] * 4, is_known=False)
    assert lines[:2] == ["stage 0 (1/4)", "stage 1 (2/4)"]
    assert [int(line.split()[-3]) for line in lines[2:]] == [
        int(line.split()[-3]) for line in told(clock, [30.0] * 4)[2:]
    ]
