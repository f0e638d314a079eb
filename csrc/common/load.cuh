// load.cuh: reads rows of logits 16 bytes at a time, whatever their alignment and strides.
#pragma once

#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>

#include "host_device.h"
#include "reduce.cuh"
#include "rows.h"

namespace ppo_ext {

// 2^y, in fp32 by the special function unit: its error is 2 ulp, and results below the smallest normal number become 0.
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

// The larger number. A NaN is ignored, so that callers must take care of it elsewhere.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// ---- 16 bytes ----

struct alignas(16) Pack {
  unsigned words[4];
};

template <class T>
constexpr int kPack = 16 / int(sizeof(T));  // elements in a pack

#if defined(__CUDA_ARCH__)
#define PPO_LOAD_PACK(instruction, p)                                                   \
  Pack x;                                                                               \
  asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                                   \
               : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3]) \
               : "l"(p));                                                               \
  return x
#else
#define PPO_LOAD_PACK(instruction, p) return *p
#endif

// Loads a pack that nothing else reads: it is not kept in the first-level cache.
__device__ __forceinline__ Pack load_pack(const Pack* p) {
  PPO_LOAD_PACK("ld.global.L1::no_allocate.L2::256B.v4.u32", p);
}

// Loads a pack that the neighbouring thread loads as well.
__device__ __forceinline__ Pack load_common_pack(const Pack* p) { PPO_LOAD_PACK("ld.global.v4.u32", p); }

__device__ __forceinline__ void store_pack(Pack* p, const Pack& x) {
#if defined(__CUDA_ARCH__)
  // As PTX, since the compiler stores the members of a struct one by one, those of a uint4 too. "memory" keeps it from
  // loading parts of a row again after they were overwritten in place.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.words[0]), "r"(x.words[1]), "r"(x.words[2]),
               "r"(x.words[3])
               : "memory");
#else
  *p = x;
#endif
}

// Loads the elements of a pack one by one.
template <class T>
__device__ __forceinline__ Pack gather_pack(const T* p, int64_t stride) {
  T elements[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) elements[i] = p[i * stride];
  Pack x;
  std::memcpy(&x, elements, sizeof(x));
  return x;
}

// The 16 bytes that start `bytes` bytes behind the start of a, where b is what follows a in memory.
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
constexpr bool is_bfloat16 = std::is_same<T, torch::headeronly::BFloat16>::value;

// The elements that lie in `words`, as numbers.
template <class T, int kWords>
__device__ __forceinline__ void unpack_words(const unsigned (&words)[kWords], accumulate_t<T>* x) {
  if constexpr (is_bfloat16<T>) {  // a bfloat16 is the upper half of a float: one instruction each
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned bits[2] = {words[i] << 16, words[i] & 0xffff0000u};
      std::memcpy(x + 2 * i, bits, sizeof(bits));
    }
  } else {
    T elements[sizeof(words) / sizeof(T)];
    std::memcpy(elements, words, sizeof(words));
#pragma unroll
    for (int i = 0; i < int(sizeof(words) / sizeof(T)); ++i) x[i] = accumulate_t<T>(elements[i]);
  }
}

template <class T>
__device__ __forceinline__ void unpack(const Pack& pack, accumulate_t<T>* x) {
  unpack_words<T>(pack.words, x);
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

// Two words of two 16-bit numbers each: the larger ones, place by place. A NaN is ignored.
template <class T>
__device__ __forceinline__ unsigned larger_pair(unsigned a, unsigned b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned result;
  if constexpr (is_bfloat16<T>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
#else
  const unsigned words[2] = {a, b};
  float x[4];
  unpack_words<T>(words, x);
  const T larger_of_each[2] = {T(larger(x[0], x[2])), T(larger(x[1], x[3]))};
  std::memcpy(&a, larger_of_each, sizeof(a));
  return a;
#endif
}

// The largest element of some packs. NaNs are ignored.
template <class T, int kCount>
__device__ __forceinline__ accumulate_t<T> largest(const Pack (&packs)[kCount]) {
  constexpr int kLeft = sizeof(T) == 2 ? 2 : kCount * kPack<T>;  // 16-bit numbers are compared in pairs first
  accumulate_t<T> x[kLeft];
  if constexpr (sizeof(T) == 2) {
    unsigned pair[1] = {packs[0].words[0]};
#pragma unroll
    for (int i = 1; i < kCount * 4; ++i) pair[0] = larger_pair<T>(pair[0], packs[i / 4].words[i % 4]);
    unpack_words<T>(pair, x);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) unpack<T>(packs[k], x + k * kPack<T>);
  }
  accumulate_t<T> top = x[0];
#pragma unroll
  for (int i = 1; i < kLeft; ++i) top = larger(top, x[i]);
  return top;
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

// How many packs of each input a thread loads before it uses the first one.
template <int kInputs>
constexpr int kBatch = kInputs == 1 ? 4 : 2;

// A row of one input, seen as packs from some column on, with any alignment and stride. Which elements a pack has
// depends on their columns only, so that the results do not depend on where the row lies.
template <class T>
struct PackedRow {
  const T* packs;  // the element at that column
  int64_t stride;
  int last;  // the last pack that is whole

  // Packs first, first + step, ... before `end`; beyond the end, packs of `fill`.
  template <bool kAligned, int kCount>
  __device__ __forceinline__ void load(int first, int step, int end, const Pack& fill, Pack (&batch)[kCount]) const {
    if (kAligned && first + (kCount - 1) * step < end) {
      load_part<kAligned, true>(first, step, end, batch);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) batch[k] = fill;
      load_part<kAligned, false>(first, step, end, batch);
    }
  }

  template <bool kAligned, bool kWhole, int kCount>
  __device__ __forceinline__ void load_part(int first, int step, int end, Pack (&batch)[kCount]) const {
    const int beyond = bytes_beyond_boundary(packs);
    if (kAligned || (stride == 1 && beyond == 0)) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (kWhole || first + k * step < end)
          batch[k] = load_pack(reinterpret_cast<const Pack*>(packs) + first + k * step);
    } else if (stride != 1) {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (kWhole || first + k * step < end)
          batch[k] = gather_pack(packs + (first + k * step) * (stride * kPack<T>), stride);
    } else {
      // A pack is cut out of the two aligned packs of memory that it lies in. At the first and the last pack of the row
      // these may reach beyond the row, so that their elements are loaded one by one.
      const Pack* const across = reinterpret_cast<const Pack*>(reinterpret_cast<uintptr_t>(packs) - beyond) + first;
#pragma unroll
      for (int k = 0; k < kCount; k += 2) {  // two at a time, which saves registers
        Pack next[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = first + (k + j) * step;
          if ((!kWhole && i >= end) || i == 0 || i >= last) continue;
          batch[k + j] = load_common_pack(across + (k + j) * step);
          next[j] = load_common_pack(across + (k + j) * step + 1);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = first + (k + j) * step;
          if (!kWhole && i >= end) continue;
          batch[k + j] = i == 0 || i >= last ? gather_pack(packs + int64_t(i) * kPack<T>, 1)
                                             : shift_packs(batch[k + j], next[j], beyond);
        }
      }
    }
  }
};

// Rows of equal length that are read side by side.
template <class T, int kInputs>
struct Rows {
  const T* row[kInputs];
  int64_t stride[kInputs];
  int64_t V;

  __device__ __forceinline__ accumulate_t<T> at(int input, int64_t v) const {
    return accumulate_t<T>(row[input][v * stride[input]]);
  }

  __device__ __forceinline__ PackedRow<T> packed(int input, int64_t begin) const {
    return {row[input] + begin * stride[input], stride[input], int((V - begin) / kPack<T>) - 1};
  }
};

template <class T>
__device__ __forceinline__ Pack pack_of_minus_infinity() {
  accumulate_t<T> x[kPack<T>];
  for (int i = 0; i < kPack<T>; ++i) x[i] = -INFINITY;
  return pack_of<T>(x);
}

// Whether every row starts at a multiple of 16 bytes and is dense.
template <class T>
bool all_aligned(const T* logits, const LogitRows& rows) {
  bool result = rows.stride_v == 1 && is_aligned(logits);
  for (int d = 0; d < rows.dims; ++d) result = result && rows.strides[d] % kPack<T> == 0;
  return result;
}

// Calls f(x, top) for each piece of this thread's share of the rows: x[i] has the elements of input i, an array of one
// of two lengths, filled up with -inf, and top[i] is the largest of them. Which elements a piece has depends on V only.
// With kAligned all rows must be all_aligned; the kernel then contains no code for others.
template <int kThreads, bool kAligned, class T, int kInputs, class F>
__device__ __forceinline__ void read_rows(const Rows<T, kInputs>& in, const F& f) {
  using A = accumulate_t<T>;
  const int thread = thread_of_group<kThreads>(), packs = int(in.V / kPack<T>);
  const Pack fill = pack_of_minus_infinity<T>();
  for (int first = thread; first < packs; first += kBatch<kInputs> * kThreads) {
    Pack batch[kInputs][kBatch<kInputs>];
    A x[kInputs][kBatch<kInputs> * kPack<T>], top[kInputs];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) in.packed(i, 0).template load<kAligned>(first, kThreads, packs, fill, batch[i]);
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      top[i] = largest<T>(batch[i]);
#pragma unroll
      for (int k = 0; k < kBatch<kInputs>; ++k) unpack<T>(batch[i][k], x[i] + k * kPack<T>);
    }
    f(x, top);
  }
  const int64_t last = int64_t(packs) * kPack<T> + thread;
  if (last < in.V) {
    A one[kInputs][1], top[kInputs];
    for (int i = 0; i < kInputs; ++i) top[i] = one[i][0] = in.at(i, last);
    f(one, top);
  }
}

}  // namespace ppo_ext
