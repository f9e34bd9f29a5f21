// What the CPU ops share: names, checks, and one way to use all cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace maskrcnn_edu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Several numbers at a time: an array that + - * / and < work on as a whole. The compiler makes of it what the machine has.
template <typename T, int64_t N> struct Lanes { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
template <typename T, int64_t N = 16> using Vec = typename Lanes<T, N>::type;
template <int64_t N = 16, typename T> inline Vec<T, N> load(const T* from) { Vec<T, N> v; std::memcpy(&v, from, sizeof v); return v; }
template <typename T, typename V> inline void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }

// `make()` is called once a thread, for its scratch memory, and returns the function that does piece i of n.
// A thread takes the next few pieces when it is done: neighbours, so that two threads do not meet on a page of memory.
// Who does a piece changes from run to run, what is done never does.
template <typename Make> void parallel(int64_t n, const Make& make) {
  const int64_t threads = torch::stable::get_num_threads(), few = std::max<int64_t>(1, n / (threads * 8));
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, std::min((n + few - 1) / few, threads), 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t i; (i = next.fetch_add(few)) < n;)
      for (const int64_t end = std::min(n, i + few); i < end; i++) work(i);
  });
}

// Large results are written once from end to end. In large pages they cost the system least, and one thread asks for
// them all: threads that ask at the same time wait for each other.
inline Tensor large(Tensor t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t bytes = t.numel() * t.element_size(), start = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), first = (start + page - 1) / page * page;
  if (bytes > 2 * page) {
    madvise(reinterpret_cast<void*>(first), (start + bytes - first) / page * page, MADV_HUGEPAGE);
    for (uintptr_t at = first; at < start + bytes; at += page) *reinterpret_cast<volatile char*>(at) = 0;
  }
#endif
  return t;
}

inline Tensor cast(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }
// The type that sums are made in: float32, for float64 float64.
inline ScalarType sum_type(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Call f with a value of the type that the numbers have.
template <typename F> auto with_type(ScalarType type, const F& f) { return type == ScalarType::Double ? f(double()) : f(float()); }

}  // namespace maskrcnn_edu
