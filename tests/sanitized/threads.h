// threads.h: included before each CPU source where ThreadSanitizer watches. libtorch's thread pool is not instrumented, so
// ranges run on plain threads instead, whose creation and end ThreadSanitizer knows to order memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace torch::stable {

template <class F>
void parallel_for_on_threads(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t kThreads = 4;
  const int64_t size = std::max(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += size)
    threads.emplace_back([=, &f] { f(from, std::min(from + size, end)); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for parallel_for_on_threads
