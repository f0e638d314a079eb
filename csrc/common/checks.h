// checks.h: what every backend verifies before it touches memory. Sentences as in ppo_ext/check.py.
#pragma once

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "rows.h"

// Torch's headers before 2.13 have this macro under its older name only.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace ppo_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Got>
[[noreturn]] void reject(const char* op, const std::string& argument, const std::string& condition, const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << " must " << condition << ", got " << got;
  throw std::invalid_argument(text.str());
}

// The first `dims` dimensions of x.
inline std::string shape_text(const Tensor& x, int64_t dims) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < dims; ++d) text << (d ? ", " : "") << x.size(d);
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& x) { return shape_text(x, x.dim()); }

// The shape of the first `dims` dimensions of `like`, and no others.
inline void require_shape(const char* op, const char* argument, const Tensor& x, const Tensor& like, int64_t dims) {
  bool same = x.dim() == dims;
  for (int64_t d = 0; same && d < dims; ++d) same = x.size(d) == like.size(d);
  if (!same) reject(op, argument, "have the shape " + shape_text(like, dims), shape_text(x));
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(int(dtype));
  }
}

inline void require_dtype(const char* op, const char* argument, const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() != dtype) reject(op, argument, "be " + dtype_text(dtype), dtype_text(x.scalar_type()));
}

[[noreturn]] inline void reject_dtype(const char* op, const char* argument, ScalarType dtype) {
  reject(op, argument, "be float32, bfloat16, float16 or float64", dtype_text(dtype));
}

inline void require_same_device(const char* op, const char* argument, const Tensor& x, const Tensor& like) {
  if (x.is_cuda() != like.is_cuda() || x.get_device_index() != like.get_device_index())
    reject(op, argument, "be on the device of the other tensors", "another");
}

inline void require_contiguous(const char* op, const char* argument, const Tensor& x) {
  if (x.is_contiguous()) return;
  std::ostringstream strides;
  for (int64_t d = 0; d < x.dim(); ++d) strides << (d ? ", " : "strides [") << x.stride(d);
  reject(op, argument, "be contiguous", strides.str() + "]");
}

// No two entries of x at one address, as in an expanded tensor: each entry is written once.
inline void require_no_overlap(const char* op, const char* argument, const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < x.dim(); ++d) dims.emplace_back(x.stride(d), x.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (size > 1 && stride <= reach)
      reject(op, argument, "have one address for each entry", "a stride of " + std::to_string(stride));
    reach += (size - 1) * stride;
  }
}

// A small per-token tensor: dense, on the device of `like`, of the given dtype, shaped as its first `dims` dimensions.
inline void require_token_tensor(const char* op, const char* argument, const Tensor& x, const Tensor& like,
                                 int64_t dims, ScalarType dtype) {
  require_same_device(op, argument, x, like);
  require_dtype(op, argument, x, dtype);
  require_shape(op, argument, x, like, dims);
  require_contiguous(op, argument, x);
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The rows of logits [..., V], with leading dimensions merged where memory allows.
inline LogitRows logit_rows(const char* op, const char* argument, const Tensor& logits) {
  const int64_t rank = logits.dim();
  if (rank < 1 || logits.size(rank - 1) < 1)
    reject(op, argument, "have the shape [..., V] with V >= 1", shape_text(logits));
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
      if (rows.dims == LogitRows::kMaxDims)
        reject(op, argument, "have at most 8 leading dimensions that do not merge", rank - 1);
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

inline const bool* mask_pointer(const std::optional<Tensor>& mask) { return mask ? pointer<bool>(*mask) : nullptr; }

// An uninitialised dense tensor on the device of `like`; a fifth of the time of torch::stable::new_empty.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype) {
  std::vector<int64_t> strides(dims);  // torch has no limit to them
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
      aoti_torch_empty_strided(dims, sizes, strides.data(), type, device, like.get_device_index(), &result));
  return Tensor(result);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(like, sizes.begin(), int64_t(sizes.size()), dtype);
}

// A dense tensor shaped as the first `dims` dimensions of `like`.
inline Tensor new_token_tensor(const Tensor& like, int64_t dims, ScalarType dtype) {
  return new_tensor(like, like.sizes().data(), dims, dtype);
}

inline void require_logits(const char* op, const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half &&
      dtype != ScalarType::Double)
    reject_dtype(op, "logits", dtype);
  logit_rows(op, "logits", logits);
}

// Beyond these the products with 1 / temperature would meet 0 * inf.
inline void require_temperature(const char* op, double temperature) {
  if (!(temperature >= 1e-30 && temperature <= 1e30))
    reject(op, "temperature", "be between 1e-30 and 1e30", temperature);
}

inline void require_finite(const char* op, const char* argument, double x) {
  if (!(x - x == 0)) reject(op, argument, "be a finite number", x);
}

inline void check_logprobs(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
                           double temperature) {
  require_logits("logprobs", logits);
  require_temperature("logprobs", temperature);
  const int64_t dims = logits.dim() - 1;
  require_token_tensor("logprobs", "labels", labels, logits, dims, ScalarType::Long);
  if (mask) require_token_tensor("logprobs", "mask", *mask, logits, dims, ScalarType::Bool);
}

// See ppo_ext/labels.py.
inline void check_label_note(const Tensor& note, const Tensor& logits) {
  require_same_device("logprobs", "label_note", note, logits);
  require_dtype("logprobs", "label_note", note, ScalarType::Long);
  if (note.numel() != 4) reject("logprobs", "label_note", "have 4 entries", shape_text(note));
  require_contiguous("logprobs", "label_note", note);
}

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

inline void check_row_stats(const char* op, const Tensor& logits, std::initializer_list<NamedTensor> stats) {
  for (const auto& [name, stat] : stats)
    require_token_tensor(op, name, stat, logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type()));
}

inline void check_full_kl(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
                          double temperature) {
  require_logits("full_kl", logits);
  require_temperature("full_kl", temperature);
  require_same_device("full_kl", "ref_logits", ref_logits, logits);
  require_dtype("full_kl", "ref_logits", ref_logits, logits.scalar_type());
  require_shape("full_kl", "ref_logits", ref_logits, logits, logits.dim());
  if (mask) require_token_tensor("full_kl", "mask", *mask, logits, logits.dim() - 1, ScalarType::Bool);
}

inline void require_float_or_double(const char* op, const char* argument, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)
    reject(op, argument, "be float32 or float64", dtype_text(x.scalar_type()));
}

inline void check_gae(const Tensor& values, const Tensor& rewards, const std::optional<Tensor>& mask, double gamma,
                      double lam) {
  require_finite("gae", "gamma", gamma);
  require_finite("gae", "lam", lam);
  require_float_or_double("gae", "values", values);
  if (values.dim() != 2) reject("gae", "values", "have the shape [B, T]", shape_text(values));
  require_token_tensor("gae", "values", values, values, 2, values.scalar_type());
  require_token_tensor("gae", "rewards", rewards, values, 2, values.scalar_type());
  if (mask) require_token_tensor("gae", "mask", *mask, values, 2, ScalarType::Bool);
}

inline void check_kl_rewards(const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs,
                             const Tensor& mask, double kl_coef, int64_t kl_penalty) {
  require_finite("kl_rewards", "kl_coef", kl_coef);
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

inline void check_whiten_backward(const Tensor& grad, const Tensor& values, const Tensor& weights,
                                  const Tensor& moments) {
  check_weighted("masked_whiten", values, weights);
  require_token_tensor("masked_whiten", "grad", grad, values, values.dim(), values.scalar_type());
  require_same_device("masked_whiten", "moments", moments, values);
  require_dtype("masked_whiten", "moments", moments, values.scalar_type());
  if (moments.numel() != 3) reject("masked_whiten", "moments", "have 3 entries", moments.numel());
  require_contiguous("masked_whiten", "moments", moments);
}

inline void check_ppo_coefficients(double cliprange, double cliprange_value, double vf_coef) {
  if (!(cliprange >= 0)) reject("ppo_loss", "cliprange", "not be negative", cliprange);
  if (!(cliprange_value >= 0)) reject("ppo_loss", "cliprange_value", "not be negative", cliprange_value);
  require_finite("ppo_loss", "vf_coef", vf_coef);
}

// `others` in the order of the names.
inline void check_ppo_loss(const Tensor& logprobs, std::initializer_list<const Tensor*> others, const Tensor& mask) {
  const char* const names[] = {"old_logprobs", "advantages", "vpreds", "values", "returns"};
  const char* const* name = names;
  require_float_or_double("ppo_loss", "logprobs", logprobs);
  require_token_tensor("ppo_loss", "logprobs", logprobs, logprobs, logprobs.dim(), logprobs.scalar_type());
  for (const Tensor* x : others)
    require_token_tensor("ppo_loss", *name++, *x, logprobs, logprobs.dim(), logprobs.scalar_type());
  require_token_tensor("ppo_loss", "mask", mask, logprobs, logprobs.dim(), ScalarType::Bool);
}

inline void check_ppo_loss_backward(const Tensor& grad_loss, const Tensor& stats, const Tensor& grad_logprobs,
                                    const Tensor& grad_vpreds, int64_t stat_count) {
  require_float_or_double("ppo_loss", "grad_logprobs", grad_logprobs);
  const ScalarType dtype = grad_logprobs.scalar_type();
  require_token_tensor("ppo_loss", "grad_logprobs", grad_logprobs, grad_logprobs, grad_logprobs.dim(), dtype);
  require_token_tensor("ppo_loss", "grad_vpreds", grad_vpreds, grad_logprobs, grad_logprobs.dim(), dtype);
  for (const auto& [name, x] : {NamedTensor{"grad_loss", grad_loss}, NamedTensor{"stats", stats}}) {
    require_same_device("ppo_loss", name, x, grad_logprobs);
    require_dtype("ppo_loss", name, x, dtype);
    require_contiguous("ppo_loss", name, x);
  }
  if (grad_loss.numel() != 1) reject("ppo_loss", "grad_loss", "have 1 entry", grad_loss.numel());
  if (stats.numel() != stat_count)
    reject("ppo_loss", "stats", "have " + std::to_string(stat_count) + " entries", stats.numel());
}

}  // namespace ppo_ext
