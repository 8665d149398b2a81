// SPDX-License-Identifier: Apache-2.0
//
// phi of the linear branch and its derivative, on tiles of unscaled q or k rows (docs/math.md,
// "Feature maps").

#if defined(SPARLINE_CPU_FEATURE_MAP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_FEATURE_MAP_INL_H_
#undef SPARLINE_CPU_FEATURE_MAP_INL_H_
#else
#define SPARLINE_CPU_FEATURE_MAP_INL_H_
#endif

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Gradients of one head's hedgehog map, accumulated.
struct FeatureWeightGrads {
  float* weight = nullptr;  // (D x leading_dim(D))
  float* bias = nullptr;    // (pad(D))
};

/// out = softmax(sign * x) over `num` values; pad lanes of out become 0. In-place is fine.
HWY_INLINE void softmax_row(int64_t num, float sign, const float* x, float* out) {
  const FloatTag d;
  const FloatVec lowest = hn::Set(d, -HUGE_VALF), factor = hn::Set(d, sign);
  FloatVec top = lowest;
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    top = hn::Max(top,
                  hn::IfThenElse(inside(at, num), hn::Mul(factor, hn::LoadU(d, x + at)), lowest));
  });
  top = hn::MaxOfLanes(d, top);
  FloatVec sum = hn::Zero(d);
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    const FloatVec shifted = hn::Sub(hn::Mul(factor, hn::LoadU(d, x + at)), top);
    const FloatVec e = exp2_or_zero(hn::Mul(shifted, hn::Set(d, kLog2E)));
    const FloatVec kept = hn::IfThenElseZero(inside(at, num), e);
    hn::StoreU(kept, d, out + at);
    sum = hn::Add(sum, kept);
  });
  scale_row(num, 1.0f / hn::GetLane(hn::SumOfLanes(d, sum)), out);
}

/// y = x W^T + b for a tile of rows.
HWY_INLINE void hedgehog_preactivation(int64_t head_dim, const FeatureWeights& weights,
                                       const float* x, int64_t num_rows, float* y) {
  const int64_t ld = leading_dim(head_dim);
  gemm<Into::kOverwrite>(num_rows, pad(head_dim), head_dim, rows_of(x, ld), weights.weight_t, ld, y,
                         ld);
  if (weights.bias == nullptr) return;
  for (int64_t r = 0; r < num_rows; ++r) add_scaled(head_dim, 1.0f, weights.bias, y + r * ld);
}

/// phi (num_rows x F, leading dimension leading_dim(F)) of x (num_rows x D, leading_dim(D)). `y` is
/// scratch like x, used by the hedgehog maps only.
inline void feature_map(FeatureMap map, int64_t head_dim, const FeatureWeights& weights,
                        const float* HWY_RESTRICT x, int64_t num_rows, float* HWY_RESTRICT y,
                        float* HWY_RESTRICT phi) {
  const FloatTag d;
  const int64_t ld = leading_dim(head_dim);
  if (map == FeatureMap::kHedgehog || map == FeatureMap::kHedgehogExp) {
    const int64_t features = 2 * head_dim, ld_phi = leading_dim(features);
    hedgehog_preactivation(head_dim, weights, x, num_rows, y);
    for (int64_t r = 0; r < num_rows; ++r, phi += ld_phi) {
      for (const int half : {0, 1}) {
        const float sign = half == 0 ? 1.0f : -1.0f;
        HWY_ALIGN float out[2 * 256];
        if (map == FeatureMap::kHedgehog) {
          softmax_row(head_dim, sign, y + r * ld, out);
        } else {
          for_each_vector(head_dim, [&](int64_t at) HWY_ATTR {
            hn::StoreU(exp_clamped(hn::Mul(hn::Set(d, sign), hn::LoadU(d, y + r * ld + at))), d,
                       out + at);
          });
        }
        std::memcpy(phi + half * head_dim, out, static_cast<size_t>(head_dim) * sizeof(float));
      }
      std::fill(phi + features, phi + pad(features), 0.0f);
    }
    return;
  }
  for (int64_t r = 0; r < num_rows; ++r, x += ld, phi += ld) {
    if (map == FeatureMap::kSoftmax) {
      softmax_row(head_dim, 1.0f, x, phi);
      continue;
    }
    for_each_vector(head_dim, [&](int64_t at) HWY_ATTR {
      const FloatVec value = hn::LoadU(d, x + at);
      FloatVec out = value;  // identity; zeros in the pad lanes stay zeros, as under relu
      if (map == FeatureMap::kRelu) {
        out = hn::IfThenElseZero(hn::Not(hn::Le(value, hn::Zero(d))), value);  // lets NaN through
      } else if (map == FeatureMap::kElu1) {
        const FloatVec low = exp2_or_zero(hn::Mul(value, hn::Set(d, kLog2E)));
        out = hn::IfThenElse(hn::Gt(value, hn::Zero(d)), hn::Add(value, hn::Set(d, 1.0f)), low);
        out = hn::IfThenElseZero(inside(at, head_dim), out);
      }
      hn::StoreU(out, d, phi + at);
    });
  }
}

/// d_x += d_phi through the map; the hedgehog maps also add to `grads`. `d_y` is scratch like x.
/// Pad lanes of d_phi are 0.
inline void feature_map_backward(FeatureMap map, int64_t head_dim, const FeatureWeights& weights,
                                 const float* HWY_RESTRICT x, const float* HWY_RESTRICT phi,
                                 const float* HWY_RESTRICT d_phi, int64_t num_rows,
                                 float* HWY_RESTRICT d_y, float* HWY_RESTRICT d_x,
                                 FeatureWeightGrads grads) {
  const FloatTag d;
  const int64_t ld = leading_dim(head_dim);
  if (map == FeatureMap::kHedgehog || map == FeatureMap::kHedgehogExp) {
    const int64_t ld_phi = leading_dim(2 * head_dim);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* p = phi + r * ld_phi;
      const float* n = p + head_dim;
      const float* d_p = d_phi + r * ld_phi;
      const float* d_n = d_p + head_dim;
      float mean_p = 0.0f, mean_n = 0.0f;
      if (map == FeatureMap::kHedgehog) {
        for (int64_t c = 0; c < head_dim; ++c) {
          mean_p += d_p[c] * p[c];
          mean_n += d_n[c] * n[c];
        }
      }
      for (int64_t c = 0; c < head_dim; ++c)
        d_y[r * ld + c] = p[c] * (d_p[c] - mean_p) - n[c] * (d_n[c] - mean_n);
      std::fill(d_y + r * ld + head_dim, d_y + r * ld + pad(head_dim), 0.0f);
      if (grads.bias != nullptr) add_scaled(head_dim, 1.0f, d_y + r * ld, grads.bias);
    }
    gemm<Into::kAdd>(num_rows, pad(head_dim), head_dim, rows_of(d_y, ld), weights.weight, ld, d_x,
                     ld);
    gemm<Into::kAdd>(head_dim, pad(head_dim), num_rows, columns_of(d_y, ld), x, ld, grads.weight,
                     ld);
    return;
  }
  for (int64_t r = 0; r < num_rows; ++r, x += ld, phi += ld, d_phi += ld, d_x += ld) {
    const FloatVec mean =
        hn::Set(d, map == FeatureMap::kSoftmax ? dot(head_dim, d_phi, phi) : 0.0f);
    for_each_vector(head_dim, [&](int64_t at) HWY_ATTR {
      const FloatVec g = hn::LoadU(d, d_phi + at), f = hn::LoadU(d, phi + at);
      const hn::Mask<FloatTag> positive = hn::Gt(hn::LoadU(d, x + at), hn::Zero(d));
      FloatVec out = g;
      if (map == FeatureMap::kSoftmax) out = hn::Mul(f, hn::Sub(g, mean));
      if (map == FeatureMap::kElu1) out = hn::IfThenElse(positive, g, hn::Mul(g, f));
      if (map == FeatureMap::kRelu) out = hn::IfThenElseZero(positive, g);
      hn::StoreU(hn::Add(hn::LoadU(d, d_x + at), out), d, d_x + at);
    });
  }
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_FEATURE_MAP_INL_H_
