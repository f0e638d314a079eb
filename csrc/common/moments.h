// moments.h: weighted mean and variance of numbers that are read in several parts.
#pragma once

#include "host_device.h"

namespace ppo_ext {

// Total weight, mean, and weighted sum of squared distances from the mean.
struct Moments {
  double weight, mean, m2;
};

// The moments of two parts together, by Chan's update: it never subtracts two large sums, which would cancel.
PPO_HD Moments moments_merge(Moments a, Moments b) {
  if (b.weight == 0) return a;
  if (a.weight == 0) return b;
  const double weight = a.weight + b.weight;
  const double gap = b.mean - a.mean;
  // With an infinite or NaN mean the sum gives the right mean: inf stays inf, inf and -inf become NaN.
  if (!(gap - gap == 0)) return {weight, a.mean + b.mean, NAN};
  const double part = b.weight / weight;
  return {weight, a.mean + gap * part, a.m2 + b.m2 + gap * gap * a.weight * part};
}

PPO_HD double biased_var(Moments m) { return m.weight == 0 ? 0 : m.m2 / m.weight; }

// Bessel's correction; 0 where it would divide by 0 or less.
PPO_HD double unbiased_var(double weight, double biased) { return weight <= 1 ? 0 : biased * weight / (weight - 1); }

}  // namespace ppo_ext
