"""What start-up compiles is what serving launches: kernels by the keys that Triton compiles them for, on either runner.

On a CPU there is nothing to compile but numba's loops, which start-up does too.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from engine import run_engines, steps
from support.launch_keys import recorded, unexpected
from support.v1_steps import CHANGES, CPU, Runner, min_p_processor, sampling, spec_metadata
from vllm.v1.sample.sampler import Sampler

from vllm_specopt.integration import plugin, sharded, v1, v1_sampler, warm_up
from vllm_specopt.integration.audit import Auditor
from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.integration.v1 import RejectionSampler
from vllm_specopt.rules import PAPER, RULES, BlockConstants, BudgetConstants
from vllm_specopt.sharded import shards_of

ROOT = Path(__file__).parents[1]
KERNELS, AUDIT = {"statistics_kernel", "decide_kernel"}, {"audit_sweep_kernel", "audit_kernel"}
VOCAB = 60
SEED_COUNTS = [3, 0, 2, 4]


def v1_steps(probabilistic, most_drafts):
    """Steps of every kind: greedy or sampled, each filter, rows for processors, drafts of any length."""
    settings = [
        {"size": 4},
        {"temperature": torch.ones(4)},
        {"temperature": torch.ones(4), "top_k": torch.full((4,), 5, dtype=torch.int32)},
        {"temperature": torch.ones(4), "top_p": torch.full((4,), 0.9)},
        {"temperature": torch.ones(4), "logitsprocs": min_p_processor(torch.full((4,), 0.1))},
    ]
    counts = [SEED_COUNTS, [1, 1, 1, 1], [0, 0, 0, most_drafts], [most_drafts - 1, 0, 1, 0], [0, 0, 0, 0]]
    for setting, count, change in itertools.product(settings, counts, ("", "penalties")):
        changes = CHANGES[change]([[1, 2, 3]] * 4) if change else {}
        spec = {"spec_token_ids": [[1] * n for n in count]}
        for given in {False, probabilistic}:
            probs = torch.rand(sum(count), VOCAB).softmax(1) if given else None
            logits = torch.randn(sum(count) + 4, VOCAB + 4).to(torch.bfloat16)[:, :VOCAB]
            metadata = spec_metadata(count, torch.ones(sum(count)))
            setattr(metadata, v1.BY_REQUEST, True)
            yield metadata, probs, logits, sampling(**setting, **changes, **spec)


@pytest.mark.parametrize(
    ("choice", "probabilistic", "most_drafts"),
    [
        ("exact", False, 4),
        ("exact", True, 9),
        ("sigmoid", True, 7),
        ("per-request", True, 15),
        ("custom", False, 4),
        ("block", True, 4),
        ("budget", False, 4),
        ("audited", True, 4),
    ],
)
def test_v1_launches_only_what_it_warmed_up(monkeypatch, choice, probabilistic, most_drafts):
    """vLLM's V1 runner has no Triton on a CPU; of the kernels only their launches count here."""
    monkeypatch.setattr(v1, "verify", functools.partial(v1.verify, backend="triton"))
    per_request = choice == "per-request"
    method = choice if choice in RULES else "exact"
    rules = {"block": BlockConstants(), "budget": BudgetConstants(0.1), "sigmoid": PAPER, "per-request": PAPER}
    rule, is_audited = rules.get(choice), choice == "audited"
    config = SpecoptConfig(method, rule=rule, allow_per_request=per_request)
    runner = Runner(torch.arange(999))
    sampler = type("Own", (Sampler,), {})() if choice == "custom" else Sampler()
    ours = RejectionSampler(sampler, None, CPU, runner=runner, config=config)
    if is_audited:
        ours.account.auditor = Auditor(SpecoptConfig("exact", audit=1.0), CPU, "triton")
    with recorded() as warmed:
        ours.warm_up(torch.zeros(3, VOCAB + 4, dtype=torch.bfloat16)[:, :VOCAB], most_drafts, probabilistic)
    assert not ours.account.counters.any(), "the dummy requests were counted"
    with recorded(run=False) as served:
        for asking in ({}, {"specopt": "sigmoid"}) if per_request else ({},):
            request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=asking))
            runner.requests = dict.fromkeys("abcd", request)
            runner.input_batch = SimpleNamespace(req_ids=list("abcd"))
            for step in v1_steps(probabilistic, most_drafts):
                ours(*step)
    kernels = KERNELS | ({"residual_kernel"} if probabilistic else set()) | (AUDIT if is_audited else set())
    assert {name for name, *_ in warmed} == {name for name, *_ in served} == kernels
    assert not unexpected(served, warmed), "compiles while serving"
    # Chance decides which steps are swept anew.
    assert is_audited or not unexpected(warmed, served), "compiled in vain"


@pytest.mark.parametrize("probabilistic", [False, True])
def test_v1_launches_for_a_part_of_the_columns_only_what_it_warmed_up(monkeypatch, probabilistic):
    """One of two ranks, which receives what it has sent."""
    vocab_size, columns = 3000, 1504
    for module in (sharded, v1):
        monkeypatch.setattr(module, "filters_stay", lambda device: True)
    monkeypatch.setattr(sharded, "verify_sharded", functools.partial(sharded.verify_sharded, backend="triton"))
    sharding = object.__new__(sharded.Sharding)
    vars(sharding).update(shard=shards_of(vocab_size, 2, columns)[0], steps=0, gather=lambda x: torch.stack([x, x]))
    sampler = RejectionSampler(Sampler(), None, CPU, runner=Runner(torch.arange(99)))
    sampler.account.sharding = sharding
    with recorded(run=False) as warmed:
        sampler.warm_up(torch.zeros(3, columns, dtype=torch.bfloat16), 4, probabilistic)
    settings = [{"size": 4}, {"temperature": torch.ones(4)}]
    settings += [setting | {"top_p": torch.full((4,), 0.9)} for setting in settings[1:]]
    with recorded(run=False) as served:
        for setting, count in itertools.product(settings, ([3, 0, 2, 4], [1, 1, 1, 1], [0, 0, 0, 0])):
            if "top_p" in setting and not sum(count):
                continue
            metadata = spec_metadata(count, torch.ones(sum(count)))
            setattr(metadata, v1.BY_REQUEST, True)
            logits = torch.zeros(sum(count) + 4, columns, dtype=torch.bfloat16)
            for given in {False, probabilistic and sum(count) > 0}:
                probs = torch.ones(sum(count), vocab_size) if given else None
                sampler(metadata, probs, logits, sampling(**setting, spec_token_ids=[[1] * n for n in count]))
    assert {key[0] for key in served} >= {"shard_sweep_kernel", "shard_filter_kernel", "shard_flat_kernel"}
    assert not unexpected(served, warmed), "compiles while serving"


def test_v1_draws_without_speculation_launch_only_what_was_warmed_up(monkeypatch):
    monkeypatch.setattr(v1_sampler, "verify", functools.partial(v1_sampler.verify, backend="triton"))
    runner = Runner(torch.arange(999))
    runner.query_start_loc = SimpleNamespace(gpu=torch.arange(20, dtype=torch.int32))
    ours = v1_sampler.Sampler(Sampler(), v1_sampler.Draws(CPU, runner))
    with recorded() as warmed:
        ours.warm_up(torch.zeros(3, VOCAB + 4, dtype=torch.bfloat16)[:, :VOCAB])
    assert not ours.account.counters.any(), "the dummy requests were counted"
    values = torch.full((4,), 5, dtype=torch.int32), torch.full((4,), 0.9), torch.full((4,), 0.1)
    filters = itertools.product(*((None, value) for value in values))
    with recorded(run=False) as served:
        for (k, p, m), size in itertools.product(filters, (1, 3, 4)):
            cut = {"top_k": k if k is None else k[:size], "top_p": p if p is None else p[:size]}
            if m is not None:
                cut["logitsprocs"] = min_p_processor(m[:size])
            logits = torch.randn(size, VOCAB + 4).to(torch.bfloat16)[:, :VOCAB]
            for change in ("", "penalties") if size == 4 else ("",):
                changes = CHANGES[change]([[1, 2, 3]] * 4) if change else {}
                ours(logits, sampling(torch.ones(size), **cut, **changes))
                ours(logits, sampling(size=size, **changes))
    assert {name for name, *_ in warmed} == KERNELS
    assert not unexpected(served, warmed), "compiles while serving"
    assert not unexpected(warmed, served), "compiled in vain"


def test_a_gpu_worker_warms_up_before_vllm_watches_for_compilation(monkeypatch):
    """vLLM starts its monitor, which may be set to raise, at the end of its own warm-up."""
    order = []
    monkeypatch.setattr(plugin, "active_config", lambda vllm_config: SpecoptConfig("exact"))
    monkeypatch.setattr(
        "vllm_specopt.integration.warm_up.warm_up", lambda runner: order.append(runner.rejection_sampler)
    )
    runner = SimpleNamespace(rejection_sampler=RejectionSampler(Sampler(), None, CPU), sampler=Sampler())
    worker = SimpleNamespace(vllm_config=None, model_runner=runner)
    start = plugin._warm_up(lambda worker: order.append("vLLM's own"))
    for on_gpu in (False, True):
        monkeypatch.setattr(plugin, "current_platform", SimpleNamespace(is_cuda=lambda on_gpu=on_gpu: on_gpu))
        start(worker)
    runner.rejection_sampler = object()
    start(worker)
    assert [step if isinstance(step, str) else type(step) for step in order] == [
        "vLLM's own", RejectionSampler, "vLLM's own", "vLLM's own",
    ]  # fmt: skip


@pytest.mark.parametrize(("head", "lora"), [("fp32", None), ("fails", None), ("bf16", "some")])
def test_rows_are_laid_out_as_the_model_does_or_else_as_vllm_does(head, lora):
    class Model:
        def compute_logits(self, hidden_states):
            assert hidden_states.shape == (3, 24) and hidden_states.dtype == torch.bfloat16
            if head == "fails":
                raise RuntimeError("another hidden size")
            return torch.zeros(3, 500)[:, :481]

    config = SimpleNamespace(dtype=torch.bfloat16, get_hidden_size=lambda: 24, get_vocab_size=lambda: 481)
    rows = warm_up.example_logits(SimpleNamespace(model=Model(), model_config=config, lora_config=lora, device=CPU))
    expected = ((3, 481), (500, 1), torch.float32) if head == "fp32" else ((3, 481), (512, 1), torch.bfloat16)
    assert (rows.shape, rows.stride(), rows.dtype) == expected


@pytest.mark.long
def test_a_cpu_compiles_all_loops_at_start_up(tmp_path):
    """With nothing in numba's cache, the first call with every option costs as little as the next."""
    code = """
    import json, time
    import torch
    from vllm_specopt import cpu, testing
    from vllm_specopt.verify import verify

    times = [time.perf_counter()]
    cpu.warm_up(torch.bfloat16)
    times.append(time.perf_counter())
    for draft in (testing.LOGITS, testing.PROBS, testing.NO_DRAFT):
        batch = testing.random_batch(seed=1, num_drafts=[3, 1], vocab_size=50, dtype=torch.float32, draft=draft,
                                     filters=("top_k", "top_p", "min_p"))
        verify(*batch.args(), **batch.kwargs)
    times.append(time.perf_counter())
    print(json.dumps([after - before for before, after in zip(times, times[1:])]))
    """
    environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environ, cwd=ROOT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    _, serving = json.loads(done.stdout)
    assert any(tmp_path.rglob("*.nbi")), "the loops were not compiled afresh"
    assert serving < 1.0


@pytest.mark.long
@pytest.mark.engine
def test_v2_engines_launch_only_what_they_warmed_up(tmp_path):
    """Real engines in the interpreter: every batch of one kind alone, then all mixed, in chunks of at most 16 rows."""
    prompts = steps.prompts(12)
    base = {"max_tokens": 4, "ignore_eos": True}
    # No top-k or top-p: vLLM's kernel for them, which samples each request's first token, fails in the interpreter.
    kinds = {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.9, "seed": 3},
        "filtered": {"temperature": 0.9, "min_p": 0.1},
        "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3},
        "sampled of some tokens": {"temperature": 1.0, "allowed_token_ids": list(range(0, 512, 2))},
        "filtered with penalties": {"temperature": 1.0, "min_p": 0.05, "frequency_penalty": 1.0},
        "by scores": {"temperature": 0.8, "extra_args": {"specopt": "sigmoid"}},
    }
    mixed = [base | params for params in itertools.islice(itertools.cycle(kinds.values()), len(prompts))]
    draft = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 3}
    drafting = {
        "probabilistic": draft | {"draft_sample_method": "probabilistic"},
        "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    }
    engines = []
    for name, speculative in drafting.items():
        choosing = name == "probabilistic"
        option = {"method": "exact", **({"allow_per_request": True, "sigmoid": "paper"} if choosing else {})}
        used = {k: v for k, v in kinds.items() if choosing or "extra_args" not in v}
        mixture = [params for params in mixed if choosing or "extra_args" not in params]
        batches = [{"name": k, "prompts": prompts[:2], "sampling": base | v} for k, v in used.items()]
        batches.append({"name": "mixed", "prompts": prompts[: len(mixture)], "sampling": mixture})
        more = {"additional_config": {"specopt": option}, "dtype": "auto", "enable_prefix_caching": None}
        made = steps.engine(name, speculative, batches, max_model_len=256, max_num_seqs=32, **more)
        engines.append(made | {"warm_up": 16})
    results, _ = run_engines.start(engines, tmp_path, "V2")
    for result in results.values():
        assert result["sampler"] == "vllm_specopt.integration.v2.RejectionSampler"
        assert result["launches"]["unexpected"] == []
        assert result["launches"]["served"] >= 12
        assert result["launches"]["warmed"] <= 40
