// wrong.cu: small kernels with one fault each, which the host layer must report. Often the fault is a bad value of `n`.
#include "layer.h"

namespace cuda_on_host {
namespace {

constexpr unsigned kAll = 0xffffffffu, kLow = 0x0000ffffu;

// ---- barriers and order ----

__global__ void no_barrier(int* data, int) {
  __shared__ int shared[256];
  shared[threadIdx.x] = int(threadIdx.x);
  data[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
}

// The barrier that keeps the second round from overtaking the first is missing.
__global__ void no_second_barrier(int* data, int) {
  __shared__ int shared[256];
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = round;
    __syncthreads();
    data[round * blockDim.x + threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
  }
}

__global__ void no_syncwarp(int* data, int) {
  __shared__ int shared[256];
  shared[threadIdx.x] = int(threadIdx.x);
  data[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void shuffle_for_a_barrier(int* data, int) {
  __shared__ int shared[256];
  shared[threadIdx.x] = int(threadIdx.x);
  data[threadIdx.x] = __shfl_sync(kAll, 1, 0) + shared[threadIdx.x ^ 1];
}

__global__ void one_stores_what_all_load(int* data, int n) {
  data[1 + threadIdx.x] = data[0];
  if (int(threadIdx.x) == n) data[0] = 1;
}

__global__ void counts_without_atomics(int* data, int) { data[0] += 1; }

__global__ void reads_the_block_before(int* data, int) { data[blockIdx.x + 1] = data[blockIdx.x]; }

__global__ void barrier_for_some(int*, int n) {
  if (int(threadIdx.x) != n) __syncthreads();
}

__global__ void two_barriers_at_once(int*, int n) {
  if (int(threadIdx.x) < n) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// ---- masks ----

__global__ void mask_without_the_caller(int* data, int) { data[threadIdx.x] = __shfl_down_sync(kLow, 1, 1); }

__global__ void shuffle_for_some(int* data, int n) {
  if (int(threadIdx.x) != n) data[threadIdx.x] = __shfl_down_sync(kAll, 1, 1);
}

__global__ void source_outside_the_mask(int* data, int) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_down_sync(kLow, 1, 1);
}

__global__ void different_calls(int* data, int n) {
  data[threadIdx.x] = int(threadIdx.x) < n ? __any_sync(kAll, 1) : __all_sync(kAll, 1);
}

__global__ void different_masks(int* data, int) {
  data[threadIdx.x] = __any_sync(threadIdx.x % 32 < 16 ? kAll : kAll - 1, 1);
}

__global__ void different_lines(int* data, int n) {
  if (int(threadIdx.x) < n) {
    data[threadIdx.x] = __any_sync(kAll, 1);
  } else {
    data[threadIdx.x] = __any_sync(kAll, 1);
  }
}

// ---- memory ----

__global__ void reads_shared_before_writing(int* data, int) {
  __shared__ float numbers[4];
  __shared__ int64_t integer;
  reinterpret_cast<float*>(data)[0] = numbers[2];
  std::memcpy(data + 2, &integer, 8);
  numbers[2] = 1.0f;
  integer = 7;
}

__global__ void too_much_shared(int*, int n) {
  __shared__ char shared[64 * 1024];
  for (int i = 0; i < n; ++i) shared[i] = 1;
}

__global__ void beyond_shared(int* data, int n) {
  __shared__ int shared[4];
  shared[n] = 1;
  data[0] = shared[n];
}

__forceinline__ int sum_of_four(const int* x) { return x[0] + x[1] + x[2] + x[3]; }

__global__ void beyond_local(int* data, int) {
  int local[3] = {data[0], data[1], data[2]};
  data[0] = sum_of_four(local);
}

__global__ void loads(int* data, int n) { data[0] = data[n]; }

__global__ void stores(int* data, int n) { data[n] = 1; }

int depth(volatile char* outer, int n) {
  volatile char inner[1024];
  inner[0] = outer[0];
  return n == 0 ? inner[0] : depth(inner, n - 1) + inner[0];
}

__global__ void recurses(int* data, int n) {
  volatile char outer[1] = {1};
  data[threadIdx.x] = depth(outer, n);
}

// ---- arithmetic ----

__global__ void adds_one(int* data, int) { data[0] = data[0] + 1; }
__global__ void subtracts_one(int* data, int) { data[0] = data[0] - 1; }
__global__ void doubles(int* data, int) { data[0] = data[0] * 2; }
__global__ void negates(int* data, int) { data[0] = -data[0]; }
__global__ void divides_by(int* data, int n) { data[0] = data[0] / n; }
__global__ void shifts_by(int* data, int n) { data[0] = 1 << n; }
__global__ void casts(int* data, int n) { data[0] = int(float(n) * 4.0f); }
__global__ void reads_bool(int* data, int) { data[0] = *reinterpret_cast<bool*>(data); }

const bool added = add_test_kernels({{"no_barrier", no_barrier},
                                     {"no_second_barrier", no_second_barrier},
                                     {"no_syncwarp", no_syncwarp},
                                     {"shuffle_for_a_barrier", shuffle_for_a_barrier},
                                     {"one_stores_what_all_load", one_stores_what_all_load},
                                     {"counts_without_atomics", counts_without_atomics},
                                     {"reads_the_block_before", reads_the_block_before},
                                     {"barrier_for_some", barrier_for_some},
                                     {"two_barriers_at_once", two_barriers_at_once},
                                     {"mask_without_the_caller", mask_without_the_caller},
                                     {"shuffle_for_some", shuffle_for_some},
                                     {"source_outside_the_mask", source_outside_the_mask},
                                     {"different_calls", different_calls},
                                     {"different_masks", different_masks},
                                     {"different_lines", different_lines},
                                     {"reads_shared_before_writing", reads_shared_before_writing},
                                     {"too_much_shared", too_much_shared},
                                     {"beyond_shared", beyond_shared},
                                     {"beyond_local", beyond_local},
                                     {"loads", loads},
                                     {"stores", stores},
                                     {"recurses", recurses},
                                     {"adds_one", adds_one},
                                     {"subtracts_one", subtracts_one},
                                     {"doubles", doubles},
                                     {"negates", negates},
                                     {"divides_by", divides_by},
                                     {"shifts_by", shifts_by},
                                     {"casts", casts},
                                     {"reads_bool", reads_bool}});

}  // namespace
}  // namespace cuda_on_host
