// tensors.h: reads and makes torch's tensors, and turns their dtypes into C++ types.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "host_device.h"

// Torch's headers before 2.13 have this macro under its older name only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace ppo_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Null where the tensor is not given.
template <class T>
T* pointer(const std::optional<Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

// ---- dtypes ----

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Torch's number of a dtype, which takes fewer calls of torch than its ScalarType does.
inline int32_t dtype_number(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline int32_t dtype_number(const Tensor& x) {
  int32_t number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &number));
  return number;
}

// Calls f with a zero of the C++ type of `dtype`, which must be float32 or float64.
template <class F>
void dispatch_floats(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double(0)) : f(float(0));
}

// The same for the dtypes that logits may have; require_logits refuses any other.
template <class F>
void dispatch_logits(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16(0));
    case ScalarType::Half:
      return f(torch::headeronly::Half(0));
    default:
      return dispatch_floats(dtype, f);
  }
}

// ---- new tensors ----

inline int32_t device_type(const Tensor& x) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  return type;
}

// An uninitialised dense tensor on the device of `like`. It takes a fifth of the time of torch::stable::new_empty.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t dims, int32_t dtype) {
  std::vector<int64_t> strides(dims);  // a tensor may have any number of dimensions
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides.data(), dtype, device_type(like),
                                                         like.get_device_index(), &result));
  return Tensor(result);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(like, sizes.begin(), int64_t(sizes.size()), dtype_number(dtype));
}

// A dense tensor shaped as the first `dims` dimensions of `like`.
inline Tensor new_token_tensor(const Tensor& like, int64_t dims, ScalarType dtype) {
  return new_tensor(like, like.sizes().data(), dims, dtype_number(dtype));
}

// A dense [rows, ...] of tensors of the shape and dtype of `like`.
inline Tensor new_rows_like(const Tensor& like, int64_t rows) {
  std::vector<int64_t> sizes{rows};
  sizes.insert(sizes.end(), like.sizes().begin(), like.sizes().end());
  return new_tensor(like, sizes.data(), int64_t(sizes.size()), dtype_number(like));
}

// A dense tensor of the shape of one of the rows of `rows`.
inline Tensor new_row_of(const Tensor& rows) {
  return new_tensor(rows, rows.sizes().data() + 1, rows.dim() - 1, dtype_number(rows));
}

// A tensor of the shape and dtype of `like`, dense whatever the strides of that are.
inline Tensor new_dense_like(const Tensor& like) {
  return new_tensor(like, like.sizes().data(), like.dim(), dtype_number(like));
}

}  // namespace ppo_ext
