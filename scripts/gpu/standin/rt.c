// CUDA runtime of the stand-in but for its memory: one H100, whose kernels, graphs and events do nothing.
#define _GNU_SOURCE
#include "attributes.h"
#include "standin.h"
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static int capturing;
X cudaError_t cudaGetDeviceCount(int *n) {
  *n = 1;
  return 0;
}
X cudaError_t cudaGetDevice(int *d) {
  *d = 0;
  return 0;
}
X cudaError_t cudaSetDevice(int d) { return 0; }
X cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3 (stand-in)");
  p->totalGlobalMem = 80ul << 30;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->minor = 0;
  p->multiProcessorCount = 132;
  p->l2CacheSize = 50 << 20;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = 232448;
  p->totalConstMem = 65536;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = 1;
  p->managedMemory = 1;
  p->concurrentKernels = 1;
  p->cooperativeLaunch = 1;
  p->reservedSharedMemPerBlock = 1024;
  p->maxBlocksPerMultiProcessor = 32;
  p->canMapHostMemory = 1;
  return 0;
}
X cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  *v = attribute(a);
  return 0;
}
X cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) {
  *l = 0;
  *g = -5;
  return 0;
}
X cudaError_t cudaDeviceGetPCIBusId(char *b, int n, int d) {
  snprintf(b, n, "0000:00:1e.0");
  return 0;
}
X cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) {
  *c = 0;
  return 0;
}
X cudaError_t cudaDriverGetVersion(int *v) {
  *v = 13000;
  return 0;
}
X cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = 13000;
  return 0;
}
static long ids = 16;
X cudaError_t cudaStreamCreate(cudaStream_t *s) {
  *s = (cudaStream_t)(ids += 16);
  return 0;
}
X cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
  *s = (cudaStream_t)(ids += 16);
  return 0;
}
X cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) {
  *s = (cudaStream_t)(ids += 16);
  return 0;
}
X cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
  *p = 0;
  return 0;
}
X cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
  *c = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
X cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id,
                                       cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                       size_t *n) {
  *c = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id)
    *id = 7;
  if (g)
    *g = (cudaGraph_t)32;
  if (d)
    *d = 0;
  if (e)
    *e = 0;
  if (n)
    *n = 0;
  return 0;
}
X cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  capturing = 1;
  return 0;
}
X cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  capturing = 0;
  *g = (cudaGraph_t)32;
  return 0;
}
X cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return 0; }
X cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) {
  *e = (cudaGraphExec_t)48;
  return 0;
}
X cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) {
  *e = (cudaGraphExec_t)48;
  return 0;
}
X cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *n, size_t *c) {
  *c = 1;
  if (n)
    n[0] = (cudaGraphNode_t)64;
  return 0;
}
X cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = (cudaEvent_t)(ids += 16);
  return 0;
}
X cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
  *e = (cudaEvent_t)(ids += 16);
  return 0;
}
X cudaError_t cudaEventElapsedTime(float *t, cudaEvent_t a, cudaEvent_t b) {
  *t = 1.0f;
  return 0;
}
X cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = 90;
  a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 49152;
  return 0;
}
X cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t d) {
  *n = 2;
  return 0;
}
X cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t d,
                                                                     unsigned g) {
  *n = 2;
  return 0;
}
static int nop(void) { return 0; }
X cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v, unsigned long long g,
                                               enum cudaDriverEntryPointQueryResult *r) {
  void *h = dlopen("libcuda.so.1", RTLD_LAZY);
  *f = h ? dlsym(h, s) : 0;
  if (!*f)
    *f = nop;
  if (r)
    *r = 0;
  return 0;
}
X cudaError_t cudaGetDriverEntryPoint(const char *s, void **f, unsigned long long g,
                                      enum cudaDriverEntryPointQueryResult *r) {
  return cudaGetDriverEntryPointByVersion(s, f, 0, g, r);
}
X const char *cudaGetErrorString(cudaError_t e) { return e == 2 ? "out of memory" : "stand-in error"; }
X const char *cudaGetErrorName(cudaError_t e) { return "standIn"; }
X cudaError_t cudaGetLastError(void) {
  cudaError_t e = last;
  last = 0;
  return e;
}
X cudaError_t cudaPeekAtLastError(void) { return last; }
X cudaError_t cudaGetSymbolAddress(void **p, const void *s) {
  *p = reserve(1 << 16, 1);
  return 0;
}
X cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int d) {
  *p = (cudaMemPool_t)80;
  return 0;
}
X cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) {
  *(unsigned long long *)v = 0;
  return 0;
}
X void **__cudaRegisterFatBinary(void *p) {
  static void *h;
  return &h;
}
X unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st *t) { return 0; }
X cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *t) {
  g->x = g->y = g->z = b->x = b->y = b->z = 1;
  *s = 0;
  *(void **)t = 0;
  return 0;
}
X cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *u) {
  f(u);
  return 0;
}
X cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *u, unsigned g) {
  f(s, 0, u);
  return 0;
}
