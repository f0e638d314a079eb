// gae_cuda.cu
// Computes  see gae.h
// Bytes     17 per token in fp32: values, rewards, advantages, returns and the mask
// Launch    one warp per sequence up to T = 512 (of packed ones the mean), else one block of 256 threads; 4 tokens a
//           thread, tiles from the right; 16-byte accesses where T and the pointers allow them
// Sums      runs of tokens as affine maps, composed from the right in an order that depends on T only
// Limits    none

#include "common/launch.h"
#include "common/load.cuh"
#include "common/reduce.cuh"
#include "gae_entry.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int kTokens = 4;  // of one thread in one tile
constexpr int64_t kWarpPerSequence = 512;

// The value of the nearest counted token at or to the right, if there is one.
template <class A>
struct NextValue {
  A value, found;
};

// ---- device helpers ----

// Loads kTokens neighbouring tokens, of which the first `present` exist; the others become 0.
template <class A>
__device__ __forceinline__ void load_tokens(const A* p, int present, bool packed, A (&x)[kTokens]) {
  if (packed && present > 0) {
#pragma unroll
    for (int k = 0; k < kTokens; k += kPack<A>) unpack<A>(load_pack(reinterpret_cast<const Pack*>(p + k)), x + k);
  } else {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) x[k] = k < present ? p[k] : A(0);
  }
}

template <class A>
__device__ __forceinline__ void store_tokens(const A (&x)[kTokens], int present, bool packed, A* p) {
  if (packed && present > 0) {
#pragma unroll
    for (int k = 0; k < kTokens; k += kPack<A>) store_pack(reinterpret_cast<Pack*>(p + k), pack_of<A>(x + k));
  } else {
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      if (k < present) p[k] = x[k];
  }
}

// ---- kernels ----

// packed: every run of kTokens tokens is whole and starts at a multiple of 16 bytes, in all four arrays. It is an int, as
// nvcc 13.0 needs more registers for a bool.
template <int kThreads, bool kDecoupled, class A>
__global__ void __launch_bounds__(kBlock, 1) gae_kernel(const GAEJob<A> job, int packed) {
  constexpr int kGroups = kBlock / kThreads;
  constexpr int kTile = kThreads * kTokens;
  const int thread = thread_of_group<kThreads>();
  const auto nearer = [](const NextValue<A>& earlier, const NextValue<A>& later) {
    return earlier.found != A(0) ? earlier : later;
  };
  const auto compose = [](const GAEMap<A>& earlier, const GAEMap<A>& later) { return gae_compose(earlier, later); };
  for (int64_t b = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; b < job.B;
       b += int64_t(gridDim.x) * kGroups) {
    const int64_t start = job.start(b), length = job.length(b);
    const A gamma_lam = job.gamma_lam_of(b);
    // of the first counted token right of the tile
    A next_value = job.bootstrap_of(b), advantage = 0, of_returns = 0;
    for (int64_t begin = (length - 1) / kTile * kTile; begin >= 0; begin -= kTile) {
      const int64_t t0 = begin + thread * kTokens, i0 = start + t0;
      const int present = int(length - t0 < kTokens ? length - t0 : kTokens);
      A value[kTokens], delta[kTokens], returns[kTokens];  // delta holds the reward until the next value is known
      load_tokens(job.values + i0, present, packed, value);
      load_tokens(job.rewards + i0, present, packed, delta);
      unsigned counted = 0;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) counted |= unsigned(k < present && (!job.mask || job.mask[i0 + k])) << k;
      NextValue<A> first{A(0), A(0)};
#pragma unroll
      for (int k = kTokens - 1; k >= 0; --k)
        if (counted >> k & 1) first = {value[k], A(1)};
      const Scan<NextValue<A>> values = scan_from_right<kThreads>(first, NextValue<A>{A(0), A(0)}, nearer);

      A after = values.after.found != A(0) ? values.after.value : next_value;
      GAEMap<A> map{A(1), A(0)}, map_of_returns{A(1), A(0)};
#pragma unroll
      for (int k = kTokens - 1; k >= 0; --k) {
        if (!(counted >> k & 1)) continue;
        delta[k] = gae_delta(delta[k], value[k], after, job.gamma);
        after = value[k];
        map = gae_compose(GAEMap<A>{gamma_lam, delta[k]}, map);
        if (kDecoupled) map_of_returns = gae_compose(GAEMap<A>{job.gamma_lam_returns, delta[k]}, map_of_returns);
      }
      const Scan<GAEMap<A>> maps = scan_from_right<kThreads>(map, GAEMap<A>{A(1), A(0)}, compose);

      if (kDecoupled) {
        const Scan<GAEMap<A>> of_tile = scan_from_right<kThreads>(map_of_returns, GAEMap<A>{A(1), A(0)}, compose);
        A running = gae_step(of_tile.after.offset, of_returns, of_tile.after.scale);
#pragma unroll
        for (int k = kTokens - 1; k >= 0; --k) {
          if (counted >> k & 1) running = gae_step(delta[k], running, job.gamma_lam_returns);
          returns[k] = running;
        }
        of_returns = gae_step(of_tile.total.offset, of_returns, of_tile.total.scale);
      }
      A running = gae_step(maps.after.offset, advantage, maps.after.scale);
#pragma unroll
      for (int k = kTokens - 1; k >= 0; --k) {
        const bool counts = counted >> k & 1;
        if (counts) running = gae_step(delta[k], running, gamma_lam);
        delta[k] = counts ? running : A(0);
        returns[k] = counts ? (kDecoupled ? returns[k] : running) + value[k] : A(0);
      }
      store_tokens(delta, present, packed, job.advantages + i0);
      store_tokens(returns, present, packed, job.returns + i0);
      advantage = gae_step(maps.total.offset, advantage, maps.total.scale);
      if (values.total.found != A(0)) next_value = values.total.value;
    }
  }
}

// ---- launchers ----

struct OnCUDA {
  template <class A>
  static void run(const GAEJob<A>& job, const Tensor& like) {
    job.decoupled ? run_kernel<true>(job, like) : run_kernel<false>(job, like);
  }

  template <bool kDecoupled, class A>
  static void run_kernel(const GAEJob<A>& job, const Tensor& like) {
    const Launcher launch("gae", like);
    const int packed = !job.offsets && job.T % kTokens == 0 && is_aligned(job.values) && is_aligned(job.rewards) &&
                       is_aligned(job.advantages) && is_aligned(job.returns);
    if (job.T <= kWarpPerSequence) {
      const int64_t blocks = job.tokens == 0 ? 0 : divide_up(job.B, kBlock / kWarp);
      launch(gae_kernel<kWarp, kDecoupled, A>, blocks, kBlock, job, packed);
    } else {
      launch(gae_kernel<kBlock, kDecoupled, A>, job.B, kBlock, job, packed);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) { m.impl("_gae", TORCH_BOX(&gae<OnCUDA>)); }

}  // namespace ppo_ext
