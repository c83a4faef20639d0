"""The option: every accepted form, and one sentence for every mistake."""

import subprocess
import sys

import pytest

from vllm_specopt.config import SpecoptConfig, parse


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, {"specopt": None}, object()])
def test_absent_option_is_none(additional_config):
    assert parse(additional_config) is None


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("exact", SpecoptConfig("exact", "error")),
        ({"method": "exact"}, SpecoptConfig("exact", "error")),
        ({"method": "exact", "on_unknown_vllm": "stock"}, SpecoptConfig("exact", "stock")),
    ],
)
def test_accepted_forms(option, expected):
    assert parse({"specopt": option, "other": {"x": 1}}) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fast", r"specopt\.method is 'fast', expected 'exact'"),
        ({"method": 3}, r"specopt\.method is 3, expected 'exact'"),
        ({"method": ["exact"]}, r"specopt\.method is \['exact'\], expected 'exact'"),
        ({}, r"specopt lacks the key method, expected 'exact'"),
        ({"on_unknown_vllm": "stock"}, r"specopt lacks the key method"),
        (
            {"method": "exact", "alpha": 1.0},
            r"specopt has the unknown key 'alpha', expected 'method' or 'on_unknown_vllm'",
        ),
        (
            {"method": "exact", "on_unknown_vllm": "ignore"},
            r"specopt\.on_unknown_vllm is 'ignore', expected 'error' or 'stock'",
        ),
        (True, r"specopt is True, expected a method \('exact'\) or a mapping"),
        (["exact"], r"specopt is \['exact'\], expected a method"),
    ],
)
def test_mistakes_are_named(option, message):
    with pytest.raises(ValueError, match=message) as error:
        parse({"specopt": option})
    assert "\n" not in str(error.value)


def test_option_cannot_be_changed_later():
    with pytest.raises(AttributeError):
        parse({"specopt": "exact"}).method = "other"


def test_config_needs_neither_torch_nor_vllm():
    code = "import sys, vllm_specopt.config; print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
