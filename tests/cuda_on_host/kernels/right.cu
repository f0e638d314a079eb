// right.cu: small kernels that use each primitive of the host layer as CUDA allows.
#include "layer.h"  // first: it defines CUDA's keywords

#include "common/load.cuh"

namespace cuda_on_host {
namespace {

constexpr unsigned kAll = 0xffffffffu, kLow = 0x0000ffffu, kHigh = 0xffff0000u;

int place() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void indices(int* data, int) {
  data[place()] = int(blockIdx.x * 10000 + threadIdx.x) + int(gridDim.x * 1000);
}

// Each thread takes the next place i from the counter data[n] and stores its own number in data[i].
__global__ void arrivals(int* data, int n) { data[atomicAdd(data + n, 1)] = place(); }

__global__ void neighbour(int* data, int) {
  __shared__ int shared[256];
  shared[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  data[place()] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void neighbour_in_warp(int* data, int) {
  __shared__ int shared[256];
  shared[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  data[place()] = shared[threadIdx.x ^ 1];
}

// The four shuffles (from lane n, down, up and xor by n); 4 results per thread.
__global__ void shuffles(int* data, int n) {
  const int x = 100 + int(threadIdx.x);
  int* const out = data + 4 * place();
  out[0] = __shfl_sync(kAll, x, n);
  out[1] = __shfl_down_sync(kAll, x, unsigned(n));
  out[2] = __shfl_up_sync(kAll, x, unsigned(n));
  out[3] = int(__shfl_xor_sync(kAll, double(x), n));
}

// The two halves of a warp call different primitives, in any order.
__global__ void halves(int* data, int) {
  int x = int(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    for (int by = 8; by > 0; by /= 2) x += __shfl_xor_sync(kLow, x, by);
  } else {
    x = __any_sync(kHigh, x == 20);
  }
  data[place()] = x;
}

__global__ void votes(int* data, int n) {
  const int lane = int(threadIdx.x) % 32;
  data[3 * place()] = __any_sync(kAll, lane < n);
  data[3 * place() + 1] = __all_sync(kAll, lane < n);
  data[3 * place() + 2] = int(__ballot_sync(kAll, lane < n));
}

__global__ void atomics(int* data, int) {
  const int i = place();
  atomicAdd(data, i);
  atomicMax(data + 1, i);
  atomicExch(data + 2, i);
  int old = atomicAdd(data + 3, 0);
  for (int expected = -1; old != expected;) {  // multiplies by 3 modulo 1000003
    expected = old;
    old = atomicCAS(data + 3, expected, int(int64_t(expected) * 3 % 1000003));
  }
  atomicAdd(reinterpret_cast<float*>(data + 4), 0.5f);
  atomicCAS(data + 5, 77, i);
}

// The block that draws the last ticket is the last to finish; it adds up what all blocks have written.
__global__ void last_block_adds(int* data, int n) {
  data[blockIdx.x] = int(blockIdx.x);
  __threadfence();
  if (atomicAdd(data + n, 1) != n - 1) return;
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += data[i];
  data[n + 1] = sum;
}

__global__ void copy_packs(int* data, int n) {
  auto* const packs = reinterpret_cast<ppo_ext::Pack*>(data);
  ppo_ext::store_pack(packs + n + place(), ppo_ext::load_pack(packs + place()));
}

__global__ void copy_one(int* data, int n) { data[n] = data[0]; }

const bool added = add_test_kernels({{"indices", indices},
                                     {"arrivals", arrivals},
                                     {"neighbour", neighbour},
                                     {"neighbour_in_warp", neighbour_in_warp},
                                     {"shuffles", shuffles},
                                     {"halves", halves},
                                     {"votes", votes},
                                     {"atomics", atomics},
                                     {"last_block_adds", last_block_adds},
                                     {"copy_packs", copy_packs},
                                     {"copy_one", copy_one}});

}  // namespace
}  // namespace cuda_on_host
