"""The parity matrix: its page is whole, and a few of its cells hold on every run of the tests."""

import re

import pytest
from parity import run
from parity.judge import VERDICTS, judge
from parity.rows import COLUMNS, ROWS

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

# Each must work. The first word is the runner.
CELLS = {
    "V1": (
        "temperature",
        "min-p",
        "repetition penalty",
        "logit bias",
        "logprobs, raw",
        "logprobs of specific tokens",
        "structured output: regex",
        "thinking budget",
    ),
    "V1, an engine of its own": (
        "custom logits processors",
        "custom logits processors that read the text so far",
    ),
    "V2": ("min-p", "logit bias", "logprobs of specific tokens", "structured output: regex"),
}
REQUESTS = {"V1": 48, "V2": 8}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the columns emitted, each run when it is first asked for."""
    folder, found = tmp_path_factory.mktemp("parity"), {}

    def column(name, cells):
        if (name, cells) not in found:
            requests = REQUESTS[COLUMNS[name].runner]
            result = folder / f"{name}{len(found)}.json"
            found[name, cells] = run.run_column(name, result, *CELLS[cells], requests=requests)
        return found[name, cells]

    return column


@pytest.mark.parametrize(
    "cells", [name if name == "V1" else pytest.param(name, marks=pytest.mark.long) for name in CELLS]
)
def test_these_cells_hold(ran, cells):
    runner = cells[:2].lower()
    if runner == "v2":
        pytest.importorskip("triton")
    plain, ours = (ran(f"{arm}-{runner}", cells) for arm in ("plain", "ours"))
    rows = [row for row in ROWS if row.name in CELLS[cells]]
    column = COLUMNS[f"ours-{runner}"]
    judged = {row.name: judge(row, column, ours[row.name], plain[row.name]) for row in rows}
    assert judged == dict.fromkeys(CELLS[cells], ("works", ""))


def test_draws_from_another_law_are_told(ran):
    """The test of the test: tokens drawn at temperature 0.4 do not pass for draws under other parameters."""
    found = {"greedy": [], "base": [], "sampled": ran("plain-v1", "V1")["temperature"]["sampled"]}
    column = COLUMNS["plain-v1"]
    for row in ROWS:
        if row.name in ("top-k", "top-p", "min-p", "logit bias", "allowed tokens"):
            verdict, note = judge(row, column, found, {})
            assert verdict == "wrong" and ("exact distribution" in note or "exclude" in note), row.name


def test_the_page_has_every_cell():
    lines = run.PAGE.read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0][1:] == [column.title for column in COLUMNS.values()]
    assert [cells[0] for cells in table[2:]] == [row.name for row in ROWS]
    notes = {line.split(".")[0] for line in lines if re.match(r"\d+\. \S", line)}
    used = set()
    for cells in table[2:]:
        assert len(cells) == len(COLUMNS) + 1
        for cell in cells[1:]:
            verdict, _, note = cell.partition(" [")
            assert verdict in VERDICTS, cell
            assert bool(note) == (verdict != "works"), cell
            used.add(note.rstrip("]"))
    assert used - {""} == notes
