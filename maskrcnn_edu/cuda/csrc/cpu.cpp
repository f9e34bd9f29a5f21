// All CPU ops in one unit, so that one short call of the compiler makes them.
#include "nms.cpp"
#include "paste_masks.cpp"
#include "roi_align.cpp"

STABLE_TORCH_LIBRARY_IMPL(maskrcnn_edu, CPU, m) {
  m.impl("nms_keep", TORCH_BOX(&maskrcnn_edu::nms_keep));
  m.impl("roi_align", TORCH_BOX(&maskrcnn_edu::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&maskrcnn_edu::roi_align_backward));
  m.impl("paste_masks", TORCH_BOX(&maskrcnn_edu::paste_masks));
}
