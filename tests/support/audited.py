"""What the tests of the audit share."""

from vllm_specopt.audit import audit
from vllm_specopt.rules import BlockConstants, BudgetConstants, SigmoidConstants, TypicalConstants

FILTERS = ("top_k", "top_p", "min_p")
CONSTANTS = {
    "exact": None,
    "sigmoid": SigmoidConstants(-3.0, 3.0, -3.0, 3.0),
    "block": BlockConstants(),
    "typical": TypicalConstants(0.1, 0.3),
    "budget": BudgetConstants(0.3),
}


def parameters(batch) -> dict:
    names = ("temperature", "seeds", "positions", "state_indices", *FILTERS)
    return {name: batch.kwargs.get(name) for name in names}


def audit_step(batch, verified, counts, **kwargs) -> None:
    audit(batch.logits, batch.cu_num_logits, verified.token_ids, counts, **parameters(batch), **kwargs)
