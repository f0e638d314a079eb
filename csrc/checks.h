// checks.h: what every backend verifies before it touches memory. Sentences as in ppo_ext/check.py.
#pragma once

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "rows.h"

namespace ppo_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Got>
[[noreturn]] void reject(const char* op, const std::string& argument, const std::string& condition, const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << " must " << condition << ", got " << got;
  throw std::invalid_argument(text.str());
}

inline std::string shape_text(const Tensor& x) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < x.dim(); ++d) text << (d ? ", " : "") << x.size(d);
  text << "]";
  return text.str();
}

// Same shape up to the first `dims` dimensions, and no others.
inline void require_shape(const char* op, const char* argument, const Tensor& x, const Tensor& like, int64_t dims) {
  bool same = x.dim() == dims;
  for (int64_t d = 0; same && d < dims; ++d) same = x.size(d) == like.size(d);
  if (!same) reject(op, argument, "have the shape of its counterpart " + shape_text(like), shape_text(x));
}

inline void require_dtype(const char* op, const char* argument, const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() != dtype)
    reject(op, argument, "have dtype number " + std::to_string(int(dtype)), std::to_string(int(x.scalar_type())));
}

inline void require_same_device(const char* op, const char* argument, const Tensor& x, const Tensor& like) {
  if (x.is_cuda() != like.is_cuda() || x.get_device_index() != like.get_device_index())
    reject(op, argument, "be on the device of its counterpart", "another");
}

// A small per-token tensor: dense, on the device of `like`, of the given dtype, shaped as its first `dims` dimensions.
inline void require_token_tensor(const char* op, const char* argument, const Tensor& x, const Tensor& like, int64_t dims,
                                 ScalarType dtype) {
  require_same_device(op, argument, x, like);
  require_dtype(op, argument, x, dtype);
  require_shape(op, argument, x, like, dims);
  if (!x.is_contiguous()) reject(op, argument, "be contiguous", "strides");
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The rows of logits [..., V], with leading dimensions merged where memory allows.
inline LogitRows logit_rows(const char* op, const char* argument, const Tensor& logits) {
  const int64_t rank = logits.dim();
  if (rank < 1 || logits.size(rank - 1) < 1) reject(op, argument, "have the shape [..., V] with V >= 1", shape_text(logits));
  LogitRows rows{};
  rows.V = logits.size(rank - 1);
  rows.stride_v = logits.stride(rank - 1);
  rows.rows = 1;
  for (int64_t d = 0; d < rank - 1; ++d) {
    const int64_t size = logits.size(d), stride = logits.stride(d);
    rows.rows *= size;
    if (size == 1) continue;
    const int last = rows.dims - 1;
    if (rows.dims > 0 && rows.strides[last] == size * stride) {
      rows.sizes[last] *= size;
      rows.strides[last] = stride;
    } else {
      if (rows.dims == LogitRows::kMaxDims) reject(op, argument, "have at most 8 leading dimensions that do not merge", rank - 1);
      rows.sizes[rows.dims] = size;
      rows.strides[rows.dims++] = stride;
    }
  }
  return rows;
}

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

inline const bool* mask_pointer(const std::optional<Tensor>& mask) {
  return mask ? pointer<bool>(*mask) : nullptr;
}

// An uninitialised dense tensor on the device of `like`; a fifth of the time of torch::stable::new_empty.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype) {
  constexpr int64_t kMaxDims = 64;  // torch's own
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device = 0;
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, type, device, like.get_device_index(), &result));
  return Tensor(result);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(like, sizes.begin(), int64_t(sizes.size()), dtype);
}

// A dense tensor shaped as the first `dims` dimensions of `like`.
inline Tensor new_token_tensor(const Tensor& like, int64_t dims, ScalarType dtype) {
  return new_tensor(like, like.sizes().data(), dims, dtype);
}

inline void check_logprobs(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask) {
  const int64_t dims = logits.dim() - 1;
  require_token_tensor("logprobs", "labels", labels, logits, dims, ScalarType::Long);
  if (mask) require_token_tensor("logprobs", "mask", *mask, logits, dims, ScalarType::Bool);
}

inline void check_row_stats(const char* op, const Tensor& logits, std::initializer_list<const Tensor*> stats) {
  for (const Tensor* stat : stats)
    require_token_tensor(op, "row statistics", *stat, logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type()));
}

inline void check_full_kl(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask) {
  require_same_device("full_kl", "ref_logits", ref_logits, logits);
  require_dtype("full_kl", "ref_logits", ref_logits, logits.scalar_type());
  require_shape("full_kl", "ref_logits", ref_logits, logits, logits.dim());
  if (mask) require_token_tensor("full_kl", "mask", *mask, logits, logits.dim() - 1, ScalarType::Bool);
}

inline void require_float_or_double(const char* op, const char* argument, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)
    reject(op, argument, "be float32 or float64", "dtype number " + std::to_string(int(x.scalar_type())));
}

inline void check_gae(const Tensor& values, const Tensor& rewards, const std::optional<Tensor>& mask) {
  require_float_or_double("gae", "values", values);
  if (values.dim() != 2) reject("gae", "values", "have the shape [B, T]", shape_text(values));
  require_token_tensor("gae", "values", values, values, 2, values.scalar_type());
  require_token_tensor("gae", "rewards", rewards, values, 2, values.scalar_type());
  if (mask) require_token_tensor("gae", "mask", *mask, values, 2, ScalarType::Bool);
}

inline void check_kl_rewards(const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& mask,
                             int64_t kl_penalty) {
  require_float_or_double("kl_rewards", "logprobs", logprobs);
  if (logprobs.dim() != 2) reject("kl_rewards", "logprobs", "have the shape [B, T]", shape_text(logprobs));
  require_token_tensor("kl_rewards", "scores", scores, logprobs, 1, logprobs.scalar_type());
  require_token_tensor("kl_rewards", "logprobs", logprobs, logprobs, 2, logprobs.scalar_type());
  require_token_tensor("kl_rewards", "ref_logprobs", ref_logprobs, logprobs, 2, logprobs.scalar_type());
  require_token_tensor("kl_rewards", "mask", mask, logprobs, 2, ScalarType::Bool);
  if (kl_penalty < 0 || kl_penalty > 3) reject("kl_rewards", "kl_penalty", "be in [0, 4)", kl_penalty);
}

inline void check_weighted(const char* op, const Tensor& values, const Tensor& weights) {
  require_float_or_double(op, "values", values);
  require_token_tensor(op, "values", values, values, values.dim(), values.scalar_type());
  require_token_tensor(op, "weights", weights, values, values.dim(), values.scalar_type());
}

inline void check_ppo_loss(const Tensor& logprobs, std::initializer_list<const Tensor*> others, const Tensor& mask) {
  require_float_or_double("ppo_loss", "logprobs", logprobs);
  require_token_tensor("ppo_loss", "logprobs", logprobs, logprobs, logprobs.dim(), logprobs.scalar_type());
  for (const Tensor* x : others)
    require_token_tensor("ppo_loss", "per-token inputs", *x, logprobs, logprobs.dim(), logprobs.scalar_type());
  require_token_tensor("ppo_loss", "mask", mask, logprobs, logprobs.dim(), ScalarType::Bool);
}

inline void check_ppo_loss_backward(const Tensor& grad_loss, const Tensor& stats, const Tensor& grad_logprobs,
                                    const Tensor& grad_vpreds, int64_t stat_count) {
  require_float_or_double("ppo_loss", "saved gradients", grad_logprobs);
  const ScalarType dtype = grad_logprobs.scalar_type();
  require_token_tensor("ppo_loss", "saved gradients", grad_logprobs, grad_logprobs, grad_logprobs.dim(), dtype);
  require_token_tensor("ppo_loss", "saved gradients", grad_vpreds, grad_logprobs, grad_logprobs.dim(), dtype);
  for (const Tensor* x : {&grad_loss, &stats}) {
    require_same_device("ppo_loss", "saved statistics", *x, grad_logprobs);
    require_dtype("ppo_loss", "saved statistics", *x, dtype);
  }
  if (grad_loss.numel() != 1) reject("ppo_loss", "grad_loss", "have 1 entry", grad_loss.numel());
  if (stats.numel() != stat_count) reject("ppo_loss", "stats", "have " + std::to_string(stat_count) + " entries", stats.numel());
}

}  // namespace ppo_ext
