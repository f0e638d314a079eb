// gae_cpu.cpp
// Computes  see gae.h
// Bytes     17 per token in fp32: values, rewards, advantages, returns and the mask
// Launch    threads over groups of 16 sequences, which run side by side
// Sums      the serial recurrence, in TRL's order of operations: same bits for any threads and any batch
// Limits    none

#include "common/checks.h"
#include "common/parallel.h"
#include "gae_simd.h"

namespace ppo_ext {
namespace {

template <class A>
void run(const GAEJob<A>& job, int64_t B) {
  const int64_t groups = (B + kSequencesOfGroup - 1) / kSequencesOfGroup;
  parallel_rows(groups, kSequencesOfGroup * job.T, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kSequencesOfGroup; first < std::min(end * kSequencesOfGroup, B);
         first += kSequencesOfGroup)
      PPO_AT_LEVEL(scan_group, job, first, int(std::min<int64_t>(kSequencesOfGroup, B - first)));
  });
}

template <class A>
void launch(const Tensor& values, const Tensor& rewards, const bool* mask, const Tensor& advantages,
            const Tensor& returns, double gamma, double lam) {
  run(GAEJob<A>{pointer<A>(values), pointer<A>(rewards), mask, pointer<A>(advantages), pointer<A>(returns),
                values.size(1), A(gamma), A(gamma * lam)},
      values.size(0));
}

std::tuple<Tensor, Tensor> gae_cpu(Tensor values, Tensor rewards, std::optional<Tensor> mask, double gamma,
                                   double lam) {
  check_gae(values, rewards, mask, gamma, lam);
  Tensor advantages = new_token_tensor(values, 2, values.scalar_type()),
         returns = new_token_tensor(values, 2, values.scalar_type());
  const auto f = values.scalar_type() == ScalarType::Double ? launch<double> : launch<float>;
  f(values, rewards, mask_pointer(mask), advantages, returns, gamma, lam);
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) { m.impl("_gae", TORCH_BOX(&gae_cpu)); }

}  // namespace ppo_ext
