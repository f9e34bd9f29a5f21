// Small masks into the picture on the GPU (Mask R-CNN, section 3.1). Lesson: nbs/18_detections.ipynb
//
// The result is by far the largest thing here, and most of it is empty: one thread owns 16 pixels in a row and writes them at once.
#include "cuda_common.h"

namespace maskrcnn_edu {

constexpr int pixels_a_thread = 16;

struct alignas(pixels_a_thread) Pixels { uint8_t set[pixels_a_thread]; };

// First and last pixel, along one axis, that a mask with a rim of one empty bin is stretched over.
struct Stretch { int64_t first, last; };

template <class A> __device__ Stretch stretch(A low, A high, int size) {
  const A centre = (high + low) / 2, half = (high - low) / 2 * (size + 2) / size, far = A(1e9);
  return {int64_t(min(max(centre - half, -far), far)), int64_t(min(max(centre + half, -far), far))};
}

// The bin below a pixel, counted with the rim, and the share of the next; or nothing.
template <class A> struct Between { int low; A part; bool inside; };

template <class A> __device__ Between<A> between(Stretch s, int64_t pixel, int size) {
  const int64_t extent = max(s.last - s.first + 1, int64_t(1));
  if (pixel < s.first || pixel >= s.first + extent) return {0, 0, false};
  const int bins = size + 2;
  const A at = min(max((A(pixel - s.first) + A(.5)) * bins / extent - A(.5), A(0)), A(bins - 1));
  const int low = min(int(at), bins - 2);
  return {low, at - low, true};
}

template <class A> __device__ A bin_value(const A* mask, int size, int row, int column) {
  return row < 1 || row > size || column < 1 || column > size ? A(0) : A(mask[(row - 1) * size + column - 1]);
}

template <class A> __device__ A pixel_value(const A* mask, int size, Between<A> y, Between<A> x) {
  if (!y.inside || !x.inside) return 0;
  const A upper = (1 - x.part) * bin_value(mask, size, y.low, x.low) + x.part * bin_value(mask, size, y.low, x.low + 1);
  const A lower = (1 - x.part) * bin_value(mask, size, y.low + 1, x.low) + x.part * bin_value(mask, size, y.low + 1, x.low + 1);
  return (1 - y.part) * upper + y.part * lower;
}

// One thread: 16 pixels that follow each other in the result, maybe from the end of one row to the start of the next.
template <class A>
__global__ void paste(const A* masks, const A* boxes, int64_t total, int size, int height, int width, A threshold, uint8_t* out) {
  const int64_t start = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * pixels_a_thread;
  if (start >= total) return;
  const int count = int(min(total - start, int64_t(pixels_a_thread)));
  Pixels pixels;
  for (int k = 0; k < pixels_a_thread; k++) pixels.set[k] = 0 >= threshold;
  for (int k = 0, end; k < count; k = end) {  // the part in one row
    const int64_t line = (start + k) / width, x = (start + k) % width, mask = line / height;
    end = int(min(k + width - x, int64_t(count)));
    const A* box = boxes + 4 * mask;
    if (!isfinite(box[2] - box[0]) || !isfinite(box[3] - box[1])) continue;
    const Between<A> y = between<A>(stretch(box[1], box[3], size), line % height, size);
    if (!y.inside) continue;
    const Stretch columns = stretch(box[0], box[2], size);
    for (int j = k; j < end; j++)
      pixels.set[j] = pixel_value(masks + mask * size * size, size, y, between<A>(columns, x + j - k, size)) >= threshold;
  }
  if (start + pixels_a_thread <= total) *reinterpret_cast<Pixels*>(out + start) = pixels;
  else for (int k = 0; k < count; k++) out[start + k] = pixels.set[k];
}

Tensor paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, double threshold) {
  STD_TORCH_CHECK(masks.dim() == 3 && masks.size(1) == masks.size(2) && masks.size(1) > 0 && masks.size(1) < 32768, "paste_masks: masks must be (D, S, S)");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.size(0) == masks.size(0), "paste_masks: boxes must be (D, 4), one for each mask");
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height < (1 << 30) && width < (1 << 30), "paste_masks: the picture has an impossible size");
  const OnDeviceOf device(masks);
  const Tensor out = torch::stable::new_empty(masks, {masks.size(0), height, width}, ScalarType::Bool);
  if (out.numel() == 0) return out;
  const ScalarType type = sum_type(masks.scalar_type());
  masks = torch::stable::contiguous(cast(masks, type)), boxes = torch::stable::contiguous(cast(boxes, type));
  with_sum_type(type, [&](auto zero) {
    using A = decltype(zero);
    launch(paste<A>, blocks_for(out.numel(), 256 * pixels_a_thread), 256, device,
           data<A>(masks), data<A>(boxes), out.numel(), masks.size(1), height, width, A(threshold), data<uint8_t>(out));
  });
  return out;
}

}  // namespace maskrcnn_edu
