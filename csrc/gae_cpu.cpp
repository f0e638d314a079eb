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

template <class A>
void check_offsets(const GAEJob<A>& job) {
  if (!job.offsets) return;
  if (job.offsets[0] != 0) reject("gae", "cu_seqlens[0]", "be 0", job.offsets[0]);
  for (int64_t b = 0; b < job.B; ++b)
    if (job.offsets[b + 1] < job.offsets[b])
      reject("gae", "cu_seqlens[" + std::to_string(b + 1) + "]", "not be less than the entry before it",
             job.offsets[b + 1]);
  if (job.offsets[job.B] != job.tokens)
    reject("gae", "cu_seqlens[" + std::to_string(job.B) + "]", "be the number of tokens " + std::to_string(job.tokens),
           job.offsets[job.B]);
}

struct OnCPU {
  template <class A>
  static void run(const GAEJob<A>& job, const Tensor&) {
    check_offsets(job);
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
