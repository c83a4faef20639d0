"""Under every drafter that vLLM has on a CPU, a text is the one without speculation; a foreign head is refused.

Single precision, as in ``test_engine_steps.py``. What is not there, and why: ``docs/drafters.md``.
"""

import json
import runpy
import statistics
import subprocess
import sys
import textwrap

import httpx
import pytest
from drafters import table as drafters
from prometheus_client.parser import text_string_to_metric_families
from support import serving
from support.prepared import environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

QUICK = ["EAGLE-3", "MTP", "Hydra", "by batch size"]
RUNS = {
    "V1": (QUICK, 8, 24),
    "V1, others": ([name for name in drafters.RUNNABLE["V1"] if name not in QUICK], 8, 24),
    "V2": (["EAGLE-3", "EAGLE", "MTP", "by batch size"], 4, 10),
}
# Heads that were trained for this target, and so draft what it says.
TRAINED = {"EAGLE-3", "EAGLE", "MTP", "Medusa", "Medusa, custom class", "Hydra", "draft model", "parallel EAGLE-3",
           "parallel draft model"}  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(run, marks=[pytest.mark.long] * (run != "V1")) for run in RUNS])
def ran(request, tmp_path_factory):
    """The name in RUNS, results by engine, and what each engine logged."""
    names, number, max_tokens = RUNS[request.param]
    runner = request.param[:2]
    if runner == "V2":
        pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("drafters")
    return request.param, *drafters.start(drafters.engines(names, folder, number, max_tokens), folder, runner)


@pytest.mark.parametrize("kind", drafters.KINDS)
def test_the_text_is_that_without_speculation(ran, kind):
    run, results, _ = ran
    names, number, max_tokens = RUNS[run]
    for name in names:
        found = results[name]["batches"][kind]["token_ids"]
        expected = results[drafters.plain_name(name)]["batches"][kind]["token_ids"]
        assert [len(ids) for ids in expected] == [max_tokens] * number
        assert found == expected, name


def test_heads_of_this_target_are_accepted(ran):
    run, results, _ = ran
    for name in RUNS[run][0]:
        batch = results[name]["batches"]["greedy"]
        assert batch["drafts"] > 0, name
        if name in TRAINED:
            assert drafters.acceptance_length(batch)[0] > 1.2, name


def test_medusa_in_the_examples_drafts_what_vllms_own_does(ran):
    run, results, _ = ran
    if "Medusa, custom class" not in RUNS[run][0]:
        pytest.skip("not among these")
    for kind in drafters.KINDS:
        own, ours = (results[name]["batches"][kind] for name in ("Medusa", "Medusa, custom class"))
        assert own["drafts"] == ours["drafts"] and own["accepted_by_position"] == ours["accepted_by_position"]


def test_ours_verifies_and_says_so(ran):
    run, results, logs = ran
    runner = run[:2]
    module = f"vllm_specopt.integration.{runner.lower()}"
    for name in RUNS[run][0]:
        assert results[name]["sampler"] == f"{module}.RejectionSampler"
        assert results[name]["plain_sampler"] == f"{module}_sampler.Sampler"
        assert results[name]["stock_calls"] == {}
        assert logs[name].count("specopt:") == logs[name].count(f"specopt: active: runner={runner} method=exact") == 1


def test_eagle3_served_over_http_gives_the_openai_client_the_text_without_speculation(ran, tmp_path):
    run, results, _ = ran
    if run != "V1":
        pytest.skip("once is enough")
    openai = pytest.importorskip("openai")
    speculative = drafters.DRAFTERS["EAGLE-3"].speculative | {"num_speculative_tokens": drafters.NUMBER}
    # One process less to start.
    more = ("--dtype", "float32", "--distributed-executor-backend", "uni")
    with serving.server(tmp_path, speculative, {"method": "exact"}, *more) as server:
        server.wait_ready(lambda: None, timeout=300)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        for batch in drafters.batches(3, RUNS[run][2]):
            for index, sampling in enumerate(batch["sampling"]):
                more = {"ignore_eos": sampling.pop("ignore_eos"), "return_token_ids": True}
                prompt = batch["prompts"][index]
                answer = client.completions.create(model="target", prompt=prompt, **sampling, extra_body=more)
                assert answer.choices[0].token_ids == results["plain"]["batches"][batch["name"]]["token_ids"][index]
        counted = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
        totals = {sample.name: sample.value for family in counted for sample in family.samples}
        log = (tmp_path / "server.log").read_text()
    assert 0 < totals["vllm:spec_decode_num_accepted_tokens_total"] < totals["vllm:spec_decode_num_draft_tokens_total"]
    assert log.count("specopt: active: runner=V1 method=exact") == 1


def test_the_text_has_tokens_that_the_head_cannot_draft(ran):
    """EAGLE-3 drafts from a part of the vocabulary; the rest must come out all the same."""
    run, results, _ = ran
    if "EAGLE-3" not in RUNS[run][0]:
        pytest.skip("not among these")
    from safetensors.torch import load_file

    draftable = load_file(drafters.HEADS / "eagle3" / "model.safetensors")["t2d"]
    texts = [ids for kind in drafters.KINDS for ids in results["EAGLE-3"]["batches"][kind]["token_ids"]]
    assert 0 < draftable.sum() < len(draftable)
    assert not all(draftable[token] for ids in texts for token in ids)


def test_the_page_has_a_row_for_each_drafter_and_no_empty_cell():
    rows = [line for line in (drafters.ROOT / "docs" / "drafters.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == 4 and all(row[1:]) for row in cells)
    assert [row[0].split(" (")[0] for row in cells[2:]] == [
        each.title.split(" (")[0] for each in drafters.DRAFTERS.values()
    ]
    assert "**differs**" not in "".join(rows)


def test_acceptance_length_and_its_interval():
    accepted = [2, 0, 3, 1, 0, 2]
    batch = {"drafts": 6, "accepted_by_position": [sum(n > i for n in accepted) for i in range(3)]}
    mean, half = drafters.acceptance_length(batch)
    assert mean == pytest.approx(1 + statistics.mean(accepted))
    assert half == pytest.approx(1.96 * statistics.pstdev(accepted) / 5**0.5)
    assert drafters.acceptance_length({"drafts": 0, "accepted_by_position": []}) == (1, 0)


FOREIGN = (
    ("eagle3", {"target_hidden_size": 640}),
    ("eagle3", {"vocab_size": 640}),
    ("eagle", {"hidden_size": 640}),
    ("eagle", {"vocab_size": 640}),
    ("medusa", {"hidden_size": 640}),
)


@pytest.mark.long
def test_a_head_of_another_target_is_refused_with_both_sizes(tmp_path):
    make = runpy.run_path(str(drafters.HEADS / "checkpoints.py"))["foreign"]
    heads = [(make(tmp_path / str(i), name, **changed), name) for i, (name, changed) in enumerate(FOREIGN)]
    code = f"""
    import json
    from vllm.engine.arg_utils import EngineArgs

    said = []
    for model, method in {heads!r}:
        speculative = {{"model": model, "method": method, "num_speculative_tokens": 3}}
        try:
            EngineArgs(
                model={str(drafters.TARGET)!r}, max_model_len=256, speculative_config=speculative,
                additional_config={{"specopt": "exact"}},
            ).create_engine_config()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    print(json.dumps(said))
    """
    command, env = [sys.executable, "-c", textwrap.dedent(code)], environment("V1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes = {"target_hidden_size": 320, "hidden_size": 320, "vocab_size": 512}
    for (name, changed), message in zip(FOREIGN, json.loads(done.stdout.splitlines()[-1]), strict=True):
        ((key, value),) = changed.items()
        assert f"its {key} is {value}, that of" in message and message.endswith(f" is {sizes[key]}"), (name, message)
