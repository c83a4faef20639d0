"""Counters of the drop-in on vLLM's own ``/metrics``.

Verification runs in the workers, ``/metrics`` is answered by the API servers. A worker keeps its numbers in a small
file in prometheus_client's multi-process format; an API server reads all such files when it is asked. Several API
servers share a directory for their own metrics already, and ours go there; a single one gets a directory for ours.

The kernels count tokens and rows by integer atomics in device memory. Each step leaves an asynchronous copy of them in
pinned host memory, and a thread of the worker writes what it finds there to the file: no step waits for the device or
for the file system, and the numbers are at most ``WRITE_SECONDS`` old, also once traffic has ended.
"""

import atexit
import bisect
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_specopt.integration.audit import Auditor
from vllm_specopt.integration.config import METHODS
from vllm_specopt.rules import SPENT_UNIT
from vllm_specopt.verify import Notes

if TYPE_CHECKING:
    from vllm_specopt.integration.sharded import Sharding

DIRECTORY = "SPECOPT_METRICS_DIR"
"""Environment variable by which the process that makes the configuration tells the workers where to write."""
WRITE_SECONDS = 0.5
# On a GPU one step in so many is timed, by a pair of events.
TIMED_EVERY = 16
BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)

COUNTERS = {
    "verified_steps": "Batches with draft tokens, verified by the drop-in.",
    "plain_steps": "Batches without draft tokens, drawn by the drop-in.",
    "sharded_steps": "Of both: batches whose logits stayed on their tensor-parallel ranks.",
    "tokens": "Tokens emitted by requests with draft tokens, by outcome: accepted, recovered or bonus.",
    "rows": "Rows of target logits by outcome: swept (read in full) or skipped (not needed, not read in full).",
    "spent_nats": "KL divergence from the target's distribution spent by the budget method, in nats.",
    "bad_rows": "Emitting rows without a usable logit; each emitted token 0.",
    "audited_tokens": "Tokens audited, by the bin of their place in the target's distribution, 0 to 31.",
    "audit_impossible_tokens": "Audited tokens that the request's sampling parameters or logits forbid.",
    "audit_skipped_tokens": "Tokens of audited steps that were not: the request has a seed, or the row no logit.",
}
GAUGES = {
    "audit_evidence_log10": "Evidence against losslessness: log10 of an e-value, valid at any time.",
}
SECONDS = "verification_seconds"
SECONDS_HELP = "Time of one verification: on a CPU of every step, on a GPU of every 16th, by events on its stream."
# Columns of the counters that verify() adds to, and what they are published as.
COLUMNS = (
    ("tokens", "accepted"),
    ("tokens", "recovered"),
    ("tokens", "bonus"),
    ("rows", "swept"),
    ("rows", "skipped"),
)
SPENT = len(COLUMNS)

_collected: set[str] = set()
_numbers = itertools.count()


def new_counters(device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed int64 counters on a device, as :func:`vllm_specopt.verify.verify` takes them.

    Returns:
        ``[num_methods + 1, 8]``, a row per method and a last one, whose first element is the second value: bad rows
        ``[1]``. They share memory so that one copy fetches both.
    """
    counters = torch.zeros(len(METHODS) + 1, 8, dtype=torch.int64, device=device)
    return counters, counters[-1, :1]


def expose() -> str:
    """Make this process's ``/metrics`` show the workers' files; return their directory.

    To be called where the configuration is made, before workers start: they inherit ``DIRECTORY``.
    """
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if shared:
        os.environ[DIRECTORY] = shared
        return shared
    directory = os.environ.get(DIRECTORY, "")
    if not os.path.isdir(directory):
        directory = tempfile.mkdtemp(prefix="specopt-metrics-")
        os.environ[DIRECTORY] = directory
        atexit.register(_remove, directory, os.getpid())
    if directory not in _collected:
        from prometheus_client import REGISTRY
        from prometheus_client.multiprocess import MultiProcessCollector

        MultiProcessCollector(REGISTRY, path=directory)
        _collected.add(directory)
    return directory


def is_exposed() -> bool:
    """Whether some ``/metrics`` will show what this process records."""
    return os.path.isdir(os.environ.get(DIRECTORY, ""))


class Account:
    """What the samplers of one worker count; those that draw for the same engine share one.

    Attributes:
        counters: Tokens and rows of steps with draft tokens as ``verify`` counts them, int64 ``[num_methods + 1, 8]``.
        unpublished: The same for steps without draft tokens, which count as steps only.
        bad_rows: Emitting rows without a usable logit so far, int64 ``[1]``.
        recorder: Told of each step; publishes the counters where there is a ``/metrics``.
        auditor: Told of the tokens of each step; None where none is audited.
        sharding: The worker's part of the vocabulary; None where every step has whole rows of logits.
    """

    sharding: "Sharding | None" = None

    def __init__(self, device: torch.device | str):
        self.recorder: Recorder | _NotRecorded = NOT_RECORDED
        self.auditor: Auditor | None = None
        self.restart(device)

    def restart(self, device: torch.device | str) -> None:
        """Count from 0 in fresh memory on a device."""
        self.counters, self.bad_rows = new_counters(device)
        self.unpublished, _ = new_counters(device)
        if self.auditor is not None:
            self.auditor.restart(device)

    def notes(self) -> Notes | None:
        """For the next step's verification to fill in; None where that step is not audited."""
        return None if self.auditor is None else self.auditor.notes()


def record(account: Account, vllm_config, method: str, first: bool) -> None:
    """Publish an account from now on, starting at 0.

    Tensor-parallel ranks verify the same requests, so only the first one records, unless each has its own share.

    Args:
        account: What the worker's samplers count into.
        vllm_config: vLLM's configuration.
        method: The engine's method.
        first: Whether this is the first tensor-parallel rank.
    """
    parallel = vllm_config.parallel_config
    if not first and not getattr(parallel, "enable_batch_sharded_sampling", False):
        account.auditor = None
        return
    # Fresh memory: what was there before may lie in a pool that sleep mode discards.
    account.restart(account.counters.device)
    labels = {
        "model_name": vllm_config.model_config.served_model_name,
        "engine": str(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)),
    }
    account.recorder = Recorder(account, Path(os.environ[DIRECTORY]), labels, method, counts_steps=first)


class _NotRecorded:
    """Stands where nothing is recorded."""

    def begin_step(self) -> None:
        pass

    def end_step(self) -> None:
        pass

    def plain_step(self) -> None:
        pass


NOT_RECORDED = _NotRecorded()


class Recorder:
    """Publishes one account.

    ``begin_step`` and ``end_step`` enclose a verification on the thread that launches it, and ``plain_step`` follows a
    draw without drafts there; everything else happens on a daemon thread that touches host memory alone.
    """

    def __init__(self, account, directory: Path, labels: dict[str, str], method: str, counts_steps: bool = True):
        """Start publishing.

        Args:
            account: As in :func:`record`, read but not held.
            directory: Where the files go.
            labels: vLLM's own labels, ``model_name`` and ``engine``.
            method: Label of what is counted per step, not per request.
            counts_steps: Whether steps and their times are counted; false on all ranks but one.
        """
        self.num_steps = self.num_plain_steps = 0
        self._labels, self._method, self._counts_steps = labels, method, counts_steps
        self._auditor, self._sharding = account.auditor, account.sharding
        self._buffer = account.counters
        self._on_gpu = self._buffer.device.type == "cuda"
        self._host = torch.zeros_like(self._buffer, device="cpu", pin_memory=True) if self._on_gpu else self._buffer
        self._seconds: deque[float] = deque()
        self._events: deque[tuple] = deque()
        self._started_at = 0.0
        self._started: torch.cuda.Event | None = None
        self._buckets, self._sum = [0] * (len(BUCKETS) + 1), 0.0
        self._files = _Files(directory)
        self._written: dict[tuple, float] = {}
        self.write()
        threading.Thread(target=self._write_forever, name="specopt-metrics", daemon=True).start()

    def begin_step(self) -> None:
        """Before a verification is launched."""
        if not self._on_gpu:
            self._started_at = time.perf_counter()
        elif self.num_steps % TIMED_EVERY == 0:
            self._started = torch.cuda.Event(enable_timing=True)
            self._started.record()

    def end_step(self) -> None:
        """After it was launched: count it, and leave a copy of the device's counters on its way to the host."""
        self.num_steps += 1
        if not self._on_gpu:
            self._seconds.append(time.perf_counter() - self._started_at)
            return
        self._host.copy_(self._buffer, non_blocking=True)
        if self._started is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._events.append((self._started, ended))
            self._started = None
        elif self._events and self._events[0][1].query():
            started, ended = self._events.popleft()
            self._seconds.append(started.elapsed_time(ended) / 1e3)

    def plain_step(self) -> None:
        """After a draw without draft tokens was launched: count it; the copy carries the bad rows."""
        self.num_plain_steps += 1
        if self._on_gpu:
            self._host.copy_(self._buffer, non_blocking=True)

    def write(self) -> None:
        """Bring the files up to date."""
        values = self._host.tolist()
        for method, row in zip(METHODS, values, strict=False):
            if method == self._method or any(row):
                for (name, outcome), value in zip(COLUMNS, row, strict=False):
                    self._set("counter", name, value, "_total", method=method, outcome=outcome)
                if row[SPENT]:
                    self._set("counter", "spent_nats", row[SPENT] * SPENT_UNIT, "_total", method=method)
        self._set("counter", "bad_rows", values[-1][0], "_total", method=self._method)
        if self._counts_steps:
            self._set("counter", "verified_steps", self.num_steps, "_total", method=self._method)
            self._set("counter", "plain_steps", self.num_plain_steps, "_total", method=self._method)
            if self._sharding is not None:
                self._set("counter", "sharded_steps", self._sharding.steps, "_total", method=self._method)
            self._write_seconds()
        if self._auditor is not None:
            self._write_audit(self._auditor)

    def _write_audit(self, auditor: Auditor) -> None:
        for method, bins, verdict in auditor.verdicts():
            for sweep, counts in bins.items():
                for place, count in enumerate(counts):
                    labels = {"method": method, "sweep": sweep, "bin": f"{place:02d}"}
                    self._set("counter", "audited_tokens", count, "_total", **labels)
            self._set("counter", "audit_impossible_tokens", verdict.impossible, "_total", method=method)
            self._set("counter", "audit_skipped_tokens", verdict.skipped, "_total", method=method)
            self._set("gauge_max", "audit_evidence_log10", verdict.log10_evidence, "", method=method)

    def _write_seconds(self) -> None:
        while self._seconds:
            seconds = self._seconds.popleft()
            self._buckets[bisect.bisect_left(BUCKETS, seconds)] += 1
            self._sum += seconds
        self._set("histogram", SECONDS, self._sum, "_sum", method=self._method)
        for bound, count in zip((*map(repr, BUCKETS), "+Inf"), self._buckets, strict=True):
            self._set("histogram", SECONDS, count, "_bucket", method=self._method, le=bound)

    def _set(self, kind: str, name: str, value: float, suffix: str, **labels: str) -> None:
        key = (name, suffix, *labels.values())
        if self._written.get(key) != value:
            self._files.set(kind, name, suffix, self._labels | labels, float(value))
            self._written[key] = value

    def _write_forever(self) -> None:
        while True:
            time.sleep(WRITE_SECONDS)
            try:
                self.write()
            except OSError:
                # The server is gone, and its directory with it.
                return


class _Files:
    """One process's numbers in prometheus_client's own format; written by one thread."""

    def __init__(self, directory: Path) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        name = f"specopt-{os.getpid()}-{next(_numbers)}.db"
        # The name says how a scrape joins the values of several processes that have the same labels.
        kinds = ("counter", "histogram", "gauge_max")
        self._files = {kind: MmapedDict(str(directory / f"{kind}_{name}")) for kind in kinds}

    def set(self, kind: str, name: str, suffix: str, labels: dict[str, str], value: float) -> None:
        from prometheus_client.mmap_dict import mmap_key

        metric = f"specopt:{name}"
        text = SECONDS_HELP if kind == "histogram" else (COUNTERS | GAUGES)[name]
        key = mmap_key(metric, metric + suffix, list(labels), list(labels.values()), text)
        self._files[kind].write_value(key, value, 0.0)


def _remove(directory: str, creator: int) -> None:
    if os.getpid() == creator:
        shutil.rmtree(directory, ignore_errors=True)
