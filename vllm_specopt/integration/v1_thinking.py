"""Model runner V1: where each request's thinking budget stands before each of its verified rows.

vLLM's holder has one state per request and step, and one place of it to force the end of thinking at. Here there is a
state per row, each made from the one before by the step that decoding without speculation would take, so that thinking
may end, and start again, among the draft tokens.
"""

import copy

from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

_OWN = "_specopt"
"""Where our state lies within the holder's, so that it follows its request about the batch."""


def before_first_row(holder: ThinkingBudgetStateHolder, output_token_ids: list[list[int]]) -> ThinkingBudgetStateHolder:
    """A holder for rows of one position, brought to the tokens emitted so far.

    Args:
        holder: The runner's; its own states stay as they are.
        output_token_ids: Tokens emitted so far, per request.

    Returns:
        A holder whose ``apply_to_logits(rows, False, None)`` takes one row per request.
    """
    plain = copy.copy(holder)
    plain.in_spec_mode, plain.cu_num_tokens = False, {}
    plain._state = {
        request: dict(_committed(holder, state, output_token_ids[request]))
        for request, state in holder._state.items()
        if request < len(output_token_ids)
    }
    return plain


def with_another_token(
    plain: ThinkingBudgetStateHolder, output_token_ids: list[list[int]], drafts: list[list[int]], position: int
) -> None:
    """Move on to the rows of the next position; the draft tokens before it have been added to the output."""
    for request, state in plain._state.items():
        if position <= len(drafts[request]):
            _step(plain, state, output_token_ids[request])


def _committed(holder: ThinkingBudgetStateHolder, state: dict, output: list[int]) -> dict:
    own = state.get(_OWN)
    if own is None or own["length"] > len(output):
        # A request that is new, or resumed: then vLLM, too, takes what was emitted before in one step.
        initial = holder._init_state_entry(state["prompt_tok_ids"], state["thinking_token_budget"])
        own = state[_OWN] = {"length": len(output), "state": initial}
        _step(holder, initial, output)
    for length in range(own["length"] + 1, len(output) + 1):
        _step(holder, own["state"], output[:length])
    own["length"] = len(output)
    return own["state"]


def _step(holder: ThinkingBudgetStateHolder, state: dict, output: list[int]) -> None:
    state.update(output_tok_ids=output, spec_token_ids=[], in_spec_mode=False, force_index=[])
    holder._update_think_state(state)
