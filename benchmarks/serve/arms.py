"""The arms of a comparison, as the command line names them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from vllm_specopt.integration.config import METHODS, WITH_CONSTANTS, parse

STOCK, REPAIRED = "stock", "stock-repaired"


@dataclass(frozen=True)
class Arm:
    """One sampler: vLLM's own, its own with the function repaired that is broken on CPUs, or ours with some option.

    Attributes:
        name: As tables show it.
        option: What goes to ``additional_config["specopt"]``; None: the plugin stays inactive.
        repair: Whether the broken function is replaced.
        url: A server that runs already; None: one is started.
        speculates: Whether the engine gets drafts.
    """

    name: str
    option: dict | None = None
    repair: bool = False
    url: str | None = None
    speculates: bool = True

    @classmethod
    def named(cls, text: str, on_cpu: bool) -> Arm:
        """Return the arm of ``NAME`` (stock, stock-repaired, exact or sigmoid) or of ``NAME=JSON``.

        Raises:
            ValueError: There is no such arm, or its option is not JSON or not an option.
        """
        name, given, value = text.partition("=")
        if given:
            try:
                option = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"the option of arm {name!r} is not JSON ({error}): {value}") from error
            try:
                parse({"specopt": option})
            except ValueError as error:
                raise ValueError(f"the option of arm {name!r} is not one of the plugin: {error}") from error
            if not name or name in (STOCK, REPAIRED):
                raise ValueError(f"an arm with an option needs a name other than {name!r}")
            return cls(name, option if isinstance(option, dict) else {"method": option})
        if name == STOCK:
            return cls(STOCK)
        if name == REPAIRED:
            if not on_cpu:
                raise ValueError(f"the arm {REPAIRED} is for CPUs: what it repairs works on a GPU")
            return cls(REPAIRED, repair=True)
        # No lossy method chooses its constants by itself; by its name sigmoid means the paper's.
        named = {name: {"method": name} for name in METHODS if name not in WITH_CONSTANTS}
        named["sigmoid"] = {"method": "sigmoid", "sigmoid": "paper"}
        if name in named:
            return cls(name, named[name])
        known = ", ".join((STOCK, *((REPAIRED,) if on_cpu else ()), *named))
        raise ValueError(f"there is no arm {name!r}: take {known}, or NAME=JSON")
