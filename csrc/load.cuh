// load.cuh: reads and writes rows of logits 16 bytes at a time, whatever their alignment and strides.
#pragma once

#include <cstring>
#include <type_traits>

#include "host_device.h"
#include "reduce.cuh"

namespace ppo_ext {

// The type that arithmetic on elements of type T runs in.
template <class T>
using accumulate_t = std::conditional_t<std::is_same<T, double>::value, double, float>;

// 2^y. The fast unit's error is 2 ulp; results below the smallest normal number become 0.
__device__ __forceinline__ float exp2_of(float y) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return std::exp2(y);
#endif
}
__device__ __forceinline__ double exp2_of(double y) { return exp2(y); }

// The larger number; a NaN is passed over, so callers must meet it elsewhere.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// ---- 16 bytes ----

struct alignas(16) Pack {
  unsigned words[4];
};

template <class T>
constexpr int kPack = 16 / int(sizeof(T));  // elements in a pack

// A pack that is read once: it passes the first-level cache by.
__device__ __forceinline__ Pack load_pack(const Pack* p) {
#if defined(__CUDA_ARCH__)
  Pack x;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3])
               : "l"(p));
  return x;
#else
  return *p;
#endif
}

__device__ __forceinline__ void store_pack(Pack* p, const Pack& x) { *p = x; }

// A pack's elements from where they are not aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Pack gather_pack(const T* p) {
  T elements[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) elements[i] = p[i];
  Pack x;
  std::memcpy(&x, elements, sizeof(x));
  return x;
}

template <class T>
__device__ __forceinline__ void unpack(const Pack& pack, accumulate_t<T>* x) {
  T elements[kPack<T>];
  std::memcpy(elements, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = accumulate_t<T>(elements[i]);
}

template <class T>
__device__ __forceinline__ Pack pack_of(const accumulate_t<T>* x) {
  T elements[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) elements[i] = T(x[i]);
  Pack pack;
  std::memcpy(&pack, elements, sizeof(pack));
  return pack;
}

// ---- rows ----

template <class T>
PPO_HD bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A row cut at 16-byte boundaries: `head` elements, `packs`, and what is left; head and rest are the edges.
struct RowCut {
  int head, packs, edges;

  // The element at the i-th place of the edges.
  __device__ __forceinline__ int64_t edge(int i, int64_t V) const { return i < head ? i : V - edges + i; }
};

template <class T>
__device__ __forceinline__ RowCut cut_row(const T* row, int64_t V) {
  const int beyond = int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPack<T>);
  const int64_t wanted = (kPack<T> - beyond) % kPack<T>;
  const int head = int(wanted < V ? wanted : V);
  const int packs = int((V - head) / kPack<T>);
  return {head, packs, int(V - int64_t(packs) * kPack<T>)};
}

// Rows of equal length that are read side by side.
template <class T, int kInputs>
struct Rows {
  const T* row[kInputs];
  int64_t stride[kInputs];
  int64_t V;

  __device__ __forceinline__ bool dense() const {
    bool result = true;
    for (int i = 0; i < kInputs; ++i) result = result && stride[i] == 1;
    return result;
  }
};

// How many packs of each input a thread has in flight.
template <int kInputs>
constexpr int kBatch = kInputs == 1 ? 4 : 2;

// Packs first, first + step, ... before `end` of one row; beyond the end, packs of `fill`.
template <class T, int kCount>
__device__ __forceinline__ void load_batch(const T* packs, int first, int step, int end, const Pack& fill, Pack (&batch)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) batch[k] = fill;
  if (is_aligned(packs)) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (first + k * step < end) batch[k] = load_pack(reinterpret_cast<const Pack*>(packs) + first + k * step);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (first + k * step < end) batch[k] = gather_pack(packs + int64_t(first + k * step) * kPack<T>);
  }
}

template <class T>
__device__ __forceinline__ Pack pack_of_minus_infinity() {
  accumulate_t<T> x[kPack<T>];
  for (int i = 0; i < kPack<T>; ++i) x[i] = -INFINITY;
  return pack_of<T>(x);
}

// Calls f on this thread's share of the rows, in pieces A[kInputs][n] of several n, filled up with -inf.
template <int kThreads, class T, int kInputs, class F>
__device__ __forceinline__ void read_rows(const Rows<T, kInputs>& in, const F& f) {
  using A = accumulate_t<T>;
  const int thread = thread_of_group<kThreads>();
  A one[kInputs][1];
  if (!in.dense()) {
    for (int64_t v = thread; v < in.V; v += kThreads) {
      for (int i = 0; i < kInputs; ++i) one[i][0] = A(in.row[i][v * in.stride[i]]);
      f(one);
    }
    return;
  }
  const RowCut cut = cut_row(in.row[0], in.V);
  const Pack fill = pack_of_minus_infinity<T>();
  for (int first = thread; first < cut.packs; first += kBatch<kInputs> * kThreads) {
    Pack batch[kInputs][kBatch<kInputs>];
    A x[kInputs][kBatch<kInputs> * kPack<T>];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) load_batch(in.row[i] + cut.head, first, kThreads, cut.packs, fill, batch[i]);
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
#pragma unroll
      for (int k = 0; k < kBatch<kInputs>; ++k) unpack<T>(batch[i][k], x[i] + k * kPack<T>);
    f(x);
  }
  if (thread < cut.edges) {
    for (int i = 0; i < kInputs; ++i) one[i][0] = A(in.row[i][cut.edge(thread, in.V)]);
    f(one);
  }
}

// ---- rows that are written ----

constexpr int kTileBytes = 65536;  // what one block reads of a row before it takes up another tile

template <class T>
constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));  // columns

// Writes f(inputs) to every column of one tile of a row, and g(input 0) to column `special` if it lies there. The row
// may be input 0 itself: each thread reads what it is about to overwrite, and nobody else does.
template <int kThreads, class T, int kInputs, class F, class G>
__device__ __forceinline__ void write_tile(const Rows<T, kInputs>& in, T* out, int64_t out_stride, int64_t tile, const F& f,
                                           int64_t special, const G& g) {
  using A = accumulate_t<T>;
  const auto write_one = [&](int64_t v) {
    A x[kInputs];
    for (int i = 0; i < kInputs; ++i) x[i] = A(in.row[i][v * in.stride[i]]);
    out[v * out_stride] = T(v == special ? g(x[0]) : f(x));
  };
  if (!in.dense() || out_stride != 1) {
    const int64_t end = (tile + 1) * kTile<T> < in.V ? (tile + 1) * kTile<T> : in.V;
    for (int64_t v = tile * kTile<T> + threadIdx.x; v < end; v += kThreads) write_one(v);
    return;
  }
  constexpr int kTilePacks = kTileBytes / 16;
  const RowCut cut = cut_row(out, in.V);
  const int end = int((tile + 1) * kTilePacks < cut.packs ? (tile + 1) * kTilePacks : cut.packs);
  for (int first = int(tile) * kTilePacks + int(threadIdx.x); first < end; first += kBatch<kInputs> * kThreads) {
    Pack batch[kInputs][kBatch<kInputs>];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) load_batch(in.row[i] + cut.head, first, kThreads, end, Pack{}, batch[i]);
#pragma unroll
    for (int k = 0; k < kBatch<kInputs>; ++k) {
      if (first + k * kThreads >= end) break;
      A x[kInputs][kPack<T>], y[kPack<T>];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) unpack<T>(batch[i][k], x[i]);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        A at_column[kInputs];
        for (int i = 0; i < kInputs; ++i) at_column[i] = x[i][j];
        y[j] = f(at_column);
      }
      const int64_t column = cut.head + int64_t(first + k * kThreads) * kPack<T>;
      const bool has_special = uint64_t(special - column) < uint64_t(kPack<T>);
      const A at_special = has_special ? g(A(in.row[0][special])) : A(0);
      store_pack(reinterpret_cast<Pack*>(out + column), pack_of<T>(y));
      if (has_special) out[special] = T(at_special);
    }
  }
  if (tile == 0 && int(threadIdx.x) < cut.edges) write_one(cut.edge(int(threadIdx.x), in.V));
}

// Writes zeros to one tile of a row.
template <int kThreads, class T>
__device__ __forceinline__ void zero_tile(T* out, int64_t out_stride, int64_t V, int64_t tile) {
  constexpr int kTilePacks = kTileBytes / 16;
  if (out_stride != 1) {
    const int64_t end = (tile + 1) * kTile<T> < V ? (tile + 1) * kTile<T> : V;
    for (int64_t v = tile * kTile<T> + threadIdx.x; v < end; v += kThreads) out[v * out_stride] = T(0.0f);
    return;
  }
  const RowCut cut = cut_row(out, V);
  const int end = int((tile + 1) * kTilePacks < cut.packs ? (tile + 1) * kTilePacks : cut.packs);
  for (int i = int(tile) * kTilePacks + int(threadIdx.x); i < end; i += kThreads)
    store_pack(reinterpret_cast<Pack*>(out + cut.head) + i, Pack{});
  if (tile == 0 && int(threadIdx.x) < cut.edges) out[cut.edge(int(threadIdx.x), V)] = T(0.0f);
}

}  // namespace ppo_ext
