// SPDX-License-Identifier: Apache-2.0
//
// States of the linear branch and their sums.
//   h_j = phi(k_j)^T v_j,  z_j = the sum of the rows of phi(k_j)    for each key block
//   (H_i, Z_i) = the sum over j of w_ij (h_j, z_j)                  for each query block
// A state is one row of state_width values (h, z), so that the sums are a matrix product of the
// weights w (T_m x T_n) with the states (T_n x state_width), in bf16 with float32 accumulation. No
// cancellation, and the same code for classes (w is 0 or 1) and soft maps (w = 1 - m, in two
// parts).
#include "cuda/sm80/linear_state.cuh"

namespace sparline::cuda {

int64_t state_width(int64_t num_features, int64_t head_dim) {
  return (num_features * head_dim + num_features + 7) / 8 * 8;
}

namespace {

constexpr int kThreads = 256;
constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Weights of block pairs -------------------------------------------------------------------------

struct WeightsJob {
  bf16* weights = nullptr;  // (heads of the wave, planes, T_m, width); null: none
  int64_t width = 0;
  int32_t num_rows = 0;  // heads T_m: a warp for each
  void* proj = nullptr;  // (D x D), T; null: none
  int32_t num_row_blocks = 0, num_blocks = 0;
};

/// Eight columns of a row of the weights.
__device__ __forceinline__ void fill_weights(const LinearParams& p, HeadIndex at, int32_t i,
                                             const BlockInfo& query, int32_t first, bf16* high_row,
                                             int64_t plane) {
  alignas(16) bf16 high[8], low[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const int32_t j = first + c;
    float weight = 0.0f;
    if (j >= query.other_begin && j < query.other_end) {
      const bool is_protected = p.frame.keys.table != nullptr && p.frame.keys.table[j].is_protected;
      weight = p.map.linear_weight(at.b, at.h, i, j, query.is_protected != 0, is_protected);
    }
    high[c] = from_float<bf16>(weight);
    low[c] = from_float<bf16>(weight - to_float(high[c]));
  }
  *reinterpret_cast<uint4*>(high_row + first) = *reinterpret_cast<const uint4*>(high);
  if (p.is_soft) {
    *reinterpret_cast<uint4*>(high_row + plane + first) = *reinterpret_cast<const uint4*>(low);
  }
}

template <class T>
__device__ __forceinline__ void run_weights_job(const LinearParams& p, const WeightsJob& job,
                                                int32_t block) {
  if (block < job.num_row_blocks) {
    const int32_t row = block * (kThreads / kWarpSize) + warp_index();
    if (row >= job.num_rows) return;
    const int32_t num_query_blocks = p.frame.queries.num_blocks;
    const int32_t head = row / num_query_blocks, i = row % num_query_blocks;
    const HeadIndex at = query_head_of(p.frame, p.wave, head);
    const BlockInfo query = p.frame.queries.block(i);
    const int64_t plane = num_query_blocks * job.width;
    bf16* const out = job.weights + head * num_weight_planes(p.is_soft) * plane + i * job.width;
    for (int32_t first = lane_index() * 8; first < job.width; first += kWarpSize * 8) {
      fill_weights(p, at, i, query, first, out, plane);
    }
    return;
  }
  const int32_t idx = (block - job.num_row_blocks) * kThreads + static_cast<int>(threadIdx.x);
  if (idx < p.frame.head_dim * p.frame.head_dim) {
    static_cast<T*>(job.proj)[idx] = from_float<T>(p.proj_weight[idx]);
  }
}

WeightsJob make_weights_job(const LinearParams& params, bf16_t* weights, int64_t width,
                            void* proj) {
  WeightsJob job{.weights = reinterpret_cast<bf16*>(weights), .width = width, .proj = proj};
  if (weights != nullptr) {
    job.num_rows = params.wave.count * params.frame.group() * params.frame.queries.num_blocks;
  }
  job.num_row_blocks = static_cast<int32_t>(ceil_div(job.num_rows, kThreads / kWarpSize));
  const int64_t proj_elements = int64_t{params.frame.head_dim} * params.frame.head_dim;
  job.num_blocks = job.num_row_blocks +
                   (proj == nullptr ? 0 : static_cast<int32_t>(ceil_div(proj_elements, kThreads)));
  return job;
}

__global__ __launch_bounds__(kThreads) void linear_weights_kernel(LinearParams p, WeightsJob job) {
  begin_kernel();
  run_weights_job<bf16>(p, job, static_cast<int32_t>(blockIdx.x));
}

// States of key blocks ---------------------------------------------------------------------------
// One thread block makes a tile of h of kBlocks key blocks, one after another: (kTile features x
// kTile channels) of one slice, which is all of h up to D = 128. Keys come in runs of 64, two of
// which fit. A block of one run is on its way while phi^T v of the one before it is multiplied; one
// of two runs is not.

template <int kHeadDim>
struct StateShape {
  static constexpr int kTile = kHeadDim < 128 ? kHeadDim : 128;
  static constexpr int kParts = kHeadDim / kTile;  // along features, and along channels
  static constexpr int kKeys = kThreads / 4;       // of a run: a quad of lanes maps a key
  static constexpr int kBlocks = 2;  // for a head of 512 blocks and 132 multiprocessors: one wave
  // Of a run: x, which becomes phi (kKeys x kHeadDim), and v (kKeys x kTile). Later h.
  static constexpr int kRunElements = kKeys * (kHeadDim + kTile);
  static constexpr int kSharedBytes = 2 * kRunElements * 2;
  static_assert(kTile * kTile <= kRunElements);
  static_assert(kSharedBytes <= 99 * 1024, "the most that sm_86 and sm_89 offer");
  // Warps: four along features, two along channels.
  static constexpr int kTilesM = kTile / 4 / 16;
  static constexpr int kTilesN = kTile / 2 / 8;
};

/// x of a run becomes phi, bf16, in place; rows from num_rows on become 0. `mean`: taken off x; may
/// be null.
template <class T, int kKeys, int kHeadDim>
__device__ __forceinline__ void map_keys(FeatureMap map, int32_t head_dim, float sign,
                                         const float* mean, int32_t num_rows,
                                         const SharedTile<T, kKeys, kHeadDim>& tile) {
  constexpr int kVectors = kHeadDim / 32;
  const int r = static_cast<int>(threadIdx.x) / 4, t = lane_index() % 4;
  float x[kHeadDim / 4];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    unpack_vector<T>(*reinterpret_cast<const uint4*>(tile.chunk(r, n * 4 + t)), x + n * 8);
  }
  if (mean != nullptr) {
#pragma unroll
    for (int v = 0; v < kHeadDim / 4; v += 2) {
      const int32_t col = VectorColumns::of(v, t);
      if (col >= head_dim) continue;
      const float2 pair = *reinterpret_cast<const float2*>(mean + col);
      x[v] -= pair.x;
      x[v + 1] -= pair.y;
    }
  }
  feature_map<VectorColumns>(map, head_dim, sign, x, x);
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    *reinterpret_cast<uint4*>(tile.chunk(r, n * 4 + t)) =
        r < num_rows ? pack_vector<bf16>(x + n * 8) : make_uint4(0, 0, 0, 0);
  }
}

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, 2) void key_states_kernel(LinearParams p, Rows x_rows,
                                                                 bf16* states, int64_t width,
                                                                 int32_t num_state_blocks,
                                                                 WeightsJob job) {
  begin_kernel();
  using Shape = StateShape<kHeadDim>;
  constexpr int kTile = Shape::kTile, kKeys = Shape::kKeys;
  constexpr int kTilesM = Shape::kTilesM, kTilesN = Shape::kTilesN;
  int32_t idx = static_cast<int32_t>(blockIdx.x);
  if (idx >= num_state_blocks) {
    run_weights_job<T>(p, job, idx - num_state_blocks);
    return;
  }

  SPARLINE_DYNAMIC_SHARED(shared);
  const auto x_tile = [&](int run) {
    return SharedTile<T, kKeys, kHeadDim>{reinterpret_cast<T*>(shared) +
                                          run % 2 * Shape::kRunElements};
  };
  const auto phi_tile = [&](int run) {
    return SharedTile<bf16, kKeys, kHeadDim>{reinterpret_cast<bf16*>(x_tile(run).data)};
  };
  const auto v_tile = [&](int run) {
    return SharedTile<bf16, kKeys, kTile>{phi_tile(run).data + kKeys * kHeadDim};
  };

  // Where this thread block stands.
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index();
  const int warp_m = warp_index() % 4, warp_n = warp_index() / 4;
  const int32_t head_dim = p.frame.head_dim, num_blocks = p.frame.keys.num_blocks;
  const bool is_y = is_hedgehog(p.feature_map);
  const int num_slices = is_y ? 2 : 1;
  const int part_n = idx % Shape::kParts * kTile;
  idx /= Shape::kParts;
  const int part_m = idx % Shape::kParts * kTile;
  idx /= Shape::kParts;
  const int slice = is_y ? idx % 2 : 0;
  idx /= num_slices;
  const int32_t groups = (num_blocks + Shape::kBlocks - 1) / Shape::kBlocks;
  const int32_t pair = idx / groups;
  int32_t j = (idx - pair * groups) * Shape::kBlocks;
  const int32_t end = j + Shape::kBlocks < num_blocks ? j + Shape::kBlocks : num_blocks;
  const HeadIndex at = kv_head_of(p.frame, p.wave, pair);
  // Rows of y are those of the wave, already less the mean.
  const T* const x_head = is_y ? x_rows.head<const T>(0, pair) : x_rows.head<const T>(at.b, at.h);
  const T* const v_head = p.v.head<const T>(at.b, at.h) + part_n;

  const auto load = [&](const BlockInfo& block, int first_run) {
    for (int32_t first = 0; first < block.rows; first += kKeys, ++first_run) {
      const int32_t begin = block.begin + first, num_rows = block.rows - first;
      load_tile_async<kThreads>(x_tile(first_run), x_rows, x_head, begin, num_rows, head_dim);
      load_tile_async<kThreads>(
          SharedTile<T, kKeys, kTile>{reinterpret_cast<T*>(v_tile(first_run).data)}, p.v, v_head,
          begin, num_rows, head_dim - part_n);
    }
    cp_async_commit();
  };
  BlockInfo block = p.frame.keys.block(j);
  load(block, 0);

#pragma unroll 1
  for (int run = 0; j < end; ++j) {
    const int num_runs = block.rows > kKeys ? 2 : 1;
    const int32_t num_rows = block.rows;
    cp_async_wait<0>();
    __syncthreads();

    // x becomes phi, and v bf16.
    const float* mean = nullptr;
    if (!is_y && p.k_mean != nullptr) {
      const int64_t head = int64_t{at.b} * p.frame.num_kv_heads + at.h;
      mean = p.k_mean + (head * p.frame.keys.num_sequences + block.sequence) * head_dim;
    }
#pragma unroll 1
    for (int n = 0; n < num_runs; ++n) {
      map_keys(p.feature_map, head_dim, slice == 0 ? 1.0f : -1.0f, mean, num_rows - n * kKeys,
               x_tile(run + n));
      if constexpr (!std::is_same_v<T, bf16>) {
#pragma unroll
        for (int vector = 0; vector < kKeys * kTile / 8; vector += kThreads) {
          uint4* const x = reinterpret_cast<uint4*>(v_tile(run + n).data) + vector + thread;
          float values[8];
          unpack_vector<T>(*x, values);
          *x = pack_vector<bf16>(values);
        }
      }
    }
    __syncthreads();
    const bool has_next = j + 1 < end;
    if (has_next) block = p.frame.keys.block(j + 1);
    const bool is_ahead = num_runs == 1 && block.rows <= kKeys;
    if (has_next && is_ahead) load(block, run + 1);

    // h = phi^T v; z is phi^T times a column of ones.
    float h[kTilesM][kTilesN][4] = {};  // (kTile/4 x kTile/2) a warp
    float z[kTilesM][4] = {};           // column 0
    const uint32_t ones = lane / 4 == 0 ? pack<bf16>(1.0f, 1.0f) : 0u;  // as a B fragment
    const bool has_z = part_n == 0 && warp_n == 0;
#pragma unroll 1
    for (int n = 0; n < num_runs; ++n) {
      const auto phi = phi_tile(run + n);
      const auto v = v_tile(run + n);
#pragma unroll
      for (int k = 0; k < kKeys; k += 16) {
        uint32_t a[kTilesM][4];
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          load_a_trans(a[m], phi, k, part_m + (warp_m * kTilesM + m) * 16, lane);
          if (has_z) mma<bf16>(z[m], a[m], ones, ones);
        }
#pragma unroll
        for (int i = 0; i < kTilesN; i += 2) {
          uint32_t b[4];
          load_b_trans(b, v, k, (warp_n * kTilesN + i) * 8, lane);
#pragma unroll
          for (int m = 0; m < kTilesM; ++m) {
            mma<bf16>(h[m][i], a[m], b[0], b[1]);
            mma<bf16>(h[m][i + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    __syncthreads();

    // h through shared memory, so that rows leave in whole vectors; rows are swizzled by lane / 4,
    // so that the address of a pair is an exclusive or.
    bf16* const state = states + (int64_t{pair} * num_blocks + j) * width;
    const int32_t num_features = num_slices * head_dim, first_feature = slice * head_dim + part_m;
    const SharedTile<bf16, kTile, kTile> out{phi_tile(run).data};
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const int row = (warp_m * kTilesM + m) * 16 + lane / 4;
      uint32_t* const pairs = reinterpret_cast<uint32_t*>(out.data + row * kTile);
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
        uint32_t* const to = pairs + ((warp_n * kTilesN + i) * 4 ^ lane);
        to[0] = pack<bf16>(h[m][i][0], h[m][i][1]);
        to[8 * kTile / 2] = pack<bf16>(h[m][i][2], h[m][i][3]);
      }
      if (has_z && lane % 4 == 0) {
        bf16* const z_out = state + num_features * head_dim + first_feature + row;
        if (part_m + row < head_dim) z_out[0] = from_float<bf16>(z[m][0]);
        if (part_m + row + 8 < head_dim) z_out[8] = from_float<bf16>(z[m][2]);
      }
    }
    __syncthreads();
    constexpr int kOutVectors = kTile * kTile / 8;
    if (Shape::kParts == 1 && head_dim == kHeadDim) {  // one stretch of memory
      static_assert(kThreads / (kTile / 8) % 8 == 0, "a thread's rows are swizzled alike");
      const auto* const from =
          reinterpret_cast<const uint4*>(out.chunk(thread / (kTile / 8), thread % (kTile / 8)));
      auto* const to = reinterpret_cast<uint4*>(state + first_feature * kHeadDim) + thread;
#pragma unroll
      for (int n = 0; n < kOutVectors; n += kThreads) to[n] = from[n];
    } else {
      for (int n = thread; n < kOutVectors; n += kThreads) {
        const int row = n / (kTile / 8), chunk = n % (kTile / 8);
        if (part_m + row >= head_dim) break;
        store_vector(state + (first_feature + row) * head_dim, part_n + chunk * 8, head_dim,
                     head_dim % 8 == 0, *reinterpret_cast<const uint4*>(out.chunk(row, chunk)));
      }
    }
    const int32_t rest = num_features * (head_dim + 1) + thread;
    if (slice == num_slices - 1 && part_m == 0 && part_n == 0 && rest < width) {
      state[rest] = bf16(0.0f);
    }
    if (has_next && !is_ahead) {
      __syncthreads();
      load(block, run + 1);
    }
    ++run;
  }
}

template <class T, int kHeadDim>
void launch_key_states(const LinearParams& params, const void* y, bf16* states,
                       const WeightsJob& job, void* stream) {
  using Shape = StateShape<kHeadDim>;
  Rows x = params.k;
  if (is_hedgehog(params.feature_map)) {
    const int64_t head_dim = params.frame.head_dim;
    x = Rows{.data = const_cast<void*>(y),
             .stride_h = params.frame.keys.length * head_dim,
             .stride_n = head_dim,
             .is_vectorised = head_dim % 8 == 0};
  }
  const auto num_blocks = static_cast<int32_t>(
      params.wave.count * ceil_div(params.frame.keys.num_blocks, Shape::kBlocks) *
      num_slices(params) * Shape::kParts * Shape::kParts);
  launch(key_states_kernel<T, kHeadDim>,
         {.blocks = int64_t{num_blocks} + job.num_blocks,
          .threads = kThreads,
          .shared_bytes = Shape::kSharedBytes},
         stream, params, x, states, state_width(params), num_blocks, job);
}

// Hedgehog maps ----------------------------------------------------------------------------------
// y = (x - mean) W^T + b: 64 rows of a block by 64 outputs, 4 x 4 a thread, float32.

struct HedgehogJob {
  Axis axis;
  Rows x;
  const float* mean = nullptr;    // (B, heads, num_sequences, D)
  const float* weight = nullptr;  // (heads, D, D)
  const float* bias = nullptr;    // (heads, D)
  bool is_query = false;
};

template <class T>
__global__ __launch_bounds__(kThreads) void hedgehog_kernel(LinearParams p, HedgehogJob job, T* y) {
  begin_kernel();
  constexpr int kTile = 64, kDepth = 32;
  __shared__ float x_tile[kTile * (kDepth + 1)];
  __shared__ float w_tile[kTile * (kDepth + 1)];
  const int32_t head_dim = p.frame.head_dim;
  const int num_cols = (head_dim + kTile - 1) / kTile;
  const int num_rows = (job.axis.block_rows + kTile - 1) / kTile;
  int32_t idx = static_cast<int32_t>(blockIdx.x);
  const int first_col = idx % num_cols * kTile;
  idx /= num_cols;
  const int first_row = idx % num_rows * kTile;
  idx /= num_rows;
  const BlockInfo block = job.axis.block(idx % job.axis.num_blocks);
  const int32_t head = idx / job.axis.num_blocks;
  if (first_row >= block.rows) return;
  const HeadIndex at =
      job.is_query ? query_head_of(p.frame, p.wave, head) : kv_head_of(p.frame, p.wave, head);
  const int num_heads = job.is_query ? p.frame.num_heads : p.frame.num_kv_heads;
  const T* const x_head = job.x.head<const T>(at.b, at.h);
  const float* const mean =
      job.mean == nullptr
          ? nullptr
          : job.mean +
                ((int64_t{at.b} * num_heads + at.h) * job.axis.num_sequences + block.sequence) *
                    head_dim;
  const float* const weight = job.weight + int64_t{at.h} * head_dim * head_dim;

  float sum[4][4] = {};
  const int thread_row = static_cast<int>(threadIdx.x) / 16;
  const int thread_col = static_cast<int>(threadIdx.x) % 16;
  for (int first = 0; first < head_dim; first += kDepth) {
    for (int n = static_cast<int>(threadIdx.x); n < kTile * kDepth; n += kThreads) {
      const int r = n / kDepth, c = first + n % kDepth;
      const int row = first_row + r, out = first_col + r;
      float value = 0.0f;
      if (row < block.rows && c < head_dim) {
        value = to_float(x_head[job.x.offset(block.begin + row) + c]);
        if (mean != nullptr) value -= mean[c];
      }
      x_tile[r * (kDepth + 1) + n % kDepth] = value;
      w_tile[r * (kDepth + 1) + n % kDepth] =
          out < head_dim && c < head_dim ? weight[int64_t{out} * head_dim + c] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kDepth; ++c) {
      float x[4], w[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        x[n] = x_tile[(thread_row + 16 * n) * (kDepth + 1) + c];
        w[n] = w_tile[(thread_col + 16 * n) * (kDepth + 1) + c];
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[m][n] = fmaf(x[m], w[n], sum[m][n]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int row = first_row + thread_row + 16 * m;
    if (row >= block.rows) continue;
    T* const out = y + (int64_t{head} * job.axis.length + block.begin + row) * head_dim;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int col = first_col + thread_col + 16 * n;
      if (col >= head_dim) continue;
      const float bias = job.bias == nullptr ? 0.0f : job.bias[int64_t{at.h} * head_dim + col];
      out[col] = from_float<T>(sum[m][n] + bias);
    }
  }
}

void launch_hedgehog(const LinearParams& params, const HedgehogJob& job, int64_t num_heads, void* y,
                     void* stream) {
  const int64_t blocks = num_heads * job.axis.num_blocks * ceil_div(job.axis.block_rows, 64) *
                         ceil_div(params.frame.head_dim, 64);
  const LaunchShape shape{.blocks = blocks, .threads = kThreads};
  switch (params.dtype) {
    case DType::kF16:
      return launch(hedgehog_kernel<fp16>, shape, stream, params, job, static_cast<fp16*>(y));
    default:
      return launch(hedgehog_kernel<bf16>, shape, stream, params, job, static_cast<bf16*>(y));
  }
}

// Sums of states: the GEMM -----------------------------------------------------------------------
// A thread block makes (128 x 128) of the sums of one head: 4 warps of 64 x 64, which read 4 KiB of
// fragments for 32 mma, as much as shared memory gives in that time. Two share a multiprocessor, so
// that one multiplies while the other starts or ends. K goes in chunks of 32 through a ring of four
// stages, 16 KiB each.

constexpr int kTileM = 128, kTileN = 128, kTileK = 32, kStages = 4;
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
constexpr int kSumsThreads = 128;
constexpr int kColVectors = kTileN / 8;

/// A (kRows x 32) tile; as SharedTile, with two rows in each 128 bytes.
template <int kRows>
struct NarrowTile {
  bf16* data;
  __device__ __forceinline__ bf16* chunk(int row, int chunk) const {
    return data + row * kTileK + ((chunk ^ (row / 2 & 3)) * 8);
  }
};
template <int kRows>
__device__ __forceinline__ const bf16* fragment_row(const NarrowTile<kRows>& tile, int row, int col,
                                                    int lane_row, int lane_chunk) {
  const int lane_offset = lane_row * kTileK + (lane_chunk ^ (lane_row / 2 & 3)) * 8;
  return tile.data + (lane_offset ^ col) + row * kTileK;
}

struct SumsJob {
  const bf16* weights = nullptr;  // (heads of the wave, planes, T_m, weights_width)
  const bf16* states = nullptr;   // (matrices of B, num_states, width)
  bf16* sums = nullptr;           // (matrices out, num_sums, width)
  int64_t weights_width = 0, width = 0;
  int32_t num_query_blocks = 0;
  int32_t num_sums = 0, num_states = 0;  // M and K of one product
  int32_t group = 1, planes = 1;
  int32_t tiles_m = 1, tiles_n = 1;
  Axis axis;  // of the sums: block m adds up the states of its own sequence
};

/// Walks the chunks of K, the states [begin, end) of each product (head of the group, plane), and
/// copies them to shared memory: from a multiple of 8 on, so that vectors of the weights stay
/// aligned, with zeros for the states before `begin`. Pointers are those of the thread's first
/// vector of a chunk.
template <bool kIsTransposed>
class ChunkLoader {
 public:
  __device__ ChunkLoader(const SumsJob& job, int32_t matrix, int32_t first_m, int32_t first_n,
                         int32_t begin, int32_t end)
      : job_(job),
        num_before_(begin % 8),
        num_states_(end <= begin ? 0 : end - begin + num_before_),
        left_(num_states_) {
    begin -= num_before_;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t head = kIsTransposed ? int64_t{matrix} * job.group : matrix;
    const int64_t states_matrix = kIsTransposed ? head : matrix / job.group;
    b_row_ = thread / kColVectors;
    const int32_t b_col = first_n + thread % kColVectors * 8;
    b_first_ = job.states + (states_matrix * job.num_states + begin + b_row_) * job.width + b_col;
    is_b_col_ = b_col < job.width;
    a_first_ = job.weights + head * job.planes * plane_elements();
    if constexpr (kIsTransposed) {  // (32 query blocks x 128 key blocks)
      const int32_t col = first_m + thread % 16 * 8;
      a_row_ = thread / 16;
      a_first_ += (begin + a_row_) * job.weights_width + col;
      num_a_ = col < job.weights_width ? kTileK : 0;
    } else {  // (128 query blocks x 32 key blocks)
      a_row_ = thread % 4 * 8;
      a_first_ += (first_m + thread / 4) * job.weights_width + begin + a_row_;
      num_a_ = job.num_sums - (first_m + thread / 4);
    }
    a_ = a_first_;
    b_ = b_first_;
  }

  /// Of all products.
  __device__ int32_t num_chunks() const {
    const int32_t num_products = job_.planes * (kIsTransposed ? job_.group : 1);
    return (num_states_ + kTileK - 1) / kTileK * num_products;
  }

  /// The next chunk, to the stage's tiles; does nothing after the last. The caller commits.
  __device__ __forceinline__ void load(bf16* a_tile, bf16* b_tile) {
    if (left_ <= 0) return;
    const int thread = static_cast<int>(threadIdx.x);
    bf16* const b_to = SharedTile<bf16, kTileK, kTileN>{b_tile}.chunk(b_row_, thread % kColVectors);
    constexpr int kStep = kSumsThreads / kColVectors;
    static_assert(kStep == 8);  // swizzled alike; states before the first one are in the first step
    const bool is_b = is_b_col_ && (b_row_ >= num_before_ || left_ < num_states_);
#pragma unroll
    for (int r = 0; r < kTileK; r += kStep) {
      cp_async_16(b_to + r * kTileN, b_ + r * job_.width,
                  (r == 0 ? is_b : is_b_col_) && b_row_ + r < left_);
    }
    if constexpr (kIsTransposed) {
      bf16* const a_to = SharedTile<bf16, kTileK, kTileM>{a_tile}.chunk(a_row_, thread % 16);
#pragma unroll
      for (int r = 0; r < kTileK; r += kSumsThreads / 16) {
        cp_async_16(a_to + r * kTileM, a_ + r * job_.weights_width,
                    r < num_a_ && a_row_ + r < left_);
      }
    } else {
      bf16* const a_to = NarrowTile<kTileM>{a_tile}.chunk(thread / 4, thread % 4);
#pragma unroll
      for (int r = 0; r < kTileM; r += kSumsThreads / 4) {
        cp_async_16(a_to + r * kTileK, a_ + r * job_.weights_width, r < num_a_ && a_row_ < left_);
      }
    }
    left_ -= kTileK;
    a_ += kIsTransposed ? kTileK * job_.weights_width : kTileK;
    b_ += kTileK * job_.width;
    if (left_ <= 0) next_product();
  }

 private:
  __device__ int64_t plane_elements() const { return job_.num_query_blocks * job_.weights_width; }
  __device__ __forceinline__ void next_product() {
    a_first_ += plane_elements();
    if (++plane_ == job_.planes) {
      plane_ = 0;
      b_first_ += job_.num_states * job_.width;
      if (!kIsTransposed || ++head_ == job_.group) return;
    }
    a_ = a_first_;
    b_ = b_first_;
    left_ = num_states_;
  }

  const SumsJob& job_;
  const int32_t num_before_;  // states from the first vector on that are not of this sequence
  const int32_t num_states_;  // with these
  int32_t left_;              // states from a_ and b_ on
  const bf16 *a_, *b_, *a_first_, *b_first_;
  int32_t a_row_, b_row_, num_a_;
  bool is_b_col_;
  int32_t plane_ = 0, head_ = 0;
};

template <bool kIsTransposed>
__global__ __launch_bounds__(kSumsThreads, 2) void aggregate_kernel(SumsJob job) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(shared);
  const auto b_tile = [&](int stage) {
    return SharedTile<bf16, kTileK, kTileN>{reinterpret_cast<bf16*>(shared + stage * kStageBytes)};
  };
  const auto a_data = [&](int stage) { return b_tile(stage).data + kTileK * kTileN; };

  const int thread = static_cast<int>(threadIdx.x), lane = lane_index();
  const int warp_m = warp_index() % 2 * 64, warp_n = warp_index() / 2 * 64;
  // Tiles of one column share their states: they run next to each other.
  int32_t idx = static_cast<int32_t>(blockIdx.x);
  const int32_t first_m = idx % job.tiles_m * kTileM;
  idx /= job.tiles_m;
  const int32_t first_n = idx % job.tiles_n * kTileN;
  const int32_t matrix = idx / job.tiles_n;

  // One sequence of the tile after the other: 0 times a state of another one may be NaN.
  const int32_t num_rows = min(kTileM, job.num_sums - first_m);
  for (int32_t first_row = 0, past_row; first_row < num_rows; first_row = past_row) {
    const BlockInfo block = job.axis.block(first_m + first_row);
    past_row = min(num_rows, job.axis.first_block_of(block.sequence + 1) - first_m);
    ChunkLoader<kIsTransposed> loader(job, matrix, first_m, first_n, block.other_begin,
                                      block.other_end);
    const int32_t num_chunks = loader.num_chunks();
    const auto load_next = [&](int stage) {
      loader.load(a_data(stage), b_tile(stage).data);
      cp_async_commit();
    };

    // Fragments are read ahead of their use: those of A by a step of 16, those of B by 16 columns.
    float sum[4][8][4] = {};  // (64 x 64) a warp
    uint32_t a[2][4][4], b[2][4];
    const auto load_a_of = [&](int stage, int step, int m) {
      if constexpr (kIsTransposed) {
        load_a_trans(a[step][m], SharedTile<bf16, kTileK, kTileM>{a_data(stage)}, step * 16,
                     warp_m + m * 16, lane);
      } else {
        load_a(a[step][m], NarrowTile<kTileM>{a_data(stage)}, warp_m + m * 16, step * 16, lane);
      }
    };
    const auto load_b_of = [&](int stage, int step, int n) {
      load_b_trans(b[n % 2], b_tile(stage), step * 16, warp_n + n * 16, lane);
    };
    const auto start_chunk = [&](int stage) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
#pragma unroll
      for (int m = 0; m < 4; ++m) load_a_of(stage, 0, m);
      load_b_of(stage, 0, 0);
    };

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) load_next(s);
    start_chunk(0);
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const int stage = chunk % kStages;
      load_next((chunk + kStages - 1) % kStages);  // where the chunk before this one was
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (step == 0) load_a_of(stage, 1, n);
          if (n < 3) {
            load_b_of(stage, step, n + 1);
          } else if (step == 0) {
            load_b_of(stage, 1, 0);
          } else {
            start_chunk((stage + 1) % kStages);
          }
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            mma<bf16>(sum[m][2 * n], a[step][m], b[n % 2][0], b[n % 2][1]);
            mma<bf16>(sum[m][2 * n + 1], a[step][m], b[n % 2][2], b[n % 2][3]);
          }
        }
      }
    }

    // Through shared memory, so that rows leave in whole vectors. Rows are swizzled by lane / 4, so
    // that the address of a pair is an exclusive or.
    static_assert(kTileM * kTileN * 2 <= kStages * kStageBytes);
    const SharedTile<bf16, kTileM, kTileN> out{reinterpret_cast<bf16*>(shared)};
    uint32_t* const pairs =
        reinterpret_cast<uint32_t*>(out.data + (warp_m + lane / 4) * kTileN + warp_n);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        uint32_t* const pair = pairs + m * (16 * kTileN / 2) + (n * 4 ^ lane);
        pair[0] = pack<bf16>(sum[m][n][0], sum[m][n][1]);
        pair[8 * kTileN / 2] = pack<bf16>(sum[m][n][2], sum[m][n][3]);
      }
    }
    __syncthreads();
    const int32_t col = first_n + thread % kColVectors * 8, row = thread / kColVectors;
    const int32_t past = col < job.width ? past_row : 0;
    bf16* to = job.sums + (int64_t{matrix} * job.num_sums + first_m + row) * job.width + col;
    constexpr int kRowsAtOnce = kSumsThreads / kColVectors;
#pragma unroll 8
    for (int r = 0; r < kTileM; r += kRowsAtOnce, to += kRowsAtOnce * job.width) {
      const uint4 vector =
          *reinterpret_cast<const uint4*>(out.chunk(row + r, thread % kColVectors));
      if (row + r >= first_row && row + r < past) *reinterpret_cast<uint4*>(to) = vector;
    }
    __syncthreads();  // before the stages are written again
  }
}

// Sums of states by sequence ---------------------------------------------------------------------
// A thread block adds up 128 columns of the states of one sequence: 16 vectors by 16 rows at a
// time.

struct SequenceSumsJob {
  const bf16* states = nullptr;  // (matrices, T, width)
  bf16* sums = nullptr;          // (pairs, num_sequences, width)
  int64_t width = 0;
  Axis axis;
  int32_t matrices_per_sum = 1;
  bool skips_protected = false;
};

__global__ __launch_bounds__(kThreads) void sum_states_kernel(SequenceSumsJob job) {
  begin_kernel();
  constexpr int kVectors = 16, kLanes = kThreads / kVectors;
  __shared__ float partial[kLanes * kVectors * 8];
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t num_vectors = static_cast<int32_t>(job.width / 8);
  const int32_t tiles = (num_vectors + kVectors - 1) / kVectors;
  const int32_t tile = static_cast<int32_t>(blockIdx.x) % tiles;
  const int32_t vector = tile * kVectors + thread % kVectors;
  const int64_t out = static_cast<int32_t>(blockIdx.x) / tiles;
  const int32_t sequence = static_cast<int32_t>(out) % job.axis.num_sequences;
  const int64_t pair = static_cast<int32_t>(out) / job.axis.num_sequences;
  const int32_t begin = job.axis.first_block_of(sequence);
  const int32_t end = job.axis.first_block_of(sequence + 1);

  float sum[8] = {};
  if (vector < num_vectors) {
    for (int32_t g = 0; g < job.matrices_per_sum; ++g) {
      const bf16* const column =
          job.states + (pair * job.matrices_per_sum + g) * job.axis.num_blocks * job.width +
          vector * 8;
#pragma unroll 4
      for (int32_t n = begin + thread / kVectors; n < end; n += kLanes) {
        if (job.skips_protected && job.axis.table != nullptr && job.axis.table[n].is_protected) {
          continue;
        }
        const uint4 x = *reinterpret_cast<const uint4*>(column + n * job.width);
        float values[8];
        unpack_vector<bf16>(x, values);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += values[e];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) partial[thread * 8 + e] = sum[e];
  __syncthreads();
  if (thread >= kVectors * 8) return;
  const int32_t col = tile * kVectors * 8 + thread;
  if (col >= job.width) return;
  float total = 0.0f;
  for (int n = 0; n < kLanes; ++n) total += partial[n * kVectors * 8 + thread];
  job.sums[out * job.width + col] = from_float<bf16>(total);
}

}  // namespace

// Launches ---------------------------------------------------------------------------------------

void hedgehog_keys(const LinearParams& params, void* y, void* stream) {
  const HedgehogJob job{.axis = params.frame.keys,
                        .x = params.k,
                        .mean = params.k_mean,
                        .weight = params.feature_weight_k,
                        .bias = params.feature_bias_k,
                        .is_query = false};
  launch_hedgehog(params, job, params.wave.count, y, stream);
}

void hedgehog_queries(const LinearParams& params, void* y, void* stream) {
  const HedgehogJob job{.axis = params.frame.queries,
                        .x = params.q,
                        .mean = nullptr,
                        .weight = params.feature_weight_q,
                        .bias = params.feature_bias_q,
                        .is_query = true};
  launch_hedgehog(params, job, int64_t{params.wave.count} * params.frame.group(), y, stream);
}

void prepare_states(const LinearParams& params, const void* y, bf16_t* states, bf16_t* weights,
                    int64_t width, void* proj, void* stream) {
  const WeightsJob job = make_weights_job(params, weights, width, proj);
  bf16* const out = reinterpret_cast<bf16*>(states);
  const auto run = [&](auto element) {
    using T = decltype(element);
    const int32_t head_dim = params.frame.head_dim;
    if (head_dim <= 64) return launch_key_states<T, 64>(params, y, out, job, stream);
    if (head_dim <= 128) return launch_key_states<T, 128>(params, y, out, job, stream);
    return launch_key_states<T, 256>(params, y, out, job, stream);
  };
  switch (params.dtype) {
    case DType::kF16: return run(fp16());
    default: return run(bf16());
  }
}

void key_states(const LinearParams& params, const void* y, bf16_t* states, void* stream) {
  prepare_states(params, y, states, nullptr, 0, nullptr, stream);
}

void linear_weights(const LinearParams& params, bf16_t* weights, int64_t width, void* stream) {
  const WeightsJob job = make_weights_job(params, weights, width, nullptr);
  launch(linear_weights_kernel, {.blocks = job.num_blocks, .threads = kThreads}, stream, params,
         job);
}

void aggregate(const LinearParams& params, const bf16_t* weights, int64_t width,
               const bf16_t* states, bf16_t* sums, bool is_transposed, void* stream) {
  const Frame& frame = params.frame;
  const int32_t num_query_blocks = frame.queries.num_blocks;
  const int32_t num_key_blocks = frame.keys.num_blocks;
  SumsJob job{.weights = reinterpret_cast<const bf16*>(weights),
              .states = reinterpret_cast<const bf16*>(states),
              .sums = reinterpret_cast<bf16*>(sums),
              .weights_width = width,
              .width = state_width(params),
              .num_query_blocks = num_query_blocks,
              .num_sums = is_transposed ? num_key_blocks : num_query_blocks,
              .num_states = is_transposed ? num_query_blocks : num_key_blocks,
              .group = frame.group(),
              .planes = num_weight_planes(params.is_soft),
              .axis = is_transposed ? frame.keys : frame.queries};
  job.tiles_m = static_cast<int32_t>(ceil_div(job.num_sums, kTileM));
  job.tiles_n = static_cast<int32_t>(ceil_div(job.width, kTileN));
  const int64_t num_matrices = int64_t{params.wave.count} * (is_transposed ? 1 : job.group);
  launch(is_transposed ? aggregate_kernel<true> : aggregate_kernel<false>,
         {.blocks = num_matrices * job.tiles_m * job.tiles_n,
          .threads = kSumsThreads,
          .shared_bytes = kStages * kStageBytes},
         stream, job);
}

void sum_states(const LinearParams& params, const bf16_t* states, bf16_t* sums, bool is_transposed,
                void* stream) {
  const Frame& frame = params.frame;
  const SequenceSumsJob job{.states = reinterpret_cast<const bf16*>(states),
                            .sums = reinterpret_cast<bf16*>(sums),
                            .width = state_width(params),
                            .axis = is_transposed ? frame.queries : frame.keys,
                            .matrices_per_sum = is_transposed ? frame.group() : 1,
                            .skips_protected = is_transposed};
  const int64_t tiles = ceil_div(job.width / 8, 16);
  launch(
      sum_states_kernel,
      {.blocks = int64_t{params.wave.count} * job.axis.num_sequences * tiles, .threads = kThreads},
      stream, job);
}

}  // namespace sparline::cuda
