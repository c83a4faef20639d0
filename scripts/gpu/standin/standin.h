// What the parts of the stand-in CUDA runtime share.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#define X __attribute__((visibility("default")))

// The last error, as cudaGetLastError gives it.
extern __thread cudaError_t last;

// Fresh memory, on the device (dev = 1) or the host (dev = 0).
void *reserve(size_t n, int dev);
