// checks.h: the checks of arguments that several operators share. Every back end makes them before it touches memory.
//           Each error is one sentence, as in ppo_ext/ops/check.py. The checks of one operator are in its <op>_entry.h,
//           or in <op>.h if there is no <op>_simd.cpp: what that includes must be free of torch (levels.h).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rows.h"
#include "temperature.h"
#include "tensors.h"

namespace ppo_ext {

template <class Got>
[[noreturn]] void reject(const char* op, const std::string& argument, const std::string& condition, const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << " must " << condition << ", got " << got;
  throw std::invalid_argument(text.str());
}

// ---- numbers ----

inline void require_finite(const char* op, const char* argument, double x) {
  if (!(x - x == 0)) reject(op, argument, "be a finite number", x);
}

// A temperature, or another number that logits are multiplied with or divided by.
inline void require_positive(const char* op, const char* argument, double x) {
  if (!(x >= kLeastTemperature && x <= kMostTemperature)) reject(op, argument, "be between 1e-30 and 1e30", x);
}

// ---- shapes ----

// The first `dims` dimensions of x.
inline std::string shape_text(const Tensor& x, int64_t dims) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < dims; ++d) text << (d ? ", " : "") << x.size(d);
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& x) { return shape_text(x, x.dim()); }

// [i, j, ...], the place of entry n of a tensor of the first `dims` dimensions of x.
inline std::string position_text(const Tensor& x, int64_t dims, int64_t n) {
  std::string text;
  for (int64_t d = dims - 1; d >= 0; --d) {
    text = std::to_string(n % x.size(d)) + (text.empty() ? "" : ", ") + text;
    n /= x.size(d);
  }
  return "[" + text + "]";
}

// x must have the first `dims` dimensions of `like` and no others.
inline void require_shape(const char* op, const char* argument, const Tensor& x, const Tensor& like, int64_t dims) {
  const auto sizes = x.sizes();
  if (int64_t(sizes.size()) != dims || !std::equal(sizes.begin(), sizes.end(), like.sizes().begin()))
    reject(op, argument, "have the shape " + shape_text(like, dims), shape_text(x));
}

// Two dimensions, which the text calls `shape`.
inline void require_matrix(const char* op, const char* argument, const Tensor& x, const char* shape) {
  if (x.dim() != 2) reject(op, argument, std::string("have the shape ") + shape, shape_text(x));
}

// ---- dtypes and devices ----

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
  if (dtype_number(x) != dtype_number(dtype))
    reject(op, argument, "be " + dtype_text(dtype), dtype_text(x.scalar_type()));
}

inline void require_float_or_double(const char* op, const char* argument, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)
    reject(op, argument, "be float32 or float64", dtype_text(x.scalar_type()));
}

inline void require_same_device(const char* op, const char* argument, const Tensor& x, const Tensor& like) {
  if (device_type(x) != device_type(like) || x.get_device_index() != like.get_device_index())
    reject(op, argument, "be on the device of the other tensors", "another");
}

// ---- memory ----

inline void require_contiguous(const char* op, const char* argument, const Tensor& x) {
  if (x.is_contiguous()) return;
  std::ostringstream strides;
  for (int64_t d = 0; d < x.dim(); ++d) strides << (d ? ", " : "strides [") << x.stride(d);
  reject(op, argument, "be contiguous", strides.str() + "]");
}

// No two entries of x share an address, as they do in an expanded tensor: needed where each entry is written.
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

// x holds `count` numbers of `dtype`, in any shape, and is dense and on the device of `like`.
inline void require_entries(const char* op, const char* argument, const Tensor& x, int64_t count, const Tensor& like,
                            ScalarType dtype) {
  require_same_device(op, argument, x, like);
  require_dtype(op, argument, x, dtype);
  if (x.numel() != count)
    reject(op, argument, "have " + std::to_string(count) + (count == 1 ? " entry" : " entries"), x.numel());
  require_contiguous(op, argument, x);
}

// ---- tensors of tokens ----

// x holds one number for each token: it is dense, of `dtype`, on the device of `like` and shaped as its first `dims`
// dimensions.
inline void require_token_tensor(const char* op, const char* argument, const Tensor& x, const Tensor& like,
                                 int64_t dims, ScalarType dtype) {
  require_same_device(op, argument, x, like);
  require_dtype(op, argument, x, dtype);
  require_shape(op, argument, x, like, dims);
  require_contiguous(op, argument, x);
}

// An argument and its name in error texts.
struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// Tensors of tokens which all have the shape and the dtype of `like`, which may be one of them.
inline void require_token_tensors_like(const char* op, const Tensor& like, std::initializer_list<NamedTensor> tensors) {
  const int64_t dims = like.dim();
  const ScalarType dtype = like.scalar_type();
  for (const auto& [name, x] : tensors) require_token_tensor(op, name, x, like, dims, dtype);
}

inline void require_mask(const char* op, const Tensor& mask, const Tensor& like, int64_t dims) {
  require_token_tensor(op, "mask", mask, like, dims, ScalarType::Bool);
}

inline void require_mask(const char* op, const std::optional<Tensor>& mask, const Tensor& like, int64_t dims) {
  if (mask) require_mask(op, *mask, like, dims);
}

// ---- logits ----

// The rows of logits [..., V]. Neighbouring leading dimensions become one where their strides allow it.
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

inline void require_logits(const char* op, const Tensor& logits) {
  const ScalarType dtype = logits.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half &&
      dtype != ScalarType::Double)
    reject(op, "logits", "be float32, bfloat16, float16 or float64", dtype_text(dtype));
  logit_rows(op, "logits", logits);
}

// Tensors of one number for each row of the logits, in the dtype of the arithmetic.
inline void require_row_tensors(const char* op, const Tensor& logits, std::initializer_list<NamedTensor> tensors) {
  for (const auto& [name, x] : tensors)
    require_token_tensor(op, name, x, logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type()));
}

// An uninitialised one.
inline Tensor new_row_tensor(const Tensor& logits) {
  return new_token_tensor(logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type()));
}

// The temperatures of the rows of the logits.
inline void require_temperatures(const char* op, const Tensor& logits, const std::optional<Tensor>& temperatures) {
  if (temperatures)
    require_token_tensor(op, "temperatures", *temperatures, logits, logits.dim() - 1,
                         accumulate_dtype(logits.scalar_type()));
}

// On a CPU: those of the rows that count must be in their range. `tokens` has these rows as its first `dims` dimensions.
template <class A>
void check_temperatures(const char* op, const InverseTemperature<A>& inv_temperature, const bool* mask, int64_t rows,
                        const Tensor& tokens, int64_t dims) {
  if (!inv_temperature.temperatures) return;
  for (int64_t n = 0; n < rows; ++n)
    if ((!mask || mask[n]) && inv_temperature.of(n) != inv_temperature.of(n))
      reject(op, "temperature" + position_text(tokens, dims, n), "be between 1e-30 and 1e30",
             inv_temperature.temperatures[n]);
}

}  // namespace ppo_ext
