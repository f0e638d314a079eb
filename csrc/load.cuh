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

// A pack's elements one by one.
template <class T>
__device__ __forceinline__ Pack gather_pack(const T* p, int64_t stride) {
  T elements[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) elements[i] = p[i * stride];
  Pack x;
  std::memcpy(&x, elements, sizeof(x));
  return x;
}

// The 16 bytes that start `bytes` into a, which b follows in memory.
__device__ __forceinline__ Pack shift_packs(const Pack& a, const Pack& b, int bytes) {
  unsigned w[8];
  std::memcpy(w, &a, sizeof(a));
  std::memcpy(w + 4, &b, sizeof(b));
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
  Pack x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.words[i] = unsigned((uint64_t(w[i + 1]) << 32 | w[i]) >> (bytes % 4 * 8));
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

template <class T>
__device__ __forceinline__ int bytes_beyond_boundary(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) % 16);
}

// How many packs of each input a thread has in flight.
template <int kInputs>
constexpr int kBatch = kInputs == 1 ? 4 : 2;

// One row of inputs, from column `begin` on seen as packs, whatever its alignment and stride: what a thread gets depends
// on the columns only.
template <class T>
struct PackedRow {
  const T *row, *packs;  // packs = row at column begin
  int64_t stride, V;

  // Packs first, first + step, ... before `end`; beyond the end, packs of `fill`.
  template <int kCount>
  __device__ __forceinline__ void load(int first, int step, int end, const Pack& fill, Pack (&batch)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) batch[k] = fill;
    const int beyond = bytes_beyond_boundary(packs);
    if (stride != 1) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (first + k * step < end) batch[k] = gather_pack(packs + (first + k * step) * (stride * kPack<T>), stride);
    } else if (beyond == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (first + k * step < end) batch[k] = load_pack(reinterpret_cast<const Pack*>(packs) + first + k * step);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (first + k * step < end) batch[k] = load_across(packs + int64_t(first + k * step) * kPack<T>, beyond);
    }
  }

  // A pack that crosses a 16-byte boundary: from the two aligned packs it lies in, unless they reach out of the row.
  __device__ __forceinline__ Pack load_across(const T* p, int beyond) const {
    const char* const a = reinterpret_cast<const char*>(p) - beyond;
    if (a < reinterpret_cast<const char*>(row) || a + 32 > reinterpret_cast<const char*>(row + V)) return gather_pack(p, 1);
    return shift_packs(*reinterpret_cast<const Pack*>(a), *reinterpret_cast<const Pack*>(a + 16), beyond);
  }
};

// Rows of equal length that are read side by side.
template <class T, int kInputs>
struct Rows {
  const T* row[kInputs];
  int64_t stride[kInputs];
  int64_t V;

  __device__ __forceinline__ accumulate_t<T> at(int input, int64_t v) const { return accumulate_t<T>(row[input][v * stride[input]]); }

  __device__ __forceinline__ PackedRow<T> packed(int input, int64_t begin) const {
    return {row[input], row[input] + begin * stride[input], stride[input], V};
  }
};

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
  const int thread = thread_of_group<kThreads>(), packs = int(in.V / kPack<T>);
  const Pack fill = pack_of_minus_infinity<T>();
  for (int first = thread; first < packs; first += kBatch<kInputs> * kThreads) {
    Pack batch[kInputs][kBatch<kInputs>];
    A x[kInputs][kBatch<kInputs> * kPack<T>];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) in.packed(i, 0).load(first, kThreads, packs, fill, batch[i]);
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
#pragma unroll
      for (int k = 0; k < kBatch<kInputs>; ++k) unpack<T>(batch[i][k], x[i] + k * kPack<T>);
    f(x);
  }
  const int64_t last = int64_t(packs) * kPack<T> + thread;
  if (last < in.V) {
    A one[kInputs][1];
    for (int i = 0; i < kInputs; ++i) one[i][0] = in.at(i, last);
    f(one);
  }
}

// ---- rows that are written ----

constexpr int kTileBytes = 65536;  // what one block reads of a row before it takes up another tile

template <class T>
constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));  // columns

// Columns of one tile: packs [first, end) from column `head` on, where out is aligned, and in tile 0 the edges around them.
struct Tile {
  int head, first, end, edges;

  // The i-th column of the edges.
  __device__ __forceinline__ int64_t edge(int i, int64_t V) const { return i < head ? i : V - edges + i; }
};

template <class T>
__device__ __forceinline__ Tile tile_of(const T* out, int64_t out_stride, int64_t V, int64_t tile) {
  constexpr int64_t kTilePacks = kTileBytes / 16;
  const int64_t wanted = out_stride == 1 ? (16 - bytes_beyond_boundary(out)) % 16 / int64_t(sizeof(T)) : 0;
  const int64_t head = wanted < V ? wanted : V, packs = (V - head) / kPack<T>;
  const int64_t end = (tile + 1) * kTilePacks < packs ? (tile + 1) * kTilePacks : packs;
  return {int(head), int(tile * kTilePacks), int(end), tile == 0 ? int(V - packs * kPack<T>) : 0};
}

template <class T>
__device__ __forceinline__ void store_columns(T* out, int64_t stride, int64_t column, const Pack& pack) {
  if (stride == 1) {
    store_pack(reinterpret_cast<Pack*>(out + column), pack);
  } else {
    T elements[kPack<T>];
    std::memcpy(elements, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) out[(column + i) * stride] = elements[i];
  }
}

// Writes f(inputs) to every column of one tile of a row, and g(input 0) to column `special` if it lies there. The row
// may be input 0 itself: each thread reads what it is about to overwrite, and nobody else does.
template <int kThreads, class T, int kInputs, class F, class G>
__device__ __forceinline__ void write_tile(const Rows<T, kInputs>& in, T* out, int64_t out_stride, int64_t tile, const F& f,
                                           int64_t special, const G& g) {
  using A = accumulate_t<T>;
  const Tile t = tile_of(out, out_stride, in.V, tile);
  for (int first = t.first + int(threadIdx.x); first < t.end; first += kBatch<kInputs> * kThreads) {
    Pack batch[kInputs][kBatch<kInputs>];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) in.packed(i, t.head).load(first, kThreads, t.end, Pack{}, batch[i]);
#pragma unroll
    for (int k = 0; k < kBatch<kInputs>; ++k) {
      if (first + k * kThreads >= t.end) break;
      A x[kInputs][kPack<T>], y[kPack<T>];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) unpack<T>(batch[i][k], x[i]);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        A at_column[kInputs];
        for (int i = 0; i < kInputs; ++i) at_column[i] = x[i][j];
        y[j] = f(at_column);
      }
      const int64_t column = t.head + int64_t(first + k * kThreads) * kPack<T>;
      const bool has_special = uint64_t(special - column) < uint64_t(kPack<T>);
      const A at_special = has_special ? g(in.at(0, special)) : A(0);
      store_columns(out, out_stride, column, pack_of<T>(y));
      if (has_special) out[special * out_stride] = T(at_special);
    }
  }
  if (int(threadIdx.x) < t.edges) {
    const int64_t v = t.edge(int(threadIdx.x), in.V);
    A x[kInputs];
    for (int i = 0; i < kInputs; ++i) x[i] = in.at(i, v);
    out[v * out_stride] = T(v == special ? g(x[0]) : f(x));
  }
}

// Writes zeros to one tile of a row.
template <int kThreads, class T>
__device__ __forceinline__ void zero_tile(T* out, int64_t out_stride, int64_t V, int64_t tile) {
  const Tile t = tile_of(out, out_stride, V, tile);
  for (int i = t.first + int(threadIdx.x); i < t.end; i += kThreads)
    store_columns(out, out_stride, t.head + int64_t(i) * kPack<T>, Pack{});
  if (int(threadIdx.x) < t.edges) out[t.edge(int(threadIdx.x), V) * out_stride] = T(0.0f);
}

}  // namespace ppo_ext
