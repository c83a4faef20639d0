"""The option that turns the plugin on: ``additional_config["specopt"]``; and a request's own choice of method."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_specopt.rules import RULES, SIGMOID_EXPECTED, SigmoidConstants, parse_sigmoid

METHODS = tuple(RULES)
ON_UNKNOWN_VLLM = ("error", "stock")
ALLOWED = {"method": METHODS, "on_unknown_vllm": ON_UNKNOWN_VLLM}
KEY = REQUEST_KEY = "specopt"
# How alike a key and ``KEY`` must be, letters and digits only, to be taken for a misspelling of it.
ALIKE = 0.8


@dataclass(frozen=True)
class SpecoptConfig:
    """A validated option.

    method: How draft tokens are verified; one of ``METHODS``.
    on_unknown_vllm: What to do on a vLLM this version was not checked against: ``error`` stops at startup, ``stock``
        runs vLLM's own sampler with a warning.
    sigmoid: Constants of the sigmoid method; None where nothing can use them. Given as ``"paper"``
        (:data:`vllm_specopt.rules.PAPER`) or as ``{"alpha": ..., "beta": ...}``, the same for both models. They have no
        default: they decide how far the output may leave the target's distribution.
    allow_per_request: Whether a request may choose another method than the engine's, see :func:`requested_method`.
    """

    method: str
    on_unknown_vllm: str = "error"
    sigmoid: SigmoidConstants | None = None
    allow_per_request: bool = False


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
    _known_keys("specopt", option, [field.name for field in fields(SpecoptConfig)])
    if "method" not in option:
        raise ValueError(f"specopt lacks the key method, expected {_either(METHODS)}")
    for key, allowed in ALLOWED.items():
        if key in option and (not isinstance(option[key], str) or option[key] not in allowed):
            raise ValueError(f"specopt.{key} is {option[key]!r}, expected {_either(allowed)}")
    per_request = option.get("allow_per_request", False)
    if not isinstance(per_request, bool):
        raise ValueError(f"specopt.allow_per_request is {per_request!r}, expected true or false")
    constants = option.get("sigmoid")
    if constants is None and (option["method"] == "sigmoid" or per_request):
        needs = "method is 'sigmoid'" if option["method"] == "sigmoid" else "allow_per_request is true"
        raise ValueError(f"specopt.sigmoid is missing ({needs}), expected {SIGMOID_EXPECTED}")
    if constants is not None and option["method"] != "sigmoid" and not per_request:
        raise ValueError(
            f"specopt.sigmoid is given, but nothing can use it: method is {option['method']!r} and allow_per_request "
            "is not true"
        )
    return SpecoptConfig(
        **{**option, "sigmoid": None if constants is None else parse_sigmoid("specopt.sigmoid", constants)}
    )


def requested_method(extra_args: Any) -> str | None:
    """The method a request asks for: ``SamplingParams.extra_args["specopt"]``, in the OpenAI API ``vllm_xargs``.

    Args:
        extra_args: The request's extra arguments, or None.

    Returns:
        One of ``METHODS``, given as such or as ``{"method": ...}``; None if the request leaves it to the engine.

    Raises:
        ValueError: The value is malformed; the message names it and what is allowed.
    """
    choice = extra_args.get(REQUEST_KEY) if extra_args else None
    if choice is None:
        return None
    name = f"extra_args[{REQUEST_KEY!r}]"
    if isinstance(choice, Mapping):
        _known_keys(name, choice, ["method"])
        choice, name = choice.get("method"), f"{name}['method']"
    if not isinstance(choice, str) or choice not in METHODS:
        raise ValueError(f"{name} is {choice!r}, expected {_either(METHODS)}")
    return choice


def _looks_like_ours(key: Any) -> bool:
    plain = re.sub(r"[^a-z0-9]", "", key.lower()) if isinstance(key, str) else ""
    return difflib.SequenceMatcher(None, plain.removeprefix("vllm"), KEY).ratio() >= ALIKE


def _known_keys(name: str, mapping: Mapping, keys: list[str]) -> None:
    for key in mapping:
        if key not in keys:
            raise ValueError(f"{name} has the unknown key {key!r}, expected {_either(keys)}")


def _either(values) -> str:
    return " or ".join(repr(value) for value in values)
