"""Set before anything imports Triton: without a GPU, its kernels run in the interpreter on CPU tensors."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"
