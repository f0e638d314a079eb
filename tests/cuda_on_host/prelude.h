// prelude.h: included before every .cu file. After torch's own headers, it makes the kernels register for the CPU and
// the device guard do nothing.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
  ~NoGuard() {}
};
}  // namespace torch::stable::accelerator

#define DeviceGuard NoGuard
#define CUDA CPU
