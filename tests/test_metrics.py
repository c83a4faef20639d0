"""What the kernels count against the reference, and what a worker writes against what a scrape reads."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from vllm_specopt.integration.audit import ROWS, Auditor
from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.integration.metrics import COLUMNS, COUNTERS, GAUGES, SECONDS, Account, Recorder, new_counters
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.rules import SigmoidConstants
from vllm_specopt.testing import LOGITS, NO_DRAFT, random_batch
from vllm_specopt.verify import verify

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_counts_are_those_of_the_tokens_emitted(backend, draft):
    device = DEVICE if backend == "triton" else "cpu"
    total, expected = new_counters(device)[0], Counter()
    for seed in range(3):
        num_drafts = [3, 0, 5, 1, 2, 0, 4]
        batch = random_batch(seed=seed, num_drafts=num_drafts, vocab_size=50, draft=draft, temperatures=(0.0, 1.0))
        num_sampled = verify_ref(*batch.args(), **batch.kwargs).num_sampled.tolist()
        on_device = batch.to(device)
        verified = verify(*on_device.args(), **on_device.kwargs, counters=total, backend=backend)
        assert verified.num_sampled.tolist() == num_sampled
        for drafted, sampled in zip(num_drafts, num_sampled, strict=True):
            expected["accepted"] += sampled - 1
            expected["bonus"] += drafted > 0 and sampled == drafted + 1
            expected["recovered"] += sampled <= drafted
            # The CPU backend stops where the request does.
            expected["swept"] += drafted + 1 if backend == "triton" else sampled
            expected["rows"] += drafted + 1
    counts = dict(zip([outcome for _, outcome in COLUMNS], total[0].tolist(), strict=False))
    assert counts.pop("skipped") + counts["swept"] == expected.pop("rows")
    assert counts == expected
    assert min(counts.values()) > 0
    assert not total[1:].any()


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_requests_count_for_the_method_that_verified_them(backend):
    device = DEVICE if backend == "triton" else "cpu"
    num_drafts = [3, 2, 0, 4, 1, 3]
    batch = random_batch(seed=4, num_drafts=num_drafts, vocab_size=60, draft=LOGITS, temperatures=(0.0, 1.0))
    states = batch.kwargs["state_indices"].long()
    flags = torch.zeros(len(batch.kwargs["temperature"]), dtype=torch.bool)
    flags[states[::2]] = True
    batch.kwargs |= {"rule": SigmoidConstants(-8.0, 8.0, -8.0, 8.0), "rule_requests": flags}
    counters, _ = new_counters(device)
    on_device = batch.to(device)
    verified = verify(*on_device.args(), **on_device.kwargs, counters=counters, backend=backend)
    scored = (flags & (batch.kwargs["temperature"] > 0))[states].tolist()
    assert 0 < sum(scored) < len(scored)
    accepted, rows = [0, 0], [0, 0]
    for drafted, sampled, by_scores in zip(num_drafts, verified.num_sampled.tolist(), scored, strict=True):
        accepted[by_scores] += sampled - 1
        rows[by_scores] += drafted + 1
    counts = counters.cpu()
    assert counts[:2, 0].tolist() == accepted
    assert counts[:2, 3:5].sum(1).tolist() == rows
    # Only the emitting row of each.
    assert counts[1, 3] == sum(scored)


def test_counters_of_the_wrong_shape_are_refused():
    batch = random_batch(seed=0, num_drafts=[1], vocab_size=8)
    with pytest.raises(ValueError, match="counters has 5 columns, expected 8"):
        verify(*batch.args(), **batch.kwargs, counters=torch.zeros(2, 5, dtype=torch.int64), backend="cpu")


@pytest.fixture
def account():
    return Account("cpu")


def scrape(directory: Path) -> dict:
    multiprocess = pytest.importorskip("prometheus_client.multiprocess")
    families = multiprocess.MultiProcessCollector(None, path=str(directory)).collect()
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


LABELS = {"model_name": "target", "engine": "0"}


def key(name: str, **labels: str) -> tuple:
    return (f"specopt:{name}", *sorted((LABELS | labels).items()))


def test_a_scrape_sees_all_workers_and_each_number_once(tmp_path, account):
    recorders = [Recorder(account, tmp_path, LABELS, "exact", counts_steps=first) for first in (True, False)]
    assert scrape(tmp_path)[key("tokens_total", method="exact", outcome="bonus")] == 0
    for recorder in recorders:
        recorder.begin_step()
        recorder.end_step()
        recorder.plain_step()
        recorder.plain_step()
    account.counters[0, :5] = torch.tensor([7, 2, 3, 12, 1])
    account.bad_rows += 1
    for recorder in recorders:
        recorder.write()
    seen = scrape(tmp_path)
    # Two workers with a share each, of which one counts the steps.
    assert seen[key("tokens_total", method="exact", outcome="accepted")] == 14
    assert seen[key("rows_total", method="exact", outcome="skipped")] == 2
    assert seen[key("bad_rows_total", method="exact")] == 2
    assert seen[key("verified_steps_total", method="exact")] == 1
    assert seen[key("plain_steps_total", method="exact")] == 2
    assert seen[key(f"{SECONDS}_count", method="exact")] == 1
    assert 0 < seen[key(f"{SECONDS}_sum", method="exact")] < 1
    assert not any("sigmoid" in str(k) for k in seen)


def test_a_scrape_sees_the_audit_and_the_log_one_warning(tmp_path, account, caplog):
    account.auditor = Auditor(SpecoptConfig("stock", audit=1.0), "cpu")
    recorder = Recorder(account, tmp_path, LABELS, "stock")
    seen = scrape(tmp_path)
    assert seen[key("audit_evidence_log10", method="stock")] == 0
    assert seen[key("audited_tokens_total", method="stock", sweep="afresh", bin="31")] == 0
    account.auditor.counts[:, ROWS.index("stock")] = torch.tensor([[25] * 31 + [475, 1, 2], [25] * 31 + [475, 2, 2]])
    recorder.write()
    recorder.write()
    seen = scrape(tmp_path)
    for sweep in ("noted", "afresh"):
        assert seen[key("audited_tokens_total", method="stock", sweep=sweep, bin="07")] == 25
        assert seen[key("audited_tokens_total", method="stock", sweep=sweep, bin="31")] == 475
    assert seen[key("audit_impossible_tokens_total", method="stock")] == 3
    assert seen[key("audit_skipped_tokens_total", method="stock")] == 4
    assert seen[key("audit_evidence_log10", method="stock")] > 100
    assert not any("exact" in str(k) and "audit" in str(k) for k in seen)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1 and "the method stock does not follow the target model's distribution" in warned[0]


def test_numbers_arrive_without_another_step(tmp_path, account):
    recorder = Recorder(account, tmp_path, LABELS, "exact")
    recorder.begin_step()
    account.counters[0, 0] += 5
    recorder.end_step()
    deadline = time.monotonic() + 10
    while scrape(tmp_path)[key("tokens_total", method="exact", outcome="accepted")] != 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_step_costs_the_host_less_than_20_microseconds(tmp_path, account):
    recorder = Recorder(account, tmp_path, LABELS, "exact")
    costs = []
    for _ in range(2000):
        started = time.perf_counter()
        recorder.begin_step()
        recorder.end_step()
        costs.append(time.perf_counter() - started)
    assert sorted(costs)[len(costs) // 2] < 20e-6


VLLMS = {
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_requests_running",
    "vllm:inter_token_latency_seconds_bucket",
}


def test_every_expression_of_the_dashboard_names_a_metric_that_exists():
    dashboard = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
    assert {"title", "panels", "schemaVersion", "templating", "uid", "time"} <= dashboard.keys()
    ours = {f"specopt:{name}_total" for name in COUNTERS} | {
        f"specopt:{SECONDS}_{suffix}" for suffix in ("sum", "count", "bucket")
    }
    ours |= {f"specopt:{name}" for name in GAUGES}
    used, ids = set(), []
    for panel in dashboard["panels"]:
        ids.append(panel["id"])
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["targets"] and panel["gridPos"].keys() == {"h", "w", "x", "y"}
        for target in panel["targets"]:
            used |= set(re.findall(r"(?:specopt|vllm):\w+", target["expr"]))
            assert target["expr"].count("(") == target["expr"].count(")")
    assert len(ids) == len(set(ids))
    assert used <= ours | VLLMS
    assert ours <= used


def test_vllm_has_the_metrics_that_the_dashboard_takes_from_it():
    vllm = pytest.importorskip("vllm")
    sources = [path.read_text() for path in (Path(vllm.__file__).parent / "v1").glob("**/metrics*/*.py")]
    sources.append((Path(vllm.__file__).parent / "v1/spec_decode/metrics.py").read_text())
    for name in VLLMS:
        bare = name.removesuffix("_total").removesuffix("_bucket")
        assert any(f'"{bare}"' in source for source in sources), name


EXPOSURE = """
import json, os
os.environ["HF_HUB_OFFLINE"] = "1"
from vllm.engine.arg_utils import EngineArgs
from prometheus_client import REGISTRY

def configure(option, **kwargs):
    before = len(REGISTRY._collector_to_names)
    EngineArgs(model={target!r}, enforce_eager=True, max_model_len=256,
               speculative_config=dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3),
               additional_config=option, **kwargs).create_engine_config()
    added = len(REGISTRY._collector_to_names) - before
    return [os.environ.get("SPECOPT_METRICS_DIR"), added]

option = dict(specopt="exact")
seen = [configure(dict()), configure(option, disable_log_stats=True), configure(option), configure(option)]
there = os.path.isdir(seen[-1][0])
os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/shared"
print(json.dumps([seen, there, configure(option)]))
"""


def test_only_a_server_with_the_option_and_statistics_shows_our_metrics():
    pytest.importorskip("vllm")
    code = EXPOSURE.replace("{target!r}", repr(str(ROOT / "models" / "specopt-target")))
    removed = ("TRITON_INTERPRET", "VLLM_PLUGINS", "PROMETHEUS_MULTIPROC_DIR", "SPECOPT_METRICS_DIR")
    env = {k: v for k, v in os.environ.items() if k not in removed} | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (without, unlogged, first, second), was_there, shared = json.loads(done.stdout.strip().splitlines()[-1])
    assert without == unlogged == [None, 0]
    assert first[1] == 1
    assert second == [first[0], 0]
    assert was_there
    assert not Path(first[0]).exists()
    # Several API servers: vLLM's registry reads the shared directory by itself.
    assert shared == ["/shared", 0]
