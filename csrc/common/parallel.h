// parallel.h: CPU threads, from libtorch's own pool.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace ppo_ext {

// Waking a thread costs as much as tens of thousands of elements of work.
constexpr int64_t kGrain = 32768;

// Calls f(begin, end) for ranges that make up [0, rows), on several threads if it pays. A row is as much work as `cost`
// elements. f must not throw.
template <class F>
void parallel_rows(int64_t rows, int64_t cost, const F& f) {
  if (rows == 0) return;
  const int64_t grain = cost >= kGrain ? 1 : kGrain / (cost > 0 ? cost : 1);
  if (rows <= grain) {
    f(int64_t(0), rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, f);
  }
}

}  // namespace ppo_ext
