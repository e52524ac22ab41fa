// The functions of libamdhip64 that fomoe calls. Device 0 has waves of 32 lanes, device 1 of 64.
#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine.h"
#include "hip_types.h"
#include "runtime.h"

using namespace standin;
#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kMemoryBytes = size_t(8) << 30;
constexpr int kDevices = 2;

struct Range {
  size_t bytes;
  int kind;  // 1 device, 2 pinned by allocation, 3 registered
};

struct Module {
  void* library;
};

struct Function {
  Kernel kernel;
  std::vector<unsigned> sizes;  // of its arguments
};

std::mutex memory_mutex;
std::map<const char*, Range> memory;
size_t memory_used;
thread_local int current_device;

double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

hipError_t failed(const std::string& problem) {
  if (problem.empty()) return hipSuccess;
  fprintf(stderr, "emulated GPU: %s\n", problem.c_str());
  return hipErrorLaunchFailure;
}

// The allocation that holds all of [p, p + n), or nothing; `outside` if p lies in one that is too
// short.
const Range* find(const void* p, size_t n, bool& outside) {
  auto it = memory.upper_bound(static_cast<const char*>(p));
  outside = false;
  if (it == memory.begin()) return nullptr;
  --it;
  const size_t offset = static_cast<const char*>(p) - it->first;
  if (offset >= it->second.bytes) return nullptr;
  outside = offset + n > it->second.bytes;
  return outside ? nullptr : &it->second;
}

hipError_t allocate(void** p, size_t n, int kind) {
  std::lock_guard lock(memory_mutex);
  if (n == 0 || memory_used + n > kMemoryBytes)
    return n ? hipErrorOutOfMemory : hipErrorInvalidValue;
  const size_t rounded = (n + 4095) / 4096 * 4096;
  *p = aligned_alloc(4096, rounded);
  if (!*p) return hipErrorOutOfMemory;
  memset(*p, 0xff, std::min<size_t>(rounded, 1 << 20));  // fresh memory is not zero on a GPU either
  memory[static_cast<char*>(*p)] = {n, kind};
  if (kind == 1) memory_used += n;
  return hipSuccess;
}

hipError_t release(void* p, int kind) {
  const std::string problem = Runtime::get().drain_all();
  std::lock_guard lock(memory_mutex);
  auto it = memory.find(static_cast<char*>(p));
  if (it == memory.end() || it->second.kind != kind) return hipErrorInvalidValue;
  if (kind == 1) memory_used -= it->second.bytes;
  memory.erase(it);
  free(p);
  return failed(problem);
}

Stream* stream_of(void* handle) { return static_cast<Stream*>(handle); }
using EventHandle = std::shared_ptr<Event>;
EventHandle& event_of(void* handle) { return *static_cast<EventHandle*>(handle); }

hipError_t put(void* stream, std::function<std::string()> work) {
  Runtime::get().put(stream_of(stream), {std::move(work), nullptr, 0});
  return hipSuccess;
}

// Bytes that a copy reads: a snapshot if the source is pageable, as the real runtime stages it.
std::shared_ptr<std::vector<char>> staged(const void* source, size_t n) {
  bool outside;
  if (find(source, n, outside)) return nullptr;
  const char* bytes = static_cast<const char*>(source);
  return std::make_shared<std::vector<char>>(bytes, bytes + n);
}

}  // namespace

API void fm_standin_seed(unsigned long long seed) { Runtime::get().set_seed(seed); }

// ---- devices
API hipError_t hipGetDeviceCount(int* n) { return *n = kDevices, hipSuccess; }
API hipError_t hipSetDevice(int device) {
  if (device < 0 || device >= kDevices) return hipErrorInvalidDevice;
  current_device = device;
  return hipSuccess;
}
API hipError_t hipRuntimeGetVersion(int* version) { return *version = 70000000, hipSuccess; }
API const char* hipGetErrorString(hipError_t error) {
  switch (error) {
    case hipSuccess:
      return "no error";
    case hipErrorInvalidValue:
      return "invalid argument";
    case hipErrorOutOfMemory:
      return "out of memory";
    case hipErrorInvalidDevice:
      return "invalid device ordinal";
    case hipErrorNotReady:
      return "device not ready";
    case hipErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "error of the emulated GPU";
  }
}
API hipError_t hipGetDevicePropertiesR0600(void* properties, int device) {
  if (device < 0 || device >= kDevices) return hipErrorInvalidDevice;
  auto* p = static_cast<char*>(properties);
  auto set_int = [&](size_t offset, int value) { memcpy(p + offset, &value, sizeof(value)); };
  auto set_size = [&](size_t offset, size_t value) { memcpy(p + offset, &value, sizeof(value)); };
  memset(p, 0, kPropBytes);
  strcpy(p + kPropName, "fomoe emulated GPU");
  strcpy(p + kPropArch, "cpu");
  set_size(kPropMemory, kMemoryBytes);
  set_size(kPropShared, 64 << 10);
  set_size(kPropSharedOptIn, 64 << 10);
  set_int(kPropWave, device == 0 ? 32 : 64);
  set_int(kPropThreads, 1024);
  set_int(kPropCores, 4);
  return hipSuccess;
}

// ---- memory
API hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard lock(memory_mutex);
  *free = kMemoryBytes - memory_used;
  *total = kMemoryBytes;
  return hipSuccess;
}
API hipError_t hipMalloc(void** p, size_t n) { return allocate(p, n, 1); }
API hipError_t hipFree(void* p) { return p ? release(p, 1) : hipSuccess; }
API hipError_t hipHostMalloc(void** p, size_t n, unsigned) { return allocate(p, n, 2); }
API hipError_t hipHostFree(void* p) { return p ? release(p, 2) : hipSuccess; }
API hipError_t hipHostRegister(void* p, size_t n, unsigned) {
  std::lock_guard lock(memory_mutex);
  bool outside;
  if (find(p, 1, outside)) return hipErrorInvalidValue;
  memory[static_cast<char*>(p)] = {n, 3};
  return hipSuccess;
}
API hipError_t hipHostUnregister(void* p) {
  const std::string problem = Runtime::get().drain_all();
  std::lock_guard lock(memory_mutex);
  auto it = memory.find(static_cast<char*>(p));
  if (it == memory.end() || it->second.kind != 3) return hipErrorInvalidValue;
  memory.erase(it);
  return failed(problem);
}
API hipError_t hipHostGetDevicePointer(void** device, void* host, unsigned) {
  std::lock_guard lock(memory_mutex);
  bool outside;
  if (!find(host, 1, outside)) return hipErrorInvalidValue;
  return *device = host, hipSuccess;
}

// ---- streams and events
API hipError_t hipStreamCreateWithFlags(void** stream, unsigned) {
  return *stream = Runtime::get().open_stream(), hipSuccess;
}
API hipError_t hipStreamDestroy(void* stream) {
  return Runtime::get().close_stream(stream_of(stream)), hipSuccess;
}
API hipError_t hipStreamQuery(void* stream) {
  bool idle;
  std::string problem = Runtime::get().poll(stream_of(stream), idle);
  if (!problem.empty()) return failed(problem);
  return idle ? hipSuccess : hipErrorNotReady;
}
API hipError_t hipEventCreateWithFlags(void** event, unsigned) {
  return *event = new EventHandle(std::make_shared<Event>()), hipSuccess;
}
API hipError_t hipEventDestroy(void* event) {
  return delete static_cast<EventHandle*>(event), hipSuccess;
}
API hipError_t hipEventRecord(void* event, void* stream) {
  EventHandle e = event_of(event);
  Runtime& runtime = Runtime::get();
  unsigned count;
  {
    std::lock_guard lock(runtime.mutex);
    e->captured_by = stream_of(stream)->captured_by;
    if (e->captured_by) return hipSuccess;  // inside a graph the order is that of issue
    count = ++e->asked;
  }
  return put(stream, [e, count, &runtime] {
    std::lock_guard lock(runtime.mutex);
    e->happened = count;
    e->at_ms = now_ms();
    return std::string();
  });
}
API hipError_t hipStreamWaitEvent(void* stream, void* event, unsigned) {
  EventHandle e = event_of(event);
  unsigned count;
  {
    std::lock_guard lock(Runtime::get().mutex);
    if (e->captured_by) return stream_of(stream)->captured_by = e->captured_by, hipSuccess;
    count = e->asked;
  }
  Runtime::get().put(stream_of(stream), {nullptr, e, count});
  return hipSuccess;
}
API hipError_t hipEventQuery(void* event) {
  std::lock_guard lock(Runtime::get().mutex);
  Runtime::get().hurry();
  return event_of(event)->happened == event_of(event)->asked ? hipSuccess : hipErrorNotReady;
}
API hipError_t hipEventElapsedTime(float* ms, void* from, void* to) {
  std::lock_guard lock(Runtime::get().mutex);
  return *ms = float(event_of(to)->at_ms - event_of(from)->at_ms), hipSuccess;
}

// ---- copies
API hipError_t hipMemcpyAsync(void* to, const void* from, size_t n, int, void* stream) {
  std::shared_ptr<std::vector<char>> copy;
  {
    std::lock_guard lock(memory_mutex);
    bool outside_to, outside_from;
    find(to, n, outside_to);
    find(from, n, outside_from);
    if (outside_to || outside_from) return hipErrorInvalidValue;
    copy = staged(from, n);
  }
  return put(stream, [=] {
    memcpy(to, copy ? copy->data() : from, n);
    return std::string();
  });
}
API hipError_t hipMemsetAsync(void* to, int value, size_t n, void* stream) {
  return put(stream, [=] {
    memset(to, value, n);
    return std::string();
  });
}

// ---- modules and launches
API hipError_t hipModuleLoadData(void** module, const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return hipErrorInvalidImage;
  const size_t bytes = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
  char path[] = "/tmp/fomoe_module_XXXXXX";
  const int file = mkstemp(path);
  if (file < 0) return hipErrorInvalidImage;
  const bool whole = write(file, image, bytes) == ssize_t(bytes);
  close(file);
  void* library = whole ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path);
  if (!library)
    return fprintf(stderr, "emulated GPU: %s\n", whole ? dlerror() : "disk full"),
           hipErrorInvalidImage;
  return *module = new Module{library}, hipSuccess;
}
API hipError_t hipModuleUnload(void* module) {
  Runtime::get().drain_all();
  dlclose(static_cast<Module*>(module)->library);
  return delete static_cast<Module*>(module), hipSuccess;
}
API hipError_t hipModuleGetFunction(void** function, void* module, const char* name) {
  void* library = static_cast<Module*>(module)->library;
  auto symbol = [&](const std::string& text) { return dlsym(library, text.c_str()); };
  auto sizes = reinterpret_cast<unsigned (*)(unsigned*)>(symbol(std::string("fm_sizes_") + name));
  if (!sizes) return hipErrorNotFound;
  auto* f = new Function;
  f->sizes.resize(256);
  f->sizes.resize(sizes(f->sizes.data()));
  f->kernel.name = name;
  f->kernel.call = reinterpret_cast<fm_cpu::Kernel>(symbol(std::string("fm_call_") + name));
  f->kernel.bind = reinterpret_cast<void (*)(fm_cpu::Engine*)>(symbol("fm_bind"));
  f->kernel.wave = *static_cast<unsigned*>(symbol("fm_wave"));
  reinterpret_cast<void (*)(unsigned char**, unsigned char**)>(symbol("fm_shared_range"))(
      &f->kernel.shared_begin, &f->kernel.shared_end);
  return *function = f, hipSuccess;
}
API hipError_t hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz,
                                     unsigned tx, unsigned ty, unsigned tz, unsigned dynamic,
                                     void* stream, void** arguments, void**) {
  auto* f = static_cast<Function*>(function);
  std::vector<std::vector<char>> values;  // taken now, as the real runtime does
  for (size_t i = 0; i < f->sizes.size(); i++) {
    const char* value = static_cast<const char*>(arguments[i]);
    values.emplace_back(value, value + f->sizes[i]);
  }
  const Shape shape{{gx, gy, gz}, {tx, ty, tz}, dynamic};
  return put(stream, [f, shape, values]() mutable {
    std::vector<void*> addresses;
    for (auto& value : values) addresses.push_back(value.data());
    return run(f->kernel, shape, addresses.data(), Runtime::get().next_seed());
  });
}

// ---- graphs
API hipError_t hipStreamBeginCapture(void* stream, int) {
  std::lock_guard lock(Runtime::get().mutex);
  stream_of(stream)->captured_by = new Graph;
  return hipSuccess;
}
API hipError_t hipStreamEndCapture(void* stream, void** graph) {
  std::lock_guard lock(Runtime::get().mutex);
  *graph = stream_of(stream)->captured_by;
  Runtime::get().end_capture(stream_of(stream)->captured_by);
  return *graph ? hipSuccess : hipErrorInvalidValue;
}
API hipError_t hipGraphInstantiateWithFlags(void** instance, void* graph, unsigned long long) {
  return *instance = new Graph(*static_cast<Graph*>(graph)), hipSuccess;
}
API hipError_t hipGraphLaunch(void* instance, void* stream) {
  for (const Operation& operation : static_cast<Graph*>(instance)->operations)
    Runtime::get().put(stream_of(stream), operation);
  return hipSuccess;
}
API hipError_t hipGraphExecDestroy(void* instance) {
  Runtime::get().drain_all();
  return delete static_cast<Graph*>(instance), hipSuccess;
}
API hipError_t hipGraphDestroy(void* graph) {
  return delete static_cast<Graph*>(graph), hipSuccess;
}
