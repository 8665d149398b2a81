// SPDX-License-Identifier: Apache-2.0
//
// The sparse branch of one query block in low bit, forward (SageAttention2++). Over its critical
// key blocks j, with codes and steps of q (made here), k and v (quantise.cu)
//     S = scale delta_q delta_k q_code k_code^T          products of int8, exact sums
//     P = exp(S - m),  o_s = delta_v e4m3(P_r P) v_code / (P_r l),  l = sum P (not rounded)
// The shape is that of sparse_fwd.cuh: one CTA for one query block, a warp owns kWarpRows rows and
// all keys of a tile, S and P stay in registers. A tile is a whole key block where that has more
// than 64 keys too: the maximum that P is relative to is part of what is computed.
//
// P V. Devices that multiply e4m3 elements do so. On others both are converted to fp16, which holds
// e4m3 values exactly: the result is the same but for the order of summation. The products of one
// tile are summed from zero and then added to o, times the factor that a new maximum asks for: no
// long sums in the accumulators of the tensor cores, which keep fewer bits than float32 on some
// devices, and no instruction more than the factor alone takes.
//
// Sums of int8 products become float32 without a conversion, which would take more time than the
// exponentials: they start from the integer whose bits are those of 1.5 2^23 in float32, where a
// unit of the integer is 1.
#pragma once

#include "cuda/common/low_bit.cuh"
#include "cuda/sm80/tile_policy.cuh"

namespace sparline::cuda {

constexpr float kSumZero = 0x1.8p23f;
constexpr int32_t kSumZeroBits = 0x4b400000;

/// kStages 1: V arrives during Q K^T and the next K during P V, at two barriers a tile. 2: the next
/// K and V arrive during the whole of a tile, at one barrier.
template <int kHeadDim_, int kTileQ_, int kTileK_, int kWarpRows_, int kStages_>
struct LowBitTraits {
  static constexpr int kHeadDim = kHeadDim_, kTileQ = kTileQ_, kTileK = kTileK_;
  static constexpr int kWarpRows = kWarpRows_, kStages = kStages_;
  static constexpr int kWarps = kTileQ / kWarpRows, kThreads = kWarps * kWarpSize;
  static constexpr int kMTiles = kWarpRows / 16;  // of 16 rows, the height of an mma
  // Registers for two or three blocks on a multiprocessor, where the output leaves that many. Codes
  // that are converted by bit operations take more of them.
  static constexpr int kMinBlocks = kWarps > 4 ? 1 : kHeadDim <= 64 && kHasE4m3 ? 3 : 2;

  static constexpr int kQueryBytes = kTileQ * kHeadDim;  // of codes
  static constexpr int kTileBytes = kTileK * kHeadDim;   // of codes
  static constexpr int kCodeBytes = kQueryBytes + 2 * kStages * kTileBytes;
  // At the end o, of 16-bit elements, lies over the codes.
  using OutputTile = SharedTile<uint16_t, kTileQ, kHeadDim>;
  static_assert(OutputTile::kBytes <= kCodeBytes);

  static int64_t shared_bytes(const SparseForward& params) {
    return kCodeBytes + RowScan::bytes(params.frame.keys.num_blocks) +
           TilePolicy<LowBitTraits>::kept_bytes(params);
  }
};

/// Where a CTA works, and scalars of its rows: in shared memory, as the main loop has no register
/// to spare for them.
template <class Traits>
struct LowBitPlace : QueryPlace {
  typename TilePolicy<Traits>::Shared policy;
  int32_t pair;                        // of the wave
  int32_t first_key_block;             // of the pair, of all in the wave
  float p_range_log2;                  // log2 P_r
  float q_scale[Traits::kTileQ / 16];  // scale delta_q log2(e), of 16 rows each
};

template <class Traits>
class LowBitBlock {
  static constexpr int kHeadDim = Traits::kHeadDim, kTileQ = Traits::kTileQ;
  static constexpr int kTileK = Traits::kTileK, kStages = Traits::kStages;
  static constexpr int kMTiles = Traits::kMTiles, kThreads = Traits::kThreads;
  static constexpr int kNTiles = kTileK / 8, kGroups = kTileK / kCodeGroup;
  static constexpr int kGroupBytes = kCodeGroup * kHeadDim;
  // P as fragments A: e4m3 of 32 keys or fp16 of 16 each.
  static constexpr int kPTiles = kHasE4m3Mma ? kTileK / 32 : kTileK / 16;
  using Policy = TilePolicy<Traits>;

 public:
  __device__ LowBitBlock(const SparseForward& params, unsigned char* shared,
                         LowBitPlace<Traits>& at)
      : p_(params),
        at_(at),
        lane_(lane_index()),
        warp_row_(warp_index() * Traits::kWarpRows),
        shared_(shared),
        scan_(reinterpret_cast<uint32_t*>(shared + Traits::kCodeBytes),
              params.frame.keys.num_blocks),
        policy_(params, at, at.policy, scan_.end()) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) row_max_[mt][0] = row_max_[mt][1] = -INFINITY;
  }

  __device__ void run() {
    const bool is_computed = !p_.is_protected_only || at_.block.is_protected;
    policy_.start();
    if (!is_computed) {
      store_lse_of_nothing();
      policy_.finish();
      return;
    }
    scan_.template fill<kThreads>(p_.frame, p_.map, p_.tile_bits, at_.b, at_.h, at_.i, at_.block);
    int32_t next = next_visit(first_visit());
    if (next < end_visit()) start_loads(next, 0);
    cp_async_commit();
    p_.dtype == DType::kBF16 ? quantise_queries<bf16>() : quantise_queries<fp16>();

    for (int turn = 0; next < end_visit(); turn ^= 1) {
      const int stage = kStages == 1 ? 0 : turn;
      const KeyTile tile = tile_of(next);
      const float k_step = k_step_;
      const bool is_forced = at_.block.is_protected || tile.is_protected;
      auto out = policy_.unseen(tile.block, is_forced);
      next = next_visit(next + 1);
      cp_async_wait<0>();
      __syncthreads();  // this tile's keys are here; all warps are done with the tile before
      if constexpr (kStages == 1) {
        load_codes(v_tile(0), p_.v_codes, tile.block);
      } else if (next < end_visit()) {
        start_loads(next, turn ^ 1);
      }
      cp_async_commit();
      // A warp that has no rows only helps to load, where no barrier follows.
      if (kStages > 1 && warp_row_ >= at_.block.rows && !policy_.has_skip()) continue;

      Scores<kMTiles, kNTiles> s;  // 16 x 8 each
      scores(s, k_tile(stage));
      mask_keys<kMTiles, kNTiles>(s, tile.num_keys);
      float scale[kMTiles];    // to log2 units
      float tops[kMTiles][2];  // of each row, in log2 units
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        // A masked score must not become -inf 0.
        scale[mt] = fmaxf(at_.q_scale[warp_row_ / 16 + mt] * k_step, 0x1p-126f);
#pragma unroll
        for (int half = 0; half < 2; ++half) tops[mt][half] = row_top(s[mt], half) * scale[mt];
      }
      if (policy_.has_skip()) {
        out = policy_.skipped(tile.block, is_forced, tops, row_max_, row_sum_, at_.p_range_log2,
                              turn);
      }
      if constexpr (kStages == 1) {
        cp_async_wait<0>();
        __syncthreads();  // the values are here; all warps are done with the keys
        if (next < end_visit()) start_loads(next, 0);
        cp_async_commit();
      }
      if (__all_sync(kAllLanes, out == Policy::kAllRows)) continue;
      uint32_t p[kMTiles][kPTiles][4];
      float rescale[kMTiles][2];
      softmax(s, scale, tops, out, p, rescale);
      add_values(p, rescale, v_tile(stage));
    }
    cp_async_wait<0>();
    __syncthreads();  // all warps are done with the codes
    finish();
    policy_.finish();
  }

 private:
  // Key blocks are visited in the order of numbers n: ascending, or order[n].
  __device__ int32_t first_visit() const {
    return p_.tile_order == nullptr ? at_.block.other_begin : 0;
  }
  __device__ int32_t end_visit() const {
    return p_.tile_order == nullptr ? at_.block.other_end : p_.frame.keys.num_blocks;
  }
  __device__ int32_t block_of(int32_t n) const {
    return p_.tile_order == nullptr ? n : p_.tile_order[at_.i * p_.tile_order_stride + n];
  }
  /// The first number from n on whose block is attended.
  __device__ int32_t next_visit(int32_t n) const {
    if (p_.tile_order == nullptr) return scan_.next(n, end_visit());
    while (n < end_visit() && !scan_.has(block_of(n))) ++n;
    return n;
  }
  __device__ KeyTile tile_of(int32_t n) const {
    const int32_t j = block_of(n);
    const BlockInfo block = p_.frame.keys.block(j);
    return {j, block.begin, block.rows, block.is_protected != 0};
  }
  __device__ uint8_t* k_tile(int stage) const {
    return shared_ + Traits::kQueryBytes + stage * Traits::kTileBytes;
  }
  __device__ uint8_t* v_tile(int stage) const { return k_tile(kStages + stage); }
  /// The row of the block that element 2 half, 2 half + 1 of m-tile mt belongs to.
  __device__ int row_of(int mt, int half) const {
    return warp_row_ + mt * 16 + half * 8 + lane_ / 4;
  }

  // Loads ----------------------------------------------------------------------------------------

  /// Visit n: the keys, with two stages the values too, and the step.
  __device__ void start_loads(int32_t n, int stage) {
    const int32_t j = block_of(n);
    load_codes(k_tile(stage), reinterpret_cast<const uint8_t*>(p_.k_codes), j);
    if constexpr (kStages > 1) load_codes(v_tile(stage), p_.v_codes, j);
    k_step_ = p_.k_steps[at_.first_key_block + j];
  }
  /// A block with its padding, zeros after it.
  __device__ void load_codes(uint8_t* shared_tile, const uint8_t* codes, int32_t j) const {
    constexpr int kStep = kThreads * 16;
    const int bytes = padded_keys(p_.frame.keys) * kHeadDim;
    const int first = static_cast<int>(threadIdx.x) * 16;
    const uint8_t* const source = codes + int64_t{at_.first_key_block + j} * bytes + first;
#pragma unroll
    for (int n = 0; n < Traits::kTileBytes; n += kStep) {
      cp_async_16(shared_tile + first + n, source + n, first + n < bytes);
    }
  }

  /// q of the warp's rows as codes in shared memory, in groups of 16 rows like k_codes; their steps
  /// in at_.q_scale. Straight from memory to registers: a lane has 16 columns of a row at a time.
  template <class T>
  __device__ void quantise_queries() {
    constexpr int kColumns = 16, kItems = kHeadDim / kColumns / 2;
    __shared__ float peaks[kTileQ / 16];
    const int32_t head_dim = p_.frame.head_dim;
    const uint16_t* const head = p_.q.template head<const uint16_t>(at_.b, at_.h);
    uint32_t pairs[kMTiles][kItems][kColumns / 2];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      const int r = warp_row_ + mt * 16 + lane_ % 16;
      const bool is_valid = r < at_.block.rows;
      const uint16_t* const row = is_valid ? head + p_.q.offset(at_.block.begin + r) : head;
      float peak = 0.0f;
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        const int col = (2 * n + lane_ / 16) * kColumns;
        load_elements<kColumns>(pairs[mt][n], row, col, head_dim, is_valid, p_.q.is_vectorised);
      }
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
#pragma unroll
        for (int c = 0; c < kColumns / 2; ++c) {
          const float2 x = to_floats<T>(pairs[mt][n][c]);
          peak = fmaxf(peak, fmaxf(fabsf(x.x), fabsf(x.y)));
        }
      }
      peak = warp_max(peak);
      if (lane_ == 0) peaks[warp_row_ / 16 + mt] = peak;
    }
    __syncthreads();
    const int rows = p_.low_bit.q_rows > 0 ? p_.low_bit.q_rows : p_.block_q;
    const int tiles_together = (rows + 15) / 16;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      const int m_tile = warp_row_ / 16 + mt, first = m_tile / tiles_together * tiles_together;
      float peak = 0.0f;
      for (int n = first; n < first + tiles_together && n < kTileQ / 16; ++n) {
        peak = fmaxf(peak, peaks[n]);
      }
      const float step = step_of(peak, 127.0f);
      if (lane_ == 0) at_.q_scale[m_tile] = step * (p_.scale * kLog2E);
      const Divisor divisor(step);
      uint4* const codes = reinterpret_cast<uint4*>(shared_ + m_tile * kGroupBytes) + lane_;
#pragma unroll
      for (int n = 0; n < kItems; ++n) {
        float x[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; c += 2) {
          const float2 pair = to_floats<T>(pairs[mt][n][c / 2]);
          x[c] = pair.x;
          x[c + 1] = pair.y;
        }
        codes[n * kWarpSize] = make_uint4(int8_codes(x, divisor), int8_codes(x + 4, divisor),
                                          int8_codes(x + 8, divisor), int8_codes(x + 12, divisor));
      }
    }
    __syncwarp();  // a warp reads its own rows alone
  }

  // One tile -------------------------------------------------------------------------------------

  /// S = q_code k_code^T.
  __device__ void scores(Scores<kMTiles, kNTiles>& s, const uint8_t* k_tile) const {
    int32_t sums[kMTiles][kNTiles][4];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[mt][n][e] = kSumZeroBits;
      }
    }
    const uint8_t* const q_lane = shared_ + warp_row_ * kHeadDim + lane_ * 16;
    const uint8_t* const k_lane = k_tile + lane_ / 8 % 2 * 256 + lane_ / 16 * 128 + lane_ % 8 * 16;
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 32) {
      uint32_t q[kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        ldmatrix_x4(q[mt], q_lane + mt * kGroupBytes + d * kCodeGroup);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t k[4];  // columns d.. and d + 16.. of keys 0-7 of the group, then of keys 8-15
        ldmatrix_x4(k, k_lane + g * kGroupBytes + d * kCodeGroup);
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) {
          mma_int8(sums[mt][2 * g], q[mt], k[0], k[1]);
          mma_int8(sums[mt][2 * g + 1], q[mt], k[2], k[3]);
        }
      }
    }
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = __int_as_float(sums[mt][n][e]) - kSumZero;
      }
    }
  }

  /// One step of online softmax: S becomes codes of P, l goes on; `rescale` is what earlier rows of
  /// o must be multiplied by. P comes times P_r, and l with it.
  __device__ void softmax(Scores<kMTiles, kNTiles>& s, const float (&scale)[kMTiles],
                          const float (&tops)[kMTiles][2], typename Policy::Rows out,
                          uint32_t (&p)[kMTiles][kPTiles][4], float (&rescale)[kMTiles][2]) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_max = row_max_[mt][half];
        const bool is_out = out >> (2 * mt + half) & 1u;
        const float top = is_out ? old_max : fmaxf(old_max, tops[mt][half]);
        row_max_[mt][half] = top;
        // -inf - -inf is NaN: a row without keys so far is shifted by nothing.
        const float shift = top == -INFINITY ? 0.0f : top;
        rescale[mt][half] = exp2_approx(old_max - shift);
        // A row that takes no part has P = 0.
        const float offset = is_out ? -INFINITY : at_.p_range_log2 - shift;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[mt][n][e] = exp2_approx(fmaf(s[mt][n][e], scale[mt], offset));
            sum += s[mt][n][e];
          }
          const float low = s[mt][n][half * 2], high = s[mt][n][half * 2 + 1];
          if constexpr (!kHasE4m3Mma) {
            p[mt][n / 2][n % 2 * 2 + half] = e4m3_rounded_halves(low, high);
          } else if (n % 2 == 0) {
            p[mt][n / 4][n / 2 % 2 * 2 + half] = e4m3_codes(low, high);
          } else {
            p[mt][n / 4][n / 2 % 2 * 2 + half] |= e4m3_codes(low, high) << 16;
          }
        }
        row_sum_[mt][half] = fmaf(row_sum_[mt][half], rescale[mt][half], sum);
      }
    }
  }

  /// o = rescale o + P v_code, eight columns at a time.
  __device__ void add_values(const uint32_t (&p)[kMTiles][kPTiles][4],
                             const float (&rescale)[kMTiles][2], const uint8_t* v_tile) {
    const uint8_t* const v_lane = v_tile + lane_ / 8 * kGroupBytes + lane_ % 8 * 16;
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 8) {
      // Columns past the last are zero. The branch also bounds how far products are mixed: of all
      // columns at once they would take more registers than there are.
      if (d % 32 == 0 && p_.frame.head_dim <= d) break;
      float sums[kMTiles][4] = {};
#pragma unroll
      for (int g = 0; g < kGroups; g += 4) {
        uint32_t v[4];  // eight columns of four groups of keys
        ldmatrix_x4(v, v_lane + g * kGroupBytes + d * kCodeGroup);
        if constexpr (kHasE4m3Mma) {
#pragma unroll
          for (int mt = 0; mt < kMTiles; ++mt) {
            mma_e4m3(sums[mt], p[mt][g / 2], v[0], v[1]);
            mma_e4m3(sums[mt], p[mt][g / 2 + 1], v[2], v[3]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            uint32_t low, high;
            e4m3_halves(v[n], low, high);
#pragma unroll
            for (int mt = 0; mt < kMTiles; ++mt) mma<fp16>(sums[mt], p[mt][g + n], low, high);
          }
        }
      }
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          o_[mt][d / 8][e] = fmaf(o_[mt][d / 8][e], rescale[mt][e / 2], sums[mt][e]);
        }
      }
    }
  }

  // The end --------------------------------------------------------------------------------------

  /// Divides by the row sums, multiplies by the steps of v and stores o and lse; o through shared
  /// memory, so that rows leave in whole vectors.
  __device__ void finish() {
    const typename Traits::OutputTile tile{reinterpret_cast<uint16_t*>(shared_)};
    const int32_t head_dim = p_.frame.head_dim;
    const float* const steps =
        p_.v_steps +
        (int64_t{at_.pair} * p_.frame.keys.num_sequences + at_.block.sequence) * head_dim;
    float inverse[kMTiles][2];
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(mt, half);
        const float sum = quad_sum(row_sum_[mt][half]);
        constexpr float kScale = kHasE4m3Mma ? 1.0f : kHalvesScale;
        inverse[mt][half] = sum == 0.0f ? 0.0f : kScale / sum;
        if (r < at_.block.rows && lane_ % 4 == 0) {
          *p_.lse.at(at_.b, at_.h, at_.block.begin + r) =
              sum == 0.0f ? -INFINITY
                          : fmaf(row_max_[mt][half] - at_.p_range_log2, kLn2, logf(sum));
        }
      }
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      const int col = d * 8 + lane_ % 4 * 2;
      const bool is_column = col < head_dim;
      const float step[2] = {is_column ? steps[col] : 0.0f, is_column ? steps[col + 1] : 0.0f};
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint32_t*>(tile.at(row_of(mt, half), col)) =
              packed(o_[mt][d][half * 2] * inverse[mt][half] * step[0],
                     o_[mt][d][half * 2 + 1] * inverse[mt][half] * step[1]);
        }
      }
    }
    __syncwarp();
    uint16_t* const head = p_.o.template head<uint16_t>(at_.b, at_.h);
    if (p_.o.is_vectorised) {
      constexpr int kChunks = kHeadDim / 8;
#pragma unroll
      for (int idx = lane_; idx < Traits::kWarpRows * kChunks; idx += kWarpSize) {
        const int r = warp_row_ + idx / kChunks, c = idx % kChunks;
        if (r >= at_.block.rows || c * 8 >= head_dim) continue;
        *reinterpret_cast<uint4*>(head + p_.o.offset(at_.block.begin + r) + c * 8) =
            *reinterpret_cast<const uint4*>(tile.chunk(r, c));
      }
      return;
    }
    for (int idx = lane_; idx < Traits::kWarpRows * kHeadDim; idx += kWarpSize) {
      const int r = warp_row_ + idx / kHeadDim, c = idx % kHeadDim;
      if (r < at_.block.rows && c < head_dim) {
        head[p_.o.offset(at_.block.begin + r) + c] = *tile.at(r, c);
      }
    }
  }

  __device__ uint32_t packed(float low, float high) const {
    return p_.dtype == DType::kBF16 ? pack<bf16>(low, high) : pack<fp16>(low, high);
  }
  __device__ void store_lse_of_nothing() const {
    for (int r = static_cast<int>(threadIdx.x); r < at_.block.rows; r += kThreads) {
      *p_.lse.at(at_.b, at_.h, at_.block.begin + r) = -INFINITY;
    }
  }

  const SparseForward& p_;
  LowBitPlace<Traits>& at_;
  const int lane_, warp_row_;
  uint8_t* const shared_;  // codes of q, then of the tiles of k, then of v
  const RowScan scan_;
  Policy policy_;

  float o_[kMTiles][kHeadDim / 8][4] = {};  // sum P v_code, 16 x 8 each
  float row_max_[kMTiles][2];               // m, log2 units
  float row_sum_[kMTiles][2] = {};          // P_r l of this lane's columns
  float k_step_ = 1.0f;                     // of the tile under way
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    sparse_forward_low_bit_kernel(const __grid_constant__ SparseForward params) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(shared);
  __shared__ LowBitPlace<Traits> at;
  if (threadIdx.x == 0) {
    static_cast<QueryPlace&>(at) = query_place(params.frame, params.wave, blockIdx.x);
    at.pair = at.b * params.frame.num_kv_heads + at.h_kv - params.wave.first;
    at.first_key_block = at.pair * params.frame.keys.num_blocks;
    // Below 2^-10 every code of P is zero, and the row sums must not be.
    at.p_range_log2 = log2f(fmaxf(static_cast<float>(params.low_bit.p_range), 0x1p-11f));
  }
  __syncthreads();
  LowBitBlock<Traits>(params, shared, at).run();
}

template <class Traits>
void launch_low_bit(const SparseForward& params, void* stream) {
  const Frame& frame = params.frame;
  launch(sparse_forward_low_bit_kernel<Traits>,
         {.blocks = int64_t{params.wave.count} * frame.group() * frame.queries.num_blocks,
          .threads = Traits::kThreads,
          .shared_bytes = Traits::shared_bytes(params)},
         stream, params);
}

/// The tiles for a problem; a unit for each head dimension (sparse_low_bit_<D>.cu), because ptxas
/// takes its time.
template <int kHeadDim>
void sparse_forward_low_bit(const SparseForward& params, void* stream) {
  constexpr bool kIsWide = kHeadDim > 128;  // the output alone fills the registers of 16 rows
  constexpr int kStages = kIsWide ? 1 : 2;
  if (params.block_k > 64) {
    return launch_low_bit<LowBitTraits<kHeadDim, 128, 128, 16, kStages>>(params, stream);
  }
  if (params.block_q > 64 || kIsWide) {
    // 128 rows by four warps of 32: a fragment of k or v serves two mma.
    return launch_low_bit<LowBitTraits<kHeadDim, 128, 64, kIsWide ? 16 : 32, kStages>>(params,
                                                                                       stream);
  }
  if constexpr (!kIsWide) launch_low_bit<LowBitTraits<kHeadDim, 64, 64, 16, 2>>(params, stream);
}

}  // namespace sparline::cuda
