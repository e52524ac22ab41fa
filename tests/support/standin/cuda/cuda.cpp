// The functions of libcuda that fomoe calls, on top of the stand-in's HIP: one device, waves of 32.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

#define API extern "C" __attribute__((visibility("default")))

extern "C" {  // of libamdhip64, which has the same error codes
int hipSetDevice(int);
int hipMemGetInfo(size_t*, size_t*);
int hipMalloc(void**, size_t);
int hipFree(void*);
int hipHostMalloc(void**, size_t, unsigned);
int hipHostFree(void*);
int hipHostRegister(void*, size_t, unsigned);
int hipHostUnregister(void*);
int hipHostGetDevicePointer(void**, void*, unsigned);
int hipStreamCreateWithFlags(void**, unsigned);
int hipStreamDestroy(void*);
int hipStreamQuery(void*);
int hipStreamWaitEvent(void*, void*, unsigned);
int hipEventCreateWithFlags(void**, unsigned);
int hipEventDestroy(void*);
int hipEventRecord(void*, void*);
int hipEventQuery(void*);
int hipEventElapsedTime(float*, void*, void*);
int hipMemcpyAsync(void*, const void*, size_t, int, void*);
int hipMemsetAsync(void*, int, size_t, void*);
int hipModuleLoadData(void**, const void*);
int hipModuleUnload(void*);
int hipModuleGetFunction(void**, void*, const char*);
int hipModuleLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                          unsigned, void*, void**, void**);
int hipStreamBeginCapture(void*, int);
int hipStreamEndCapture(void*, void**);
int hipGraphInstantiateWithFlags(void**, void*, unsigned long long);
int hipGraphLaunch(void*, void*);
int hipGraphExecDestroy(void*);
int hipGraphDestroy(void*);
const char* hipGetErrorString(int);
}

namespace {

constexpr int kNotFound = 500, kInvalidContext = 201;
thread_local bool has_context;
int retained;

// CUdevice_attribute
constexpr int kWarp = 10, kCores = 16, kMajor = 75, kMinor = 76, kShared = 97;

}  // namespace

// How cuda.bindings finds every function but this one.
API int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : kNotFound;
}
API int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags,
                         int* status) {
  return cuGetProcAddress_v2(name, function, version, flags, status);
}
API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
API int cuDeviceGetCount(int* n) { return *n = 1, 0; }
API int cuDeviceGet(int* device, int index) { return *device = index, 0; }
API int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case kWarp:
      return *value = 32, 0;
    case kCores:
      return *value = 4, 0;
    case kMajor:
      return *value = 9, 0;
    case kMinor:
      return *value = 0, 0;
    case kShared:
      return *value = 64 << 10, 0;
    default:
      return 1;
  }
}
API int cuDevicePrimaryCtxRetain(void** context, int) {
  return *context = &retained, retained++, 0;
}
API int cuDevicePrimaryCtxRelease(int) { return retained-- > 0 ? 0 : kInvalidContext; }
API int cuCtxSetCurrent(void* context) { return has_context = context != nullptr, hipSetDevice(0); }
API int cuGetErrorString(int error, const char** text) {
  return *text = hipGetErrorString(error), 0;
}

API int cuMemGetInfo(size_t* free, size_t* total) {
  return has_context ? hipMemGetInfo(free, total) : kInvalidContext;
}
API int cuMemAlloc(void** p, size_t n) { return has_context ? hipMalloc(p, n) : kInvalidContext; }
API int cuMemFree(void* p) { return hipFree(p); }
API int cuMemHostAlloc(void** p, size_t n, unsigned flags) { return hipHostMalloc(p, n, flags); }
API int cuMemFreeHost(void* p) { return hipHostFree(p); }
API int cuMemHostRegister(void* p, size_t n, unsigned flags) {
  return hipHostRegister(p, n, flags);
}
API int cuMemHostUnregister(void* p) { return hipHostUnregister(p); }
API int cuMemHostGetDevicePointer(void** device, void* host, unsigned flags) {
  return hipHostGetDevicePointer(device, host, flags);
}
API int cuMemcpyAsync(void* to, const void* from, size_t n, void* stream) {
  return hipMemcpyAsync(to, from, n, 4, stream);
}
API int cuMemsetD8Async(void* to, unsigned char value, size_t n, void* stream) {
  return hipMemsetAsync(to, value, n, stream);
}

API int cuStreamCreate(void** stream, unsigned flags) {
  return has_context ? hipStreamCreateWithFlags(stream, flags) : kInvalidContext;
}
API int cuStreamDestroy(void* stream) { return hipStreamDestroy(stream); }
API int cuStreamQuery(void* stream) { return hipStreamQuery(stream); }
API int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
  return hipStreamWaitEvent(stream, event, flags);
}
API int cuEventCreate(void** event, unsigned flags) {
  return hipEventCreateWithFlags(event, flags);
}
API int cuEventDestroy(void* event) { return hipEventDestroy(event); }
API int cuEventRecord(void* event, void* stream) { return hipEventRecord(event, stream); }
API int cuEventQuery(void* event) { return hipEventQuery(event); }
API int cuEventElapsedTime(float* ms, void* start, void* end) {
  return hipEventElapsedTime(ms, start, end);
}

API int cuModuleLoadData(void** module, const void* image) {
  return hipModuleLoadData(module, image);
}
API int cuModuleUnload(void* module) { return hipModuleUnload(module); }
API int cuModuleGetFunction(void** function, void* module, const char* name) {
  return hipModuleGetFunction(function, module, name);
}
API int cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
API int cuFuncSetAttribute(void*, int, int) { return 0; }
API int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty,
                       unsigned tz, unsigned shared, void* stream, void** arguments, void** extra) {
  return hipModuleLaunchKernel(f, gx, gy, gz, tx, ty, tz, shared, stream, arguments, extra);
}
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], group[3], shared;
  void* stream;
  void* attributes;  // what they allow, running in order allows as well
  unsigned n_attributes;
};
API int cuLaunchKernelEx(const LaunchConfig* c, void* f, void** arguments, void** extra) {
  return hipModuleLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->group[0], c->group[1],
                               c->group[2], c->shared, c->stream, arguments, extra);
}

API int cuStreamBeginCapture(void* stream, int mode) { return hipStreamBeginCapture(stream, mode); }
API int cuStreamEndCapture(void* stream, void** graph) {
  return hipStreamEndCapture(stream, graph);
}
API int cuGraphInstantiateWithFlags(void** instance, void* graph, unsigned long long flags) {
  return hipGraphInstantiateWithFlags(instance, graph, flags);
}
API int cuGraphLaunch(void* instance, void* stream) { return hipGraphLaunch(instance, stream); }
API int cuGraphExecDestroy(void* instance) { return hipGraphExecDestroy(instance); }
API int cuGraphDestroy(void* graph) { return hipGraphDestroy(graph); }
