"""Would verification by the drop-in run here, with which parts, correctly, and how fast? What `specopt doctor` says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import vllm_specopt
from vllm_specopt.integration import compat, reasons

ENTRY_POINT = "vllm_specopt:register"
OK, NOTE, PROBLEM = "ok", "note", "problem"
DEFAULT_OPTION = '{"specopt": {"method": "exact"}}'
# Requests with 4 draft tokens each, and vocabulary, of the timed step; bf16, temperature 1, one-hot drafts.
DRAFTS = 4
SHAPE = {"cpu": (8, 32_768), "cuda": (64, 128_256)}


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    name: What was looked at.
    status: ``ok``, ``note`` (worth knowing, nothing fails) or ``problem``.
    found: What is there.
    sentence: What is wrong and how to mend it; empty unless it is a problem or a note.
    """

    name: str
    status: str
    found: str
    sentence: str = ""


def examine(arguments: dict | None) -> list[Check]:
    """All checks, in order; ``arguments`` are those of vLLM's ``EngineArgs``, or None for the installation alone."""
    checks = [*installed(), plugin()]
    if not _has("vllm") or not _has("torch"):
        return checks
    device = _device()
    checks.append(_gpu(device))
    runner, engine = (None, []) if arguments is None else configuration(arguments)
    checks += [known(name, runner) for name in ("V1", "V2")] + engine
    if device == "cpu" and runner == "V2":
        # Triton's interpreter: for tests, and slow.
        return checks
    if _has("triton" if device == "cuda" else "numba"):
        checks += [correct(device), speed(device)]
    return checks


def installed() -> list[Check]:
    """Versions of the packages that the drop-in runs on; one that cannot be imported is a problem."""
    checks = [Check("vllm-specopt", OK, f"{vllm_specopt.__version__} in {Path(vllm_specopt.__file__).parent}")]
    cuda = _has("torch") and _device() == "cuda"
    needed = {"vllm": True, "torch": True, "triton": cuda, "numba": not cuda, "prometheus_client": False}
    for package, is_needed in needed.items():
        if _has(package):
            checks.append(Check(package, OK, _version(package)))
        elif is_needed:
            sentence = f"{package} is not installed beside {sys.executable}: install it there."
            checks.append(Check(package, PROBLEM, "missing", sentence))
        else:
            checks.append(Check(package, NOTE, "missing", f"{package} is not needed on this device."))
    return checks


def plugin() -> Check:
    """Whether vLLM will load the plugin: its entry point is there and ``VLLM_PLUGINS`` lets it through."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(point.value == ENTRY_POINT for point in points):
        sentence = f"vLLM cannot see the plugin: run `{sys.executable} -m pip install` on vllm-specopt."
        return Check("plugin", PROBLEM, "no entry point", sentence)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "specopt" not in allowed.split(","):
        sentence = f"VLLM_PLUGINS is {allowed!r}, so vLLM will not load the plugin: add specopt to it, or unset it."
        return Check("plugin", PROBLEM, f"VLLM_PLUGINS={allowed}", sentence)
    return Check("plugin", OK, "entry point specopt" + (f", VLLM_PLUGINS={allowed}" if allowed else ""))


def known(runner: str, used: str | None) -> Check:
    """Whether this vLLM's code for a runner is known; if not, a problem unless only the other runner is ``used``."""
    import vllm

    name = f"vLLM for runner {runner}"
    unknown = compat.problem(runner, vllm.__version__, Path(vllm.__file__).parent)
    if unknown is None:
        return Check(name, OK, f"known, {len(compat.PARTS[runner])} parts compared")
    status = NOTE if used not in (None, runner) else PROBLEM
    return Check(name, status, "unknown", f"{unknown}: install a vllm-specopt that knows this vLLM.")


def configuration(arguments: dict) -> tuple[str | None, list[Check]]:
    """What vLLM makes of the arguments: the runner (None if it refuses them), and whether the drop-in is active."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_specopt.integration.validation import stock_reason, validate

    try:
        vllm_config = EngineArgs(**arguments).create_engine_config()
        option = validate(vllm_config)
    except (ValueError, OSError, RuntimeError) as error:
        reason = reasons.of_error(str(error)) or type(error).__name__
        return None, [Check("active", PROBLEM, "no", f"vLLM would not start: {reason}")]
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    checks = [Check("runner", OK, runner)]
    if option is None:
        sentence = f"the option is not given: add --additional-config '{DEFAULT_OPTION}'."
        return runner, [*checks, Check("active", PROBLEM, "no", sentence)]
    if stock := stock_reason(vllm_config, option):
        return runner, [*checks, Check("active", PROBLEM, "no", f"vLLM's own sampler would stay in place: {stock}.")]
    speculative = vllm_config.speculative_config
    drafts = "no drafts"
    if speculative is not None:
        drafts = f"{speculative.method} drafts, {speculative.num_speculative_tokens} per step"
    return runner, [*checks, Check("active", OK, f"method {option.method}, {drafts}")]


def correct(device: str) -> Check:
    """Compare random batches with the float64 reference, on the backend that would be used."""
    from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, assert_matches_reference, random_batch

    backend, compared, close = _backend(device), 0, 0
    try:
        for seed, draft in enumerate((NO_DRAFT, PROBS, LOGITS)):
            batch = random_batch(seed=seed, num_drafts=[3, 0, 5, 1], vocab_size=1000, draft=draft)
            close += assert_matches_reference(batch, backend, device)[1]
            compared += batch.num_reqs
    except Exception as error:  # a compiler's errors have no common type
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check("correct", PROBLEM, f"no, {backend} on {device}", f"verification fails its check: {first}.")
    note = f", {close} too close to call" if close else ""
    return Check("correct", OK, f"{compared - close} of {compared} requests equal the reference ({backend}){note}")


def speed(device: str) -> Check:
    """Time one verification step, and a copy of as many bytes in the same run."""
    import torch

    from vllm_specopt.integration.metrics import new_counters
    from vllm_specopt.verify import verify

    requests, vocab = SHAPE[device]
    generator = torch.Generator().manual_seed(0)
    rows = requests * (DRAFTS + 1)
    logits = torch.randn(rows, vocab, generator=generator).mul_(3).to(torch.bfloat16)
    judged = torch.arange(rows) % (DRAFTS + 1) < DRAFTS
    tokens = logits[judged].argmax(1)
    # Drafts that all survive: every row is read.
    logits[judged.nonzero()[:, 0], tokens] = 40.0
    tokens, logits = tokens.to(device), logits.to(device)
    starts = torch.arange(0, rows + 1, DRAFTS + 1, dtype=torch.int32, device=device)
    ones = torch.ones(requests, device=device)
    seeds = torch.arange(requests, device=device)
    counters = new_counters(device)[0]

    def step():
        verify(logits, starts, tokens, DRAFTS, temperature=ones, seeds=seeds, counters=counters)

    target = torch.empty_like(logits)
    step()
    swept = int(counters[0, 3])
    ours, copy = _median_seconds(step, device), _median_seconds(lambda: target.copy_(logits), device)
    size = vocab * logits.element_size()
    rate, copy_rate = swept * size / ours / 1e9, 2 * rows * size / copy / 1e9
    shape = f"{requests} requests x {DRAFTS} drafts x {vocab} bf16"
    found = f"{ours * 1e3:.3g} ms, {rate:.3g} GB/s over {swept} of {rows} rows; a copy {copy_rate:.3g} GB/s ({shape})"
    return Check("speed", OK, found)


def _median_seconds(call, device: str, repeats: int = 15) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _gpu(device: str) -> Check:
    import torch

    if device == "cpu":
        return Check("device", OK, f"cpu, {torch.get_num_threads()} threads; no CUDA GPU is visible")
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Check("device", OK, f"{name}, {memory:.0f} GiB, compute capability {major}.{minor}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend(device: str) -> str:
    return "triton" if device == "cuda" else "cpu"


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # Marked as absent in sys.modules.
        return False


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return f"{importlib.metadata.version(names[0])} ({names[0]})"
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"
