// As much of CUDA's driver as the rollouts and the engines call, with host memory for device memory and the CPU
// for a GPU: NVIDIA's bindings load it as libcuda.so.1, so that the calls made through them are tested where there
// is no driver. An image is the text "K C storage lanes", or "arrays". What an argument must be is checked; an error is a
// status no call should see. What is queued is done late, see fake_streams.h, or recorded where a stream is captured.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda_on_host.cpp"
#include "arrays.cu"
#include "fake_streams.h"

#define DRIVER extern "C" __attribute__((visibility("default"))) int
#define LOCKED const std::lock_guard<std::recursive_mutex> guard(streams::lock)

static const int kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kCaptureUnsupported = 900,
                 kCaptureInvalidated = 901, kUnexpected = 999;
static thread_local int contexts = 0;  // on the calling thread's stack
static char the_context;
static void* const kContext = &the_context;

struct Module {
  int num_components, num_channels, storage, lanes;
};
struct Function {
  std::string name;
  Module module;
};

DRIVER cuInit(unsigned flags) { return flags ? kInvalidValue : kOk; }
DRIVER cuDriverGetVersion(int* version) { return *version = 12060, kOk; }
DRIVER cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? kInvalidValue : kOk; }
DRIVER cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "Pretended GPU"), kOk; }
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
  if (!contexts) return kUnexpected;
  const char* text = static_cast<const char*>(image);
  auto* module = new Module{0, 0, 0, 0};  // kept to the end, as the process keeps its modules
  *handle = module;
  if (strcmp(text, "arrays") == 0) return kOk;
  const int read = sscanf(text, "%d %d %d %d", &module->num_components, &module->num_channels, &module->storage,
                          &module->lanes);
  return read == 4 ? kOk : kInvalidImage;
}
DRIVER cuModuleGetFunction(void** function, void* handle, const char* name) {
  const std::string known[] = {"piflow_gm", "piflow_elementwise", "piflow_reduce"};
  for (const auto& one : known) {
    if (one == name) return *function = new Function{name, *static_cast<Module*>(handle)}, kOk;
  }
  return kUnexpected;
}
DRIVER cuFuncSetAttribute(void* function, int attribute, int) {
  return function && attribute == 8 ? kOk : kUnexpected;  // dynamic shared memory, at most
}

// --- memory

static const size_t kTotal = size_t{1} << 30;
static std::map<void*, size_t> memory, pinned;  // what is allocated: the GPU's, and the host's that it reads itself
// Given back while work was queued. A real driver waits for that work; here it stays until nothing is queued.
static std::map<void*, size_t> condemned;

static size_t used() {
  size_t sum = 0;
  for (const auto& [_, size] : memory) sum += size;
  return sum;
}
static void* mapped(size_t size) {
  return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
static void take_away(std::map<void*, size_t>& blocks) {
  for (const auto& [pointer, size] : blocks) {  // whoever still uses it ends the process
    madvise(pointer, size, MADV_DONTNEED);
    mprotect(pointer, size, PROT_NONE);
  }
  blocks.clear();
}
static int given_back(std::map<void*, size_t>& blocks, void* pointer) {
  const auto found = blocks.find(pointer);
  if (found == blocks.end()) return kUnexpected;
  condemned.insert(*found);
  blocks.erase(found);
  if (streams::are_idle()) take_away(condemned);
  return kOk;
}
static bool lies_in(const std::map<void*, size_t>& blocks, const void* pointer) {
  auto after = blocks.upper_bound(const_cast<void*>(pointer));
  if (after == blocks.begin()) return false;
  --after;
  return static_cast<const char*>(pointer) < static_cast<const char*>(after->first) + after->second;
}

DRIVER cuMemAlloc_v2(void** pointer, size_t size) {
  LOCKED;
  if (!contexts || !size) return kUnexpected;
  if (streams::spoils_a_recording()) return kCaptureUnsupported;
  if (used() + size > kTotal) return kOutOfMemory;
  *pointer = mapped(size);
  const size_t poisoned = size < (16 << 20) ? size : 16 << 20;
  memset(*pointer, 0xff, poisoned);  // NaN, and no label: nobody may read what was not written
  memory[*pointer] = size;
  return kOk;
}
DRIVER cuMemFree_v2(void* pointer) {
  LOCKED;
  if (!contexts) return kUnexpected;
  return streams::spoils_a_recording() ? kCaptureUnsupported : given_back(memory, pointer);
}
DRIVER cuMemHostAlloc(void** pointer, size_t size, unsigned flags) {
  LOCKED;
  if (!contexts || !size || flags) return kUnexpected;
  if (streams::spoils_a_recording()) return kCaptureUnsupported;
  *pointer = mapped(size);
  return pinned[*pointer] = size, kOk;
}
DRIVER cuMemFreeHost(void* pointer) {
  LOCKED;
  if (!contexts) return kUnexpected;
  return streams::spoils_a_recording() ? kCaptureUnsupported : given_back(pinned, pointer);
}
DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
  LOCKED;
  *free = kTotal - used(), *total = kTotal;
  return contexts ? kOk : kUnexpected;
}
DRIVER cuPointerGetAttribute(void* value, int attribute, void* pointer) {
  *static_cast<int*>(value) = 0;
  return attribute == 9 && pointer ? kOk : kInvalidValue;  // the device's ordinal
}

// --- what is queued

struct Graph {
  std::vector<streams::Work> works;
};
using Executable = std::shared_ptr<Graph>;
static std::vector<Executable*> executables;
static int waits = 0, launches = 0, copies_in = 0, copies_out = 0, synchronizations = 0, created = 0,
           array_kernels = 0, policy_kernels = 0;

static int queue(void* stream, streams::Work work) {
  if (!contexts) return kUnexpected;
  return streams::push(stream, work), kOk;
}
// For the pretended TensorRT, whose work is a function.
DRIVER fake_call(void* stream, void (*function)(int), int number) {
  LOCKED;
  return queue(stream, [=] { function(number); });
}
DRIVER fake_is_captured(void* stream) {
  LOCKED;
  return streams::queue_of(stream).is_captured;
}
DRIVER fake_invalidate(void* stream) {
  LOCKED;
  return streams::queue_of(stream).is_invalid = true, kOk;
}
DRIVER fake_set_order(int order) {
  LOCKED;
  return streams::order = streams::Order(order), kOk;
}
// What a library does on a stream of its own accord, without a call that is counted.
DRIVER fake_finish(void* stream) {
  LOCKED;
  return streams::synchronize(stream), kOk;
}
// Bytes allocated, streams, graphs that live; so far waits of one stream for another, launches of graphs, copies to the
// GPU and from it, waits of the host for a stream, launches of kernels for arrays and for policies outside of graphs;
// bytes of the host's memory that are pinned.
DRIVER fake_count(int what) {
  LOCKED;
  size_t bytes = 0;
  for (const auto& [_, size] : pinned) bytes += size;
  const int counts[] = {int(used()), created,    int(executables.size()), waits,          launches,  copies_in,
                        copies_out,  synchronizations, array_kernels,     policy_kernels, int(bytes)};
  return counts[what];
}

DRIVER cuStreamCreate(void** stream, unsigned flags) {
  LOCKED;
  if (!contexts || flags != 1) return kUnexpected;
  *stream = malloc(1);
  streams::queue_of(*stream);
  return ++created, kOk;
}
DRIVER cuStreamDestroy_v2(void* stream) {
  LOCKED;
  const auto found = streams::queues.find(stream);
  if (found == streams::queues.end()) return kUnexpected;
  streams::destroyed.push_back(found->second);  // what is queued is still done
  streams::queues.erase(found);
  return --created, kOk;  // its handle is never given away again
}
DRIVER cuStreamSynchronize(void* stream) {
  LOCKED;
  ++synchronizations;
  if (streams::queue_of(stream).is_captured) return kUnexpected;
  streams::synchronize(stream);
  if (streams::are_idle()) take_away(condemned);
  return kOk;
}

static int copied(void* to, const void* from, size_t size, void* stream) {
  const bool is_recorded = streams::queue_of(stream).is_captured;
  const bool to_gpu = lies_in(memory, to), from_gpu = lies_in(memory, from);
  if (!is_recorded) copies_in += to_gpu && !from_gpu, copies_out += from_gpu && !to_gpu;
  if (to_gpu && !from_gpu && !lies_in(pinned, from) && !is_recorded) {
    // Of pageable memory the driver takes a copy before it returns.
    const auto* bytes = static_cast<const char*>(from);
    const std::vector<char> aside(bytes, bytes + size);
    return queue(stream, [=] { memcpy(to, aside.data(), size); });
  }
  return queue(stream, [=] { memcpy(to, from, size); });
}
DRIVER cuMemcpyAsync(void* to, const void* from, size_t size, void* stream) {
  LOCKED;
  return copied(to, from, size, stream);
}
DRIVER cuMemcpyHtoD_v2(void* to, const void* from, size_t size) {
  LOCKED;  // returns when the host's memory was read, and may not be done by then
  return streams::spoils_a_recording() ? kCaptureUnsupported : copied(to, from, size, nullptr);
}
DRIVER cuMemsetD8Async(void* to, unsigned char byte, size_t size, void* stream) {
  LOCKED;
  return queue(stream, [=] { memset(to, byte, size); });
}

// --- events

struct Event {
  std::shared_ptr<streams::Mark> mark;
};
DRIVER cuEventCreate(void** event, unsigned flags) {
  return *event = new Event, contexts && flags == 2 ? kOk : kUnexpected;
}
DRIVER cuEventDestroy_v2(void* event) {
  LOCKED;
  return delete static_cast<Event*>(event), kOk;
}
DRIVER cuEventRecord(void* event, void* stream) {
  LOCKED;
  if (!contexts || streams::queue_of(stream).is_captured) return kUnexpected;
  return static_cast<Event*>(event)->mark = streams::record(stream), kOk;
}
DRIVER cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
  LOCKED;
  if (!contexts || flags || streams::queue_of(stream).is_captured) return kUnexpected;
  ++waits;
  if (const auto mark = static_cast<Event*>(event)->mark) streams::push(stream, [] {}, mark);
  return kOk;
}

// --- graphs

DRIVER cuStreamBeginCapture_v2(void* stream, int mode) {
  LOCKED;
  auto& state = streams::queue_of(stream);
  if (!stream || mode != 1 || state.is_captured) return kUnexpected;  // of the calling thread alone
  state.is_captured = true, state.is_invalid = false;
  state.capturing_thread = std::this_thread::get_id();
  state.captured.clear();
  return kOk;
}
DRIVER cuStreamEndCapture(void* stream, void** graph) {
  LOCKED;
  auto& state = streams::queue_of(stream);
  if (!state.is_captured) return kUnexpected;
  state.is_captured = false;
  if (state.is_invalid) return kCaptureInvalidated;
  return *graph = new Graph{state.captured}, kOk;
}
DRIVER cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), kOk; }
DRIVER cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  LOCKED;
  auto* copy = new Executable(new Graph(*static_cast<Graph*>(graph)));
  executables.push_back(copy);
  return *executable = copy, flags ? kUnexpected : kOk;
}
DRIVER cuGraphLaunch(void* executable, void* stream) {
  LOCKED;
  const Executable graph = *static_cast<Executable*>(executable);
  launches += !streams::queue_of(stream).is_captured;
  return queue(stream, [=] {
    for (const auto& work : graph->works) work();
  });
}
DRIVER cuGraphExecDestroy(void* executable) {
  LOCKED;
  for (size_t i = 0; i < executables.size(); ++i) {
    if (executables[i] != executable) continue;
    executables.erase(executables.begin() + i);
    return delete static_cast<Executable*>(executable), kOk;
  }
  return kUnexpected;
}

// --- kernels

template <class Problem>
static streams::Work for_each_thread(void (*kernel)(const Problem&), unsigned blocks, unsigned threads, void* problem) {
  const Problem copy = *static_cast<const Problem*>(problem);  // arguments are copied before a launch returns
  return [=] {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(copy);
    }
  };
}
DRIVER cuLaunchKernel(void* handle, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty,
                      unsigned tz, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  LOCKED;
  if (!contexts || y * z * ty * tz != 1 || extra) return kUnexpected;
  const Function& function = *static_cast<Function*>(handle);
  const bool is_recorded = streams::queue_of(stream).is_captured;
  if (function.name != "piflow_gm") {
    array_kernels += !is_recorded;
    return queue(stream, function.name == "piflow_reduce"
                             ? for_each_thread(piflow_arrays::reduce, blocks, threads, arguments[0])
                             : for_each_thread(piflow_arrays::elementwise, blocks, threads, arguments[0]));
  }
  policy_kernels += !is_recorded;
  printf("launched on stream %p\n", stream);
  fflush(stdout);
  if (!shared_bytes) return kUnexpected;
  const auto problem = *static_cast<const piflow::GmProblem*>(arguments[0]);
  const Module m = function.module;
  return queue(stream, [=] {
    if (run_gm(m.num_components, m.num_channels, m.storage, m.lanes, blocks, threads, problem)) {
      fprintf(stderr, "the pretended driver has no mixture of %d components of %d channels\n", m.num_components,
              m.num_channels);
      abort();
    }
  });
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
