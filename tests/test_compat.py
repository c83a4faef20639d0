"""Recognising vLLM: the installed one is known; a change in any part we rely on is found and named."""

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specopt.cli.main import app
from vllm_specopt.integration import compat

vllm = pytest.importorskip("vllm")
ROOT = Path(vllm.__file__).parent
EVERY_PART = [(runner, path, name) for runner, parts in compat.PARTS.items() for path, name in parts]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_installed_vllm_is_known(runner):
    assert compat.problem(runner, vllm.__version__, ROOT) is None


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_vllm_0_33_is_known(runner):
    source = os.environ.get("SPECOPT_VLLM_033_SOURCE")
    if not source:
        pytest.skip("SPECOPT_VLLM_033_SOURCE does not name a folder with the sources of vLLM 0.33.0")
    assert compat.problem(runner, "0.33.0", Path(source) / "vllm") is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.3.2", "dev"])
def test_unknown_version_is_named(version):
    assert compat.problem("V1", version, ROOT) == (
        f"vLLM {version} is not among the versions it was checked against (0.32.x, 0.33.x)"
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1rc1", "0.33.0.dev7+g4ba787e"])
def test_version_suffixes_do_not_matter(version):
    assert compat.problem("V1", version, ROOT) is None


@pytest.mark.parametrize(("runner", "path", "name"), EVERY_PART)
def test_a_change_in_any_part_is_noticed(tmp_path, runner, path, name):
    changed = tmp_path / Path(path).name
    changed.write_text(_insert_in_body(ROOT / path, name, "added = 1"))
    assert compat.fingerprint(changed, name) not in compat.PARTS[runner][path, name]


@pytest.mark.parametrize(("runner", "path", "name"), EVERY_PART)
def test_comments_and_blank_lines_do_not_matter(tmp_path, runner, path, name):
    changed = tmp_path / Path(path).name
    changed.write_text(_insert_in_body(ROOT / path, name, "# a comment\n\n"))
    assert compat.fingerprint(changed, name) in compat.PARTS[runner][path, name]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The files we look at, one with a changed and one without a needed definition."""
    root = tmp_path_factory.mktemp("vllm")
    for path in {path for parts in compat.PARTS.values() for path, _ in parts}:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    runner = "v1/worker/gpu_model_runner.py"
    (root / runner).write_text(_insert_in_body(ROOT / runner, "GPUModelRunner._sample", "added = 1"))
    states = root / "v1/worker/gpu/sample/states.py"
    states.write_text(states.read_text().replace("def add_request", "def take_request"))
    return root


@pytest.mark.parametrize(
    ("runner", "found"),
    [
        (
            "V1",
            "GPUModelRunner._sample in v1/worker/gpu_model_runner.py of vLLM {} is not the code it was checked against",
        ),
        ("V2", "vLLM {} has no SamplingStates.add_request in v1/worker/gpu/sample/states.py"),
    ],
)
def test_what_differs_is_named(broken, runner, found):
    assert compat.problem(runner, vllm.__version__, broken) == found.format(vllm.__version__)


def _insert_in_body(path: Path, name: str, text: str) -> str:
    """The file's text with lines added before the first statement of a definition."""
    first = compat._definitions(path)[name].body[0]
    lines = path.read_text().splitlines()
    lines[first.lineno - 1 : first.lineno - 1] = [" " * first.col_offset + line for line in text.splitlines()]
    return "\n".join(lines)


def fingerprints(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["fingerprints", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_command_lists_every_part_of_the_installed_vllm():
    status, output = fingerprints()
    assert status == 0 and vllm.__version__ in output
    assert f"All {len(EVERY_PART)} parts are as in the vLLM that this package knows (0.32.x, 0.33.x)." in output
    assert all(compat.fingerprint(ROOT / path, name) in output for _, path, name in EVERY_PART)


def test_the_command_says_what_differs_and_how(broken):
    (broken / "sampling_params.py").touch()
    status, output = fingerprints("--vllm", broken)
    assert status == 1 and "--against" in output
    assert f"2 of {len(EVERY_PART)} parts are not as in the vLLM that this package knows" in output
    assert "V1: GPUModelRunner._sample in v1/worker/gpu_model_runner.py is not known" in output
    assert "V2: SamplingStates.add_request in v1/worker/gpu/sample/states.py is missing" in output
    status, output = fingerprints("--vllm", broken, "--against", ROOT.parent)
    assert status == 1 and "2 parts differ" in output and "unknown version" in output
    assert [line for line in output.splitlines() if line.startswith("+") and line[1:2] != "+"] == ["+    added = 1"]
    assert "-def add_request" in output
    status, output = fingerprints("--against", broken)
    assert status == 0 and "-    added = 1" in output


@pytest.mark.parametrize("option", ["--vllm", "--against"])
def test_a_folder_without_vllm_is_one_sentence(tmp_path, option):
    status, output = fingerprints(option, tmp_path)
    assert status == 2 and output.startswith(f"specopt fingerprints: {tmp_path} holds no vLLM")
    assert output.count("\n") == 1
