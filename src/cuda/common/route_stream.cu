// SPDX-License-Identifier: Apache-2.0
//
// The router in one kernel that reads queries and keys once, at memory bandwidth, while scores and
// choices of the heads that are pooled follow behind. The same arithmetic in the same order as the
// kernels of route.cu: the same bits.
//   Work      of a (batch, key head) pair, a unit for each thread block:
//               keys       sums of key blocks
//               centre     eight columns of these: means, less the mean key
//               queries    means of query blocks
//               choose     scores of 16 query blocks, and their classes
//   Order     work_of(): choices follow a pair behind the queries and keys that they need. Thread
//             blocks take tickets, and wait only for units of smaller tickets: however few of them
//             run at a time, the one with the smallest ticket can go on
//   Product   16 x 512 scores, 64 columns a warp, 4 x 8 a thread; slices of 16 columns of pooled
//             rows, two in flight
//   Shared    66 KiB: two slices, then the scores; three blocks on a multiprocessor of Hopper
#include "cuda/common/route_stream.cuh"

#include "cuda/common/counters.cuh"
#include "cuda/common/pool_block.cuh"

namespace sparline::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerMultiprocessor = 3;         // what registers and shared memory are kept to
constexpr int kTogether = kThreads / kPoolThreads;  // blocks that are pooled side by side
constexpr int kUnitRows = 256;
constexpr int kRows = 16, kSlice = 16;
constexpr int kCentreCols = 8, kChains = kThreads / kCentreCols;
constexpr int kScoreStride = kStreamCols + 8;  // rows of a fragment lie in different banks
static_assert(kWarps * 64 == kStreamCols);

struct Counts {
  uint32_t keys, centre, queries, choose;  // units of work of a pair
};

/// Counters of a pair: how many units of its work are done.
struct PairCounters {
  uint32_t keys, centre, queries;
};

struct StreamParams {
  StreamRoute route;
  uint32_t* ticket;
  PairCounters* done;
  Counts counts;
  int32_t num_pairs, group, tiles;  // pairs, query heads of one, tiles of 16 query blocks of a head
};

enum class Stage { kKeys, kCentre, kQueries, kChoose };
struct Work {
  Stage stage;
  int32_t pair;
  int32_t idx;
};

template <int kHeadDim>
struct StreamShared {
  union {
    float slices[2][(kRows + kStreamCols) * kSlice];
    float scores[kRows][kScoreStride];
    PoolScratch<kHeadDim> pool[2][kTogether];
    float chains[kChains][kCentreCols];
  };
  Work work;
};

/// Blocks that a unit of work pools: those of 256 rows, and at least one for each group of threads.
SPARLINE_HOST_DEVICE int32_t unit_blocks(const Axis& axis) {
  const int32_t num = kUnitRows / axis.block_rows / kTogether * kTogether;
  return num > kTogether ? num : kTogether;
}

// Order ------------------------------------------------------------------------------------------

/// Ticket by ticket, in turns n = 0, 1, ...: keys of pair n, queries of pair n - 1, choice of pair
/// n - 2, means of the keys of pair n; and the last choice. What a unit needs is mostly there by
/// then, as the device works on little more than one pair at a time.
__device__ __forceinline__ Work work_of(const StreamParams& p, uint32_t ticket) {
  const Counts& c = p.counts;
  const auto num_pairs = static_cast<uint32_t>(p.num_pairs);
  const uint32_t first = c.keys + c.centre, second = first + c.queries, other = second + c.choose;
  uint32_t n = 0, idx = ticket;
  if (num_pairs == 1 || ticket < first + second) {
    n = ticket < first ? 0 : 1;
    idx -= n * first;
  } else {
    n = min(2 + (ticket - first - second) / other, num_pairs);
    idx -= first + second + (n - 2) * other;
  }
  const auto work = [&](Stage stage, uint32_t pair) {
    return Work{stage, static_cast<int32_t>(pair), static_cast<int32_t>(idx)};
  };
  if (n < num_pairs) {
    if (idx < c.keys) return work(Stage::kKeys, n);
    idx -= c.keys;
  }
  if (n >= 1) {
    if (idx < c.queries) return work(Stage::kQueries, n - 1);
    idx -= c.queries;
  }
  if (n >= 2) {
    if (idx < c.choose) return work(Stage::kChoose, n - 2);
    idx -= c.choose;
  }
  if (n < num_pairs) return work(Stage::kCentre, n);
  return work(Stage::kChoose, n - 1);
}

// Pooling ----------------------------------------------------------------------------------------

/// The blocks of a unit, those of `num_heads` heads of the pair in one row.
template <class T, int kHeadDim>
__device__ __forceinline__ void pool_blocks(const PoolJob& job, int32_t num_heads, int32_t pair,
                                            int32_t unit, const StreamParams& p,
                                            StreamShared<kHeadDim>& shared) {
  const int32_t num_blocks = num_heads * job.axis.num_blocks;
  const int32_t blocks_per_unit = unit_blocks(job.axis);
  const int32_t begin = unit * blocks_per_unit;
  const int32_t end = min(begin + blocks_per_unit, num_blocks);
  const int group = warp_index() / kPoolWarps;
  // Two places in turn: who sums up in one again has passed the barrier of the other.
  int turn = 0;
  for (int32_t first = begin; first < end; first += kTogether, turn ^= 1) {
    if (first + group < end) {
      pool_block<T, kHeadDim, /*kIsSimilarity=*/false>(job, pair * num_blocks + first + group,
                                                       p.route.classify.frame.head_dim, p.route.ld,
                                                       0.0f, shared.pool[turn][group]);
    } else {
      __syncthreads();  // that of the other group
    }
  }
}

/// Sums of the blocks of a sequence become means less its mean key, in eight columns. 32 sums of
/// every 32nd block, then theirs.
template <int kHeadDim>
__device__ __forceinline__ void centre_columns(const StreamParams& p, int32_t pair, int32_t idx,
                                               StreamShared<kHeadDim>& shared) {
  constexpr int kMost = kStreamCols / kChains;
  const PoolJob& job = p.route.keys;
  const int32_t head_dim = p.route.classify.frame.head_dim;
  const int32_t num_slices = (head_dim + kCentreCols - 1) / kCentreCols;
  const int32_t sequence = idx / num_slices;
  const int lane_col = static_cast<int>(threadIdx.x % static_cast<unsigned>(kCentreCols));
  const int chain = static_cast<int>(threadIdx.x / static_cast<unsigned>(kCentreCols));
  const int32_t d = idx % num_slices * kCentreCols + lane_col;
  const int32_t begin = first_block_of(job.axis, sequence);
  const int32_t end = first_block_of(job.axis, sequence + 1);
  const int64_t ld = p.route.ld;
  float* const sums = job.pooled + (int64_t{pair} * job.axis.num_blocks + begin + chain) * ld + d;
  const auto is_there = [&](int n) { return d < head_dim && begin + chain + n * kChains < end; };

  float x[kMost];
#pragma unroll
  for (int n = 0; n < kMost; ++n) x[n] = is_there(n) ? __ldcg(sums + n * kChains * ld) : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    if (is_there(n)) sum += x[n];
  }
  shared.chains[chain][lane_col] = sum;
  __syncthreads();
  float mean = 0.0f;
#pragma unroll
  for (int other = 0; other < kChains; ++other) mean += shared.chains[other][lane_col];
  mean = begin < end ? mean / static_cast<float>(job.axis.block(begin).sequence_rows) : 0.0f;
#pragma unroll
  for (int n = 0; n < kMost; ++n) {
    if (!is_there(n)) continue;
    const int32_t j = begin + chain + n * kChains;
    const float inverse_rows = 1.0f / static_cast<float>(job.axis.block(j).rows);
    sums[n * kChains * ld] = x[n] * inverse_rows - mean;
  }
}

// Scores -----------------------------------------------------------------------------------------

/// shared.scores (num_rows x num_cols) = a b^T for up to 16 rows and 512 columns; rows of a and b
/// are `ld` floats. As product.cuh adds up: in the order of the columns. Chunks of four floats are
/// swizzled by pairs of rows, two of which fill all banks.
template <int kHeadDim>
__device__ __forceinline__ void multiply_rows(const float* a, const float* b, int num_rows,
                                              int num_cols, int ld,
                                              StreamShared<kHeadDim>& shared) {
  constexpr int kSliceFloats = (kRows + kStreamCols) * kSlice;
  constexpr int kStep = kThreads / 4;  // rows that all threads copy 16 bytes of
  static_assert(kStep % 8 == 0);
  float* const slices = &shared.slices[0][0];
  const int source_row = static_cast<int>(threadIdx.x / 4u);
  const int source_chunk = static_cast<int>(threadIdx.x % 4u);
  const int source = source_row * ld + source_chunk * 4;
  a += source;
  b += source;
  float* const to = slices + source_row * kSlice + ((source_chunk ^ (source_row / 2 % 4)) * 4);
  const auto load = [&](int slice) {
    float* const stage = to + slice % 2 * kSliceFloats;
    if (source_row < kRows) cp_async_16(stage, a, source_row < num_rows);
#pragma unroll 1  // eight addresses would take registers from the product
    for (int first = 0; first < num_cols; first += kStep) {
      cp_async_16(stage + (kRows + first) * kSlice, b + first * ld, first + source_row < num_cols);
    }
    cp_async_commit();
    a += kSlice;
    b += kSlice;
  };

  // A thread's rows are 4 apart, its columns 8 apart: all of these have the same swizzle, but every
  // other one of the rows.
  const int lane = lane_index();
  const int row = lane / 8, col = warp_index() * 64 + lane % 8;
  const int a_first = row * kSlice + row / 2 * 4;
  const int b_first = (kRows + col) * kSlice + lane % 8 / 2 * 4;
  const int num_slices = ld / kSlice;
  float sum[4][8] = {};
  load(0);
#pragma unroll 1
  for (int slice = 0; slice < num_slices; ++slice) {
    if (slice + 1 < num_slices) {
      load(slice + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    if (col - lane % 8 < num_cols) {
      const float* const stage = slices + slice % 2 * kSliceFloats;
#pragma unroll 1  // as above
      for (int chunk = 0; chunk < kSlice; chunk += 4) {
        const float* const a_chunk[2] = {stage + (a_first ^ chunk), stage + (a_first ^ chunk ^ 8)};
        const float* const b_chunk = stage + (b_first ^ chunk);
        float4 x[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          x[m] = *reinterpret_cast<const float4*>(a_chunk[m % 2] + m * 4 * kSlice);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float4 y = *reinterpret_cast<const float4*>(b_chunk + n * 8 * kSlice);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            sum[m][n] = fmaf(x[m].x, y.x, sum[m][n]);
            sum[m][n] = fmaf(x[m].y, y.y, sum[m][n]);
            sum[m][n] = fmaf(x[m].z, y.z, sum[m][n]);
            sum[m][n] = fmaf(x[m].w, y.w, sum[m][n]);
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) shared.scores[row + 4 * m][col + 8 * n] = sum[m][n];
  }
  __syncthreads();
}

/// Query blocks of a unit of choice.
struct ChooseTile {
  int32_t b, h, first;

  __device__ ChooseTile(const StreamParams& p, const Work& work)
      : b(work.pair / p.route.classify.frame.num_kv_heads),
        h(work.pair % p.route.classify.frame.num_kv_heads * p.group + work.idx / p.tiles),
        first(work.idx % p.tiles * kRows) {}
};

/// Pooled rows to scores, through memory where they are projected first.
template <int kHeadDim>
__device__ __forceinline__ void score(const StreamParams& p, StreamShared<kHeadDim>& shared) {
  const StreamRoute& route = p.route;
  const Frame& frame = route.classify.frame;
  const ChooseTile tile(p, shared.work);
  const int num_rows = min(frame.queries.num_blocks - tile.first, kRows);
  const auto ld = static_cast<int32_t>(route.ld);
  const int64_t offset =
      int64_t{(tile.b * frame.num_heads + tile.h) * frame.queries.num_blocks + tile.first} * ld;
  bool is_projection = route.folded != nullptr;
  const float* rows = route.queries.pooled;
#pragma unroll 1
  for (;;) {  // one copy of the product's code
    multiply_rows(rows + offset,
                  is_projection
                      ? route.folded + tile.h * route.folded_stride_h
                      : route.keys.pooled + int64_t{shared.work.pair * frame.keys.num_blocks} * ld,
                  num_rows, is_projection ? ld : frame.keys.num_blocks, ld, shared);
    if (!is_projection) return;
    for (int n = static_cast<int>(threadIdx.x); n < num_rows * ld; n += kThreads) {
      route.projected[offset + n] = shared.scores[n / ld][n % ld];
    }
    __syncthreads();
    rows = route.projected;
    is_projection = false;
  }
}

/// Classes of 16 query blocks of a head, from their scores.
template <int kHeadDim>
__device__ __forceinline__ void choose(const StreamParams& p, StreamShared<kHeadDim>& shared) {
  const ClassifyParams& classify = p.route.classify;
  RowGroup</*kIsOneWarp=*/true> group(nullptr);
#pragma unroll 1
  for (int r = warp_index(); r < kRows; r += kWarps) {
    __syncwarp();
    const ChooseTile tile(p, shared.work);  // again: it would take registers from the product
    if (tile.first + r >= classify.frame.queries.num_blocks) break;
    classify_row</*kIsOneWarp=*/true, /*kIsHeld=*/true>(classify, group, tile.b, tile.h,
                                                        tile.first + r, shared.scores[r]);
  }
}

// The kernel -------------------------------------------------------------------------------------

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    route_stream_kernel(const __grid_constant__ StreamParams p) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<StreamShared<kHeadDim>*>(bytes);
  const bool is_first_thread = threadIdx.x == 0;
  if (is_first_thread) shared.work = work_of(p, take_ticket(p.ticket));
  __syncthreads();
  const Work work = shared.work;
  PairCounters& done = p.done[work.pair];
  const auto wait_for = [&](const uint32_t& counter, uint32_t count) {
    if (is_first_thread) wait_for_count(&counter, count);
    __syncthreads();
  };
  const auto announce = [&](uint32_t& counter) {
    __syncthreads();
    if (is_first_thread) count_up(&counter);
  };
  if (work.stage == Stage::kChoose) {
    wait_for(p.counts.centre > 0 ? done.centre : done.keys,
             p.counts.centre > 0 ? p.counts.centre : p.counts.keys);
    wait_for(done.queries, p.counts.queries);
    score(p, shared);
    choose(p, shared);
  } else if (work.stage == Stage::kCentre) {
    wait_for(done.keys, p.counts.keys);
    centre_columns(p, work.pair, work.idx, shared);
    announce(done.centre);
  } else {
    const bool is_keys = work.stage == Stage::kKeys;
    pool_blocks<T>(is_keys ? p.route.keys : p.route.queries, is_keys ? 1 : p.group, work.pair,
                   work.idx, p, shared);
    announce(is_keys ? done.keys : done.queries);
  }
}

__global__ void clear_kernel(uint32_t* counters, int32_t num) {
  begin_kernel();
  for (auto n = static_cast<int32_t>(threadIdx.x); n < num; n += static_cast<int32_t>(blockDim.x)) {
    counters[n] = 0;
  }
}

// Launches ---------------------------------------------------------------------------------------

template <class T, int kHeadDim>
void launch_stream(const StreamParams& params, void* stream) {
  const Counts& c = params.counts;
  launch(route_stream_kernel<T, kHeadDim>,
         {.blocks = (int64_t{c.keys} + c.centre + c.queries + c.choose) * params.num_pairs,
          .threads = kThreads,
          .shared_bytes = sizeof(StreamShared<kHeadDim>)},
         stream, params);
}

template <class T>
void launch_stream(const StreamParams& params, void* stream) {
  const int32_t head_dim = params.route.classify.frame.head_dim;
  if (head_dim <= 64) {
    launch_stream<T, 64>(params, stream);
  } else if (head_dim <= 128) {
    launch_stream<T, 128>(params, stream);
  } else {
    launch_stream<T, 256>(params, stream);
  }
}

}  // namespace

int64_t num_stream_counters(const Frame& frame) {
  return 1 + int64_t{frame.batch} * frame.num_kv_heads *
                 static_cast<int64_t>(sizeof(PairCounters) / sizeof(uint32_t));
}

void stream_route(const StreamRoute& route, DType dtype, void* stream) {
  const Frame& frame = route.classify.frame;
  const auto units = [](int64_t size, int64_t unit) {
    return static_cast<uint32_t>((size + unit - 1) / unit);
  };
  const auto group = static_cast<uint32_t>(frame.group());
  const uint32_t tiles = units(frame.queries.num_blocks, kRows);
  const auto sequences = static_cast<uint32_t>(frame.keys.num_sequences);
  const StreamParams params{
      .route = route,
      .ticket = route.counters,
      .done = reinterpret_cast<PairCounters*>(route.counters + 1),
      .counts = {.keys = units(frame.keys.num_blocks, unit_blocks(frame.keys)),
                 .centre = route.keys.is_mean ? 0 : sequences * units(frame.head_dim, kCentreCols),
                 .queries =
                     units(int64_t{group} * frame.queries.num_blocks, unit_blocks(frame.queries)),
                 .choose = group * tiles},
      .num_pairs = frame.batch * frame.num_kv_heads,
      .group = frame.group(),
      .tiles = static_cast<int32_t>(tiles)};
  launch(clear_kernel, {.threads = 256}, stream, route.counters,
         static_cast<int32_t>(num_stream_counters(frame)));
  if (dtype == DType::kF16) {
    launch_stream<fp16>(params, stream);
  } else {
    launch_stream<bf16>(params, stream);
  }
}

}  // namespace sparline::cuda
