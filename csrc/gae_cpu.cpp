// gae_cpu.cpp
// Computes  see gae.h
// Bytes     17 per token in fp32: values, rewards, advantages, returns and the mask
// Launch    threads over groups of 8 sequences, whose independent recurrences hide each other's latency
// Sums      the serial recurrence, in TRL's order of operations: same bits for any threads
// Limits    none

#include "checks.h"
#include "gae.h"
#include "parallel.h"

namespace ppo_ext {
namespace {

constexpr int kGroup = 8;

template <class A>
struct Job {
  const A *values, *rewards;
  const bool* mask;
  A *advantages, *returns;
  int64_t T;
  A gamma, gamma_lam;
};

template <int Sequences, class A>
void scan(const Job<A>& job, int64_t first) {
  A next_value[Sequences] = {}, advantage[Sequences] = {};
  for (int64_t t = job.T - 1; t >= 0; --t) {
    for (int s = 0; s < Sequences; ++s) {
      const int64_t i = (first + s) * job.T + t;
      if (job.mask && !job.mask[i]) {
        job.advantages[i] = job.returns[i] = A(0);
        continue;
      }
      const A value = job.values[i];
      advantage[s] = gae_step(gae_delta(job.rewards[i], value, next_value[s], job.gamma), advantage[s], job.gamma_lam);
      next_value[s] = value;
      job.advantages[i] = advantage[s];
      job.returns[i] = advantage[s] + value;
    }
  }
}

template <class A>
void run(const Job<A>& job, int64_t B) {
  const int64_t groups = (B + kGroup - 1) / kGroup;
  parallel_rows(groups, kGroup * job.T, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * kGroup;
      if (first + kGroup <= B) {
        scan<kGroup>(job, first);
      } else {
        for (int64_t b = first; b < B; ++b) scan<1>(job, b);
      }
    }
  });
}

template <class A>
void launch(const Tensor& values, const Tensor& rewards, const bool* mask, const Tensor& advantages, const Tensor& returns,
            double gamma, double lam) {
  run(Job<A>{pointer<A>(values), pointer<A>(rewards), mask, pointer<A>(advantages), pointer<A>(returns), values.size(1), A(gamma),
             A(gamma * lam)},
      values.size(0));
}

std::tuple<Tensor, Tensor> gae_cpu(Tensor values, Tensor rewards, std::optional<Tensor> mask, double gamma, double lam) {
  check_gae(values, rewards, mask, gamma, lam);
  Tensor advantages = new_token_tensor(values, 2, values.scalar_type()), returns = new_token_tensor(values, 2, values.scalar_type());
  const auto f = values.scalar_type() == ScalarType::Double ? launch<double> : launch<float>;
  f(values, rewards, mask_pointer(mask), advantages, returns, gamma, lam);
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) { m.impl("_gae", TORCH_BOX(&gae_cpu)); }

}  // namespace ppo_ext
