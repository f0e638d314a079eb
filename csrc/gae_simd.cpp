// gae_simd.cpp: the recurrence of gae_cpu.cpp on a vector of sequences at a time, one in each lane. A vector holds one
//               token of each, so tokens are read and written in square tiles that are transposed. The tokens that fill
//               no tile, and the sequences that fill no vector, are computed one by one, with the same bits.

#include "gae_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

// What lies to the right: the value and the advantage of the next counted token, and the advantage with the lambda of the
// returns, if that is another one.
template <class V>
struct Carry {
  V next_value, advantage, of_returns;
};

template <class V>
struct Step {
  V advantage, returns;
};

// gamma, and gamma times lambda, of one sequence or of several.
template <class V>
struct Decays {
  V gamma, gamma_lam, of_returns;
};

// Computes one token, which `carry` holds afterwards.
template <bool kDecoupled, class V>
PPO_INLINE Step<V> step_of(V value, V reward, const Decays<V>& decays, Carry<V>& carry) {
  const V delta = gae_delta(reward, value, carry.next_value, decays.gamma);
  const V advantage = gae_step(delta, carry.advantage, decays.gamma_lam);
  const V of_returns = kDecoupled ? gae_step(delta, carry.of_returns, decays.of_returns) : advantage;
  carry = {value, advantage, of_returns};
  return {advantage, of_returns + value};
}

// The first `end` tokens of one sequence, right to left.
template <bool kDecoupled, class A>
PPO_INLINE void scan_tokens(const GAEJob<A>& job, int64_t sequence, int64_t end, Carry<A> carry) {
  const Decays<A> decays{job.gamma, job.gamma_lam_of(sequence), job.gamma_lam_returns};
  const int64_t first = job.start(sequence);
  for (int64_t i = first + end - 1; i >= first; --i) {
    if (job.mask && !job.mask[i]) {
      job.advantages[i] = job.returns[i] = A(0);
      continue;
    }
    const Step<A> step = step_of<kDecoupled>(job.values[i], job.rewards[i], decays, carry);
    job.advantages[i] = step.advantage;
    job.returns[i] = step.returns;
  }
}

// ---- tiles: kLanesOf<A> tokens of as many sequences ----

template <class A>
struct Tile {
  static constexpr int kSize = kLanesOf<A>;
  vector_of<A> x[kSize];

  PPO_INLINE void load_rows(const A* from, const int64_t (&rows)[kSize]) {
    for (int s = 0; s < kSize; ++s) x[s] = load(from + rows[s]);
    transpose<1>();
  }

  PPO_INLINE void store_rows(A* to, const int64_t (&rows)[kSize]) {
    transpose<1>();
    for (int s = 0; s < kSize; ++s) store(to + rows[s], x[s]);
  }

  // Exchanges the off-diagonal blocks of size 1, then of size 2, and so on.
  template <int kBlock>
  PPO_INLINE void transpose() {
    if constexpr (kBlock < kSize) {
      condition_of<A> upper, lower;
      for (int l = 0; l < kSize; ++l) {
        upper[l] = l & kBlock ? kSize + l - kBlock : l;
        lower[l] = l & kBlock ? kSize + l : l + kBlock;
      }
      for (int s = 0; s < kSize; ++s) {
        if (s & kBlock) continue;
        const vector_of<A> a = x[s], b = x[s + kBlock];
        x[s] = shuffled(a, b, upper);
        x[s + kBlock] = shuffled(a, b, lower);
      }
      transpose<2 * kBlock>();
    }
  }
};

// Lane s holds the flags of kSize tokens of sequence s, that of token k in bit k.
template <class A>
PPO_INLINE condition_of<A> mask_bits(const bool* mask, const int64_t (&rows)[kLanesOf<A>]) {
  constexpr int kSize = kLanesOf<A>;
  condition_of<A> bits{};
  for (int s = 0; s < kSize; ++s) {
    for (int k = 0; k < kSize; k += 8) {
      uint64_t flags = 0;
      std::memcpy(&flags, mask + rows[s] + k, kSize < 8 ? kSize : 8);
      bits[s] |=
          (flags * 0x0102040810204080) >> 56 << k;  // the product moves each byte's flag into one of the top bits
    }
  }
  return bits;
}

template <class A>
PPO_INLINE bool all_count(condition_of<A> bits) {
  constexpr int kSize = kLanesOf<A>;
  bool result = true;
  for (int s = 0; s < kSize; ++s) result = result && bits[s] == (1 << kSize) - 1;
  return result;
}

template <bool kMasked, bool kDecoupled, class A>
PPO_INLINE void scan_tile(const GAEJob<A>& job, const int64_t (&rows)[kLanesOf<A>], condition_of<A> bits,
                          const Decays<vector_of<A>>& decays, Carry<vector_of<A>>& carry) {
  using V = vector_of<A>;
  const V zero = Number<V>::of(0);
  Tile<A> values, rewards;  // overwritten by the returns and the advantages
  values.load_rows(job.values, rows);
  rewards.load_rows(job.rewards, rows);
  for (int k = kLanesOf<A> - 1; k >= 0; --k) {
    const Carry<V> before = carry;
    Step<V> step = step_of<kDecoupled>(values.x[k], rewards.x[k], decays, carry);
    if (kMasked) {
      const condition_of<A> counts = (bits >> k) & 1;
      step = {counts ? step.advantage : zero, counts ? step.returns : zero};
      carry = {counts ? carry.next_value : before.next_value, counts ? carry.advantage : before.advantage,
               counts ? carry.of_returns : before.of_returns};
    }
    values.x[k] = step.returns;
    rewards.x[k] = step.advantage;
  }
  values.store_rows(job.returns, rows);
  rewards.store_rows(job.advantages, rows);
}

// Up to kLanesOf<A> sequences, one in each lane; if they are fewer, the last one fills the other lanes too. They end side
// by side, so that those of different lengths share tiles until the shortest has none left.
template <bool kDecoupled, class A>
PPO_INLINE void scan_side_by_side(const GAEJob<A>& job, int64_t first, int count) {
  constexpr int kSize = kLanesOf<A>;
  using V = vector_of<A>;
  Carry<V> carry{};
  Decays<V> decays{Number<V>::of(job.gamma), V{}, Number<V>::of(job.gamma_lam_returns)};
  int64_t rows[kSize], left[kSize], shortest = job.length(first);
  for (int s = 0; s < kSize; ++s) {
    const int64_t b = first + (s < count ? s : count - 1);
    left[s] = job.length(b);
    rows[s] = job.start(b) + left[s];
    shortest = left[s] < shortest ? left[s] : shortest;
    carry.next_value[s] = job.bootstrap_of(b);
    decays.gamma_lam[s] = job.gamma_lam_of(b);
  }
  const int64_t tiles = shortest / kSize;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int s = 0; s < kSize; ++s) rows[s] -= kSize;
    const condition_of<A> bits = job.mask ? mask_bits<A>(job.mask, rows) : condition_of<A>{};
    !job.mask || all_count<A>(bits) ? scan_tile<false, kDecoupled>(job, rows, bits, decays, carry)
                                    : scan_tile<true, kDecoupled>(job, rows, bits, decays, carry);
  }
  for (int s = 0; s < count; ++s) {
    const Carry<A> of_lane{carry.next_value[s], carry.advantage[s], carry.of_returns[s]};
    scan_tokens<kDecoupled>(job, first + s, left[s] - tiles * kSize, of_lane);
  }
}

template <bool kDecoupled, class A>
PPO_INLINE void scan_sequences(const GAEJob<A>& job, int64_t first, int count) {
  constexpr int kSize = kLanesOf<A>;
  for (; count > kSize / 4; first += kSize, count -= kSize)
    scan_side_by_side<kDecoupled>(job, first, count < kSize ? count : kSize);
  for (int s = 0; s < count; ++s)
    scan_tokens<kDecoupled>(job, first + s, job.length(first + s), Carry<A>{job.bootstrap_of(first + s), A(0), A(0)});
}

template <class A>
PPO_INLINE void scan(const GAEJob<A>& job, int64_t first, int count) {
  job.decoupled ? scan_sequences<true>(job, first, count) : scan_sequences<false>(job, first, count);
}

}  // namespace

namespace PPO_LEVEL {
void scan_group(const GAEJob<float>& job, int64_t first, int count) { scan(job, first, count); }
void scan_group(const GAEJob<double>& job, int64_t first, int count) { scan(job, first, count); }
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
