"""`specopt doctor`: would verification by the drop-in run here, with which parts, correctly, and how fast?"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vllm_specopt
from vllm_specopt.cli.errors import CliError
from vllm_specopt.integration import compat

CHECKOUT = Path(vllm_specopt.__file__).parents[1]
ENTRY_POINT = "vllm_specopt:register"
OK, NOTE, PROBLEM = "ok", "note", "problem"
STYLE = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}
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


def run(model: str | None, speculative_config: str | None, additional_config: str | None, as_json: bool) -> int:
    """Run every check, print them, and return the exit status: 0 all good, 1 a problem.

    Args:
        model: Target model; None takes the shipped pair, or checks only the installation where that is not there.
        speculative_config, additional_config: As JSON, as given to ``vllm serve``.
        as_json: Print one JSON object in place of the table.

    Raises:
        CliError: An argument is malformed (exit status 2).
    """
    arguments = _arguments(model, speculative_config, additional_config)
    with _quiet():
        checks = examine(arguments)
    problems = [check.sentence for check in checks if check.status == PROBLEM]
    if as_json:
        print(json.dumps({"ok": not problems, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _show(checks, problems)
    return 1 if problems else 0


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
        reason = str(error).strip().splitlines()[-1].strip()
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


def _arguments(model: str | None, speculative_config: str | None, additional_config: str | None) -> dict | None:
    """Arguments for ``EngineArgs``; None where neither a model is named nor the shipped pair is there."""
    speculative = _json_object("--speculative-config", speculative_config)
    additional = _json_object("--additional-config", additional_config or DEFAULT_OPTION)
    models = CHECKOUT / "models"
    if model is None:
        if not (models / "specopt-target" / "config.json").is_file():
            if speculative_config or additional_config:
                raise CliError("a configuration is given without --model, and the shipped pair is not here.", 2)
            return None
        model = str(models / "specopt-target")
        shipped = {"model": str(models / "specopt-draft"), "num_speculative_tokens": DRAFTS}
        speculative = speculative or shipped
    elif Path(model).is_absolute() or model.startswith("."):
        if not (Path(model) / "config.json").is_file():
            raise CliError(f"{model} is no model folder (it has no config.json).", 2)
    return {"model": model, "speculative_config": speculative, "additional_config": additional}


def _json_object(flag: str, text: str | None) -> dict | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CliError(f"{flag} is not JSON ({error.msg} at character {error.pos + 1}).", 2) from error
    if not isinstance(value, dict):
        raise CliError(f"{flag} is {text}, expected a JSON object.", 2)
    return value


@contextlib.contextmanager
def _quiet():
    """Keep vLLM's log from the answer, which alone goes to standard output; leave the environment as it was."""
    before = dict(os.environ)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _show(checks: list[Check], problems: list[str]) -> None:
    console = Console()
    table = Table("check", "", "found", title="specopt doctor", title_justify="left")
    for check in checks:
        table.add_row(check.name, f"[{STYLE[check.status]}]{check.status}[/]", check.found)
    console.print(table)
    notes = [check.sentence for check in checks if check.status == NOTE]
    for line in problems + notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not problems:
        console.print("All good.", highlight=False)
