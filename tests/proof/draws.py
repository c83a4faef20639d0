"""Drawing from a verifier: many requests a step, drafts by an independent generator, outcomes counted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from proof.cases import Case
from proof.judgement import Judgement, judge
from vllm_specopt.testing import LOGITS, PROBS, Batch
from vllm_specopt.verify import verify

STATISTICS = ("first token", "pair of tokens", "accepted length and its token")
FIRST_POSITION = 17
BATCH_BYTES = 1 << 26
MAX_BATCH = 1 << 16


@dataclass
class Step:
    """One verification step of ``num_reqs`` requests that all have the case's number of drafts.

    seeds: ``[num_reqs]``. positions: ``[num_reqs]``, of each request's first row. offset: which position of the case
    the first row is. classes: ``[num_reqs, num_drafts + 1]``, of the token before each row. drafts:
    ``[num_reqs, num_drafts]``, -1 is a placeholder. greedy: ``[num_reqs]`` bool.
    """

    case: Case
    seeds: np.ndarray
    positions: np.ndarray
    offset: int
    classes: np.ndarray
    drafts: np.ndarray
    greedy: np.ndarray

    def batch(self) -> Batch:
        """The tensors a verifier gets."""
        case, num_reqs, num_drafts = self.case, len(self.seeds), self.case.num_drafts
        rows, columns = num_drafts + 1, np.arange(num_drafts + 1) + self.offset
        kwargs = {
            "temperature": torch.where(torch.from_numpy(self.greedy), 0.0, case.temperature).float(),
            "seeds": torch.from_numpy(self.seeds),
            "positions": torch.from_numpy((self.positions[:, None] + np.arange(rows)).ravel()),
        }
        if case.stationary:
            logits = case.target[0, 0].expand(num_reqs * rows, -1)
            draft = case.draft[0, 0].expand(num_reqs, num_drafts, -1)
        else:
            logits = case.target[columns, self.classes].reshape(num_reqs * rows, -1)
            draft = case.draft[columns[:-1], self.classes[:, :-1]]
        if case.draft_form == LOGITS:
            kwargs["draft_logits"] = draft
        elif case.draft_form == PROBS:
            kwargs["draft_probs"] = draft[0, :1].expand(num_reqs * num_drafts, -1) if case.stationary else (
                draft.reshape(num_reqs * num_drafts, -1)
            )  # fmt: skip
        for name, value in case.filters:
            kwargs[name] = torch.full((num_reqs,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        starts = torch.arange(0, num_reqs * rows + 1, rows, dtype=torch.int32)
        return Batch(logits, starts, torch.from_numpy(self.drafts.ravel()), num_drafts, kwargs)


Verifier = Callable[[Step], tuple[np.ndarray, np.ndarray]]
Drafter = Callable[[Case, int, np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def backend_verifier(backend: str, device: str = "cpu", **method) -> Verifier:
    """``vllm_specopt.verify.verify`` on a backend; ``method``: its arguments that select the method."""

    def run(step: Step) -> tuple[np.ndarray, np.ndarray]:
        batch = step.batch().to(device)
        verified = verify(*batch.args(), **batch.kwargs, **method, backend=backend)
        return verified.token_ids.cpu().numpy(), verified.num_sampled.cpu().numpy()

    return run


def independent_drafter(case, offset, classes, seeds, positions, rng) -> np.ndarray:
    """Draft tokens from the case's draft distribution; the verifier's generator has no part in them."""
    uniform = rng.random(len(classes))
    tokens = np.empty(len(classes), np.int64)
    for token_class in range(case.num_classes):
        members = classes == token_class
        cumulative = case.draft_probs[offset, token_class].cumsum()
        tokens[members] = np.searchsorted(cumulative / cumulative[-1], uniform[members], side="right")
    return tokens.clip(max=case.vocab_size - 1)


def make_step(case, offset, first_class, seeds, positions, rng, drafter: Drafter = independent_drafter) -> Step:
    """Draw the drafts of a step that starts at position ``offset`` of the case, after tokens of ``first_class``."""
    num_reqs, num_drafts = len(seeds), case.num_drafts
    classes = np.zeros((num_reqs, num_drafts + 1), np.int64)
    classes[:, 0] = first_class
    drafts = np.empty((num_reqs, num_drafts), np.int64)
    for i in range(num_drafts):
        # A second step has one row more than the case has draft positions; any drafter will do for its last draft.
        position = min(offset + i, num_drafts)
        drafts[:, i] = drafter(case, position, classes[:, i], seeds, positions + i, rng)
        classes[:, i + 1] = drafts[:, i] % case.num_classes
    if case.placeholders:
        drafts[rng.random(drafts.shape) < case.placeholders] = -1
    greedy = np.zeros(num_reqs, bool)
    if case.greedy_every:
        greedy[:: case.greedy_every] = True
    return Step(case, seeds, positions, offset, classes, drafts, greedy)


def batch_size(case: Case) -> int:
    row_bytes = 4 * (case.num_drafts + 1) * (1 if case.stationary else 2 * case.target.shape[-1])
    return int(min(MAX_BATCH, max(256, BATCH_BYTES // row_bytes)))


def streams(case: Case, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Seeds and first positions of ``draws`` sampled requests, batch by batch; consecutive seeds, as users choose."""
    base = np.random.default_rng(seed).integers(-(2**62), 2**62)
    size = batch_size(case)
    for start in range(0, draws, size):
        index = np.arange(start, min(start + size, draws), dtype=np.int64)
        if case.one_seed:
            # Positions two steps apart, so that no two requests share a draw.
            yield np.full(len(index), base), FIRST_POSITION + index * 2 * (case.num_drafts + 2)
        else:
            yield base + index, np.full(len(index), FIRST_POSITION)


class WrongGreedy(AssertionError):
    """A greedy batch mate did not get the argmax of its rows."""


def _check_greedy(step: Step, token_ids: np.ndarray, num_sampled: np.ndarray) -> None:
    case, greedy = step.case, step.greedy
    rows = np.arange(case.num_drafts + 1) + step.offset
    best = case.target[..., : case.vocab_size].argmax(-1).numpy()[rows, step.classes[greedy]]
    hits = np.cumprod(step.drafts[greedy] == best[:, :-1], 1)
    expected = np.where(np.arange(case.num_drafts + 1) <= hits.sum(1)[:, None], best, -1)
    if not (expected == token_ids[greedy]).all() or not (num_sampled[greedy] == hits.sum(1) + 1).all():
        raise WrongGreedy(f"{case.name}: a greedy request among sampled ones did not get its argmax")


def draw_case(
    case: Case, verifier: Verifier, draws: int, seed: int, drafter: Drafter = independent_drafter
) -> dict[str, np.ndarray]:
    """Counts of each statistic over at least ``draws`` sampled requests of one case.

    Each request makes one step; where it emitted one token only, a second step at the next position (with the
    same seed, as in an engine) gives the second token of its pair.

    Raises:
        WrongGreedy: A greedy batch mate did not get its argmax.
    """
    rng = np.random.default_rng([1, seed])
    vocab, groups = case.vocab_size, int(case.pair_group.max()) + 1
    sizes = (vocab, groups * groups, (case.num_drafts + 1) * vocab)
    counts = [np.zeros(size, np.int64) for size in sizes]
    if case.greedy_every:
        draws = draws * case.greedy_every // (case.greedy_every - 1) + case.greedy_every
    for seeds, positions in streams(case, draws, seed):
        step = make_step(case, 0, 0, seeds, positions, rng, drafter)
        token_ids, num_sampled = verifier(step)
        _check_greedy(step, token_ids, num_sampled)
        sampled = ~step.greedy
        token_ids, num_sampled = token_ids[sampled], num_sampled[sampled]
        seeds, positions = seeds[sampled], positions[sampled]
        first, second = token_ids[:, 0], token_ids[:, 1].copy()
        counts[0] += np.bincount(first, minlength=vocab)
        last = token_ids[np.arange(len(token_ids)), num_sampled - 1]
        counts[2] += np.bincount((num_sampled - 1) * vocab + last, minlength=sizes[2])
        short = num_sampled == 1
        if short.any():
            classes = first[short] % case.num_classes
            following = make_step(case, 1, classes, seeds[short], positions[short] + 1, rng, drafter)
            following.greedy[:] = False
            second[short] = verifier(following)[0][:, 0]
        pairs = case.pair_group[first] * groups + case.pair_group[second]
        counts[1] += np.bincount(pairs, minlength=sizes[1])
    return dict(zip(STATISTICS, counts, strict=True))


def judge_case(case: Case, counts: dict[str, np.ndarray], alpha: float) -> dict[str, Judgement]:
    """Each statistic against its distribution; ``alpha``: chance of failing, per test."""
    known = (case.first_distribution(), case.pair_distribution(), case.length_distribution())
    distributions = dict(zip(STATISTICS, known, strict=True))
    return {name: judge(counts[name], distributions[name], alpha, strict=name != STATISTICS[2]) for name in STATISTICS}
