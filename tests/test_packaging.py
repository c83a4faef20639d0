"""What a wheel holds, which way imports point, and that `import kernels` stays Hugging Face's, never ours."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_specopt"
KERNELS = ROOT / "kernels"
MAY_IMPORT_VLLM = {
    *("plugin.py", "messages.py", "v1.py", "v1_rows.py", "v1_sampler.py", "v1_thinking.py"),
    *(
        "diagnosis.py",
        "v1_watch.py",
        "v2.py",
        "v2_sampler.py",
        "v2_watch.py",
        "validation.py",
        "warm_up.py",
        "sharded.py",
    ),
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
TOOLS = {"httpx", "rich", "typer"}
MAPPED = {ROOT / folder: name.replace(".", "/") for name, folder in SETUPTOOLS["package-dir"].items()}


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from: building in place would leave build/ and egg-info behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    for folder in (PACKAGE, *MAPPED):
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__", "results", "figures"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(tree))
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        top_level = archive.read(f"{info}/top_level.txt").decode().split()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    expected = {
        f"{package}/{path.relative_to(folder)}" for folder, package in MAPPED.items() for path in folder.rglob("*.py")
    }
    expected |= {"vllm_specopt/py.typed"}
    expected |= {f"vllm_specopt/{path.relative_to(ROOT)}" for path in KERNELS.glob("tables/*.json")}
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    # The signposts that lead to kernels/ and its like in a checkout have no place beside the real modules.
    expected |= modules - {f"{package}/__init__.py" for package in MAPPED.values()}
    assert {name for name in names if not name.startswith(info)} == expected
    assert top_level == ["vllm_specopt"]
    assert "[vllm.general_plugins]\nspecopt = vllm_specopt:register" in entry_points


def test_every_folder_with_modules_is_listed() -> None:
    folders = {str(path.parent.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    for folder, package in MAPPED.items():
        # `import kernels` from a checkout must find whatever else is called so.
        assert not (folder / "__init__.py").exists()
        folders |= {str(Path(package) / path.parent.relative_to(folder)) for path in folder.rglob("*.py")}
    assert {folder.replace("/", ".") for folder in folders} == set(SETUPTOOLS["packages"])


def imported(path: Path) -> set[str]:
    """Return the full names of the modules a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
            if node.module == "vllm_specopt":
                found |= {f"vllm_specopt.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_each_other_only(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        assert top in {"torch", "triton", ""} | sys.stdlib_module_names or name.startswith("vllm_specopt.kernels"), name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    names = imported(path)
    tops = {name.split(".")[0] for name in names}
    in_cli = path.parent.name == "cli"
    assert not tops & {"tests", "benchmarks", "kernels"}
    if not in_cli:
        assert not tops & TOOLS, "only the tools need it"
        assert (path.parent.name == "integration" and path.name in MAY_IMPORT_VLLM) or "vllm" not in tops
        assert not any(name.startswith(("vllm_specopt.cli", "vllm_specopt.benchmarks")) for name in names)


def test_the_plugin_alone_needs_two_packages() -> None:
    names = {name: {re.match(r"\w+", line)[0] for line in lines} for name, lines in requirements().items()}
    assert names[""] == {"numba", "numpy"}
    assert names["tools"] == TOOLS


def requirements() -> dict[str, list[str]]:
    """What pip installs with the package, and with each of its extras."""
    project = PYPROJECT["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_reference_is_not_imported_by_the_package() -> None:
    for path in {*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")} - {PACKAGE / "testing.py"}:
        assert not any(name.endswith("kernels.reference") for name in imported(path)), path


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, vllm_specopt, vllm_specopt.cli.main; print({'torch', 'triton', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(params=["wheel", "editable"], scope="module")
def installed(request: pytest.FixtureRequest, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has this project and another package called `kernels` installed."""
    environment = tmp_path_factory.mktemp("env")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("OWNER = 'Hugging Face'\n")
    if request.param == "wheel":
        pip("install", "--no-deps", "--target", str(site), str(request.getfixturevalue("wheel")))
    else:
        (site / "build-backend.pth").write_text(sysconfig.get_path("purelib"))
        pip("--python", str(python), "install", "--no-build-isolation", "--no-deps", "--editable", str(tree))
        (site / "build-backend.pth").unlink()
    return python


@pytest.mark.parametrize("folder_on_path", ["root", "elsewhere"])
def test_kernels_is_never_ours_and_our_modules_are_found(
    installed: Path, tree: Path, tmp_path: Path, folder_on_path: str
) -> None:
    script = """
import importlib.util, kernels
assert kernels.OWNER == "Hugging Face", kernels
assert importlib.util.find_spec("vllm_specopt.kernels.reference").origin.endswith("kernels/reference/__init__.py")
assert importlib.util.find_spec("kernels.reference") is None
"""
    folder = tree if folder_on_path == "root" else tmp_path
    done = subprocess.run([str(installed), "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_the_command_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    """The environment has no other package: the entry point can be imported, and the command says what it lacks."""
    script = "import sys, vllm_specopt.cli.start as start; sys.argv = ['specopt', '--version']; start.main()"
    done = subprocess.run([str(installed), "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"specopt: httpx, rich, typer not installed beside {installed}: pip install 'vllm-specopt[tools]'.\n"
    )
    name, _, function = PYPROJECT["project"]["scripts"]["specopt"].partition(":")
    assert (name, function) == ("vllm_specopt.cli.start", "main")
