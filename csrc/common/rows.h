// rows.h: finds the rows of a strided tensor [..., V] without copying it.
#pragma once

#include "host_device.h"

namespace ppo_ext {

struct LogitRows {
  static constexpr int kMaxDims = 8;  // leading dimensions that are left after neighbouring ones were merged
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  int dims;
  int64_t rows;
  int64_t V;
  int64_t stride_v;

  // Offset in elements of the first entry of row n.
  PPO_HD int64_t offset(int64_t n) const {
    int64_t result = 0;
    for (int d = dims - 1; d > 0; --d) {
      result += (n % sizes[d]) * strides[d];
      n /= sizes[d];
    }
    return dims > 0 ? result + n * strides[0] : result;
  }
};

}  // namespace ppo_ext
