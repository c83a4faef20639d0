"""vLLM's own tests of V1's rejection sampler, with our class in place of vLLM's, on a CPU.

Usage: ``python tests/peer/run.py [PYTEST ARGUMENTS]``. The tests come from the installed version's source release, on
the package index that pip is set up for, and stay in a temporary folder. Exit status 1 if one of them fails or errs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = Path("tests", "v1", "sample")
FILES = (TESTS / "test_rejection_sampler.py", TESTS / "utils.py")


def main() -> int:
    """Fetch, run, print the tally."""
    from ours import LEFT_TO_STOCK, functions
    from vllm import __version__

    version = __version__.split("+")[0]
    with tempfile.TemporaryDirectory(prefix="specopt-peer-") as name:
        folder = Path(name)
        source = fetch(version, folder / "source")
        for file in FILES:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, folder / file)
        report = folder / "report.xml"
        command = [sys.executable, "-W", "ignore", "-m", "pytest", str(FILES[0]), "-q", "-p", "ours"]
        command += ["-p", "no:cacheprovider", "--rootdir", str(folder), "--junitxml", str(report), *sys.argv[1:]]
        path = os.pathsep.join(filter(None, [str(folder), str(HERE), str(HERE.parents[1]), os.getenv("PYTHONPATH")]))
        subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path})
        if not report.exists():
            print("pytest made no report", file=sys.stderr)
            return 1
        outcomes = Counter(map(outcome, ElementTree.parse(report).iter("testcase")))
        left = {name: reason for name, reason in LEFT_TO_STOCK.items() if name in functions(folder / FILES[0])}
    print(f"\nvLLM {version}, {FILES[0].name}, our class in place of vLLM's:")
    for word in ("passed", "failed", "skipped"):
        print(f"  {outcomes[word]:3d} {word}")
    for name, reason in left.items():
        print(f"      left out: {name}: {reason}")
    return int(outcomes["failed"] > 0 or not outcomes["passed"])


def fetch(version: str, folder: Path) -> Path:
    """Unpack vLLM's source release below a new folder; return where its ``tests`` are.

    pip unpacks a source release to look at its metadata, which takes building tools that need not be here. The
    build is allowed no tools and may fail: the files are there by then, and ``--no-clean`` leaves them.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--no-clean", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found = list(folder.glob(f"**/{FILES[0]}"))
    if not found:
        raise SystemExit(f"the source release of vLLM {version} could not be fetched:\n{done.stdout[-2000:]}")
    return found[0].parents[len(FILES[0].parts) - 1]


def outcome(case: ElementTree.Element) -> str:
    """Of one test in pytest's report."""
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


if __name__ == "__main__":
    sys.exit(main())
