"""The `vllm` command with the one stock function replaced that is broken on CPUs: the arm ``stock-repaired``.

Usage: ``python -m vllm_specopt.benchmarks.serve.repaired serve ...``. vLLM spawns its engine processes from the main
module, so the replacement takes place in every one of them, and says so in the log. Importing it replaces nothing.
"""

from __future__ import annotations

import os

from vllm_specopt.benchmarks.repair import repair_expand_kernel
from vllm_specopt.benchmarks.serve.plan import REPAIRED_LINE

# The second is the main module's name in a spawned process.
if __name__ in ("__main__", "__mp_main__"):
    repair_expand_kernel()
    print(f"{REPAIRED_LINE} pid={os.getpid()} in {__name__}", flush=True)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
