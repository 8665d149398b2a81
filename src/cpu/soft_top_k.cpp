// SPDX-License-Identifier: Apache-2.0
//
// SoftTop-k (SLA2 Eq. 17): m = sigmoid((x - t) / tau), where the threshold t makes each row sum to
// its kappa, and its vector-Jacobian product. Rows are independent; one thread works on a row.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/soft_top_k.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <limits>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/tile-inl.h"

#ifndef SPARLINE_CPU_SOFT_TOP_K_ONCE_
#define SPARLINE_CPU_SOFT_TOP_K_ONCE_
namespace sparline::cpu {

constexpr int64_t kTaskRows = 16;
constexpr int kHalvings = 40;
constexpr double kSumTolerance = 1e-5;  // of kappa
constexpr float kLeastSpread = 1e-12f;  // of sum m (1 - m): rows of ones and zeros have no gradient

}  // namespace sparline::cpu
#endif  // SPARLINE_CPU_SOFT_TOP_K_ONCE_

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace {

/// Calls body(row) for the address (b, h, i) of every row.
template <class Body>
void for_each_row(const Target& target, const Stream& stream, const std::array<int64_t, 4>& shape,
                  const Body& body) {
  const int64_t num_rows = shape[0] * shape[1] * shape[2];
  run_tasks(target, stream, (num_rows + kTaskRows - 1) / kTaskRows, [&](int64_t task, int64_t) {
    const int64_t end = std::min(num_rows, (task + 1) * kTaskRows);
    for (int64_t row = task * kTaskRows; row < end; ++row)
      body(row, row / shape[2] / shape[1], row / shape[2] % shape[1], row % shape[2]);
  });
}

/// Vectors of a caller's row, which may end inside one: lanes past the end read as `fill` and are
/// never written.
class Row {
 public:
  Row(float* data, int64_t num, float fill) : data_(data), num_(num), fill_(fill) {}

  FloatVec load(int64_t at) const {
    const FloatTag d;
    if (at + lanes() <= num_) return hn::LoadU(d, data_ + at);
    HWY_ALIGN float tail[kPadFloats];
    std::fill(tail, tail + kPadFloats, fill_);
    std::copy(data_ + at, data_ + num_, tail);
    return hn::Load(d, tail);
  }
  void store(FloatVec value, int64_t at) const {
    const FloatTag d;
    if (at + lanes() <= num_) return hn::StoreU(value, d, data_ + at);
    HWY_ALIGN float tail[kPadFloats];
    hn::Store(value, d, tail);
    std::copy(tail, tail + (num_ - at), data_ + at);
  }
  template <class Body>
  HWY_INLINE void for_each(Body&& body) const {
    for (int64_t at = 0; at < num_; at += lanes()) body(at);
  }

 private:
  static int64_t lanes() { return static_cast<int64_t>(hn::Lanes(FloatTag())); }

  float* data_;
  int64_t num_;
  float fill_;
};

/// sigmoid((x - t) / tau) to float32 accuracy in both tails; 0 below 2^-125 and for x = -inf.
/// t comes in two parts: near the threshold x - t_high is exact, so nothing is lost where scores
/// are large and tau is small.
FloatVec soft_step(FloatVec x, double t, float log2e_over_tau) {
  const FloatTag d;
  const float t_high = static_cast<float>(t);
  const float t_low = static_cast<float>(t - static_cast<double>(t_high));
  const FloatVec above = hn::Sub(hn::Sub(x, hn::Set(d, t_high)), hn::Set(d, t_low));
  const FloatVec u = hn::Mul(above, hn::Set(d, log2e_over_tau));  // in log2 units
  const FloatVec one = hn::Set(d, 1.0f);
  const FloatVec m = hn::Div(one, hn::Add(one, exp2_clamped(hn::Neg(u))));
  const FloatVec known = hn::IfThenZeroElse(hn::Lt(u, hn::Set(d, -125.0f)), m);
  return hn::IfThenElse(hn::IsNaN(u), u, known);
}

void soft_top_k_row(const Row& x, const Row& out, double kappa, double temperature) {
  const FloatTag d;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  FloatVec least = hn::Set(d, kInf), largest = hn::Set(d, -kInf), count = hn::Zero(d);
  const FloatVec one = hn::Set(d, 1.0f);
  x.for_each([&](int64_t at) HWY_ATTR {
    const FloatVec value = x.load(at);
    const auto is_left_out = hn::Eq(value, hn::Set(d, -kInf));
    least = hn::Min(least, hn::IfThenElse(is_left_out, hn::Set(d, kInf), value));
    largest = hn::Max(largest, value);
    count = hn::Add(count, hn::IfThenZeroElse(is_left_out, one));
  });
  const double num = hn::GetLane(hn::SumOfLanes(d, count));
  if (kappa >= num) {
    x.for_each([&](int64_t at) HWY_ATTR {
      out.store(hn::IfThenZeroElse(hn::Eq(x.load(at), hn::Set(d, -kInf)), one), at);
    });
    return;
  }
  // At t = least - tau logit(kappa / num) no entry is below the mean kappa / num, at largest - ...
  // none above it.
  const float log2e_over_tau = static_cast<float>(1.44269504088896340736 / temperature);
  const double logit = std::log(kappa) - std::log(num - kappa);
  double low = hn::GetLane(hn::MinOfLanes(d, least)) - temperature * logit;
  double high = hn::GetLane(hn::MaxOfLanes(d, largest)) - temperature * logit;
  double t = 0.5 * (low + high);
  for (int halving = 0; halving < kHalvings; ++halving, t = 0.5 * (low + high)) {
    FloatVec sums = hn::Zero(d);
    x.for_each([&](int64_t at)
                   HWY_ATTR { sums = hn::Add(sums, soft_step(x.load(at), t, log2e_over_tau)); });
    const double sum = hn::GetLane(hn::SumOfLanes(d, sums));
    if (std::abs(sum - kappa) <= kSumTolerance * kappa) break;
    (sum > kappa ? low : high) = t;
  }
  x.for_each([&](int64_t at) HWY_ATTR { out.store(soft_step(x.load(at), t, log2e_over_tau), at); });
}

void soft_top_k_backward_row(const Row& d_m, const Row& m, const Row& d_x, double temperature) {
  const FloatTag d;
  const auto spread = [&](int64_t at) HWY_ATTR {
    const FloatVec value = m.load(at);
    return hn::Mul(value, hn::Sub(hn::Set(d, 1.0f), value));
  };
  FloatVec sums = hn::Zero(d), weighted = hn::Zero(d);
  m.for_each([&](int64_t at) HWY_ATTR {
    const FloatVec s = spread(at);
    sums = hn::Add(sums, s);
    weighted = hn::MulAdd(s, d_m.load(at), weighted);
  });
  const float sum = std::max(kLeastSpread, hn::GetLane(hn::SumOfLanes(d, sums)));
  const FloatVec mean = hn::Set(d, hn::GetLane(hn::SumOfLanes(d, weighted)) / sum);
  const FloatVec inverse_tau = hn::Set(d, static_cast<float>(1.0 / temperature));
  m.for_each([&](int64_t at) HWY_ATTR {
    const FloatVec centred = hn::Sub(d_m.load(at), mean);
    d_x.store(hn::Mul(hn::Mul(spread(at), inverse_tau), centred), at);
  });
}

}  // namespace

void SoftTopK(const Target& target, const SoftTopKArgs& args, const Stream& stream) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t num = args.scores.shape[3];
  const float* const kappa = args.kappa.row<const float>(0, 0, 0);
  for_each_row(target, stream, args.scores.shape,
               [&](int64_t row, int64_t b, int64_t h, int64_t i) {
                 soft_top_k_row({args.scores.row<float>(b, h, i), num, -kInf},
                                {args.soft_map.row<float>(b, h, i), num, 0.0f},
                                kappa[row * args.kappa.stride[3]], args.temperature);
               });
}

void SoftTopKBackward(const Target& target, const SoftTopKBackwardArgs& args,
                      const Stream& stream) {
  const int64_t num = args.soft_map.shape[3];
  for_each_row(target, stream, args.soft_map.shape, [&](int64_t, int64_t b, int64_t h, int64_t i) {
    soft_top_k_backward_row({args.d_soft_map.row<float>(b, h, i), num, 0.0f},
                            {args.soft_map.row<float>(b, h, i), num, 0.0f},
                            {args.d_scores.row<float>(b, h, i), num, 0.0f}, args.temperature);
  });
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparline::cpu {

HWY_EXPORT(SoftTopK);
HWY_EXPORT(SoftTopKBackward);

void soft_top_k(const Target& target, const SoftTopKArgs& args, const Stream& stream) {
  HWY_DYNAMIC_DISPATCH(SoftTopK)(target, args, stream);
}

void soft_top_k_backward(const Target& target, const SoftTopKBackwardArgs& args,
                         const Stream& stream) {
  HWY_DYNAMIC_DISPATCH(SoftTopKBackward)(target, args, stream);
}

}  // namespace sparline::cpu
#endif
