// Greedy non-maximum suppression on the GPU. Lesson: nbs/09_nms.ipynb
//
// Who overlaps whom is found by all threads at once, a bit a pair. Who stays must be said in order; it takes one block of threads
// a group, which goes down the ranks 64 boxes at a time. All groups (images, levels, classes) run side by side.
#include "cuda_common.h"

namespace maskrcnn_edu {

using Word = unsigned long long;  // one bit for each of 64 boxes
constexpr int word_bits = 64;

template <class A> struct Box { A x1, y1, x2, y2, area; };

// Products are rounded before they are added up, as on the CPU: the same boxes stay, to the last bit.
template <class A> __device__ A product(A a, A b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<A, double>) return __dmul_rn(a, b);
  else return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class A> __device__ Box<A> read_box(const A* xyxy) {
  return {xyxy[0], xyxy[1], xyxy[2], xyxy[3], product(xyxy[2] - xyxy[0], xyxy[3] - xyxy[1])};
}

template <class A> __device__ bool overlap_more(const Box<A>& a, const Box<A>& b, A iou) {
  const A w = max(min(a.x2, b.x2) - max(a.x1, b.x1), A(0)), h = max(min(a.y2, b.y2) - max(a.y1, b.y1), A(0));
  const A inter = product(w, h);
  return inter / (a.area + b.area - inter) > iou;  // 0 / 0 is not more
}

template <class A> __device__ bool is_empty(A score) { return score == -A(INFINITY); }

// One thread: a row box against the 64 boxes of a column word. Bit j of strikes[group][row][word] says
// that the box ranked `row` strikes the box ranked 64 * word + j, which comes behind it.
template <class A>
__global__ void find_strikes(const A* boxes, const A* ranked_scores, const int64_t* order, int n, int words, A iou, Word* strikes) {
  const int column_word = blockIdx.x % words, row_word = blockIdx.x / words % words;
  const int64_t group = blockIdx.x / words / words;
  boxes += group * n * 4, ranked_scores += group * n, order += group * n;
  if (column_word < row_word || is_empty(ranked_scores[row_word * word_bits])) return;  // behind an empty slot are only empty slots

  __shared__ Box<A> columns[word_bits];  // every thread brings one box for all
  const int in_word = min(n - column_word * word_bits, word_bits);
  if (threadIdx.x < in_word) columns[threadIdx.x] = read_box(boxes + 4 * order[column_word * word_bits + threadIdx.x]);
  __syncthreads();

  const int row = row_word * word_bits + threadIdx.x;
  if (row >= n) return;
  const auto box = read_box(boxes + 4 * order[row]);
  Word bits = 0;
  for (int j = column_word == row_word ? threadIdx.x + 1 : 0; j < in_word; j++)
    if (overlap_more(box, columns[j], iou)) bits |= Word(1) << j;
  strikes[(group * n + row) * words + column_word] = bits;
}

// One block a group: go down the ranks a word at a time. Thread 0 decides in order which of the 64 stay,
// then every thread lets those strike the boxes of its own words.
template <class A>
__global__ void keep_in_order(const Word* strikes, const A* ranked_scores, const int64_t* order, int n, int words, Word* struck, bool* keep) {
  const int64_t group = blockIdx.x;
  strikes += group * n * words, ranked_scores += group * n, order += group * n, struck += group * words, keep += group * n;
  __shared__ Word inside[word_bits], kept;  // strikes among the 64; those of the 64 that stay

  for (int word = 0; word < words; word++) {
    const int first = word * word_bits, in_word = min(n - first, word_bits);
    if (threadIdx.x < word_bits) {
      const bool filled = threadIdx.x < in_word && !is_empty(ranked_scores[first + threadIdx.x]);
      inside[threadIdx.x] = filled ? strikes[int64_t(first + threadIdx.x) * words + word] : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Word dead = struck[word], stay = 0;
      for (int i = 0; i < in_word; i++)
        if (!(dead >> i & 1) && !is_empty(ranked_scores[first + i])) stay |= Word(1) << i, dead |= inside[i];
      kept = stay;
    }
    __syncthreads();
    if (threadIdx.x < in_word) keep[order[first + threadIdx.x]] = kept >> threadIdx.x & 1;
    for (int later = word + 1 + threadIdx.x; later < words; later += blockDim.x) {
      Word sum = struck[later];
      for (Word left = kept; left; left &= left - 1)
        sum |= strikes[int64_t(first + __ffsll(left) - 1) * words + later];
      struck[later] = sum;
    }
    __syncthreads();  // `kept` and `inside` are written again
  }
}

// Highest first, equal ones in their order, not-a-number before all; on the GPU, without waiting for it.
inline std::array<Tensor, 2> sort_descending(const Tensor& scores) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(scores), from(std::optional<bool>(true)), from(int64_t(-1)), from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The largest number of type A that is not above x: what an A may not pass so as not to pass x.
template <class A> A not_above(double x) { return double(A(x)) > x ? std::nextafter(A(x), -std::numeric_limits<A>::infinity()) : A(x); }

Tensor nms_keep(Tensor boxes, Tensor scores, double iou) {
  const int64_t dims = scores.dim();
  STD_TORCH_CHECK(dims >= 1 && boxes.dim() == dims + 1 && boxes.size(dims) == 4, "nms_keep: boxes must be (..., N, 4) and scores (..., N)");
  for (int64_t d = 0; d < dims; d++) STD_TORCH_CHECK(boxes.size(d) == scores.size(d), "nms_keep: boxes and scores differ in dimension ", d);
  const OnDeviceOf device(boxes);
  Tensor keep = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Bool);
  if (scores.numel() == 0) return keep;

  const bool doubles = boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double;
  const ScalarType type = doubles ? ScalarType::Double : ScalarType::Float;
  boxes = torch::stable::contiguous(cast(boxes, type));
  const std::array<Tensor, 2> sorted = sort_descending(torch::stable::contiguous(cast(scores, type)));
  const Tensor &ranked = sorted[0], &order = sorted[1];
  const int64_t n = scores.size(dims - 1), groups = scores.numel() / n, words = (n + word_bits - 1) / word_bits;
  STD_TORCH_CHECK(n < (int64_t(1) << 30), "nms_keep: too many boxes in a group");
  const Tensor strikes = torch::stable::new_empty(scores, {groups, n, words}, ScalarType::Long);
  const Tensor struck = torch::stable::new_zeros(scores, {groups, words}, ScalarType::Long);
  with_sum_type(type, [&](auto zero) {
    using A = decltype(zero);
    launch(find_strikes<A>, blocks_for(groups * words * words), word_bits, device,
           data<A>(boxes), data<A>(ranked), data<int64_t>(order), n, words, not_above<A>(iou), data<Word>(strikes));
    const unsigned threads = unsigned(std::clamp<int64_t>((words + 31) / 32 * 32, word_bits, 1024));
    launch(keep_in_order<A>, blocks_for(groups), threads, device,
           data<Word>(strikes), data<A>(ranked), data<int64_t>(order), n, words, data<Word>(struck), data<bool>(keep));
  });
  return keep;
}

}  // namespace maskrcnn_edu
