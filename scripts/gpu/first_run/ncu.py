"""A few calls for a profiler, and ncu over the slowest of our kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys

from first_run.places import RESULTS, load

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
FILE = RESULTS / "ncu.txt"


def main(seconds: float) -> None:
    """Write ncu.txt: what ncu says, or in one sentence why it says nothing."""
    form, kernel = slowest(load("kernels", {}).get("best", {}))
    if not shutil.which("ncu"):
        FILE.write_text("ncu is not on this host: nothing was profiled.\n")
        calls(form)
        return
    command = ["ncu", "--clock-control", "none", "--kernel-name", f"regex:{kernel}", "--launch-count", "3"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += ["--log-file", str(FILE), sys.executable, "-m", "first_run.ncu", "--calls", form]
    try:
        done = subprocess.run(command, timeout=seconds - 2, capture_output=True, text=True)
        said = f"ncu ended with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}\n"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        said, failed = f"ncu was stopped after {seconds:.0f} s.\n", True
    if failed:
        with FILE.open("a") as file:
            file.write(said)
        sys.exit(1)


def slowest(times: dict[str, dict[str, float]]) -> tuple[str, str]:
    """The form and kernel that took longest; the sweep over the rows where nothing was timed."""
    found = [(us, form, kernel) for form, kernels in times.items() for kernel, us in kernels.items()]
    return max(found)[1:] if found else ("one-hot", "statistics_kernel")


def calls(form: str) -> None:
    """Some calls of a form."""
    import torch

    from first_run import batches

    call = batches.caller(batches.case(form, 64, 7))
    for number in range(3):
        call(number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    calls(sys.argv[2]) if sys.argv[1] == "--calls" else main(float(sys.argv[1]))
