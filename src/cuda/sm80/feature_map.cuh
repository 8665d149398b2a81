// SPDX-License-Identifier: Apache-2.0
//
// phi of the linear branch and its derivative, on rows of x: rows of q or k less their mean, or of
// y = x W^T + b for the hedgehog maps, whose slice 0 is made from y and slice 1 from -y.
//
// A row lies in the registers of a quad (four lanes, as in an mma fragment): lane t of it holds
// kHeadDim / 4 values. Columns from D on are zero in x, phi and all gradients. All lanes of the
// warp call these functions together.
#pragma once

#include "cuda/common/tile.cuh"

namespace sparline::cuda {

constexpr bool is_hedgehog(FeatureMap map) {
  return map == FeatureMap::kHedgehog || map == FeatureMap::kHedgehogExp;
}

// Which column value v of lane t is.

/// As rows lie in mma fragments: a row of C fragments side by side (c[0] c[1], or c[2] c[3], of
/// each 8 columns), or of A fragments (a[0] a[2], or a[1] a[3], of each 16, two values each).
struct FragmentColumns {
  __device__ __forceinline__ static int of(int v, int t) { return v / 2 * 8 + 2 * t + v % 2; }
};
/// Vectors of 16 bytes in turn: what coalesced loads of whole rows give.
struct VectorColumns {
  __device__ __forceinline__ static int of(int v, int t) { return (v / 8 * 4 + t) * 8 + v % 8; }
};

/// softmax(x), in place.
template <int kValues>
__device__ __forceinline__ void softmax_row(float (&x)[kValues]) {
  float top = x[0];
#pragma unroll
  for (int v = 1; v < kValues; ++v) top = fmaxf(top, x[v]);
  const float shift = -kLog2E * quad_max(top);
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    x[v] = exp2_approx(fmaf(x[v], kLog2E, shift));
    sum += x[v];
  }
  const float inverse = 1.0f / quad_sum(sum);
#pragma unroll
  for (int v = 0; v < kValues; ++v) x[v] *= inverse;
}

/// phi of a row; `sign`: -1 for slice 1 of a hedgehog map, else 1. `phi` may be `x`.
template <class Columns, int kValues>
__device__ __forceinline__ void feature_map(FeatureMap map, int head_dim, float sign,
                                            const float (&x)[kValues], float (&phi)[kValues]) {
  const auto is_inside = [t = lane_index() % 4, head_dim](int v) {
    return Columns::of(v, t) < head_dim;
  };
#pragma unroll
  for (int v = 0; v < kValues; ++v) phi[v] = x[v];
  if (sign < 0.0f) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) phi[v] = -phi[v];
  }
  if (map == FeatureMap::kSoftmax || map == FeatureMap::kHedgehog) {
    if (head_dim < 4 * kValues) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (!is_inside(v)) phi[v] = -INFINITY;
      }
    }
    softmax_row(phi);
  } else if (map == FeatureMap::kRelu) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) phi[v] = phi[v] <= 0.0f ? 0.0f : phi[v];  // lets NaN through
  } else if (map != FeatureMap::kIdentity) {
    const bool is_elu = map == FeatureMap::kElu1;
    const float lowest = is_elu ? -INFINITY : -125.0f;  // elu + 1 may reach 0, exp may not
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const float e = exp2_approx(fminf(fmaxf(phi[v] * kLog2E, lowest), 127.0f));
      const float out = is_elu && phi[v] > 0.0f ? phi[v] + 1.0f : e;
      phi[v] = is_inside(v) ? out : 0.0f;
    }
  }
}

/// The gradient of a row from that of phi, in place: `d` is d_phi and becomes d_x (d_y for the
/// hedgehog maps, to be added up over the slices).
template <int kValues>
__device__ __forceinline__ void feature_map_backward(FeatureMap map, float sign,
                                                     const float (&x)[kValues],
                                                     const float (&phi)[kValues],
                                                     float (&d)[kValues]) {
  if (map == FeatureMap::kSoftmax || map == FeatureMap::kHedgehog) {
    float mean = 0.0f;
#pragma unroll
    for (int v = 0; v < kValues; ++v) mean = fmaf(d[v], phi[v], mean);
    mean = quad_sum(mean);
#pragma unroll
    for (int v = 0; v < kValues; ++v) d[v] = sign * phi[v] * (d[v] - mean);
  } else if (map == FeatureMap::kElu1) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) d[v] *= x[v] > 0.0f ? 1.0f : phi[v];
  } else if (map == FeatureMap::kRelu) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) d[v] = x[v] > 0.0f ? d[v] : 0.0f;
  } else if (map == FeatureMap::kHedgehogExp) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) d[v] *= sign * phi[v];
  }
}

}  // namespace sparline::cuda
