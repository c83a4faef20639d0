"""A drafter of one's own, for vLLM's ``custom_class``: what followed the latest token when it last occurred."""

import numpy as np


class LastOccurrence:
    """Drafts as many tokens as configured, fewer near the end of the text, none for a token that is new to it."""

    def __init__(self, vllm_config):
        self.number = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, *args, **kwargs) -> None:
        """vLLM calls it; there is nothing to load."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings=None,
    ) -> list[list[int]]:
        """Draft for each request.

        Args:
            sampled_token_ids: What each of the B requests emitted in this step; nothing while its prompt is read.
            num_tokens_no_spec: [B] int32, the lengths of the texts.
            token_ids_cpu: [B, longest] int32, the texts.

        Returns:
            Draft tokens of each request.
        """
        drafts = []
        for index, emitted in enumerate(sampled_token_ids):
            text = token_ids_cpu[index, : num_tokens_no_spec[index]]
            found = np.flatnonzero(text[:-1] == text[-1]) if emitted else ()
            start = found[-1] + 1 if len(found) else len(text)
            drafts.append(text[start : start + self.number].tolist())
        return drafts
