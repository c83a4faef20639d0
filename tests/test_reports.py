"""The table of reports names tests that exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reports.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:tests/|test_|case_|v2_cases)[\w/]*(?:\.py|\.\.\.)?)`", PAGE)))


def test_there_are_names():
    assert len(NAMED) > 40


@pytest.mark.parametrize("name", NAMED)
def test_the_test_exists(name):
    if name.endswith(".py"):
        assert list(TESTS.rglob(Path(name).name)), name
    else:
        defined = re.compile(
            rf"^def {name.removesuffix('...')}" + ("" if name.endswith("...") else r"\("), re.MULTILINE
        )
        assert any(defined.search(file.read_text()) for file in TESTS.rglob("*.py")), name
