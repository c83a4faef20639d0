"""Scripts that run vLLM, each in a process of its own that finds vLLM imported, which takes 10 s and more on its own.

For each model runner a process imports vLLM once and forks for every script. Run as a script, this is that process: it
reads a request per line, ``arguments``, ``cwd``, ``env`` and the file ``log``, and answers with the exit status.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
INTERPRETER = TESTS / "engine" / "interpreter"
# What every engine imports anyway, and what those of a runner do.
COMMON = "vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.model_executor.models.llama", "vllm.v1.worker.gpu_worker"
OWN = {"V1": "vllm.v1.worker.gpu_model_runner", "V2": "vllm.v1.worker.gpu.model_runner"}


def environment(runner: str) -> dict[str, str]:
    """Environment for a process that uses vLLM's model runner ``V1`` or ``V2`` on a CPU."""
    path = [str(TESTS.parent), str(TESTS), *([str(INTERPRETER)] if runner == "V2" else [])]
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        # One thread: on a busy machine threads that wait for each other cost more than they save in models this small.
        # Numba's too, which n-gram drafting starts: they set how many vLLM's kernels take.
        "NUMBA_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        # Engines are eager, but vLLM compiles what counts a log probability's rank even then.
        "TORCHDYNAMO_DISABLE": "1",
        "TRITON_INTERPRET": "1" if runner == "V2" else "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
    }


def run(runner: str, *arguments: object, cwd: Path | None = None, env: dict | None = None) -> tuple[int, str]:
    """Run ``python ARGUMENTS`` (a script, ``-m`` and a module, ``-c`` and code); return exit status and what it logged.

    Args:
        runner: ``V1`` or ``V2``.
        arguments: As on a command line.
        cwd: Where. (default: here)
        env: Added to the environment of the runner; nothing that vLLM or Triton reads when it is imported.
    """
    process = _prepared(runner)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        request = {"arguments": [str(argument) for argument in arguments], "cwd": str(cwd or Path.cwd()),
                   "env": environment(runner) | (env or {}), "log": log.name}  # fmt: skip
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        status = process.stdout.readline()
        if not status:
            raise RuntimeError(f"the process that had imported vLLM for {runner} ended with {process.wait()}")
        return int(status), Path(log.name).read_text(errors="replace")


@cache
def _prepared(runner: str) -> subprocess.Popen:
    command = [sys.executable, __file__, *COMMON, OWN[runner]]
    return subprocess.Popen(command, env=environment(runner), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main(modules: list[str]) -> None:
    """Import, and fork until the standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    # Each engine collects garbage as it starts, among all that was imported if that is not left out.
    gc.freeze()
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
        else:
            answers.close()
            _become(json.loads(line))
            return


def _become(request: dict) -> None:
    """Run the request in this process, as if it had been started for it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request["log"], os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    name, *sys.argv[1:] = request["arguments"]
    path = [folder for folder in request["env"]["PYTHONPATH"].split(os.pathsep) if folder not in sys.path]
    sys.path[:1] = ["" if name in ("-m", "-c") else str(Path(name).parent), *path]
    if name == "-c":
        code, sys.argv[:2] = sys.argv[1], ["-c"]
        exec(code, {"__name__": "__main__"})
    elif name == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = str(name)
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
