// gae_cpu.cpp
// Computes  see gae.h
// Bytes     17 per token in fp32: values, rewards, advantages, returns and the mask
// Launch    threads over groups of 16 sequences, which run side by side
// Sums      the serial recurrence, in TRL's order of operations: same bits for any threads and any batch
// Limits    none

#include "common/parallel.h"
#include "gae_entry.h"
#include "gae_simd.h"

namespace ppo_ext {
namespace {

struct OnCPU {
  template <class A>
  static void run(const GAEJob<A>& job, const Tensor&) {
    const int64_t groups = (job.B + kSequencesOfGroup - 1) / kSequencesOfGroup;
    parallel_rows(groups, kSequencesOfGroup * job.T, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kSequencesOfGroup;
        PPO_AT_LEVEL(scan_group, job, first, int(std::min<int64_t>(kSequencesOfGroup, job.B - first)));
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) { m.impl("_gae", TORCH_BOX(&gae<OnCPU>)); }

}  // namespace ppo_ext
