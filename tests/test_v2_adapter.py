"""The V2 adapter, under Triton's interpreter: each case of tests/engine/v2_cases*.py, run in a process of their own.

With SPECOPT_VLLM_033_SOURCE naming a folder with the sources of vLLM 0.33.0, the same cases run against those.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from support import prepared

vllm = pytest.importorskip("vllm")
pytest.importorskip("triton")

ENGINE = Path(__file__).parent / "engine"
FILES = sorted(ENGINE.glob("v2_cases*.py"))
CASES = [name for file in FILES for name in re.findall(r"^def (case_\w+)", file.read_text(), flags=re.MULTILINE)]


@pytest.fixture(scope="module", params=["installed", "0.33.0", pytest.param("installed, more", marks=pytest.mark.long)])
def outcomes(request, tmp_path_factory):
    """Case name -> list of (identifier, failure or None)."""
    folder = tmp_path_factory.mktemp("v2")
    installed = request.param.startswith("installed")
    env = {"EXPECTED_VLLM": vllm.__version__ if installed else request.param}
    command = ["-m", "pytest", *map(str, FILES), "-q", "--junitxml", str(folder / "report.xml")]
    command += ["-o", "python_functions=case_*", "-p", "no:cacheprovider"]
    # The rest of the cases, those marked long, are run by themselves: `make test` has run the others.
    command += ["-m", "long"] if "more" in request.param else []
    if installed:
        status, log = prepared.run("V2", *command, cwd=ENGINE, env=env)
    else:
        source = os.environ.get("SPECOPT_VLLM_033_SOURCE")
        if not source:
            pytest.skip("SPECOPT_VLLM_033_SOURCE does not name a folder with the sources of vLLM 0.33.0")
        # The sources carry no metadata; vLLM takes its platform from the version found there.
        metadata = folder / "vllm-0.33.0+cpu.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0+cpu\n")
        environ = prepared.environment("V2") | env
        environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], source, str(folder)])
        done = subprocess.run([sys.executable, *command], cwd=ENGINE, env=environ, capture_output=True, text=True)
        status, log = done.returncode, done.stdout
    assert status in (0, 1), log[-4000:]
    found: dict[str, list] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        failure = next((child.text for child in case if child.tag in ("failure", "error")), None)
        found.setdefault(case.get("name").split("[")[0], []).append((case.get("name"), failure))
    if "more" in request.param:
        # A case without long parameters has nothing more to run.
        found |= {case: [(case, None)] for case in CASES if case not in found}
    return found


@pytest.mark.parametrize("case", CASES)
def test_v2_adapter(outcomes, case):
    assert outcomes.get(case), "the case did not run"
    failures = [f"{name}\n{failure}" for name, failure in outcomes[case] if failure]
    assert not failures, "\n\n".join(failures)
