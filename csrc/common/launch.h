// launch.h: launches kernels: device guard, stream, grid, check for errors. No other file calls the CUDA runtime.
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

#include "tensors.h"

namespace ppo_ext {

#if defined(__CUDACC__)
constexpr int64_t max_blocks() { return 2147483647; }  // of a grid's first dimension; kernels loop where they need more
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

// Launches kernels on the device of `like`, in the stream that is current there for the caller. The device is the
// current one as long as the Launcher exists.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& like) : op_(op), guard_(like.get_device_index()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) != 0)
      throw std::runtime_error(std::string(op) + ": torch has no current CUDA stream for the device of the tensors");
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

// Memory for `count` States that blocks leave for another kernel, uninitialised. The tensor must live until the last
// kernel that uses it was launched; torch gives its memory to later work on the same stream only.
template <class State>
Tensor new_parts(const Tensor& like, int64_t count) {
  static_assert(sizeof(State) % sizeof(double) == 0, "allocated as float64");
  return new_tensor(like, {count * int64_t(sizeof(State) / sizeof(double))}, ScalarType::Double);
}

}  // namespace ppo_ext
