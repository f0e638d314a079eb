// linear_logprobs_entry.h: the operators _linear_logprobs_fold and _linear_logprobs_gradient without their loops: they
//                          check the arguments and give `Backend` (linear_logprobs_cpu.cpp, linear_logprobs_cuda.cu) a
//                          job. A label that is in no tile leaves its log-probability NaN.
#pragma once

#include "common/checks.h"
#include "linear_logprobs.h"

namespace ppo_ext {

// How the logits of a tile come from its numbers, and the temperatures.
struct LinearArguments {
  const Tensor &tile, &targets;
  double temperature;
  const std::optional<Tensor>& temperatures;
  double logit_scale, softcap;  // softcap is 0 where there is none
  int64_t first, vocabulary;

  template <class A>
  LogitTile<A> logit_tile() const {
    return {pointer<A>(tile), tile.size(0), tile.stride(0), tile.size(1), first, vocabulary};
  }

  template <class A>
  LogitMap<A> map() const {
    return {A(logit_scale), A(softcap)};
  }

  template <class A>
  InverseTemperature<A> inv_temperature() const {
    return {A(1.0 / temperature), pointer<A>(temperatures)};
  }
};

// One number for each row of the tile.
inline void require_tile_rows(const Tensor& tile, std::initializer_list<NamedTensor> tensors) {
  for (const auto& [name, x] : tensors) require_token_tensor("linear_logprobs", name, x, tile, 1, tile.scalar_type());
}

inline void check_linear(const LinearArguments& in) {
  const char* op = "linear_logprobs";
  require_float_or_double(op, "tile", in.tile);
  require_matrix(op, "tile", in.tile, "[rows, columns]");
  const int64_t rows = in.tile.size(0), width = in.tile.size(1), bytes = int64_t(in.tile.element_size());
  if (width < 1) reject(op, "tile", "have the shape [rows, columns] with columns >= 1", shape_text(in.tile));
  const bool dense = width == 1 || in.tile.stride(1) == 1;
  const bool apart = rows <= 1 || (in.tile.stride(0) >= width && in.tile.stride(0) * bytes % 16 == 0);
  if (!dense || !apart || reinterpret_cast<uintptr_t>(in.tile.data_ptr()) % 16 != 0)
    reject(op, "tile", "be contiguous in rows that begin at multiples of 16 bytes",
           "strides [" + std::to_string(in.tile.stride(0)) + ", " + std::to_string(in.tile.stride(1)) + "]");
  require_token_tensor(op, "targets", in.targets, in.tile, 1, ScalarType::Long);
  require_positive(op, "temperature", in.temperature);
  if (in.temperatures) require_tile_rows(in.tile, {{"temperatures", *in.temperatures}});
  require_positive(op, "logit_scale", in.logit_scale);
  if (in.softcap != 0) require_positive(op, "softcap", in.softcap);
  if (in.first < 0 || in.vocabulary < width || in.first > in.vocabulary - width)
    reject(op, "first", "lie in [0, vocabulary - columns]", in.first);
}

template <class Backend>
void linear_logprobs_fold(Tensor tile, Tensor targets, std::optional<Tensor> temperatures, Tensor states,
                          Tensor results, double temperature, double logit_scale, double softcap, int64_t first,
                          int64_t vocabulary, bool with_entropy, bool with_statistics) {
  const LinearArguments in{tile, targets, temperature, temperatures, logit_scale, softcap, first, vocabulary};
  check_linear(in);
  constexpr int64_t kNumbers = sizeof(LinearState) / sizeof(double);
  require_entries("linear_logprobs", "states", states, tile.size(0) * kNumbers, tile, ScalarType::Double);
  require_entries("linear_logprobs", "results", results, tile.size(0) * kLinearResults, tile, tile.scalar_type());
  dispatch_floats(tile.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    LinearFoldJob<A> job{};
    job.tile = in.logit_tile<A>();
    job.map = in.map<A>();
    job.labels = pointer<int64_t>(targets);
    job.inv_temperature = in.inv_temperature<A>();
    job.with_entropy = with_entropy;
    job.with_statistics = with_statistics;
    job.states = pointer<LinearState>(states);
    job.results = pointer<A>(results);
    Backend::fold(job, tile);
  });
}

template <class Backend>
void linear_logprobs_gradient(Tensor tile, Tensor targets, std::optional<Tensor> temperatures, Tensor grad_logprobs,
                              std::optional<Tensor> grad_entropy, Tensor entropy, Tensor row_max, Tensor log_sum,
                              double temperature, double logit_scale, double softcap, int64_t first,
                              int64_t vocabulary) {
  const LinearArguments in{tile, targets, temperature, temperatures, logit_scale, softcap, first, vocabulary};
  check_linear(in);
  require_tile_rows(tile, {{"grad_logprobs", grad_logprobs}, {"row_max", row_max}, {"log_sum", log_sum}});
  if (grad_entropy) require_tile_rows(tile, {{"grad_entropy", *grad_entropy}, {"entropy", entropy}});
  dispatch_floats(tile.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    LinearGradientJob<A> job{};
    job.tile = in.logit_tile<A>();
    job.map = in.map<A>();
    job.labels = pointer<int64_t>(targets);
    job.inv_temperature = in.inv_temperature<A>();
    job.grad_logprobs = pointer<A>(grad_logprobs);
    job.grad_entropy = pointer<A>(grad_entropy);
    job.entropy = grad_entropy ? pointer<A>(entropy) : nullptr;
    job.max = pointer<A>(row_max);
    job.log_sum = pointer<A>(log_sum);
    Backend::gradient(job, tile);
  });
}

}  // namespace ppo_ext
