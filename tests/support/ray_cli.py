"""Run a `specopt` command against a local Ray cluster, as a user of a cluster would.

Usage: ``python ray_cli.py REQUEST.json RESULT.json``. The request has ``nodes`` (logical GPUs per node) and
``arguments`` of `specopt`, to which ``--ray-address`` is added.
"""

import json
import subprocess
import sys
from pathlib import Path

from ray_cluster import local_cluster


def main(request_path: str, result_path: str) -> None:
    """Run the command and write its exit status and output."""
    request = json.loads(Path(request_path).read_text())
    with local_cluster(request["nodes"]):
        import ray

        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "vllm_specopt.cli.main", *request["arguments"], "--ray-address", address]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    Path(result_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
