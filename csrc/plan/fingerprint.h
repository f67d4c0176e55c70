// Telling whether a tensor is still what it was when it was found fit for the kernels.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

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
  bool contiguous = false;
  bool inference = false;  // an inference tensor, which has no version
  int64_t numel = 0;
  uint64_t shape = 0;  // hash of sizes and strides

  Fingerprint() = default;
  explicit Fingerprint(c10::TensorImpl* impl)
      : keys(impl->key_set()),
        dtype(impl->dtype()),
        device(impl->device()),
        contiguous(impl->is_contiguous()),
        inference(impl->is_inference()),
        numel(impl->numel()),
        shape(shape_of(impl)) {}

  [[gnu::always_inline]] bool same_kind(const c10::TensorImpl* impl) const {
    // The keys tell a CPU from a GPU, and there is one CPU.
    return impl->key_set() == keys && impl->dtype() == dtype && (device.is_cpu() || impl->device() == device);
  }
  // Whether a tensor is as the one was, sizes and strides included.
  [[gnu::always_inline]] bool fits(const c10::TensorImpl* impl) const {
    return same_kind(impl) && shape == shape_of(impl);
  }
  bool operator==(const Fingerprint& other) const {
    return keys == other.keys && dtype == other.dtype && device == other.device && contiguous == other.contiguous &&
           inference == other.inference && numel == other.numel && shape == other.shape;
  }
};

// The distinct fingerprints of a plan's tensors. Thousands of tensors have few, so what is kept of each tensor is the
// number of its fingerprint, and the fingerprints themselves stay in the cache.
class Fingerprints {
 public:
  // That of no tensor.
  static constexpr uint32_t kNone = 0;

  Fingerprints() { clear(); }
  // The number of a tensor's fingerprint.
  uint32_t of(c10::TensorImpl* impl) {
    const Fingerprint print(impl);
    auto& alike = numbers_[print.shape ^ print.keys.raw_repr()];
    for (uint32_t number : alike) {
      if (all_[number] == print) return number;
    }
    alike.push_back(static_cast<uint32_t>(all_.size()));
    all_.push_back(print);
    return alike.back();
  }
  const Fingerprint& operator[](uint32_t number) const { return all_[number]; }
  void clear() {
    all_.assign(1, {});
    numbers_.clear();
  }

 private:
  std::vector<Fingerprint> all_;
  std::unordered_map<uint64_t, std::vector<uint32_t>> numbers_;  // by a hash
};

// Makes `to` what it is now, and returns whether it was something else. What is there already is not written, so that
// its cache line need not go back to memory: see Note [Cold caches].
template <class T>
[[gnu::always_inline]] inline bool replace(T*& to, T* now) {
  if (to == now) [[likely]]
    return false;
  to = now;
  return true;
}

// A tensor and its fingerprint.
struct KnownTensor {
  c10::TensorImpl* impl;            // of this step
  const c10::StorageImpl* storage;  // of it
  uint32_t print;                   // its number

  void take(c10::TensorImpl* now, Fingerprints& prints) {
    impl = now;
    storage = now->unsafe_storage().unsafeGetStorageImpl();
    print = prints.of(now);
  }
  // Makes `now` the tensor of this step.
  [[gnu::always_inline]] void move_to(c10::TensorImpl* now) {
    replace(impl, now);
    replace(storage, static_cast<const c10::StorageImpl*>(now->unsafe_storage().unsafeGetStorageImpl()));
  }
  // Makes `now` the tensor of this step if it is as the tensor was found, and returns whether it is. The same
  // contiguous one with as many elements in the same storage is not asked for its sizes: that would be one more cache
  // line, and its elements lie as they did.
  [[gnu::always_inline]] bool renew(c10::TensorImpl* now, const Fingerprints& prints) {
    const Fingerprint& known = prints[print];
    if (!known.same_kind(now)) return false;
    const c10::StorageImpl* const there = now->unsafe_storage().unsafeGetStorageImpl();
    if (now == impl && there == storage && known.contiguous && now->numel() == known.numel && now->is_contiguous())
        [[likely]]
      return true;
    if (known.shape != shape_of(now)) return false;
    move_to(now);
    return true;
  }
};

}  // namespace fusedopt::plan
