// pages.h: the memory pages behind a tensor as large as the logits, which an allocation of that size maps afresh.
#pragma once

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "checks.h"

namespace ppo_ext {

// Makes the pages of a range present in one call; by itself each faults when it is first written, which takes longer than
// filling it. Where the system cannot, they fault.
inline void populate(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack and older kernels refuse
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = address / page * page, end = (address + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#endif
}

// The rows of `out`, about to be written. Those of a large new tensor are populated, some at a time, by the thread that
// writes them; memory that is written over is there already.
class RowPages {
 public:
  RowPages(const Tensor& out, const Tensor& in, int64_t rows) : data_(static_cast<char*>(out.data_ptr())) {
    const int64_t bytes = out.numel() * int64_t(out.element_size());
    if (out.data_ptr() != in.data_ptr() && bytes >= kMapped) row_bytes_ = bytes / rows;
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
  static constexpr int64_t kMapped = 32 << 20;  // the C library keeps freed memory of less for the next allocation
  static constexpr int64_t kBatch = 1 << 20;    // as large as the cache that the pages, which come zeroed, are still in

  char* data_;
  int64_t row_bytes_ = 0;
};

}  // namespace ppo_ext
