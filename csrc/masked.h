// masked.h
// Computes  W = sum w, mean = sum w x / W, var = sum w (x - mean)^2 / W over the entries with w != 0
//           whitened = (x - mean) r [+ mean],  r = 1 / sqrt(var W / (W - 1) + 1e-8), var -> 0 if W <= 1;  0 where w = 0
// Backward  grad_x = r (g - w/W G0) - r^3 w (x - mean) / (W - 1) G1 [+ w/W G0],  G0 = sum g, G1 = sum g (x - mean)
#pragma once

#include "common/host_device.h"

namespace ppo_ext {

constexpr double kWhitenEps = 1e-8;

// Total weight, mean, and sum of weighted squared distances from the mean.
template <class A>
struct Moments {
  A weight, mean, m2;
};

// Chan's update: no difference of two large sums.
template <class A>
PPO_HD Moments<A> moments_merge(Moments<A> a, Moments<A> b) {
  if (b.weight == A(0)) return a;
  if (a.weight == A(0)) return b;
  const A weight = a.weight + b.weight;
  const A gap = b.mean - a.mean;
  if (!(gap - gap == A(0)))
    return {weight, a.mean + b.mean, A(NAN)};  // inf stays inf, and is at no distance from itself
  const A part = b.weight / weight;
  return {weight, a.mean + gap * part, a.m2 + b.m2 + gap * gap * a.weight * part};
}

template <class A>
PPO_HD A biased_var(Moments<A> m) {
  return m.weight == A(0) ? A(0) : m.m2 / m.weight;
}

template <class A>
PPO_HD A unbiased_var(A weight, A biased) {
  return weight <= A(1) ? A(0) : biased * weight / (weight - A(1));
}

template <class A>
PPO_HD A whiten_scale(A weight, A biased) {
  return A(1) / A(sqrt(unbiased_var(weight, biased) + A(kWhitenEps)));
}

// In fp64: A is a double, or on the CPU a vector of them.
template <class A>
PPO_HD A whiten_one(A x, double mean, double scale, bool shift_mean) {
  return (x - mean) * scale + (shift_mean ? 0.0 : mean);
}

// What every entry's gradient takes of the whole, from G0 and G1.
struct WhitenGrad {
  double mean, scale, grad_mean, slope, added;
};

PPO_HD WhitenGrad whiten_grad_of(const Moments<double>& m, double sum_grad, double sum_grad_centred, bool shift_mean) {
  const double scale = whiten_scale(m.weight, biased_var(m)), grad_mean = m.weight == 0 ? 0 : sum_grad / m.weight;
  const double slope = m.weight <= 1 ? 0 : scale * scale * scale * sum_grad_centred / (m.weight - 1);
  return {m.mean, scale, grad_mean, slope, shift_mean ? 0.0 : grad_mean};
}

template <class A>
PPO_HD A whiten_grad(A grad, A x, A w, const WhitenGrad& all) {
  return all.scale * (grad - w * all.grad_mean) - w * (x - all.mean) * all.slope + w * all.added;
}

}  // namespace ppo_ext
