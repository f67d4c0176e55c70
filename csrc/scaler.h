// The step of a gradient scaler's scale, for tensors on the CPU.
#pragma once
#include <ATen/core/Tensor.h>

namespace fusedopt {

// What torch._amp_update_scale_ does to `scale` (0-dim or one element, float32) and `growth_tracker` (the same, int32),
// without torch's dispatcher: with cold caches that takes longer than the update of a small model. Returns false, with
// nothing changed, when these are not plain tensors of those dtypes on the CPU.
bool update_scale(const at::Tensor& scale, const at::Tensor& growth_tracker, const at::Tensor& found_inf,
                  double growth_factor, double backoff_factor, int64_t growth_interval);

}  // namespace fusedopt
