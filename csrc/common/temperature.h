// temperature.h: the number that divides the logits of all rows, or of each row its own.
#pragma once

#include "host_device.h"

namespace ppo_ext {

// Beyond these bounds the products with 1 / temperature could become 0 * inf, which is NaN.
constexpr double kLeastTemperature = 1e-30, kMostTemperature = 1e30;

template <class A>
struct InverseTemperature {
  A of_all;
  const A* temperatures;  // one a row; null: of_all

  // 1 / temperature of row n; NaN if that is out of the bounds.
  PPO_HD A of(int64_t n) const {
    if (!temperatures) return of_all;
    const A t = temperatures[n];
    return t >= A(kLeastTemperature) && t <= A(kMostTemperature) ? A(1) / t : A(NAN);
  }
};

}  // namespace ppo_ext
