#!/usr/bin/env bash
# Build the stand-in CUDA libraries into built/.   usage: build.sh     (PYTHON: the one with torch 2.11.0, default python3)
# Device memory is host memory, copies copy, launches are checked, kernels and cuBLAS do nothing, graphs and events are dummies.
set -euo pipefail
cd "$(dirname "$0")"
packages=$("${PYTHON:-python3}" -c 'import os, triton; print(os.path.dirname(os.path.dirname(triton.__file__)))')
mkdir -p built/bin built/include
ln -sfn "$packages/triton/backends/nvidia/include/crt" built/include/crt
no_op() { while read -r name; do echo "int $name(void) { return 0; }"; done; }
no_op < nop_runtime.txt > built/nop_runtime.c
no_op < nop_driver.txt > built/nop_driver.c
flags=(-fPIC -w -O1 -fno-builtin -shared)
gcc "${flags[@]}" -I"$packages/nvidia/cu13/include" -Ibuilt/include -o built/libfakecudart.so rt.c memory.c blas.c \
  built/nop_runtime.c -ldl -lpthread
gcc "${flags[@]}" -Wl,-soname,libcuda.so.1 -o built/libcuda.so.1 drv.c built/nop_driver.c
gcc "${flags[@]}" -Wl,-soname,libnvidia-ml.so.1 -o built/libnvidia-ml.so.1 nvml.c
ln -sf libcuda.so.1 built/libcuda.so
cat > built/bin/nvidia-smi <<'S'
#!/bin/sh
case "$*" in
  *driver_version*) echo 580.159.04 ;;
  *--query-gpu=name*) echo "NVIDIA H100 80GB HBM3" ;;
  -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (stand-in)" ;;
  *) echo "stand-in nvidia-smi" ;;
esac
S
chmod +x built/bin/nvidia-smi
