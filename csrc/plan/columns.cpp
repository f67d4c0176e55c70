#include "columns.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "../tensors.h"

namespace fusedopt::plan {

CanonicalOrder::CanonicalOrder(const c10::TensorImpl* param)
    : device_(param->device()), sizes_(param->sizes().begin(), param->sizes().end()) {
  for (size_t d = 0; d < sizes_.size(); ++d) {
    if (sizes_[d] != 1) dimensions_.push_back(static_cast<int>(d));
  }
  std::stable_sort(dimensions_.begin(), dimensions_.end(),
                   [&](int a, int b) { return param->stride(a) > param->stride(b); });
}

const char* CanonicalOrder::describe(const at::Tensor& tensor, Column& column, OwnedLayout& layout,
                                     bool written) const {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (const char* problem = foreign(impl, device_.type())) return problem;
  to_dtype(impl, column.dtype);
  return lay_out(tensor, column, layout, written);
}

const char* CanonicalOrder::describe_pieces(const at::Tensor& tensor, Column& column, OwnedLayout& layout) const {
  if (const char* problem = unreachable(tensor.unsafeGetTensorImpl(), device_.type())) return problem;
  return lay_out(tensor, column, layout, true);
}

const char* CanonicalOrder::lay_out(const at::Tensor& tensor, Column& column, OwnedLayout& layout, bool written) const {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (impl->device() != device_) return "is on another device than its parameter";
  if (impl->sizes() != at::IntArrayRef(sizes_)) return "has another shape than its parameter";
  layout.reset();
  column.layout = nullptr;
  if (impl->numel() == 0) return nullptr;

  const auto strides = impl->strides();
  bool flat = true;
  int64_t dense = 1;
  for (auto d = dimensions_.rbegin(); d != dimensions_.rend(); ++d) {
    flat &= strides[*d] == dense;
    dense *= sizes_[*d];
  }
  if (flat) return nullptr;
  if (written && at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
    return "has elements that share memory (an expanded tensor?)";
  }
  layout = std::make_unique<Layout>();
  layout->dims = 0;
  for (int d : dimensions_) {
    const int last = layout->dims - 1;
    if (last >= 0 && layout->stride[last] == strides[d] * sizes_[d]) {
      layout->size[last] *= sizes_[d];
      layout->stride[last] = strides[d];
    } else if (layout->dims == kMaxDims) {
      return "has more than 16 dimensions that cannot be merged";
    } else {
      layout->size[layout->dims] = sizes_[d];
      layout->stride[layout->dims++] = strides[d];
    }
  }
  column.layout = layout.get();
  return nullptr;
}

}  // namespace fusedopt::plan
