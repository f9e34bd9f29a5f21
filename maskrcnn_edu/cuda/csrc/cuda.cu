// All CUDA ops in one unit, so that one call of nvcc makes them.
#include "nms.cu"
#include "paste_masks.cu"
#include "roi_align.cu"

STABLE_TORCH_LIBRARY_IMPL(OPS_LIBRARY, OPS_DEVICE, m) {
  m.impl("nms_keep", TORCH_BOX(&maskrcnn_edu::nms_keep));
  m.impl("roi_align", TORCH_BOX(&maskrcnn_edu::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&maskrcnn_edu::roi_align_backward));
  m.impl("paste_masks", TORCH_BOX(&maskrcnn_edu::paste_masks));
}
