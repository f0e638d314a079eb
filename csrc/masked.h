// masked.h
// Computes  W = sum w, mean = sum w x / W, var = sum w (x - mean)^2 / W over the entries with w != 0
//           whitened = (x - mean) r [+ mean],  r = 1 / sqrt(var W / (W - 1) + 1e-8), var -> 0 if W <= 1;  0 where w = 0
// Backward  grad_x = r (g - w/W G0) - r^3 w (x - mean) / (W - 1) G1 [+ w/W G0],  G0 = sum g, G1 = sum g (x - mean)
#pragma once

#include "common/moments.h"

namespace ppo_ext {

constexpr double kWhitenEps = 1e-8;

// Values and their weights.
template <class A>
struct WeightedEntries {
  const A *values, *weights;
  int64_t count;
};

// ---- moments ----

// The moments as the operators return them: weight, mean, biased variance.
constexpr int kSavedMoments = 3;

template <class A>
PPO_HD void write_moments(const Moments& m, A* out) {
  out[0] = A(m.weight);
  out[1] = A(m.mean);
  out[2] = A(biased_var(m));
}

template <class A>
PPO_HD Moments read_moments(const A* saved) {
  return {double(saved[0]), double(saved[1]), double(saved[2]) * double(saved[0])};
}

// ---- whitening ----

PPO_HD double whiten_scale(const Moments& m) { return 1 / sqrt(unbiased_var(m.weight, biased_var(m)) + kWhitenEps); }

// In fp64: A is double, or on the CPU a vector of them.
template <class A>
PPO_HD A whiten_one(A x, double mean, double scale, bool shift_mean) {
  return (x - mean) * scale + (shift_mean ? 0.0 : mean);
}

// The sums G0 and G1 of the backward pass.
struct GradSums {
  double grad, centred;
};

PPO_HD GradSums grad_sums_merge(const GradSums& a, const GradSums& b) {
  return {a.grad + b.grad, a.centred + b.centred};
}

// What the gradient of every entry needs from the sums over all of them.
struct WhitenGrad {
  double mean, scale, grad_mean, slope, added;
};

PPO_HD WhitenGrad whiten_grad_of(const Moments& m, const GradSums& sums, bool shift_mean) {
  WhitenGrad all;
  all.mean = m.mean;
  all.scale = whiten_scale(m);
  all.grad_mean = m.weight == 0 ? 0 : sums.grad / m.weight;
  all.slope = m.weight <= 1 ? 0 : all.scale * all.scale * all.scale * sums.centred / (m.weight - 1);
  all.added = shift_mean ? 0.0 : all.grad_mean;
  return all;
}

template <class A>
PPO_HD A whiten_grad(A grad, A x, A w, const WhitenGrad& all) {
  return all.scale * (grad - w * all.grad_mean) - w * (x - all.mean) * all.slope + w * all.added;
}

}  // namespace ppo_ext
