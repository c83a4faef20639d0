"""The option that turns the plugin on: ``additional_config["specopt"]``; and a request's own choice of method."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_specopt.rules import RULES, BudgetConstants, Constants, parse_constants, parse_delta

METHODS = tuple(RULES)
STOCK = "stock"
"""The method that leaves verification to vLLM's own sampler: the audit alone is ours."""
WITH_CONSTANTS = tuple(name for name, rule in RULES.items() if rule.has_option)
ON_UNKNOWN_VLLM = ("error", "stock")
ALLOWED = {"method": (*METHODS, STOCK), "on_unknown_vllm": ON_UNKNOWN_VLLM}
KEY = REQUEST_KEY = "specopt"
# How alike a key and ``KEY`` must be, letters and digits only, to be taken for a misspelling of it.
ALIKE = 0.8


@dataclass(frozen=True)
class SpecoptConfig:
    """A validated option.

    method: How draft tokens are verified; one of ``METHODS``, or ``STOCK``.
    on_unknown_vllm: What to do on a vLLM this version was not checked against: ``error`` stops at startup, ``stock``
        runs vLLM's own sampler with a warning.
    rule: Constants of the method beside exact that requests may follow; None if there is none. In the option they are
        under the method's name: sigmoid ``"paper"`` (:data:`vllm_specopt.rules.PAPER`) or ``{"alpha": ..., "beta":
        ...}``, typical ``{"epsilon": ..., "delta": ...}``, budget ``{"delta": ...}``. They have no default: they decide
        how far the output may leave the target's distribution.
    allow_per_request: Whether a request may choose between exact and that method, see :func:`requested`.
    audit: Share of the steps whose tokens are audited (``vllm_specopt.audit``), 0 for none. In the option it may also
        be true or false.
    sharded: Whether tensor-parallel ranks keep their parts of the logits in steps that need no whole rows.
    """

    method: str
    on_unknown_vllm: str = "error"
    rule: Constants | None = None
    allow_per_request: bool = False
    audit: float = 0.0
    sharded: bool = False

    @property
    def verifies(self) -> bool:
        """Whether verification is ours."""
        return self.method != STOCK

    @property
    def gives_deltas(self) -> bool:
        """Whether ``verify`` is told each request's budget in ``rule_requests``, not just whether it has one."""
        return isinstance(self.rule, BudgetConstants)


def parse(additional_config: Any) -> SpecoptConfig | None:
    """Read the option from ``VllmConfig.additional_config``.

    Args:
        additional_config: A mapping, or any other object vLLM allows there (which then carries no option). The option
            is a method's name, or a mapping with the fields of :class:`SpecoptConfig`.

    Returns:
        The option, or None if it is not given.

    Raises:
        ValueError: The option is malformed, null, or a key looks like a misspelling of ``specopt``; the message names
            the key and the values allowed.
    """
    if not isinstance(additional_config, Mapping):
        return None
    for key in additional_config:
        if key != KEY and _looks_like_ours(key):
            raise ValueError(f"additional_config has the key {key!r}, did you mean {KEY!r}?")
    if KEY not in additional_config:
        return None
    option = additional_config[KEY]
    if option is None:
        raise ValueError(f"specopt is null, expected a method ({_either(METHODS)}); leave the key out to run stock")
    if isinstance(option, str):
        option = {"method": option}
    if not isinstance(option, Mapping):
        raise ValueError(
            f"specopt is {option!r}, expected a method ({_either(METHODS)}) or a mapping with the key method"
        )
    known = [field.name for field in fields(SpecoptConfig) if field.name != "rule"]
    _known_keys("specopt", option, [*known, *WITH_CONSTANTS])
    if "method" not in option:
        raise ValueError(f"specopt lacks the key method, expected {_either(METHODS)}")
    for key, allowed in ALLOWED.items():
        if key in option and (not isinstance(option[key], str) or option[key] not in allowed):
            raise ValueError(f"specopt.{key} is {option[key]!r}, expected {_either(allowed)}")
    for key in ("allow_per_request", "sharded"):
        if not isinstance(option.get(key, False), bool):
            raise ValueError(f"specopt.{key} is {option[key]!r}, expected true or false")
    per_request = option.get("allow_per_request", False)
    share = _parse_share(option.get("audit", False))
    if option.get("sharded", False):
        _check_sharded(option, per_request, share)
    if option["method"] == STOCK:
        _check_stock(option, per_request, share)
        return SpecoptConfig(STOCK, option.get("on_unknown_vllm", "error"), audit=share)
    rule = _parse_rule(option, per_request)
    return SpecoptConfig(**{key: option[key] for key in known if key in option} | {"rule": rule, "audit": share})


def _parse_share(value: Any) -> float:
    """Share of the steps to audit."""
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(
            f"specopt.audit is {value!r}, expected true, false, or the share of steps, above 0 and up to 1"
        )
    return float(value)


def _check_sharded(option: Mapping, per_request: bool, share: float) -> None:
    """Refuse what needs whole rows of logits."""
    for is_given, what in (
        (option["method"] != "exact", f"method is {option['method']!r}"),
        (per_request, "allow_per_request is true"),
        (share, "an audit is asked for"),
    ):
        if is_given:
            raise ValueError(
                f"specopt.sharded is true and {what}: sharded verification is exact and has no whole rows of logits; "
                "leave one of them out"
            )


def _check_stock(option: Mapping, per_request: bool, share: float) -> None:
    """Refuse what goes with verification of ours alone."""
    if not share:
        raise ValueError(
            "specopt.method is 'stock', which leaves nothing to do without an audit; add \"audit\": true, or leave "
            "specopt out"
        )
    unused = [name for name in WITH_CONSTANTS if option.get(name) is not None]
    if per_request or unused:
        name = "allow_per_request" if per_request else unused[0]
        raise ValueError(f"specopt.{name} is given, but nothing can use it: method is 'stock'")


def _parse_rule(option: Mapping, per_request: bool) -> Constants | None:
    """Constants of the one method beside exact that the engine offers."""
    method, given = option["method"], [name for name in WITH_CONSTANTS if option.get(name) is not None]
    rule = RULES[method]
    if rule.has_option and method not in given:
        raise ValueError(f"specopt.{method} is missing (method is {method!r}), expected {rule.expected}")
    unused = [name for name in given if name != method]
    if method == "exact" and per_request:
        if len(given) > 1:
            raise ValueError(
                f"specopt has constants of {' and '.join(map(repr, given))}, expected those of one method: an engine "
                "offers 'exact' and at most one other"
            )
        if not given:
            raise ValueError(
                "specopt.allow_per_request is true, but there is no method to choose beside 'exact': give the "
                f"constants of one ({_either(WITH_CONSTANTS)}), or make 'block' the method"
            )
        method = given[0]
    elif unused:
        more = " and allow_per_request is not true" if method == "exact" else ""
        raise ValueError(f"specopt.{unused[0]} is given, but nothing can use it: method is {method!r}{more}")
    rule = RULES[method]
    if rule.has_option:
        return parse_constants(rule, f"specopt.{method}", option[method])
    return None if rule.constants is None else rule.constants()


def contradiction(config: SpecoptConfig, speculative: Any) -> str | None:
    """What of vLLM's speculative configuration the option cannot be combined with, in a sentence; None if nothing."""
    asked = getattr(speculative, "rejection_sample_method", "standard")
    lossy = config.rule is not None and not RULES[config.rule.NAME].lossless
    if (asked == "block" and lossy) or (asked not in ("standard", "block") and config.method == "block"):
        return (
            f"specopt.method is {config.method!r} and rejection_sample_method is {asked!r}: two different rules; "
            "remove one of them"
        )
    if config.gives_deltas and speculative.draft_sample_method == "probabilistic":
        return (
            "specopt.budget bounds its price for drafts that are chosen, not sampled, and draft_sample_method is "
            "'probabilistic'; remove that, or choose another method"
        )
    return None


@dataclass(frozen=True)
class Requested:
    """A request's own choice; None leaves it to the engine.

    method: One of ``METHODS``. delta: Its budget in nats, where it follows the budget method.
    """

    method: str | None = None
    delta: float | None = None


def requested(extra_args: Any) -> Requested:
    """What a request asks for: ``SamplingParams.extra_args["specopt"]``, in the OpenAI API ``vllm_xargs``.

    Args:
        extra_args: The request's extra arguments, or None. The choice is a method's name, or a mapping with the fields
            of :class:`Requested`.

    Raises:
        ValueError: The value is malformed; the message names it and what is allowed.
    """
    choice = extra_args.get(REQUEST_KEY) if extra_args else None
    if choice is None:
        return Requested()
    name = f"extra_args[{REQUEST_KEY!r}]"
    delta = None
    if isinstance(choice, Mapping):
        _known_keys(name, choice, [field.name for field in fields(Requested)])
        if choice.get("delta") is not None:
            delta = parse_delta(f"{name}['delta']", choice["delta"])
        if delta is not None and "method" not in choice:
            return Requested(None, delta)
        choice, name = choice.get("method"), f"{name}['method']"
    if not isinstance(choice, str) or choice not in METHODS:
        raise ValueError(f"{name} is {choice!r}, expected {_either(METHODS)}")
    return Requested(choice, delta)


def refusal(config: SpecoptConfig, choice: Requested) -> str | None:
    """Why a request cannot have its choice in an engine with this option; None if it can."""
    if not config.allow_per_request:
        return 'the server lacks "allow_per_request": true'
    offered = ("exact", *(() if config.rule is None else (config.rule.NAME,)))
    method = choice.method or config.method
    if method not in offered:
        return f"the server offers {_either(offered)}"
    if choice.delta is not None and method != "budget":
        return f"delta belongs to the method 'budget', and the request's is {method!r}"
    return None


def flag_of(config: SpecoptConfig, extra_args: Any) -> float:
    """What ``verify`` is told of a request in ``rule_requests``: 0 for exact, else 1, or its budget."""
    choice = requested(extra_args)
    if (choice.method or config.method) == "exact":
        return 0.0
    if isinstance(config.rule, BudgetConstants):
        return config.rule.delta if choice.delta is None else choice.delta
    return 1.0


def _looks_like_ours(key: Any) -> bool:
    plain = re.sub(r"[^a-z0-9]", "", key.lower()) if isinstance(key, str) else ""
    return difflib.SequenceMatcher(None, plain.removeprefix("vllm"), KEY).ratio() >= ALIKE


def _known_keys(name: str, mapping: Mapping, keys: list[str]) -> None:
    for key in mapping:
        if key not in keys:
            raise ValueError(f"{name} has the unknown key {key!r}, expected {_either(keys)}")


def _either(values) -> str:
    return " or ".join(repr(value) for value in values)
