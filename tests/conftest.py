"""Set before anything imports Triton: without a GPU, its kernels run in the interpreter on CPU tensors."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(Path(__file__).parent / "engine" / "interpreter"))
    import one_patch  # noqa: F401

# Several processes share the cores: threads of one that wait for each other spin where another could run.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name, value in {
        "NUMBA_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        # Engines are eager, but vLLM compiles some functions even then.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(name, value)

# A shell's background job and a worker of pytest-xdist ignore it, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, first: two workers that take file after file then end at about the same time.
LONGEST = (
    "test_engine_steps", "test_drafters", "test_tensor_parallel", "test_cost", "test_audit_engine", "test_serving",
    "test_rules_engine", "test_compile", "test_engine_v1", "test_engine_law", "test_engine_v2", "test_proof",
    "test_plugin", "test_bench", "test_audit", "test_parameters", "test_v2_adapter", "test_filters", "test_requests",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def environment():
    """What vLLM or a test sets in the environment ends with the test's file: engines started later inherit it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
