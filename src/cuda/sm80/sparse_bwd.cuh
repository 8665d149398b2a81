// SPDX-License-Identifier: Apache-2.0
//
// What the two passes of the sparse branch's backward share.
//   P = exp(S - lse),  dS = P (dP - delta),  S = scale Q K^T,  dP = dO_s V^T
//   rows:     dQ = scale dS K                     one query block over its key blocks
//   columns:  dV = P^T dO_s,  dK = scale dS^T Q   one key block over its query blocks
// Both keep the sums of one block in registers and walk the other axis in steps of a few rows. All
// that differs from row to row is folded into two numbers of a query row, see effective_lse().
//
// A warp can issue five other instructions under each mma, but stalls on a branch or on what it has
// just fetched, so steps are prepared ahead, little by little, and without branches.
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {

/// The two passes of sparse_backward; the row pass for head dims up to the number.
void sparse_backward_rows_64(const SparseBackward& params, void* stream);
void sparse_backward_rows_128(const SparseBackward& params, void* stream);
void sparse_backward_rows_256(const SparseBackward& params, void* stream);
void sparse_backward_columns(const SparseBackward& params, void* stream);

namespace backward {

constexpr float kInfinity = __builtin_huge_valf();

// Which steps take part
// ------------------------------------------------------------------------------

/// Up to kStepRows rows of a block of the other axis: num_rows from position `first`.
struct Step {
  int32_t first = 0;
  int num_rows = 0;  // 0: none left
  int entry = 0;     // index into the list's arrays
};

/// Blocks are cut into at most this many steps: 128 rows by 16.
constexpr int kMaxSteps = 8;

/// All steps of a block of `rows` rows, one bit each.
template <int kStepRows>
__device__ __forceinline__ uint32_t all_steps(int rows) {
  return (1u << ((rows + kStepRows - 1) / kStepRows)) - 1;
}

/// The steps of a CTA, listed in shared memory for as many blocks at a time as fit: no lists in
/// global memory, no limit on the number of blocks. Every thread holds the same values.
template <int kThreads, int kStepRows, int kEntries>
class StepList {
 public:
  static constexpr int kRounds = 4;  // blocks each thread looks at
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kBytes = kEntries * 4 + kRounds * kWarps * 4;

  /// Blocks [begin, end) of `num_heads` heads, one head after another.
  __device__ __forceinline__ StepList(unsigned char* shared, const Axis& axis, int32_t begin,
                                      int32_t end, int32_t num_heads)
      : entries_(reinterpret_cast<uint32_t*>(shared)),
        totals_(reinterpret_cast<int32_t*>(shared + kEntries * 4)),
        axis_(axis),
        begin_(begin),
        end_(end),
        unlisted_(begin),
        num_heads_(num_heads) {}

  /// The next step. `live(head, block, info)` tells which steps of a block take part, one bit each,
  /// and `keep(entry, block, head)` is called for each that does. All threads call it together.
  template <class Live, class Keep>
  __device__ __forceinline__ Step next(const Live& live, const Keep& keep) {
    while (at_ == count_) {
      if (unlisted_ >= end_) {
        if (head_ + 1 >= num_heads_ || begin_ >= end_) return {};
        ++head_;
        unlisted_ = begin_;
      }
      list(live, keep);
    }
    const uint32_t entry = entries_[at_];
    return {first_ + static_cast<int32_t>(entry / 64), static_cast<int>(entry % 64), at_++};
  }
  /// Of the step that next() gave last.
  __device__ __forceinline__ int32_t head() const { return head_; }

 private:
  template <class Live, class Keep>
  __device__ __forceinline__ void list(const Live& live, const Keep& keep) {
    const int lane = lane_index(), warp = warp_index(), thread = static_cast<int>(threadIdx.x);
    // Blocks of a round: entries for one round always suffice.
    const int max_steps = (axis_.block_rows + kStepRows - 1) / kStepRows;
    const int round_blocks = kEntries / max_steps < kThreads ? kEntries / max_steps : kThreads;
    uint32_t mask[kRounds];
    int before[kRounds];  // steps of the lanes up to this one
    __syncthreads();      // the old list has been read
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int32_t block = unlisted_ + round * round_blocks + thread;
      mask[round] = thread < round_blocks && block < end_ ? live(head_, block, axis_.block(block))
                                                          : uint32_t{0};
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      before[round] = __popc(mask[round]);
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before[round], step);
        if (lane >= step) before[round] += other;
      }
      if (lane == kWarpSize - 1) totals_[round * kWarps + warp] = before[round];
      before[round] -= __popc(mask[round]);
    }
    __syncthreads();
    first_ = axis_.block(unlisted_).begin;
    at_ = count_ = 0;
    const int32_t begin = unlisted_;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      int at = before[round], total = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) at += totals_[round * kWarps + w];
        total += totals_[round * kWarps + w];
      }
      if (round > 0 && (unlisted_ != begin + round * round_blocks || count_ + total > kEntries)) {
        continue;  // looked at again for the next list
      }
      const int32_t block = begin + round * round_blocks + thread;
      if (mask[round] != 0) {
        const BlockInfo info = axis_.block(block);
        for (uint32_t rest = mask[round]; rest != 0; rest &= rest - 1, ++at) {
          const int row = (__ffs(static_cast<int>(rest)) - 1) * kStepRows;
          const int num_rows = info.rows - row < kStepRows ? info.rows - row : kStepRows;
          entries_[count_ + at] =
              static_cast<uint32_t>((info.begin + row - first_) * 64 + num_rows);
          keep(count_ + at, block);
        }
      }
      count_ += total;
      unlisted_ += round_blocks;
    }
    __syncthreads();
  }

  uint32_t* entries_;  // (kEntries): 64 (first position less first_) + rows
  int32_t* totals_;
  const Axis& axis_;
  int32_t begin_, end_, unlisted_, num_heads_;
  int32_t head_ = 0, first_ = 0;
  int at_ = 0, count_ = 0;
};

/// Whether a block other than the one at hand is protected.
__device__ __forceinline__ bool is_protected(const Axis& axis, int32_t block) {
  return axis.table != nullptr && axis.table[block].is_protected != 0;
}

/// Whether rows of one 16-row tile may have different bits.
__device__ __forceinline__ bool has_bits_by_row(const TileBits& bits) {
  return bits.groups > 1 && bits.rows % 16 != 0;
}
/// Whether the rows of group g of query block i see key block j.
__device__ __forceinline__ bool group_bit(const TileBits& bits, int64_t b, int64_t h, int64_t i,
                                          int group, int64_t j) {
  return (bits.data[bits.offset(b, h, i, group, j)] >> (j % 8) & 1) != 0;
}
/// The same for all groups of a block of `num_rows` rows, a bit each; groups from 31 on share one.
__device__ __forceinline__ uint32_t visible_groups(const TileBits& bits, int64_t b, int64_t h,
                                                   int64_t i, int64_t j, int num_rows) {
  uint32_t visible = 0;
  for (int g = 0; g < bits.groups && g * bits.rows < num_rows; ++g) {
    if (group_bit(bits, b, h, i, g, j)) visible |= 1u << (g < 31 ? g : 31);
  }
  return visible;
}

// Rows' statistics
// -----------------------------------------------------------------------------------

/// dO_s = share dO, so with dP = dO V^T the products need
///   share P = m exp2(S_log2 - lse_log2) share    and    dS = share P (dP - delta / share),
/// which is the plain formula with other statistics: m (and a bit, 0 or 1) and the share lower the
/// lse, the share divides delta. lse = +inf makes P zero.
__device__ __forceinline__ float effective_lse(float lse_log2, float factor) {
  return factor > 0.0f ? lse_log2 - log2f(factor) : kInfinity;
}
/// Up to this a share counts as 0, so that delta / share stays finite.
constexpr float kSmallestShare = 1e-20f;

// Steps on their way
// --------------------------------------------------------------------------------- Steps are known
// two ahead: while step n is computed, the rows of step n + 1 are copied, and what step n + 2 will
// need is fetched and left in rings of kRing in shared memory. Rows past the end of a step repeat
// its last row: their P is zero.

constexpr int kRing = 4;

/// A thread's part of a step's copies: 16 bytes of each of kCopies rows, in a column of its own.
template <int kThreads, class T, int kStepRows, int kCols>
struct StepCopy {
  using Tile = SharedTile<T, kStepRows, kCols>;
  static constexpr int kRowsAtOnce = kThreads / Tile::kChunks;
  static constexpr int kCopies = kStepRows / kRowsAtOnce;

  static __device__ __forceinline__ int row(int piece) {
    return static_cast<int>(threadIdx.x) / Tile::kChunks + piece * kRowsAtOnce;
  }
  static __device__ __forceinline__ int col() {
    return static_cast<int>(threadIdx.x) % Tile::kChunks * 8;
  }
};

/// Copies of whole vectors find rows with 32 bit factors; others go element by element.
inline void count_rows_in_32_bits(Rows& rows) {
  constexpr int64_t kElementBytes = 2, kMax = 0xffffffff;
  if (rows.stride_n < 0 || rows.stride_n * kElementBytes > kMax) rows.is_vectorised = false;
}

/// Zeros in columns from head_dim on: copies leave them alone.
template <int kThreads, class T, int kRows, int kCols>
__device__ __forceinline__ void clear_columns(const SharedTile<T, kRows, kCols>& tile,
                                              int head_dim) {
  const int num_cols = kCols - head_dim;
  for (int idx = static_cast<int>(threadIdx.x); idx < kRows * num_cols; idx += kThreads) {
    *tile.at(idx / num_cols, head_dim + idx % num_cols) = T(0.0f);
  }
}

/// Calls body(item) for this step's share of kItems, spread evenly over kSteps.
template <int kItems, int kSteps, class Body>
__device__ __forceinline__ void spread(int step, const Body& body) {
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    if (item * kSteps / kItems == step) body(item);
  }
}

// Products
// -------------------------------------------------------------------------------------------
// `between(step)` is called once for each step of the unrolled loop: what can be done meanwhile.

/// Where a lane reads fragments. Tiles of kCols columns begin multiples of kCols behind a common
/// origin; the lane's part of the fragment at (row, col), multiples of 16, of a tile that begins at
/// `tile` is origin + row kCols + ((tile + pattern) ^ col): one operation for each column, none for
/// rows. See SharedTile.
template <int kCols>
struct LanePattern {
  int a;  // A; B from X with k along its rows (_trans)
  int b;  // B from X^T

  __device__ __forceinline__ explicit LanePattern(int lane)
      : a(lane % 16 * kCols + ((lane / 16) ^ (lane % 8)) * 8),
        b((lane % 8 + lane / 16 * 8) * kCols + ((lane / 8 % 2) ^ (lane % 8)) * 8) {}
};

/// x (16 kM x 8 kN) += A B^T over kCols in steps of 16. Lanes read A at `a` behind tile_a and B at
/// `b` behind tile_b, see LanePattern.
template <class T, int kCols, int kM, int kN, class Between>
__device__ __forceinline__ void multiply_rows(float (&x)[kM][kN][4], const T* tile_a, int a,
                                              const T* tile_b, int b, const Between& between) {
#pragma unroll
  for (int col = 0; col < kCols; col += 16) {
    uint32_t fragment_a[kM][4], fragment_b[kN / 2][4];  // (16 kM, 16), (8 kN, 16)
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix_x4(fragment_a[m], tile_a + (a ^ col) + 16 * m * kCols);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      ldmatrix_x4(fragment_b[n], tile_b + (b ^ col) + 16 * n * kCols);
    }
    between(col / 16);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(x[m][n], fragment_a[m], fragment_b[n / 2][n % 2 * 2],
               fragment_b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

/// x (16 kM x 8 kN) += A B: A (16 kM x 16 kK) in registers, lanes read B (16 kK x 8 kN) at `b`
/// behind tile_b. Steps of 16 columns, kN / 2 for each k.
template <class T, int kM, int kK, int kN, class Between>
__device__ __forceinline__ void multiply_fragments(float (&x)[kM][kN][4],
                                                   const uint32_t (&a)[kM][kK][4], const T* tile_b,
                                                   int b, const Between& between) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t fragment_b[4];  // (16, 16)
      ldmatrix_x4_trans(fragment_b, tile_b + (b ^ (8 * n)) + 16 * k * 8 * kN);
      between(k * (kN / 2) + n / 2);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(x[m][n], a[m][k], fragment_b[0], fragment_b[1]);
        mma<T>(x[m][n + 1], a[m][k], fragment_b[2], fragment_b[3]);
      }
    }
  }
}

/// C fragments (16 x 16, two of 16 x 8) as one A fragment.
template <class T>
__device__ __forceinline__ void round_fragment(uint32_t (&a)[4], const float (&left)[4],
                                               const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

/// The two elements of a packed pair.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<fp16>(uint32_t pair) {
  const fp16* const halves = reinterpret_cast<const fp16*>(&pair);
  return make_float2(__half2float(halves[0]), __half2float(halves[1]));
}

// Results
// --------------------------------------------------------------------------------------------

/// A float tile in shared memory; the padding spreads the rows of a C fragment over the banks.
template <int kCols>
struct FloatTile {
  static constexpr int kStride = kCols + 8;
  float* data;

  template <int kM, int kN>
  __device__ __forceinline__ void put(const float (&x)[kM][kN][4], int row, int lane) const {
    float* const to = data + (row + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float* const at = to + 16 * m * kStride + 8 * n;
        *reinterpret_cast<float2*>(at) = make_float2(x[m][n][0], x[m][n][1]);
        *reinterpret_cast<float2*>(at + 8 * kStride) = make_float2(x[m][n][2], x[m][n][3]);
      }
    }
  }
};

/// What becomes of row r of a float tile x on its way to memory:
///   scale x_r - weight_r off (+ what memory holds)
struct RowOutput {
  float scale = 1.0f;
  const float* weight = nullptr;  // shared memory; null: 1
  const float* off = nullptr;     // (head_dim); null: 0
  bool adds = false;
};

/// Stores rows of the tile at positions [first, first + num_rows). All kThreads threads call it.
template <int kThreads, class T, int kCols>
__device__ __forceinline__ void store_rows(const FloatTile<kCols>& tile, const RowOutput& output,
                                           const Rows& rows, T* head, int32_t first,
                                           int32_t num_rows, int32_t head_dim) {
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  if (rows.is_vectorised) {
    constexpr int kChunks = kCols / 8;
    for (int idx = thread; idx < num_rows * kChunks; idx += kThreads) {
      const int r = idx / kChunks, col = idx % kChunks * 8;
      if (col >= head_dim) continue;
      uint4* const to = reinterpret_cast<uint4*>(head + rows.offset(first + r) + col);
      const uint4 held = output.adds ? *to : make_uint4(0, 0, 0, 0);
      const uint32_t pair[4] = {held.x, held.y, held.z, held.w};
      const float* const x = tile.data + r * FloatTile<kCols>::kStride + col;
      const float weight = output.weight == nullptr ? 1.0f : output.weight[r];
      uint32_t out[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float2 sum = output.adds ? unpack<T>(pair[n]) : make_float2(0.0f, 0.0f);
        if (output.off != nullptr) {
          sum.x -= weight * output.off[col + 2 * n];
          sum.y -= weight * output.off[col + 2 * n + 1];
        }
        out[n] =
            pack<T>(fmaf(output.scale, x[2 * n], sum.x), fmaf(output.scale, x[2 * n + 1], sum.y));
      }
      *to = make_uint4(out[0], out[1], out[2], out[3]);
    }
    return;
  }
  for (int idx = thread; idx < num_rows * head_dim; idx += kThreads) {
    const int r = idx / head_dim, col = idx % head_dim;
    T* const to = head + rows.offset(first + r) + col;
    const float weight = output.weight == nullptr ? 1.0f : output.weight[r];
    float sum = output.adds ? to_float(*to) : 0.0f;
    if (output.off != nullptr) sum -= weight * output.off[col];
    *to = from_float<T>(fmaf(output.scale, tile.data[r * FloatTile<kCols>::kStride + col], sum));
  }
}

}  // namespace backward
}  // namespace sparline::cuda
