"""What is drawn: cases with known distributions.

A case is a small language: the next token's target distribution depends on the position and on the class (token modulo
``num_classes``) of the token before it, and so does the draft's. The distribution of everything a verification step
emits is then known exactly. It comes from the tensors that the verifier is given, after rounding to their dtype.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vllm_specopt.kernels.reference.rows import target_row_ref
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS

PAIR_GROUPS = 61
"""A large vocabulary's pairs are counted by token modulo this."""


@dataclass(frozen=True)
class Case:
    """One case.

    target: raw logits ``[num_drafts + 2, num_classes, vocab]``; position ``num_drafts + 1`` is read by a second step.
    draft: ``[num_drafts + 1, num_classes, draft_vocab]``, logits (also where the verifier is given none: they are
        then only what drafts are drawn from, at temperature 1) or probabilities, as ``draft_form`` says.
    stationary: all positions and classes share one distribution, so that all rows can be one row in memory (stride 0).
    placeholders: share of draft tokens replaced by -1. greedy_every: every n-th request is greedy.
    one_seed: one seed and many positions, in place of many seeds and one position.
    """

    name: str
    target: torch.Tensor
    draft: torch.Tensor
    draft_form: str = NO_DRAFT
    temperature: float = 1.0
    filters: tuple = ()
    stationary: bool = False
    placeholders: float = 0.0
    greedy_every: int = 0
    one_seed: bool = False

    @property
    def num_drafts(self) -> int:
        return self.draft.shape[0] - 1

    @property
    def num_classes(self) -> int:
        return self.target.shape[1]

    @cached_property
    def vocab_size(self) -> int:
        """Tokens that can be emitted: the narrower vocabulary's, where there is a draft distribution."""
        wide = self.target.shape[-1]
        return wide if self.draft_form == NO_DRAFT else min(wide, self.draft.shape[-1])

    @cached_property
    def target_probs(self) -> np.ndarray:
        """``[num_drafts + 2, num_classes, vocab]`` float64, after temperature and filters."""
        options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | dict(self.filters)
        return self._distributions(self.target[..., : self.vocab_size], **options)

    @cached_property
    def draft_probs(self) -> np.ndarray:
        """``[num_drafts + 1, num_classes, vocab]`` float64: what drafts are drawn from."""
        draft = self.draft[..., : self.vocab_size]
        if self.draft_form == PROBS:
            return draft.double().numpy() / draft.double().sum(-1, keepdim=True).numpy()
        return self._distributions(draft, top_k=0, top_p=1.0, min_p=0.0)

    def _distributions(self, logits: torch.Tensor, **options) -> np.ndarray:
        if self.stationary:
            distribution = target_row_ref(logits[0, 0], self.temperature, **options)[1].numpy()
            return np.broadcast_to(distribution, logits.shape)
        rows = logits.reshape(-1, logits.shape[-1])
        distributions = [target_row_ref(row, self.temperature, **options)[1].numpy() for row in rows]
        return np.stack(distributions).reshape(logits.shape)

    @cached_property
    def accepted_mass(self) -> np.ndarray:
        """Probability that token a is drafted and accepted, ``[num_drafts + 1, num_classes, vocab]``.

        min(target, draft) where the draft distribution is known; draft x target where the verifier takes the draft as
        one-hot. What is emitted after a rejection then has mass target - accepted, token by token.
        """
        target, draft = self.target_probs[:-1], self.draft_probs
        accepted = draft * target if self.draft_form == NO_DRAFT else np.minimum(target, draft)
        return accepted * (1 - self.placeholders)

    @cached_property
    def token_class(self) -> np.ndarray:
        return np.arange(self.vocab_size) % self.num_classes

    @cached_property
    def pair_group(self) -> np.ndarray:
        groups = min(self.vocab_size, PAIR_GROUPS)
        return np.arange(self.vocab_size) % groups

    def first_distribution(self) -> np.ndarray:
        """Distribution of the first emitted token: the target's, ``[vocab]``."""
        return self.target_probs[0, 0]

    def pair_distribution(self) -> np.ndarray:
        """Distribution of the first two tokens' groups: the target's joint distribution, ``[groups * groups]``.

        The second token comes from the same step if the first draft was accepted, else from the next step.
        """
        groups = int(self.pair_group.max()) + 1
        distribution = np.zeros((groups, groups))
        for token_class in range(self.num_classes):
            members = self.token_class == token_class
            first = np.bincount(self.pair_group[members], self.first_distribution()[members], groups)
            second = np.bincount(self.pair_group, self.target_probs[1, token_class], groups)
            distribution += np.outer(first, second)
        return distribution.ravel()

    def length_distribution(self) -> np.ndarray:
        """Joint distribution of the number of accepted drafts and the token after them, ``[(num_drafts + 1) * vocab]``.

        Summed over the class of the last accepted draft: reached[c] = P(n drafts accepted, the last one of class c).
        """
        reached = np.zeros(self.num_classes)
        reached[0] = 1.0
        distribution = []
        for i in range(self.num_drafts):
            rejected = np.clip(self.target_probs[i] - self.accepted_mass[i], 0, None)
            distribution.append(reached @ rejected)
            accepted = reached @ self.accepted_mass[i]
            reached = np.bincount(self.token_class, accepted, self.num_classes)
        distribution.append(reached @ self.target_probs[self.num_drafts])
        return np.concatenate(distribution)


def _random_logits(rng, num_positions, num_classes, vocab_size, spread):
    return torch.from_numpy(rng.standard_normal((num_positions, num_classes, vocab_size)) * spread).float()


def _case(
    name,
    seed,
    *,
    vocab=8,
    draft_vocab=None,
    num_drafts=3,
    num_classes=2,
    spread=1.0,
    draft_spread=None,
    noise=None,
    dtype=torch.float32,
    form=NO_DRAFT,
    change=None,
    **fields,
) -> Case:
    """Random logits; ``noise``: the draft is the target plus so much; ``change(target, draft)`` edits both."""
    rng = np.random.default_rng([7, seed])
    stationary = fields.get("stationary", False)
    shape = (1, 1) if stationary else (num_drafts + 2, num_classes)
    target = _random_logits(rng, *shape, vocab, spread)
    draft = _random_logits(rng, *shape, draft_vocab or vocab, draft_spread or spread)
    if noise is not None:
        draft = target[..., : draft.shape[-1]] + noise * draft
    if change is not None:
        target, draft = change(target, draft)
    target, draft = target.to(dtype), draft.to(dtype)
    if form == PROBS:
        temperature = fields.get("temperature", 1.0)
        draft = (draft.double() / temperature).softmax(-1).float()
    if stationary:
        target = target.expand(num_drafts + 2, 1, vocab)
        draft = draft.expand(num_drafts + 2, 1, -1)
    return Case(name, target, draft[:-1], form, **fields)


def _disjoint(target, draft):
    even = torch.arange(target.shape[-1]) % 2 == 0
    return target.masked_fill(even, -math.inf), draft.masked_fill(~even, -math.inf)


def _one_token(target, draft):
    """The target's distribution is one token, another at each position and class."""
    rows = target.view(-1, target.shape[-1])
    only = torch.full_like(rows, -math.inf)
    only[torch.arange(len(rows)), torch.arange(len(rows)) % rows.shape[-1]] = 0.0
    return only.view_as(target), draft


def _draft_top_3(target, draft):
    return target, draft.masked_fill(draft < draft.topk(3, -1).values[..., -1:], -math.inf)


def make_cases() -> list[Case]:
    """The cases of a full run."""
    half, brain = torch.float16, torch.bfloat16
    return [
        _case("flat", 1, spread=0.3, form=PROBS),
        _case("flat, drafts by logits", 2, spread=0.3, form=LOGITS),
        _case("peaked", 3, spread=4.0, form=PROBS),
        _case("peaked, one-hot drafts", 4, spread=4.0, noise=0.5),
        _case("disjoint supports", 5, form=PROBS, change=_disjoint),
        _case("disjoint supports, one-hot drafts", 6, change=_disjoint),
        _case("target on one token", 7, form=PROBS, change=_one_token),
        _case("draft = target, probabilities", 8, noise=0.0, form=PROBS),
        _case("draft = target, logits", 9, noise=0.0, form=LOGITS, dtype=brain),
        _case("one-hot drafts of a random drafter", 10, vocab=5, num_drafts=4),
        _case("draft close to target", 11, vocab=12, noise=0.4, form=LOGITS, num_drafts=4),
        _case("two tokens", 12, vocab=2, form=PROBS, num_drafts=4),
        _case("top-k on the target", 13, vocab=20, filters=(("top_k", 5),), form=PROBS, noise=0.7),
        _case("top-p on the target", 14, vocab=20, filters=(("top_p", 0.8),), form=LOGITS, noise=0.7),
        _case("min-p on the target", 15, vocab=20, filters=(("min_p", 0.1),), form=PROBS, noise=0.7),
        _case(
            "min-p, top-k and top-p, bf16",
            16,
            vocab=40,
            filters=(("min_p", 0.02), ("top_k", 12), ("top_p", 0.9)),
            form=LOGITS,
            noise=0.7,
            dtype=brain,
        ),
        _case("top-3 on the draft", 17, vocab=10, form=PROBS, change=_draft_top_3),
        _case("top-3 on the draft, top-p on the target", 18, vocab=10, form=LOGITS, change=_draft_top_3,
              filters=(("top_p", 0.9),)),
        _case("temperature 0.6, probabilities", 19, temperature=0.6, form=PROBS, noise=0.6),
        _case("temperature 1.7, logits, fp16", 20, temperature=1.7, form=LOGITS, noise=0.6, dtype=half),
        _case("every third request greedy", 21, form=LOGITS, noise=0.8, greedy_every=3),
        _case("a third of the drafts are placeholders", 22, form=PROBS, noise=0.8, placeholders=1 / 3),
        _case("one seed, all positions", 23, form=PROBS, noise=0.8, one_seed=True),
        _case("narrower draft vocabulary", 24, vocab=13, draft_vocab=9, form=LOGITS, noise=0.8),
        _case("vocabulary 300", 25, vocab=300, num_drafts=2, form=LOGITS, noise=0.8, spread=1.5),
        _case("vocabulary 4097, probabilities", 26, vocab=4097, num_drafts=2, num_classes=1, stationary=True,
              form=PROBS, noise=0.8, spread=1.5),
        _case("vocabulary 4099, one-hot, top-p, bf16", 27, vocab=4099, num_drafts=1, num_classes=1, stationary=True,
              noise=0.8, spread=2.0, dtype=brain, filters=(("top_p", 0.9),)),
    ]  # fmt: skip
