/* stand-in for libnvidia-ml.so.1: one H100, for rehearsals on a machine without a GPU */
#include <string.h>
typedef unsigned long long u64;
int nvmlInit_v2(void) { return 0; }
int nvmlInit(void) { return 0; }
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int r) { return "stub"; }
int nvmlDeviceGetCount_v2(unsigned *n) {
  *n = 1;
  return 0;
}
int nvmlDeviceGetCount(unsigned *n) {
  *n = 1;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) {
  *h = (void *)1;
  return 0;
}
int nvmlDeviceGetHandleByIndex(unsigned i, void **h) {
  *h = (void *)1;
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char *s, void **h) {
  *h = (void *)1;
  return 0;
}
int nvmlDeviceGetIndex(void *h, unsigned *i) {
  *i = 0;
  return 0;
}
int nvmlDeviceGetName(void *h, char *b, unsigned n) {
  strncpy(b, "NVIDIA H100 80GB HBM3", n);
  return 0;
}
int nvmlDeviceGetUUID(void *h, char *b, unsigned n) {
  strncpy(b, "GPU-00000000-0000-0000-0000-000000000001", n);
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *h, int *a, int *b) {
  *a = 9;
  *b = 0;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *h, u64 *m) {
  m[0] = 80ull << 30;
  m[1] = 79ull << 30;
  m[2] = 1ull << 30;
  return 0;
}
int nvmlSystemGetDriverVersion(char *b, unsigned n) {
  strncpy(b, "580.159.04", n);
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *v) {
  *v = 13000;
  return 0;
}
int nvmlSystemGetCudaDriverVersion(int *v) {
  *v = 13000;
  return 0;
}
