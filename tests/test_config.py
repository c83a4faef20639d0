"""The option: every accepted form, and one sentence for every mistake."""

import subprocess
import sys

import pytest

from vllm_specopt.integration.config import Requested, SpecoptConfig, flag_of, parse, refusal, requested
from vllm_specopt.rules import PAPER, BlockConstants, BudgetConstants, SigmoidConstants, TypicalConstants


@pytest.mark.parametrize(
    "additional_config", [None, {}, {"other": 1}, {1: 2}, {"speculative_config": {}, "opt": 1}, object()]
)
def test_absent_option_is_none(additional_config):
    assert parse(additional_config) is None


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("exact", SpecoptConfig("exact", "error")),
        ({"method": "exact"}, SpecoptConfig("exact", "error")),
        ({"method": "exact", "on_unknown_vllm": "stock"}, SpecoptConfig("exact", "stock")),
        ({"method": "exact", "allow_per_request": False, "sigmoid": None}, SpecoptConfig("exact")),
        ({"method": "sigmoid", "sigmoid": "paper"}, SpecoptConfig("sigmoid", rule=PAPER)),
        (
            {"method": "sigmoid", "sigmoid": {"alpha": -10, "beta": 10.5}},
            SpecoptConfig("sigmoid", rule=SigmoidConstants(-10.0, 10.5, -10.0, 10.5)),
        ),
        (
            {"method": "exact", "sigmoid": "paper", "allow_per_request": True},
            SpecoptConfig("exact", rule=PAPER, allow_per_request=True),
        ),
        ("block", SpecoptConfig("block", rule=BlockConstants())),
        (
            {"method": "block", "allow_per_request": True},
            SpecoptConfig("block", rule=BlockConstants(), allow_per_request=True),
        ),
        (
            {"method": "typical", "typical": {"epsilon": 0.3, "delta": 1}},
            SpecoptConfig("typical", rule=TypicalConstants(0.3, 1.0)),
        ),
        ({"method": "budget", "budget": {"delta": 0.1}}, SpecoptConfig("budget", rule=BudgetConstants(0.1))),
        ({"method": "exact", "audit": True}, SpecoptConfig("exact", audit=1.0)),
        ({"method": "exact", "audit": False}, SpecoptConfig("exact")),
        ({"method": "block", "audit": 0.1}, SpecoptConfig("block", rule=BlockConstants(), audit=0.1)),
        ({"method": "exact", "audit": 1}, SpecoptConfig("exact", audit=1.0)),
        ({"method": "exact", "sharded": True}, SpecoptConfig("exact", sharded=True)),
        ({"method": "exact", "sharded": True, "audit": False}, SpecoptConfig("exact", sharded=True)),
        (
            {"method": "stock", "audit": True, "on_unknown_vllm": "stock"},
            SpecoptConfig("stock", "stock", audit=1.0),
        ),
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
        (True, r"specopt is True, expected a method \('exact' or 'sigmoid' or 'block' or .*\) or a mapping"),
        (["exact"], r"specopt is \['exact'\], expected a method"),
        (
            "sigmoid",
            r"specopt\.sigmoid is missing \(method is 'sigmoid'\), expected \"paper\" .* or \{\"alpha\"",
        ),
        (
            {"method": "exact", "allow_per_request": True},
            r"specopt\.allow_per_request is true, but there is no method to choose beside 'exact': give the constants",
        ),
        (
            {"method": "exact", "allow_per_request": True, "sigmoid": "paper", "budget": {"delta": 1}},
            r"specopt has constants of 'sigmoid' and 'budget', expected those of one method",
        ),
        (
            {"method": "sigmoid", "sigmoid": "paper", "budget": {"delta": 1}},
            r"specopt\.budget is given, but nothing can use it: method is 'sigmoid'$",
        ),
        ("budget", r"specopt\.budget is missing \(method is 'budget'\), expected \{\"delta\": \.\.\.\}"),
        ("typical", r"specopt\.typical is missing \(method is 'typical'\), expected \{\"epsilon\": \.\.\., "),
        *(
            (
                {"method": "exact", "audit": value},
                r"specopt\.audit is .*, expected true, false, or the share of steps, above 0 and up to 1",
            )
            for value in (0, 0.0, -0.1, 1.5, float("nan"), "yes", None)
        ),
        ({"method": "exact", "sharded": 2}, r"specopt\.sharded is 2, expected true or false"),
        *(
            ({"method": "exact", "sharded": True} | more, rf"specopt\.sharded is true and {said}: sharded verification")
            for more, said in (
                ({"method": "block"}, "method is 'block'"),
                ({"audit": 0.1}, "an audit is asked for"),
                ({"sigmoid": "paper", "allow_per_request": True}, "allow_per_request is true"),
            )
        ),
        ("stock", r"specopt\.method is 'stock', which leaves nothing to do without an audit; add \"audit\": true"),
        ({"method": "stock", "audit": True, "allow_per_request": True}, r"allow_per_request is given, but nothing can"),
        ({"method": "stock", "audit": True, "sigmoid": "paper"}, r"sigmoid is given, .*: method is 'stock'"),
        ({"method": "block", "block": {}}, r"specopt has the unknown key 'block', expected 'method' or"),
        ({"method": "budget", "budget": {}}, r"specopt\.budget lacks the key delta, expected a number"),
        ({"method": "budget", "budget": 0.1}, r"specopt\.budget is 0\.1, expected \{\"delta\": \.\.\.\}"),
        *(
            (
                {"method": "budget", "budget": {"delta": value}},
                r"specopt\.budget\.delta is .*, expected a number from 0 to 1e30",
            )
            for value in (-0.1, float("nan"), None, "1", True)
        ),
        *(
            (
                {"method": "typical", "typical": {"epsilon": value, "delta": 1}},
                r"specopt\.typical\.epsilon is .*, expected a number from 0 to 1",
            )
            for value in (-0.1, 1.1, float("nan"))
        ),
        (
            {"method": "typical", "typical": {"epsilon": 0.1}},
            r"specopt\.typical lacks the key delta, expected a number",
        ),
        (
            {"method": "exact", "sigmoid": "paper"},
            r"specopt\.sigmoid is given, but nothing can use it: method is 'exact' and allow_per_request is not true",
        ),
        (
            {"method": "exact", "allow_per_request": "yes"},
            r"specopt\.allow_per_request is 'yes', expected true or false",
        ),
        ({"method": "sigmoid", "sigmoid": "typical"}, r"specopt\.sigmoid is 'typical', expected \"paper\""),
        ({"method": "sigmoid", "sigmoid": 3}, r"specopt\.sigmoid is 3, expected \"paper\""),
        ({"method": "sigmoid", "sigmoid": {"alpha": 1}}, r"specopt\.sigmoid lacks the key beta, expected a number"),
        (
            {"method": "sigmoid", "sigmoid": {"calibration": "file.json"}},
            r"specopt\.sigmoid has the unknown key 'calibration', expected 'alpha' or 'beta'",
        ),
        (
            {"method": "sigmoid", "sigmoid": {"alpha": 2, "beta": 2}},
            r"specopt\.sigmoid\.alpha is 2\.0, expected less than specopt\.sigmoid\.beta \(2\.0\)",
        ),
        (
            {"method": "sigmoid", "sigmoid": {"alpha": 1e9, "beta": 1e9 + 1}},
            r"specopt\.sigmoid\.alpha is 1000000000\.0, expected less than specopt\.sigmoid\.beta",
        ),
        *(
            (
                {"method": "sigmoid", "sigmoid": {"alpha": 0, "beta": value}},
                r"specopt\.sigmoid\.beta is .*, expected a number from -1e30 to 1e30",
            )
            for value in (float("nan"), float("inf"), "1e4", True, None, 10**400)
        ),
    ],
)
def test_mistakes_are_named(option, message):
    with pytest.raises(ValueError, match=message) as error:
        parse({"specopt": option})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        *("spec_opt", "specOpt", "SPECOPT", "Specopt", "spec-opt", "spec opt", "specopt ", " specopt", "--specopt"),
        *("vllm_specopt", "vllm-specopt", "vllmSpecOpt", "specopts", "specpot", "sepcopt", "specop", "specot"),
    ],
)
def test_a_misspelt_key_is_not_silence(key):
    for config in ({key: "exact"}, {key: None}, {"other": 1, key: {"method": "exact"}, "specopt": "exact"}):
        with pytest.raises(ValueError, match=r"^additional_config has the key .*, did you mean 'specopt'\?$") as error:
            parse(config)
        assert repr(key) in str(error.value)


def test_null_is_not_silence():
    with pytest.raises(
        ValueError, match=r"^specopt is null, expected a method \('exact' or 'sigmoid' or .*\); leave the"
    ):
        parse({"specopt": None})


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, Requested()),
        ({}, Requested()),
        ({"other": 1}, Requested()),
        ({"specopt": None}, Requested()),
        ({"specopt": "sigmoid"}, Requested("sigmoid")),
        ({"specopt": {"method": "exact"}, "other": 1}, Requested("exact")),
        ({"specopt": {"method": "budget", "delta": 2}}, Requested("budget", 2.0)),
        ({"specopt": {"delta": 0.5}}, Requested(None, 0.5)),
    ],
)
def test_what_a_request_asks_for(extra_args, expected):
    assert requested(extra_args) == expected


def test_what_verify_is_told_of_a_request():
    paper = SpecoptConfig("exact", rule=PAPER, allow_per_request=True)
    assert [flag_of(paper, {"specopt": choice}) for choice in (None, "exact", "sigmoid")] == [0.0, 0.0, 1.0]
    budget = SpecoptConfig("budget", rule=BudgetConstants(0.3), allow_per_request=True)
    choices = (None, "exact", "budget", {"delta": 0.1}, {"method": "budget", "delta": 0.2})
    assert [flag_of(budget, {"specopt": choice}) for choice in choices] == [0.3, 0.0, 0.3, 0.1, 0.2]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (Requested("typical"), "the server offers 'exact' or 'budget'"),
        (Requested("exact", 0.1), "delta belongs to the method 'budget', and the request's is 'exact'"),
        (Requested("budget", 0.1), None),
        (Requested("exact"), None),
    ],
)
def test_what_a_request_cannot_have(choice, reason):
    assert refusal(SpecoptConfig("budget", rule=BudgetConstants(0.3), allow_per_request=True), choice) == reason
    assert refusal(SpecoptConfig("budget", rule=BudgetConstants(0.3)), choice) is not None


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"delta": -1}, "delta'\\] is -1, expected a number from 0"), ({"delta": "x"}, "is 'x', expected a number")],
)
def test_a_budget_of_a_request_is_checked(choice, message):
    with pytest.raises(ValueError, match=message):
        requested({"specopt": choice})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fast", r"extra_args\['specopt'\] is 'fast', expected 'exact' or 'sigmoid'"),
        (1, r"extra_args\['specopt'\] is 1, expected"),
        ({"method": "fast"}, r"extra_args\['specopt'\]\['method'\] is 'fast', expected"),
        ({}, r"extra_args\['specopt'\]\['method'\] is None, expected"),
        ({"method": "exact", "alpha": 1}, r"extra_args\['specopt'\] has the unknown key 'alpha', expected 'method'"),
    ],
)
def test_mistakes_of_a_request_are_named(choice, message):
    with pytest.raises(ValueError, match=message):
        requested({"specopt": choice})


def test_option_cannot_be_changed_later():
    with pytest.raises(AttributeError):
        parse({"specopt": "exact"}).method = "other"


def test_config_needs_neither_torch_nor_vllm():
    code = "import sys, vllm_specopt.integration.config; print({'torch', 'vllm', 'triton'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
