// masked.h
// Computes  W = sum w, mean = sum w x / W, var = sum w (x - mean)^2 / W over the entries with w != 0
//           whitened = (x - mean) r (center), (x - mean) r + mean (keep mean) or x r (scale);  0 where w = 0
//           r = 1 / sqrt(var W / D + eps) with D = W - 1 if unbiased, where var -> 0 if W <= 1, else D = W
// Backward  grad_x = r (g - w/W G0) - r^3 w (x - mean) / D G1 [+ w/W G0],  G0 = sum g, G1 = sum g (x - mean)
//           to scale: r g - r^3 w (x - mean) / D G1,  G1 = sum g x
#pragma once

#include "common/moments.h"

namespace ppo_ext {

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

enum WhitenMode : int64_t {
  kCenter,
  kKeepMean,
  kScale,
  kWhitenModes
};  // the values of _MODES in ppo_ext/ops/masked.py

struct WhitenOptions {
  int64_t mode;
  bool unbiased;
  double eps;

  PPO_HD double subtracted(double mean) const { return mode == kScale ? 0.0 : mean; }
  PPO_HD double added(double mean) const { return mode == kKeepMean ? mean : 0.0; }
};

PPO_HD double whiten_scale(const Moments& m, const WhitenOptions& options) {
  const double var = options.unbiased ? unbiased_var(m.weight, biased_var(m)) : biased_var(m);
  return 1 / sqrt(var + options.eps);
}

// In fp64: A is double, or on the CPU a vector of them.
template <class A>
PPO_HD A whiten_one(A x, double mean, double scale, const WhitenOptions& options) {
  return (x - options.subtracted(mean)) * scale + options.added(mean);
}

// The sums G0 and G1 of the backward pass; G1 is of the distances from options.subtracted(mean).
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

PPO_HD WhitenGrad whiten_grad_of(const Moments& m, const GradSums& sums, const WhitenOptions& options) {
  WhitenGrad all;
  all.mean = m.mean;
  all.scale = whiten_scale(m, options);
  const double grad_mean = m.weight == 0 ? 0 : sums.grad / m.weight, degrees = m.weight - (options.unbiased ? 1 : 0);
  all.grad_mean = options.mode == kScale ? 0 : grad_mean;
  all.slope = degrees <= 0 ? 0 : all.scale * all.scale * all.scale * sums.centred / degrees;
  all.added = options.mode == kKeepMean ? grad_mean : 0.0;
  return all;
}

template <class A>
PPO_HD A whiten_grad(A grad, A x, A w, const WhitenGrad& all) {
  return all.scale * (grad - w * all.grad_mean) - w * (x - all.mean) * all.slope + w * all.added;
}

}  // namespace ppo_ext
