"""Is this a vLLM whose code we know? What exactly differs if not?

The adapters subclass, wrap and call parts of vLLM that it does not promise to keep. Each such part is fingerprinted by
its source text, read from vLLM's files and not imported, so the check is the same in every process and also works on
sources that cannot run here.
"""

import ast
import functools
import hashlib
import re
import textwrap
from pathlib import Path

VERSIONS = ("0.32", "0.33")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Fingerprints of 0.32.0 and 0.33.0; one entry where the two agree.
PARTS: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "V1": {
        ("v1/sample/rejection_sampler.py", "RejectionSampler"): ("bd764c28d3fbd20d", "8470298166e6b30a"),
        ("v1/sample/sampler.py", "Sampler.__init__"): ("81bf193284cea11d",),
        ("v1/sample/sampler.py", "Sampler.forward"): ("61e225a1c3acad7d", "863104fb603a0705"),
        ("v1/sample/sampler.py", "Sampler.apply_logits_processors"): ("a19d69d375599fb1",),
        ("v1/sample/sampler.py", "Sampler.sample"): ("df4b3caf2ec2e3b8",),
        ("v1/sample/logits_processor/builtin.py", "MinPLogitsProcessor"): ("43971104c8f5fc77",),
        ("v1/sample/logits_processor/builtin.py", "MinTokensLogitsProcessor"): ("14755473ede44dc9",),
        ("v1/sample/logits_processor/builtin.py", "LogitBiasLogitsProcessor"): ("2894a2d8421a5d90",),
        ("v1/sample/logits_processor/builtin.py", "process_dict_updates"): ("bde74c9cc771963f",),
        ("v1/sample/logits_processor/__init__.py", "AdapterLogitsProcessor"): ("62e61bc232ba46b7",),
        ("v1/sample/logits_processor/__init__.py", "build_logitsprocs"): ("4d4868c70d80be01",),
        ("v1/sample/thinking_budget_state.py", "ThinkingBudgetStateHolder"): ("2ef119d507b299f7",),
        ("v1/sample/sampler.py", "Sampler.gather_specific_token_logprobs"): ("ead8c5540d510d3e",),
        ("v1/sample/metadata.py", "SamplingMetadata"): ("4d5a48792a341df1",),
        ("v1/spec_decode/metadata.py", "SpecDecodeMetadata"): ("41bb36606eb19917",),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner._prepare_inputs"): ("73af9736b3d259a3",),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner._sample"): ("0e5d07b1a03ebda7",),
        ("v1/worker/gpu_input_batch.py", "InputBatch.refresh_metadata"): ("da0b8a7683cd8970",),
        ("v1/worker/gpu_input_batch.py", "InputBatch._make_sampling_metadata"): ("fc7ac3765598137b",),
        ("v1/engine/input_processor.py", "InputProcessor._validate_params"): ("1533e2351fe8e310",),
        ("sampling_params.py", "SamplingParams._validate_spec_decode"): ("ee495b8e8f7a03d6",),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner._calc_spec_decode_metadata"): ("57820ad4a011ede9",),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner._get_spec_decode_draft_probs"): ("a6ca9cce82907287",),
        ("model_executor/layers/logits_processor.py", "LogitsProcessor.forward"): ("0baa651e06d8f74a",),
        ("model_executor/layers/logits_processor.py", "LogitsProcessor._get_logits"): ("7961cfeecdf97cf2",),
        ("model_executor/layers/logits_processor.py", "LogitsProcessor._gather_logits"): ("78cfa7194a7a84e4",),
    },
    "V2": {
        ("v1/worker/gpu/spec_decode/rejection_sampler.py", "RejectionSampler"): (
            "e408e25fc943c8d0",
            "c00821a265a7a151",
        ),
        ("v1/worker/gpu/spec_decode/rejection_sampler_utils.py", "rejection_sample"): (
            "08f6b6027653f930",
            "d621c8c2f076d47a",
        ),
        ("v1/worker/gpu/sample/sampler.py", "Sampler.__init__"): ("cf2fa1ee49f0b227",),
        ("v1/worker/gpu/sample/sampler.py", "Sampler.add_request"): ("8b5f51b6c5b3867e",),
        ("v1/worker/gpu/sample/sampler.py", "Sampler.__call__"): ("89d6c6c4674b57e1",),
        ("v1/worker/gpu/sample/sampler.py", "Sampler.sample"): ("24e061043fc493a0", "eddc78c51866df7b"),
        ("v1/worker/gpu/sample/sampler.py", "Sampler.apply_sampling_params"): ("78a3440d81e5c9ca",),
        ("v1/worker/gpu/sample/states.py", "SamplingStates.__init__"): ("cf003561df3e8019",),
        ("v1/worker/gpu/sample/states.py", "SamplingStates.apply_temperature"): ("72eac305bf36979d",),
        ("v1/worker/gpu/sample/states.py", "SamplingStates.apply_min_p"): ("a11ac9942f3b2a85",),
        ("v1/worker/gpu/sample/states.py", "SamplingStates.apply_top_k_top_p"): (
            "1bc7d3ad202b0f7f",
            "7e87a39f7cec8223",
        ),
        ("v1/worker/gpu/sample/states.py", "SamplingStates.add_request"): ("f82712eeadaaea99",),
        ("v1/worker/gpu/sample/logits_processor/interface.py", "LogitsContext"): ("2900a7facdf5724e",),
        ("v1/worker/gpu/sample/logits_processor/interface.py", "LogitsProcessor"): ("eea0cd6033e75f9e",),
        ("v1/worker/gpu/sample/logit_bias.py", "LogitBiasState.apply"): ("358c53c66f7b3acf",),
        ("v1/worker/gpu/sample/penalties.py", "PenaltiesState.apply"): ("20d2a7be0d6c2292",),
        ("v1/worker/gpu/sample/bad_words.py", "BadWordsState.apply"): ("dec69bbe0743b661",),
        ("v1/worker/gpu/sample/thinking_budget.py", "ThinkingBudgetState.apply"): ("66fc08e0aaf29c33",),
        ("v1/worker/gpu/sample/logprob.py", "compute_topk_scores"): ("e10e31048bd29cbb",),
        ("v1/worker/gpu/sample/logprob.py", "LogprobTokenIdsState"): ("6cd870724382f8fc",),
        ("v1/worker/gpu/sample/sampler.py", "Sampler.get_logprobs_dims"): ("3010b6ce125a37a6",),
        ("v1/worker/gpu/sample/gumbel.py", "gumbel_sample"): ("612303a071f0f19a",),
        ("v1/worker/gpu/model_states/interface.py", "ModelState.custom_sampler"): ("a58b4e7bf65e1b09",),
        ("v1/worker/gpu/model_runner.py", "GPUModelRunner.sample"): ("d3e7c9c090226f8a",),
        ("v1/engine/input_processor.py", "InputProcessor._validate_params"): ("1533e2351fe8e310",),
        ("sampling_params.py", "SamplingParams._validate_spec_decode"): ("ee495b8e8f7a03d6",),
        ("model_executor/layers/logits_processor.py", "LogitsProcessor.forward"): ("0baa651e06d8f74a",),
        ("model_executor/layers/logits_processor.py", "LogitsProcessor._get_logits"): ("7961cfeecdf97cf2",),
        ("model_executor/layers/logits_processor.py", "LogitsProcessor._gather_logits"): ("78cfa7194a7a84e4",),
    },
}


def problem(runner: str, version: str, root: str | Path) -> str | None:
    """Say in what way a vLLM is not one we know.

    Args:
        runner: ``V1`` or ``V2``, the model runner that will be used.
        version: vLLM's version.
        root: The folder of the ``vllm`` package.

    Returns:
        None if every part the adapter relies on is known, otherwise one clause naming the first difference.
    """
    if ".".join(re.findall(r"\d+", version)[:2]) not in VERSIONS:
        return (
            f"vLLM {version} is not among the versions it was checked against ({', '.join(f'{v}.x' for v in VERSIONS)})"
        )
    for (path, name), known in PARTS[runner].items():
        found = fingerprint(Path(root) / path, name)
        if found is None:
            return f"vLLM {version} has no {name} in {path}"
        if found not in known:
            return f"{name} in {path} of vLLM {version} is not the code it was checked against"
    return None


def fingerprint(path: Path, name: str) -> str | None:
    """Hash the source of a class, function or method, less comment lines and blank lines; None if it is not there."""
    lines = source(path, name)
    return None if lines is None else hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def source(path: Path, name: str) -> list[str] | None:
    """The lines of which the fingerprint is made; None if there is no such class, function or method."""
    node = _definitions(path).get(name)
    if node is None:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = textwrap.dedent("\n".join(path.read_text().splitlines()[first - 1 : node.end_lineno]))
    lines = [line.rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not line.lstrip().startswith("#")]


@functools.lru_cache(maxsize=32)
def _definitions(path: Path) -> dict[str, Definition]:
    """Top-level classes and functions of a file, and the methods of those classes, by dotted name."""
    if not path.is_file():
        return {}
    found: dict[str, Definition] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Definition):
            found[node.name] = node
            members = node.body if isinstance(node, ast.ClassDef) else []
            found.update({f"{node.name}.{member.name}": member for member in members if isinstance(member, Definition)})
    return found
