"""A worker extension that keeps a running digest of what a tensor-parallel rank's rejection sampler emitted."""

from __future__ import annotations

import hashlib


class RecordVerified:
    """Mixed into vLLM's worker by ``worker_extension_cls``; its methods are called with ``collective_rpc``."""

    def start_recording(self) -> None:
        """Record every verification from here on."""
        sampler = self.model_runner.rejection_sampler
        original, self._digest = sampler.forward, hashlib.sha256()
        self._verified = {"steps": 0, "accepted": 0, "drafted": 0, "mixed_steps": 0, "greedy_steps": 0}

        def forward(metadata, draft_probs, logits, sampling_metadata):
            output = original(metadata, draft_probs, logits, sampling_metadata)
            ids, counts = output.sampled_token_ids.cpu(), self._verified
            self._digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
            counts["steps"] += 1
            counts["accepted"] += int((ids >= 0).sum()) - len(ids)
            counts["drafted"] += sum(metadata.num_draft_tokens)
            counts["mixed_steps"] += 0 < len(sampling_metadata.generators) < len(ids)
            counts["greedy_steps"] += bool(sampling_metadata.all_greedy)
            return output

        sampler.forward = forward

    def recorded(self) -> dict:
        """The digest and counts so far, and the sampler's class."""
        sampler = type(self.model_runner.rejection_sampler).__module__
        return {"rank": self.rank, "sampler": sampler, "digest": self._digest.hexdigest(), **self._verified}

    def process_id(self) -> int:
        """This rank's process."""
        import os

        return os.getpid()
