"""`scripts/check_types.py`: every module is checked, and a name that is gone is told, wherever it is imported."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[1]
BROKEN = """
def lazily(x):
    from vllm_specopt.kernels.there import here, gone
    from vllm_specopt.kernels import nothing
    import vllm_specopt.nowhere

    return here, gone, nothing, vllm_specopt
"""


def check_types(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that works on another checkout."""
    spec = importlib.util.spec_from_file_location("check_types", ROOT / "scripts" / "check_types.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in (("ROOT", root), ("CACHE", root / ".mypy_cache"), ("TREE", root / ".mypy_cache" / "tree")):
        monkeypatch.setattr(module, name, path)
    return module


def test_every_module_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "pyproject.toml",
        "vllm_specopt",
        "kernels",
        "benchmarks",
        "examples",
        "models",
        "research",
        "scripts",
        "tests",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    module = check_types(tmp_path, monkeypatch)
    module.plant()
    module.plant()
    signposts = {f"vllm_specopt/{folder}/__init__.py" for folder in ("kernels", "benchmarks")}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_specopt").rglob("*.py")} - signposts
    for folder in ("kernels", "benchmarks"):
        ours |= {f"vllm_specopt/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert ours and all((module.TREE / name).is_file() for name in ours)
    assert not any((module.TREE / name).exists() for name in signposts)


FOLDERS = ("vllm_specopt", "kernels", "benchmarks", "examples", "models", "research", "scripts", "tests")
PLACES = ["vllm_specopt/a.py", "kernels/a.py", "benchmarks/a.py", "tests/a.py", "examples/a.py"]


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, place: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "fine.py").write_text("from vllm_specopt.kernels.there import here\n")
    (tmp_path / "vllm_specopt" / "__init__.py").touch()
    (tmp_path / "kernels" / "there.py").write_text("here = 1\n")
    module = check_types(tmp_path, monkeypatch)
    (tmp_path / place).write_text(BROKEN)
    assert module.main() == 1
    said = capsys.readouterr().out
    assert f'{place}:3: error: Module "vllm_specopt.kernels.there" has no attribute "gone"' in said
    assert f'{place}:4: error: Module "vllm_specopt.kernels" has no attribute "nothing"' in said
    assert (
        f'{place}:5: error: Cannot find implementation or library stub for module named "vllm_specopt.nowhere"' in said
    )
    assert '"here"' not in said and "fine.py" not in said
