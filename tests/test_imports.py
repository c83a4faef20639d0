"""Imports point one way, and importing any module leaves vLLM as it was: the entry point and commands change it."""

import ast
import importlib.util
from pathlib import Path

import pytest
from support import prepared

ROOT = Path(__file__).parents[1]
# What each package may import besides itself; the core is vllm_specopt without the others.
ARROWS = {
    "kernels": set(),
    "core": {"kernels"},
    "benchmarks": {"kernels", "core"},
    "cli": {"kernels", "core", "benchmarks"},
    "research": {"kernels", "core", "benchmarks"},
}
FOLDERS = {"kernels": "kernels", "benchmarks": "benchmarks", "cli": "vllm_specopt/cli", "research": "research"}
CODE = """
import importlib, pkgutil, sys
import vllm.engine.arg_utils, vllm.v1.engine.input_processor, vllm.v1.worker.gpu_model_runner
import vllm.v1.sample.rejection_sampler, vllm.v1.worker.worker_base, vllm.utils.cpu_triton_utils
import vllm_specopt

def snapshot():
    found = {}
    for name in [m for m in sys.modules if m.split(".")[0] == "vllm"]:
        for key, value in list(vars(sys.modules[name]).items()):
            if getattr(value, "__module__", None) == name:
                found[name, key] = value
                if isinstance(value, type):
                    found.update({(name, key, member): vars(value)[member] for member in list(vars(value))})
    return {where: value for where, value in found.items() if callable(value)}

before = snapshot()
modules = [m.name for m in pkgutil.walk_packages(vllm_specopt.__path__, "vllm_specopt.")]
for module in modules:
    importlib.import_module(module)
after = snapshot()
changed = [where for where, value in before.items() if after.get(where) is not value]
assert not changed, changed
assert {"vllm_specopt.integration.plugin", "vllm_specopt.benchmarks.serve.repaired"} <= set(modules)
assert any(module.startswith("vllm_specopt.kernels.") for module in modules)
assert len(before) > 5000, len(before)
if "repair" in sys.argv:
    from vllm_specopt.benchmarks.repair import repair_expand_kernel
    repair_expand_kernel()
    assert snapshot() != before
"""


def modules(package: str) -> list[Path]:
    """Return the files of a package."""
    if package != "core":
        return sorted((ROOT / FOLDERS[package]).rglob("*.py"))
    return sorted(path for path in (ROOT / "vllm_specopt").rglob("*.py") if path.parent.name != "cli")


def packages_imported(path: Path) -> set[str]:
    """Return which of our packages a file imports, wherever in it the import stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    found = {name.split(".")[0] for name in names} & {"research", "tests", "scripts"}
    ours = [name.split(".") for name in names if name.split(".")[0] == "vllm_specopt"]
    return found | {name[1] if len(name) > 1 and name[1] in ARROWS else "core" for name in ours}


@pytest.mark.parametrize("package", ARROWS)
def test_imports_point_one_way(package):
    files = modules(package)
    assert len(files) > 5
    for path in files:
        assert packages_imported(path) <= ARROWS[package] | {package}, path


@pytest.mark.parametrize("package", ["kernels", "core", "benchmarks"])
def test_only_the_command_line_knows_typer(package):
    assert not [path for path in modules(package) if "import typer" in path.read_text()]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_importing_any_module_leaves_vllm_alone():
    status, log = prepared.run("V1", "-c", CODE, "repair", cwd=ROOT)
    assert status == 0, log[-4000:]


def test_the_house_that_is_drawn_is_the_one_on_disk():
    """Every folder of the page exists; every folder with code is drawn, or lies in one of tests, scripts or models."""
    drawing = (ROOT / "docs" / "design.md").read_text().split("```")[1]
    drawn = {line.split()[0].rstrip("/") for line in drawing.strip().splitlines()}
    assert all((ROOT / folder).is_dir() for folder in drawn)
    roots = {folder.split("/")[0] for folder in drawn}
    known = {str(path.parent.relative_to(ROOT)) for root in roots for path in (ROOT / root).rglob("*.py")}
    # The places where the packages of that name are installed.
    known -= {"vllm_specopt/kernels", "vllm_specopt/benchmarks"}
    loose = {each for each in known - drawn if each.split("/")[0] not in ("tests", "scripts", "models", "examples")}
    assert not loose
