"""How many tokens the audit takes to find faults planted in a real engine: model runner V1 on a CPU, shipped models.

Usage: ``python tests/audit/engines.py [--limit N] [--noise X] [--sureness X] [--eagle3] [--temperature T]
[FAULT ...]``: prints a table in markdown, line by line.
A fault is a change to what one call of the verification is given or returns; the audit beside it is the one that
serving does, and takes the notes of the faulty call. Where no fault is planted, vLLM's own sampler is watched, or ours
is clean.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DRAFT, EAGLE3 = ROOT / "models" / "specopt-draft", ROOT / "models" / "heads" / "eagle3"
PROMPTS, REPEATS, LENGTH, LIMIT = 32, 3, 40, 100_000
SAMPLED = ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "repetition_penalty": 1.2})


def rows_of_drafts(cu_num_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each draft token: its row, and its request."""
    counts = cu_num_logits.diff() - 1
    request = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.arange(int(counts.sum())) + request, request


def target_probs(rows: torch.Tensor, request: torch.Tensor, parameters: dict) -> torch.Tensor:
    """Distributions of rows after temperature and top-p."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    top_p = None if parameters.get("top_p") is None else parameters["top_p"][request]
    return apply_top_k_top_p(rows.float() / parameters["temperature"][request, None], None, top_p).softmax(1)


def is_2_percent_too_warm(verify: Callable, *args, **kwargs):
    return verify(*args, **kwargs | {"temperature": kwargs["temperature"] * 1.02})


def forgets_top_p(verify: Callable, *args, **kwargs):
    return verify(*args, **kwargs | {"top_p": None})


def accepts_by_the_root(verify: Callable, rows, cu_num_logits, drafts, *args, draft_probs=None, **kwargs):
    """A draft probability of sqrt(target draft) in place of the draft's at the draft token makes the ratio its root."""
    if draft_probs is not None and len(drafts):
        at, request = rows_of_drafts(cu_num_logits)
        place = drafts.long()[:, None]
        target = target_probs(rows[at], request, kwargs).gather(1, place)
        draft_probs = draft_probs.scatter(1, place, (target * draft_probs.gather(1, place)).sqrt())
    return verify(rows, cu_num_logits, drafts, *args, draft_probs=draft_probs, **kwargs)


def shares_noise(verify: Callable, rows, cu_num_logits, drafts, *args, draft_probs=None, **kwargs):
    """The recovered token is drawn with the exponential noise that drew the draft token.

    A draft token is the one of the least noise over probability. Of that least, which has the unit exponential
    distribution, and of the excess of the others, which has it too, the drafter's noise is made again.
    """
    verified = verify(rows, cu_num_logits, drafts, *args, draft_probs=draft_probs, **kwargs)
    if draft_probs is None:
        return verified
    counts, last = cu_num_logits.diff(), (verified.num_sampled - 1).long()
    request = torch.nonzero(verified.num_sampled < counts)[:, 0]
    at = cu_num_logits[request].long() + last[request]
    draft, token = draft_probs[at - request], drafts[at - request].long()[:, None]
    residual = (target_probs(rows[at], request, kwargs) - draft).clamp(min=0)
    least = torch.empty(len(request), 1).exponential_()
    noise = draft * least + torch.empty_like(draft).exponential_().scatter(1, token, 0.0)
    recovered = (noise / residual).argmin(1)
    verified.token_ids[request, last[request]] = recovered.to(verified.token_ids.dtype)
    return verified


def recovers_from_target(verify: Callable, rows, cu_num_logits, drafts, *args, **kwargs):
    verified = verify(rows, cu_num_logits, drafts, *args, **kwargs)
    counts = cu_num_logits.diff()
    is_rejected = verified.num_sampled < counts
    last = (verified.num_sampled - 1).long()
    at = (cu_num_logits[:-1] + last).long()
    given = {name: kwargs.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    fresh = torch.randint(-(2**63), 2**63 - 1, (len(counts),))
    none = torch.empty(0, dtype=torch.int32)
    drawn = verify(rows[at], torch.arange(len(counts) + 1, dtype=torch.int32), none, 0, seeds=fresh, **given)
    recovered = drawn.token_ids[:, 0].to(verified.token_ids.dtype)
    kept = verified.token_ids.gather(1, last[:, None])[:, 0]
    verified.token_ids.scatter_(1, last[:, None], torch.where(is_rejected, recovered, kept)[:, None])
    return verified


FAULTS: dict[str, tuple[str, Callable | None]] = {
    "the recovered token comes from the target": ("exact", recovers_from_target),
    "drafter and recovery share noise": ("exact", shares_noise),
    "acceptance by the square root of the ratio": ("exact", accepts_by_the_root),
    "top-p is applied to the draft only": ("exact", forgets_top_p),
    "the temperature is 2 % too high": ("exact", is_2_percent_too_warm),
    "vLLM's own sampler on a CPU": ("stock", None),
    "none": ("exact", None),
}


def changed_draft(noise: float, sureness: float, folder: Path) -> Path:
    """The shipped draft model with noise on its output embeddings, in their spread, and its logits multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DRAFT, folder)
    weights = load_file(folder / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weight, gen = weights[name].float(), torch.Generator().manual_seed(0)
    weights[name] = (weight + noise * weight.std() * torch.randn(weight.shape, generator=gen)).to(weights[name].dtype)
    weights["model.norm.weight"] = weights["model.norm.weight"] * sureness
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(name: str, limit: int, draft: Path, sampled: Sequence[dict]) -> None:
    """Serve until the alarm, or until ``limit`` tokens are audited; print both halves of the counts as JSON.

    sampled: Parameters that requests take in turns.
    """
    from vllm import LLM, SamplingParams

    from vllm_specopt.benchmarks.host import small_model_dtype
    from vllm_specopt.evidence import BINS, judge
    from vllm_specopt.integration import v1
    from vllm_specopt.integration.audit import ROWS

    method, fault = FAULTS[name]
    sys.modules.pop("llvmlite.binding.ffi", None)
    drafts = {"model": str(draft), "num_speculative_tokens": 3}
    if draft == EAGLE3:
        drafts["method"] = "eagle3"
    llm = LLM(
        model=str(ROOT / "models" / "specopt-target"),
        speculative_config=drafts | {"draft_sample_method": "probabilistic"},
        additional_config={"specopt": {"method": method, "audit": True}},
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=PROMPTS * REPEATS,
        dtype=small_model_dtype(),
    )
    if fault is not None:
        verify = v1.verify
        v1.verify = lambda *args, **kwargs: (
            verify(*args, **kwargs) if kwargs.get("temperature") is None else fault(verify, *args, **kwargs)
        )
    lines = (ROOT / "models" / "prompts.jsonl").read_text().splitlines()[:PROMPTS]
    prompts = [json.loads(line)["prompt"] for line in lines] * REPEATS
    auditor = llm.llm_engine.model_executor.driver_worker.worker.model_runner.sampler.account.auditor
    while True:
        parameters = [
            SamplingParams(**sampled[i % len(sampled)], ignore_eos=True, max_tokens=LENGTH) for i in range(len(prompts))
        ]
        llm.generate(prompts, parameters, use_tqdm=False)
        noted, afresh = auditor.counts[:, ROWS.index(method)]
        counts = [(noted + afresh).tolist(), afresh.tolist()]
        if judge(*counts).is_lossy or sum(counts[0][:BINS]) >= limit:
            print("\n" + json.dumps(counts), flush=True)
            return


def main() -> None:
    shown = ", ".join(FAULTS).replace("%", "%%")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of: {shown}; all if none is given")
    parser.add_argument("--limit", type=int, default=LIMIT, help="tokens after which to give up")
    parser.add_argument("--noise", type=float, default=0.0, help="on the draft model's output embeddings")
    parser.add_argument("--sureness", type=float, default=1.0, help="multiplies the draft model's logits")
    parser.add_argument("--eagle3", action="store_true", help="draft with the shipped EAGLE-3 head, as it is")
    parser.add_argument("--temperature", type=float, help="of all requests, which have no other parameter then")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.faults) - set(FAULTS):
        parser.error(f"{unknown.pop()!r} is no fault")
    if given.eagle3 and (given.noise or given.sureness != 1.0):
        parser.error("--noise and --sureness change the draft model, --eagle3 takes another")
    if given.here:
        with tempfile.TemporaryDirectory(prefix="specopt-audit-") as scratch:
            shipped = EAGLE3 if given.eagle3 else DRAFT
            is_changed = given.noise or given.sureness != 1.0
            draft = changed_draft(given.noise, given.sureness, Path(scratch) / "draft") if is_changed else shipped
            sampled = SAMPLED if given.temperature is None else [{"temperature": given.temperature}]
            run(given.faults[0], given.limit, draft, sampled)
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support import prepared

    from vllm_specopt.evidence import judge

    print("| fault | tokens until the alarm | impossible | largest deviation of a bin, points | log10 e |")
    print("| --- | ---: | ---: | ---: | ---: |")
    options = [argument for argument in sys.argv[1:] if argument not in FAULTS]
    for name in given.faults or FAULTS:
        status, log = prepared.run("V1", __file__, "--here", *options, name)
        if status:
            raise SystemExit(log[-3000:])
        counts = next(line for line in reversed(log.splitlines()) if line.startswith("["))
        verdict = judge(*json.loads(counts))
        assert verdict.largest is not None
        said = f"{verdict.tokens:,}" if verdict.is_lossy else f"none in {verdict.tokens:,}"
        print(
            f"| {name} | {said} | {verdict.impossible:,} | {100 * verdict.largest.deviation:+.2f} | "
            f"{verdict.log10_evidence:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
