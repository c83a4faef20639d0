// Memory of the stand-in: device memory is host memory, copies are real.
#define _GNU_SOURCE
#include "standin.h"
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
typedef struct {
  char *p;
  size_t n;
  int dev;
} R;
static R reg[1 << 16];
static int nreg;
static size_t used;
__thread cudaError_t last;
void *reserve(size_t n, int dev) {
  if (!n)
    n = 1;
  n = (n + 4095) & ~4095ul;
  char *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    return 0;
  pthread_mutex_lock(&mu);
  int i = 0;
  while (i < nreg && reg[i].p)
    i++;
  if (i == nreg)
    nreg++;
  reg[i] = (R){p, n, dev};
  if (dev)
    used += n;
  pthread_mutex_unlock(&mu);
  return p;
}
static void put(void *q) {
  if (!q)
    return;
  pthread_mutex_lock(&mu);
  for (int i = 0; i < nreg; i++)
    if (reg[i].p == q) {
      munmap(q, reg[i].n);
      if (reg[i].dev)
        used -= reg[i].n;
      reg[i].p = 0;
      break;
    }
  pthread_mutex_unlock(&mu);
}
static int where(const void *q) {
  int r = -1;
  pthread_mutex_lock(&mu);
  for (int i = 0; i < nreg; i++)
    if (reg[i].p && (char *)q >= reg[i].p && (char *)q < reg[i].p + reg[i].n) {
      r = reg[i].dev;
      break;
    }
  pthread_mutex_unlock(&mu);
  return r;
}
X cudaError_t cudaMalloc(void **p, size_t n) {
  if (used + n > (78ul << 30)) {
    last = cudaErrorMemoryAllocation;
    return last;
  }
  *p = reserve(n, 1);
  return 0;
}
X cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) {
  *p = reserve(n, 1);
  return 0;
}
X cudaError_t cudaFree(void *p) {
  put(p);
  return 0;
}
X cudaError_t cudaFreeAsync(void *p, cudaStream_t s) {
  put(p);
  return 0;
}
X cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) {
  *p = reserve(n, 0);
  return 0;
}
X cudaError_t cudaFreeHost(void *p) {
  put(p);
  return 0;
}
X cudaError_t cudaHostGetDevicePointer(void **d, void *h, unsigned f) {
  *d = h;
  return 0;
}
X cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) { return 0; }
X cudaError_t cudaHostUnregister(void *p) { return 0; }
static void cp(void *d, const void *s, size_t n) {
  if (n <= (256ul << 20))
    memmove(d, s, n);
}
X cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  cp(d, s, n);
  return 0;
}
X cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  cp(d, s, n);
  return 0;
}
X cudaError_t cudaMemcpyPeerAsync(void *d, int a, const void *s, int b, size_t n, cudaStream_t t) {
  cp(d, s, n);
  return 0;
}
X cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k,
                                cudaStream_t t) {
  for (size_t i = 0; i < h; i++)
    memmove((char *)d + i * dp, (char *)s + i * sp, w);
  return 0;
}
X cudaError_t cudaMemcpyToSymbol(const void *a, const void *s, size_t n, size_t o, enum cudaMemcpyKind k) { return 0; }
X cudaError_t cudaMemset(void *p, int v, size_t n) {
  if (n <= (64ul << 20))
    memset(p, v, n);
  return 0;
}
X cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) {
  if (n <= (64ul << 20))
    memset(p, v, n);
  return 0;
}
X cudaError_t cudaMemGetInfo(size_t *f, size_t *t) {
  *t = 80ul << 30;
  *f = (79ul << 30) - used;
  return 0;
}
X cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  int w = where(p);
  a->type = w == 1 ? cudaMemoryTypeDevice : w == 0 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = w >= 0 ? 0 : -1;
  a->devicePointer = (void *)p;
  a->hostPointer = w == 1 ? 0 : (void *)p;
  return 0;
}
