"""What a first run found, in 60 lines at most."""

from __future__ import annotations

import csv
import re

from first_run.places import REHEARSE, RESULTS, STANDIN, WELL, load, tail

MOST_LINES, WIDTH = 60, 240
MOST_CASES, MOST_TESTS = 24, 5
SAMPLING = re.compile(
    "statistics_kernel|decide_kernel|residual_kernel|temperature_kernel|gumbel|logits_stats|rejection|resample"
    "|log_p_kernel|residual_mass|topp|topk|min_p_kernel|recovered|expand_kernel"
)
"""Names of kernels that sample or verify, ours and vLLM's; what PyTorch's kernels do for them is not among them."""
NAMES = {"ours": "ours", "ours-block": "block", "ours-v1": "ours V1", "stock-v1": "STOCK V1", "ours-v2": "ours V2",
         "stock-v2": "STOCK V2", "ours-sigmoid": "sigmoid"}  # fmt: skip


def text() -> str:
    """The summary."""
    lines = [*head(), *test_lines(), *grid_lines(), *sweep_lines(), *race_lines(), *engine_lines(), *ncu_lines()]
    return "\n".join(line[:WIDTH] for line in lines[:MOST_LINES]) + "\n"


def head() -> list[str]:
    """The machine and what became of the steps."""
    info = load("info", {})
    keys = ("device", "copy_gbps", "read_gbps", "matmul_tflops", "host_us_per_launch", "torch", "triton", "vllm",
            "commit")  # fmt: skip
    lines = ["machine: " + ", ".join(f"{key} {info[key]}" for key in keys if info.get(key))]
    if REHEARSE or STANDIN:
        lines.insert(0, "A rehearsal: no number here was measured on a GPU.")
    steps = [
        f"{step['step']} {step['seconds']:.0f} s" + ("" if step["status"] == WELL else f" ({step['status']})")
        for step in load("steps", [])
    ]
    return [*lines, "steps: " + ", ".join(steps)]


def test_lines() -> list[str]:
    """Failures, and how many tests passed."""
    said = tail(RESULTS / "run.log", 200_000)
    failures = re.findall(r"^(?:FAILED|ERROR) .*", said, re.MULTILINE)
    totals = re.findall(r"^[= ]*\d+ (?:passed|failed|error).* in [\d.]+s.*", said, re.MULTILINE)
    return [line.strip("= ") for line in [*failures[:MOST_TESTS], *totals[-1:]]]


def grid_lines() -> list[str]:
    """Microseconds of each implementation, and what the model said."""
    path = RESULTS / "kernel_bench.csv"
    if not path.is_file():
        return ["grid: nothing"]
    cases: dict[str, dict] = {}
    for row in csv.DictReader(path.open()):
        cases.setdefault(row["case"], {})[row["implementation"]] = row
    modelled = {(each["case"], each["implementation"]): each for each in load("modelled", None) or []}
    lines = [f"grid: {len(cases)} cases, us (share of copy; [modelled])"]
    for case, rows in list(cases.items())[:MOST_CASES]:
        cells = []
        for name, shown in NAMES.items():
            row, model = rows.get(name), modelled.get((case, name))
            if row is None:
                continue
            if not row["time_us"]:
                cells.append(f"{shown}: {row['note'][:60]}")
                continue
            share = f" ({float(row['percent_of_copy']):.0f}%)" if name == "ours" else ""
            beside = f" [{model['low']:.0f}-{model['high']:.0f}]" if model else ""
            cells.append(f"{shown} {float(row['time_us']):.0f}{share}{beside}")
        lines.append(f"{case.removeprefix('v151936-').removesuffix('-a0.6')}: {', '.join(cells)}")
    return lines


def sweep_lines() -> list[str]:
    """The best launch shapes, and each kernel's time with them."""
    table, kernels = load("launch_table", None), load("kernels", {}).get("best", {})
    lines = []
    if table:
        lines.append("launch table: " + ", ".join(f"{name} {value}" for name, value in table["shapes"].items()))
    if times := {form: each for form, each in kernels.items() if each}:
        lines.append("kernels, us: " + "; ".join(f"{form}: {each}" for form, each in times.items()))
    return lines


def race_lines() -> list[str]:
    """Launches that differed from what is right."""
    found = load("races", {})
    lines = [f"{name}: {each['differed']} of {each['launches']} launches differed" for name, each in found.items()]
    return ["races: " + ", ".join(lines)] if lines else []


def engine_lines() -> list[str]:
    """Speed and noise of each engine, then which texts are the same."""
    found = load("engines", {})
    lines = []
    for run in found.get("runs", []):
        speeds = [
            f"{name}: {work['tokens'] / work['seconds']:.0f} tok/s (noise {work['noise']}, "
            f"acc {work['accepted_tokens'] / max(work['draft_tokens'], 1):.2f})"
            for name, work in run["workloads"].items()
        ]
        said = run.get("problem", "").replace("\n", " ")
        lines.append(
            f"engine {run['name']}: {', '.join(speeds)} {said[:40]} {said[-100:] if said[40:] else ''}".rstrip()
        )
        if run.get("compiled_in_flight"):
            lines[-1] += f"; compiled in flight: {', '.join(run['compiled_in_flight'])}"
        lines += [f"  GPU, {name}: {kernels(profiled)}" for name, profiled in run.get("gpu_kernels", {}).items()]
    for each in found.get("texts", []):
        lines.append(
            f"texts, {each['who']}, {each['workload']}: {each['identical']} of {each['completions']} identical, "
            f"shared prefix {100 * each['shared_prefix']:.1f} %"
        )
    for each in load("drafters", None) or []:
        said = each.get("problem") or (
            f"greedy {'same' if each['greedy'] else 'differs'}, seeded {each['seeded']:.1%}, {each['attention']}"
        )
        lines.append(f"drafter {each['drafter']}, {each['runner']}, {each['kind']}: {said[:160]}")
    for each in load("seeds", None) or []:
        pair = f"seeds, {each['arm']}, {each['kind']}, with and without drafts"
        told = [f"{name}: {text['identical']} of {text['completions']} identical, shared prefix "
                f"{100 * text['shared_prefix']:.1f} %" for name, text in each["texts"].items()]  # fmt: skip
        lines.append(f"{pair}: {'; '.join(told)} {' '.join(each.get('problems', []))[-100:]}".rstrip())
    return lines


def kernels(profiled: dict) -> str:
    """The kernels of a profiled generation that have to do with sampling, then all of them, in milliseconds."""
    if "problem" in profiled:
        return profiled["problem"][:150]
    every = sum(each["us"] for each in profiled["kernels"])
    found = [each for each in profiled["kernels"] if SAMPLING.search(each["name"])]
    named = ", ".join(f"{each['name'][:28]} {each['us'] / 1000:.1f}" for each in found[:6])
    return f"sampling {sum(each['us'] for each in found) / 1000:.1f} of {every / 1000:.1f} ms: {named}"


def ncu_lines() -> list[str]:
    """The profiler's main numbers."""
    said = tail(RESULTS / "ncu.txt", 100_000)
    wanted = "Duration|DRAM Throughput|Memory Throughput|Achieved Occupancy|Registers Per Thread"
    numbers = re.findall(rf"^\s*({wanted})\s+(\S+)\s+([\d.,]+)", said, re.MULTILINE)
    return [f"ncu: {', '.join(f'{name} {value} {unit}' for name, unit, value in numbers[:5])}"] if numbers else []


if __name__ == "__main__":
    print(text(), end="")
