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
// In a turn the first two warps work on step n and the other two on step n - 1, whose P^T lies
// ready by then, so that a turn needs one barrier and no warp carries numbers from one to the next:
//   first:   S_n, P_n = exp(S_n - lse), dV += P_n^T dO_n
//   second:  dP_{n-1}, dS_{n-1} = P_{n-1} (dP_{n-1} - delta), dK += dS_{n-1}^T Q_{n-1}
// The second two also copy the rows of the next step: the exponentials take the first as long.
// What comes between two products is done for the first 16 rows of the step before the second
// product, and for the others under it.
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
  static_assert(kStepRows <= kWarpSize, "a lane for each row");

  // Shared memory, in bytes.
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;                // K, V
  static constexpr int kTileBytes = kStepRows * kHeadDim * 2;           // Q, dO
  static constexpr int kStageBytes = 2 * kTileBytes;                    // both
  static constexpr int kStats = 2 * kKeyBytes + kStages * kStageBytes;  // rings: lse, delta,
  static constexpr int kSources = kStats + 2 * 4 * kRingRows;           // memory rows
  static constexpr int kExchange = kSources + 4 * kRingRows;            // P^T; two of them
  static constexpr int kExchangeBytes = 2 * kFragments * kWarpSize * 16;
  static constexpr int kSteps = kExchange + 2 * kExchangeBytes;
  using Steps = StepList<kThreads, kStepRows, kStepRows == 32 ? 4 : 2>;
  static constexpr int kPlace = kSteps + Steps::kBytes;
  static constexpr int kTotal = kPlace + 32;
  static_assert(2 * kKeys * FloatTile<kHeadDim>::kStride * 4 <= kPlace);
  static_assert(kTotal <= 99 * 1024);
};

/// The keys of a CTA. Kept in shared memory: the main loop has no register to spare for it.
struct ColumnPlace {
  int32_t b, h_kv, j;
  int32_t first, num_keys;
  int32_t sequence;
  bool is_protected;
};
static_assert(sizeof(ColumnPlace) <= 32);

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinCtas)
    columns_kernel(const SparseBackward p) {
  begin_kernel();
  constexpr int kThreads = Shape::kThreads, kKeys = Shape::kKeys, kM = Shape::kM;
  constexpr int kStepRows = Shape::kStepRows, kHeadDim = Shape::kHeadDim;
  constexpr int kN = kStepRows / 8, kK = kStepRows / 16;
  constexpr int kColSteps = kHeadDim / 16;
  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using QueryTile = SharedTile<T, kStepRows, kHeadDim>;
  using Copy = StepCopy<kThreads / 2, kStepRows, kHeadDim>;

  SPARLINE_DYNAMIC_SHARED(shared);
  const KeyTile k_tile{reinterpret_cast<T*>(shared)};
  const KeyTile v_tile{reinterpret_cast<T*>(shared + Shape::kKeyBytes)};
  // In place of all that.
  const FloatTile<kHeadDim> d_v_result{reinterpret_cast<float*>(shared)};
  const FloatTile<kHeadDim> d_k_result{d_v_result.data + kKeys * FloatTile<kHeadDim>::kStride};

  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const int32_t num_blocks = p.frame.keys.num_blocks;
  const int32_t parts = (p.block_k + kKeys - 1) / kKeys;  // of a key block, a CTA each
  const int32_t j_of_all = static_cast<int32_t>(blockIdx.x) / parts;
  const int32_t row0 = static_cast<int32_t>(blockIdx.x) % parts * kKeys;
  const BlockInfo block = p.frame.keys.block(j_of_all % num_blocks);
  if (row0 >= block.rows) return;
  ColumnPlace& at = *reinterpret_cast<ColumnPlace*>(shared + Shape::kPlace);
  if (thread == 0) {
    const int32_t pair = j_of_all / num_blocks, rest = block.rows - row0;
    at = {.b = pair / p.frame.num_kv_heads,
          .h_kv = pair % p.frame.num_kv_heads,
          .j = j_of_all % num_blocks,
          .first = block.begin + row0,
          .num_keys = rest < kKeys ? rest : kKeys,
          .sequence = block.sequence,
          .is_protected = block.is_protected != 0};
  }
  __syncthreads();
  const int32_t group = p.frame.group(), head_dim = p.frame.head_dim;
  const bool is_vectorised = p.q.is_vectorised && p.d_o.is_vectorised;
  const bool is_nothing = p.is_protected_only && p.frame.queries.table == nullptr;
  // Which warps do what alternates, so that CTAs that share a multiprocessor fit together.
  const bool is_first = (warp / 2 + static_cast<int>(blockIdx.x)) % 2 == 0;  // P, dV; else dS, dK
  const int warp_key = warp % 2 * 16 * kM;
  const bool is_idle = warp_key >= at.num_keys;

  const auto live = [&](int32_t g, int32_t i, const BlockInfo& queries) -> uint32_t {
    const int32_t h = at.h_kv * group + g;
    const uint32_t steps = all_steps<kStepRows>(queries.rows);
    if (queries.is_protected) return steps;
    if (p.is_protected_only) return 0;
    if (at.is_protected) return steps;
    if (!(p.map.sparse_weight(at.b, h, i, at.j, false) > 0.0f)) return 0;
    if (p.tile_bits.data == nullptr) return steps;
    uint32_t visible = 0;
    for (int g0 = 0; g0 < queries.rows; g0 += p.tile_bits.rows) {
      if (!group_bit(p.tile_bits, at.b, h, i, g0 / p.tile_bits.rows, at.j)) continue;
      const int end = g0 + p.tile_bits.rows < queries.rows ? g0 + p.tile_bits.rows : queries.rows;
      visible |= all_steps<kStepRows>(end) & ~((1u << (g0 / kStepRows)) - 1);
    }
    return visible;
  };

  // Prologue.
  load_rows_async<kThreads>(k_tile, p.k, p.k.head<T>(at.b, at.h_kv), at.first, at.num_keys,
                            head_dim);
  load_rows_async<kThreads>(v_tile, p.v, p.v.head<T>(at.b, at.h_kv), at.first, at.num_keys,
                            head_dim);
  unsigned char* const stages = shared + 2 * Shape::kKeyBytes;
  for (int stage = 0; stage < Shape::kStages && head_dim < kHeadDim; ++stage) {
    unsigned char* const tiles = stages + stage * Shape::kStageBytes;
    clear_columns<kThreads>(QueryTile{reinterpret_cast<T*>(tiles)}, head_dim);
    clear_columns<kThreads>(QueryTile{reinterpret_cast<T*>(tiles + Shape::kTileBytes)}, head_dim);
  }
  const Copy copies(thread % (kThreads / 2));
  const LanePattern<kHeadDim> pattern(lane);
  const SharedAddress origin = shared_address(shared);
  const SharedAddress own =  // K or V
      origin + static_cast<uint32_t>((is_first ? 0 : Shape::kKeyBytes) + warp_key * kHeadDim * 2) +
      pattern.a;
  // Where a lane leaves P^T, and the same lane of its partner finds it.
  unsigned char* const exchange =
      shared + Shape::kExchange + (warp % 2 * Shape::kFragments * kWarpSize + lane) * 16;
  float* const lse_ring = reinterpret_cast<float*>(shared + Shape::kStats);
  float* const delta_ring = lse_ring + kRingRows;
  int32_t* const sources = reinterpret_cast<int32_t*>(shared + Shape::kSources);
  const float scale_log2 = fmaxf(p.scale * kLog2E, kLeastScale);

  const bool has_order = p.q.order != nullptr;
  const bool has_factors = p.map.is_soft || p.tile_bits.data != nullptr;
  /// The numbers of the block's rows, a thread each.
  const auto open = [&](int slot, int32_t g, int32_t i, const BlockInfo& queries) {
    static_assert(kThreads == kMaxRows);
    const int32_t h = at.h_kv * group + g;
    const int place = slot * kMaxRows + thread;
    const bool is_row = thread < queries.rows;
    const int32_t position = queries.begin + (is_row ? thread : queries.rows - 1);
    const int64_t row = (int64_t{at.b} * p.frame.num_heads + h) * p.frame.queries.length + position;
    cp_async_4(shared_address(delta_ring + place), p.stats.delta + row);
    if (has_order) cp_async_4(shared_address(sources + place), p.q.order + position);
    if (!is_row) {
      lse_ring[place] = kInfinity;
    } else if (!has_factors || at.is_protected || queries.is_protected != 0) {
      cp_async_4(shared_address(lse_ring + place), p.stats.lse_log2 + row);
    } else {
      float factor = p.map.sparse_weight(at.b, h, i, at.j, false);
      if (p.tile_bits.data != nullptr &&
          !group_bit(p.tile_bits, at.b, h, i, thread / p.tile_bits.rows, at.j)) {
        factor = 0.0f;
      }
      lse_ring[place] = effective_lse(p.stats.lse_log2[row], factor);
    }
  };
  const T* q_from;  // this thread's column of the head
  const T* d_o_from;
  const auto point_to_head = [&](int32_t g) {
    q_from = p.q.head<T>(at.b, at.h_kv * group + g) + copies.col;
    d_o_from = p.d_o.head<T>(at.b, at.h_kv * group + g) + copies.col;
  };
  point_to_head(0);
  const uint32_t q_row_bytes = static_cast<uint32_t>(p.q.stride_n * sizeof(T));
  const uint32_t d_o_row_bytes = static_cast<uint32_t>(p.d_o.stride_n * sizeof(T));
  const bool is_column = !is_first && is_vectorised && copies.col < head_dim;

  float sum[kM][kHeadDim / 8][4] = {};  // dV or dK (16 kM, D)
  typename Shape::Steps steps(shared + Shape::kSteps, p.frame.queries, block.other_begin,
                              is_nothing ? block.other_begin : block.other_end, group);
  Step next{}, after{};  // steps turn - 1 and turn
  int32_t next_head = 0;
  StepsAhead ahead;
  // Of steps turn - 1, turn - 2 and turn - 3.
  SharedAddress next_stage = shared_address(stages);
  SharedAddress now_stage = next_stage + 2 * Shape::kStageBytes;
  SharedAddress last_stage = next_stage + Shape::kStageBytes;

  // Main loop: n = turn - 2.
  for (int turn = 0;; ++turn) {
    cp_async_wait<0>();
    __syncthreads();

    // Step `turn`: its numbers.
    next = after;
    if (next_head != steps.head()) point_to_head(next_head = steps.head());
    after = steps.next(live, open);
    ahead.push(after);

    // Step `turn - 1`: its rows, between the products.
    const bool is_copying = is_column && next.num_rows > 0;
    const SharedAddress copy_to = next_stage + copies.first_bytes();
    uint32_t row = 0;
    const auto copy = [&](int item) {
      const int piece = item / 2;
      const bool is_d_o = item % 2 != 0;
      if (!is_d_o) {
        const int r = copies.row(piece) < next.num_rows ? copies.row(piece) : next.num_rows - 1;
        row = static_cast<uint32_t>(has_order ? sources[next.place + copies.row(piece)]
                                              : next.first + r);
      }
      const uint64_t offset = uint64_t{row} * (is_d_o ? d_o_row_bytes : q_row_bytes);
      const void* const from = reinterpret_cast<const char*>(is_d_o ? d_o_from : q_from) + offset;
      const SharedAddress to = copy_to + (is_d_o ? Shape::kTileBytes : 0);
      if (is_copying) cp_async_16(Copy::target(to, piece), from);
    };
    if (!is_vectorised && next.num_rows > 0) {
      unsigned char* const tiles = stages + (next_stage - shared_address(stages));
      const QueryTile q_tile{reinterpret_cast<T*>(tiles)};
      const QueryTile d_o_tile{reinterpret_cast<T*>(tiles + Shape::kTileBytes)};
      const T* const q_head = p.q.head<T>(at.b, at.h_kv * group + next_head);
      const T* const d_o_head = p.d_o.head<T>(at.b, at.h_kv * group + next_head);
      for (int idx = thread; idx < kStepRows * head_dim; idx += kThreads) {
        const int r = idx / head_dim, c = idx % head_dim;
        const int32_t n = next.first + (r < next.num_rows ? r : next.num_rows - 1);
        *q_tile.at(r, c) = q_head[p.q.offset(n) + c];
        *d_o_tile.at(r, c) = d_o_head[p.d_o.offset(n) + c];
      }
    }

    const int lag = is_first ? 2 : 3;
    if (is_idle || ahead.num_rows(lag) == 0) {
#pragma unroll
      for (int item = 0; item < 2 * Copy::kCopies && !is_first; ++item) copy(item);
    } else if (is_first) {
      const float* const lse = lse_ring + ahead.place(2) + lane % 4 * 2;
      unsigned char* const to = exchange + turn % 2 * Shape::kExchangeBytes;
      float x[kM][kN][4] = {};  // S^T, then P^T (16 kM, kStepRows)
      uint32_t p_t[kM][kK][4];  // P^T, rounded
      float2 row_lse[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) row_lse[n] = *reinterpret_cast<const float2*>(lse + 8 * n);
      multiply_rows<T, kHeadDim>(x, own, now_stage + pattern.b, [](int) {});
      const auto make = [&](int m, int k) {
#pragma unroll
        for (int n = 2 * k; n < 2 * k + 2; ++n) {
          x[m][n][0] = exp2_approx(fmaf(x[m][n][0], scale_log2, -row_lse[n].x));
          x[m][n][1] = exp2_approx(fmaf(x[m][n][1], scale_log2, -row_lse[n].y));
          x[m][n][2] = exp2_approx(fmaf(x[m][n][2], scale_log2, -row_lse[n].x));
          x[m][n][3] = exp2_approx(fmaf(x[m][n][3], scale_log2, -row_lse[n].y));
        }
        round_fragment<T>(p_t[m][k], x[m][2 * k], x[m][2 * k + 1]);
        *reinterpret_cast<uint4*>(to + (m * kK + k) * kWarpSize * 16) =
            make_uint4(p_t[m][k][0], p_t[m][k][1], p_t[m][k][2], p_t[m][k][3]);
      };
#pragma unroll
      for (int m = 0; m < kM; ++m) make(m, 0);
      multiply_fragments<T>(sum, p_t, now_stage + Shape::kTileBytes + pattern.a, [&](int step) {
        if (step / kColSteps + 1 == kK) return;
        spread<kM, kColSteps>(step % kColSteps, [&](int m) { make(m, step / kColSteps + 1); });
      });
    } else {
      const float* const delta = delta_ring + ahead.place(3) + lane % 4 * 2;
      const unsigned char* const from = exchange + (turn + 1) % 2 * Shape::kExchangeBytes;
      float x[kM][kN][4];         // dP^T - delta, then dS^T (16 kM, kStepRows)
      uint32_t d_s_t[kM][kK][4];  // dS^T, rounded
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 row_delta = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          x[m][n][0] = x[m][n][2] = -row_delta.x;
          x[m][n][1] = x[m][n][3] = -row_delta.y;
        }
      }
      multiply_rows<T, kHeadDim>(x, own, last_stage + Shape::kTileBytes + pattern.b, [&](int step) {
        spread<2 * Copy::kCopies, kColSteps>(step, copy);
      });
      const auto make = [&](int m, int k) {
        const uint4 p_t = *reinterpret_cast<const uint4*>(from + (m * kK + k) * kWarpSize * 16);
        const uint32_t pairs[4] = {p_t.x, p_t.y, p_t.z, p_t.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float2 pair = unpack<T>(pairs[c]);
          const float (&d_p)[4] = x[m][2 * k + c / 2];
          d_s_t[m][k][c] = pack<T>(pair.x * d_p[c % 2 * 2], pair.y * d_p[c % 2 * 2 + 1]);
        }
      };
#pragma unroll
      for (int m = 0; m < kM; ++m) make(m, 0);
      multiply_fragments<T>(sum, d_s_t, last_stage + pattern.a, [&](int step) {
        if (step / kColSteps + 1 == kK) return;
        spread<kM, kColSteps>(step % kColSteps, [&](int m) { make(m, step / kColSteps + 1); });
      });
    }
    cp_async_commit();
    if ((ahead.rows & 0xffffff) == 0) break;
    const SharedAddress free_stage = last_stage;
    last_stage = now_stage;
    now_stage = next_stage;
    next_stage = free_stage;
  }

  // Epilogue, in place of tiles that a CTA without a step has not waited for.
  cp_async_wait<0>();
  __syncthreads();
  (is_first ? d_v_result : d_k_result).put(sum, warp_key, lane);
  __syncthreads();
  const float* d_k_mean = p.d_k_mean;
  if (d_k_mean != nullptr) {
    const int64_t pair = int64_t{at.b} * p.frame.num_kv_heads + at.h_kv;
    d_k_mean += (pair * p.frame.keys.num_sequences + at.sequence) * head_dim;
  }
  store_rows<kThreads>(d_v_result, RowOutput{1.0f, nullptr, nullptr, p.adds_linear}, p.d_v,
                       p.d_v.head<T>(at.b, at.h_kv), at.first, at.num_keys, head_dim);
  store_rows<kThreads>(d_k_result, RowOutput{p.scale, nullptr, d_k_mean, p.adds_linear}, p.d_k,
                       p.d_k.head<T>(at.b, at.h_kv), at.first, at.num_keys, head_dim);
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
