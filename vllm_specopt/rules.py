"""The registry of verification rules: one line each, and one file of the same name in every backend.

A rule's files are ``kernels/rules/NAME.py`` (Triton), ``vllm_specopt/cpu/rules/NAME.py`` and
``kernels/reference/NAME.py`` (float64, the definition of correct). Configuration, counters and metrics iterate over
``RULES``; a rule's place in it is its row of the counters, and its number in the kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

# Single precision must hold the constants, and tell alpha from beta.
_LARGEST, _NARROWEST = 1e30, 1e-6


@dataclass(frozen=True)
class Constants:
    """What a rule other than exact is given: its name, and its constants as fields."""

    NAME: ClassVar[str]
    EXPECTED: ClassVar[str] = ""
    """What the option that holds the constants may be, in words."""


@dataclass(frozen=True)
class SigmoidConstants(Constants):
    """Constants of sigmoid verification: score(z) = sigmoid((z / T - alpha) / (beta - alpha)), T the temperature.

    Each side has its own pair, because the two models' logits need not be centred alike. With ``clip`` scores are 0
    where z / T < alpha and 1 where z / T > beta, as in the code the paper released.
    """

    NAME = "sigmoid"
    EXPECTED = '"paper" (alpha -1e4, beta 1e4, those of the paper\'s released code) or {"alpha": ..., "beta": ...}'
    target_alpha: float
    target_beta: float
    draft_alpha: float
    draft_beta: float
    clip: bool = True


PAPER = SigmoidConstants(-1e4, 1e4, -1e4, 1e4)
"""The constants of the code released with arXiv 2406.11016."""


@dataclass(frozen=True)
class BlockConstants(Constants):
    """Block verification has no constants."""

    NAME = "block"


@dataclass(frozen=True)
class TypicalConstants(Constants):
    """A draft token survives where its probability exceeds min(epsilon, delta exp(-entropy of its row))."""

    NAME = "typical"
    EXPECTED = '{"epsilon": ..., "delta": ...}'
    epsilon: float
    delta: float


@dataclass(frozen=True)
class BudgetConstants(Constants):
    """delta: KL divergence, in nats, by which a verified token's distribution may leave the target's."""

    NAME = "budget"
    EXPECTED = '{"delta": ...}'
    delta: float


@dataclass(frozen=True)
class Rule:
    """A verification rule.

    name: Of the rule, its files and the option's ``method``.
    lossless: Whether emitted tokens follow the target's distribution.
    constants: What holds its constants; None for the exact rule.
    """

    name: str
    lossless: bool
    constants: type[Constants] | None = None

    @property
    def has_option(self) -> bool:
        """Whether the option has a key of the rule's name, which holds its constants."""
        return self.constants is not None and bool(fields(self.constants))

    @property
    def expected(self) -> str:
        """What that key may hold, in words."""
        return "" if self.constants is None else self.constants.EXPECTED


RULES = {
    rule.name: rule
    for rule in (
        Rule("exact", lossless=True),
        Rule("sigmoid", lossless=False, constants=SigmoidConstants),
        Rule("block", lossless=True, constants=BlockConstants),
        Rule("typical", lossless=False, constants=TypicalConstants),
        Rule("budget", lossless=False, constants=BudgetConstants),
    )
}
SPENT_UNIT = 2.0**-20
"""Nats that one step of the counter of spent divergence stands for."""


def place_of(constants: Constants | None) -> int:
    """A rule's place in the registry; that of the exact one for None."""
    return 0 if constants is None else list(RULES).index(constants.NAME)


def parse_constants(rule: Rule, name: str, value: Any) -> Constants:
    """Read a rule's constants from an option.

    Raises:
        ValueError: They are malformed; the message begins with ``name``.
    """
    parse = {"sigmoid": _parse_sigmoid, "typical": _parse_typical, "budget": _parse_budget}[rule.name]
    return parse(name, value)


def parse_delta(name: str, value: Any) -> float:
    """Read a budget.

    Raises:
        ValueError: It is not a number, or negative; the message begins with ``name``.
    """
    return _number(name, value, 0.0, _LARGEST, "from 0 to 1e30")


def _parse_sigmoid(name: str, value: Any) -> SigmoidConstants:
    if value == "paper":
        return PAPER
    alpha, beta = (
        _number(f"{name}.{key}", number, -_LARGEST, _LARGEST, "from -1e30 to 1e30")
        for key, number in _entries(name, value, ("alpha", "beta"), SigmoidConstants.EXPECTED).items()
    )
    if not beta - alpha >= _NARROWEST * max(abs(alpha), abs(beta), 1.0):
        raise ValueError(
            f"{name}.alpha is {alpha!r}, expected less than {name}.beta ({beta!r}) by at least one part in a million"
        )
    return SigmoidConstants(alpha, beta, alpha, beta)


def _parse_typical(name: str, value: Any) -> TypicalConstants:
    given = _entries(name, value, ("epsilon", "delta"), TypicalConstants.EXPECTED)
    return TypicalConstants(
        _number(f"{name}.epsilon", given["epsilon"], 0.0, 1.0, "from 0 to 1"),
        parse_delta(f"{name}.delta", given["delta"]),
    )


def _parse_budget(name: str, value: Any) -> BudgetConstants:
    given = _entries(name, value, ("delta",), BudgetConstants.EXPECTED)
    return BudgetConstants(parse_delta(f"{name}.delta", given["delta"]))


def _entries(name: str, value: Any, keys: tuple[str, ...], expected: str) -> dict[str, Any]:
    """The values of exactly these keys, in this order."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    for key in value:
        if key not in keys:
            raise ValueError(f"{name} has the unknown key {key!r}, expected {' or '.join(map(repr, keys))}")
    for key in keys:
        if key not in value:
            raise ValueError(f"{name} lacks the key {key}, expected a number")
    return {key: value[key] for key in keys}


def _number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected a number {expected}")
    return float(value)
