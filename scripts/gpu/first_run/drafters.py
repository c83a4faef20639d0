"""Every drafter that vLLM 0.33 has, in engines with ours: is the text the one without speculation?

The drafters and their requests are those of `make drafters` (tests/drafters). Where V2 has none, V1 runs. Logits of a
step with drafts are those of one without, to the bit, in vLLM's batch-invariant mode, bfloat16; some run in float32
too, where they agree but for their last bits. All engines at once; nothing is timed.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from first_run.engines import CPU_ENV, ENV
from first_run.places import REHEARSE, RESULTS, ROOT, save, tail

FOLDER = RESULTS / "drafters"
TESTS = ROOT / "tests"
ON_V2 = ("draft model", "n-gram", "EAGLE", "EAGLE-3", "MTP", "DFlash", "DSpark")
ON_V1 = ("n-gram", "n-gram GPU", "parallel EAGLE-3", "parallel draft model", "custom class")
IN_FLOAT32 = ("draft model", "EAGLE-3")
REQUESTS, LENGTH = (2, 4) if REHEARSE else (32, 64)
AT_ONCE = 1 if REHEARSE else 12
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}
sys.path.insert(0, str(TESTS))
table = runpy.run_path(str(TESTS / "drafters" / "table.py"))


def main(seconds: float) -> None:
    """Write drafters.json after each engine: per engine, what `make drafters` keeps of a drafter."""
    deadline = time.monotonic() + seconds - 3
    asked = {}
    for runner, kind, name in wanted():
        folder = FOLDER / f"{runner} {kind} {name}"
        folder.mkdir(parents=True, exist_ok=True)
        for engine in table["engines"]([name], folder, REQUESTS, LENGTH):
            asked.setdefault((runner, kind, engine["name"]), engine)
    # Those without speculation first: all others are compared with them.
    order = sorted(asked, key=lambda key: not key[2].startswith("plain"))
    found: dict[str, dict] = {}

    def run(key: tuple[str, str, str]) -> None:
        found["; ".join(key)] = result(*key, asked[key], deadline)
        save("drafters", [told(name, found) for name in list(found) if "plain" not in name])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, order))
    compared = [told(name, found) for name in found if "plain" not in name]
    save("drafters", compared)
    print(json.dumps(compared, indent=1))
    sys.exit(int(any("problem" in each for each in compared)))


def wanted() -> list[tuple[str, str, str]]:
    """Runner, kind and drafter of each engine that drafts."""
    if REHEARSE:
        return [("V2", "float32", "draft model")]
    invariant = [("V2", name) for name in ON_V2] + [("V1", name) for name in ON_V1]
    return [(runner, "invariant", name) for runner, name in invariant] + [("V2", "float32", n) for n in IN_FLOAT32]


def result(runner: str, kind: str, name: str, engine: dict, deadline: float) -> dict:
    """What an engine emitted, or why it did not; without Triton's attention where it does not start with it."""
    said = ""
    for attention in ("TRITON_ATTN", None):
        left = deadline - time.monotonic()
        if left < 10:
            return {"problem": said or "no time left"}
        folder = FOLDER / f"{runner} {kind} {name} {attention}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "request.json").write_text(json.dumps([engine | {"llm": on_gpu(engine["llm"], kind, attention)}]))
        program = [sys.executable, str(TESTS / "engine" / "run_engines.py"), "request.json", "result.json"]
        log = folder.parent / f"{folder.name.replace(' ', '-')}.log"
        with log.open("w") as file:
            try:
                subprocess.run(
                    program, cwd=folder, stdout=file, stderr=file, env=environment(runner, kind), timeout=left
                )
            except subprocess.TimeoutExpired:
                return {"problem": f"stopped at its limit; {tail(log, 300)}"}
        if (folder / "result.json").is_file():
            found = json.loads((folder / "result.json").read_text())[name]
            return found | {"attention": attention or "default"}
        errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
        said = (errors[-1] if errors else tail(log, 300)).strip()
    return {"problem": said}


def on_gpu(llm: dict, kind: str, attention: str | None) -> dict:
    """Arguments of ``LLM`` for an engine that leaves room for others."""
    if REHEARSE:
        return llm
    changed = llm | {"dtype": "float32" if kind == "float32" else "bfloat16", "max_num_seqs": REQUESTS,
                     "enforce_eager": False,
                     "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}  # fmt: skip
    # vLLM's n-gram drafter for GPUs is made to be compiled.
    if (llm["speculative_config"] or {}).get("method") != "ngram_gpu":
        changed["compilation_config"] = GRAPHS
    return changed | ({"attention_backend": attention} if attention else {})


def environment(runner: str, kind: str) -> dict[str, str]:
    """What chooses the model runner and the mode; in a rehearsal also what makes V2 run in the interpreter."""
    found = os.environ | ENV | {"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0"}
    paths = [str(TESTS / "drafters"), found.get("PYTHONPATH", "")]
    if kind == "invariant":
        found["VLLM_BATCH_INVARIANT"] = "1"
    if REHEARSE:
        found |= CPU_ENV
        paths.insert(0, str(TESTS / "engine" / "interpreter"))
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def told(key: str, found: dict[str, dict]) -> dict:
    """A drafter's texts beside those of the engine without speculation on the same runner."""
    runner, kind, name = key.split("; ")
    head = {"drafter": name, "runner": runner, "kind": kind}
    plain = found.get("; ".join((runner, kind, table["plain_name"](name))), {})
    drafting = found[key]
    for each, what in ((drafting, ""), (plain, "without speculation: ")):
        if "batches" not in each:
            return head | {"problem": what + each.get("problem", "not run yet")}
    return head | {"attention": drafting["attention"]} | table["compared"](drafting, plain["batches"])


if __name__ == "__main__":
    main(float(sys.argv[1]))
