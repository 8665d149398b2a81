// SPDX-License-Identifier: Apache-2.0
//
// What the query and the key kernel of the linear branch's backward share. Both take a tile of rows
// x with features phi(x), rows g beside them, and one state (H, Z):
//   queries  g = dO_l  (H, Z) = (H_i, Z_i)
//   keys     g = v     (H, Z) = (dH^j, dZ^j)
// and need phi H and phi . Z (o_l and den; d_v), and s (g H^T - e Z) through the map (d_q; d_k).
//
// softmax maps take the mean of phi's gradient, weighted by phi, off it. That mean is known before
// the gradient is,
//   phi . (g H^T - e Z) = g . (phi H) - e phi . Z
// so that the gradient is finished 16 columns at a time and never lies in registers whole.
// What the map's derivative needs of x follows from phi.
//
// A warp owns 16 rows, the height of an mma, and keeps their features as A fragments. If H fits, it
// stays in shared memory (kIsWhole); else it is streamed through a chunk of 64 rows, once for each
// of the two products.
#pragma once

#include <type_traits>

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/sm80/feature_map.cuh"
#include "cuda/sm80/linear_state.cuh"

namespace sparline::cuda {

struct LinearQueryBackward {
  LinearBackward params;
  Rows x;                           // q, or y of the hedgehog maps: (heads of the wave, N_q, D),
                                    // d_y takes its place
  int64_t width = 0;                // state_width
  bool is_shared = false;           // one sum for each sequence, not for each block
  const bf16_t* sums = nullptr;     // (H_i, Z_i)
  bf16_t* d_states = nullptr;       // (heads of the wave, T_m): (dH_i, dZ_i); may be `sums` if
                                    // has_whole_state and not is_shared
  const bf16_t* weights = nullptr;  // of linear_weights; not read if is_shared
  int64_t weights_width = 0;
  const void* proj_t = nullptr;     // W^T, T
  const void* feature_t = nullptr;  // (heads of the wave): W^T of the hedgehog maps, T
  void* o_l = nullptr;  // out, T (heads of the wave, N_q, D), with a projection; rows of
                        // protected blocks are left alone
};
struct LinearKeyBackward {
  LinearBackward params;
  Rows x;  // k, or y as above
  int64_t width = 0;
  bool is_shared = false;          // as above
  const bf16_t* d_sums = nullptr;  // (dH^j, dZ^j)
  const void* feature_t = nullptr;
};
/// Whether H stays in shared memory.
constexpr bool has_whole_state(int64_t head_dim, FeatureMap map) {
  return head_dim <= 128 && !is_hedgehog(map);
}

// linear_bwd_query*.cu, linear_bwd_key*.cu; the first of each calls the others where they fit.
void linear_backward_queries(const LinearQueryBackward& args, void* stream);
void linear_backward_queries_256(const LinearQueryBackward& args, void* stream);
void linear_backward_queries_hedgehog(const LinearQueryBackward& args, void* stream);
void linear_backward_keys(const LinearKeyBackward& args, void* stream);
void linear_backward_keys_256(const LinearKeyBackward& args, void* stream);
void linear_backward_keys_hedgehog(const LinearKeyBackward& args, void* stream);

// linear_bwd_weights.cu

/// dW += sum over rows of left^T right and db += sum over rows of left, over the rows of the wave's
/// queries (protected blocks excepted) or keys.
struct WeightGradient {
  Rows left, right;
  bool is_left_of_wave = false, is_right_of_wave = false;  // stride_h counts heads of the wave
  const float* right_mean = nullptr;                       // k_mean, taken off `right`
  bool is_of_keys = false;
  bool is_one = false;       // all heads share the weight; else each head of the model has its own
  float* partial = nullptr;  // scratch, weight_gradient_floats
  float *weight = nullptr, *bias = nullptr;  // added to; bias may be null
};
/// Depends on no pointer.
int64_t weight_gradient_floats(const LinearParams& params, const WeightGradient& args);
void weight_gradient(const LinearParams& params, const WeightGradient& args, void* stream);

/// weight_t = W^T in T, of the one weight or of the wave's heads.
enum class WeightHeads : uint8_t { kOne, kQuery, kKey };
void transpose_weights(const LinearParams& params, const float* weight, WeightHeads heads,
                       void* weight_t, void* stream);

/// d_block_map of the wave's heads from (h_j, z_j) and (dH_i, dZ_i).
void map_gradient(const LinearParams& params, const bf16_t* states, const bf16_t* d_states,
                  float* d_block_map, void* stream);

/// Rows of a dense matrix of 16-bit elements that starts at a multiple of 16 bytes.
SPARLINE_HOST_DEVICE Rows matrix_rows(const void* data, int32_t num_cols) {
  Rows rows;
  rows.data = const_cast<void*>(data);
  rows.stride_n = num_cols;
  rows.is_vectorised = num_cols % 8 == 0;
  return rows;
}

// Fragments --------------------------------------------------------------------------------------

/// kPieces 16 x 16 pieces of a product side by side, as C fragments.
template <int kPieces>
struct Sums {
  float c[2 * kPieces][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < 2 * kPieces; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
    }
  }
};
constexpr int kGroup = 32;  // columns of a product that are usually finished together
using GroupSums = Sums<2>;

/// sums = a X^T for rows [row, row + 16) of the tile and those `step`, 2 step, ... rows on.
template <class T, int kPieces, int kSteps, class Tile>
__device__ __forceinline__ void multiply_transposed(Sums<kPieces>& sums,
                                                    const uint32_t (&a)[kSteps][4],
                                                    const Tile& tile, int row, int step, int lane) {
  sums.clear();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint32_t b[4];
      load_b(b, tile, row + n * step, k * 16, lane);
      mma<T>(sums.c[2 * n], a[k], b[0], b[1]);
      mma<T>(sums.c[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

/// sums = a X for columns [col, col + 16 kPieces) of the tile.
template <class T, int kPieces, int kSteps, class Tile>
__device__ __forceinline__ void multiply(Sums<kPieces>& sums, const uint32_t (&a)[kSteps][4],
                                         const Tile& tile, int col, int lane) {
  sums.clear();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint32_t b[4];
      load_b_trans(b, tile, k * 16, col + n * 16, lane);
      mma<T>(sums.c[2 * n], a[k], b[0], b[1]);
      mma<T>(sums.c[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

/// As unpack<bf16>, in two instructions that are cheaper to repeat than their results are to keep.
__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

/// Elements of a C fragment that belong together, of the fragment at (row, col) of a tile: where
/// the lane's c[0] c[1] (half 0) or c[2] c[3] (half 1) lie. `row` and `col` are multiples of 16
/// and 8.
template <class T, int kRows, int kCols>
__device__ __forceinline__ uint32_t& pair_at(const SharedTile<T, kRows, kCols>& tile, int row,
                                             int col, int half, int lane) {
  const int lane_offset = lane / 4 * (kCols + 8) + lane % 4 * 2;  // row lane / 4 swizzles by itself
  return *reinterpret_cast<uint32_t*>(tile.data + (lane_offset ^ (col % 64)) +
                                      ((row + half * 8) * kCols + col / 64 * 64));
}

/// d_phi times this, less its mean for softmax maps, is the gradient of x. Without branches, as it
/// is asked for each element: min(scale phi + offset, 1), but phi for the hedgehog maps.
///   softmax  phi                  elu  x > 0 ? 1 : phi
///   relu     phi > 0 ? 1 : 0      identity  1
struct MapSlope {
  float scale, offset;

  __device__ __forceinline__ explicit MapSlope(FeatureMap map)
      : scale(map == FeatureMap::kIdentity ? 0.0f : (map == FeatureMap::kRelu ? 3.4e38f : 1.0f)),
        offset(map == FeatureMap::kIdentity ? 1.0f : 0.0f) {}

  template <bool kIsHedgehog>
  __device__ __forceinline__ float of(float phi) const {
    return kIsHedgehog ? phi : fminf(fmaf(phi, scale, offset), 1.0f);
  }
};

// The tile ---------------------------------------------------------------------------------------

/// kChunk rows of a state lie in shared memory at a time; kSlices: see kernels.h.
template <class T_, int kHeadDim_, int kRows_, int kChunk_, int kSlices_>
struct LinearTileTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kChunk = kChunk_, kSlices = kSlices_;
  static constexpr bool kIsWhole = kChunk == kHeadDim && kSlices == 1;
  static_assert(kIsWhole || kChunk == 64, "d_y and A pass through chunks of 64 rows");
  static constexpr int kWarps = kRows / 16, kThreads = kWarps * kWarpSize;
  static constexpr int kSteps = kHeadDim / 16;
  // Loops over chunks are unrolled, so that features stay in registers, where they all fit there.
  static constexpr bool kIsUnrolled = kHeadDim * kSlices <= 256;

  using RowTile = SharedTile<T, kRows, kHeadDim>;
  using BF16RowTile = SharedTile<bf16, kRows, kHeadDim>;
  using ChunkTile = SharedTile<bf16, kChunk, kHeadDim>;
  using WeightTile = SharedTile<T, kChunk, kHeadDim>;
  static constexpr int kTileBytes = 2 * RowTile::kBytes + ChunkTile::kBytes;

  /// CTAs of a multiprocessor to leave registers for: as many as the shared memory of large chips
  /// holds, with 128 registers for a thread at least.
  static constexpr int min_blocks(int shared_bytes) {
    if (!kIsWhole) return 1;
    const int fits = 227 * 1024 / (shared_bytes + 1024);
    return fits < 512 / kThreads ? fits : 512 / kThreads;
  }
};

template <class Traits>
class LinearTile {
 public:
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows;
  static constexpr int kChunk = Traits::kChunk, kSlices = Traits::kSlices;
  static constexpr int kSteps = Traits::kSteps, kThreads = Traits::kThreads;
  static constexpr bool kIsWhole = Traits::kIsWhole;
  using Fragments = uint32_t[kSteps][4];  // A, 16 x kHeadDim

  __device__ LinearTile(unsigned char* shared, FeatureMap map, int32_t head_dim)
      : x{reinterpret_cast<T*>(shared)},
        g{reinterpret_cast<T*>(shared + Traits::RowTile::kBytes)},
        g_bf16{reinterpret_cast<bf16*>(g.data)},
        chunk{reinterpret_cast<bf16*>(shared + 2 * Traits::RowTile::kBytes)},
        head_dim(head_dim),
        lane(lane_index()),
        warp_row(warp_index() * 16),
        map_(map) {}

  const typename Traits::RowTile x, g;
  const typename Traits::BF16RowTile g_bf16;  // g, once convert_g has run
  const typename Traits::ChunkTile chunk;
  const int32_t head_dim;
  const int lane, warp_row;  // of the warp's first row
  uint32_t phi[kSlices][kSteps][4];

  /// The tile row of elements 2 half, 2 half + 1 of this lane's C fragments.
  __device__ int row_of(int half) const { return warp_row + half * 8 + lane / 4; }
  /// The first of this lane's two columns of the C fragment at `col`.
  __device__ int col_of(int col) const { return col + lane % 4 * 2; }
  /// This lane's elements of the C fragment at `col` of the warp's rows.
  template <class Tile>
  __device__ uint32_t& pair(const Tile& tile, int col, int half) const {
    return pair_at(tile, warp_row, col, half, lane);
  }
  __device__ bool has_mean() const {
    return map_ == FeatureMap::kSoftmax || map_ == FeatureMap::kHedgehog;
  }

  template <class Tile>
  __device__ void load_fragments(Fragments& a, const Tile& tile) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_a(a[k], tile, warp_row, k * 16, lane);
  }

  /// Starts loading W^T or a state that fits whole.
  __device__ void load_weight(const T* weight_t, int32_t first) const {
    const typename Traits::WeightTile tile{reinterpret_cast<T*>(chunk.data)};
    load_rows_async<kThreads>(tile, matrix_rows(weight_t, head_dim), weight_t, first,
                              head_dim - first, head_dim);
  }
  __device__ void load_state(const bf16* state) const {
    load_rows_async<kThreads>(chunk, matrix_rows(state, head_dim), state, 0, head_dim, head_dim);
  }

  /// Turns the warp's rows of g into bf16.
  __device__ void convert_g() const {
    if constexpr (!std::is_same_v<T, bf16>) {
      Fragments a;
      load_fragments(a, g);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 value = unpack<T>(a[k][r]);
          pair(g_bf16, k * 16 + r / 2 * 8, r % 2) = pack<bf16>(value.x, value.y);
        }
      }
      __syncwarp();
    }
  }

  /// phi from x less `mean` (shared memory, padded with zeros; null: nothing).
  __device__ void find_features(const float* mean) {
    Fragments bits;
    load_fragments(bits, x);
    if (kSlices == 1 && head_dim < kHeadDim && (has_mean() || map_ == FeatureMap::kElu1)) {
      const uint32_t lowest = pack<T>(-INFINITY, -INFINITY);  // phi = 0
#pragma unroll
      for (int col = 0; col < kHeadDim; col += 8) {
        if (col_of(col) < head_dim) continue;
        bits[col / 16][col / 8 % 2 * 2] = bits[col / 16][col / 8 % 2 * 2 + 1] = lowest;
      }
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float row[kHeadDim / 4];
#pragma unroll
        for (int m = 0; m < kHeadDim / 8; ++m) {
          const float2 value = unpack<T>(bits[m / 2][m % 2 * 2 + half]);
          row[2 * m] = value.x;
          row[2 * m + 1] = value.y;
          if (mean != nullptr) {
            row[2 * m] -= mean[col_of(m * 8)];
            row[2 * m + 1] -= mean[col_of(m * 8) + 1];
          }
        }
        map_row(slice == 0 ? 1.0f : -1.0f, row);
#pragma unroll
        for (int m = 0; m < kHeadDim / 8; ++m) {
          phi[slice][m / 2][m % 2 * 2 + half] = pack<bf16>(row[2 * m], row[2 * m + 1]);
        }
      }
    }
  }

  /// Where z has this lane's columns of a C fragment at column 0.
  __device__ const bf16* lane_z(const bf16* state, int slice) const {
    return state + (int64_t{kSlices} * head_dim + slice) * head_dim + lane % 4 * 2;
  }
  /// Those of the fragment at `col`.
  __device__ uint32_t z_pair(const bf16* lane_z, int col) const {
    return col_of(col) < head_dim ? *reinterpret_cast<const uint32_t*>(lane_z + col) : 0;
  }

  /// den = phi . z of the lane's two rows, slice by slice: a product whose other columns are 0.
  __device__ void multiply_z(const bf16* state, float (&den)[kSlices][2]) const {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const bf16* const z = lane_z(state, slice);
      float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint32_t b0 = lane < 4 ? z_pair(z, k * 16) : 0;
        const uint32_t b1 = lane < 4 ? z_pair(z, k * 16 + 8) : 0;
        mma<bf16>(sums, phi[slice][k], b0, b1);
      }
      den[slice][0] = __shfl_sync(kAllLanes, sums[0], lane / 4 * 4);
      den[slice][1] = __shfl_sync(kAllLanes, sums[2], lane / 4 * 4);
    }
  }

  /// phi H: body(col, sums) for each 32 columns; and dots = g . (phi H), slice by slice. Ends with
  /// other warps still at H.
  template <class Body>
  __device__ void multiply_state(const bf16* state, float (&dots)[kSlices][2],
                                 const Body& body) const {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) dots[slice][0] = dots[slice][1] = 0.0f;
    if constexpr (kIsWhole) {
#pragma unroll
      for (int col = 0; col < kHeadDim; col += kGroup) {
        GroupSums sums;
        multiply<bf16>(sums, phi[0], chunk, col, lane);
        add_dots(sums, col, dots[0]);
        body(col, sums);
      }
    } else {
      GroupSums sums[kHeadDim / kGroup];
#pragma unroll
      for (int n = 0; n < kHeadDim / kGroup; ++n) sums[n].clear();
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll(Traits::kIsUnrolled ? kHeadDim / kChunk : 1)
        for (int first = 0; first < kHeadDim; first += kChunk) {
          if (first >= head_dim) break;
          stream([&] { load_state_rows<kChunk>(state, slice, first, 0); });
#pragma unroll
          for (int k = 0; k < kChunk; k += 16) {
#pragma unroll
            for (int col = 0; col < kHeadDim; col += 16) {
              uint32_t b[4];
              load_b_trans(b, chunk, k, col, lane);
              float (&c)[4][4] = sums[col / kGroup].c;
              mma<bf16>(c[col % kGroup / 8], phi[slice][(first + k) / 16], b[0], b[1]);
              mma<bf16>(c[col % kGroup / 8 + 1], phi[slice][(first + k) / 16], b[2], b[3]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / kGroup; ++n) add_dots(sums[n], n * kGroup, dots[slice]);
      }
      if constexpr (kSlices == 2) {  // the sums went on growing
#pragma unroll
        for (int half = 0; half < 2; ++half) dots[1][half] -= dots[0][half];
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / kGroup; ++n) body(n * kGroup, sums[n]);
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int half = 0; half < 2; ++half) dots[slice][half] = quad_sum(dots[slice][half]);
    }
  }

  /// d_x (d_y for the hedgehog maps) of d_phi = s (g H^T - e Z) into the warp's rows of the x tile;
  /// 0 where s is. mean = phi . d_phi, slice by slice. Leaves s phi in phi: to unpack it once saves
  /// the registers that its floats would take between two uses.
  __device__ void pull_back(const bf16* state, const float (&s)[2], const float (&e)[2],
                            const float (&mean)[kSlices][2]) {
    const MapSlope slope(map_);
    Fragments a;
    load_fragments(a, g_bf16);
    __syncwarp();
#pragma unroll(Traits::kIsUnrolled ? kHeadDim / (kChunk / kSlices) : 1)
    for (int first = 0; first < kHeadDim; first += kChunk / kSlices) {
      if constexpr (!kIsWhole) {
        if (first >= head_dim) break;
        stream([&] {
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
            load_state_rows<kChunk / kSlices>(state, slice, first, slice * (kChunk / kSlices));
          }
        });
      }
#pragma unroll
      for (int n = 0; n < kChunk / kSlices; n += 16) {
        Sums<kSlices> sums;
        multiply_transposed<bf16>(sums, a, chunk, n, kChunk / kSlices, lane);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int col = first + n + c * 8;
          float d_x[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
            const float sign = slice == 0 ? 1.0f : -1.0f;
            const float2 z = unpack_bf16(z_pair(lane_z(state, slice), col));
            const float (&d)[4] = sums.c[slice * 2 + c];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint32_t& bits = phi[slice][col / 16][col / 8 % 2 * 2 + half];
              const float2 f = unpack_bf16(bits);
#pragma unroll
              for (int v = 0; v < 2; ++v) {
                const float d_phi = s[half] * (d[2 * half + v] - e[half] * (v == 0 ? z.x : z.y));
                d_x[half][v] +=
                    sign * slope.of<kSlices == 2>(v == 0 ? f.x : f.y) * (d_phi - mean[slice][half]);
              }
              const uint32_t scaled = pack<bf16>(s[half] * f.x, s[half] * f.y);
              bits = s[half] == 0.0f ? 0 : scaled;
            }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t bits = pack<T>(d_x[half][0], d_x[half][1]);
            pair(x, col, half) = s[half] == 0.0f ? 0 : bits;
          }
        }
      }
    }
    __syncwarp();
  }

  /// a W: body(col, sums) for each 32 columns. If the state fits whole, W^T is in the chunk.
  template <class Body>
  __device__ void multiply_weight(const Fragments& a, const T* weight_t, const Body& body) const {
    const typename Traits::WeightTile tile{reinterpret_cast<T*>(chunk.data)};
#pragma unroll 1
    for (int first = 0; first < kHeadDim; first += kChunk) {
      if constexpr (!kIsWhole) {
        if (first >= head_dim) break;
        stream([&] { load_weight(weight_t, first); });
      }
#pragma unroll
      for (int n = 0; n < kChunk; n += kGroup) {
        GroupSums sums;
        multiply_transposed<T>(sums, a, tile, n, 16, lane);
        body(first + n, sums);
      }
    }
  }

  /// The hedgehog maps' d_x = d_y W, in place of d_y in the warp's rows of the x tile.
  __device__ void multiply_feature_weight(const T* weight_t) const {
    Fragments a;
    load_fragments(a, x);
    __syncwarp();
    multiply_weight(a, weight_t, [&](int col, const GroupSums& sums) {
      stage(x, col, sums, [](float value, int) { return value; });
    });
    __syncwarp();
  }

  /// Writes map(value, half) of 32 columns into the warp's rows of a tile.
  template <class Tile, class Map>
  __device__ void stage(const Tile& tile, int col, const GroupSums& sums, const Map& map) const {
    using Element = std::remove_pointer_t<decltype(tile.data)>;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pair(tile, col + n * 8, half) =
            pack<Element>(map(sums.c[n][2 * half], half), map(sums.c[n][2 * half + 1], half));
      }
    }
  }

  /// Stores the warp's rows of the x tile, of which `num_rows` belong to positions from `first` on.
  __device__ void store_x(const Rows& out, T* head, int32_t first, int32_t num_rows) const {
    __syncwarp();
    if (out.is_vectorised) {
      constexpr int kChunks = kHeadDim / 8,
                    kStep = kWarpSize / kChunks > 0 ? kWarpSize / kChunks : 1;
      const int c = lane % kChunks;
#pragma unroll 4
      for (int r = warp_row + lane / kChunks; r < warp_row + 16; r += kStep) {
        if (r >= num_rows || c * 8 >= head_dim) continue;
        *reinterpret_cast<uint4*>(head + out.offset(first + r) + c * 8) =
            *reinterpret_cast<const uint4*>(x.chunk(r, c));
      }
    } else {
      for (int idx = lane; idx < 16 * kHeadDim; idx += kWarpSize) {
        const int r = warp_row + idx / kHeadDim, c = idx % kHeadDim;
        if (r < num_rows && c < head_dim) head[out.offset(first + r) + c] = *x.at(r, c);
      }
    }
    __syncwarp();
  }

 private:
  /// feature_map, for the maps that have kSlices slices: others would only take registers.
  __device__ void map_row(float sign, float (&row)[kHeadDim / 4]) const {
    const auto apply = [&](FeatureMap map, int num_cols) {
      feature_map<FragmentColumns>(map, num_cols, sign, row, row);
    };
    if constexpr (kSlices == 2) {
      if (has_mean()) return apply(FeatureMap::kHedgehog, head_dim);
      apply(FeatureMap::kHedgehogExp, head_dim);
    } else {  // what lies beyond D is -inf already, where that matters
      if (has_mean()) return apply(FeatureMap::kSoftmax, kHeadDim);
      if (map_ == FeatureMap::kElu1) return apply(FeatureMap::kElu1, kHeadDim);
      if (map_ == FeatureMap::kRelu) apply(FeatureMap::kRelu, kHeadDim);
    }
  }
  /// Loads the chunk anew: after all warps are done with it, and before any goes on.
  template <class Load>
  __device__ static void stream(const Load& load) {
    __syncthreads();
    load();
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  /// Starts loading rows [first, first + kNum) of a slice of H into the chunk from row `to`.
  template <int kNum>
  __device__ void load_state_rows(const bf16* state, int slice, int32_t first, int to) const {
    const bf16* const h = state + int64_t{slice} * head_dim * head_dim;
    const SharedTile<bf16, kNum, kHeadDim> tile{chunk.data + to * kHeadDim};
    load_rows_async<kThreads>(tile, matrix_rows(h, head_dim), h, first, head_dim - first, head_dim);
  }
  __device__ void add_dots(const GroupSums& sums, int col, float (&dots)[2]) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 value = unpack_bf16(pair(g_bf16, col + n * 8, half));
        dots[half] =
            fmaf(sums.c[n][2 * half], value.x, fmaf(sums.c[n][2 * half + 1], value.y, dots[half]));
      }
    }
  }

  const FeatureMap map_;
};

}  // namespace sparline::cuda
