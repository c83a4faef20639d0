"""A worker extension that keeps a running digest of what a tensor-parallel rank's rejection sampler emitted."""

from __future__ import annotations

import hashlib


class RecordVerified:
    """Mixed into vLLM's worker by ``worker_extension_cls``; its methods are called with ``collective_rpc``."""

    def start_recording(self) -> None:
        """Record every verification from here on; what was verified sharded is verified on whole rows as well.

        Of these, ``sent`` and ``logits`` are the bytes that this rank sent, and that a gather would have sent.
        """
        from unittest import mock

        import torch

        from vllm_specopt.verify import verify

        sampler = self.model_runner.rejection_sampler
        self._digest = hashlib.sha256()
        self._verified = {"steps": 0, "accepted": 0, "drafted": 0, "mixed_steps": 0, "greedy_steps": 0}
        self._sharded = {"steps": 0, "drawn": 0, "filtered": 0, "early": 0, "differ": 0, "sent": 0, "logits": 0}

        def record(ids, num_drafted: int, num_seeded: int, all_greedy: bool) -> None:
            counts, ids = self._verified, ids.cpu()
            self._digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
            counts["steps"] += 1
            counts["accepted"] += int((ids >= 0).sum()) - len(ids)
            counts["drafted"] += num_drafted
            counts["mixed_steps"] += 0 < num_seeded < len(ids)
            counts["greedy_steps"] += all_greedy

        def forward(metadata, draft_probs, logits, sampling_metadata):
            output = original(metadata, draft_probs, logits, sampling_metadata)
            num_seeded, all_greedy = len(sampling_metadata.generators), bool(sampling_metadata.all_greedy)
            record(output.sampled_token_ids, sum(metadata.num_draft_tokens), num_seeded, all_greedy)
            return output

        def _verify(logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, slots, *args):
            output = original(logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, slots, *args)
            states = sampler.sampler.sampling_states
            all_greedy = not states.temperature.np[slots].any()
            record(output[1], len(logits) - len(slots), int(states.seeds_set[slots].sum()), all_greedy)
            return output

        def counting(tensor):
            self._sharded["sent"] += tensor.nbytes
            return gathered(tensor)

        def on_whole_rows(logits, *args, **kwargs):
            with mock.patch.object(sharding, "gather", counting):
                verified = sharded(logits, *args, **kwargs)
            self._sharded["logits"] += logits.nbytes
            whole = sharding.gather(logits.contiguous()).transpose(0, 1).flatten(1)[:, : sharding.shard.vocab_size]
            kwargs |= {"bad_row_counter": None, "counters": None, "notes": None}
            token_ids, num_sampled = verify(whole, *args, **kwargs)
            counts, is_filtered = self._sharded, kwargs.get("top_p") is not None
            counts["steps"] += 1
            counts["drawn"] += kwargs.get("temperature") is not None
            counts["filtered"] += is_filtered
            # Where a second row of a request is flat, it has some of the tokens.
            some = torch.arange(token_ids.shape[1]) < verified.num_sampled[:, None]
            early = int((verified.num_sampled < num_sampled).sum())
            counts["early"] += early
            same = token_ids.where(some, -1).equal(verified.token_ids) and (is_filtered or not early)
            counts["differ"] += not (same and (verified.num_sampled >= 1).all())
            return verified

        name, wrapper = ("forward", forward) if hasattr(sampler, "forward") else ("_verify", _verify)
        original = getattr(sampler, name)
        setattr(sampler, name, wrapper)
        sharding = getattr(getattr(sampler, "account", None), "sharding", None)
        if sharding is not None:
            sharded, gathered = sharding.verify, sharding.gather
            sharding.verify = on_whole_rows

    def use_kernels(self) -> None:
        """Verify on a CPU with what verifies on a GPU."""
        import vllm_specopt.integration.sharded
        import vllm_specopt.sharded
        import vllm_specopt.verify

        for module in (vllm_specopt.verify, vllm_specopt.sharded, vllm_specopt.integration.sharded):
            module.backend_name = lambda device, backend=None: "triton"

    def warm_up_parts(self) -> None:
        """What a GPU's worker does at its start for steps whose logits stay on their ranks."""
        from vllm_specopt.integration.warm_up import warm_up_parts

        steps = self.model_runner.rejection_sampler.account.sharding.steps
        warm_up_parts(self.model_runner)
        assert self.model_runner.rejection_sampler.account.sharding.steps > steps

    def recorded(self) -> dict:
        """The digest and counts so far, and the sampler's class."""
        sampler = type(self.model_runner.rejection_sampler).__module__
        counts = self._verified | {"sharded": self._sharded}
        return {"rank": self.rank, "sampler": sampler, "digest": self._digest.hexdigest(), **counts}

    def process_id(self) -> int:
        """This rank's process."""
        import os

        return os.getpid()
