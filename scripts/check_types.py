"""Run mypy over the package as it is installed: with kernels/ and benchmarks/ inside.

In a checkout those two folders stand beside the package, and mypy does not follow the signposts that lead to them. It
is shown a folder of links in which everything has its place.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".mypy_cache"
TREE = CACHE / "tree"


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


def main() -> int:
    """Check the types; say where the errors are by the checkout's own paths."""
    plant()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *sys.argv[1:]]
    command += ["--cache-dir", str(CACHE), "-p", "vllm_specopt"]
    # mypy would look there too, and a signpost is a package where the folder of links has none.
    environ = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(command, cwd=TREE, env=environ, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        local = line.removeprefix("vllm_specopt/")
        print(local if local.startswith(("kernels/", "benchmarks/")) else line)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
