"""Run mypy over the package as it is installed, with kernels/ and benchmarks/ inside, and over what imports it.

In a checkout those two folders stand beside the package, and mypy does not follow the signposts that lead to them. It
is shown a folder of links in which everything has its place. Tests, scripts, examples and models are not typed: there
it is asked for one thing, that every name they import from the package, wherever the import stands, is there.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".mypy_cache"
TREE = CACHE / "tree"
USERS = ("examples", "models", "research", "scripts", "tests")
GONE = re.compile(r'Module "vllm_specopt[\w.]*" has no attribute|module named "vllm_specopt')


def link(place: Path, target: Path) -> None:
    """Make ``place`` a link to ``target``."""
    if place.is_symlink() and place.readlink() == target:
        return
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def plant() -> None:
    """Lay out the links: the package's own files, and the mapped folders instead of their signposts."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {name.split(".")[1]: ROOT / folder for name, folder in setuptools["package-dir"].items()}
    package = TREE / "vllm_specopt"
    package.mkdir(parents=True, exist_ok=True)
    targets = {path.name: path for path in (ROOT / package.name).iterdir() if path.name != "__pycache__"} | mapped
    for stale in {path.name for path in package.iterdir()} - set(targets):
        (package / stale).unlink()
    for name, target in targets.items():
        link(package / name, target)
    for name in USERS:
        link(TREE / name, ROOT / name)


def concerns(line: str) -> bool:
    """Whether a line of mypy's is about the package, or about a name that another folder imports from it."""
    return not line.startswith(tuple(f"{folder}/" for folder in USERS)) or bool(GONE.search(line))


def main() -> int:
    """Check; say where the errors are by the checkout's own paths, and return mypy's exit status."""
    plant()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE)]
    command += ["--no-error-summary", *(f"--package={name}" for name in ("vllm_specopt", *USERS))]
    # mypy would look there too, and a signpost is a package where the folder of links has none.
    environ = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(command, cwd=TREE, env=environ, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if concerns(line)]
    for line in lines:
        local = line.removeprefix("vllm_specopt/")
        print(local if local.startswith(("kernels/", "benchmarks/")) else line)
    return done.returncode if lines or done.returncode not in (0, 1) else 0


if __name__ == "__main__":
    sys.exit(main())
