// launch.h: the one place where host code meets the device: guard, stream, grid, launch, check.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#else
#include "cuda_on_host.h"  // the tests' stand-in: runs the same kernels without a GPU
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"

namespace ppo_ext {

#if defined(__CUDACC__)
constexpr int64_t max_blocks() { return 2147483647; }  // of a grid's first dimension; kernels loop over what is beyond
#else
using cuda_on_host::max_blocks;
#endif

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string text = std::string(op) + ": the CUDA kernel did not launch: " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    text += "; reinstall ppo_ext with TORCH_CUDA_ARCH_LIST set to this GPU's compute capability";
  throw std::runtime_error(text);
}
#endif

// While it lives, the device of `like` is the current one; launches go to the caller's stream there.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& like) : op_(op), guard_(like.get_device_index()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) != 0)
      throw std::runtime_error(std::string(op) + ": the current CUDA stream cannot be had");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) return;
    const unsigned grid = unsigned(std::min(blocks, max_blocks()));
#if defined(__CUDACC__)
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    check_launch(op_);
#else
    cuda_on_host::run_on_host(op_, grid, threads, [&] { kernel(arguments...); });
#endif
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Calls f with a zero of the elements' type.
template <class F>
void dispatch_logits(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float(0));
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16(0));
    case ScalarType::Half:
      return f(torch::headeronly::Half(0));
    case ScalarType::Double:
      return f(double(0));
    default:
      reject_dtype(op, "logits", dtype);
  }
}

template <class F>
void dispatch_floats(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double(0)) : f(float(0));
}

}  // namespace ppo_ext
