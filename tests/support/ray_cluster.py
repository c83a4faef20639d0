"""A Ray cluster of several nodes on this machine, quiet, on loopback addresses only, and always taken down."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OBJECT_STORE_BYTES = 100 * 2**20
# Not 127.0.0.1, which Ray replaces by the address of the machine when it connects.
FIRST = 2


def stop_with_parent() -> None:
    """End this process in order, so that whatever it has started is stopped, once its standard input closes.

    The parent keeps the other end of a pipe open: it closes however the parent ends.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def local_cluster(
    gpus: list[int], setup_hook: Callable | None = None, num_cpus: int | None = None
) -> Iterator[Callable[[], str]]:
    """Start one raylet per entry of `gpus`, with that many logical GPUs, and connect this process to them.

    This process ends, and the cluster with it, when its standard input closes.

    Args:
        gpus: Logical GPUs per node; each node has an address of its own.
        setup_hook: Runs in every worker process before anything else.
        num_cpus: CPU slots per node. (default: as many as GPUs, at least one)

    Yields:
        A function that returns everything the worker processes have logged so far.
    """
    stop_with_parent()
    # The sockets' paths must stay short: pytest's own folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    (folder / "ray").mkdir()
    # Ray reads these when it is imported.
    os.environ |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for index, count in enumerate(gpus):
            cluster.add_node(
                node_ip_address=f"127.0.0.{FIRST + index}",
                num_gpus=count,
                num_cpus=num_cpus or max(1, count),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": setup_hook} if setup_hook else None,
            _node_ip_address=f"127.0.0.{FIRST}",
        )
        logs = Path(cluster.head_node.get_logs_dir_path())
        yield lambda: "\n".join(path.read_text(errors="replace") for path in sorted(logs.glob("worker-*")))
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
