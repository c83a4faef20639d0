"""The registry of verification rules: one line each, and one file of the same name in every backend.

A rule's files are ``kernels/rules/NAME.py`` (Triton), ``vllm_specopt/cpu/rules/NAME.py`` and
``kernels/reference/NAME.py`` (float64, the definition of correct). Configuration, counters and metrics iterate over
``RULES``; a rule's place in it is its row of the counters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Single precision must hold the constants, and tell alpha from beta.
_LARGEST, _NARROWEST = 1e30, 1e-6
SIGMOID_EXPECTED = '"paper" (alpha -1e4, beta 1e4, those of the paper\'s released code) or {"alpha": ..., "beta": ...}'


@dataclass(frozen=True)
class Rule:
    """A verification rule.

    name: Of the rule, its files and the option's ``method``.
    lossless: Whether emitted tokens follow the target's distribution.
    constants: The key of the option that holds its constants; None if it has none.
    """

    name: str
    lossless: bool
    constants: str | None = None


RULES = {
    rule.name: rule for rule in (Rule("exact", lossless=True), Rule("sigmoid", lossless=False, constants="sigmoid"))
}


@dataclass(frozen=True)
class SigmoidConstants:
    """Constants of sigmoid verification: score(z) = sigmoid((z / T - alpha) / (beta - alpha)), T the temperature.

    Each side has its own pair, because the two models' logits need not be centred alike. With ``clip`` scores are 0
    where z / T < alpha and 1 where z / T > beta, as in the code the paper released.
    """

    target_alpha: float
    target_beta: float
    draft_alpha: float
    draft_beta: float
    clip: bool = True


PAPER = SigmoidConstants(-1e4, 1e4, -1e4, 1e4)
"""The constants of the code released with arXiv 2406.11016."""


def parse_sigmoid(name: str, value: Any) -> SigmoidConstants:
    """Read constants from an option: ``"paper"``, or ``{"alpha": ..., "beta": ...}``, the same for both models.

    Raises:
        ValueError: They are malformed; the message begins with ``name``.
    """
    if value == "paper":
        return PAPER
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}, expected {SIGMOID_EXPECTED}")
    for key in value:
        if key not in ("alpha", "beta"):
            raise ValueError(f"{name} has the unknown key {key!r}, expected 'alpha' or 'beta'")
    for key in ("alpha", "beta"):
        if key not in value:
            raise ValueError(f"{name} lacks the key {key}, expected a number")
        number = value[key]
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= _LARGEST:
            raise ValueError(f"{name}.{key} is {number!r}, expected a number from -1e30 to 1e30")
    alpha, beta = float(value["alpha"]), float(value["beta"])
    if not beta - alpha >= _NARROWEST * max(abs(alpha), abs(beta), 1.0):
        raise ValueError(
            f"{name}.alpha is {alpha!r}, expected less than {name}.beta ({beta!r}) by at least one part in a million"
        )
    return SigmoidConstants(alpha, beta, alpha, beta)
