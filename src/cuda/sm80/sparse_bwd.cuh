// SPDX-License-Identifier: Apache-2.0
//
// What the two passes of the sparse branch's backward share.
//   P = exp(S - lse),  dS = P (dP - delta),  S = scale Q K^T,  dP = dO_s V^T
//   rows:     dQ = scale dS K                     one query block over its key blocks
//   columns:  dV = P^T dO_s,  dK = scale dS^T Q   one key block over its query blocks
// Both keep the sums of one block in registers and walk the other axis in steps of a few rows. All
// that differs from row to row is folded into two numbers of a query row, see RowStats.
//
// What limits both on large chips is how many instructions are issued beside the mma: a step is
// found once for all of its block, rows and statistics are copied without passing through
// registers, and addresses in shared memory are 32 bits, one exclusive or for each fragment.
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

/// Blocks on their way: what is known of their rows lies in rings in shared memory, in the places
/// [128 slot, 128 slot + 128) of an array. While step n is found, step n - 3 may still be in use,
/// so that four blocks are, if each has one step.
constexpr int kRing = 4, kMaxRows = 128, kRingRows = kRing * kMaxRows;

/// Up to kStepRows rows of a block of the other axis: num_rows from position `first`, whose numbers
/// are at `place`, a multiple of 16, in the rings.
struct Step {
  int32_t first = 0;
  int num_rows = 0;  // 0: none left
  int place = 0;
};

/// All steps of a block of `rows` rows, one bit each.
template <int kStepRows>
__device__ __forceinline__ uint32_t all_steps(int rows) {
  return (1u << ((rows + kStepRows - 1) / kStepRows)) - 1;
}

/// The steps of a CTA, from a list of the blocks that have any, in shared memory, of as many blocks
/// as fit at a time: no lists in global memory, no limit on the number of blocks. Every thread
/// holds the same values.
template <int kThreads, int kStepRows, int kRounds>
class StepList {
 public:
  static constexpr int kMaxSteps = kMaxRows / kStepRows;  // of a block
  static constexpr int kEntries = kRounds * kThreads;     // at most: each thread looks at kRounds
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kBytes = kEntries * 2 + kRounds * kWarps * 4;
  static_assert(kEntries << kMaxSteps <= 1 << 16, "an entry has 16 bits");

  /// Blocks [begin, end) of `num_heads` heads, one head after another.
  __device__ __forceinline__ StepList(unsigned char* shared, const Axis& axis, int32_t begin,
                                      int32_t end, int32_t num_heads)
      : entries_(reinterpret_cast<uint16_t*>(shared)),
        totals_(reinterpret_cast<int32_t*>(shared + kEntries * 2)),
        axis_(axis),
        begin_(begin),
        end_(end),
        unlisted_(begin),
        num_heads_(num_heads) {}

  /// The next step. `live(head, block, info)` tells which steps of a block take part, one bit each.
  /// `open(slot, head, block, info)` is called by all threads where a block's first step is given.
  /// All threads call it together.
  template <class Live, class Open>
  __device__ __forceinline__ Step next(const Live& live, const Open& open) {
    if (steps_ == 0) {
      while (at_ == count_) {
        if (unlisted_ >= end_) {
          if (head_ + 1 >= num_heads_ || begin_ >= end_) return {};
          ++head_;
          unlisted_ = begin_;
        }
        list(live);
      }
      const uint32_t entry = entries_[at_++];
      const int32_t block = first_block_ + static_cast<int32_t>(entry >> kMaxSteps);
      const BlockInfo info = axis_.block(block);
      steps_ = entry % (1u << kMaxSteps);
      block_begin_ = info.begin;
      block_rows_ = info.rows;
      slot_ = (slot_ + 1) % kRing;
      open(slot_, head_, block, info);
    }
    const int row = (__ffs(static_cast<int>(steps_)) - 1) * kStepRows;
    steps_ &= steps_ - 1;
    const int rest = block_rows_ - row;
    return {block_begin_ + row, rest < kStepRows ? rest : kStepRows, slot_ * kMaxRows + row};
  }
  /// Of the step that next() gave last.
  __device__ __forceinline__ int32_t head() const { return head_; }

 private:
  template <class Live>
  __device__ __forceinline__ void list(const Live& live) {
    const int lane = lane_index(), warp = warp_index(), thread = static_cast<int>(threadIdx.x);
    uint32_t mask[kRounds];
    int before[kRounds];  // blocks with steps of the lanes below
    __syncthreads();      // the old list has been read
    first_block_ = unlisted_;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int32_t block = first_block_ + round * kThreads + thread;
      mask[round] = block < end_ ? live(head_, block, axis_.block(block)) : uint32_t{0};
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const uint32_t with_steps = __ballot_sync(kAllLanes, mask[round] != 0);
      before[round] = __popc(with_steps & ((1u << lane) - 1));
      if (lane == 0) totals_[round * kWarps + warp] = __popc(with_steps);
    }
    __syncthreads();
    at_ = count_ = 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      int at = count_ + before[round];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const int total = totals_[round * kWarps + w];
        if (w < warp) at += total;
        count_ += total;
      }
      if (mask[round] == 0) continue;
      const int offset = round * kThreads + thread;
      entries_[at] =
          static_cast<uint16_t>(static_cast<uint32_t>(offset) << kMaxSteps | mask[round]);
    }
    unlisted_ += kEntries;
    __syncthreads();
  }

  uint16_t* entries_;  // (kEntries): a block less first_block_, and its steps, a bit each
  int32_t* totals_;
  const Axis& axis_;
  int32_t begin_, end_, unlisted_, num_heads_;
  int32_t head_ = 0, first_block_ = 0;
  int at_ = 0, count_ = 0;
  uint32_t steps_ = 0;  // that are left of the block at hand
  int32_t block_begin_ = 0, block_rows_ = 0;
  int slot_ = 0;
};

/// The steps `turn` (n = 0), `turn - 1`, `turn - 2`, `turn - 3` of a main loop, a byte each of
/// their rows and of their places.
struct StepsAhead {
  uint32_t rows = 0, places = 0;

  __device__ __forceinline__ void push(const Step& step) {
    rows = rows << 8 | static_cast<uint32_t>(step.num_rows);
    places = places << 8 | static_cast<uint32_t>(step.place / 16);
  }
  __device__ __forceinline__ int num_rows(int n) const {
    return static_cast<int>(rows >> (8 * n) & 0xffu);
  }
  __device__ __forceinline__ int place(int n) const {
    return static_cast<int>(places >> (8 * n) & 0xffu) * 16;
  }
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

/// The lse with which P becomes factor P; 0 or less: none of it.
__device__ __forceinline__ float effective_lse(float lse_log2, float factor) {
  return factor > 0.0f ? lse_log2 - log2f(factor) : kInfinity;
}

// Steps on their way
// --------------------------------------------------------------------------------- Steps are known
// two ahead: while step n is computed, the rows of step n + 1 are copied, and the numbers of the
// rows of step n + 2. Rows past the end of a step repeat its last row: their P is zero.

/// A thread's part of a step's copies: 16 bytes of each of kCopies rows, in a column of its own.
/// `thread`: of kThreads.
template <int kThreads, int kStepRows, int kCols>
struct StepCopy {
  static constexpr int kChunks = kCols / 8;
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kCopies = kStepRows / kRowsAtOnce;

  int first_row, col;

  __device__ __forceinline__ explicit StepCopy(int thread)
      : first_row(thread / kChunks), col(thread % kChunks * 8) {}

  __device__ __forceinline__ int row(int piece) const { return first_row + piece * kRowsAtOnce; }
  /// Bytes from the start of a tile (SharedTile) to the first of them.
  __device__ __forceinline__ uint32_t first_bytes() const {
    return static_cast<uint32_t>(first_row * kCols * 2 + ((col / 8) ^ (first_row & 7)) * 16);
  }
  /// Where a piece goes; `first`: where the first one does.
  static __device__ __forceinline__ SharedAddress target(SharedAddress first, int piece) {
    return chunk_below<kRowsAtOnce, kCols>(first, piece);
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

/// Where a lane reads fragments, in bytes. Tiles begin at multiples of their rows' bytes; the
/// lane's part of the fragment at (row, col), multiples of 16, of a tile that begins at `tile` is
/// ((tile + pattern) ^ 2 col) + 2 row kCols: one operation for each column, none for rows. See
/// SharedTile.
template <int kCols>
struct LanePattern {
  uint32_t a;  // A; B from X with k along its rows (_trans)
  uint32_t b;  // B from X^T

  __device__ __forceinline__ explicit LanePattern(int lane)
      : a(static_cast<uint32_t>(lane % 16 * kCols * 2 + ((lane / 16) ^ (lane % 8)) * 16)),
        b(static_cast<uint32_t>((lane % 8 + lane / 16 * 8) * kCols * 2 +
                                ((lane / 8 % 2) ^ (lane % 8)) * 16)) {}
};

/// x (16 kM x 8 kN) += A B^T over kCols in steps of 16. `a` and `b`: where the lane reads them, see
/// LanePattern. Fragments are read a step ahead.
template <class T, int kCols, int kM, int kN, class Between>
__device__ __forceinline__ void multiply_rows(float (&x)[kM][kN][4], SharedAddress a,
                                              SharedAddress b, const Between& between) {
  constexpr int kSteps = kCols / 16;
  uint32_t fragment_a[2][kM][4], fragment_b[2][kN / 2][4];  // (16 kM, 16), (8 kN, 16)
  const auto load = [&](int step) {
    const SharedAddress a_col = a ^ static_cast<uint32_t>(32 * step);
    const SharedAddress b_col = b ^ static_cast<uint32_t>(32 * step);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ldmatrix_x4(fragment_a[step % 2][m], a_col + static_cast<uint32_t>(32 * m * kCols));
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      ldmatrix_x4(fragment_b[step % 2][n], b_col + static_cast<uint32_t>(32 * n * kCols));
    }
  };
  load(0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) load(step + 1);
    between(step);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(x[m][n], fragment_a[step % 2][m], fragment_b[step % 2][n / 2][n % 2 * 2],
               fragment_b[step % 2][n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

/// x (16 kM x 8 kN) += A B: A (16 kM x 16 kK) in registers, lanes read B (16 kK x 8 kN) at `b`, a
/// step ahead. Steps of 16 columns, kN / 2 for each k.
template <class T, int kM, int kK, int kN, class Between>
__device__ __forceinline__ void multiply_fragments(float (&x)[kM][kN][4],
                                                   const uint32_t (&a)[kM][kK][4], SharedAddress b,
                                                   const Between& between) {
  constexpr int kSteps = kK * kN / 2;
  uint32_t fragment_b[2][4];  // (16, 16)
  const auto load = [&](int step) {
    const int k = step / (kN / 2), n = step % (kN / 2) * 2;
    ldmatrix_x4_trans(fragment_b[step % 2],
                      (b ^ static_cast<uint32_t>(16 * n)) + static_cast<uint32_t>(32 * k * 8 * kN));
  };
  load(0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int k = step / (kN / 2), n = step % (kN / 2) * 2;
    if (step + 1 < kSteps) load(step + 1);
    between(step);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma<T>(x[m][n], a[m][k], fragment_b[step % 2][0], fragment_b[step % 2][1]);
      mma<T>(x[m][n + 1], a[m][k], fragment_b[step % 2][2], fragment_b[step % 2][3]);
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
    constexpr int kChunks = kCols / 8, kRowsAtOnce = kThreads / kChunks;
    constexpr int kUnroll = 4;  // vectors in flight
    const int col = thread % kChunks * 8;
    if (col >= head_dim) return;
    for (int r0 = thread / kChunks; r0 < num_rows; r0 += kUnroll * kRowsAtOnce) {
      uint4* to[kUnroll];
      uint4 held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int r = r0 + u * kRowsAtOnce;
        to[u] = reinterpret_cast<uint4*>(head + rows.offset(first + (r < num_rows ? r : r0)) + col);
        held[u] = output.adds ? *to[u] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int r = r0 + u * kRowsAtOnce;
        if (r >= num_rows) break;
        const uint32_t pair[4] = {held[u].x, held[u].y, held[u].z, held[u].w};
        const float* const x = tile.data + r * FloatTile<kCols>::kStride + col;
        const float weight = output.weight == nullptr ? 1.0f : output.weight[r];
        uint32_t out[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float2 sum = unpack<T>(pair[n]);
          if (output.off != nullptr) {
            sum.x -= weight * output.off[col + 2 * n];
            sum.y -= weight * output.off[col + 2 * n + 1];
          }
          out[n] =
              pack<T>(fmaf(output.scale, x[2 * n], sum.x), fmaf(output.scale, x[2 * n + 1], sum.y));
        }
        *to[u] = make_uint4(out[0], out[1], out[2], out[3]);
      }
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
