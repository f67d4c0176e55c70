// What the memory gives to kernels without tables, dtypes or edges: copies, and AdamW in fp32 written out by hand. The
// fastest of them is a ceiling for the kernels of this package.
#pragma once
#include <cstddef>

namespace fusedopt::bandwidth {

// The numbers of one step.
struct AdamWConstants {
  float keep, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size, multiplier;
};
constexpr AdamWConstants kAdamW = {0.99999f, 0.9f, 0.1f, 0.999f, 0.001f, 31.6f, 1e-8f, 1e-2f, 1e-3f};

__device__ __forceinline__ void adamw(const AdamWConstants& c, float g, float& p, float& exp_avg, float& exp_avg_sq) {
  g *= c.multiplier;
  p *= c.keep;
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * g;
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
  p -= c.step_size * exp_avg / (__fsqrt_rn(exp_avg_sq) * c.inv_sqrt_correction2 + c.eps);
}

// How memory is asked for: as usual, as data that is used once (ld.cs, st.cs), or past the L1 cache.
enum class Access { kPlain, kStreaming, kNoAllocate };

template <Access kAccess>
__device__ __forceinline__ float4 load(const float4* from) {
  if constexpr (kAccess == Access::kStreaming) return __ldcs(from);
  if constexpr (kAccess == Access::kNoAllocate) {
    float4 x;
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from));
    return x;
  }
  return *from;
}

template <Access kAccess>
__device__ __forceinline__ void store(float4* to, float4 value) {
  if constexpr (kAccess == Access::kStreaming) {
    __stcs(to, value);
  } else {
    *to = value;
  }
}

// The arrays of fp32 columns, of the same length.
struct Arrays {
  float4* param;
  const float4* grad;
  float4 *exp_avg, *exp_avg_sq;
  size_t count;  // of float4
};

// A block takes `span` float4 of each column, a thread kUnroll of each at a time.
template <int kUnroll, Access kAccess, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) adamw_kernel(Arrays a, unsigned span, AdamWConstants c) {
  const size_t begin = size_t(blockIdx.x) * span, end = begin + span < a.count ? begin + span : a.count;
  for (size_t v = begin + threadIdx.x; v < end; v += kThreads * kUnroll) {
    float4 p[kUnroll], g[kUnroll], m[kUnroll], s[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const size_t at = v + u * kThreads;
      if (at >= end) break;
      p[u] = load<kAccess>(a.param + at), g[u] = load<kAccess>(a.grad + at);
      m[u] = load<kAccess>(a.exp_avg + at), s[u] = load<kAccess>(a.exp_avg_sq + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const size_t at = v + u * kThreads;
      if (at >= end) break;
      adamw(c, g[u].x, p[u].x, m[u].x, s[u].x), adamw(c, g[u].y, p[u].y, m[u].y, s[u].y);
      adamw(c, g[u].z, p[u].z, m[u].z, s[u].z), adamw(c, g[u].w, p[u].w, m[u].w, s[u].w);
      store<kAccess>(a.param + at, p[u]), store<kAccess>(a.exp_avg + at, m[u]);
      store<kAccess>(a.exp_avg_sq + at, s[u]);
    }
  }
}

__global__ void copy_kernel(float4* to, const float4* from, size_t count) {
  const size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (i < count) to[i] = from[i];
}

// Moves what an update of AdamW moves, four arrays read and three written, with an addition for each.
__global__ void four_in_three_out_kernel(Arrays a) {
  const size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (i >= a.count) return;
  const float4 g = a.grad[i];
  float4 p = a.param[i], m = a.exp_avg[i], s = a.exp_avg_sq[i];
  p.x += g.x, p.y += g.y, p.z += g.z, p.w += g.w;
  m.x += g.x, m.y += g.y, m.z += g.z, m.w += g.w;
  s.x += g.x, s.y += g.y, s.z += g.z, s.w += g.w;
  a.param[i] = p, a.exp_avg[i] = m, a.exp_avg_sq[i] = s;
}

// One variant written by hand: its name, and how to launch it.
struct ByHand {
  const char* name;
  void (*launch)(const Arrays& arrays, cudaStream_t stream);
};

template <int kUnroll, Access kAccess, int kThreads, int kBlocks, unsigned kElements>
void launch_adamw(const Arrays& arrays, cudaStream_t stream) {
  constexpr unsigned kSpan = kElements / 4;
  const auto blocks = static_cast<unsigned>((arrays.count + kSpan - 1) / kSpan);
  adamw_kernel<kUnroll, kAccess, kThreads, kBlocks><<<blocks, kThreads, 0, stream>>>(arrays, kSpan, kAdamW);
}

constexpr ByHand kByHand[] = {
    {"a block per 1Ki", launch_adamw<1, Access::kPlain, 256, 4, 1 << 10>},
    {"per 8Ki", launch_adamw<1, Access::kPlain, 256, 4, 1 << 13>},
    {"per 16Ki", launch_adamw<1, Access::kPlain, 256, 4, 1 << 14>},
    {"per 64Ki", launch_adamw<1, Access::kPlain, 256, 4, 1 << 16>},
    {"per 16Ki, L1::no_allocate", launch_adamw<1, Access::kNoAllocate, 256, 4, 1 << 14>},
    {"per 16Ki, ld.cs st.cs", launch_adamw<1, Access::kStreaming, 256, 4, 1 << 14>},
    {"per 16Ki, 8 loads in flight, 512 threads per SM", launch_adamw<2, Access::kPlain, 256, 2, 1 << 14>},
    {"per 16Ki, 8 loads in flight, 768 threads per SM", launch_adamw<2, Access::kPlain, 256, 3, 1 << 14>},
    {"per 16Ki, 8 loads in flight, 768 threads, ld.cs st.cs", launch_adamw<2, Access::kStreaming, 256, 3, 1 << 14>},
    {"per 16Ki, blocks of 512", launch_adamw<1, Access::kPlain, 512, 2, 1 << 14>},
    {"per 16Ki, blocks of 128", launch_adamw<1, Access::kPlain, 128, 8, 1 << 14>},
};

}  // namespace fusedopt::bandwidth
