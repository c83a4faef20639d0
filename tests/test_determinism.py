"""What repeats in real V1 engines on a CPU, and what does not have to.

A seeded request's tokens are a function of its logits: the engines here run in float32, so that these are the same in
every batch. Other drafts, their number and their absence change nothing unless drafts are sampled; then only the
distribution of the tokens stays the same. Greedy tokens never change.
"""

from collections import Counter
from pathlib import Path

import pytest
from engine import steps
from engine.run_engines import start

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.long]

ROOT = Path(__file__).parents[1]
DRAFT_MODEL = {"model": str(ROOT / "models" / "specopt-draft")}
DRAFTING = {
    "greedy": DRAFT_MODEL,
    "probabilistic": {**DRAFT_MODEL, "draft_sample_method": "probabilistic"},
    "ngram": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
}
# The whole grid of three drafters and 1, 4 and 8 drafts is run by tests/stress/greedy.py.
GRID = [("greedy", 4), ("greedy", 1), ("probabilistic", 8), ("ngram", 4)]
MAX_LEN, MAX_TOKENS, SEEDED, LAW = 256, 24, 24, 1200
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
PROMPTS = steps.prompts()
ONE_TOKEN = [[token] for token in range(3, 512, 32)]
# Three choices at each of the tokens after the first: 27 sequences, all of which the verifier emits.
# Short: of these there are more than a thousand in each engine.
LAW_PROMPT = PROMPTS[0][:32]
SAMPLED = {"temperature": 1.0, "top_k": 3, "max_tokens": 4, "ignore_eos": True}


def seeded(index):
    return {"temperature": 0.9, "top_p": 0.95, "seed": index, "max_tokens": MAX_TOKENS, "ignore_eos": True}


def engine(name, batches, speculative=None, *, max_num_seqs=96, **llm):
    listed = [{"name": name, "prompts": prompts, "sampling": sampling} for name, (prompts, sampling) in batches.items()]
    llm = {
        "additional_config": {} if name == "plain" else steps.EXACT,
        "disable_log_stats": False,
        "max_model_len": MAX_LEN,
        "max_num_seqs": max_num_seqs,
        # Whole prompts: on a CPU vLLM 0.32 cannot take back a seeded request's draw at the end of a part of one.
        "max_num_batched_tokens": 96 * MAX_LEN,
    } | llm
    return steps.engine(name, speculative, listed, **llm) | ({"drafts": True} if speculative else {})


def speculating(drafting, drafts):
    return {**DRAFTING[drafting], "num_speculative_tokens": drafts}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Results by engine name."""
    common = {
        "greedy": (PROMPTS, GREEDY),
        "one token": (ONE_TOKEN, GREEDY),
        "one more token": (PROMPTS[:16], GREEDY | {"max_tokens": 1}),
        "to the end": (PROMPTS[:8], GREEDY | {"max_tokens": MAX_LEN}),
        "law": ([LAW_PROMPT] * LAW, [SAMPLED | {"seed": seed} for seed in range(LAW)]),
    }
    own = [seeded(index) for index in range(SEEDED)]
    mates = [{"temperature": 1.2, "max_tokens": 3 + index % 30, "ignore_eos": True} for index in range(SEEDED)]
    turned = [item for pair in zip(mates, own[::-1], strict=True) for item in pair]
    turned_prompts = [x for pair in zip(PROMPTS[-SEEDED:], PROMPTS[:SEEDED][::-1], strict=True) for x in pair]
    repeats = {
        "seeded": (PROMPTS[:SEEDED], own),
        "seeded again": (PROMPTS[:SEEDED], own),
        "seeded among others": (turned_prompts, turned),
    }
    engines = [engine("plain", common), engine("off", {"seeded": repeats["seeded"]})]
    for drafting, drafts in GRID:
        batches = common | (repeats if (drafting, drafts) == ("greedy", 4) else {"seeded": repeats["seeded"]})
        engines.append(engine(f"{drafting} {drafts}", batches, speculating(drafting, drafts)))
    aborting = {"name": "abort", "prompts": PROMPTS[:8], "sampling": GREEDY, "abort_after": 3}
    engines[2]["batches"].insert(0, aborting)
    small = {"seeded": repeats["seeded"], "greedy": (PROMPTS, GREEDY)}
    engines.append(engine("few", small, speculating("greedy", 4), max_num_seqs=5))
    pressed = {"greedy": (PROMPTS, GREEDY), "seeded": repeats["seeded"]}
    small = {"max_num_seqs": 16, "num_gpu_blocks_override": 44, "block_size": 32}
    engines.append(engine("pressed", pressed, speculating("greedy", 4), **small))
    return start(engines, tmp_path_factory.mktemp("engines"), "V1")[0]


NAMES = [f"{drafting} {drafts}" for drafting, drafts in GRID]


def tokens(ran, name, batch):
    return ran[name]["batches"][batch]["token_ids"]


def test_the_drop_in_verified_everything(ran):
    others = {"plain": "vllm.v1.sample.sampler.Sampler", "off": "vllm_specopt.integration.v1_sampler.Sampler"}
    for name, result in ran.items():
        assert result["sampler"] == others.get(name, "vllm_specopt.integration.v1.RejectionSampler")


def test_a_seeded_request_repeats_in_the_same_engine(ran):
    first = tokens(ran, "greedy 4", "seeded")
    assert tokens(ran, "greedy 4", "seeded again") == first
    assert first != tokens(ran, "greedy 4", "greedy")[:SEEDED]


def test_a_seeded_request_does_not_depend_on_its_batch_mates_and_their_order(ran):
    first = tokens(ran, "greedy 4", "seeded")
    assert tokens(ran, "greedy 4", "seeded among others")[1::2][::-1] == first


@pytest.mark.parametrize("name", ["few", "pressed", "off", "greedy 1", "ngram 4"])
def test_a_seeded_request_is_the_same_in_another_engine(ran, name):
    """Another batch size; preempted and resumed; without speculation; with other drafts."""
    assert tokens(ran, name, "seeded") == tokens(ran, "greedy 4", "seeded")


def test_sampled_drafts_change_a_seeded_request(ran):
    assert tokens(ran, "probabilistic 8", "seeded") != tokens(ran, "greedy 4", "seeded")


@pytest.mark.parametrize("name", [*NAMES, "few", "pressed"])
def test_greedy_tokens_equal_plain_decoding(ran, name):
    plain = tokens(ran, "plain", "greedy")
    assert [len(ids) for ids in plain] == [MAX_TOKENS] * len(PROMPTS)
    assert tokens(ran, name, "greedy") == plain


def test_requests_were_preempted_where_the_cache_is_small(ran):
    assert all(batch["preemptions"] > 0 for batch in ran["pressed"]["batches"].values())
    assert ran["few"]["preemptions"] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", ["one token", "one more token", "to the end"])
def test_short_prompts_and_ends_equal_plain_decoding(ran, name, batch):
    plain = tokens(ran, "plain", batch)
    assert tokens(ran, name, batch) == plain
    if batch == "to the end":
        assert len({len(ids) for ids in plain}) > 4, "the prompts end alike, so this shows little about max_model_len"


def test_ngram_batches_were_ragged(ran):
    assert [0, 4] in ran["ngram 4"]["drafts"]["greedy"]


def test_aborting_every_request_at_once_leaves_nothing(ran):
    assert ran["greedy 4"]["batches"]["abort"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_other_drafts_leave_the_distribution_unchanged(ran, name):
    stats = pytest.importorskip("scipy.stats")
    counts = [Counter(tuple(ids[1:]) for ids in tokens(ran, which, "law")) for which in ("plain", name)]
    common = [sequence for sequence, count in (counts[0] + counts[1]).items() if count >= 20]
    table = [[count[sequence] for sequence in common] for count in counts]
    rare = [LAW - sum(row) for row in table]
    if min(rare) > 0:
        table = [[*row, rest] for row, rest in zip(table, rare, strict=True)]
    assert len(table[0]) > 8, "too few sequences to tell distributions apart"
    # Four tests at a joint level of 4e-4, with fixed seeds.
    assert stats.chi2_contingency(table).pvalue > 1e-4
