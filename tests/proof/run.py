"""Entry of ``make prove``: finds the checkout, chooses where Triton runs, and hands over to ``command.py``."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Not from this folder: its modules would hide others of the same name.
elsewhere = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
sys.path[:] = [str(ROOT), str(ROOT / "tests"), *elsewhere]
# Before anything imports Triton: without a GPU its kernels run in the interpreter. Worker processes come here too.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(ROOT / "tests" / "engine" / "interpreter"))
    import one_patch  # noqa: F401
os.environ.setdefault("OMP_NUM_THREADS", "1")

if __name__ == "__main__":
    from proof.command import main

    sys.exit(main())
