// whiten.h
// Computes  W = sum w, mean = sum w x / W, var = sum w (x - mean)^2 / W over the entries with w != 0
//           whitened = (x - mean) r [+ mean],  r = 1 / sqrt(var W / (W - 1) + 1e-8), var -> 0 if W <= 1;  0 where w = 0
// Backward  grad_x = r (g - w/W G0) - r^3 w (x - mean) / (W - 1) G1 [+ w/W G0],  G0 = sum g, G1 = sum g (x - mean)
#pragma once

#include "host_device.h"

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
  if (!(gap - gap == A(0))) return {weight, a.mean + b.mean, A(NAN)};  // inf stays inf, and is at no distance from itself
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

template <class A>
PPO_HD A whiten_one(A x, A mean, A scale, bool shift_mean) {
  return (x - mean) * scale + (shift_mean ? A(0) : mean);
}

template <class A>
PPO_HD A whiten_grad(A grad, A x, A w, Moments<A> m, A scale, A sum_grad, A sum_grad_centred, bool shift_mean) {
  const A mean_part = w / m.weight * sum_grad;
  const A var_part = m.weight <= A(1) ? A(0) : w * (x - m.mean) / (m.weight - A(1)) * sum_grad_centred;
  return scale * (grad - mean_part) - scale * scale * scale * var_part + (shift_mean ? A(0) : mean_part);
}

}  // namespace ppo_ext
