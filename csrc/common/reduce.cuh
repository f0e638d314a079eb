// reduce.cuh: reductions and scans over a warp or a block, always in the same order.
#pragma once

#include <cstring>
#include <type_traits>

#include "host_device.h"

namespace ppo_ext {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// A group is kThreads neighbouring threads that work on one thing: a warp, or the block.
template <int kThreads>
__device__ __forceinline__ int thread_of_group() {
  static_assert(kThreads == kWarp || kThreads % (2 * kWarp) == 0, "a warp or a block of a power of two of warps");
  return kThreads == kWarp ? int(threadIdx.x) % kWarp : int(threadIdx.x);
}

// The state of the lane `by` places to the right; for the last lanes, to whose right there is none, their own.
template <class State>
__device__ __forceinline__ State shuffle_down(const State& state, int by) {
  static_assert(sizeof(State) % 4 == 0 && std::is_trivially_copyable<State>::value, "moved in words");
  unsigned words[sizeof(State) / 4];
  std::memcpy(words, &state, sizeof(State));
#pragma unroll
  for (int i = 0; i < int(sizeof(State) / 4); ++i) words[i] = __shfl_down_sync(kWholeWarp, words[i], by);
  State result;
  std::memcpy(&result, words, sizeof(State));
  return result;
}

// Merges the states of the lanes below kLanes. Only lane 0 gets the whole result.
template <int kLanes, class State, class Merge>
__device__ __forceinline__ State reduce_lanes(State state, const Merge& merge) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) state = merge(state, shuffle_down(state, by));
  return state;
}

// Merges the states of a group. Only its thread 0 gets the whole result.
template <int kThreads, class State, class Merge>
__device__ __forceinline__ State reduce_group(State state, const Merge& merge) {
  state = reduce_lanes<kWarp>(state, merge);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ State parts[kWarps];
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    if (lane == 0) parts[warp] = state;
    __syncthreads();
    if (warp == 0) state = reduce_lanes<kWarps>(parts[lane % kWarps], merge);
    __syncthreads();  // before the next call writes to parts
  }
  return state;
}

// Gives the state of the group's thread 0 to all its threads.
template <int kThreads, class State>
__device__ __forceinline__ State share_first(State state) {
  if constexpr (kThreads == kWarp) {
    unsigned words[sizeof(State) / 4];
    std::memcpy(words, &state, sizeof(State));
#pragma unroll
    for (int i = 0; i < int(sizeof(State) / 4); ++i) words[i] = __shfl_sync(kWholeWarp, words[i], 0);
    std::memcpy(&state, words, sizeof(State));
  } else {
    __shared__ State shared;
    if (threadIdx.x == 0) shared = state;
    __syncthreads();
    state = shared;
    __syncthreads();
  }
  return state;
}

template <class State>
struct Scan {
  State after;  // of everything to the right of this thread
  State total;  // of the whole group
};

// For each thread the composition of all states to its right, and the one of all; compose(earlier, later) composes
// neighbours.
template <int kThreads, class State, class Compose>
__device__ __forceinline__ Scan<State> scan_from_right(State state, const State& identity, const Compose& compose) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const State later = shuffle_down(state, by);
    if (lane + by < kWarp) state = compose(state, later);
  }
  State after = shuffle_down(state, 1);
  if (lane == kWarp - 1) after = identity;
  if constexpr (kThreads == kWarp) {
    return {after, share_first<kWarp>(state)};
  } else {
    __shared__ State parts[kThreads / kWarp];
    const int warp = int(threadIdx.x) / kWarp;
    if (lane == 0) parts[warp] = state;
    __syncthreads();
    State right = identity, total = identity;
    for (int w = kThreads / kWarp - 1; w >= 0; --w) {
      if (w == warp) right = total;
      total = compose(parts[w], total);
    }
    __syncthreads();  // before the next call writes to parts
    return {compose(after, right), total};
  }
}

}  // namespace ppo_ext
