// Telling whether a tensor is still what it was when it was found fit for the kernels.
#pragma once
#include <ATen/core/Tensor.h>

namespace fusedopt::plan {

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

struct Fingerprint {
  c10::DispatchKeySet keys;  // with the dtype: the kind of tensor
  caffe2::TypeMeta dtype;
  c10::Device device = at::kCPU;
  bool contiguous;
  int64_t numel;
  uint64_t shape;  // hash of sizes and strides
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
  // Whether `impl` fits, `before` being the tensor that last did. The same contiguous one with as many elements in the
  // same storage is not asked for its sizes: that would be one more cache line, and its elements lie as they did.
  [[gnu::always_inline]] bool matches(const c10::TensorImpl* impl, const c10::TensorImpl* before) {
    if (!same_kind(impl)) return false;
    const c10::StorageImpl* now = impl->unsafe_storage().unsafeGetStorageImpl();
    if (impl == before && now == storage && contiguous && impl->numel() == numel && impl->is_contiguous()) return true;
    storage = now;
    return matches_shape(impl);
  }
  [[gnu::noinline]] bool matches_shape(const c10::TensorImpl* impl) const { return shape == shape_of(impl); }
};

// A tensor and its fingerprint.
struct KnownTensor {
  c10::TensorImpl* impl;  // of this step
  Fingerprint fingerprint;

  void take(c10::TensorImpl* now) {
    impl = now;
    fingerprint.take(now);
  }
  // Whether `now` is as the tensor was found; it is the tensor of this step then.
  bool renew(c10::TensorImpl* now) {
    const bool same = fingerprint.matches(now, impl);
    impl = now;
    return same;
  }
};

}  // namespace fusedopt::plan
