// SPDX-License-Identifier: Apache-2.0
//
// SoftTop-k (SLA2 Eq. 17): m = sigmoid((x - t) / tau), where the threshold t makes each row sum to
// its kappa, and its vector-Jacobian product. One group of warps works on a row.
#include <cmath>

#include "cuda/common/row_group.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {
namespace {

constexpr int kHalvings = 40;
constexpr double kSumTolerance = 1e-5;  // of kappa
constexpr float kLeastSpread = 1e-12f;  // of sum m (1 - m): rows of ones and zeros have no gradient

/// Rows (B, H, T_m) of float32.
struct FloatRows {
  float* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_i = 0;

  explicit FloatRows(const TensorView& view)
      : data(static_cast<float*>(view.data)),
        stride_b(view.stride[0]),
        stride_h(view.stride[1]),
        stride_i(view.stride[2]) {}
};

/// (B, H, T_m, T_n).
struct MapShape {
  int64_t num_rows = 0;
  int32_t num_heads = 1, num_blocks = 1;  // H, T_m
  int32_t num_items = 0;                  // T_n

  explicit MapShape(const TensorView& view)
      : num_rows(view.shape[0] * view.shape[1] * view.shape[2]),
        num_heads(static_cast<int32_t>(view.shape[1])),
        num_blocks(static_cast<int32_t>(view.shape[2])),
        num_items(static_cast<int32_t>(view.shape[3])) {}

  __device__ __forceinline__ float* row(const FloatRows& rows, int64_t idx) const {
    const int64_t i = idx % num_blocks, pair = idx / num_blocks;
    return rows.data + pair / num_heads * rows.stride_b + pair % num_heads * rows.stride_h +
           i * rows.stride_i;
  }
};

/// sigmoid((x - t) / tau) to float32 accuracy in both tails; 0 below 2^-125 and for x = -inf.
/// t comes in two parts: near the threshold x - t_high is exact, so nothing is lost where scores
/// are large and tau is small.
__device__ __forceinline__ float soft_step(float x, float t_high, float t_low,
                                           float log2e_over_tau) {
  const float u = ((x - t_high) - t_low) * log2e_over_tau;  // in log2 units
  return u < -125.0f ? 0.0f : 1.0f / (1.0f + exp2f(-u));
}

template <bool kIsOneWarp, bool kIsHeld>
__global__ void __launch_bounds__(kMaxThreads<kIsOneWarp>, 1)
    soft_top_k_kernel(const MapShape shape, const FloatRows scores, const FloatRows soft_map,
                      const float* kappas, int64_t kappa_stride, double temperature) {
  begin_kernel();
  __shared__ uint2 exchange[2 * kMaxRowWarps];
  const int64_t row = row_index<kIsOneWarp>();
  if (row >= shape.num_rows) return;
  constexpr float kInf = INFINITY;
  const float* const x = shape.row(scores, row);
  float* const out = shape.row(soft_map, row);
  const double kappa = kappas[row * kappa_stride];
  RowGroup<kIsOneWarp> group(exchange);
  const RowWalk<kIsOneWarp, kIsHeld> walk(group, 0, shape.num_items);

  float held[kIsHeld ? kRowItems : 1] = {};
  const auto value_of = [&](int32_t j, int n) {
    if constexpr (kIsHeld) {
      return held[n];
    } else {
      return x[j];
    }
  };
  float least = kInf, largest = -kInf;
  uint32_t count = 0;
  walk.for_each([&](int32_t j, int n) {
    const float value = j < shape.num_items ? x[j] : -kInf;
    if constexpr (kIsHeld) held[n] = value;
    largest = fmaxf(largest, value);
    if (value == -kInf) return;
    least = fminf(least, value);
    ++count;
  });
  const double num = group.sums(count, 0).x;
  const auto store = [&](const auto& map) {
    walk.for_each([&](int32_t j, int n) {
      if (j < shape.num_items) out[j] = map(value_of(j, n));
    });
  };
  if (kappa >= num) return store([](float value) { return value == -kInf ? 0.0f : 1.0f; });
  largest = group.all(largest, -kInf, [](float y) { return warp_max(y); });
  least = -group.all(-least, -kInf, [](float y) { return warp_max(y); });

  // At t = least - tau logit(kappa / num) no entry is below the mean kappa / num, at largest - ...
  // none above it.
  const float log2e_over_tau = static_cast<float>(1.44269504088896340736 / temperature);
  const double logit = log(kappa) - log(num - kappa);
  double low = least - temperature * logit, high = largest - temperature * logit;
  double t = 0.5 * (low + high);
  float t_high = 0.0f, t_low = 0.0f;
  const auto split = [&] {
    t_high = static_cast<float>(t);
    t_low = static_cast<float>(t - static_cast<double>(t_high));
  };
  split();
  for (int halving = 0; halving < kHalvings; ++halving) {
    float part = 0.0f;
    walk.for_each([&](int32_t j, int n) {
      part += soft_step(value_of(j, n), t_high, t_low, log2e_over_tau);
    });
    const double excess = static_cast<double>(group.sum(part)) - kappa;
    if (fabs(excess) <= kSumTolerance * kappa) break;
    (excess > 0.0 ? low : high) = t;
    t = 0.5 * (low + high);
    split();
  }
  store([&](float value) { return soft_step(value, t_high, t_low, log2e_over_tau); });
}

/// Rows of one warp are held in registers, others read twice.
template <bool kIsOneWarp>
__global__ void __launch_bounds__(kMaxThreads<kIsOneWarp>, 1)
    soft_top_k_backward_kernel(const MapShape shape, const FloatRows d_soft_map,
                               const FloatRows soft_map, const FloatRows d_scores,
                               float inverse_tau) {
  begin_kernel();
  __shared__ uint2 exchange[2 * kMaxRowWarps];
  const int64_t row = row_index<kIsOneWarp>();
  if (row >= shape.num_rows) return;
  const float* const d_m = shape.row(d_soft_map, row);
  const float* const m = shape.row(soft_map, row);
  float* const d_x = shape.row(d_scores, row);
  RowGroup<kIsOneWarp> group(exchange);
  const RowWalk<kIsOneWarp, /*kIsHeld=*/kIsOneWarp> walk(group, 0, shape.num_items);

  float sum = 0.0f, weighted = 0.0f;
  walk.for_each([&](int32_t j, int) {
    if (j >= shape.num_items) return;
    const float s = m[j] * (1.0f - m[j]);
    sum += s;
    weighted = fmaf(s, d_m[j], weighted);
  });
  sum = group.sum(sum);
  weighted = group.sum(weighted);
  const float mean = weighted / fmaxf(kLeastSpread, sum);
  walk.for_each([&](int32_t j, int) {
    if (j >= shape.num_items) return;
    d_x[j] = m[j] * (1.0f - m[j]) * inverse_tau * (d_m[j] - mean);
  });
}

}  // namespace

void soft_top_k(const SoftTopKArgs& args, void* stream) {
  const MapShape rows(args.scores);
  const RowShape shape(rows.num_rows, rows.num_items);
  const auto kernel = shape.is_one_warp ? soft_top_k_kernel<true, true>
                      : shape.is_held   ? soft_top_k_kernel<false, true>
                                        : soft_top_k_kernel<false, false>;
  launch(kernel, {.blocks = shape.blocks, .threads = shape.threads}, stream, rows,
         FloatRows(args.scores), FloatRows(args.soft_map),
         static_cast<const float*>(args.kappa.data), args.kappa.stride[3], args.temperature);
}

void soft_top_k_backward(const SoftTopKBackwardArgs& args, void* stream) {
  const MapShape rows(args.soft_map);
  const RowShape shape(rows.num_rows, rows.num_items);
  const auto kernel =
      shape.is_one_warp ? soft_top_k_backward_kernel<true> : soft_top_k_backward_kernel<false>;
  launch(kernel, {.blocks = shape.blocks, .threads = shape.threads}, stream, rows,
         FloatRows(args.d_soft_map), FloatRows(args.soft_map), FloatRows(args.d_scores),
         static_cast<float>(1.0 / args.temperature));
}

}  // namespace sparline::cuda
