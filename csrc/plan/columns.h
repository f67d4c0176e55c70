// Columns of a parameter, measured against its canonical order.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "../tables.h"

namespace fusedopt::plan {

// A column's strides, where it is not flat. In a place of its own: a Column points to it.
using OwnedLayout = std::unique_ptr<Layout>;

// Where a parameter is, its sizes, and the order of its dimensions; see Note [Canonical order].
class CanonicalOrder {
 public:
  CanonicalOrder() = default;
  explicit CanonicalOrder(const c10::TensorImpl* param);

  c10::Device device() const { return device_; }
  // Those longer than 1, in canonical order.
  const std::vector<int>& dimensions() const { return dimensions_; }

  // Fills in the dtype and layout of a column: the parameter itself, its gradient or a state. Returns why the tensor
  // cannot be one, or null. A column that is `written` may not have elements that share memory.
  const char* describe(const at::Tensor& tensor, Column& column, OwnedLayout& layout, bool written) const;
  // The same but for the dtype, for a column of pieces, which are no numbers.
  const char* describe_pieces(const at::Tensor& tensor, Column& column, OwnedLayout& layout) const;

 private:
  const char* lay_out(const at::Tensor& tensor, Column& column, OwnedLayout& layout, bool written) const;

  c10::Device device_ = at::kCPU;
  std::vector<int64_t> sizes_;
  std::vector<int> dimensions_;  // longer than 1, in canonical order
};

}  // namespace fusedopt::plan
