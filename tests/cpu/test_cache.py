"""Compiled code is kept until any file of the package changes, and does without a place to keep it."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numba
import pytest
from numba.core import caching

from vllm_specopt import cpu
from vllm_specopt.cpu import cache
from vllm_specopt.cpu.requests import verify_requests

FOLDER = Path(cpu.__file__).parent
SOURCES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.py"))


@pytest.mark.parametrize("name", SOURCES, ids=str)
def test_any_change_of_any_file_changes_the_digest(tmp_path, name):
    copy = tmp_path / "cpu"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = cache.digest(copy)
    assert before == cache.digest(FOLDER)
    (copy / name).write_text((copy / name).read_text() + "#")
    assert cache.digest(copy) != before
    (copy / name).unlink()
    assert cache.digest(copy) != before


def test_the_entry_point_is_kept_under_the_digest():
    assert verify_requests.__qualname__.endswith(cache.digest(FOLDER))


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Compile an entry point of one line, in a module of its own, as often as it is called."""
    source = tmp_path / "entry.py"
    source.write_text("def entry(job):\n    job + 1\n")

    def compile_anew(digest):
        monkeypatch.setattr(cache, "digest", lambda folder: digest)
        spec = importlib.util.spec_from_file_location("entry", source)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "entry", module)
        spec.loader.exec_module(module)
        return cache.compile_entry(module.entry)

    return compile_anew


@pytest.mark.parametrize("directory", ["", "elsewhere"])
def test_kept_beside_the_sources_or_where_numba_is_told(entry, tmp_path, monkeypatch, directory):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / directory) if directory else "")
    assert [entry(digest).cache_hits for digest in ("one", "one", "two", "two", "one")] == [0, 1, 0, 1, 1]
    assert len(list((tmp_path / (directory or "__pycache__")).rglob("*.nbi"))) == 2


def test_compiled_all_the_same_where_nothing_can_be_written(entry, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert [entry("one").cache_hits, entry("one").cache_hits] == [0, 0]
    assert entry("one").address
