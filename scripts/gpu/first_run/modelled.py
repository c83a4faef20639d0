"""The modelled time of each case (`specopt cost`) beside the measured one."""

from __future__ import annotations

import csv
import json

from first_run.places import BUNDLE, RESULTS, ROOT, load, save

COUNTS = (BUNDLE / "cost.json", ROOT / "benchmarks" / "results" / "cost-model" / "cost.json")
"""The bundle's own counts, else those in the checkout."""
CARDS = ("H100", "H200")


def main() -> None:
    """Write modelled.json."""
    if not (RESULTS / "kernel_bench.csv").is_file():
        raise SystemExit("kernel_bench.csv is not there: no case was measured.")
    path = next(path for path in COUNTS if path.is_file())
    rows = list(csv.DictReader((RESULTS / "kernel_bench.csv").open()))
    found = compare(json.loads(path.read_text()), rows, card_of(load("info", {}).get("device") or ""))
    save("modelled", found)
    for line in found:
        print(line)


def card_of(device: str) -> str | None:
    """The model's name of a device; None for one that the model does not know."""
    return next((card for card in CARDS if card in device), None)


def compare(counts: dict, rows: list[dict], card: str | None) -> list[dict]:
    """Per case and implementation that both know: microseconds measured, and the ends of what was modelled."""
    from vllm_specopt.benchmarks.kernels.grid import Case

    modelled = {
        (Case(**step["case"]).name, step["who"] + "-block" * step["setting"].endswith("block")): step["model_us"][card]
        for step in counts["steps"]
        if card in step["model_us"] and not step["flat_rows"] and step.get("audit_share") is None
    }
    found = []
    for row in rows:
        model = modelled.get((row["case"], row["implementation"]))
        if model and row["time_us"]:
            found.append(
                {"case": row["case"], "implementation": row["implementation"], "measured_us": float(row["time_us"])}
                | {name: round(model[name], 1) for name in ("floor", "low", "high")}
            )
    return found


if __name__ == "__main__":
    main()
