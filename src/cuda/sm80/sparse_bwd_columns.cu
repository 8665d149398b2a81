// SPDX-License-Identifier: Apache-2.0
//
// The column pass of the sparse backward: for key block j of a kv head, over the query heads of the
// group and the query blocks i that hold j critical, in this order,
//   P = exp(S - lse),  dV += P^T dO_s,  dS = P (dO_s V^T - delta),  dK += scale dS^T Q
// computed as S^T = K Q^T and dP^T = V dO^T, whose fragments are the A operands of what follows.
//
// Two warps form P^T and dV, two form dS^T and dK and take P^T (rounded) from the first two through
// shared memory: the same lane of the partner left it there. So each warp keeps the sums of one
// product alone and owns twice the keys. Shared memory decides: for D = 128 and 64 x 64 a tile
// costs (clocks at 128 bytes each)
//   four warps of 16 keys, all four products:        S, dP 640 + 640, dV, dK 512 + 512, fill 256
//   the same, S^T exchanged, 32 keys x D/2 each:     512 + 512, 384 + 384, 128 to exchange, 256
//   two and two warps of 32 keys (here):             512 + 512, 256 + 256, 128 to exchange, 256
// that is 2560, 2176 and 1920, where the products take 1600.
//
// Both kinds of warps form their first product for step n while the second is that of step n - 1,
// so that what comes between the two is done under the products:
//   first:   S_n          then  dV += P_{n-1}^T dO_{n-1}  and meanwhile  P_n = exp(S_n - lse)
//   second:  dP_n  and meanwhile  dS_{n-1} = P_{n-1} (dP_{n-1} - delta)  then  dK += dS_{n-1}^T
//   Q_{n-1}
#include "cuda/sm80/sparse_bwd.cuh"

namespace sparline::cuda {
namespace backward {
namespace {

template <int kHeadDimT, int kMT, int kStepRowsT, int kMinCtasT>
struct ColumnsShape {
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr int kM = kMT;  // 16-key tiles of a warp
  static constexpr int kStepRows = kStepRowsT;
  static constexpr int kMinCtas = kMinCtasT;
  static constexpr int kThreads = 128;
  static constexpr int kKeys = 32 * kM;
  static constexpr int kStages = 3;                       // on its way, step n, step n - 1
  static constexpr int kFragments = kM * kStepRows / 16;  // of P^T, of a warp

  // Shared memory, in bytes.
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;                    // K, V
  static constexpr int kStageBytes = kStepRows * kHeadDim * 2;              // Q, dO
  static constexpr int kStats = 2 * kKeyBytes + 2 * kStages * kStageBytes;  // lse, -delta; a ring
  static constexpr int kExchange = kStats + kRing * 2 * kStepRows * 4;      // P^T; two of them
  static constexpr int kSources =  // a ring of kStepRows memory rows
      kExchange + 2 * 2 * kFragments * kWarpSize * 16;
  static constexpr int kSteps = kSources + kRing * kStepRows * 4;
  static constexpr int kEntries = 384;
  static constexpr int kBlocks = kSteps + StepList<kThreads, kStepRows, kEntries>::kBytes;
  static constexpr int kTotal = kBlocks + kEntries * 4;  // of entries
  static_assert(2 * kKeys * FloatTile<kHeadDim>::kStride * 4 <= kTotal);
  static_assert(kTotal <= 99 * 1024);
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinCtas)
    columns_kernel(const SparseBackward p) {
  begin_kernel();
  constexpr int kThreads = Shape::kThreads, kKeys = Shape::kKeys, kM = Shape::kM;
  constexpr int kStepRows = Shape::kStepRows, kHeadDim = Shape::kHeadDim;
  constexpr int kN = kStepRows / 8, kK = kStepRows / 16;
  constexpr int kColSteps = kHeadDim / 16;
  constexpr int kStages = Shape::kStages;
  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using QueryTile = SharedTile<T, kStepRows, kHeadDim>;
  using Copy = StepCopy<kThreads, T, kStepRows, kHeadDim>;

  // Shared memory.
  SPARLINE_DYNAMIC_SHARED(shared);
  T* const origin = reinterpret_cast<T*>(shared);
  constexpr int kKeySize = Shape::kKeyBytes / 2, kStageSize = Shape::kStageBytes / 2;
  T* const stages = origin + 2 * kKeySize;
  float* const stats = reinterpret_cast<float*>(shared + Shape::kStats);
  int32_t* const blocks_shared = reinterpret_cast<int32_t*>(shared + Shape::kBlocks);
  int32_t* const sources = reinterpret_cast<int32_t*>(shared + Shape::kSources);
  // In place of all that.
  const FloatTile<kHeadDim> d_v_result{reinterpret_cast<float*>(shared)};
  const FloatTile<kHeadDim> d_k_result{d_v_result.data + kKeys * FloatTile<kHeadDim>::kStride};

  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const int32_t num_blocks = p.frame.keys.num_blocks;
  const int32_t parts = (p.block_k + kKeys - 1) / kKeys;  // of a key block, a CTA each
  const int32_t at = static_cast<int32_t>(blockIdx.x) / parts;
  const int32_t j = at % num_blocks, pair = at / num_blocks;
  const int32_t b = pair / p.frame.num_kv_heads, h_kv = pair % p.frame.num_kv_heads;
  const int32_t group = p.frame.group(), head_dim = p.frame.head_dim;
  const BlockInfo block = p.frame.keys.block(j);
  const int32_t row0 = static_cast<int32_t>(blockIdx.x) % parts * kKeys;
  if (row0 >= block.rows) return;
  const int32_t first = block.begin + row0;
  const int32_t num_keys = block.rows - row0 < kKeys ? block.rows - row0 : kKeys;
  const bool is_key_protected = block.is_protected != 0;
  const bool is_vectorised = p.q.is_vectorised && p.d_o.is_vectorised;
  const bool is_nothing = p.is_protected_only && p.frame.queries.table == nullptr;
  // Which warps do what alternates, so that CTAs that share a multiprocessor fit together.
  const bool is_first = (warp / 2 + static_cast<int>(blockIdx.x)) % 2 == 0;  // P, dV; else dS, dK
  const int warp_key = warp % 2 * 16 * kM;
  const bool is_idle = warp_key >= num_keys;

  const auto live = [&](int32_t g, int32_t i, const BlockInfo& queries) -> uint32_t {
    const int32_t h = h_kv * group + g;
    const uint32_t steps = all_steps<kStepRows>(queries.rows);
    if (queries.is_protected) return steps;
    if (p.is_protected_only) return 0;
    if (is_key_protected) return steps;
    if (!(p.map.sparse_weight(b, h, i, j, false) > 0.0f)) return 0;
    if (p.tile_bits.data == nullptr) return steps;
    uint32_t visible = 0;
    for (int g0 = 0; g0 < queries.rows; g0 += p.tile_bits.rows) {
      if (!group_bit(p.tile_bits, b, h, i, g0 / p.tile_bits.rows, j)) continue;
      const int end = g0 + p.tile_bits.rows < queries.rows ? g0 + p.tile_bits.rows : queries.rows;
      visible |= all_steps<kStepRows>(end) & ~((1u << (g0 / kStepRows)) - 1);
    }
    return visible;
  };
  const auto keep = [&](int entry, int32_t i) { blocks_shared[entry] = i; };
  const bool has_factors = p.stats.share != nullptr || p.map.is_soft || p.tile_bits.data != nullptr;
  // See effective_lse().
  const auto apply_factors = [&](float stat, const Step& step, int32_t h, int64_t row) -> float {
    const float share = p.stats.share == nullptr ? 1.0f : p.stats.share[row];
    if (!(share > kSmallestShare)) return is_first ? kInfinity : 0.0f;
    if (!is_first) return stat / share;
    const int32_t i = blocks_shared[step.entry];
    const BlockInfo queries = p.frame.queries.block(i);
    float factor = share;
    if (!is_key_protected && queries.is_protected == 0) {
      if (p.map.is_soft) factor *= p.map.sparse_weight(b, h, i, j, false);
      if (p.tile_bits.data != nullptr) {
        const int r = step.first + lane - queries.begin;
        if (!group_bit(p.tile_bits, b, h, i, r / p.tile_bits.rows, j)) factor = 0.0f;
      }
    }
    return effective_lse(stat, factor);
  };

  // Prologue.
  load_rows_async<kThreads>(KeyTile{origin}, p.k, p.k.head<T>(b, h_kv), first, num_keys, head_dim);
  load_rows_async<kThreads>(KeyTile{origin + kKeySize}, p.v, p.v.head<T>(b, h_kv), first, num_keys,
                            head_dim);
  for (int stage = 0; stage < 2 * kStages && head_dim < kHeadDim; ++stage) {
    clear_columns<kThreads>(QueryTile{stages + stage * kStageSize}, head_dim);
  }
  const LanePattern<kHeadDim> pattern(lane);
  const int own_at = (is_first ? 0 : kKeySize) + warp_key * kHeadDim + pattern.a;  // K or V
  const float scale_log2 = p.scale * kLog2E;
  uint4* const exchange = reinterpret_cast<uint4*>(shared + Shape::kExchange) +
                          warp % 2 * 2 * Shape::kFragments * kWarpSize + lane;
  constexpr int kExchangeSize = Shape::kFragments * kWarpSize;  // of a turn
#pragma unroll
  for (int f = 0; f < 2 * Shape::kFragments; ++f) exchange[f * kWarpSize] = make_uint4(0, 0, 0, 0);
  // What this thread fetches for a step: a row's lse or -delta, or where the row lies in memory.
  const bool is_stat = warp % 2 == 0;
  const T* const q_column = p.q.head<T>(b, h_kv * group) + Copy::col();
  const T* const d_o_column = p.d_o.head<T>(b, h_kv * group) + Copy::col();
  const uint32_t q_row_bytes = static_cast<uint32_t>(p.q.stride_n * sizeof(T));
  const uint32_t d_o_row_bytes = static_cast<uint32_t>(p.d_o.stride_n * sizeof(T));
  const bool is_column = Copy::col() < head_dim;
  float sum[kM][kHeadDim / 8][4] = {};  // dV or dK (16 kM, D)
  // From step n - 1: P^T, rounded, as A fragments (their bits); or dP^T - delta (16 kM, kStepRows).
  float carried[kM][kN][4] = {};
  StepList<kThreads, kStepRows, Shape::kEntries> steps(
      shared + Shape::kSteps, p.frame.queries, block.other_begin,
      is_nothing ? block.other_begin : block.other_end, group);
  // Rows of steps `turn`, `turn - 1`, `turn - 2`, `turn - 3`, a byte each; 0: none.
  uint32_t rows_ahead = 0;
  int32_t next_head = 0, after_head = 0;
  int stage = 0;  // of step `turn - 1`

  // Main loop: n = turn - 2.
  for (int turn = 0;; ++turn) {
    cp_async_wait<0>();
    __syncthreads();

    // Step `turn`: where its rows lie, and their statistics.
    const Step after = steps.next(live, keep);
    rows_ahead = rows_ahead << 8 | static_cast<uint32_t>(after.num_rows);
    next_head = after_head;
    after_head = steps.head();
    const int32_t position = after.first + (lane < after.num_rows ? lane : after.num_rows - 1);
    float fetched = is_stat ? (is_first ? kInfinity : 0.0f) : __int_as_float(position);
    if (is_stat && lane < after.num_rows) {
      const int32_t h = h_kv * group + after_head;
      const int64_t row =
          (static_cast<int64_t>(b) * p.frame.num_heads + h) * p.frame.queries.length + position;
      fetched = is_first ? p.stats.lse_log2[row] : -p.stats.delta[row];
      if (has_factors) fetched = apply_factors(fetched, after, h, row);
    }
    if (!is_stat && p.q.order != nullptr && after.num_rows > 0) {
      fetched = __int_as_float(p.q.order[position]);
    }

    // Step `turn - 1`: its copies, between the products.
    T* const next_stage = stages + stage * 2 * kStageSize;
    const bool has_next = (rows_ahead >> 8 & 0xff) != 0;
    const bool is_copying = has_next && is_vectorised && is_column;
    const int32_t* const next_rows = sources + (turn + kRing - 1) % kRing * kStepRows;
    int32_t rows[Copy::kCopies];
#pragma unroll
    for (int piece = 0; piece < Copy::kCopies; ++piece) rows[piece] = next_rows[Copy::row(piece)];
    const T* const q_from = q_column + next_head * p.q.stride_h;
    const T* const d_o_from = d_o_column + next_head * p.d_o.stride_h;
    const auto copy = [&](int item) {
      const int piece = item / 2;
      const bool is_d_o = item % 2 != 0;
      const QueryTile tile{is_d_o ? next_stage + kStageSize : next_stage};
      const uint64_t offset =
          uint64_t{static_cast<uint32_t>(rows[piece])} * (is_d_o ? d_o_row_bytes : q_row_bytes);
      const void* const from = reinterpret_cast<const char*>(is_d_o ? d_o_from : q_from) + offset;
      if (is_copying) cp_async_16(tile.at(Copy::row(piece), Copy::col()), from, true);
    };
    if (has_next && !is_vectorised) {
      for (int idx = thread; idx < kStepRows * head_dim; idx += kThreads) {
        const int r = idx / head_dim, c = idx % head_dim;
        const int64_t row = next_rows[r];
        *QueryTile{next_stage}.at(r, c) =
            p.q.head<T>(b, h_kv * group + next_head)[row * p.q.stride_n + c];
        *QueryTile{next_stage + kStageSize}.at(r, c) =
            p.d_o.head<T>(b, h_kv * group + next_head)[row * p.d_o.stride_n + c];
      }
    }

    const bool has_now = (rows_ahead >> 16 & 0xff) != 0, has_last = rows_ahead >> 24 != 0;
    if (!is_idle && (has_now || has_last)) {
      // At the ends a step is missing: what stands in for the next one is not used, and what stands
      // in for the last one is multiplied by zeros, so its tile must be one that has been filled.
      const int now_stage = stage == 0 ? kStages - 1 : stage - 1;
      const int last_stage = !has_last ? now_stage : now_stage == 0 ? kStages - 1 : now_stage - 1;
      const int q_at = (is_first ? now_stage : last_stage) * 2 * kStageSize;
      const int d_o_at = (is_first ? last_stage : now_stage) * 2 * kStageSize;
      const T* const q_tile = stages;
      const T* const d_o_tile = stages + kStageSize;
      const float* const now_stats =
          stats + (turn + kRing - 2) % kRing * 2 * kStepRows + lane % 4 * 2;
      uint32_t fragments[kM][kK][4];  // P^T or dS^T of step n - 1, rounded (16 kM, kStepRows)
      if (is_first) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int k = 0; k < kK; ++k) {
#pragma unroll
            for (int c = 0; c < 4; ++c) fragments[m][k][c] = __float_as_uint(carried[m][k][c]);
          }
        }
        float x[kM][kN][4] = {};  // S^T, then P^T (16 kM, kStepRows)
        multiply_rows<T, kHeadDim>(x, origin, own_at, q_tile, q_at + pattern.b, [&](int step) {
          spread<2 * Copy::kCopies, kColSteps>(step, copy);
        });
        multiply_fragments(sum, fragments, d_o_tile, d_o_at + pattern.a, [&](int step) {
          spread<kM * kN, kK * kColSteps>(step, [&](int item) {
            const int n = item / (2 * kM) * 2 + item % 2, m = item / 2 % kM;
            const float2 lse = *reinterpret_cast<const float2*>(now_stats + 8 * n);
            x[m][n][0] = exp2_approx(fmaf(x[m][n][0], scale_log2, -lse.x));
            x[m][n][1] = exp2_approx(fmaf(x[m][n][1], scale_log2, -lse.y));
            x[m][n][2] = exp2_approx(fmaf(x[m][n][2], scale_log2, -lse.x));
            x[m][n][3] = exp2_approx(fmaf(x[m][n][3], scale_log2, -lse.y));
            if (item % 2 == 0) return;
            uint32_t f[4];
            round_fragment<T>(f, x[m][n - 1], x[m][n]);
            exchange[turn % 2 * kExchangeSize + (m * kK + n / 2) * kWarpSize] =
                make_uint4(f[0], f[1], f[2], f[3]);
#pragma unroll
            for (int c = 0; c < 4; ++c) carried[m][n / 2][c] = __uint_as_float(f[c]);
          });
        });
      } else {
        float x[kM][kN][4];  // dP^T - delta (16 kM, kStepRows)
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float2 delta = *reinterpret_cast<const float2*>(now_stats + kStepRows + 8 * n);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            x[m][n][0] = x[m][n][2] = delta.x;
            x[m][n][1] = x[m][n][3] = delta.y;
          }
        }
        multiply_rows<T, kHeadDim>(x, origin, own_at, d_o_tile, d_o_at + pattern.b, [&](int step) {
          spread<2 * Copy::kCopies, kColSteps>(step, copy);
          spread<kM * kK, kColSteps>(step, [&](int item) {
            const int m = item / kK, k = item % kK;
            const uint4 shared_p =
                exchange[(turn + 1) % 2 * kExchangeSize + (m * kK + k) * kWarpSize];
            const uint32_t pairs[4] = {shared_p.x, shared_p.y, shared_p.z, shared_p.w};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float2 p_t = unpack<T>(pairs[c]);
              const float (&d_p)[4] = carried[m][2 * k + c / 2];
              fragments[m][k][c] = pack<T>(p_t.x * d_p[c % 2 * 2], p_t.y * d_p[c % 2 * 2 + 1]);
            }
          });
        });
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) carried[m][n][c] = x[m][n][c];
          }
        }
        multiply_fragments(sum, fragments, q_tile, q_at + pattern.a, [](int) {});
      }
    } else {
#pragma unroll
      for (int item = 0; item < 2 * Copy::kCopies; ++item) copy(item);
    }
    cp_async_commit();

    float* const to = is_stat ? stats + (turn % kRing * 2 + (is_first ? 0 : 1)) * kStepRows
                              : reinterpret_cast<float*>(sources) + turn % kRing * kStepRows;
    if (lane < kStepRows && (is_stat || is_first)) to[lane] = fetched;
    if ((rows_ahead & 0xffffff) == 0) break;
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  // Epilogue.
  __syncthreads();
  (is_first ? d_v_result : d_k_result).put(sum, warp_key, lane);
  __syncthreads();
  const float* const d_k_mean =
      p.d_k_mean == nullptr
          ? nullptr
          : p.d_k_mean +
                (static_cast<int64_t>(pair) * p.frame.keys.num_sequences + block.sequence) *
                    head_dim;
  store_rows<kThreads>(d_v_result, RowOutput{1.0f, nullptr, nullptr, p.adds_linear}, p.d_v,
                       p.d_v.head<T>(b, h_kv), first, num_keys, head_dim);
  store_rows<kThreads>(d_k_result, RowOutput{p.scale, nullptr, d_k_mean, p.adds_linear}, p.d_k,
                       p.d_k.head<T>(b, h_kv), first, num_keys, head_dim);
}

template <class T, class Shape>
void launch_columns(const SparseBackward& given, void* stream) {
  SparseBackward params = given;
  count_rows_in_32_bits(params.q);
  count_rows_in_32_bits(params.d_o);
  const int64_t parts = (params.block_k + Shape::kKeys - 1) / Shape::kKeys;
  const int64_t blocks = static_cast<int64_t>(params.frame.batch) * params.frame.num_kv_heads *
                         params.frame.keys.num_blocks * parts;
  launch(columns_kernel<T, Shape>, LaunchShape{blocks, Shape::kThreads, Shape::kTotal}, stream,
         params);
}

template <class T>
void launch_columns_of(const SparseBackward& params, void* stream) {
  if (params.frame.head_dim <= 64) {
    launch_columns<T, ColumnsShape<64, 2, 32, 3>>(params, stream);
  } else if (params.frame.head_dim <= 128) {
    launch_columns<T, ColumnsShape<128, 2, 32, 2>>(params, stream);
  } else {
    launch_columns<T, ColumnsShape<256, 1, 16, 2>>(params, stream);
  }
}

}  // namespace
}  // namespace backward

void sparse_backward_columns(const SparseBackward& params, void* stream) {
  if (params.dtype == DType::kBF16) {
    backward::launch_columns_of<bf16>(params, stream);
  } else {
    backward::launch_columns_of<fp16>(params, stream);
  }
}

}  // namespace sparline::cuda
