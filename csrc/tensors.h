// What is asked of torch's tensors at every step, inline: for a small tensor a call costs more than the answer.
#pragma once
#include <ATen/core/Tensor.h>

#include "tables.h"

namespace fusedopt {

inline bool to_dtype(const c10::TensorImpl* impl, DType& out) {
  switch (c10::typeMetaToScalarType(impl->dtype())) {
    case at::kFloat:
      out = DType::kFloat32;
      return true;
    case at::kDouble:
      out = DType::kFloat64;
      return true;
    case at::kBFloat16:
      out = DType::kBFloat16;
      return true;
    case at::kHalf:
      out = DType::kFloat16;
      return true;
    default:
      return false;
  }
}

// Why this tensor's elements are not simply there in the memory of this kind of device, or null.
inline const char* unreachable(const c10::TensorImpl* impl, c10::DeviceType device) {
  if (impl->is_python_dispatch() || impl->layout() != c10::kStrided || !impl->has_storage()) {
    return "is not a plain dense tensor";
  }
  if (impl->device().type() != device) return "is on another kind of device";
  if (impl->key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate}))) {
    return "is a lazily negated or conjugated view";
  }
  return nullptr;
}

// Why the kernels cannot touch this tensor's memory at all, or null.
inline const char* foreign(const c10::TensorImpl* impl, c10::DeviceType device) {
  if (const char* reason = unreachable(impl, device)) return reason;
  DType dtype;
  return to_dtype(impl, dtype) ? nullptr : "has an unsupported dtype";
}

// The address of the first element of a plain dense tensor, or null where it has no memory.
[[gnu::always_inline]] inline void* data_of(c10::TensorImpl* impl) {
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (!storage) return nullptr;
  char* base = static_cast<char*>(storage->mutable_data());
  const int64_t offset = impl->storage_offset();
  if (!offset || !base) [[likely]]
    return base;
  return base + offset * static_cast<int64_t>(impl->itemsize());
}

}  // namespace fusedopt
