"""The option that turns the plugin on: ``additional_config["specopt"]``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

METHODS = ("exact",)
ON_UNKNOWN_VLLM = ("error", "stock")
ALLOWED = {"method": METHODS, "on_unknown_vllm": ON_UNKNOWN_VLLM}


@dataclass(frozen=True)
class SpecoptConfig:
    """A validated option.

    method: How draft tokens are verified; one of ``METHODS``.
    on_unknown_vllm: What to do on a vLLM this version was not checked against: ``error`` stops at startup, ``stock``
        runs vLLM's own sampler with a warning.
    """

    method: str
    on_unknown_vllm: str = "error"


def parse(additional_config: Any) -> SpecoptConfig | None:
    """Read the option from ``VllmConfig.additional_config``.

    Args:
        additional_config: A mapping, or any other object vLLM allows there (which then carries no option). The option
            is a method's name, or a mapping with the fields of :class:`SpecoptConfig`.

    Returns:
        The option, or None if it is not given.

    Raises:
        ValueError: The option is malformed; the message names the key and the values allowed.
    """
    option = additional_config.get("specopt") if isinstance(additional_config, Mapping) else None
    if option is None:
        return None
    if isinstance(option, str):
        option = {"method": option}
    if not isinstance(option, Mapping):
        raise ValueError(
            f"specopt is {option!r}, expected a method ({_either(METHODS)}) or a mapping with the key method"
        )
    keys = [field.name for field in fields(SpecoptConfig)]
    for key in option:
        if key not in keys:
            raise ValueError(f"specopt has the unknown key {key!r}, expected {_either(keys)}")
    if "method" not in option:
        raise ValueError(f"specopt lacks the key method, expected {_either(METHODS)}")
    for key, value in option.items():
        if not isinstance(value, str) or value not in ALLOWED[key]:
            raise ValueError(f"specopt.{key} is {value!r}, expected {_either(ALLOWED[key])}")
    return SpecoptConfig(**option)


def _either(values) -> str:
    return " or ".join(repr(value) for value in values)
