// No-op CUDA driver.
#define _GNU_SOURCE
#include "attributes.h"
#include <stddef.h>
#include <stdint.h>
#include <string.h>
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) {
  *v = 13000;
  return 0;
}
int cuDeviceGetCount(int *n) {
  *n = 1;
  return 0;
}
int cuDeviceGet(int *d, int o) {
  *d = o;
  return 0;
}
int cuDeviceGetAttribute(int *v, int a, int d) {
  *v = attribute(a);
  return 0;
}
int cuDeviceGetName(char *b, int n, int d) {
  strncpy(b, "NVIDIA H100 80GB HBM3", n);
  return 0;
}
static int ctx;
int cuCtxGetCurrent(void **c) {
  *c = &ctx;
  return 0;
}
int cuCtxSetCurrent(void *c) { return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) {
  *c = &ctx;
  return 0;
}
int cuCtxGetDevice(int *d) {
  *d = 0;
  return 0;
}
int cuModuleLoadData(void **m, const void *p) {
  static long id = 4096;
  *m = (void *)(id += 16);
  return 0;
}
int cuModuleGetFunction(void **f, void *m, const char *n) {
  static long id = 1 << 20;
  *f = (void *)(id += 16);
  return 0;
}
int cuFuncGetAttribute(int *v, int a, void *f) {
  *v = a == 0 ? 1024 : a == 4 ? 32 : 0;
  return 0;
}
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuFuncSetCacheConfig(void *f, int c) { return 0; }
// What the driver would refuse: an empty or too large grid, more threads or shared memory than a block can have.
typedef struct {
  unsigned grid[3], block[3], shared;
} Launch;
int cuLaunchKernelEx(const Launch *c, void *f, void **p, void **e) {
  unsigned threads = c->block[0] * c->block[1] * c->block[2];
  int fits =
      c->grid[0] && c->grid[1] && c->grid[2] && c->grid[0] <= 2147483647u && c->grid[1] <= 65535 && c->grid[2] <= 65535;
  return fits && threads && threads <= 1024 && c->shared <= 232448 && f ? 0 : 1;
}
int cuLaunchKernel(void) { return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, const void *c) {
  *n = 1;
  return 0;
}
int cuPointerGetAttribute(void *v, int a, uintptr_t p) {
  memset(v, 0, 4);
  if (a == 3)
    *(uintptr_t *)v = p;
  return 0;
}
int cuGetErrorString(int e, const char **s) {
  *s = "stand-in driver error";
  return 0;
}
int cuGetErrorName(int e, const char **s) {
  *s = "standIn";
  return 0;
}
static int nop(void) { return 0; }
int cuGetProcAddress_v2(const char *s, void **f, int v, uint64_t g, int *r) {
  *f = nop;
  if (r)
    *r = 0;
  return 0;
}
int cuGetProcAddress(const char *s, void **f, int v, uint64_t g) {
  *f = nop;
  return 0;
}
int cuCtxGetLimit(size_t *v, int l) {
  *v = 1 << 20;
  return 0;
}
int cuCtxSetLimit(int l, size_t v) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuMemGetAllocationGranularity(size_t *g, const void *p, int o) {
  *g = 2 << 20;
  return 0;
}
int cuMemAddressFree(void) { return 0; }
int cuMemAddressReserve(void) { return 100; }
int cuMemCreate(void) { return 100; }
int cuMemMap(void) { return 100; }
int cuMemRelease(void) { return 0; }
int cuMemSetAccess(void) { return 0; }
int cuMemUnmap(void) { return 0; }
int cuStreamSynchronize(void *s) { return 0; }
int cuModuleUnload(void *m) { return 0; }
int cuStreamGetCaptureInfo(void) { return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) {
  *f = 0;
  *a = 1;
  return 0;
}
int cuDeviceGetUuid(void *u, int d) {
  memset(u, 1, 16);
  return 0;
}
int cuDeviceGetUuid_v2(void *u, int d) {
  memset(u, 1, 16);
  return 0;
}
int cuModuleLoad(void **m, const char *p) { return cuModuleLoadData(m, p); }
int cuModuleLoadDataEx(void **m, const void *p, unsigned n, void *o, void *v) { return cuModuleLoadData(m, p); }
int cuCtxGetStreamPriorityRange(int *a, int *b) {
  *a = 0;
  *b = -5;
  return 0;
}
