// Stands in for CUDA, so that a C++ compiler makes the CUDA sources into ops for the CPU: proof without a GPU.
//     g++ -x c++ -DMASKRCNN_EDU_ON_CPU -include tests/cuda_on_cpu.h … maskrcnn_edu/cuda/csrc/cuda.cu
// The ops are called torch.ops.maskrcnn_edu_emulated.*. Threads of a block run one after the other; one that meets __syncthreads waits there
// until all others have come. MASKRCNN_EDU_THREADS=backwards starts the last block and thread first: results that depend on the order show.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define OPS_LIBRARY maskrcnn_edu_emulated
#define OPS_DEVICE CPU
#define __global__ static
#define __device__
#define __shared__ static  // blocks run one after the other, so one piece of memory serves them all
#define __syncthreads() emulator::wait_for_all(__LINE__)

struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// As in CUDA: of a number and not-a-number the number.
template <class T> T min(T a, T b) { if constexpr (std::is_floating_point_v<T>) return fmin(a, b); else return a < b ? a : b; }
template <class T> T max(T a, T b) { if constexpr (std::is_floating_point_v<T>) return fmax(a, b); else return a > b ? a : b; }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
template <class T> T atomicAdd(T* to, T value) { const T before = *to; *to += value; return before; }

namespace emulator {

struct Thread {  // one thread of CUDA that can be left and taken up again
  static constexpr size_t stack_size = 1 << 17;
  ucontext_t here;
  void* stack = mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  unsigned place = 0;
  int line = 0;  // of the __syncthreads where it waits; 0: it is at its end
  ~Thread() { munmap(stack, stack_size); }
};

inline ucontext_t scheduler;
inline Thread* running;
inline const std::function<void()>* work;

inline void wait_for_all(int line) {
  running->line = line;
  swapcontext(&running->here, &scheduler);
}

inline void run_work() { (*work)(); running->line = 0; }

inline void go_on(Thread& t) {  // until it waits or ends
  running = &t, threadIdx.x = t.place;
  swapcontext(&scheduler, &t.here);
}

inline void run_block(unsigned threads, bool backwards) {
  static std::vector<std::unique_ptr<Thread>> pool;
  size_t waiting = 0;  // the first of the pool
  for (unsigned k = 0; k < threads; k++) {
    if (waiting == pool.size()) pool.push_back(std::make_unique<Thread>());
    Thread& t = *pool[waiting];
    t.place = backwards ? threads - 1 - k : k;
    getcontext(&t.here);
    t.here.uc_stack.ss_sp = t.stack, t.here.uc_stack.ss_size = Thread::stack_size, t.here.uc_link = &scheduler;
    makecontext(&t.here, run_work, 0);
    go_on(t);
    waiting += t.line != 0;
  }
  while (waiting) {
    for (size_t k = 1; k < waiting; k++)
      if (pool[k]->line != pool[0]->line) fprintf(stderr, "threads of one block wait in lines %d and %d\n", pool[0]->line, pool[k]->line), abort();
    size_t still = 0;
    for (size_t k = 0; k < waiting; k++) {
      go_on(*pool[k]);
      if (pool[k]->line) std::swap(pool[still++], pool[k]);
    }
    waiting = still;
  }
}

}  // namespace emulator

namespace maskrcnn_edu {

struct OnDeviceOf { explicit OnDeviceOf(const torch::stable::Tensor&) {} };

template <class... Wanted, class... Given>
void launch(void (*kernel)(Wanted...), dim3 blocks, unsigned threads, const OnDeviceOf&, Given... given) {
  const char* order = getenv("MASKRCNN_EDU_THREADS");
  const bool backwards = order && !strcmp(order, "backwards");
  const std::function<void()> work = [&] { kernel(Wanted(given)...); };
  emulator::work = &work;
  gridDim = blocks, blockDim = dim3(threads);
  const uint64_t n = uint64_t(blocks.x) * blocks.y * blocks.z;
  for (uint64_t i = 0; i < n; i++) {
    const uint64_t b = backwards ? n - 1 - i : i;
    blockIdx = dim3(b % blocks.x, b / blocks.x % blocks.y, b / blocks.x / blocks.y);
    emulator::run_block(threads, backwards);
  }
}

}  // namespace maskrcnn_edu

STABLE_TORCH_LIBRARY(maskrcnn_edu_emulated, m) {
  m.def("nms_keep(Tensor boxes, Tensor scores, float iou) -> Tensor");
  m.def("roi_align(Tensor[] features, Tensor boxes, Tensor image, Tensor level, float[] scales, int height, int width, int sampling, bool aligned) -> Tensor");
  m.def("roi_align_backward(Tensor grad, Tensor[] features, Tensor boxes, Tensor image, Tensor level, float[] scales, int height, int width, int sampling, "
        "bool aligned, bool deterministic) -> Tensor[]");
  m.def("paste_masks(Tensor masks, Tensor boxes, int height, int width, float threshold) -> Tensor");
}
