// What the plan asks of torch's tensors at every step, inline: for a small tensor a call costs more than the answer.
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

// Hash of sizes and strides (FNV-1a over words).
[[gnu::always_inline]] inline uint64_t shape_of(const c10::TensorImpl* impl) {
  const auto sizes = impl->sizes(), strides = impl->strides();
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t d = 0; d < sizes.size(); ++d) {
    hash = (hash ^ static_cast<uint64_t>(sizes[d])) * 0x100000001b3u;
    hash = (hash ^ static_cast<uint64_t>(strides[d])) * 0x100000001b3u;
  }
  return hash;
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

// What a tensor was when it was found fit for the kernels, to see that it still is.
struct Form {
  c10::DispatchKeySet keys;  // with the dtype: the kind of tensor
  caffe2::TypeMeta dtype;
  c10::Device device = at::kCPU;
  bool contiguous;
  int64_t numel;
  uint64_t shape;
  const c10::StorageImpl* storage;

  void take(const c10::TensorImpl* impl) {
    keys = impl->key_set();
    dtype = impl->dtype();
    device = impl->device();
    contiguous = impl->is_contiguous();
    numel = impl->numel();
    shape = shape_of(impl);
    storage = impl->unsafe_storage().unsafeGetStorageImpl();
  }
  bool same_kind(const c10::TensorImpl* impl) const {
    // The keys tell a CPU from a GPU, and there is one CPU.
    return impl->key_set() == keys && impl->dtype() == dtype && (device.is_cpu() || impl->device() == device);
  }
  // Whether impl has the form, `before` being the tensor that had it last. The same contiguous one with as many
  // elements in the same storage is not asked for its sizes: that would be one more cache line, and its elements lie as
  // they did.
  [[gnu::always_inline]] bool matches(const c10::TensorImpl* impl, const c10::TensorImpl* before) {
    if (!same_kind(impl)) return false;
    const c10::StorageImpl* now = impl->unsafe_storage().unsafeGetStorageImpl();
    if (impl == before && now == storage && contiguous && impl->numel() == numel && impl->is_contiguous()) return true;
    storage = now;
    return matches_shape(impl);
  }
  [[gnu::noinline]] bool matches_shape(const c10::TensorImpl* impl) const { return shape == shape_of(impl); }
};

// Note [Prefetching]
// g++ takes a function that does nothing but prefetch for one without effect and drops the calls, so these and what
// calls them are inline by force; a test looks for the instructions in the module. Each line that is fetched in vain
// costs as much as one that is needed.
[[gnu::always_inline]] inline void prefetch(const void* object, size_t bytes) {
  for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(object) + byte);
  __builtin_prefetch(static_cast<const char*>(object) + bytes - 1);
}

// What is read of every tensor (storage, version, count and flags), and of one whose sizes are looked at.
[[gnu::always_inline]] inline void prefetch_tensor(const c10::TensorImpl* impl, bool with_sizes) {
  const char* address = reinterpret_cast<const char*>(impl);
  __builtin_prefetch(address + 16);
  if (with_sizes) __builtin_prefetch(address + 80);
  __builtin_prefetch(address + 152);
  __builtin_prefetch(address + 175);
}

[[gnu::always_inline]] inline void prefetch_storage(const c10::StorageImpl* storage) {
  __builtin_prefetch(reinterpret_cast<const char*>(storage) + 16);
  __builtin_prefetch(reinterpret_cast<const char*>(storage) + 59);
}

}  // namespace fusedopt
