// A libcuda.so.1 in host memory, for driver.py: the calls it makes, in the driver's own signatures, and one kernel.
//
// The kernel copies: its argument is {to, from, bytes}. As the driver, it may be called by several threads, and wants
// the context current in each. FAKE_FAIL=NAME:N:CODE makes the N-th call of NAME return CODE.
// FAKE_GPUS, FAKE_MAJOR and FAKE_PER_SM are what the machine has; with FAKE_HANGS the first stream is never done. When
// the process ends, a line on stderr says what was not given back.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

using Status = int;
constexpr Status kSuccess = 0, kOutOfMemory = 2, kNoContext = 201, kNotFound = 500, kNotReady = 600;

std::map<std::string, int> calls;
int live_memory, live_pinned, live_libraries, live_streams, live_events, live_contexts;
char streams[4];
std::mutex one_at_a_time;  // bindings call without Python's lock
thread_local void* current = nullptr;

struct Library {  // its kernel and its function are itself
  size_t shared_of_function = 49152;
};

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

Status entered(const char* name) {
  const int n = calls[name]++;
  char failing[64];
  int at, code;
  const char* text = std::getenv("FAKE_FAIL");
  const bool fails =
      text && std::sscanf(text, "%63[^:]:%d:%d", failing, &at, &code) == 3 && name == std::string(failing);
  return fails && n == at ? code : kSuccess;
}

#define CALL(name)                                       \
  const std::lock_guard<std::mutex> turn(one_at_a_time); \
  if (const Status status = entered(name); status != kSuccess) return status
#define CALL_IN_CONTEXT(name) \
  CALL(name);                 \
  if (current != &live_contexts) return kNoContext

struct Report {
  ~Report() {
    std::fprintf(stderr, "left: memory %d pinned %d libraries %d streams %d events %d contexts %d\n", live_memory,
                 live_pinned, live_libraries, live_streams, live_events, live_contexts);
  }
} report;

Status init(unsigned) {
  CALL("cuInit");
  return kSuccess;
}
Status driver_version(int* version) {
  *version = 13010;
  return kSuccess;
}
Status device_count(int* n) {
  *n = setting("FAKE_GPUS", 1);
  return kSuccess;
}
Status device_get(int* device, int index) {
  *device = index;
  return kSuccess;
}
Status device_name(char* name, int size, int) {
  std::snprintf(name, size, "Fake GPU");
  return kSuccess;
}
Status device_uuid(unsigned char* uuid, int) {
  for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(0x10 + i);
  return kSuccess;
}
Status device_memory(size_t* n, int) {
  *n = size_t{80} << 30;
  return kSuccess;
}
Status device_attribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16:
      *value = 132;
      return kSuccess;  // multiprocessors
    case 97:
      *value = 232448;
      return kSuccess;  // shared memory of a block
    case 75:
      *value = setting("FAKE_MAJOR", 9);
      return kSuccess;
    case 76:
      *value = 0;
      return kSuccess;
    default:
      return 1;
  }
}
Status context_retain(void** context, int) {
  CALL("cuDevicePrimaryCtxRetain");
  ++live_contexts;
  *context = &live_contexts;
  return kSuccess;
}
Status context_release(int) {
  CALL("cuDevicePrimaryCtxRelease");
  --live_contexts;
  return kSuccess;
}
Status context_set(void* context) {
  current = context;
  return context == &live_contexts ? kSuccess : kNoContext;
}
Status stream_create(void** stream, unsigned flags) {
  CALL_IN_CONTEXT("cuStreamCreate");
  *stream = streams + live_streams++;
  return flags == 1 ? kSuccess : 1;
}
bool is_stream(const void* stream) { return stream >= streams && stream < streams + live_streams; }
Status stream_destroy(void*) {
  CALL_IN_CONTEXT("cuStreamDestroy");
  --live_streams;
  return kSuccess;
}
Status stream_synchronize(void* stream) {
  CALL_IN_CONTEXT("cuStreamSynchronize");
  return is_stream(stream) ? kSuccess : 400;
}
Status stream_query(void* stream) {
  CALL_IN_CONTEXT("cuStreamQuery");
  if (!is_stream(stream)) return 400;
  return stream == streams && setting("FAKE_HANGS", 0) ? kNotReady : kSuccess;
}
Status memory_allocate(uint64_t* address, size_t n_bytes) {
  CALL_IN_CONTEXT("cuMemAlloc");
  if (n_bytes > (size_t{1} << 30)) return kOutOfMemory;
  ++live_memory;
  *address = reinterpret_cast<uint64_t>(std::malloc(n_bytes));
  return kSuccess;
}
Status memory_free(uint64_t address) {
  CALL_IN_CONTEXT("cuMemFree");
  --live_memory;
  std::free(reinterpret_cast<void*>(address));
  return kSuccess;
}
Status memory_info(size_t* free_bytes, size_t* total) {
  CALL_IN_CONTEXT("cuMemGetInfo");
  *free_bytes = 5000;
  *total = 9000;
  return kSuccess;
}
Status pinned_allocate(void** memory, size_t n_bytes, unsigned) {
  CALL_IN_CONTEXT("cuMemHostAlloc");
  ++live_pinned;
  *memory = std::malloc(n_bytes);
  return kSuccess;
}
Status pinned_free(void* memory) {
  CALL_IN_CONTEXT("cuMemFreeHost");
  --live_pinned;
  std::free(memory);
  return kSuccess;
}
Status copy_to(uint64_t to, const void* from, size_t n_bytes, void* stream) {
  CALL_IN_CONTEXT("cuMemcpyHtoDAsync");
  std::memcpy(reinterpret_cast<void*>(to), from, n_bytes);
  return is_stream(stream) ? kSuccess : 400;
}
Status copy_from(void* to, uint64_t from, size_t n_bytes, void* stream) {
  CALL_IN_CONTEXT("cuMemcpyDtoHAsync");
  std::memcpy(to, reinterpret_cast<void*>(from), n_bytes);
  return is_stream(stream) ? kSuccess : 400;
}
Status fill(uint64_t to, unsigned char value, size_t n_bytes, void*) {
  CALL_IN_CONTEXT("cuMemsetD8Async");
  std::memset(reinterpret_cast<void*>(to), value, n_bytes);
  return kSuccess;
}
Status library_load(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  CALL_IN_CONTEXT("cuLibraryLoadData");
  if (std::memcmp(code, "cubin", 5) != 0) return 200;
  ++live_libraries;
  *library = new Library;
  return kSuccess;
}
Status library_unload(void* library) {
  CALL("cuLibraryUnload");
  --live_libraries;
  delete static_cast<Library*>(library);
  return kSuccess;
}
Status library_kernel(void** kernel, void* library, const char* name) {
  *kernel = library;
  return std::string(name) == "copy" ? kSuccess : kNotFound;
}
Status kernel_attribute(int attribute, int value, void* kernel, int) {
  CALL("cuKernelSetAttribute");
  return kernel && attribute == 8 && value <= 232448 ? kSuccess : 1;
}
Status kernel_function(void** function, void* kernel) {
  *function = kernel;
  return kSuccess;
}
Status function_attribute(void* function, int attribute, int value) {
  CALL_IN_CONTEXT("cuFuncSetAttribute");
  static_cast<Library*>(function)->shared_of_function = static_cast<size_t>(value);
  return attribute == 8 ? kSuccess : 1;
}
Status occupancy(int* blocks, void* function, int threads, size_t shared) {
  const bool fits = threads == 288 && shared <= static_cast<Library*>(function)->shared_of_function;
  *blocks = fits ? setting("FAKE_PER_SM", 1) : 0;
  return kSuccess;
}
Status launch(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
              void* stream, void** arguments) {
  CALL_IN_CONTEXT("cuLaunchCooperativeKernel");
  if (x != 132 || y != 1 || z != 1 || threads != 288 || stream != streams) return 1;
  if (shared != static_cast<Library*>(function)->shared_of_function) return 1;
  const uint64_t* argument = static_cast<const uint64_t*>(arguments[0]);
  std::memcpy(reinterpret_cast<void*>(argument[0]), reinterpret_cast<void*>(argument[1]), argument[2]);
  return kSuccess;
}
Status event_create(void** event, unsigned) {
  CALL_IN_CONTEXT("cuEventCreate");
  ++live_events;
  *event = &live_events;
  return kSuccess;
}
Status event_destroy(void*) {
  CALL_IN_CONTEXT("cuEventDestroy");
  --live_events;
  return kSuccess;
}
Status event_record(void*, void*) { return kSuccess; }
Status event_synchronize(void*) {
  CALL_IN_CONTEXT("cuEventSynchronize");
  return kSuccess;
}
Status event_query(void*) {
  CALL_IN_CONTEXT("cuEventQuery");
  return setting("FAKE_HANGS", 0) ? kNotReady : kSuccess;
}
Status event_elapsed(float* ms, void*, void*) {
  *ms = 2.5f;
  return kSuccess;
}
Status error_string(Status status, const char** text) {
  *text = status == 719 ? "unspecified launch failure" : "text of the fake driver";
  return kSuccess;
}

const std::map<std::string, void*> kFunctions = {
    {"cuInit", reinterpret_cast<void*>(init)},
    {"cuDriverGetVersion", reinterpret_cast<void*>(driver_version)},
    {"cuDeviceGetCount", reinterpret_cast<void*>(device_count)},
    {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
    {"cuDeviceGetName", reinterpret_cast<void*>(device_name)},
    {"cuDeviceGetUuid", reinterpret_cast<void*>(device_uuid)},
    {"cuDeviceTotalMem", reinterpret_cast<void*>(device_memory)},
    {"cuDeviceGetAttribute", reinterpret_cast<void*>(device_attribute)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(context_retain)},
    {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(context_release)},
    {"cuCtxSetCurrent", reinterpret_cast<void*>(context_set)},
    {"cuStreamCreate", reinterpret_cast<void*>(stream_create)},
    {"cuStreamDestroy", reinterpret_cast<void*>(stream_destroy)},
    {"cuStreamSynchronize", reinterpret_cast<void*>(stream_synchronize)},
    {"cuStreamQuery", reinterpret_cast<void*>(stream_query)},
    {"cuMemAlloc", reinterpret_cast<void*>(memory_allocate)},
    {"cuMemFree", reinterpret_cast<void*>(memory_free)},
    {"cuMemGetInfo", reinterpret_cast<void*>(memory_info)},
    {"cuMemHostAlloc", reinterpret_cast<void*>(pinned_allocate)},
    {"cuMemFreeHost", reinterpret_cast<void*>(pinned_free)},
    {"cuMemcpyHtoDAsync", reinterpret_cast<void*>(copy_to)},
    {"cuMemcpyDtoHAsync", reinterpret_cast<void*>(copy_from)},
    {"cuMemsetD8Async", reinterpret_cast<void*>(fill)},
    {"cuLibraryLoadData", reinterpret_cast<void*>(library_load)},
    {"cuLibraryUnload", reinterpret_cast<void*>(library_unload)},
    {"cuLibraryGetKernel", reinterpret_cast<void*>(library_kernel)},
    {"cuKernelSetAttribute", reinterpret_cast<void*>(kernel_attribute)},
    {"cuKernelGetFunction", reinterpret_cast<void*>(kernel_function)},
    {"cuFuncSetAttribute", reinterpret_cast<void*>(function_attribute)},
    {"cuOccupancyMaxActiveBlocksPerMultiprocessor", reinterpret_cast<void*>(occupancy)},
    {"cuLaunchCooperativeKernel", reinterpret_cast<void*>(launch)},
    {"cuEventCreate", reinterpret_cast<void*>(event_create)},
    {"cuEventDestroy", reinterpret_cast<void*>(event_destroy)},
    {"cuEventRecord", reinterpret_cast<void*>(event_record)},
    {"cuEventSynchronize", reinterpret_cast<void*>(event_synchronize)},
    {"cuEventQuery", reinterpret_cast<void*>(event_query)},
    {"cuEventElapsedTime", reinterpret_cast<void*>(event_elapsed)},
    {"cuGetErrorString", reinterpret_cast<void*>(error_string)},
};

}  // namespace

// The only symbol that cuda-bindings looks for; the flags choose between kinds of streams, the status is its second.
extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  const auto found = kFunctions.find(name);
  *function = found == kFunctions.end() ? nullptr : found->second;
  if (status) *status = *function ? 0 : 1;
  return *function ? kSuccess : kNotFound;
}
