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

template <int kHeadDimT, int kWarpsT, int kMT, int kStepRowsT, int kMinCtasT, int kMinExtraCtasT>
struct RowsShape {
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kWarps = kWarpsT;
  static constexpr int kM = kMT;  // 16-row tiles of a warp
  static constexpr int kStepRows = kStepRowsT;
  /// On a multiprocessor: what they do beyond the plain formula takes registers.
  static constexpr int min_ctas(RowExtra extra) {
    return extra == RowExtra::kNone ? kMinCtasT : kMinExtraCtasT;
  }
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kM * kWarps;
  /// Whether a tile holds all rows of a block; else there is no room for them.
  static constexpr bool kIsWhole = kHeadDim <= 128;

  // Shared memory, in bytes.
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;      // Q, dO
  static constexpr int kStageBytes = kStepRows * kHeadDim * 2;  // K, V; two of each
  static constexpr int kTiles = 2 * kQueryBytes + 4 * kStageBytes;
  using Steps = StepList<kThreads, kStepRows, kStepRows == 32 ? 4 : 2>;
  static constexpr int kStats = kTiles;                    // lse (kRows), -delta (kRows)
  static constexpr int kSources = kStats + 2 * kRows * 4;  // memory rows of steps, a ring
  static constexpr int kPolicies = kSources + kRing * kStepRows * 4;  // of blocks, a ring
  static constexpr int kSums = kPolicies + kRing * 16;                // dm of two steps, by warps
  static constexpr int kPlace = kSums + 2 * kWarps * 4;
  static constexpr int kSteps = kPlace + 48;
  static constexpr int kTotal = kSteps + Steps::kBytes;
  static_assert(kRows * FloatTile<kHeadDim>::kStride * 4 <= kTiles);
  static_assert(kTotal <= 99 * 1024);
};

/// Of a key block, if there is a soft map or bits.
struct BlockPolicy {
  int32_t block;
  uint32_t visible;  // bit g: rows of group g take part; 0: look up each row's bit
  float m;           // of a soft map, else 1
  int32_t has_map_grad;
};

/// The queries of a CTA. Kept in shared memory: the main loop has no register to spare for it.
struct RowPlace {
  int32_t b, h, h_kv, i;
  BlockInfo block;

  __device__ int64_t head(const Frame& frame) const { return int64_t{b} * frame.num_heads + h; }
};
static_assert(sizeof(RowPlace) <= 48);

template <class T, class Shape, RowExtra kExtra>
__global__ void __launch_bounds__(Shape::kThreads, Shape::min_ctas(kExtra))
    rows_kernel(const SparseBackward p) {
  begin_kernel();
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kM = Shape::kM;
  constexpr int kStepRows = Shape::kStepRows, kHeadDim = Shape::kHeadDim;
  constexpr int kN = kStepRows / 8, kK = kStepRows / 16;
  constexpr int kColSteps = kHeadDim / 16;
  constexpr bool kHasPolicy = kExtra == RowExtra::kPolicy;
  using QueryTile = SharedTile<T, kRows, kHeadDim>;
  using KeyTile = SharedTile<T, kStepRows, kHeadDim>;
  using Copy = StepCopy<kThreads, kStepRows, kHeadDim>;

  // Shared memory.
  SPARLINE_DYNAMIC_SHARED(shared);
  const QueryTile q_tile{reinterpret_cast<T*>(shared)};
  const QueryTile d_o_tile{reinterpret_cast<T*>(shared + Shape::kQueryBytes)};
  unsigned char* const stages = shared + 2 * Shape::kQueryBytes;
  const FloatTile<kHeadDim> result{reinterpret_cast<float*>(shared)};  // in place of the tiles
  float* const lse_shared = reinterpret_cast<float*>(shared + Shape::kStats);
  float* const delta_shared = lse_shared + kRows;  // negated
  int32_t* const sources = reinterpret_cast<int32_t*>(shared + Shape::kSources);
  BlockPolicy* const policies = reinterpret_cast<BlockPolicy*>(shared + Shape::kPolicies);
  float* const map_sums = reinterpret_cast<float*>(shared + Shape::kSums);

  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const int32_t num_blocks = p.frame.queries.num_blocks, head_dim = p.frame.head_dim;
  RowPlace& at = *reinterpret_cast<RowPlace*>(shared + Shape::kPlace);
  if (thread == 0) {
    const int32_t i = static_cast<int32_t>(blockIdx.x) % num_blocks;
    const int32_t bh = static_cast<int32_t>(blockIdx.x) / num_blocks, h = bh % p.frame.num_heads;
    at = {bh / p.frame.num_heads, h, h / p.frame.group(), i, p.frame.queries.block(i)};
  }
  __syncthreads();
  const BlockInfo& block = at.block;
  const bool is_vectorised = p.k.is_vectorised && p.v.is_vectorised;
  const bool is_empty = p.is_protected_only && block.is_protected == 0;
  if (is_empty && p.adds_linear) return;

  const auto is_free = [&](int32_t j) {
    return block.is_protected == 0 && !is_protected(p.frame.keys, j);
  };
  const auto live = [&](int32_t, int32_t j, const BlockInfo& keys) -> uint32_t {
    if (is_free(j)) {
      if (!p.map.is_soft && !(p.map.sparse_weight(at.b, at.h, at.i, j, false) > 0.0f)) return 0;
      if (kHasPolicy && p.tile_bits.data != nullptr &&
          visible_groups(p.tile_bits, at.b, at.h, at.i, j, block.rows) == 0) {
        return 0;
      }
    }
    return all_steps<kStepRows>(keys.rows);
  };
  const auto open = [&](int slot, int32_t, int32_t j, const BlockInfo&) {
    if constexpr (kHasPolicy) {
      if (warp > 0) return;
      uint32_t visible = ~0u;
      if (p.tile_bits.data != nullptr && is_free(j)) {
        const bool is_group = lane < p.tile_bits.groups && lane * p.tile_bits.rows < block.rows;
        visible = __ballot_sync(kAllLanes, is_group && group_bit(p.tile_bits, at.b, at.h, at.i,
                                                                 is_group ? lane : 0, j));
        if (has_bits_by_row(p.tile_bits)) visible = 0;
      }
      const bool has_map_grad = p.map.is_soft && is_free(j);
      const float m = has_map_grad ? p.map.sparse_weight(at.b, at.h, at.i, j, false) : 1.0f;
      if (lane == 0) policies[slot] = {j, visible, m, has_map_grad};
    }
  };

  for (int32_t row0 = 0; row0 < (Shape::kIsWhole ? 1 : block.rows); row0 += kRows) {
    const int32_t first = block.begin + row0;
    const int32_t num_rows = block.rows - row0 < kRows ? block.rows - row0 : kRows;

    // Prologue.
    if (row0 > 0) __syncthreads();
    load_rows_async<kThreads>(q_tile, p.q, p.q.head<T>(at.b, at.h), first, num_rows, head_dim);
    load_rows_async<kThreads>(d_o_tile, p.d_o, p.d_o.head<T>(at.b, at.h), first, num_rows,
                              head_dim);
    for (int r = thread; r < kRows; r += kThreads) {
      float lse = kInfinity, delta = 0.0f;
      if (r < num_rows) {
        const int64_t row = at.head(p.frame) * p.frame.queries.length + first + r;
        lse = p.stats.lse_log2[row];
        delta = -p.stats.delta[row];
      }
      lse_shared[r] = lse;
      delta_shared[r] = delta;
    }

    for (int stage = 0; stage < 4 && head_dim < kHeadDim; ++stage) {
      clear_columns<kThreads>(KeyTile{reinterpret_cast<T*>(stages + stage * Shape::kStageBytes)},
                              head_dim);
    }

    const Copy copies(thread);
    const LanePattern<kHeadDim> pattern(lane);
    const int warp_row = warp * 16 * kM;
    const bool is_idle = warp_row >= num_rows;
    const SharedAddress q_at =
        shared_address(shared) + static_cast<uint32_t>(warp_row * kHeadDim * 2) + pattern.a;
    const float scale_log2 = fmaxf(p.scale * kLog2E, kLeastScale);
    const T* const k_column = p.k.head<T>(at.b, at.h_kv) + copies.col;
    const T* const v_column = p.v.head<T>(at.b, at.h_kv) + copies.col;
    const uint32_t k_row_bytes = static_cast<uint32_t>(p.k.stride_n * sizeof(T));
    const uint32_t v_row_bytes = static_cast<uint32_t>(p.v.stride_n * sizeof(T));
    const bool is_column = is_vectorised && copies.col < head_dim;
    const bool has_order = p.k.order != nullptr;
    float d_q[kM][kHeadDim / 8][4] = {};  // (16 kM, D)
    float d_s_sum[kM][2] = {};            // rowsum(dS), this lane's part
    typename Shape::Steps steps(shared + Shape::kSteps, p.frame.keys, block.other_begin,
                                is_empty ? block.other_begin : block.other_end, 1);
    Step next{}, after{};  // steps turn - 1 and turn
    StepsAhead ahead;
    bool has_map_sum = false;

    // Main loop. Step `turn - 2` is computed.
    for (int turn = 0;; ++turn) {
      cp_async_wait<0>();
      __syncthreads();
      if constexpr (kHasPolicy) {  // what the previous step left
        if (has_map_sum && thread == 0) {
          float sum = 0.0f;
          for (int w = 0; w < Shape::kWarps; ++w) sum += map_sums[turn % 2 * Shape::kWarps + w];
          p.d_block_map[(at.head(p.frame) * num_blocks + at.i) * p.frame.keys.num_blocks +
                        policies[ahead.place(2) / kMaxRows].block] += sum;
        }
        has_map_sum = false;
      }

      // Step `turn`: where its rows lie.
      next = after;
      after = steps.next(live, open);
      ahead.push(after);
      if (has_order && thread < kStepRows && after.num_rows > 0) {
        const int r = thread < after.num_rows ? thread : after.num_rows - 1;
        cp_async_4(shared_address(sources + turn % kRing * kStepRows + thread),
                   p.k.order + after.first + r);
      }

      // Step `turn - 1`: its copies, between the products of step `turn - 2`.
      unsigned char* const next_stage = stages + (turn + 1) % 2 * 2 * Shape::kStageBytes;
      const bool is_copying = is_column && next.num_rows > 0;
      const int32_t* const next_rows = sources + (turn + kRing - 1) % kRing * kStepRows;
      const SharedAddress copy_to = shared_address(next_stage) + copies.first_bytes();
      uint32_t row = 0;
      const auto copy = [&](int item) {
        const int piece = item / 2;
        const bool is_v = item % 2 != 0;
        if (!is_v) {
          const int r = copies.row(piece) < next.num_rows ? copies.row(piece) : next.num_rows - 1;
          row = static_cast<uint32_t>(has_order ? next_rows[copies.row(piece)] : next.first + r);
        }
        const uint64_t offset = uint64_t{row} * (is_v ? v_row_bytes : k_row_bytes);
        const void* const from = reinterpret_cast<const char*>(is_v ? v_column : k_column) + offset;
        const SharedAddress to = copy_to + (is_v ? Shape::kStageBytes : 0);
        if (is_copying) cp_async_16(Copy::target(to, piece), from);
      };
      if (!is_vectorised && next.num_rows > 0) {
        const KeyTile k_tile{reinterpret_cast<T*>(next_stage)};
        const KeyTile v_tile{reinterpret_cast<T*>(next_stage + Shape::kStageBytes)};
        const T* const k_head = p.k.head<T>(at.b, at.h_kv);
        const T* const v_head = p.v.head<T>(at.b, at.h_kv);
        for (int idx = thread; idx < kStepRows * head_dim; idx += kThreads) {
          const int r = idx / head_dim, c = idx % head_dim;
          const int32_t n = next.first + (r < next.num_rows ? r : next.num_rows - 1);
          *k_tile.at(r, c) = k_head[p.k.offset(n) + c];
          *v_tile.at(r, c) = v_head[p.v.offset(n) + c];
        }
      }

      const auto compute = [&](int num_keys) {
        const SharedAddress k_at = shared_address(stages + turn % 2 * 2 * Shape::kStageBytes);
        float s[kM][kN][4] = {};  // S, then P (16 kM, kStepRows)
        multiply_rows<T, kHeadDim>(s, q_at, k_at + pattern.b, [&](int step) {
          spread<2 * Copy::kCopies, kColSteps>(step, copy);
        });
        if (num_keys < kStepRows) {  // P = 0 past the last key
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              if (8 * n + lane % 4 * 2 + c % 2 < num_keys) continue;
#pragma unroll
              for (int m = 0; m < kM; ++m) s[m][n][c] = -kInfinity;
            }
          }
        }

        float lse[kM][2], d_p[kM][kN][4];  // dP - delta (16 kM, kStepRows)
        float ceiling = kInfinity, m_weight = 1.0f, d_map = 0.0f;
        bool has_map_grad = false;
        if constexpr (kHasPolicy) {
          // P = m exp(S - lse) is at most 1, which bounds the exponential; for m = 0 nothing does,
          // and its gradient, which SoftTop-k multiplies by 0, must stay finite.
          const BlockPolicy& now = policies[ahead.place(2) / kMaxRows];
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
            const BlockPolicy& now = policies[ahead.place(2) / kMaxRows];
            if (p.tile_bits.data != nullptr && has_bits_by_row(p.tile_bits)) {
              for (int half = 0; half < 2 && now.visible == 0; ++half) {
                const int32_t r = row0 + row + 8 * half;
                if (r < block.rows &&
                    !group_bit(p.tile_bits, at.b, at.h, at.i, r / p.tile_bits.rows, now.block)) {
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
            d_p, q_at + Shape::kQueryBytes, k_at + Shape::kStageBytes + pattern.b, [&](int step) {
              spread<kM * kN, kColSteps>(step, [&](int item) {
                const int m = item % kM, n = item / kM;
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  float exponent = fmaf(s[m][n][c], scale_log2, -lse[m][c / 2]);
                  if constexpr (kHasPolicy) exponent = fminf(exponent, ceiling);
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
        multiply_fragments<T>(d_q, d_s, k_at + pattern.a, [&](int step) {
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
      const int num_keys = ahead.num_rows(2);
      if (num_keys == 0 || is_idle) {
#pragma unroll
        for (int item = 0; item < 2 * Copy::kCopies; ++item) copy(item);
      } else {
        compute(num_keys);
      }
      cp_async_commit();
      if constexpr (kHasPolicy) {
        has_map_sum = num_keys > 0 && policies[ahead.place(2) / kMaxRows].has_map_grad != 0;
        if (has_map_sum && is_idle && lane == 0) {
          map_sums[(turn + 1) % 2 * Shape::kWarps + warp] = 0.0f;
        }
      }
      if ((ahead.rows & 0xffff) == 0 && !has_map_sum) break;
    }

    // Epilogue, in place of tiles that a CTA without a step has not waited for.
    cp_async_wait<0>();
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
    const float* k_mean = p.k_mean;
    if (k_mean != nullptr) {
      const int64_t pair = int64_t{at.b} * p.frame.num_kv_heads + at.h_kv;
      k_mean += (pair * p.frame.keys.num_sequences + block.sequence) * head_dim;
    }
    store_rows<kThreads>(result, RowOutput{p.scale, lse_shared, k_mean, p.adds_linear}, p.d_q,
                         p.d_q.head<T>(at.b, at.h), first, num_rows, head_dim);
  }
}

template <class T, class Shape>
void launch_rows(const SparseBackward& given, void* stream) {
  SparseBackward params = given;
  count_rows_in_32_bits(params.k);
  count_rows_in_32_bits(params.v);
  const int64_t blocks = static_cast<int64_t>(params.frame.batch) * params.frame.num_heads *
                         params.frame.queries.num_blocks;
  const LaunchShape shape{blocks, Shape::kThreads, Shape::kTotal};
  if (params.map.is_soft || params.tile_bits.data != nullptr) {
    launch(rows_kernel<T, Shape, RowExtra::kPolicy>, shape, stream, params);
  } else if (params.k_mean != nullptr) {
    launch(rows_kernel<T, Shape, RowExtra::kMean>, shape, stream, params);
  } else {
    launch(rows_kernel<T, Shape, RowExtra::kNone>, shape, stream, params);
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
