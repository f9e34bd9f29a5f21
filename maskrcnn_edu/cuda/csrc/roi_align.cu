// ROIAlign on the GPU, forward and backward (Mask R-CNN, section 3). Lesson: nbs/12_roi_align.ipynb
//
// A bin of a box is a weighted sum of cells, and the weights factor: (weights of rows) x (weights of columns).
// 1. `find_taps`: one thread a box and bin of an axis writes the list of cells that the bin takes there, with their weights: its taps.
// 2. `sum_bins…`: the sums themselves. A group of 32 threads runs in step and is served by memory in pieces of 32 bytes or more, so it is
//    fast when neighbouring threads want neighbouring numbers: in maps with channels last, when a thread is a channel.
// 3. `share_gradient`: the same walk backwards; the gradient of a bin is added to the cells it took.
#include "cuda_common.h"

namespace maskrcnn_edu {

constexpr int max_levels = 8;

// The maps of the pyramid, as they lie in memory. Strides count numbers, not bytes.
struct Maps {
  int levels, images, channels, height[max_levels], width[max_levels];
  int64_t image_stride[max_levels], channel_stride[max_levels], row_stride[max_levels], column_stride[max_levels];
  double scale[max_levels];  // cells a pixel

  __device__ bool hold(int64_t image, int64_t level) const { return level >= 0 && level < levels && image >= 0 && image < images; }
};

template <class T> struct Pyramid : Maps { T* map[max_levels]; };

template <class A> struct alignas(2 * sizeof(A)) Tap { A weight; int cell; };  // one cell along one axis, and how much it counts

// The taps of all boxes. Axis 0 is y, axis 1 is x; bins of y come first.
template <class A> struct Taps {
  Tap<A>* tap;                   // (boxes, room[0] + room[1])
  int *first, *end;              // (boxes, bins[0] + bins[1]): the part of the box's taps that belongs to a bin
  int bins[2], room[2];
  int sampling;                  // points a bin; 0: one for every cell it is long
  bool aligned;

  struct List { const Tap<A>*from, *to; __device__ const Tap<A>* begin() const { return from; } __device__ const Tap<A>* end() const { return to; } };

  __device__ List of(int64_t box, int axis, int bin) const {
    const int64_t entry = box * (bins[0] + bins[1]) + axis * bins[0] + bin;
    const Tap<A>* own = tap + box * (room[0] + room[1]) + axis * room[0];
    return {own + first[entry], own + end[entry]};
  }
};

// Where the sample points of one bin lie along one axis, in cells.
template <class A> struct Points {
  A start, width;  // of the bin
  A count;
  __device__ A at(int i) const { return start + (A(i) + A(.5)) * width / count; }
};

// The taps of one bin. Points go from low to high, so a cell is done as soon as a point is past it.
template <class A>
__device__ int write_taps(Points<A> points, int first, int end, int cells, int lowest, int highest, Tap<A>* to) {
  int n = 0, low = -2;                 // the last point lies between cell `low` and the next
  A in_low = 0, in_high = 0;           // their weights so far
  auto write = [&](int cell, A weight) { if (weight > 0 && cell >= lowest && cell <= highest) to[n++] = {weight / points.count, cell}; };
  for (int k = first; k < end; k++) {
    A at = points.at(points.width < 0 ? first + end - 1 - k : k);
    if (!(at >= -1 && at <= cells)) continue;           // outside, or not a number
    at = min(max(at, A(0)), A(cells - 1));
    if (int(at) != low) {
      write(low, in_low);
      if (int(at) != low + 1) write(low + 1, in_high), in_high = 0;
      low = int(at), in_low = in_high, in_high = 0;
    }
    in_low += 1 - (at - low), in_high += at - low;
  }
  write(low, in_low), write(low + 1, in_high);
  return n;
}

// One thread: the taps of one bin of one box along one axis.
template <class A>
__global__ void find_taps(Maps maps, const A* boxes, const int64_t* image, const int64_t* level, int64_t n, Taps<A> taps) {
  const int bins_of_box = taps.bins[0] + taps.bins[1];
  const int64_t entry = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, box = entry / bins_of_box;
  if (box >= n) return;
  const int axis = entry % bins_of_box >= taps.bins[0], bin = entry % bins_of_box - axis * taps.bins[0], bins = taps.bins[axis];
  taps.first[entry] = taps.end[entry] = 0;  // an empty slot has no taps, so its sums are 0
  if (!maps.hold(image[box], level[box])) return;

  const A scale = A(maps.scale[level[box]]), shift = taps.aligned ? A(.5) : A(0);
  const A start = boxes[4 * box + 1 - axis] * scale - shift, stop = boxes[4 * box + 3 - axis] * scale - shift;
  const int cells = axis ? maps.width[level[box]] : maps.height[level[box]];
  if (cells == 0 || !isfinite(stop - start)) return;
  const A extent = taps.aligned ? stop - start : max(stop - start, A(1)), width = extent / bins;
  const bool adaptive = taps.sampling <= 0;
  const A count = adaptive ? min(max(ceil(width), A(0)), A(1e9)) : A(taps.sampling);
  const Points<A> points{start + bin * width, width, count};

  // Room for the taps. Adaptive points are at most a cell apart, so the cells between the bin's edges will do;
  // two lists overlap by two cells at most. Of a giant box only the points that can be inside are looked at.
  int lowest = 0, highest = cells - 1, first = 0, end = int(count), place = bin * (taps.room[axis] / bins);
  if (adaptive) {
    const A last_cell = A(cells - 1), far_edge = start + (bin + 1) * width;
    if (!(count > 0)) return;
    lowest = int(min(max(points.start, A(0)), last_cell)), highest = int(min(max(far_edge, A(-1)), last_cell - 1)) + 1;
    place = lowest + 2 * bin;
    const A step = width / count;
    first = int(min(max(floor((-1 - points.start) / step) - 1, A(0)), count)), end = int(min(max(ceil((cells - points.start) / step) + 1, A(0)), count));
  }
  const int64_t own = box * (taps.room[0] + taps.room[1]) + axis * taps.room[0] + place;
  taps.first[entry] = place;
  taps.end[entry] = place + write_taps(points, first, end, cells, lowest, highest, taps.tap + own);
}

// One thread: one channel, along one row of bins of one box. For maps with channels last.
template <class T, class A>
__global__ void sum_bins_by_channel(Pyramid<const T> maps, const int64_t* image, const int64_t* level, Taps<A> taps, T* out) {
  const int height = taps.bins[0], width = taps.bins[1], row = blockIdx.x % height;
  const int64_t box = blockIdx.x / height, channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= maps.channels) return;
  T* to = out + ((box * maps.channels + channel) * height + row) * width;
  const int l = maps.hold(image[box], level[box]) ? int(level[box]) : -1;
  const T* map = l < 0 ? nullptr : maps.map[l] + image[box] * maps.image_stride[l] + channel * maps.channel_stride[l];
  const auto rows = taps.of(box, 0, row);
  for (int column = 0; column < width; column++) {
    const auto columns = taps.of(box, 1, column);
    A sum = 0;
    for (const Tap<A> y : rows) {
      const T* line = map + y.cell * maps.row_stride[l];
#pragma unroll 4
      for (const Tap<A> x : columns) sum += y.weight * x.weight * A(line[x.cell * maps.column_stride[l]]);
    }
    to[column] = T(sum);
  }
}

// One thread: one bin of one box, for a few channels, so that places and weights serve several times. For maps of any strides.
constexpr int few = 8;

template <class T, class A>
__global__ void sum_bins_by_bin(Pyramid<const T> maps, const int64_t* image, const int64_t* level, int64_t n, Taps<A> taps, T* out) {
  const int height = taps.bins[0], width = taps.bins[1], bins = height * width;
  const int64_t work = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, box = work / bins;
  if (box >= n) return;
  const int bin = work % bins, channel = blockIdx.y * few, channels = min(few, maps.channels - channel);
  const int l = maps.hold(image[box], level[box]) ? int(level[box]) : -1;
  const T* map = l < 0 ? nullptr : maps.map[l] + image[box] * maps.image_stride[l] + channel * maps.channel_stride[l];
  A sum[few] = {};
  const auto rows = taps.of(box, 0, bin / width), columns = taps.of(box, 1, bin % width);
  for (const Tap<A> y : rows)
    for (const Tap<A> x : columns) {
      const T* cell = map + y.cell * maps.row_stride[l] + x.cell * maps.column_stride[l];
#pragma unroll
      for (int c = 0; c < few; c++)
        if (c < channels) sum[c] += y.weight * x.weight * A(cell[c * maps.channel_stride[l]]);
    }
#pragma unroll
  for (int c = 0; c < few; c++)
    if (c < channels) out[(box * maps.channels + channel + c) * bins + bin] = T(sum[c]);
}

// ---- backward ----

// Many threads add to one cell, in an order that changes from run to run, and a sum of floats depends on its order.
// Whole numbers do not: the deterministic way counts in units so small that nothing is lost (see `choose_unit`).
template <class A> struct Floats {
  using Cell = A;
  __device__ void add(Cell* cell, A value) const { atomicAdd(cell, value); }
  __device__ A value(Cell sum) const { return sum; }
};

template <class A> struct WholeNumbers {
  using Cell = unsigned long long;  // a negative number is its complement, which adds up just as well
  const double* unit;               // one over the unit, and the unit
  __device__ void add(Cell* cell, A value) const { atomicAdd(cell, Cell(llrint(double(value) * unit[0]))); }
  __device__ A value(Cell sum) const { return A(double(static_cast<long long>(sum)) * unit[1]); }
};

// The smallest unit, a power of two, in which no sum of `terms` gradients leaves 64 bits. If the largest gradient is not finite, none of
// the map's is: the unit is not a number.
template <class T>
__global__ void choose_unit(const T* largest, int64_t terms, double* unit) {
  int size, count;
  const double value = double(*largest);
  frexp(value, &size), frexp(double(terms), &count);
  const int bits = isfinite(value) ? max(min(61 - count - size, 1000), -1000) : 0;
  unit[0] = isfinite(value) ? ldexp(1., bits) : 0, unit[1] = isfinite(value) ? ldexp(1., -bits) : value - value;
}

// One thread: one channel, along one row of bins of one box. `sums` are laid out with channels last, so neighbouring threads add to neighbours.
template <class T, class A, class Adder>
__global__ void share_gradient(Pyramid<typename Adder::Cell> sums, const int64_t* image, const int64_t* level, Taps<A> taps, const T* grad, Adder adder) {
  const int height = taps.bins[0], width = taps.bins[1], row = blockIdx.x % height;
  const int64_t box = blockIdx.x / height, channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= sums.channels || !sums.hold(image[box], level[box])) return;
  const T* from = grad + ((box * sums.channels + channel) * height + row) * width;
  const int l = int(level[box]);
  const auto rows = taps.of(box, 0, row);
  typename Adder::Cell* map = sums.map[l] + image[box] * sums.image_stride[l] + channel * sums.channel_stride[l];
  for (int column = 0; column < width; column++) {
    const A g = A(from[column]);
    const auto columns = taps.of(box, 1, column);
    for (const Tap<A> y : rows)
      for (const Tap<A> x : columns) adder.add(map + y.cell * sums.row_stride[l] + x.cell * sums.column_stride[l], y.weight * x.weight * g);
  }
}

// ---- from one layout to the other ----

constexpr int tile = 32, tile_rows = 8;

struct Same { template <class T> __device__ T value(T x) const { return x; } };

// Every image is a table, (channels, cells) or (cells, channels); this turns rows into columns. A block of threads brings a tile of the table to the
// memory that it shares, row by row, and takes it away column by column: both times neighbouring threads touch neighbouring numbers.
template <class From, class To, class Reader>
__global__ void turn(const From* from, int64_t rows, int64_t columns, Reader reader, To* to) {
  __shared__ From part[tile][tile + 1];  // one more, so that a column is spread over all memory banks
  const int x = threadIdx.x % tile, y = threadIdx.x / tile;
  const int64_t tiles = (rows + tile - 1) / tile, row = blockIdx.x % tiles * tile, column = blockIdx.x / tiles * tile, image = blockIdx.y * rows * columns;
  for (int k = y; k < tile; k += tile_rows)
    if (row + k < rows && column + x < columns) part[k][x] = from[image + (row + k) * columns + column + x];
  __syncthreads();
  for (int k = y; k < tile; k += tile_rows)
    if (row + x < rows && column + k < columns) to[image + (column + k) * rows + row + x] = To(reader.value(part[x][k]));
}

// One thread: one number, when the layout stays.
template <class From, class To, class Reader>
__global__ void convert(const From* from, int64_t n, Reader reader, To* to) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) to[i] = To(reader.value(from[i]));
}

template <class From, class To, class Reader>
void turn_images(const Tensor& like, const From* from, int64_t rows, int64_t columns, Reader reader, To* to, const OnDeviceOf& device) {
  const int64_t tiles = (rows + tile - 1) / tile * ((columns + tile - 1) / tile);
  launch(turn<From, To, Reader>, dim3(blocks_for(tiles), unsigned(like.size(0))), tile * tile_rows, device, from, rows, columns, reader, to);
}

// ---- the ops ----

inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline Tensor empty_channels_last(const Tensor& like, ScalarType type) {
  const Tensor t = torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(3), like.size(1)}, type);
  return torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3);
}

template <class T> Pyramid<T> pyramid_of(const std::vector<Tensor>& maps, const std::vector<double>& scales) {
  Pyramid<T> p{};
  p.levels = int(maps.size()), p.images = int(maps[0].size(0)), p.channels = int(maps[0].size(1));
  for (int l = 0; l < p.levels; l++) {
    const Tensor& m = maps[l];
    p.map[l] = data<T>(m), p.height[l] = int(m.size(2)), p.width[l] = int(m.size(3)), p.scale[l] = scales[l];
    p.image_stride[l] = m.stride(0), p.channel_stride[l] = m.stride(1), p.row_stride[l] = m.stride(2), p.column_stride[l] = m.stride(3);
  }
  return p;
}

// The boxes of one call, checked and in the types that the kernels read; and the memory that their taps live in.
struct Rois {
  Tensor boxes, image, level, taps, ranges;
  int64_t n, cells = 0;  // boxes; cells of all maps of all images

  Rois(const std::vector<Tensor>& features, const Tensor& boxes_, const Tensor& image_, const Tensor& level_, const std::vector<double>& scales, int64_t height, int64_t width)
      : n(boxes_.size(0)) {
    STD_TORCH_CHECK(!features.empty() && features.size() <= max_levels, "roi_align: between 1 and ", max_levels, " feature maps, not ", features.size());
    STD_TORCH_CHECK(scales.size() == features.size(), "roi_align: ", scales.size(), " scales for ", features.size(), " feature maps");
    STD_TORCH_CHECK(boxes_.dim() == 2 && boxes_.size(1) == 4, "roi_align: boxes must be (N, 4)");
    STD_TORCH_CHECK(image_.dim() == 1 && level_.dim() == 1 && image_.size(0) == n && level_.size(0) == n, "roi_align: image and level must be (N,), one number a box");
    STD_TORCH_CHECK(image_.scalar_type() == ScalarType::Long && level_.scalar_type() == ScalarType::Long, "roi_align: image and level must be int64");
    STD_TORCH_CHECK(height > 0 && width > 0, "roi_align: the output must have at least one bin each way");
    const Tensor& first = features[0];
    for (const Tensor& f : features) {
      STD_TORCH_CHECK(f.dim() == 4, "roi_align: a feature map must be (B, C, H, W)");
      STD_TORCH_CHECK(f.size(0) == first.size(0) && f.size(1) == first.size(1) && f.scalar_type() == first.scalar_type(), "roi_align: feature maps differ in images, channels or dtype");
      STD_TORCH_CHECK(f.size(0) < 65536 && f.size(2) < (1 << 24) && f.size(3) < (1 << 24), "roi_align: a feature map is too large");
      cells += f.size(0) * f.size(2) * f.size(3);
    }
    boxes = torch::stable::contiguous(cast(boxes_, sum_type(first.scalar_type())));
    image = torch::stable::contiguous(image_), level = torch::stable::contiguous(level_);
  }

  template <class A>
  Taps<A> find(const std::vector<Tensor>& features, const Maps& maps, int64_t height, int64_t width, int64_t sampling, bool aligned, const OnDeviceOf& device) {
    Taps<A> t{nullptr, nullptr, nullptr, {int(height), int(width)}, {0, 0}, int(sampling), aligned};
    for (int axis : {0, 1}) {
      int64_t most = 1;  // cells along the axis
      for (const Tensor& f : features) most = std::max(most, f.size(2 + axis));
      t.room[axis] = int(sampling > 0 ? t.bins[axis] * std::min(2 * sampling, most) : most + 2 * t.bins[axis]);
    }
    taps = torch::stable::new_empty(boxes, {n, (t.room[0] + t.room[1]) * int64_t(sizeof(Tap<A>))}, ScalarType::Byte);
    ranges = torch::stable::new_empty(boxes, {2, n, height + width}, ScalarType::Int);
    t.tap = data<Tap<A>>(taps), t.first = data<int>(ranges), t.end = t.first + n * (height + width);
    launch(find_taps<A>, blocks_for(n * (height + width), 128), 128, device, maps, data<A>(boxes), data<int64_t>(image), data<int64_t>(level), n, t);
    return t;
  }
};

inline unsigned channel_threads(int64_t channels) { return unsigned(std::min<int64_t>((channels + 31) / 32 * 32, 256)); }

Tensor roi_align(std::vector<Tensor> features, Tensor boxes, Tensor image, Tensor level, std::vector<double> scales,
                 int64_t height, int64_t width, int64_t sampling, bool aligned) {
  Rois rois(features, boxes, image, level, scales, height, width);
  const int64_t channels = features[0].size(1);
  const OnDeviceOf device(features[0]);
  const Tensor out = torch::stable::new_empty(features[0], {rois.n, channels, height, width});
  if (out.numel() == 0) return out;
  with_float_type(features[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    // A bin reads pairs of cells. With columns as neighbours a pair costs a piece of 32 bytes and uses 8; a bin with 2 x 2 points, 8 pairs, wastes
    // some 192 bytes a channel. To turn a map costs to read and write 4 bytes a cell and channel. So many bins make it worth while.
    const bool turning_pays = 24 * rois.n * height * width > rois.cells;
    bool last = true;
    for (Tensor& f : features) {
      if (!is_channels_last(f) && turning_pays) {
        const Tensor rows = torch::stable::contiguous(f);
        f = empty_channels_last(f, f.scalar_type());
        turn_images(f, data<T>(rows), channels, f.size(2) * f.size(3), Same(), data<T>(f), device);
      }
      last = last && is_channels_last(f);
    }
    const auto maps = pyramid_of<const T>(features, scales);
    const Taps<A> taps = rois.find<A>(features, maps, height, width, sampling, aligned, device);
    if (last) {
      const unsigned threads = channel_threads(channels);
      launch(sum_bins_by_channel<T, A>, dim3(blocks_for(rois.n * height), blocks_for(channels, threads)), threads, device,
             maps, data<int64_t>(rois.image), data<int64_t>(rois.level), taps, data<T>(out));
    } else
      launch(sum_bins_by_bin<T, A>, dim3(blocks_for(rois.n * height * width, 128), blocks_for(channels, few)), 128, device,
             maps, data<int64_t>(rois.image), data<int64_t>(rois.level), rois.n, taps, data<T>(out));
  });
  return out;
}

template <class T, class A, class Adder>
void backward(const Tensor& grad, const std::vector<Tensor>& features, Rois& rois, const std::vector<double>& scales, int64_t height, int64_t width,
              int64_t sampling, bool aligned, ScalarType cell_type, Adder adder, std::vector<Tensor>& out, const OnDeviceOf& device) {
  using Cell = typename Adder::Cell;
  const int64_t channels = grad.size(1);
  constexpr bool sums_are_the_gradient = std::is_same_v<Cell, T>;
  std::vector<Tensor> sums;
  for (const Tensor& f : features) {
    const bool last = is_channels_last(f);
    out.push_back(last ? torch::stable::empty_like(f) : torch::stable::new_empty(f, f.sizes()));
    sums.push_back(last && sums_are_the_gradient ? out.back() : empty_channels_last(f, cell_type));
    torch::stable::zero_(sums.back());
  }
  const auto maps = pyramid_of<Cell>(sums, scales);
  const Taps<A> taps = rois.find<A>(features, maps, height, width, sampling, aligned, device);
  const unsigned threads = channel_threads(channels);
  launch(share_gradient<T, A, Adder>, dim3(blocks_for(rois.n * height), blocks_for(channels, threads)), threads, device,
         maps, data<int64_t>(rois.image), data<int64_t>(rois.level), taps, data<T>(grad), adder);
  for (size_t l = 0; l < features.size(); l++) {
    const Tensor& f = features[l];
    if (!is_channels_last(f))
      turn_images(f, data<Cell>(sums[l]), f.size(2) * f.size(3), channels, adder, data<T>(out[l]), device);
    else if (!sums_are_the_gradient)
      launch(convert<Cell, T, Adder>, blocks_for(f.numel(), 256), 256, device, data<Cell>(sums[l]), f.numel(), adder, data<T>(out[l]));
  }
}

// The largest of all numbers without their signs, on the GPU: (1, 1, 1, 1).
inline Tensor largest_magnitude(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::abs", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::amax(torch::stable::detail::to<Tensor>(stack[0]), {0, 1, 2, 3}, true);
}

std::vector<Tensor> roi_align_backward(Tensor grad, std::vector<Tensor> features, Tensor boxes, Tensor image, Tensor level, std::vector<double> scales,
                                       int64_t height, int64_t width, int64_t sampling, bool aligned, bool deterministic) {
  Rois rois(features, boxes, image, level, scales, height, width);
  const ScalarType type = features[0].scalar_type();
  const OnDeviceOf device(features[0]);
  grad = torch::stable::contiguous(cast(grad, type));
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.n && grad.size(1) == features[0].size(1) && grad.size(2) == height && grad.size(3) == width,
                  "roi_align_backward: the gradient must be (N, C, height, width)");
  std::vector<Tensor> out;
  if (grad.numel() == 0 || rois.cells == 0) {
    for (const Tensor& f : features) {
      Tensor zeros = torch::stable::empty_like(f);
      out.push_back(torch::stable::zero_(zeros));
    }
    return out;
  }
  with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    if (!deterministic)
      return backward<T, A>(grad, features, rois, scales, height, width, sampling, aligned, sum_type(type), Floats<A>(), out, device);
    const Tensor largest = largest_magnitude(grad), unit = torch::stable::new_empty(grad, {2}, ScalarType::Double);
    launch(choose_unit<T>, 1, 1, device, data<T>(largest), rois.n * height * width, data<double>(unit));
    backward<T, A>(grad, features, rois, scales, height, width, sampling, aligned, ScalarType::Long, WholeNumbers<A>{data<double>(unit)}, out, device);
  });
  return out;
}

}  // namespace maskrcnn_edu
