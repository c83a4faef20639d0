"""`specopt bench`: what it counts, writes and refuses; and whole runs, peers included, in processes of their own."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from vllm_specopt.benchmarks.kernels import bench, gate, grid, inputs, measure, peers, record, report
from vllm_specopt.cli.main import app
from vllm_specopt.verify import Verified, verify

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = grid.Case(4, 3, 3000, dtype="fp32")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine cost far more than they save on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(**changes) -> grid.Case:
    return grid.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bf16"}, 2 * 10 * 4 * 2),
        ({"dtype": "fp32"}, 2 * 10 * 4 * 4),
        ({"dtype": "bf16", "draft": grid.PROBS}, 2 * 10 * (4 * 2 + 4)),
        ({"dtype": "bf16", "draft": grid.LOGITS}, 2 * 10 * (4 * 2 + 3 * 2)),
        ({"dtype": "bf16", "draft": grid.LOGITS, "temperature": 0.0}, 2 * 10 * 4 * 2),
        ({"dtype": "bf16", "top_p": 0.9}, 2 * 10 * 4 * 2),
    ],
)
def test_counted_bytes_by_hand(changes, expected):
    """Two requests of three drafts over ten tokens: four target rows each, then what the draft adds."""
    assert record.counted_bytes(grid.Case(2, 3, 10, **changes)) == expected


def test_suites_hold_the_cases_they_are_for():
    gpu = grid.suite("gpu")
    assert len({case.name for case in gpu}) == len(gpu)
    assert {case.num_drafts for case in gpu} >= set(grid.DRAFTS)
    assert {case.vocab for case in gpu} == set(grid.VOCABS)
    assert {case.batch for case in gpu} >= {1, 2, 4, 8, 256}
    for shape in ((64, 7), (256, 3)):
        same = [case for case in gpu if (case.batch, case.num_drafts) == shape]
        assert {(0.7, grid.ONE_HOT), (1.0, grid.LOGITS)} <= {(case.temperature, case.draft) for case in same}
        assert {"none", "topp0.9", "topk50", "topk50+topp0.9", "minp0.1"} <= {case.filters for case in same}
    assert {(case.batch, case.num_drafts, case.vocab) for case in grid.suite("cpu")} == {
        (batch, 4, 151936) for batch in (1, 8, 32)
    }


@pytest.mark.parametrize("acceptance", grid.ACCEPTANCE.values())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 50, "top_p": 0.9},
        {"min_p": 0.1},
        {"draft": grid.PROBS},
        {"draft": grid.LOGITS, "temperature": 0.7, "top_p": 0.9, "dtype": "bf16"},
        {"draft": grid.PROBS, "noisy": True},
        {"draft": grid.LOGITS, "temperature": 0.7, "dtype": "bf16", "noisy": True},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_inputs_have_the_acceptance_asked_for(changes, acceptance):
    built = inputs.make_inputs(small(batch=20, acceptance=acceptance, **changes), CPU, seed=3)
    # A draft distribution cannot overlap with more than the filters keep.
    assert built.acceptance == pytest.approx(acceptance, abs=0.05)
    assert built.chances.mean() == pytest.approx(acceptance, abs=0.1)
    again = inputs.make_inputs(built.case, CPU, seed=3)
    assert torch.equal(again.batch.logits, built.batch.logits) and torch.equal(again.drafts, built.drafts)


def test_noise_makes_rejected_drafts_that_are_possible():
    apart = inputs.make_inputs(small(batch=20, draft=grid.PROBS), CPU, seed=3)
    noisy = inputs.make_inputs(small(batch=20, draft=grid.PROBS, noisy=True), CPU, seed=3)
    assert (apart.chances < 1e-4).float().mean() > 0.3 and (noisy.chances < 1e-4).float().mean() < 0.02


def row(case: grid.Case, implementation: str, **changes) -> dict:
    filled = dict.fromkeys(record.COLUMNS, "1") | record.case_columns(case)
    return filled | {"implementation": implementation, "device": "this", "note": ""} | changes


def test_record_round_trip_and_what_replaces_what(tmp_path):
    first, second = small(), small(batch=5)
    record.prepare(tmp_path / "new")
    folder = tmp_path / "new"
    record.write(folder, [row(first, "ours", time_us=2.5, note='a "quoted", note'), row(first, "stock-v1")])
    record.write(folder, [row(second, "ours")])
    record.write(folder, [row(first, "ours", device="another")])
    assert [(found["case"], found["device"]) for found in record.read(folder)] == [
        (first.name, "this"), (first.name, "this"), (second.name, "this"), (first.name, "another"),
    ]  # fmt: skip
    assert record.read(folder)[0]["time_us"] == "2.5" and record.read(folder)[0]["note"] == 'a "quoted", note'
    record.write(folder, [row(first, "ours", time_us=7)])
    assert [found["time_us"] for found in record.read(folder) if found["case"] == first.name] == ["1", "7"]
    assert [path.name for path in folder.iterdir()] == [record.FILE_NAME]


def test_record_is_whole_or_as_it_was(tmp_path):
    record.write(tmp_path, [row(SMALL, "ours")])
    before = (tmp_path / record.FILE_NAME).read_bytes()
    with pytest.raises(ValueError, match="unknown"):
        record.write(tmp_path, [row(SMALL, "ours", unknown=1)])
    assert (tmp_path / record.FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [record.FILE_NAME]


def test_record_of_another_version_is_left_alone(tmp_path):
    (tmp_path / record.FILE_NAME).write_text("case,time\na,1\n")
    with pytest.raises(record.RecordError, match="other columns"):
        record.prepare(tmp_path)


def options(folder: Path, *cases: grid.Case) -> bench.Options:
    provenance = record.Provenance.of(CPU, "test", "specopt bench", 1, False)
    return bench.Options(list(cases), CPU, folder, provenance, repeats=5, seconds=1.0)


@pytest.fixture
def ours_alone(monkeypatch):
    monkeypatch.setattr(peers, "has_vllm", lambda: False)
    monkeypatch.setattr(peers, "interpreted", lambda: False)


def test_a_row_is_consistent(ours_alone, tmp_path):
    (measured,) = bench.run(options(tmp_path, small(acceptance=0.9)))
    assert measured.errors == []
    found, lossy = record.read(tmp_path)
    assert lossy["implementation"] == "ours-sigmoid" and float(lossy["time_us"]) > 0
    # The paper's constants score every logit about sigmoid(1/2), and a certain draft token 1.
    assert float(lossy["acceptance"]) == pytest.approx(0.62, abs=0.2)
    time_us, low, high = (float(found[column]) for column in ("time_us", "p20_us", "p80_us"))
    assert 0 < low <= time_us <= high
    assert float(found["gbps"]) == pytest.approx(4 * 3000 * 16 / time_us / 1e3, rel=0.02, abs=0.01)
    assert float(found["percent_of_copy"]) == pytest.approx(
        100 * float(found["gbps"]) / float(found["copy_gbps"]), rel=0.05, abs=0.1
    )
    assert (found["implementation"], found["repeats"], found["speedup_over_stock_v1"]) == ("ours", "5", "")
    assert 0.5 < float(found["acceptance"]) <= 1
    assert found["commit"] and found["utc"] and found["command"] == "specopt bench"


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"draft": grid.PROBS, "top_p": 0.9}], ids=str)
def test_tampered_output_leaves_no_number(ours_alone, monkeypatch, tmp_path, changes):
    def tampered(*args, **kwargs):
        token_ids, num_sampled = verify(*args, **kwargs)
        token_ids[0, 0] = (token_ids[0, 0] + 1) % 3000
        return Verified(token_ids, num_sampled)

    monkeypatch.setattr(peers, "verify", tampered)
    (measured,) = bench.run(options(tmp_path, small(**changes)))
    assert measured.rows == [] and "the reference" in measured.errors[0]
    assert not (tmp_path / record.FILE_NAME).exists()


def test_failed_check_is_exit_status_1(ours_alone, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "verify", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(grid, "SUITES", {"quick": grid.Suite("", lambda: [SMALL], 1.0)})
    done = CliRunner().invoke(app, ["bench", "--out", str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 1
    assert "ZeroDivisionError" in done.output and "1 checks failed" in done.output


@pytest.mark.parametrize("wrong", ["greedy token", "acceptance"])
def test_wrong_peer_is_noticed(ours_alone, wrong):
    built = inputs.make_inputs(small(batch=20), CPU, seed=1)
    ours = peers.ours("ours", built)
    if wrong == "greedy token":

        def greedy():
            token_ids, num_sampled = ours.greedy()
            token_ids[7, 0] += 1
            return Verified(token_ids, num_sampled)

        with pytest.raises(gate.GateError, match=r"stock-v1, greedy: request 7"):
            gate.check_same(built, peers.Implementation("stock-v1", ours.call, ours.read, greedy), ours)
    else:
        counts = [gate.count_accepted(ours.read(ours.call(number)), 3)[0] for number in range(10)]
        gate.check_acceptance(built, ours, counts)
        with pytest.raises(gate.GateError, match="the tensors imply"):
            gate.check_acceptance(built, ours, [count // 2 for count in counts])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "all"], "there is no suite 'all': take one of quick, cpu, cpu-lines, gpu, rehearsal."),
        (["--case", "v1-b1"], "no case of suite 'quick' matches 'v1-b1'"),
        (["--case", "("], "is no regular expression"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--out", "a-file/results"], "cannot be written (Not a directory)"),
        pytest.param(
            ["--device", "cuda"],
            "PyTorch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_sentence_and_exit_status_2(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    message = done.stderr.strip()
    assert says in message and message.startswith("specopt bench: ") and len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_list_names_the_cases_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "--suite", "cpu", "--list", "--case", "b32.*topp"])
    assert (done.exit_code, done.output.split()) == (0, ["v151936-b32-k4-bf16-one-hot-t0.8-topp0.9-a0.6"])
    assert not list(tmp_path.iterdir())


class Event:
    """A CUDA event of a device on which every call takes four microseconds."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 0.004


def on_device(name: str, start: int) -> SimpleNamespace:
    kind = torch.autograd.DeviceType.CUDA
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start))


def test_gpu_measurements_on_a_stand_in(monkeypatch):
    """The calls a GPU's measurements make, in the shapes PyTorch gives them; no GPU is needed, and none is tested."""
    events = [on_device("Memcpy", 9), on_device("a", 3), on_device("spin_kernel(long)", 1), on_device("spin_kernel", 5)]
    profiler = SimpleNamespace(events=lambda: [on_device("b", 7), *events])
    used = iter([100, 100])
    for name, stand_in in {
        "cuda.Event": Event,
        "cuda.synchronize": lambda *_: None,
        "cuda._sleep": lambda cycles: None,
        "cuda.reset_peak_memory_stats": lambda: None,
        "cuda.memory_allocated": lambda: next(used),
        "cuda.max_memory_allocated": lambda: 175,
        "profiler.profile": lambda activities: nullcontext(profiler),
    }.items():
        monkeypatch.setattr(f"torch.{name}", stand_in)
    gpu = torch.device("cuda")
    calls = []
    both = [peers.Implementation(name, calls.append, None, None) for name in ("ours", "stock-v2")]
    samples = measure.time_rounds(both, gpu, torch.empty(8), rounds=7, seconds=10.0)
    assert samples["ours"].time_us == pytest.approx([4.0] * 7)
    assert len(samples["stock-v2"].host_us) == len(samples["stock-v2"].wall_us) == len(samples["ours"].outputs) == 7
    assert calls == [number for number in range(7) for _ in range(4)]
    assert measure.count_launches(both, gpu) == {"ours": 1, "stock-v2": 2}
    assert measure.extra_memory(both[0], gpu) == 75


def run_bench(folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Run the command in a process of its own: it changes vLLM and chooses Triton's mode. Return its rows."""
    command = [sys.executable, "-m", "vllm_specopt.cli.main", "bench", "--out", str(folder), *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (folder / record.FILE_NAME).open(newline="") as file:
        return list(csv.DictReader(file))


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="stock needs no repair on a GPU")
def test_cpu_run_beside_repaired_stock(tmp_path):
    rows = run_bench(tmp_path, "--case", "v32000-b1-.*topp0.9", "--repeats", "5", "--device", "cpu")
    assert [found["implementation"] for found in rows] == ["ours", "ours-sigmoid", "ours-v1", "stock-repaired"]
    for found in rows:
        assert float(found["time_us"]) > 0 and float(found["speedup_over_stock_v1"]) > 0
        assert found["speedup_over_stock_v2"] == found["launches"] == found["host_us"] == found["note"] == ""
    assert rows[3]["speedup_over_stock_v1"] == "1.0"


@needs_vllm
@pytest.mark.parametrize("pattern", ["t0.7", pytest.param(".", marks=pytest.mark.long)])
def test_rehearsal_runs_every_peer_end_to_end(tmp_path, pattern):
    rows = run_bench(tmp_path, "--suite", "rehearsal", "--repeats", "5", "--case", pattern)
    names = [case.name for case in grid.suite("rehearsal", pattern)]
    assert [name for name in dict.fromkeys(found["case"] for found in rows)] == names
    one_hot = [found["implementation"] for found in rows if found["case"] == names[0]]
    assert sorted(one_hot) == ["ours", "ours-sigmoid", "ours-v1", "ours-v2", "stock-v1", "stock-v2"]
    assert all(found["time_us"] and "interpreter" in found["device"] and not found["note"] for found in rows)


def write_rows_along_batch(folder):
    numbers = {"time_us": 5, "p20_us": 4, "p80_us": 9, "bytes": 8e6, "copy_gbps": 20, "vllm": "0.33.0"}
    numbers |= {"rows_verified": 1.5, "speedup_over_stock_v2": 2.5}
    for batch in (1, 2, 4):
        names = ("ours", "ours-v2", "stock-v2")
        record.write(folder, [row(small(batch=batch), name, **numbers) for name in names])


def test_plots_come_from_the_csv_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from vllm_specopt.benchmarks.kernels import plots

    write_rows_along_batch(tmp_path)
    names = {path.name for path in plots.draw(tmp_path)}
    assert names == {"time_by_batch.png", "roofline.png"}
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


def test_the_page_comes_from_the_csv_alone(tmp_path):
    write_rows_along_batch(tmp_path)
    lines = [line for line in report.write(tmp_path).read_text().splitlines() if line.startswith("| stock-v2 |")]
    assert len(lines) == 3
    assert all("| 2.5x |" in line and "0.005 (0.004 - 0.009)" in line for line in lines)
    assert [line.split("|")[11].strip() for line in lines] == ["3.33", "1.67", "0.833"]
