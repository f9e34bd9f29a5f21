// What the CUDA ops share: names, float types, and one way to start a kernel.
//
// A kernel is the function of one thread. `launch(kernel, blocks, threads, stream, ...)` runs it on blocks * threads of them;
// each finds its own piece of work by its place: blockIdx (which block), threadIdx (which thread of the block).
// The work waits on `stream` like any other work of PyTorch, and nothing here waits for the GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#if !defined(USE_CUDA) && !defined(MASKRCNN_EDU_ON_CPU)
#define USE_CUDA  // PyTorch's headers then declare how to get its stream
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#pragma GCC visibility push(hidden)  // nothing in these files is for other libraries

#ifndef MASKRCNN_EDU_ON_CPU  // tests/cuda_on_cpu.h stands in for what follows where there is no GPU

#include <cuda_runtime.h>
#define OPS_LIBRARY maskrcnn_edu
#define OPS_DEVICE CUDA

namespace maskrcnn_edu {

// While this object lives, the GPU of the tensor is the current one.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard(t.get_device_index()) {
    void* current;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

template <class... Wanted, class... Given>
void launch(void (*kernel)(Wanted...), dim3 blocks, unsigned threads, const OnDeviceOf& device, Given... given) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  kernel<<<blocks, threads, 0, device.stream>>>(Wanted(given)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
}

}  // namespace maskrcnn_edu
#endif

namespace maskrcnn_edu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums of half numbers are made in float.
template <class T> using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType sum_type(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Tensor cast(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

template <class T> T* data(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// Call f with a value of the type that the numbers of a tensor have.
template <class F> void with_sum_type(ScalarType type, const F& f) { type == ScalarType::Double ? f(double()) : f(float()); }

template <class F> void with_float_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(torch::headeronly::Half());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    default: STD_TORCH_CHECK(false, "maskrcnn_edu: the numbers must be float32, float64, float16 or bfloat16");
  }
}

// Blocks that are needed for `work` threads, checked against what a grid can hold.
inline unsigned blocks_for(int64_t work, int64_t threads = 1) {
  const int64_t blocks = (work + threads - 1) / threads;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "maskrcnn_edu: too much work for one launch on the GPU");
  return unsigned(blocks);
}

}  // namespace maskrcnn_edu
