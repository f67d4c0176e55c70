#include "scaler.h"

#include <cmath>

#include "tensors.h"

namespace fusedopt {
namespace {

// The one element of a plain CPU tensor of this dtype, or null.
template <class T>
T* element(const at::Tensor& tensor, at::ScalarType dtype) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (unreachable(impl, at::kCPU) || c10::typeMetaToScalarType(impl->dtype()) != dtype || impl->numel() != 1)
    return nullptr;
  return static_cast<T*>(data_of(impl));
}

}  // namespace

bool update_scale(const at::Tensor& scale, const at::Tensor& growth_tracker, const at::Tensor& found_inf,
                  double growth_factor, double backoff_factor, int64_t growth_interval) {
  float* const value = element<float>(scale, at::kFloat);
  int* const steps = element<int>(growth_tracker, at::kInt);
  const float* const found = element<float>(found_inf, at::kFloat);
  if (!value || !steps || !found) return false;
  if (*found != 0) {
    *value = static_cast<float>(*value * backoff_factor);
    *steps = 0;
  } else if (++*steps == growth_interval) {
    const float grown = static_cast<float>(*value * growth_factor);
    if (std::isfinite(grown)) *value = grown;
    *steps = 0;
  }
  for (const at::Tensor* tensor : {&scale, &growth_tracker}) {
    if (!tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
  }
  return true;
}

}  // namespace fusedopt
