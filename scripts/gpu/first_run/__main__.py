"""The driver: checks the host, runs the steps, each under its limit, and brings back at most 8 files.

    bash scripts/gpu/first_run.sh       in the project's root, the bundle in .gpu (make_bundle.sh)

OUT: where the files go. ONLY="grid engines": some steps only, added to what an earlier call found; the last of them
takes what time is left. LIMIT: seconds in all. SPECOPT_REHEARSE=1: on a CPU, in Triton's interpreter, tiny sizes, the
same files.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

from first_run import host, plan, summary
from first_run.places import OUT, PAIR, REHEARSE, RESULTS, ROOT, SCRIPTS, STANDIN, UNPACKED, WELL, load, save

LOG = RESULTS / "run.log"
GRACE, LEAST = 4, 4
"""Seconds in which a step that has reached its limit may still say something; seconds below which none begins."""


def main() -> int:
    """Run everything; 0 if every step ended well."""
    began = time.monotonic()
    only = os.environ.get("ONLY", "").split()
    chosen = [step for step in plan.steps() if step.name in (only or plan.usual())]
    if unknown := set(only) - {step.name for step in plan.steps()}:
        return refuse(f"ONLY names {' '.join(sorted(unknown))}, expected {' '.join(s.name for s in plan.steps())}.")
    if missing := plan.missing_tests():
        return refuse(f"the checkout lacks tests/{missing[0]}: run from a whole one.")
    if not REHEARSE and (wrong := host.problem()):
        return refuse(wrong)
    if not only:
        shutil.rmtree(RESULTS, ignore_errors=True)
    for folder in (RESULTS, OUT):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = began + int(os.environ.get("LIMIT", plan.TOTAL)) * plan.PATIENCE - plan.SPARE
    environment = variables()
    if not REHEARSE and not (UNPACKED / "env.sh").is_file():
        run(plan.UNPACK, environment, deadline)
    environment |= unpacked_variables()
    failed = 0
    with contextlib.ExitStack() as stack:
        serving = {"engines", "seeds", "drafters"} & {step.name for step in chosen}
        if serving and not REHEARSE and not (PAIR / "wide_pair.json").is_file():
            log = stack.enter_context((RESULTS / "pair.log").open("a"))
            stack.enter_context(started(plan.pair(), environment, log))
        for step in chosen:
            limit = math.inf if only and step is chosen[-1] else None
            failed += run(step, environment, deadline, limit) != WELL
    text = summary.text()
    (RESULTS / "summary.txt").write_text(text)
    collect()
    print(f"{time.monotonic() - began:.0f} s; in {OUT}: {' '.join(sorted(path.name for path in OUT.iterdir()))}")
    print(text, end="", flush=True)
    return int(failed > 0)


def refuse(sentence: str) -> int:
    print(f"first_run: {sentence}", file=sys.stderr)
    return 2


def variables() -> dict[str, str]:
    """The environment of every step."""
    found = os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_DISABLE_LINE_INFO": "1", "PYTHON": sys.executable}
    # Many processes run at once: threads that wait for each other would cost more than they save.
    found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1" if REHEARSE else "2")
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    if REHEARSE:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def unpacked_variables() -> dict[str, str]:
    """What unpack.sh found out about the bundle, as it says in env.sh; nothing without a bundle."""
    if REHEARSE or not (UNPACKED / "env.sh").is_file():
        return {}
    lines = subprocess.run(
        ["bash", "-c", f". {UNPACKED}/env.sh; env"], env=variables(), capture_output=True, text=True
    ).stdout.splitlines()
    wanted = ("PYTHONPATH=", "TRITON_", "HF_", "TRANSFORMERS_", "VLLM_", "DO_NOT_TRACK=", "SPECOPT_")
    return dict(line.split("=", 1) for line in lines if line.startswith(wanted))


def run(step: plan.Step, environment: dict[str, str], deadline: float, limit: float | None = None) -> str:
    """Run a step under its limit or another, cut to what is left, and bring back what there is.

    Returns:
        What became of it.
    """
    began = time.monotonic()
    seconds = min(limit or step.limit, deadline - began) - GRACE
    if seconds < LEAST:
        status = "left out, no time left"
    else:
        print(f"== {step.name}, at most {seconds:.0f} s", flush=True)
        with LOG.open("a") as log, contextlib.ExitStack() as stack:
            log.write(f"== {step.name}\n")
            log.flush()
            beside = [stack.enter_context(started(command, environment, log)) for command in step.beside]
            command = tuple(str(int(seconds)) if part == plan.SECONDS else part for part in step.command)
            with started(command, environment, log) as process:
                status = wait(process, seconds)
            for process in beside:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, seconds - (time.monotonic() - began)))
    records = [each for each in load("steps", []) if each["step"] != step.name]
    records.append({"step": step.name, "status": status, "seconds": round(time.monotonic() - began, 1)})
    save("steps", records)
    print(f"{step.name}: {status}, {records[-1]['seconds']} s", flush=True)
    collect()
    return status


@contextlib.contextmanager
def started(command: tuple[str, ...], environment: dict[str, str], log):
    """A command in a process group of its own, which does not outlive the block."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen, seconds: float) -> str:
    """Wait for a process, but no longer than this; what became of it."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        # pytest then says how many tests have passed so far.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "stopped at its limit"
    return WELL if status == 0 else f"failed with status {status}"


def collect() -> None:
    """Bring back what there is so far; a run that is cut short keeps it."""
    parts = ("info", "steps", "modelled", "seeds", "drafters", "races", "kernels", "audit_cost", "sharded_times")
    save("run", {"standin": STANDIN, "rehearsal": REHEARSE} | {name: load(name, None) for name in parts})
    for name in plan.FILES[:-1]:
        if (RESULTS / name).is_file():
            shutil.copy(RESULTS / name, OUT / name)
    scratch = OUT / ".logs"
    with tarfile.open(scratch, "w:gz") as archive:
        for path in [*sorted(RESULTS.rglob("*.log")), *sorted(RESULTS.glob("flat_rows.csv"))]:
            archive.add(path, path.name)
    scratch.replace(OUT / plan.FILES[-1])


if __name__ == "__main__":
    sys.exit(main())
