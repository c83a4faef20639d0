"""V1's verified rows: vLLM's logits processors, custom ones included, do to each what they do without speculation."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from support.v1_processors import VOCAB, Ban, NotTwice, Steep
from support.v1_steps import (
    CHANGES,
    CPU,
    adapter,
    generators_of,
    min_p_processor,
    plain_sampler,
    sampling,
    spec_metadata,
)
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinTokensLogitsProcessor,
    process_dict_updates,
)
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from vllm_specopt.integration.v1_rows import DECLARED, MinTokens, cannot_process_rows

COUNTS, START, END = [3, 0, 2, 4], 50, 51


PARAMS = [
    SamplingParams(extra_args={"not_twice": True}, logit_bias={3: 4.0, 9: 2.0}),
    SamplingParams(min_tokens=4, stop_token_ids=list(range(1, VOCAB, 2))),
    SamplingParams(extra_args={"ban": list(range(20))}, min_tokens=3, stop_token_ids=list(range(20, 40))),
    SamplingParams(extra_args={"not_twice": True, "ban": [7, 8]}, logit_bias={5: -50.0, 40: 3.0}, min_tokens=2,
                   stop_token_ids=list(range(0, VOCAB, 2))),
]  # fmt: skip


def flat(lists):
    return [token for tokens in lists for token in tokens]


def processors(kinds, outputs):
    """vLLM's processors and custom ones, told of a batch of the requests above."""
    made = {
        "min_tokens": lambda: MinTokensLogitsProcessor(None, CPU, False),
        "bias": lambda: LogitBiasLogitsProcessor(None, CPU, False),
        "not_twice": lambda: NotTwice(None, CPU, False),
        "ban": Ban,
        "steep": lambda: Steep(2.0),
    }
    built = [made[kind]() for kind in kinds]
    added = [(index, params, [1, 2], outputs[index]) for index, params in enumerate(PARAMS)]
    for processor in built:
        processor.update_state(BatchUpdate(batch_size=4, removed=(), added=added, moved=()))
    return LogitsProcessors(built)


def budgets(outputs, budget=2):
    """The runner's holder of thinking budgets, for all four requests."""
    config = SimpleNamespace(reasoning_start_token_ids=[START], reasoning_end_token_ids=[END])
    holder = ThinkingBudgetStateHolder(config, 4, 4, CPU, False)
    params = SamplingParams(thinking_token_budget=budget)
    added = [(index, params, [1, 2], output) for index, output in enumerate(outputs)]
    holder.sync_batch(BatchUpdate(batch_size=4, removed=(), added=added, moved=()))
    return holder


def batch(temperature=None, kinds=(), change=None, thinking=False, outputs=None, drafts=None, **settings):
    """Draft tokens request by request, logits, and sampling metadata whose lists are the processors' own."""
    torch.manual_seed(7)
    logits = torch.randn(13, VOCAB) * 2
    outputs = [[4, 9], [8], [2, 2, 5], []] if outputs is None else outputs
    best = logits.argmax(1).split([count + 1 for count in COUNTS])
    drafts = [part[:-1].tolist() for part in best] if drafts is None else drafts
    changes = CHANGES[change]([part.tolist() for part in best]) if change else {}
    changes |= {"output_token_ids": outputs, "spec_token_ids": drafts, "logitsprocs": processors(kinds, outputs)}
    if thinking:
        changes["thinking_budget_state_holder"] = budgets(outputs)
    generators = None if temperature is None else generators_of([3, 4, 5, 6])
    metadata = spec_metadata(COUNTS, torch.tensor(flat(drafts), dtype=torch.int32))
    return metadata, logits, sampling(temperature, generators, size=4, **changes, **settings)


def one_by_one(logits, make_settings, drafts, outputs, positions):
    """What each row emits without speculation: each request alone with the tokens before the row as its output."""
    emitted, row = [], 0
    for request, count in enumerate(COUNTS):
        tokens = []
        for i in range(count + 1):
            settings = make_settings([[*output] for output in outputs], request, drafts[request][:i])
            rows = logits[row : row + 1].expand(4, -1).clone()
            at = torch.full((4,), int(positions[row]))
            if not tokens or tokens[-1] == drafts[request][i - 1]:
                tokens.append(int(plain_sampler(at)(rows, settings).sampled_token_ids[request]))
            row += 1
        emitted.append(tokens)
    return emitted


CASES = {
    "penalties": {"change": "penalties"},
    "bad words": {"change": "bad_words"},
    "allowed": {"change": "allowed"},
    "minimum length": {"kinds": ("min_tokens",)},
    "logit bias": {"kinds": ("bias",)},
    "custom, of a request": {"kinds": ("not_twice",)},
    "custom, of the batch": {"kinds": ("ban",)},
    "custom, after temperature": {"kinds": ("steep",)},
    "all": {"kinds": ("min_tokens", "bias", "not_twice", "ban", "steep"), "change": "penalties"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [None, torch.tensor([0.7, 1.0, 1.3, 0.0])], ids=["greedy", "sampled"])
def test_a_verified_row_emits_what_a_plain_step_would(case, temperature):
    metadata, logits, settings = batch(temperature, **CASES[case])
    drafts, outputs = settings.spec_token_ids, [[*output] for output in settings.output_token_ids]
    positions = torch.arange(30, 43)

    def plain(outputs, request, before):
        _, _, made = batch(temperature, **CASES[case])
        for output, length in zip(made.output_token_ids, map(len, outputs), strict=True):
            del output[length:]
        made.output_token_ids[request].extend(before)
        for processor in made.logitsprocs.all:
            processor.update_state(None)
        return replace(made, spec_token_ids=None)

    expected = one_by_one(logits, plain, drafts, outputs, positions)
    before = logits.clone()
    ours = adapter(positions.flip(0))(metadata, None, logits, settings).sampled_token_ids
    assert [[token for token in row if token >= 0] for row in ours.tolist()] == expected
    assert [*map(list, settings.output_token_ids)] == outputs and torch.equal(logits, before)
    unprocessed = sampling(temperature, generators_of([3, 4, 5, 6]), size=4) if temperature is not None else None
    without = adapter(positions.flip(0))(metadata, None, logits, unprocessed or sampling(size=4)).sampled_token_ids
    if temperature is None and case == "custom, after temperature":
        assert torch.equal(ours, without)
    else:
        assert not torch.equal(ours, without), "the processors changed nothing, so this test shows nothing"


def test_a_minimum_length_counts_no_draft_token_before_it_is_accepted():
    """Asynchronous scheduling takes all draft tokens of the last step for accepted until the next one is sampled."""
    output = [5, 6]
    params = SamplingParams(min_tokens=4, stop_token_ids=[7])
    processor = MinTokens(MinTokensLogitsProcessor(None, CPU, False))
    assert not processor
    processor.update_state(BatchUpdate(batch_size=1, removed=(), added=[(0, params, [1], output)], moved=()))
    output += [-1] * 4
    processor.update_state(None)
    assert processor
    output[2:] = [9]
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 8]] = torch.tensor([9.0, 5.0])
    logits[1, [7, 3]] = torch.tensor([9.0, 5.0])
    settings = sampling(
        size=1,
        output_token_ids=[output],
        spec_token_ids=[[8]],
        logitsprocs=LogitsProcessors([processor]),
    )
    # The third token is not there yet at the first row, so 7 must not be the fourth; after it 7 may be.
    tokens = adapter()(spec_metadata([1], torch.tensor([8])), None, logits, settings).sampled_token_ids
    assert tokens.tolist() == [[8, 7]] and output == [5, 6, 9]
    output += [8, 7]
    processor.update_state(None)
    assert not processor


def thinking_outputs(drafts_of):
    """Serve four requests greedily with a model that always prefers 5, in steps of these drafts; 40 tokens each."""
    outputs = [[START], [], [3, START, 5], [START, 5, END]]
    holder, emitted = budgets([[], [], [], []]), []
    states = [len(output) for output in outputs]
    sampler = adapter()
    while min(len(output) - n for output, n in zip(outputs, states, strict=True)) < 40:
        drafts = [drafts_of(request, output) for request, output in enumerate(outputs)]
        logits = torch.zeros(sum(map(len, drafts)) + 4, VOCAB)
        row = 0
        for output, draft in zip(outputs, drafts, strict=True):
            for i in range(len(draft) + 1):
                # A new thought begins two tokens after the end of one.
                text = [*output, *draft[:i]]
                logits[row, START if text[-2:-1] == [END] or not text else 5] = 9.0
                row += 1
        settings = sampling(
            size=4, output_token_ids=outputs, spec_token_ids=drafts, thinking_budget_state_holder=holder
        )
        metadata = spec_metadata([len(draft) for draft in drafts], torch.tensor(flat(drafts), dtype=torch.int32))
        tokens = sampler(metadata, None, logits, settings).sampled_token_ids.tolist()
        emitted.append([sum(token >= 0 for token in row) for row in tokens])
        for output, row in zip(outputs, tokens, strict=True):
            output.extend(token for token in row if token >= 0)
    return [output[:40] for output in outputs], emitted


def test_thinking_may_end_and_start_again_among_the_draft_tokens():
    plain, _ = thinking_outputs(lambda request, output: [])
    for output in plain:
        # Every thought has at most its budget of two tokens; a request was given three or none to begin with.
        starts = [at for at, token in enumerate(output[:-4]) if token == START and at > 2]
        assert len(starts) > 4 and all(END in output[at + 1 : at + 4] for at in starts)
    for depth in (1, 2, 4):
        drafted, emitted = thinking_outputs(lambda request, output, depth=depth: plain[request][len(output) :][:depth])
        assert drafted == plain
        assert max(map(max, emitted)) == depth + 1
    wrong, _ = thinking_outputs(lambda request, output: [5, 5, 7, 5])
    assert wrong == plain


def test_an_error_leaves_the_lists_of_tokens_as_they_were():
    class Failing(Ban):
        def apply(self, logits):
            if len(seen.append(1) or seen) == 3:
                raise RuntimeError("broken")
            return logits

    seen = []
    metadata, logits, settings = batch(kinds=("min_tokens",))
    settings.logitsprocs.non_argmax_invariant.append(Failing())
    before = [[*output] for output in settings.output_token_ids]
    with pytest.raises(RuntimeError, match="broken"):
        adapter()(metadata, None, logits, settings)
    assert settings.output_token_ids == before


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
@pytest.mark.parametrize("others", [None, 1, 5])
def test_specific_log_probabilities(mode, others):
    """Beside a request that asks for the likeliest tokens, and others that ask for nothing."""
    wanted = {0: [5, 17, 30], 3: [2]}
    metadata, logits, settings = batch(
        torch.tensor([0.7, 1.0, 0.5, 0.0]), max_num_logprobs=others, logprob_token_ids=wanted
    )
    output = adapter(torch.arange(13), mode=mode)(metadata, None, logits, settings)
    ids, values = (part.view(4, 5, -1) for part in output.logprobs_tensors[:2])
    assert ids.shape[2] == 1 + max(3, others or 0)
    row = 0
    for request, count in enumerate(COUNTS):
        for i in range(count + 1):
            token = int(output.sampled_token_ids[request, i])
            expected = logits[row]
            if mode.startswith("processed"):
                expected = expected / (float(settings.temperature[request]) or 1.0)
            if mode.endswith("logprobs"):
                expected = expected.log_softmax(0)
            row += 1
            if token < 0:
                continue
            shown = [token, *wanted.get(request, expected.topk(others).indices.tolist() if others else [])]
            assert ids[request, i, : len(shown)].tolist() == shown
            torch.testing.assert_close(values[request, i, : len(shown)], expected[shown])
            assert (values[request, i, len(shown) :] == -torch.inf).all()


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "processed_logits"])
def test_log_probabilities_do_not_change_the_tokens(mode):
    filters = {"top_k": torch.tensor([5, 60, 9, 60], dtype=torch.int32), "top_p": torch.tensor([0.9, 0.7, 1.0, 0.8])}
    tokens = []
    for asked in (None, 2):
        metadata, logits, settings = batch(torch.full((4,), 0.9), max_num_logprobs=asked, **filters)
        settings.logitsprocs = min_p_processor(torch.tensor([0.0, 0.1, 0.2, 0.0]))
        output = adapter(torch.arange(13), mode=mode)(metadata, None, logits, settings)
        tokens.append(output.sampled_token_ids)
    assert torch.equal(*tokens)
    assert output.logprobs_tensors.logprobs[:, 0][tokens[0].flatten() >= 0].isfinite().all()


def test_a_token_at_a_filters_threshold_is_reported_with_what_it_was_drawn_with(monkeypatch):
    from vllm_specopt.integration import v1_sampler

    monkeypatch.setattr(v1_sampler, "apply_top_k_top_p", lambda rows, *_: torch.full_like(rows, -torch.inf))
    metadata, logits, settings = batch(torch.full((4,), 0.9), max_num_logprobs=0)
    output = adapter(torch.arange(13), mode="processed_logits")(metadata, None, logits, settings)
    assert output.logprobs_tensors.logprobs[:, 0].isfinite().all()


class Counting(Ban):
    """Changes its state with every token, or with every row."""

    def update_state(self, batch_update):
        super().update_state(batch_update)
        self.steps = getattr(self, "steps", 0) + 1


class Stateful(Ban):
    def apply(self, logits):
        self.last, seen = logits.argmax(1), 1
        return logits * seen


class Declared(Counting):
    specopt_per_row = True


class Returns(Ban):
    """Docstrings do not count."""

    def update_state(self, batch_update):
        """Of the batch."""
        if batch_update is None:
            return
        self.bans.clear()

    def apply(self, logits):
        logits[self.rows] += self.values
        return logits


class Rebuilds(Ban):
    def update_state(self, batch_update):
        changed = process_dict_updates(self.bans, batch_update, lambda *_: None)
        if changed:
            self.rows = torch.tensor(list(self.bans))


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (NotTwice, None),
        (Ban, None),
        (Steep, None),
        (Returns, None),
        (Rebuilds, None),
        (LogitBiasLogitsProcessor, None),
        (MinTokens, None),
        (Declared, None),
        (Counting, r"Counting\.update_state may change its state with every token; if it does not, declare"),
        (Stateful, r"Stateful\.apply may change its state with every row; if it does not, declare"),
    ],
)
def test_which_custom_processors_can_work_on_draft_tokens(processor, reason):
    found = cannot_process_rows(processor)
    if reason is None:
        assert found is None
    else:
        assert found.startswith(reason.replace("\\", "")) and f"{DECLARED} = True" in found


def test_a_custom_sampler_still_gives_the_bonus_token():
    class Fixed(Sampler):
        def forward(self, logits, sampling_metadata, **kwargs):
            output = super().forward(logits, sampling_metadata, **kwargs)
            output.sampled_token_ids.fill_(17)
            return output

    metadata, logits, settings = batch(kinds=("ban", "bias"), max_num_logprobs=1, logprob_token_ids={0: [4]})
    output = adapter(sampler=Fixed())(metadata, None, logits, settings)
    assert output.sampled_token_ids[1, 0] == 17
    expected = adapter()(metadata, None, logits, settings).sampled_token_ids
    emitted = (expected >= 0).sum(1)
    for request, count in enumerate(COUNTS):
        kept = min(int(emitted[request]), count)
        assert output.sampled_token_ids[request, :kept].tolist() == expected[request, :kept].tolist()
