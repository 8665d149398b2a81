// SPDX-License-Identifier: Apache-2.0
//
// The row pass of the sparse backward: for query block i, over its critical key blocks j ascending,
//   S = scale Q K^T,  P = exp(S - lse),  dP = dO_s V^T,  dS = P (dP - delta),  dQ += scale dS K
// and for a soft map, where P = m P~,  dm_ij += sum of P~ (dP - delta).
// With smoothed keys K - k_mean the scores shift by what lse holds already; dQ loses
// rowsum(dS) k_mean.
//
// A warp owns 16 kM query rows and keeps their dQ in registers; S, dP and dS of a step never leave
// them either. Q and dO stay in shared memory, steps of K and V rows stream through two stages.
// Shared memory decides the tiling: for D = 128, 128 x 64 and four warps of 32 rows a tile costs
// (clocks at 128 bytes each) S 1024 + dP 1024 as 32 x 32 tiles, dQ 512 (A is in registers) and 256
// to fill: 2816, where the products take 2400. Eight warps of 16 rows: 3800.
#pragma once

#include "cuda/common/row_scan.cuh"
#include "cuda/sm80/sparse_bwd.cuh"

namespace sparline::cuda {
namespace backward {

/// What a row pass does beyond the plain formula.
enum class RowExtra {
  kNone,
  kMean,    // smoothed keys
  kPolicy,  // a soft map or tile bits, and smoothed keys
};

template <int kHeadDimT, int kWarpsT, int kMT, int kStepRowsT, int kMinCtasT>
struct RowsShape {
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kWarps = kWarpsT;
  static constexpr int kM = kMT;  // 16-row tiles of a warp
  static constexpr int kStepRows = kStepRowsT;
  static constexpr int kMinCtas = kMinCtasT;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kM * kWarps;

  static constexpr int kPlainEntries = 352, kPolicyEntries = 144;  // of the list of steps

  // Shared memory, in bytes.
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;      // Q, dO
  static constexpr int kStageBytes = kStepRows * kHeadDim * 2;  // K, V; two of each
  static constexpr int kTiles = 2 * kQueryBytes + 4 * kStageBytes;
  static constexpr int kStats = kTiles;                    // lse (kRows), -delta (kRows)
  static constexpr int kSources = kStats + 2 * kRows * 4;  // a ring of kStepRows memory rows
  static constexpr int kSteps = kSources + kRing * kStepRows * 4;
  static constexpr int kPlainTotal = kSteps + StepList<kThreads, kStepRows, kPlainEntries>::kBytes;
  static constexpr int kPolicies =  // a ring
      kSteps + StepList<kThreads, kStepRows, kPolicyEntries>::kBytes;
  static constexpr int kSums = kPolicies + kRing * 16;           // dm of two steps, by warps
  static constexpr int kBlocks = kSums + 2 * kWarps * 4;         // of entries: blocks, int32, and
  static constexpr int kVisible = kBlocks + kPolicyEntries * 4;  // visible groups, uint8
  static constexpr int kPolicyTotal = kVisible + kPolicyEntries;
  static_assert(kRows * FloatTile<kHeadDim>::kStride * 4 <= kTiles);
  static_assert(kPlainTotal <= 99 * 1024 && kPolicyTotal <= 99 * 1024);
};

/// Of a step, if there is a soft map or bits.
struct StepPolicy {
  int32_t block;
  uint32_t visible;  // bit g: rows of group g take part; 0: look up each row's bit
  float m;           // of a soft map, else 1
  int32_t has_map_grad;
};

template <class T, class Shape, RowExtra kExtra>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinCtas)
    rows_kernel(const SparseBackward p) {
  begin_kernel();
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kM = Shape::kM;
  constexpr int kStepRows = Shape::kStepRows, kHeadDim = Shape::kHeadDim;
  constexpr int kN = kStepRows / 8, kK = kStepRows / 16;
  constexpr int kColSteps = kHeadDim / 16;
  constexpr bool kHasPolicy = kExtra == RowExtra::kPolicy;
  constexpr int kEntries = kHasPolicy ? Shape::kPolicyEntries : Shape::kPlainEntries;
  using QueryTile = SharedTile<T, kRows, kHeadDim>;
  using KeyTile = SharedTile<T, kStepRows, kHeadDim>;
  using Copy = StepCopy<kThreads, T, kStepRows, kHeadDim>;

  // Shared memory.
  SPARLINE_DYNAMIC_SHARED(shared);
  T* const origin = reinterpret_cast<T*>(shared);
  constexpr int kQuerySize = Shape::kQueryBytes / 2, kStageSize = Shape::kStageBytes / 2;
  const FloatTile<kHeadDim> result{reinterpret_cast<float*>(shared)};  // in place of the tiles
  float* const lse_shared = reinterpret_cast<float*>(shared + Shape::kStats);
  float* const delta_shared = lse_shared + kRows;  // negated
  int32_t* const sources = reinterpret_cast<int32_t*>(shared + Shape::kSources);
  StepPolicy* const policies = reinterpret_cast<StepPolicy*>(shared + Shape::kPolicies);
  float* const map_sums = reinterpret_cast<float*>(shared + Shape::kSums);
  int32_t* const blocks_shared = reinterpret_cast<int32_t*>(shared + Shape::kBlocks);
  uint8_t* const visible_shared = shared + Shape::kVisible;

  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const int32_t num_blocks = p.frame.queries.num_blocks;
  const int32_t i = static_cast<int32_t>(blockIdx.x) % num_blocks;
  const int32_t bh = static_cast<int32_t>(blockIdx.x) / num_blocks;
  const int32_t b = bh / p.frame.num_heads, h = bh % p.frame.num_heads;
  const int32_t h_kv = h / p.frame.group(), head_dim = p.frame.head_dim;
  const BlockInfo block = p.frame.queries.block(i);
  const bool is_query_protected = block.is_protected != 0;
  const bool is_vectorised = p.k.is_vectorised && p.v.is_vectorised;
  const bool is_empty = p.is_protected_only && !is_query_protected;
  if (is_empty && p.adds_linear) return;

  const auto is_free = [&](int32_t j) {
    return !is_query_protected && !is_protected(p.frame.keys, j);
  };
  const auto live = [&](int32_t, int32_t j, const BlockInfo& keys) -> uint32_t {
    if (is_free(j)) {
      if (!p.map.is_soft && !(p.map.sparse_weight(b, h, i, j, false) > 0.0f)) return 0;
      if (kHasPolicy && p.tile_bits.data != nullptr &&
          visible_groups(p.tile_bits, b, h, i, j, block.rows) == 0) {
        return 0;
      }
    }
    return all_steps<kStepRows>(keys.rows);
  };
  const auto keep = [&](int entry, int32_t j) {
    if constexpr (kHasPolicy) {
      blocks_shared[entry] = j;
      uint32_t visible = ~0u;
      if (p.tile_bits.data != nullptr && is_free(j)) {
        visible =
            has_bits_by_row(p.tile_bits) ? 0 : visible_groups(p.tile_bits, b, h, i, j, block.rows);
      }
      visible_shared[entry] = static_cast<uint8_t>(visible);
    }
  };

  // Blocks of more rows than a tile only with head dims that leave no room.
  for (int32_t row0 = 0; row0 < block.rows; row0 += kRows) {
    const int32_t first = block.begin + row0;
    const int32_t num_rows = block.rows - row0 < kRows ? block.rows - row0 : kRows;

    // Prologue.
    if (row0 > 0) __syncthreads();
    load_rows_async<kThreads>(QueryTile{origin}, p.q, p.q.head<T>(b, h), first, num_rows, head_dim);
    load_rows_async<kThreads>(QueryTile{origin + kQuerySize}, p.d_o, p.d_o.head<T>(b, h), first,
                              num_rows, head_dim);
    for (int r = thread; r < kRows; r += kThreads) {
      float lse = kInfinity, delta = 0.0f;
      if (r < num_rows) {
        const int64_t at = static_cast<int64_t>(bh) * p.frame.queries.length + first + r;
        const float share = p.stats.share == nullptr ? 1.0f : p.stats.share[at];
        if (share > kSmallestShare) {
          lse = effective_lse(p.stats.lse_log2[at], share);
          delta = -p.stats.delta[at] / share;
        }
      }
      lse_shared[r] = lse;
      delta_shared[r] = delta;
    }

    for (int stage = 0; stage < 4 && head_dim < kHeadDim; ++stage) {
      clear_columns<kThreads>(KeyTile{origin + 2 * kQuerySize + stage * kStageSize}, head_dim);
    }

    const LanePattern<kHeadDim> pattern(lane);
    const int warp_row = warp * 16 * kM;
    const bool is_idle = warp_row >= num_rows;
    const int q_at = warp_row * kHeadDim + pattern.a;
    const float scale_log2 = p.scale * kLog2E;
    const T* const k_column = p.k.head<T>(b, h_kv) + Copy::col();
    const T* const v_column = p.v.head<T>(b, h_kv) + Copy::col();
    const uint32_t k_row_bytes = static_cast<uint32_t>(p.k.stride_n * sizeof(T));
    const uint32_t v_row_bytes = static_cast<uint32_t>(p.v.stride_n * sizeof(T));
    const bool is_column = Copy::col() < head_dim;
    float d_q[kM][kHeadDim / 8][4] = {};  // (16 kM, D)
    float d_s_sum[kM][2] = {};            // rowsum(dS), this lane's part
    StepList<kThreads, kStepRows, kEntries> steps(
        shared + Shape::kSteps, p.frame.keys, block.other_begin,
        is_empty ? block.other_begin : block.other_end, 1);
    uint32_t rows_ahead = 0;  // rows of steps `turn`, `turn - 1`, `turn - 2`, a byte each; 0: none
    bool has_map_sum = false;

    // Main loop. Step `turn - 2` is computed.
    for (int turn = 0;; ++turn) {
      cp_async_wait<0>();
      __syncthreads();
      if constexpr (kHasPolicy) {  // what the previous step left
        if (has_map_sum && thread == 0) {
          float sum = 0.0f;
          for (int w = 0; w < Shape::kWarps; ++w) sum += map_sums[turn % 2 * Shape::kWarps + w];
          p.d_block_map[(static_cast<int64_t>(bh) * num_blocks + i) * p.frame.keys.num_blocks +
                        policies[(turn + kRing - 3) % kRing].block] += sum;
        }
        has_map_sum = false;
      }

      // Step `turn`: where its rows lie.
      const Step after = steps.next(live, keep);
      rows_ahead = rows_ahead << 8 | static_cast<uint32_t>(after.num_rows);
      int32_t source = after.first + (thread < after.num_rows ? thread : after.num_rows - 1);
      if (p.k.order != nullptr && thread < kStepRows && after.num_rows > 0) {
        source = p.k.order[source];
      }
      if constexpr (kHasPolicy) {
        if (thread == 0 && after.num_rows > 0) {
          const int32_t j = blocks_shared[after.entry];
          const bool has_map_grad = p.map.is_soft && is_free(j);
          const float m = has_map_grad ? p.map.sparse_weight(b, h, i, j, false) : 1.0f;
          policies[turn % kRing] = {j, visible_shared[after.entry], m, has_map_grad};
        }
      }

      // Step `turn - 1`: its copies, between the products of step `turn - 2`.
      T* const next_stage = origin + 2 * kQuerySize + (turn + 1) % 2 * 2 * kStageSize;
      const bool has_next = (rows_ahead >> 8 & 0xff) != 0;
      const bool is_copying = has_next && is_vectorised && is_column;
      int32_t rows[Copy::kCopies];
#pragma unroll
      for (int piece = 0; piece < Copy::kCopies; ++piece) {
        rows[piece] = sources[(turn + kRing - 1) % kRing * kStepRows + Copy::row(piece)];
      }
      const auto copy = [&](int item) {
        const int piece = item / 2;
        const bool is_v = item % 2 != 0;
        const KeyTile tile{is_v ? next_stage + kStageSize : next_stage};
        const uint64_t offset =
            uint64_t{static_cast<uint32_t>(rows[piece])} * (is_v ? v_row_bytes : k_row_bytes);
        const void* const from = reinterpret_cast<const char*>(is_v ? v_column : k_column) + offset;
        if (is_copying) cp_async_16(tile.at(Copy::row(piece), Copy::col()), from, true);
      };
      if (has_next && !is_vectorised) {
        for (int idx = thread; idx < kStepRows * head_dim; idx += kThreads) {
          const int r = idx / head_dim, c = idx % head_dim;
          const int64_t row = sources[(turn + kRing - 1) % kRing * kStepRows + r];
          *KeyTile{next_stage}.at(r, c) = p.k.head<T>(b, h_kv)[row * p.k.stride_n + c];
          *KeyTile{next_stage + kStageSize}.at(r, c) = p.v.head<T>(b, h_kv)[row * p.v.stride_n + c];
        }
      }

      const auto compute = [&](int num_keys) {
        const int k_at = turn % 2 * 2 * kStageSize;
        const T* const k_tile = origin + 2 * kQuerySize;
        const T* const v_tile = k_tile + kStageSize;
        float s[kM][kN][4] = {};  // S, then P (16 kM, kStepRows)
        multiply_rows<T, kHeadDim>(s, origin, q_at, k_tile, k_at + pattern.b, [&](int step) {
          spread<2 * Copy::kCopies, kColSteps>(step, copy);
        });

        float lse[kM][2], d_p[kM][kN][4];  // dP - delta (16 kM, kStepRows)
        float ceiling = kInfinity, m_weight = 1.0f, d_map = 0.0f;
        bool has_map_grad = false;
        if constexpr (kHasPolicy) {
          // P = m exp(S - lse) is at most 1, which bounds the exponential; for m = 0 nothing does,
          // and its gradient, which SoftTop-k multiplies by 0, must stay finite.
          const StepPolicy& now = policies[(turn + kRing - 2) % kRing];
          m_weight = now.m;
          has_map_grad = now.has_map_grad != 0;
          if (p.map.is_soft)
            ceiling = m_weight > 0.0f ? fminf(1.0f - log2f(m_weight), 100.0f) : 64.0f;
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const int row = warp_row + 16 * m + lane / 4;
          lse[m][0] = lse_shared[row];
          lse[m][1] = lse_shared[row + 8];
          if constexpr (kHasPolicy) {
            const StepPolicy& now = policies[(turn + kRing - 2) % kRing];
            if (p.tile_bits.data != nullptr && has_bits_by_row(p.tile_bits)) {
              for (int half = 0; half < 2 && now.visible == 0; ++half) {
                const int32_t r = row0 + row + 8 * half;
                if (r < block.rows &&
                    !group_bit(p.tile_bits, b, h, i, r / p.tile_bits.rows, now.block)) {
                  lse[m][half] = kInfinity;
                }
              }
            } else if (p.tile_bits.data != nullptr) {
              const int group = (row0 + warp_row + 16 * m) / p.tile_bits.rows;
              if ((now.visible >> group & 1u) == 0) lse[m][0] = lse[m][1] = kInfinity;
            }
          }
          const float delta[2] = {delta_shared[row], delta_shared[row + 8]};
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) d_p[m][n][c] = delta[c / 2];
          }
        }
        multiply_rows<T, kHeadDim>(
            d_p, origin + kQuerySize, q_at, v_tile, k_at + pattern.b, [&](int step) {
              spread<kM * kN, kColSteps>(step, [&](int item) {
                const int m = item % kM, n = item / kM;
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  float exponent = fmaf(s[m][n][c], scale_log2, -lse[m][c / 2]);
                  if constexpr (kHasPolicy) exponent = fminf(exponent, ceiling);
                  if (8 * n + lane % 4 * 2 + c % 2 >= num_keys) exponent = -kInfinity;
                  s[m][n][c] = exp2_approx(exponent);
                }
              });
            });

        uint32_t d_s[kM][kK][4];  // (16 kM, kStepRows)
        const auto round = [&](int m, int k) {
#pragma unroll
          for (int n = 2 * k; n < 2 * k + 2; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              s[m][n][c] *= d_p[m][n][c];
              if constexpr (kHasPolicy) {
                d_map += s[m][n][c];
                s[m][n][c] = m_weight > 0.0f ? s[m][n][c] * m_weight : 0.0f;
              }
            }
          }
          round_fragment<T>(d_s[m][k], s[m][2 * k], s[m][2 * k + 1]);
          if constexpr (kExtra != RowExtra::kNone) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float2 pair = unpack<T>(d_s[m][k][c]);
              d_s_sum[m][c % 2] += pair.x + pair.y;
            }
          }
        };
#pragma unroll
        for (int m = 0; m < kM; ++m) round(m, 0);
        multiply_fragments(d_q, d_s, k_tile, k_at + pattern.a, [&](int step) {
          if (step / kColSteps + 1 == kK) return;
          spread<kM, kColSteps>(step % kColSteps, [&](int m) { round(m, step / kColSteps + 1); });
        });
        if constexpr (kHasPolicy) {
          if (has_map_grad) {
            d_map = warp_sum(d_map);
            if (lane == 0) map_sums[(turn + 1) % 2 * Shape::kWarps + warp] = d_map;
          }
        }
      };
      const int num_keys = static_cast<int>(rows_ahead >> 16 & 0xff);
      if (num_keys == 0 || is_idle) {
#pragma unroll
        for (int item = 0; item < 2 * Copy::kCopies; ++item) copy(item);
      } else {
        compute(num_keys);
      }
      cp_async_commit();
      if constexpr (kHasPolicy) {
        has_map_sum = num_keys > 0 && policies[(turn + kRing - 2) % kRing].has_map_grad != 0;
        if (has_map_sum && is_idle && lane == 0) {
          map_sums[(turn + 1) % 2 * Shape::kWarps + warp] = 0.0f;
        }
      }
      if (thread < kStepRows) sources[turn % kRing * kStepRows + thread] = source;
      if ((rows_ahead & 0xffff) == 0 && !has_map_sum) break;
    }

    // Epilogue.
    __syncthreads();
    result.put(d_q, warp_row, lane);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(d_s_sum[m][half]) * p.scale;
        if (lane % 4 == 0) lse_shared[warp_row + 16 * m + 8 * half + lane / 4] = sum;
      }
    }
    __syncthreads();
    const float* const k_mean =
        p.k_mean == nullptr ? nullptr
                            : p.k_mean + ((static_cast<int64_t>(b) * p.frame.num_kv_heads + h_kv) *
                                              p.frame.keys.num_sequences +
                                          block.sequence) *
                                             head_dim;
    store_rows<kThreads>(result, RowOutput{p.scale, lse_shared, k_mean, p.adds_linear}, p.d_q,
                         p.d_q.head<T>(b, h), first, num_rows, head_dim);
  }
}

template <class T, class Shape>
void launch_rows(const SparseBackward& given, void* stream) {
  SparseBackward params = given;
  count_rows_in_32_bits(params.k);
  count_rows_in_32_bits(params.v);
  const int64_t blocks = static_cast<int64_t>(params.frame.batch) * params.frame.num_heads *
                         params.frame.queries.num_blocks;
  const LaunchShape plain{blocks, Shape::kThreads, Shape::kPlainTotal};
  if (params.map.is_soft || params.tile_bits.data != nullptr) {
    launch(rows_kernel<T, Shape, RowExtra::kPolicy>,
           LaunchShape{blocks, Shape::kThreads, Shape::kPolicyTotal}, stream, params);
  } else if (params.k_mean != nullptr) {
    launch(rows_kernel<T, Shape, RowExtra::kMean>, plain, stream, params);
  } else {
    launch(rows_kernel<T, Shape, RowExtra::kNone>, plain, stream, params);
  }
}

template <class Shape>
void launch_rows_of(const SparseBackward& params, void* stream) {
  if (params.dtype == DType::kBF16) {
    launch_rows<bf16, Shape>(params, stream);
  } else {
    launch_rows<fp16, Shape>(params, stream);
  }
}

}  // namespace backward
}  // namespace sparline::cuda
