// Arithmetic on arrays in a GPU's memory: as much of the array API as policies and pixels need. Compiled at run time by
// gpu_arrays.py; like rollout.cu this file needs no header of CUDA's. Each thread makes one number.
#include "lanes.h"

namespace piflow_arrays {

using Index = long long;
constexpr int kAxes = 6;

// As in gpu_arrays.py, which fills these in field by field.
enum Operation { kCopy, kAdd, kSubtract, kMultiply, kDivide, kMaximum, kMinimum, kExp, kRound, kLog };
enum Reduction { kSum, kMax };

struct Operand {
  const float* numbers;   // null: `value` everywhere
  Index strides[kAxes];   // in numbers; 0 along an axis that is repeated
  double value;
};

struct ElementwiseProblem {
  void* result;  // contiguous: float, or bytes where `to_bytes`
  Operand a, b;
  Index sizes[kAxes];
  Index count, operation, to_bytes;
};

struct ReduceProblem {
  float* result;           // (outer, inner)
  const float* numbers;    // (outer, length, inner)
  Index outer, length, inner, operation;
};

namespace {

PIFLOW_FN float at(const Operand& operand, const Index* places) {
  if (!operand.numbers) return float(operand.value);
  Index offset = 0;
  for (int axis = 0; axis < kAxes; ++axis) offset += places[axis] * operand.strides[axis];
  return operand.numbers[offset];
}

PIFLOW_FN float compute(Index operation, float a, float b) {
  switch (operation) {
    case kAdd: return a + b;
    case kSubtract: return a - b;
    case kMultiply: return a * b;
    case kDivide: return a / b;
    case kMaximum: return a < b ? b : a;  // so that NaN in `a` stays
    case kMinimum: return a > b ? b : a;
    case kExp: return expf(a);
    case kLog: return logf(a);
    case kRound: return rintf(a);
    default: return a;
  }
}

PIFLOW_FN void elementwise(const ElementwiseProblem& p) {
  const Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count) return;
  Index places[kAxes], left = i;
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    places[axis] = left % p.sizes[axis];
    left /= p.sizes[axis];
  }
  const float value = compute(p.operation, at(p.a, places), at(p.b, places));
  if (p.to_bytes) {
    static_cast<unsigned char*>(p.result)[i] = (unsigned char)(value);
  } else {
    static_cast<float*>(p.result)[i] = value;
  }
}

PIFLOW_FN void reduce(const ReduceProblem& p) {
  const Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.outer * p.inner) return;
  const float* numbers = p.numbers + i / p.inner * p.length * p.inner + i % p.inner;
  float result = numbers[0];
  for (Index n = 1; n < p.length; ++n) {
    const float value = numbers[n * p.inner];
    // A NaN stays, as in NumPy.
    result = p.operation == kSum ? result + value : (value > result || value != value) ? value : result;
  }
  p.result[i] = result;
}

}  // namespace
}  // namespace piflow_arrays

#if defined(__CUDACC__)
extern "C" __global__ void piflow_elementwise(const piflow_arrays::ElementwiseProblem problem) {
  piflow_arrays::elementwise(problem);
}
extern "C" __global__ void piflow_reduce(const piflow_arrays::ReduceProblem problem) { piflow_arrays::reduce(problem); }
#endif
