// binding_overhead.cpp
// Computes  gae of float32 rows through a plain pybind11 function on raw pointers, as csrc/gae.h has it, without a mask
// Why       the same arithmetic as the torch operator, so the difference in time is what the two bindings cost
#include <pybind11/pybind11.h>

#include "gae.h"

static void gae(uintptr_t values, uintptr_t rewards, uintptr_t advantages, uintptr_t returns, int64_t B, int64_t T,
                float gamma, float lam) {
  const auto *value = reinterpret_cast<const float*>(values), *reward = reinterpret_cast<const float*>(rewards);
  auto *advantage = reinterpret_cast<float*>(advantages), *ret = reinterpret_cast<float*>(returns);
  for (int64_t b = 0; b < B; ++b) {
    float next_value = 0, next_advantage = 0;
    for (int64_t i = (b + 1) * T - 1; i >= b * T; --i) {
      const float delta = ppo_ext::gae_delta(reward[i], value[i], next_value, gamma);
      next_advantage = ppo_ext::gae_step(delta, next_advantage, gamma * lam);
      next_value = value[i];
      advantage[i] = next_advantage;
      ret[i] = next_advantage + next_value;
    }
  }
}

PYBIND11_MODULE(binding_overhead, m) { m.def("gae", &gae); }
