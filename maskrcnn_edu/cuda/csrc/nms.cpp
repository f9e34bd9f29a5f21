// Greedy non-maximum suppression on the CPU. Lesson: nbs/09_nms.ipynb
//
// Boxes are ranked once. Then a block of them at a time: inside the block one after the other, as the definition says;
// those that stay strike all boxes behind the block at once, many lanes at a time and on all cores.
#include "common.h"

namespace maskrcnn_edu {

template <typename T> struct Ranked {
  static constexpr int64_t lanes = 16;
  using Vec = maskrcnn_edu::Vec<T, lanes>;
  using Mask = decltype(Vec() < Vec());  // all bits of a lane set, or none
  using Bits = std::remove_reference_t<decltype(Mask()[0])>;

  std::vector<int64_t> order;             // rank -> place among the inputs
  std::vector<T> x1, y1, x2, y2, area;    // by rank, filled up to whole vectors
  std::vector<Bits> struck;               // by rank, -1 or 0

  Ranked(const T* boxes, const T* scores, int64_t n) {
    for (int64_t i = 0; i < n; i++)
      if (scores[i] != -std::numeric_limits<T>::infinity()) order.push_back(i);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {  // surest first, not-a-number before all, then by place
      const bool a_nan = std::isnan(scores[a]), b_nan = std::isnan(scores[b]);
      if (a_nan != b_nan) return a_nan;
      return scores[a] > scores[b] || (!(scores[a] < scores[b]) && a < b);
    });
    const size_t padded = (order.size() + lanes - 1) / lanes * lanes;
    for (auto* v : {&x1, &y1, &x2, &y2, &area}) v->resize(padded);
    struck.resize(padded);
    for (size_t r = 0; r < order.size(); r++) {
      const T* b = boxes + 4 * order[r];
      x1[r] = b[0], y1[r] = b[1], x2[r] = b[2], y2[r] = b[3], area[r] = (b[2] - b[0]) * (b[3] - b[1]);
    }
  }

  // Box i strikes those of the boxes at j, j+1, ... that it overlaps too much.
  Mask strikes(int64_t i, int64_t j, T iou) const {
    const Vec zero{}, left = x1[i] - zero, top = y1[i] - zero, right = x2[i] - zero, bottom = y2[i] - zero;
    const Vec jx1 = load<lanes>(&x1[j]), jy1 = load<lanes>(&y1[j]), jx2 = load<lanes>(&x2[j]), jy2 = load<lanes>(&y2[j]);
    Vec w = (right < jx2 ? right : jx2) - (left > jx1 ? left : jx1), h = (bottom < jy2 ? bottom : jy2) - (top > jy1 ? top : jy1);
    w = w > zero ? w : zero, h = h > zero ? h : zero;
    const Vec inter = w * h, both = area[i] + load<lanes>(&area[j]) - inter;
    return inter / both > iou - zero;   // 0 / 0 strikes nothing
  }

  void strike(int64_t i, int64_t first, int64_t last, T iou) {
    for (int64_t j = first; j < last; j += lanes) store(&struck[j], load<lanes>(&struck[j]) | strikes(i, j, iou));
  }
};

template <typename T>
void nms_group(const T* boxes, const T* scores, int64_t n, T iou, bool* keep, bool all_cores) {
  constexpr int64_t block = 128, piece = 512;
  Ranked<T> ranked(boxes, scores, n);
  const int64_t filled = ranked.order.size(), padded = ranked.struck.size();
  std::vector<int64_t> kept;
  for (int64_t start = 0; start < filled; start += block) {
    const int64_t end = std::min(filled, start + block), behind = std::min(padded, start + block);
    kept.clear();
    for (int64_t i = start; i < end; i++) {
      if (ranked.struck[i]) continue;
      keep[ranked.order[i]] = true;
      kept.push_back(i);
      ranked.strike(i, i / Ranked<T>::lanes * Ranked<T>::lanes, behind, iou);
    }
    const auto strike_piece = [&](int64_t p) {
      const int64_t first = behind + p * piece, last = std::min(padded, first + piece);
      for (int64_t i : kept) ranked.strike(i, first, last, iou);
    };
    const int64_t pieces = (padded - behind + piece - 1) / piece;
    if (all_cores) parallel(pieces, [&] { return strike_piece; });
    else for (int64_t p = 0; p < pieces; p++) strike_piece(p);
  }
}

// The largest float that is not above a number: what a float may not pass so as not to pass the number.
inline float not_above(double x, float) { const float f = float(x); return f > x ? std::nextafter(f, -std::numeric_limits<float>::infinity()) : f; }
inline double not_above(double x, double) { return x; }

Tensor nms_keep(Tensor boxes, Tensor scores, double iou) {
  const int64_t dims = scores.dim();
  STD_TORCH_CHECK(dims >= 1 && boxes.dim() == dims + 1 && boxes.size(dims) == 4, "nms_keep: boxes must be (..., N, 4) and scores (..., N)");
  int64_t groups = 1;
  for (int64_t d = 0; d < dims; d++) {
    STD_TORCH_CHECK(boxes.size(d) == scores.size(d), "nms_keep: boxes and scores differ in dimension ", d, ": ", boxes.size(d), " and ", scores.size(d));
    if (d < dims - 1) groups *= scores.size(d);
  }
  const int64_t n = scores.size(dims - 1);
  const ScalarType type = boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  boxes = torch::stable::contiguous(cast(boxes, type)), scores = torch::stable::contiguous(cast(scores, type));
  Tensor out = torch::stable::new_zeros(scores, scores.sizes(), ScalarType::Bool);
  if (scores.numel() == 0) return out;
  bool* keep = out.mutable_data_ptr<bool>();
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T *b = boxes.const_data_ptr<T>(), *s = scores.const_data_ptr<T>(), limit = not_above(iou, zero);
    const bool few = groups < int64_t(torch::stable::get_num_threads());  // few groups share the cores, many get one each
    const auto one = [&](int64_t g) { nms_group(b + 4 * g * n, s + g * n, n, limit, keep + g * n, few); };
    if (few) for (int64_t g = 0; g < groups; g++) one(g);
    else parallel(groups, [&] { return one; });
  });
  return out;
}

}  // namespace maskrcnn_edu
