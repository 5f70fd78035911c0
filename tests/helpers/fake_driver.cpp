// As much of CUDA's driver as the rollouts and the engines call, with host memory for device memory and the CPU
// for a GPU: NVIDIA's bindings load it as libcuda.so.1, so that the calls made through them are tested where there
// is no driver. An image is the text "K C storage". What an argument must be is checked; an error is a status no
// call should see. What is queued is done at once, or recorded where a stream is being captured.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda_on_host.cpp"
#include "arrays.cu"

#define DRIVER extern "C" __attribute__((visibility("default"))) int

static const int kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kCaptureInvalidated = 901,
                 kUnexpected = 999;
static int contexts = 0;  // on the calling thread's stack
static void* const kContext = &contexts;
static struct Module {
  int num_components, num_channels, storage;
} module;
static char elementwise_kernel, reduce_kernel;  // functions of arrays.cu
static int copies_in = 0, copies_out = 0;

DRIVER cuInit(unsigned flags) { return flags ? kInvalidValue : kOk; }
DRIVER cuDriverGetVersion(int* version) { return *version = 12060, kOk; }
DRIVER cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? kInvalidValue : kOk; }
DRIVER cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {                        // numbers from cuda.h
    case 16: return *value = 3, kOk;          // multiprocessors
    case 18: return *value = 1, kOk;          // integrated
    case 75: return *value = 8, kOk;          // compute capability, major
    case 76: return *value = 7, kOk;          // and minor
    case 97: return *value = 163 << 10, kOk;  // shared memory per block, at most
    default: return kInvalidValue;
  }
}
DRIVER cuDevicePrimaryCtxRetain(void** context, int) { return *context = kContext, kOk; }
DRIVER cuCtxPushCurrent_v2(void* context) { return ++contexts, context == kContext ? kOk : kUnexpected; }
DRIVER cuCtxPopCurrent_v2(void** context) { return *context = kContext, contexts-- > 0 ? kOk : kUnexpected; }

DRIVER cuModuleLoadData(void** handle, const void* image) {
  *handle = &module;
  const char* text = static_cast<const char*>(image);
  if (strcmp(text, "arrays") == 0) return contexts ? kOk : kUnexpected;
  const int read = sscanf(text, "%d %d %d", &module.num_components, &module.num_channels, &module.storage);
  return !contexts ? kUnexpected : read == 3 ? kOk : kInvalidImage;
}
DRIVER cuModuleGetFunction(void** function, void* handle, const char* name) {
  static const std::map<std::string, void*> functions = {
      {"piflow_gm", &module}, {"piflow_elementwise", &elementwise_kernel}, {"piflow_reduce", &reduce_kernel}};
  if (handle != &module || !functions.count(name)) return kUnexpected;
  return *function = functions.at(name), kOk;
}
DRIVER cuFuncSetAttribute(void* function, int attribute, int) {
  return function && attribute == 8 ? kOk : kUnexpected;  // dynamic shared memory, at most
}

static const size_t kTotal = size_t{1} << 30;
static std::map<void*, size_t> memory;  // what is allocated

static size_t used() {
  size_t sum = 0;
  for (const auto& [_, size] : memory) sum += size;
  return sum;
}
DRIVER cuMemAlloc_v2(void** pointer, size_t size) {
  if (!contexts || !size) return kUnexpected;
  if (used() + size > kTotal) return kOutOfMemory;
  *pointer = malloc(size);
  memset(*pointer, 0xff, size);  // NaN, and no label: nobody may read what was not written
  memory[*pointer] = size;
  return kOk;
}
DRIVER cuMemFree_v2(void* pointer) {
  if (!contexts || !memory.erase(pointer)) return kUnexpected;
  return free(pointer), kOk;
}
DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = kTotal - used(), *total = kTotal;
  return contexts ? kOk : kUnexpected;
}
DRIVER cuMemcpyHtoD_v2(void* to, const void* from, size_t size) {
  return ++copies_in, memcpy(to, from, size), kOk;
}
static bool on_device(const void* pointer) {
  auto after = memory.upper_bound(const_cast<void*>(pointer));
  if (after == memory.begin()) return false;
  --after;
  return static_cast<const char*>(pointer) < static_cast<const char*>(after->first) + after->second;
}
DRIVER cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "Pretended GPU"), kOk; }

struct Stream {
  bool is_captured = false, is_invalid = false;
};
using Work = std::vector<std::function<void()>>;
static std::map<void*, Stream> streams;
static Work captured;
static std::vector<Work*> graphs;
static int waits = 0, launches = 0, synchronizations = 0;

// Also for the pretended TensorRT, whose work is a function.
DRIVER fake_queue(void* stream, std::function<void()> work) {
  if (!contexts) return kUnexpected;
  if (streams.count(stream) && streams[stream].is_captured) {
    captured.push_back(work);
  } else {
    work();
  }
  return kOk;
}
DRIVER fake_call(void* stream, void (*function)(int), int number) {
  return fake_queue(stream, [=] { function(number); });
}
DRIVER fake_is_captured(void* stream) { return streams.count(stream) && streams[stream].is_captured; }
DRIVER fake_invalidate(void* stream) { return streams.at(stream).is_invalid = true, kOk; }
// Bytes allocated, streams, graphs that live; so far waits of one stream for another, launches of graphs, copies to the
// GPU and from it, waits of the host for a stream.
DRIVER fake_count(int what) {
  const int counts[] = {int(used()), int(streams.size()), int(graphs.size()), waits,
                        launches,    copies_in,           copies_out, synchronizations};
  return counts[what];
}

DRIVER cuStreamCreate(void** stream, unsigned flags) {
  *stream = malloc(1);
  streams[*stream] = Stream{};
  return contexts && flags == 1 ? kOk : kUnexpected;
}
DRIVER cuStreamDestroy_v2(void* stream) { return streams.erase(stream) ? (free(stream), kOk) : kUnexpected; }
DRIVER cuStreamSynchronize(void* stream) {
  ++synchronizations;
  return streams.count(stream) && streams[stream].is_captured ? kUnexpected : kOk;
}
DRIVER cuMemcpyAsync(void* to, const void* from, size_t size, void* stream) {
  if (on_device(to) && !on_device(from)) ++copies_in;
  if (on_device(from) && !on_device(to)) ++copies_out;
  return fake_queue(stream, [=] { memcpy(to, from, size); });
}
DRIVER cuMemsetD8Async(void* to, unsigned char byte, size_t size, void* stream) {
  return fake_queue(stream, [=] { memset(to, byte, size); });
}
DRIVER cuEventCreate(void** event, unsigned flags) {
  return *event = malloc(1), contexts && flags == 2 ? kOk : kUnexpected;
}
DRIVER cuEventDestroy_v2(void* event) { return free(event), kOk; }
DRIVER cuEventRecord(void*, void*) { return contexts ? kOk : kUnexpected; }
DRIVER cuStreamWaitEvent(void*, void*, unsigned) { return ++waits, contexts ? kOk : kUnexpected; }

DRIVER cuStreamBeginCapture_v2(void* stream, int mode) {
  if (!streams.count(stream) || mode != 1) return kUnexpected;
  captured.clear();
  streams[stream].is_captured = true;
  return kOk;
}
DRIVER cuStreamEndCapture(void* stream, void** graph) {
  Stream& state = streams.at(stream);
  const bool is_invalid = state.is_invalid;
  state = Stream{};
  if (is_invalid) return kCaptureInvalidated;
  *graph = new Work(captured);
  return kOk;
}
DRIVER cuGraphDestroy(void* graph) { return delete static_cast<Work*>(graph), kOk; }
DRIVER cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  auto* copy = new Work(*static_cast<Work*>(graph));
  graphs.push_back(copy);
  return *executable = copy, flags ? kUnexpected : kOk;
}
DRIVER cuGraphLaunch(void* executable, void*) {
  for (const auto& work : *static_cast<Work*>(executable)) work();
  return ++launches, contexts ? kOk : kUnexpected;
}
DRIVER cuGraphExecDestroy(void* executable) {
  for (size_t i = 0; i < graphs.size(); ++i) {
    if (graphs[i] != executable) continue;
    graphs.erase(graphs.begin() + i);
    return delete static_cast<Work*>(executable), kOk;
  }
  return kUnexpected;
}
DRIVER cuPointerGetAttribute(void* value, int attribute, void* pointer) {
  *static_cast<int*>(value) = 0;
  return attribute == 9 && pointer ? kOk : kInvalidValue;  // the device's ordinal
}
DRIVER cuLaunchKernel(void* function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty,
                      unsigned tz, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  if (contexts != 1 || y * z * ty * tz != 1 || extra) return kUnexpected;
  if (function == &elementwise_kernel || function == &reduce_kernel) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        using namespace piflow_arrays;
        if (function == &elementwise_kernel) {
          piflow_arrays::elementwise(*static_cast<const ElementwiseProblem*>(arguments[0]));
        } else {
          piflow_arrays::reduce(*static_cast<const ReduceProblem*>(arguments[0]));
        }
      }
    }
    return kOk;
  }
  printf("launched on stream %p\n", stream);
  fflush(stdout);
  if (function != &module || !shared_bytes) return kUnexpected;
  const auto& problem = *static_cast<const piflow::GmProblem*>(arguments[0]);
  return run_gm(module.num_components, module.num_channels, module.storage, blocks, threads, problem);
}

// The bindings ask for everything by name, most of which they never call.
DRIVER cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&cuInit), &self)) return kUnexpected;
  void* library = dlopen(self.dli_fname, RTLD_NOW);
  const std::string plain = name, versioned = plain + "_v2";
  *function = dlsym(library, versioned.c_str());
  if (*function == nullptr) *function = dlsym(library, plain.c_str());
  if (status) *status = *function ? 0 : 1;
  return kOk;
}
