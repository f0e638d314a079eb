// tiles.cuh: writes rows of logits 16 bytes at a time, in tiles, so that a few long rows occupy the whole device.
#pragma once

#include "load.cuh"

namespace ppo_ext {

constexpr int kTileBytes = 65536;  // of a row in one tile, which one block writes

template <class T>
constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));  // columns

// The columns of one tile: packs [first, end), counted from column `head`, where `out` is first aligned to 16 bytes.
// The columns before the row's first pack and behind its last one are the edges, which tile 0 has as well.
struct Tile {
  int head, first, end, edges;

  // The i-th column of the edges.
  __device__ __forceinline__ int64_t edge(int i, int64_t V) const { return i < head ? i : V - edges + i; }

  // The thread that writes column v; -1 if the column is in another tile.
  template <int kThreads, int kPackSize>
  __device__ __forceinline__ int owner(int64_t v, int64_t V) const {
    const int64_t pack = v < head ? -1 : (v - head) / kPackSize;
    if (pack >= first && pack < end) return int(pack - first) % kThreads;
    for (int i = 0; i < edges; ++i)
      if (edge(i, V) == v) return i;
    return -1;
  }
};

template <bool kAligned, class T>
__device__ __forceinline__ Tile tile_of(const T* out, int64_t out_stride, int64_t V, int64_t tile) {
  constexpr int64_t kTilePacks = kTileBytes / 16;
  const int64_t wanted = out_stride == 1 ? (16 - bytes_beyond_boundary(out)) % 16 / int64_t(sizeof(T)) : 0;
  const int64_t head = kAligned ? 0 : (wanted < V ? wanted : V), packs = (V - head) / kPack<T>;
  const int64_t end = (tile + 1) * kTilePacks < packs ? (tile + 1) * kTilePacks : packs;
  return {int(head), int(tile * kTilePacks), int(end), tile == 0 ? int(V - packs * kPack<T>) : 0};
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_columns(T* out, int64_t stride, int64_t column, const Pack& pack) {
  if (kAligned || stride == 1) {
    store_pack(reinterpret_cast<Pack*>(out + column), pack);
  } else {
    T elements[kPack<T>];
    std::memcpy(elements, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) out[(column + i) * stride] = elements[i];
  }
}

// Writes f(inputs) to every column of one tile of a row, and g(input 0) to column `special` if that is in the tile.
// `out` may be input 0 itself: each thread reads the columns that it overwrites before it writes them, and no other
// thread reads them. With kAligned all rows, those of the inputs and of out, must be all_aligned; the kernel then
// contains no code for others.
template <int kThreads, bool kAligned, class T, int kInputs, class F, class G>
__device__ __forceinline__ void write_tile(const Rows<T, kInputs>& in, T* out, int64_t out_stride, int64_t tile,
                                           const F& f, int64_t special, const G& g) {
  using A = accumulate_t<T>;
  const Tile t = tile_of<kAligned>(out, out_stride, in.V, tile);
  const bool has_special = t.owner<kThreads, kPack<T>>(special, in.V) == int(threadIdx.x);
  const A at_special = has_special ? g(in.at(0, special)) : A(0);
  constexpr int kPacks = kBatch<kInputs>;
  const auto write_batch = [&](int first, auto whole) {  // whole: all packs of the batch are in the tile
    Pack batch[kInputs][kPacks];
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
      in.packed(i, t.head).template load<kAligned>(first, kThreads, t.end, Pack{}, batch[i]);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!whole && first + k * kThreads >= t.end) break;
      A x[kInputs][kPack<T>], y[kPack<T>];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) unpack<T>(batch[i][k], x[i]);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        A at_column[kInputs];
        for (int i = 0; i < kInputs; ++i) at_column[i] = x[i][j];
        y[j] = f(at_column);
      }
      store_columns<kAligned>(out, out_stride, t.head + int64_t(first + k * kThreads) * kPack<T>, pack_of<T>(y));
    }
  };
  for (int first = t.first + int(threadIdx.x); first < t.end; first += kPacks * kThreads) {
    const bool whole = first + (kPacks - 1) * kThreads < t.end;
    kAligned&& whole ? write_batch(first, std::true_type{}) : write_batch(first, std::false_type{});
  }
  if (int(threadIdx.x) < t.edges) {
    const int64_t v = t.edge(int(threadIdx.x), in.V);
    A x[kInputs];
    for (int i = 0; i < kInputs; ++i) x[i] = in.at(i, v);
    out[v * out_stride] = T(f(x));
  }
  if (has_special) out[special * out_stride] = T(at_special);
}

// Writes zeros to one tile of a row.
template <int kThreads, class T>
__device__ __forceinline__ void zero_tile(T* out, int64_t out_stride, int64_t V, int64_t tile) {
  const Tile t = tile_of<false>(out, out_stride, V, tile);
  for (int i = t.first + int(threadIdx.x); i < t.end; i += kThreads)
    store_columns<false>(out, out_stride, t.head + int64_t(i) * kPack<T>, Pack{});
  if (int(threadIdx.x) < t.edges) out[t.edge(int(threadIdx.x), V) * out_stride] = T(0.0f);
}

}  // namespace ppo_ext
