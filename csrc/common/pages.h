// pages.h: faster first writes to a new tensor as large as the logits. The system gives it fresh memory pages, each of
//          which costs a fault when it is first written.
#pragma once

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "tensors.h"

namespace ppo_ext {

// Makes all pages of a range present in one call, which is faster than a fault for each: a fault takes longer than
// filling the page. Where the system cannot do it nothing happens, and the pages fault one by one.
inline void populate(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack and older kernels refuse
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = address / page * page, end = (address + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#endif
}

// The rows of `out`, which are about to be written from `in`. If `out` is large and new, the thread that writes some
// rows first populates their pages. If it is `in` itself, its pages are present already.
class RowPages {
 public:
  RowPages(const Tensor& out, const void* in, int64_t rows) : data_(static_cast<char*>(out.data_ptr())) {
    const int64_t bytes = out.numel() * int64_t(out.element_size());
    if (out.data_ptr() != in && bytes >= kMapped) row_bytes_ = bytes / rows;
  }

  // Calls f(begin, end) on parts of the range of rows.
  template <class F>
  void for_each_batch(int64_t begin, int64_t end, const F& f) const {
    const int64_t batch = row_bytes_ ? std::max<int64_t>(1, kBatch / row_bytes_) : end - begin;
    for (int64_t first = begin; first < end; first += batch) {
      const int64_t last = std::min(first + batch, end);
      if (row_bytes_) populate(data_ + first * row_bytes_, (last - first) * row_bytes_);
      f(first, last);
    }
  }

 private:
  static constexpr int64_t kMapped = 32 << 20;  // below this the C library reuses freed memory, whose pages are present
  static constexpr int64_t kBatch = 1 << 20;  // fits into the second-level cache, where the zeroed pages then still are

  char* data_;
  int64_t row_bytes_ = 0;
};

}  // namespace ppo_ext
