// Small masks into the picture on the CPU (Mask R-CNN, section 3.1). Lesson: nbs/18_detections.ipynb
#include "common.h"

namespace maskrcnn_edu {

// For every pixel from `first` on: the nearer of two neighbouring bins, and the share of the second.
template <typename T> struct Between {
  int64_t first, last;  // pixels, end excluded
  std::vector<int32_t> low;
  std::vector<T> part;

  Between(T from, T to, int64_t bins, int64_t pixels) {  // first and last pixel that the bins are stretched over
    const T extent = std::max(to - from + 1, T(1));
    const auto inside = [&](T x) { return int64_t(std::min(std::max(std::ceil(x - T(.5)), T(0)), T(pixels))); };  // first pixel whose middle is not before x
    first = inside(from), last = std::max(first, inside(from + extent));
    for (int64_t p = first; p < last; p++) {
      const T at = std::min(std::max((T(p - from) + T(.5)) * bins / extent - T(.5), T(0)), T(bins - 1));
      low.push_back(std::min(int64_t(at), bins - 2)), part.push_back(at - low.back());
    }
  }
};

template <typename T>
void paste_one(const T* mask, const T* box, int64_t size, int64_t height, int64_t width, T threshold, bool aligned, uint8_t* out) {
  const int64_t bins = size + 2;  // a rim of one empty bin
  std::fill_n(out, height * width, uint8_t(0 >= threshold));
  for (int64_t k = 0; k < 4; k++) if (!std::isfinite(box[k])) return;
  const T cx = (box[2] + box[0]) / 2, cy = (box[3] + box[1]) / 2, hx = (box[2] - box[0]) / 2 * bins / size, hy = (box[3] - box[1]) / 2 * bins / size;
  const auto between = [&](T centre, T half, int64_t pixels) {
    return aligned ? Between<T>(centre - half, centre + half - 1, bins, pixels) : Between<T>(std::trunc(centre - half), std::trunc(centre + half), bins, pixels);
  };
  const auto rows = between(cy, hy, height), cols = between(cx, hx, width);
  std::vector<T> line(bins);
  const auto at = [&](int64_t r, int64_t c) { return r < 1 || r > size || c < 1 || c > size ? T(0) : mask[(r - 1) * size + c - 1]; };
  for (int64_t y = rows.first; y < rows.last; y++) {
    const int64_t r = rows.low[y - rows.first];
    const T part = rows.part[y - rows.first];
    for (int64_t c = 0; c < bins; c++) line[c] = (1 - part) * at(r, c) + part * at(r + 1, c);
    uint8_t* to = out + y * width + cols.first;
    for (int64_t x = 0; x < cols.last - cols.first; x++) {
      const int32_t c = cols.low[x];
      to[x] = (1 - cols.part[x]) * line[c] + cols.part[x] * line[c + 1] >= threshold;
    }
  }
}

Tensor paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, double threshold, bool aligned) {
  STD_TORCH_CHECK(masks.dim() == 3 && masks.size(1) == masks.size(2), "paste_masks: masks must be (D, S, S)");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.size(0) == masks.size(0), "paste_masks: boxes must be (D, 4), one for each of the ", masks.size(0), " masks");
  STD_TORCH_CHECK(height >= 0 && width >= 0, "paste_masks: the picture has a negative size");
  const ScalarType type = sum_type(masks);
  const int64_t n = masks.size(0), size = masks.size(1);
  masks = torch::stable::contiguous(cast(masks, type)), boxes = torch::stable::contiguous(cast(boxes, type));
  Tensor out = torch::stable::new_empty(masks, {n, height, width}, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(large(out).mutable_data_ptr());
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T *m = masks.const_data_ptr<T>(), *b = boxes.const_data_ptr<T>();
    parallel(n, [&] { return [&](int64_t k) { paste_one(m + k * size * size, b + 4 * k, size, height, width, T(threshold), aligned, to + k * height * width); }; });
  });
  return out;
}

}  // namespace maskrcnn_edu
