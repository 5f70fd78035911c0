// As much of CUDA's driver as the rollouts call, with host memory for device memory and the CPU for a GPU:
// NVIDIA's bindings load it as libcuda.so.1, so that the calls made through them are tested where there is no
// driver. An image is the text "K C storage". What an argument must be is checked; an error is a status no
// call should see.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "cuda_on_host.cpp"

#define DRIVER extern "C" __attribute__((visibility("default"))) int

static const int kOk = 0, kInvalidValue = 1, kInvalidImage = 200, kUnexpected = 999;
static int contexts = 0;  // on the calling thread's stack
static void* const kContext = &contexts;
static struct Module {
  int num_components, num_channels, storage;
} module;

DRIVER cuInit(unsigned flags) { return flags ? kInvalidValue : kOk; }
DRIVER cuDriverGetVersion(int* version) { return *version = 12060, kOk; }
DRIVER cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? kInvalidValue : kOk; }
DRIVER cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {                        // numbers from cuda.h
    case 16: return *value = 3, kOk;          // multiprocessors
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
  const int read = sscanf(text, "%d %d %d", &module.num_components, &module.num_channels, &module.storage);
  return !contexts ? kUnexpected : read == 3 ? kOk : kInvalidImage;
}
DRIVER cuModuleGetFunction(void** function, void* handle, const char* name) {
  *function = handle;
  return handle == &module && strcmp(name, "piflow_gm") == 0 ? kOk : kUnexpected;
}
DRIVER cuFuncSetAttribute(void* function, int attribute, int) {
  return function == &module && attribute == 8 ? kOk : kUnexpected;  // dynamic shared memory, at most
}

DRIVER cuMemAlloc_v2(void** memory, size_t size) {
  return *memory = malloc(size), contexts ? kOk : kUnexpected;
}
DRIVER cuMemFree_v2(void* memory) { return free(memory), contexts ? kOk : kUnexpected; }
DRIVER cuMemcpyHtoD_v2(void* to, const void* from, size_t size) { return memcpy(to, from, size), kOk; }
DRIVER cuStreamSynchronize(void*) { return kOk; }
DRIVER cuPointerGetAttribute(void* value, int attribute, void* pointer) {
  *static_cast<int*>(value) = 0;
  return attribute == 9 && pointer ? kOk : kInvalidValue;  // the device's ordinal
}
DRIVER cuLaunchKernel(void* function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty,
                      unsigned tz, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  printf("launched on stream %p\n", stream);
  fflush(stdout);
  const bool plain = contexts == 1 && function == &module && y * z * ty * tz == 1 && shared_bytes && !extra;
  if (!plain) return kUnexpected;
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
