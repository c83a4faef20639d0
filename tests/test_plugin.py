"""The hooks: nothing changes without the option, mistakes stop the start, and installing twice is installing once."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import prepared

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[1]
TARGET = str(ROOT / "models" / "specopt-target")
PREAMBLE = f"""
import sys
TARGET = {TARGET!r}
SPECULATIVE = {{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
DRAFT = {{"model": {str(ROOT / "models" / "specopt-draft")!r}, "num_speculative_tokens": 3}}
SYNTHETIC = {{"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}}

def configure(option, speculative=SPECULATIVE, **kwargs):
    from vllm.engine.arg_utils import EngineArgs

    args = {{"model": TARGET, "enforce_eager": True, "max_model_len": 256, "speculative_config": speculative}} | kwargs
    args = {{"additional_config": {{"specopt": option}} if option else {{}}}} | args
    return EngineArgs(**args).create_engine_config()
"""


PROCESSORS = """
from processors import BanV1

class Counting(BanV1):
    def update_state(self, batch_update):
        super().update_state(batch_update)
        self.steps += 1
"""


def python(code: str, fresh: bool = False, **env: str):
    """Run code after the preamble in a process that has imported vLLM, or a fresh one; return its JSON."""
    command, env = ["-c", PREAMBLE + textwrap.dedent(code)], {"VLLM_PLUGINS": "specopt"} | env
    if fresh:
        environ = prepared.environment("V1") | env
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environ, cwd=ROOT)
        status, log = done.returncode, done.stderr + done.stdout
    else:
        status, log = prepared.run("V1", *command, cwd=ROOT, env=env)
    assert status == 0, log[-4000:]
    # What it wrote, and not what libraries say as they end.
    return json.loads(next(line for line in log.splitlines()[::-1] if line.startswith(("[", "{", "true", "false"))))


def test_mistakes_stop_the_start_before_a_model_is_loaded(tmp_path):
    (tmp_path / "processors_of_test.py").write_text(PROCESSORS)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests" / "parity"), os.environ.get("PYTHONPATH", "")])
    code = """
    import json
    from pathlib import Path
    from unittest import mock
    import vllm
    from vllm_specopt.integration import compat
    from vllm.platforms import current_platform

    def error(*args, **kwargs):
        try:
            configure(*args, **kwargs)
        except ValueError as e:
            return str(e)

    errors = {
        "method": error("fast"),
        "key": error({"method": "exact", "k": 4}),
        "no speculation": error("exact", speculative=None),
        "no speculation, sigmoid": error({"method": "sigmoid", "sigmoid": "paper"}, speculative=None),
        "no speculation, choice": error({"method": "exact", "sigmoid": "paper", "allow_per_request": True},
                                        speculative=None),
        "misspelt": error(None, additional_config={"spec_opt": "exact"}),
        "null": error(None, additional_config={"specopt": None}),
        "drafts": error("exact", speculative=SPECULATIVE | {"num_speculative_tokens": 129}),
        "drafts, absent": error(None, speculative=SPECULATIVE | {"num_speculative_tokens": 129}),
        "block, synthetic": error("block", speculative=SPECULATIVE | SYNTHETIC),
        "sigmoid, block": error({"method": "sigmoid", "sigmoid": "paper"},
                                speculative=SPECULATIVE | {"rejection_sample_method": "block"}),
        "budget, sampled": error({"method": "budget", "budget": {"delta": 0.1}},
                                 speculative=DRAFT | {"draft_sample_method": "probabilistic"}),
        "budget, chosen": error({"method": "budget", "budget": {"delta": 0.1}}, speculative=DRAFT),
        "processor": error("exact", logits_processors=["processors_of_test:Counting"]),
        "processors": error("exact", logits_processors=["processors:BanV1", "processors:NotTwiceV1"]),
        "processor, absent": error(None, logits_processors=["processors_of_test:Counting"]),
        "sharded, one rank": error({"method": "exact", "sharded": True}),
        "fine": error({"method": "exact"}),
        "absent": error(None, speculative=None),
    }
    with mock.patch.object(vllm, "__version__", "0.31.0"):
        errors["version"] = error("exact")
        errors["version, stock"] = error({"method": "exact", "on_unknown_vllm": "stock"})
    part = ("v1/sample/rejection_sampler.py", "RejectionSampler")
    with mock.patch.dict(compat.PARTS["V1"], {part: ("0" * 16,)}):
        errors["fingerprint"] = error("exact")
        errors["fingerprint, absent"] = error(None)
    with mock.patch.object(type(current_platform), "is_cpu", lambda self: False):
        errors["platform"] = error("exact")
    errors["weights"] = [m for m in sys.modules if m == "vllm.v1.worker.gpu_model_runner"]
    print(json.dumps(errors))
    """
    errors = python(code, fresh=True, PYTHONPATH=path.rstrip(os.pathsep))
    cure = (
        "; install a vllm-specopt that knows this vLLM, or set "
        '"on_unknown_vllm": "stock" beside "method" to run vLLM\'s own sampler'
    )
    alone = (
        "specopt.method 'exact' alone, and no other for single requests, works without --speculative-config, as there "
        "are no draft tokens to verify; add one, or change the option"
    )
    assert errors == {
        "method": "specopt.method is 'fast', expected 'exact' or 'sigmoid' or 'block' or 'typical' or 'budget' or "
        "'stock'",
        "key": "specopt has the unknown key 'k', expected 'method' or 'on_unknown_vllm' or "
        "'allow_per_request' or 'audit' or 'sharded' or 'sigmoid' or 'typical' or 'budget'",
        "no speculation": None,
        "no speculation, sigmoid": alone,
        "no speculation, choice": alone,
        "misspelt": "additional_config has the key 'spec_opt', did you mean 'specopt'?",
        "null": "specopt is null, expected a method ('exact' or 'sigmoid' or 'block' or 'typical' or 'budget'); "
        "leave the key out to run stock",
        "drafts": "specopt: num_speculative_tokens is 129, expected at most 128 on model runner V1, whose own sampler "
        "stops at the first request with more",
        "drafts, absent": None,
        "block, synthetic": "specopt.method is 'block' and rejection_sample_method is 'synthetic': two different "
        "rules; remove one of them",
        "sigmoid, block": "specopt.method is 'sigmoid' and rejection_sample_method is 'block': two different rules; "
        "remove one of them",
        "budget, sampled": "specopt.budget bounds its price for drafts that are chosen, not sampled, and "
        "draft_sample_method is 'probabilistic'; remove that, or choose another method",
        "budget, chosen": None,
        "processor": "specopt: logits processors see draft tokens here, and Counting.update_state may change its state "
        "with every token; if it does not, declare specopt_per_row = True in the class",
        "processors": None,
        "processor, absent": None,
        "sharded, one rank": "specopt.sharded is true, but there is one tensor-parallel rank; leave it out",
        "fine": None,
        "absent": None,
        "version": "specopt: vLLM 0.31.0 is not among the versions it was checked against (0.32.x, 0.33.x)" + cure,
        "version, stock": None,
        "fingerprint": "specopt: RejectionSampler in v1/sample/rejection_sampler.py of vLLM "
        "0.32.0 is not the code it was checked against" + cure,
        "fingerprint, absent": None,
        "platform": "specopt runs on CUDA GPUs and CPUs, not on cpu; remove the option",
        "weights": [],
    }


WORKERS = """
    import json

    def snapshot():
        from vllm.v1.worker import gpu_model_runner
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
        from vllm.v1.worker.gpu.model_states.interface import ModelState
        hooks = [(V1, "__init__"), (gpu_model_runner, "build_logitsprocs"), (V2, "load_model"),
                 (ModelState, "custom_sampler")]
        return [hasattr(vars(owner)[name], "_specopt_wrapper") for owner, name in hooks]

    def worker(option, **kwargs):
        from vllm.v1.worker.worker_base import WorkerBase
        config = configure(option, **kwargs)
        return WorkerBase(config, local_rank=0, rank=0, distributed_init_method="")
"""


@pytest.mark.parametrize(("runner", "hooks"), [("0", [True, True, False, False]), ("1", [False, False, True, True])])
def test_a_worker_hooks_its_own_runner_once_and_none_without_the_option(runner, hooks):
    code = """
    from unittest import mock
    from vllm_specopt.integration import plugin
    HAS_TRITON = mock.patch("vllm.config.vllm.HAS_TRITON", True)
    with HAS_TRITON:
        worker(None)
        worker(None, speculative=None)
        from vllm.engine.arg_utils import EngineArgs
        registered = hasattr(EngineArgs.create_engine_config, "_specopt_wrapper")
        ours = [f"vllm_specopt.integration.{name}" in sys.modules for name in ("v1", "v2")]
        without = [registered, snapshot(), *ours]
        worker("exact")
        first = snapshot()
        from vllm.v1.worker.worker_base import WorkerBase
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.model_states.interface import ModelState
        owners = [(EngineArgs, "create_engine_config"), (WorkerBase, "__init__"), (GPUModelRunner, "__init__"),
                  (ModelState, "custom_sampler")]
        before = [vars(owner)[name] for owner, name in owners]
        plugin.register()
        plugin.register()
        worker("exact")
        after = [vars(owner)[name] for owner, name in owners]
        depth = [hasattr(getattr(f, "__wrapped__", None), "_specopt_wrapper") for f in after]
    print(json.dumps([without, first, snapshot(), [a is b for a, b in zip(before, after)], depth]))
    """
    without, *found = python(textwrap.dedent(WORKERS) + textwrap.dedent(code), VLLM_USE_V2_MODEL_RUNNER=runner)
    assert without == [True, [False] * 4, False, False]
    assert found == [hooks, hooks, [True] * 4, [False] * 4]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("config.speculative_config.rejection_sample_method = 'synthetic'", "rejection_sample_method is 'synthetic'"),
        ("config.speculative_config.enable_adaptive_verification = True", "adaptive verification is on"),
        ("config.speculative_config.num_speculative_tokens = 129", "num_speculative_tokens is above 128"),
        ("config.model_config.use_fp64_gumbel = True", "use_fp64_gumbel is set"),
        ("config.model_config.return_sampling_mask = True", "return_sampling_mask is set"),
        ("config.watermark_config = object()", "watermarking is on"),
    ],
)
def test_a_configuration_we_do_not_cover_keeps_stock(changes, reason, engine_config):
    from vllm_specopt.integration import validation

    config = engine_config
    exec(changes)
    option = validation.parse(config.additional_config)
    assert validation.stock_reason(config, option) == reason
    assert validation.active_config(config) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"parallel_config.tensor_parallel_size": 1}, "there is one tensor-parallel rank"),
        ({"parallel_config.enable_batch_sharded_sampling": True}, "batch-sharded sampling is on"),
        ({"parallel_config.pipeline_parallel_size": 2}, "model runner V1 hands logits from one pipeline stage"),
        ({"lora_config": object()}, "LoRA is on"),
        ({"speculative_config.rejection_sample_method": "block"}, "rejection_sample_method is 'block'"),
        ({"speculative_config": None}, None),
    ],
)
def test_logits_stay_on_their_ranks_only_where_they_can(changes, reason, engine_config):
    from vllm_specopt.integration import validation

    for path, value in ({"parallel_config.tensor_parallel_size": 2} | changes).items():
        owner, _, name = path.rpartition(".")
        setattr(getattr(engine_config, owner) if owner else engine_config, name, value)
    found = validation.needs_whole_rows(engine_config)
    assert found is None if reason is None else found.startswith(reason)


@pytest.fixture
def engine_config(monkeypatch):
    """A finished configuration with the option, made as the command line makes it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=TARGET,
        enforce_eager=True,
        max_model_len=256,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        additional_config={"specopt": "exact"},
    ).create_engine_config()


def test_vllms_own_block_verification_is_ours(engine_config):
    from vllm_specopt.integration import validation
    from vllm_specopt.rules import BlockConstants

    engine_config.speculative_config.rejection_sample_method = "block"
    option = validation.parse(engine_config.additional_config)
    assert validation.stock_reason(engine_config, option) is None
    active = validation.active_config(engine_config)
    assert active.method == "block" and active.rule == BlockConstants()


def test_nothing_stands_against_the_plain_configuration(engine_config):
    from vllm_specopt.integration import validation

    option = validation.parse(engine_config.additional_config)
    assert validation.stock_reason(engine_config, option) is None
    assert validation.active_config(engine_config) == option


def test_an_unknown_vllm_runs_stock_if_asked_to(engine_config, monkeypatch):
    from vllm_specopt.integration import validation

    engine_config.additional_config = {"specopt": {"method": "exact", "on_unknown_vllm": "stock"}}
    monkeypatch.setattr(validation.vllm, "__version__", "0.40.1")
    reason = validation.stock_reason(engine_config, validation.validate(engine_config))
    assert reason == "vLLM 0.40.1 is not among the versions it was checked against (0.32.x, 0.33.x)"


def test_the_allow_list_is_an_off_switch():
    code = """
    import json
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    print(json.dumps(hasattr(EngineArgs.create_engine_config, "_specopt_wrapper")))
    """
    assert python(code, VLLM_PLUGINS="other") is False


def test_model_inspection_processes_are_left_alone(monkeypatch):
    from types import SimpleNamespace

    from vllm_specopt.integration import plugin

    spec = SimpleNamespace(name="vllm.model_executor.models.registry")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(plugin, "_wrap", lambda *args: pytest.fail("wrapped something"))
    plugin.register()


def test_min_p_and_logit_bias_are_let_through_where_they_are_applied():
    code = """
    import json, os
    from unittest import mock
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    EVERY = [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}, {"min_p": 0.2, "logit_bias": {5: 1.0}}, {"top_k": 3}]
    OTHER = SPECULATIVE | SYNTHETIC
    CASES = {"V2": ("1", "exact"), "V2 without the option": ("1", None), "V1": ("0", "exact"),
             "V1 without the option": ("0", None), "V1 not active": ("0", "exact", OTHER),
             "V2 not active": ("1", "exact", OTHER), "V2, plain": ("1", None, None)}

    def error(processor, params):
        try:
            processor._validate_params(SamplingParams(**params), ("generate",))
        except VLLMValidationError as e:
            return str(e)

    found = {}
    with mock.patch("vllm.config.vllm.HAS_TRITON", True):
        # All in one process: an engine that applies them lets nothing through for its neighbours.
        processors = {}
        for name, (runner, *args) in CASES.items():
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = runner
            config = configure(*args)
            assert config.use_v2_model_runner == (runner == "1"), name
            processors[name] = InputProcessor(config)
    found = {name: [error(processor, params) for params in EVERY] for name, processor in processors.items()}
    for name in ("V1", "V2"):
        found[f"outside the vocabulary, {name}"] = error(processors[name], {"logit_bias": {5000: 1.0}})
    print(json.dumps(found))
    """
    found = python(code)
    refusal = "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding."
    assert all("5000" in found.pop(f"outside the vocabulary, {name}") for name in ("V1", "V2"))
    assert found == {
        "V2": [None] * 4,
        "V2 without the option": [refusal] * 3 + [None],
        "V1": [None] * 4,
        "V1 without the option": [refusal] * 3 + [None],
        "V1 not active": [refusal] * 3 + [None],
        "V2 not active": [refusal] * 3 + [None],
        "V2, plain": [None] * 4,
    }
