// ROIAlign on the CPU, forward and backward (Mask R-CNN, section 3). Lesson: nbs/12_roi_align.ipynb
//
// A bin of a box is a weighted sum of cells, and the weights factor: (weights of rows) x (weights of columns).
// So every box needs only two short lists of taps, made once and used by all channels.
#include "common.h"

namespace maskrcnn_edu {

constexpr int64_t lanes = 16;  // of Vec

template <typename T> struct Tap {
  int64_t cell;  // along one axis
  T weight;
};

// What the bins of a box take along one axis: taps[start[bin]] .. taps[start[bin + 1] - 1]. None for boxes that are not finite.
template <typename T> struct Axis {
  std::vector<Tap<T>> taps;
  std::vector<int64_t> start;
  int64_t count(int64_t bin) const { return start[bin + 1] - start[bin]; }
};

template <typename T>
Axis<T> axis(T start, T end, int64_t bins, int64_t sampling, bool aligned, int64_t cells) {
  Axis<T> out{{}, std::vector<int64_t>(bins + 1)};
  const T extent = aligned ? end - start : std::max(end - start, T(1)), width = extent / bins;
  const T points = sampling > 0 ? T(sampling) : std::ceil(extent / bins);
  if (!std::isfinite(start) || !std::isfinite(end) || !std::isfinite(points) || cells == 0) return out;
  for (int64_t bin = 0; bin < bins; bin++) {
    const auto add = [&](int64_t cell, T weight) {  // points of a bin often share cells
      for (int64_t k = out.taps.size(); k-- > out.start[bin];)
        if (out.taps[k].cell == cell) { out.taps[k].weight += weight; return; }
      if (weight != 0) out.taps.push_back({cell, weight});
    };
    double first = 0, last = points;
    if (points > 64 && width > 0) {  // of a giant box only the points that can be inside, and a few more
      const double step = double(width) / points, near = double(start) + double(bin) * width;
      first = std::max(first, std::floor((-1 - near) / step) - 2), last = std::min(last, std::ceil((cells - near) / step) + 2);
    }
    for (double point = first; point < last; point++) {
      T at = start + bin * width + (T(point) + T(.5)) * width / points;
      if (!(at >= -1 && at <= cells)) continue;
      at = std::min(std::max(at, T(0)), T(cells - 1));
      const int64_t low = at;
      const T part = at - low;
      add(low, (1 - part) / points);
      if (low + 1 < cells) add(low + 1, part / points);
    }
    out.start[bin + 1] = out.taps.size();
  }
  return out;
}

// The boxes of one call: which map each is read from, and its taps.
template <typename T> struct Boxes {
  std::vector<Axis<T>> ys, xs;
  std::vector<std::vector<int64_t>> of_map;  // [level * images + image] -> boxes, in order
};

struct Map {
  int64_t images, channels, height, width, level;
  bool channels_last;
  int64_t plane() const { return height * width; }
};

inline Map map_of(const Tensor& f, int64_t level) {
  Map m{f.size(0), f.size(1), f.size(2), f.size(3), level, false};
  m.channels_last = f.stride(1) == 1 && f.stride(3) == m.channels && f.stride(2) == m.channels * m.width && f.stride(0) == m.channels * m.plane() && m.channels > 1;
  return m;
}

template <typename T>
Boxes<T> read_boxes(const std::vector<Map>& maps, const Tensor& boxes, const Tensor& image, const Tensor& level,
                    const std::vector<double>& scales, int64_t height, int64_t width, int64_t sampling, bool aligned) {
  const int64_t n = boxes.size(0), images = maps[0].images, *in = image.const_data_ptr<int64_t>(), *on = level.const_data_ptr<int64_t>();
  const T* box = boxes.const_data_ptr<T>();
  Boxes<T> out{std::vector<Axis<T>>(n), std::vector<Axis<T>>(n), std::vector<std::vector<int64_t>>(maps.size() * images)};
  for (int64_t k = 0; k < n; k++)
    if (on[k] >= 0 && on[k] < int64_t(maps.size()) && in[k] >= 0 && in[k] < images) out.of_map[on[k] * images + in[k]].push_back(k);
  parallel((n + 15) / 16, [&] { return [&](int64_t piece) {
    for (int64_t k = piece * 16; k < std::min(n, piece * 16 + 16); k++) {
      if (on[k] < 0 || on[k] >= int64_t(maps.size())) continue;
      const T scale = scales[on[k]], shift = aligned ? .5 : 0, *b = box + 4 * k;
      out.ys[k] = axis<T>(b[1] * scale - shift, b[3] * scale - shift, height, sampling, aligned, maps[on[k]].height);
      out.xs[k] = axis<T>(b[0] * scale - shift, b[2] * scale - shift, width, sampling, aligned, maps[on[k]].width);
    }
  }; });
  return out;
}

// The columns that a box touches, as a window of whole vectors wherever the map is wide enough.
template <typename T> struct Window {
  int64_t bins = 0, start = 0, width = 0;
  std::vector<T> weights;                             // (bins, width): the taps, with zeros between them
  std::vector<std::pair<int64_t, int64_t>> bins_of;   // of each vector of columns: the bins that it belongs to, end excluded

  Window() {}
  Window(const Axis<T>& xs, int64_t cells) : bins(xs.start.size() - 1) {
    if (xs.taps.empty()) return;
    int64_t low = cells, high = -1;
    for (const auto& x : xs.taps) low = std::min(low, x.cell), high = std::max(high, x.cell);
    width = (high - low + lanes) / lanes * lanes;
    start = std::min(low, cells - width);
    if (width > cells) start = 0, width = cells;
    weights.resize(bins * width);
    bins_of.assign((width + lanes - 1) / lanes, {bins, 0});
    for (int64_t j = 0; j < bins; j++)
      for (int64_t k = xs.start[j]; k < xs.start[j + 1]; k++) {
        const int64_t x = xs.taps[k].cell - start;
        auto& [first, last] = bins_of[x / lanes];
        weights[j * width + x] = xs.taps[k].weight, first = std::min(first, j), last = std::max(last, j + 1);
      }
  }
};

template <typename T> std::vector<Window<T>> windows_of(const std::vector<Axis<T>>& xs, const std::vector<std::vector<int64_t>>& of_map, const Map& m) {
  std::vector<Window<T>> out(xs.size());
  for (int64_t b = 0; b < m.images; b++)
    for (int64_t k : of_map[m.level * m.images + b]) out[k] = Window<T>(xs[k], m.width);
  return out;
}

// ---- maps whose columns are neighbours in memory: four planes (image, channel) at a time, which stay in the cache ----

constexpr int64_t planes = 4;

// Four rows of numbers as one row of four: a0 b0 c0 d0 a1 b1 c1 d1 ...
template <typename T> void interleave(T* to, Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d) {
  const auto first = [](Vec<T> x, Vec<T> y) { return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); };
  const auto second = [](Vec<T> x, Vec<T> y) { return __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); };
  const auto first_pairs = [](Vec<T> x, Vec<T> y) { return __builtin_shufflevector(x, y, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23); };
  const auto second_pairs = [](Vec<T> x, Vec<T> y) { return __builtin_shufflevector(x, y, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31); };
  store(to, first_pairs(first(a, b), first(c, d))), store(to + lanes, second_pairs(first(a, b), first(c, d)));
  store(to + 2 * lanes, first_pairs(second(a, b), second(c, d))), store(to + 3 * lanes, second_pairs(second(a, b), second(c, d)));
}

// The sum of N weighted rows of a plane, 16 columns from x on; `row` are those of the plane.
template <int64_t N, typename T> Vec<T> sum_rows(const T* const* row, const T* weight, int64_t x) {
  Vec<T> sum = weight[0] * load(row[0] + x);
  for (int64_t k = 1; k < N; k++) sum += weight[k] * load(row[k] + x);
  return sum;
}

// strip[4 * x + p] = the sum of N weighted rows of plane p, over the window
template <int64_t N, typename T> void make_strip(T* strip, const T* const* plane, const Map& m, const Tap<T>* ys, const Window<T>& at) {
  const T* row[planes][N];
  T weight[N];
  for (int64_t k = 0; k < N; k++) {
    weight[k] = ys[k].weight;
    for (int64_t p = 0; p < planes; p++) row[p][k] = plane[p] + ys[k].cell * m.width + at.start;
  }
  int64_t x = 0;
  for (; x + lanes <= at.width; x += lanes)
    interleave(strip + planes * x, sum_rows<N>(row[0], weight, x), sum_rows<N>(row[1], weight, x), sum_rows<N>(row[2], weight, x), sum_rows<N>(row[3], weight, x));
  for (; x < at.width; x++)
    for (int64_t p = 0; p < planes; p++) {
      T sum = 0;
      for (int64_t k = 0; k < N; k++) sum += weight[k] * row[p][k][x];
      strip[planes * x + p] = sum;
    }
}

template <typename T> void planes_forward(const T* const* plane, int64_t count, const Map& m, const Axis<T>& ys, const Axis<T>& xs, const Window<T>& at, T* strip, T* out) {
  const int64_t height = ys.start.size() - 1, width = xs.start.size() - 1;
  for (int64_t i = 0; i < height; i++) {
    const Tap<T>* y = &ys.taps[ys.start[i]];
    switch (ys.count(i)) {
      case 0: std::fill_n(strip, planes * at.width, T(0)); break;
      case 1: make_strip<1>(strip, plane, m, y, at); break;
      case 2: make_strip<2>(strip, plane, m, y, at); break;
      case 3: make_strip<3>(strip, plane, m, y, at); break;
      default: make_strip<4>(strip, plane, m, y, at);
    }
    for (int64_t k = 4; k < ys.count(i); k++)  // more than two points a bin
      for (int64_t p = 0; p < planes; p++)
        for (int64_t x = 0; x < at.width; x++) strip[planes * x + p] += y[k].weight * plane[p][y[k].cell * m.width + at.start + x];
    for (int64_t j = 0; j < width; j++) {
      Vec<T, planes> sum{};  // one number a plane
      for (int64_t k = xs.start[j]; k < xs.start[j + 1]; k++) sum += xs.taps[k].weight * load<planes>(strip + planes * (xs.taps[k].cell - at.start));
      for (int64_t p = 0; p < count; p++) out[(p * height + i) * width + j] = sum[p];
    }
  }
}

// row[x] += weight * strip[x]
template <typename T> void add_row(T* row, const T* strip, T weight, int64_t width) {
  int64_t x = 0;
  for (; x + lanes <= width; x += lanes) store(row + x, load(row + x) + weight * load(strip + x));
  for (; x < width; x++) row[x] += weight * strip[x];
}

template <typename T> void plane_backward(T* plane, const Map& m, const Axis<T>& ys, const Window<T>& at, T* strip, const T* grad) {
  const int64_t height = ys.start.size() - 1;
  for (int64_t i = 0; i < height; i++, grad += at.bins) {
    for (int64_t x = 0; x < at.width; x += lanes) {
      const auto [first, last] = at.bins_of[x / lanes];
      if (x + lanes <= at.width) {
        Vec<T> sum{};
        for (int64_t j = first; j < last; j++) sum += grad[j] * load(&at.weights[j * at.width + x]);
        store(strip + x, sum);
      } else for (int64_t rest = x; rest < at.width; rest++) {
        strip[rest] = 0;
        for (int64_t j = first; j < last; j++) strip[rest] += grad[j] * at.weights[j * at.width + rest];
      }
    }
    for (int64_t k = ys.start[i]; k < ys.start[i + 1]; k++) add_row(plane + ys.taps[k].cell * m.width + at.start, strip, ys.taps[k].weight, at.width);
  }
}

// ---- channels_last maps: all channels of a cell are neighbours in memory ----

template <typename T> struct Source { const T* cell; T weight; };

// to[c] = sum of weighted cells, over all channels
template <typename T> void sum_cells(T* to, const Source<T>* from, int64_t n, int64_t channels) {
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) {
    Vec<T> a{}, b{}, d{}, e{};
    for (int64_t k = 0; k < n; k++) {
      const T w = from[k].weight, *f = from[k].cell + c;
      a += w * load(f), b += w * load(f + lanes), d += w * load(f + 2 * lanes), e += w * load(f + 3 * lanes);
    }
    store(to + c, a), store(to + c + lanes, b), store(to + c + 2 * lanes, d), store(to + c + 3 * lanes, e);
  }
  for (; c < channels; c++) {
    T sum = 0;
    for (int64_t k = 0; k < n; k++) sum += from[k].weight * from[k].cell[c];
    to[c] = sum;
  }
}

template <typename T> void box_forward(const T* map, const Map& m, const Axis<T>& ys, const Axis<T>& xs, T* cells, T* out) {
  const int64_t height = ys.start.size() - 1, width = xs.start.size() - 1, bins = height * width;
  std::vector<Source<T>> from;
  for (int64_t i = 0; i < height; i++)
    for (int64_t j = 0; j < width; j++) {
      from.clear();
      for (int64_t y = ys.start[i]; y < ys.start[i + 1]; y++)
        for (int64_t x = xs.start[j]; x < xs.start[j + 1]; x++)
          from.push_back({map + (ys.taps[y].cell * m.width + xs.taps[x].cell) * m.channels, ys.taps[y].weight * xs.taps[x].weight});
      sum_cells(cells + (i * width + j) * m.channels, from.data(), from.size(), m.channels);
    }
  for (int64_t c = 0; c < m.channels; c++)
    for (int64_t b = 0; b < bins; b++) out[c * bins + b] = cells[b * m.channels + c];
}

// What a row of the map receives from one bin row of one box.
template <typename T> struct Share { int64_t box, bin; T weight; };

// ---- the ops ----

template <typename T>
void forward(const std::vector<Tensor>& features, const std::vector<Map>& maps, const Boxes<T>& boxes, T* out, int64_t height, int64_t width) {
  const int64_t channels = maps[0].channels, images = maps[0].images, size = channels * height * width;
  for (const Map& m : maps) {
    const T* data = features[m.level].template const_data_ptr<T>();
    if (m.channels_last) {
      std::vector<std::pair<int64_t, int64_t>> jobs;  // (image, box)
      for (int64_t b = 0; b < images; b++)
        for (int64_t k : boxes.of_map[m.level * images + b]) jobs.push_back({b, k});
      parallel(jobs.size(), [&] { return [&, cells = std::vector<T>(size)](int64_t i) mutable {
        const auto [b, k] = jobs[i];
        box_forward(data + b * channels * m.plane(), m, boxes.ys[k], boxes.xs[k], cells.data(), out + k * size);
      }; });
    } else {
      const auto windows = windows_of(boxes.xs, boxes.of_map, m);
      const int64_t pieces = (channels + planes - 1) / planes;
      parallel(images * pieces, [&] { return [&, strip = std::vector<T>(planes * m.width)](int64_t i) mutable {
        const int64_t b = i / pieces, c = i % pieces * planes, count = std::min(planes, channels - c);
        const auto& list = boxes.of_map[m.level * images + b];
        const T* plane[planes];
        for (int64_t p = 0; p < planes; p++) plane[p] = data + (b * channels + c + std::min(p, count - 1)) * m.plane();
        if (list.size() >= 16)  // boxes enough to need most of it: fetch it in order, before they read here and there
          for (int64_t x = 0; x < count * m.plane(); x += 64 / sizeof(T)) __builtin_prefetch(plane[0] + x);
        for (int64_t k : list)
          planes_forward(plane, count, m, boxes.ys[k], boxes.xs[k], windows[k], strip.data(), out + k * size + c * height * width);
      }; });
    }
  }
}

// Every piece of the gradient has one owner, who adds what the boxes give in the order of the boxes: the same bits on any number of threads.
template <typename T>
void backward(const T* grad, const std::vector<Tensor>& out, const std::vector<Map>& maps, const Boxes<T>& boxes, int64_t height, int64_t width) {
  const int64_t channels = maps[0].channels, images = maps[0].images, bins = height * width, size = channels * bins;
  std::vector<T> turned;   // grad with channels last, where a map has them last
  for (const Map& m : maps) {
    T* data = out[m.level].template mutable_data_ptr<T>();
    if (m.channels_last) {
      if (turned.empty()) {
        turned.resize(boxes.xs.size() * size);
        parallel(boxes.xs.size(), [&] { return [&](int64_t k) {
          for (int64_t b = 0; b < bins; b++)
            for (int64_t c = 0; c < channels; c++) turned[k * size + b * channels + c] = grad[k * size + c * bins + b];
        }; });
      }
      std::vector<std::vector<Share<T>>> rows(images * m.height);
      for (int64_t b = 0; b < images; b++)
        for (int64_t k : boxes.of_map[m.level * images + b])
          for (int64_t i = 0; i < height; i++)
            for (int64_t y = boxes.ys[k].start[i]; y < boxes.ys[k].start[i + 1]; y++) rows[b * m.height + boxes.ys[k].taps[y].cell].push_back({k, i, boxes.ys[k].taps[y].weight});
      parallel(rows.size(), [&] { return [&](int64_t r) {
        T* row = data + r * m.width * channels;
        std::fill_n(row, m.width * channels, T(0));
        for (const auto& share : rows[r]) {
          const Axis<T>& xs = boxes.xs[share.box];
          for (int64_t j = 0; j < width; j++)
            for (int64_t x = xs.start[j]; x < xs.start[j + 1]; x++)
              add_row(row + xs.taps[x].cell * channels, &turned[share.box * size + (share.bin * width + j) * channels], share.weight * xs.taps[x].weight, channels);
        }
      }; });
    } else {
      const auto windows = windows_of(boxes.xs, boxes.of_map, m);
      parallel(images * channels, [&] { return [&, strip = std::vector<T>(m.width)](int64_t i) mutable {
        T* plane = data + i * m.plane();
        std::fill_n(plane, m.plane(), T(0));
        const auto& list = boxes.of_map[m.level * images + i / channels];
        const T* from = grad + i % channels * bins;
        for (size_t k = 0; k < list.size(); k++) {
          if (k + 1 < list.size()) __builtin_prefetch(from + list[k + 1] * size);  // what the next box gives lies elsewhere
          plane_backward(plane, m, boxes.ys[list[k]], windows[list[k]], strip.data(), from + list[k] * size);
        }
      }; });
    }
  }
}

// Maps in the type that sums are made in, contiguous one way or the other.
inline std::vector<Tensor> prepare(const std::vector<Tensor>& features, std::vector<Map>& maps) {
  STD_TORCH_CHECK(!features.empty(), "roi_align: the list of feature maps is empty");
  std::vector<Tensor> out;
  for (const Tensor& f : features) {
    STD_TORCH_CHECK(f.dim() == 4, "roi_align: a feature map has ", f.dim(), " dimensions, it must be (B, C, H, W)");
    STD_TORCH_CHECK(f.size(0) == features[0].size(0) && f.size(1) == features[0].size(1), "roi_align: feature maps differ in their number of images or channels");
    STD_TORCH_CHECK(f.scalar_type() == features[0].scalar_type(), "roi_align: feature maps differ in their dtype");
    Tensor t = cast(f, sum_type(f));
    if (!map_of(t, 0).channels_last) t = torch::stable::contiguous(t);
    maps.push_back(map_of(t, int64_t(out.size())));
    out.push_back(t);
  }
  return out;
}

inline void check_boxes(const Tensor& boxes, const Tensor& image, const Tensor& level, const std::vector<Tensor>& features, const std::vector<double>& scales, int64_t height, int64_t width) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "roi_align: boxes must be (N, 4)");
  STD_TORCH_CHECK(image.dim() == 1 && level.dim() == 1 && image.size(0) == boxes.size(0) && level.size(0) == boxes.size(0), "roi_align: image and level must be (N,), one number a box");
  STD_TORCH_CHECK(image.scalar_type() == ScalarType::Long && level.scalar_type() == ScalarType::Long, "roi_align: image and level must be int64");
  STD_TORCH_CHECK(scales.size() == features.size(), "roi_align: ", scales.size(), " scales for ", features.size(), " feature maps");
  STD_TORCH_CHECK(height > 0 && width > 0, "roi_align: the output must have at least one bin each way");
}

Tensor roi_align(std::vector<Tensor> features, Tensor boxes, Tensor image, Tensor level, std::vector<double> scales, int64_t height, int64_t width, int64_t sampling, bool aligned) {
  std::vector<Map> maps;
  const auto sources = prepare(features, maps);
  check_boxes(boxes, image, level, features, scales, height, width);
  const ScalarType type = sum_type(features[0]);
  boxes = torch::stable::contiguous(cast(boxes, type)), image = torch::stable::contiguous(image), level = torch::stable::contiguous(level);
  const int64_t n = boxes.size(0), channels = maps[0].channels, size = channels * height * width;
  Tensor out = torch::stable::new_empty(sources[0], {n, channels, height, width}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    T* to = large(out).template mutable_data_ptr<T>();
    const auto read = read_boxes<T>(maps, boxes, image, level, scales, height, width, sampling, aligned);
    std::vector<bool> filled(n);
    for (const auto& list : read.of_map) for (int64_t k : list) filled[k] = true;
    for (int64_t k = 0; k < n; k++) if (!filled[k]) std::fill_n(to + k * size, size, T(0));
    forward<T>(sources, maps, read, to, height, width);
  });
  return cast(out, features[0].scalar_type());
}

std::vector<Tensor> roi_align_backward(Tensor grad, std::vector<Tensor> features, Tensor boxes, Tensor image, Tensor level, std::vector<double> scales, int64_t height, int64_t width, int64_t sampling, bool aligned, bool /* always */) {
  std::vector<Map> maps;
  check_boxes(boxes, image, level, features, scales, height, width);
  const ScalarType type = sum_type(features[0]);
  std::vector<Tensor> out;
  for (const Tensor& f : features) {
    Map m = map_of(f, int64_t(out.size()));
    const Tensor t = m.channels_last ? torch::stable::new_empty(f, {m.images, m.height, m.width, m.channels}, type) : torch::stable::new_empty(f, {m.images, m.channels, m.height, m.width}, type);
    large(t);
    maps.push_back(m), out.push_back(m.channels_last ? torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3) : t);
  }
  boxes = torch::stable::contiguous(cast(boxes, type)), image = torch::stable::contiguous(image), level = torch::stable::contiguous(level);
  grad = torch::stable::contiguous(cast(grad, type));
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(grad.template const_data_ptr<T>(), out, maps, read_boxes<T>(maps, boxes, image, level, scales, height, width, sampling, aligned), height, width);
  });
  for (size_t k = 0; k < out.size(); k++) out[k] = cast(out[k], features[k].scalar_type());
  return out;
}

}  // namespace maskrcnn_edu
