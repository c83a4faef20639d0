"""Run placements over a local Ray cluster of several nodes, ending one worker process on the way if asked to.

Usage: ``python ray_ab.py REQUEST.json RESULT.json``. The request has ``nodes`` (logical GPUs per node), ``placements``
(arm, repeat, settings), ``function``, ``slot``, ``kill``: the ``began`` file of the placement whose Ray worker is
to be killed (SIGKILL) as soon as that file is there, and ``too_large``: a slot that fits on no node.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
from ray_cluster import local_cluster

from vllm_specopt.benchmarks.serve import cluster


def main(request_path: str, result_path: str) -> None:
    """Run the request and write the entries, when each arrived, and the processes of the killed attempt."""
    request = json.loads(Path(request_path).read_text())
    began = Path(request["kill"]) if request.get("kill") else None
    found = {"killed": {}, "order": []}

    def kill_once() -> None:
        if began is None or found["killed"] or not began.exists():
            return
        if not (text := began.read_text()):
            return
        ids = json.loads(text)
        ids = ids if isinstance(ids, dict) else {"child": ids}
        worker = psutil.Process(ids["child"]).parent()
        assert "ray::" in worker.name() or "ray::" in " ".join(worker.cmdline()), worker
        os.kill(worker.pid, signal.SIGKILL)
        found["killed"] = ids | {"worker": worker.pid}

    slot = cluster.Slot(**request["slot"])
    placements = [cluster.Placement(**each) for each in request["placements"]]
    with local_cluster(request["nodes"]), cluster.connected():
        start = time.monotonic()
        found["entries"] = cluster.run(
            placements,
            request["function"],
            slot,
            on_result=lambda entry: found["order"].append([entry["arm"], entry["repeat"]]),
            tick=kill_once,
        )
        if "too_large" in request:
            try:
                cluster.capacity(cluster.Slot(**request["too_large"]))
            except cluster.ClusterError as error:
                found["too_large"] = str(error)
        found["seconds"] = time.monotonic() - start
    found["alive"] = [pid for pid in found["killed"].values() if psutil.pid_exists(pid)]
    Path(result_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
