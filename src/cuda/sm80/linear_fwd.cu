// SPDX-License-Identifier: Apache-2.0
//
// The linear branch, forward, and its combination with o_s.
//   o_l = phi(q) H_i / (phi(q) . Z_i + epsilon), 0 where E_i is empty or the denominator is not a
//         positive finite number
//   o = o_l, o_s + o_l, o_s + o_l W^T + b or a o_s + (1 - a) o_l
// A wave runs in three launches, after two for y of the hedgehog maps: states of key blocks,
// weights of block pairs and W as 16-bit; sums of states (one launch for each pair where they take
// the place of states); then this kernel.
//
//   Tiles    16 queries a warp, 64 or 128 of a block; a warp's rows are its own from q to o, and
//            warps meet only because they share H and W. phi(q) and o_l stay in registers
//   Shared   q, then W (rows x D); H (chunk x D); o_s, later o (rows x D); Z. Up to D = 128 H and W
//            come whole, or in halves for 64 rows: W once q has become phi(q), under the product
//            with H. Otherwise in chunks, the next after the last
//   Numerics phi and H bf16, o_l and W rounded to T for the projection, float32 in between
#include <cfloat>

#include "cuda/sm80/linear_state.cuh"

namespace sparline::cuda {
namespace {

template <int kHeadDim, int kWarps>
struct Shape {
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kChunk = kRows < kHeadDim ? kRows : kHeadDim;  // features, outputs
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kRowBytes = kRows * kHeadDim * 2;
  static constexpr int kChunkBytes = kChunk * kHeadDim * 2;
  static constexpr int kZBytes = 2 * kHeadDim * 2;
  static constexpr int kSharedBytes = 2 * kRowBytes + kChunkBytes + kZBytes;
  static constexpr int kBlocksPerSM = kHeadDim > 128 ? 2 : 512 / kThreads;
  static_assert(kSharedBytes <= 99 * 1024, "the most that sm_86 and sm_89 offer");
};

struct CombineJob {
  Rows x;                      // q, or y of the wave's heads for the hedgehog maps
  Rows o;                      // in o_s, out o
  const bf16* sums = nullptr;  // of a pair (group, T_m, width), or (num_sequences, width) if shared
  int64_t pair_stride = 0;     // from one pair's sums to the next, elements
  const bf16* weights = nullptr;  // (heads, planes, T_m, weights_width); null if shared
  const void* proj = nullptr;     // W (D x D), T
  int64_t width = 0, weights_width = 0;
  int32_t parts = 1;  // thread blocks for each query block
};

/// Whether E_i has members: whether its row of the weights is not all zero. All lanes get it.
__device__ __forceinline__ bool has_members(const bf16* row, int64_t width) {
  bool has_any = false;
  for (int64_t n = lane_index(); n < width / 8; n += kWarpSize) {
    const uint4 x = reinterpret_cast<const uint4*>(row)[n];
    has_any = has_any || ((x.x | x.y | x.z | x.w) & 0x7fff7fffu) != 0;
  }
  return __any_sync(kAllLanes, has_any);
}

/// Starts copying the first rows of a dense (num_rows x head_dim) matrix into the tile, and zeros
/// around them.
template <int kThreads, class T, int kRows, int kCols>
__device__ __forceinline__ void load_matrix_async(const SharedTile<T, kRows, kCols>& tile,
                                                  const T* matrix, int32_t num_rows,
                                                  int32_t head_dim) {
  if (head_dim % 8 == 0) {
    load_strided_async<kThreads>(tile, matrix, head_dim, num_rows, head_dim);
    return;
  }
#pragma unroll 1
  for (int n = static_cast<int>(threadIdx.x); n < kRows * kCols; n += kThreads) {
    const int row = n / kCols, col = n % kCols;
    *tile.at(row, col) = row < num_rows && col < head_dim ? matrix[row * head_dim + col] : T(0.0f);
  }
}

/// phi of a warp's 16 rows of x as A fragments, bf16.
template <class T, int kHeadDim>
__device__ __forceinline__ void make_phi(FeatureMap map, int32_t head_dim, float sign,
                                         const SharedTile<T, 16, kHeadDim>& x_tile,
                                         uint32_t (&phi)[kHeadDim / 16][4]) {
  constexpr int kSteps = kHeadDim / 16;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) load_a(phi[k], x_tile, 0, k * 16, lane_index());
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g and g + 8
    float x[kHeadDim / 4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 pair = unpack<T>(phi[k][half + 2 * e]);
        x[k * 4 + 2 * e] = pair.x;
        x[k * 4 + 2 * e + 1] = pair.y;
      }
    }
    feature_map<FragmentColumns>(map, head_dim, sign, x, x);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        phi[k][half + 2 * e] = pack<bf16>(x[k * 4 + 2 * e], x[k * 4 + 2 * e + 1]);
      }
    }
  }
}

/// The two shares of a blended row, a and 1 - a, each to full precision.
__device__ __forceinline__ float2 blend_shares(float logit, float inverse_den) {
  if (inverse_den == 0.0f) return make_float2(1.0f, 0.0f);  // the linear branch is empty
  return make_float2(1.0f / (1.0f + expf(-logit)), 1.0f / (1.0f + expf(logit)));
}

template <class T, int kHeadDim, int kWarps, int kSlices>
__global__ __launch_bounds__(Shape<kHeadDim, kWarps>::kThreads,
                             Shape<kHeadDim, kWarps>::kBlocksPerSM)  //
    void linear_combine_kernel(LinearParams p, CombineJob job) {
  begin_kernel();
  using S = Shape<kHeadDim, kWarps>;
  constexpr int kThreads = S::kThreads, kChunk = S::kChunk, kChunks = S::kChunks;
  using WarpTile = SharedTile<T, 16, kHeadDim>;
  using StateTile = SharedTile<bf16, kChunk, kHeadDim>;
  using ProjTile = SharedTile<T, kChunk, kHeadDim>;

  // Where this thread block stands.
  const int lane = lane_index(), warp = warp_index();
  const int32_t head_dim = p.frame.head_dim;
  const bool has_projection = p.combine == Combine::kProjection;
  int32_t idx = static_cast<int32_t>(blockIdx.x);
  int32_t part = 0;
  if (job.parts > 1) {
    part = idx % job.parts;
    idx /= job.parts;
  }
  const int32_t head = idx / p.frame.queries.num_blocks;
  const int32_t i = idx - head * p.frame.queries.num_blocks;
  const BlockInfo block = p.frame.queries.block(i);
  if (block.is_protected || part * S::kRows >= block.rows) return;
  const HeadIndex at = query_head_of(p.frame, p.wave, head);
  const int32_t warp_first = part * S::kRows + warp * 16;  // row of the block
  const int32_t warp_position = block.begin + warp_first;
  const int32_t warp_rows = block.rows - warp_first;  // those that exist, maybe more than 16

  const bool is_shared = job.weights == nullptr;
  const int32_t pair = head / p.frame.group();
  const int64_t sum_idx =
      is_shared ? block.sequence
                : int64_t{head - pair * p.frame.group()} * p.frame.queries.num_blocks + i;
  const bf16* const sum = job.sums + pair * job.pair_stride + sum_idx * job.width;
  const T* const x_head =
      kSlices == 2 ? job.x.head<const T>(0, head) : job.x.head<const T>(at.b, at.h);
  T* const o_head = job.o.head<T>(at.b, at.h);

  SPARLINE_DYNAMIC_SHARED(shared);
  T* const x_data = reinterpret_cast<T*>(shared);
  const StateTile h{reinterpret_cast<bf16*>(shared + S::kRowBytes)};
  const WarpTile x_tile{x_data + warp * 16 * kHeadDim};
  const WarpTile o_tile{reinterpret_cast<T*>(shared + S::kRowBytes + S::kChunkBytes) +
                        warp * 16 * kHeadDim};
  bf16* const z = reinterpret_cast<bf16*>(shared + 2 * S::kRowBytes + S::kChunkBytes);
  const auto load_h = [&](int slice, int chunk) {
    load_matrix_async<kThreads>(h, sum + (slice * head_dim + chunk * kChunk) * head_dim,
                                head_dim - chunk * kChunk, head_dim);
    cp_async_commit();
  };
  const auto proj_tile = [&](int chunk) {  // where q was, and where H was, in turn
    return ProjTile{chunk % 2 == 0 ? x_data : reinterpret_cast<T*>(h.data)};
  };
  const auto load_proj = [&](int chunk) {
    load_matrix_async<kThreads>(proj_tile(chunk),
                                static_cast<const T*>(job.proj) + chunk * kChunk * head_dim,
                                head_dim - chunk * kChunk, head_dim);
    cp_async_commit();
  };

  // Prologue: q, H, o_s; Z (slices x kHeadDim), through registers while q is on its way.
  constexpr int kZ = (kSlices * kHeadDim + kThreads - 1) / kThreads;  // of a thread
  bf16 own_z[kZ];
#pragma unroll
  for (int n = 0; n < kZ; ++n) {
    const int idx = static_cast<int>(threadIdx.x) + n * kThreads;
    const int slice = idx / kHeadDim, f = idx % kHeadDim;
    const bool is_real = slice < kSlices && f < head_dim;
    own_z[n] = is_real ? sum[(kSlices * head_dim + slice) * head_dim + f] : bf16(0.0f);
  }
  load_tile_async<kWarpSize>(x_tile, job.x, x_head, warp_position, warp_rows, head_dim);
  cp_async_commit();
  load_h(0, 0);
  if (p.combine != Combine::kLinear) {
    load_tile_async<kWarpSize>(o_tile, job.o, o_head, warp_position, warp_rows, head_dim);
  }
  cp_async_commit();
  bool is_empty = is_shared && block.other_begin >= block.other_end;
  if (!is_shared && p.combine == Combine::kBlend) {
    const int64_t row = int64_t{head} * num_weight_planes(p.is_soft) * p.frame.queries.num_blocks;
    is_empty = !has_members(job.weights + (row + i) * job.weights_width, job.weights_width);
  }
  cp_async_wait<2>();
#pragma unroll
  for (int n = 0; n < kZ; ++n) {
    const int idx = static_cast<int>(threadIdx.x) + n * kThreads;
    if (idx < kSlices * kHeadDim) z[idx] = own_z[n];
  }
  __syncwarp();

  // phi(q) H and phi(q) Z; Z is the first column of one more B fragment.
  float o_l[kHeadDim / 8][4] = {};  // (16 x D) a warp
  float den[4] = {};                // its first column
#pragma unroll 1
  for (int slice = 0; slice < kSlices; ++slice) {
    uint32_t phi[kHeadDim / 16][4];  // (16 x D) a warp
    make_phi(p.feature_map, head_dim, slice == 0 ? 1.0f : -1.0f, x_tile, phi);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (slice == 0 && chunk == 0) {
        cp_async_wait<1>();  // all but o_s
      } else {
        __syncthreads();  // the chunk before this one is done with
        load_h(slice, chunk);
        cp_async_wait<0>();
      }
      __syncthreads();
      if (has_projection && slice == kSlices - 1 && chunk == kChunks - 1) load_proj(0);
#pragma unroll
      for (int step = 0; step < kChunk / 16; ++step) {
        const int k = chunk * (kChunk / 16) + step;
        const uint32_t* const z_pairs =
            reinterpret_cast<const uint32_t*>(z + slice * kHeadDim + k * 16) + lane % 4;
        mma<bf16>(den, phi[k], lane < 4 ? z_pairs[0] : 0u, lane < 4 ? z_pairs[4] : 0u);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; n += 2) {
          uint32_t b[4];
          load_b_trans(b, h, step * 16, n * 8, lane);
          mma<bf16>(o_l[n], phi[k], b[0], b[1]);
          mma<bf16>(o_l[n + 1], phi[k], b[2], b[3]);
        }
      }
    }
  }

  // o_l; what is not usable becomes 0.
  float inverse_den[2];  // rows g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float d = __shfl_sync(kAllLanes, den[2 * half], lane & ~3) + p.epsilon;
    const float inverse = 1.0f / d;
    const bool is_usable = !is_empty && d > 0.0f && d <= FLT_MAX && inverse <= FLT_MAX;
    inverse_den[half] = is_usable ? inverse : 0.0f;
  }
  const bool is_any_unusable =
      __any_sync(kAllLanes, inverse_den[0] == 0.0f || inverse_den[1] == 0.0f);
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o_l[n][e] *= inverse_den[e / 2];
  }
  if (is_any_unusable) {  // 0, even where the sum is not finite
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (inverse_den[e / 2] == 0.0f) o_l[n][e] = 0.0f;
      }
    }
  }

  // o over o_s, each lane where its fragments lie: rows are swizzled by lane / 4, so that the
  // address of a pair of columns is an exclusive or.
  uint32_t* const o_pairs = reinterpret_cast<uint32_t*>(o_tile.data + lane / 4 * kHeadDim);
  const auto o_pair = [&](int col, int half) {
    return o_pairs + ((col / 2) ^ lane) + half * (8 * kHeadDim / 2);
  };
  if (has_projection) {
    uint32_t a[kHeadDim / 16][4];  // o_l
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        a[k][e] = pack<T>(o_l[2 * k + e / 2][e % 2 * 2], o_l[2 * k + e / 2][e % 2 * 2 + 1]);
      }
    }
#pragma unroll 1
    for (int first = 0; first < head_dim; first += 64) {  // outputs
      if (first % kChunk == 0) {
        cp_async_wait<0>();
        __syncthreads();
        if (first + kChunk < head_dim) load_proj(first / kChunk + 1);
      }
      const ProjTile w = proj_tile(first / kChunk);
      float y[8][4];  // (16 x 64) a warp
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int col = first + n * 8 + lane % 4 * 2;
        const bool has_bias = p.proj_bias != nullptr && col < head_dim;
        y[n][0] = y[n][2] = has_bias ? p.proj_bias[col] : 0.0f;
        y[n][1] = y[n][3] = has_bias ? p.proj_bias[col + 1] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          uint32_t b[4];
          load_b(b, w, first % kChunk + n * 8, k * 16, lane);
          mma<T>(y[n], a[k], b[0], b[1]);
          mma<T>(y[n + 1], a[k], b[2], b[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t* const o = o_pair(first + n * 8, half);
          const float2 o_s = unpack<T>(*o);
          *o = pack<T>(o_s.x + y[n][2 * half], o_s.y + y[n][2 * half + 1]);
        }
      }
    }
  } else {
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 share = make_float2(p.combine == Combine::kLinear ? 0.0f : 1.0f, 1.0f);
      const int row = half * 8 + lane / 4;
      if (p.combine == Combine::kBlend && row < warp_rows) {
        share = blend_shares(*p.alpha_logit.at(at.b, at.h, warp_position + row), inverse_den[half]);
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        uint32_t* const o = o_pair(n * 8, half);
        float2 value = make_float2(share.y * o_l[n][2 * half], share.y * o_l[n][2 * half + 1]);
        if (p.combine != Combine::kLinear) {
          const float2 o_s = unpack<T>(*o);
          value = make_float2(fmaf(share.x, o_s.x, value.x), fmaf(share.x, o_s.y, value.y));
        }
        *o = pack<T>(value.x, value.y);
      }
    }
  }
  __syncwarp();
  constexpr int kVectors = kHeadDim / 8, kStep = kWarpSize / kVectors;
  const int r = lane / kVectors, c = lane % kVectors;
  if (job.o.is_vectorised && job.o.order == nullptr) {
    T* to = o_head + (warp_position + r) * job.o.stride_n + c * 8;
    const int32_t rest = c * 8 < head_dim ? warp_rows - r : 0;
#pragma unroll
    for (int n = 0; n < 16; n += kStep, to += kStep * job.o.stride_n) {
      const uint4 vector = *reinterpret_cast<const uint4*>(o_tile.chunk(r + n, c));
      if (n < rest) *reinterpret_cast<uint4*>(to) = vector;
    }
    return;
  }
#pragma unroll 1
  for (int row = r; row < 16 && row < warp_rows; row += kStep) {
    store_vector(o_head + job.o.offset(warp_position + row), c * 8, head_dim, job.o.is_vectorised,
                 *reinterpret_cast<const uint4*>(o_tile.chunk(row, c)));
  }
}

/// What a wave keeps in the workspace.
struct Space {
  Space(const LinearParams& p, std::byte* workspace) : base(workspace) {
    const Frame& frame = p.frame;
    const int64_t pairs = p.wave.count, head_dim = frame.head_dim;
    const bool is_shared = choose_aggregation(p.scope) == Aggregation::kShared;
    width = state_width(p);
    weights_width = sparline::cuda::weights_width(frame.keys.num_blocks);
    states_stride = frame.keys.num_blocks * width;
    const int64_t sums_size = is_shared ? frame.keys.num_sequences * width
                                        : frame.group() * frame.queries.num_blocks * width;
    is_in_place = !is_shared && sums_size <= states_stride;
    if (is_in_place) {
      // The sums of a pair lie over the end of the states of the pair before it, whose own sums
      // have been made by then: a wave holds nearly twice the heads.
      sums = take<bf16_t>(sums_size + pairs * states_stride);
      states = sums + sums_size;
      pair_stride = states_stride;
    } else {
      sums = take<bf16_t>(pairs * sums_size);
      states = take<bf16_t>(pairs * states_stride);
      pair_stride = sums_size;
    }
    weights = is_shared ? nullptr : take<bf16_t>(weights_elements(p));
    proj = p.combine == Combine::kProjection ? take<bf16_t>(head_dim * head_dim) : nullptr;
    if (!is_hedgehog(p.feature_map)) return;
    y_keys = take<bf16_t>(pairs * frame.keys.length * head_dim);
    y_queries = take<bf16_t>(pairs * frame.group() * frame.queries.length * head_dim);
  }

  std::byte* base;
  int64_t bytes = 0;
  int64_t width, weights_width;
  int64_t states_stride;  // between pairs
  bool is_in_place;       // sums take the place of states
  int64_t pair_stride;    // as in CombineJob
  bf16_t* states;
  bf16_t* sums;
  bf16_t* weights;
  void* proj;
  void* y_keys = nullptr;
  void* y_queries = nullptr;

 private:
  template <class Element>
  Element* take(int64_t count) {
    constexpr int64_t kAlignment = 128;
    std::byte* const at = base == nullptr ? nullptr : base + bytes;
    bytes +=
        (count * static_cast<int64_t>(sizeof(Element)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<Element*>(at);
  }
};

template <class T, int kHeadDim, int kWarps, int kSlices>
void launch_combine(const LinearParams& params, CombineJob job, void* stream) {
  using S = Shape<kHeadDim, kWarps>;
  job.parts = (params.block_q + S::kRows - 1) / S::kRows;
  const int64_t heads = int64_t{params.wave.count} * params.frame.group();
  launch(linear_combine_kernel<T, kHeadDim, kWarps, kSlices>,
         {.blocks = heads * params.frame.queries.num_blocks * job.parts,
          .threads = S::kThreads,
          .shared_bytes = S::kSharedBytes},
         stream, params, job);
}

template <class T>
void launch_combine(const LinearParams& params, const CombineJob& job, void* stream) {
  const int32_t head_dim = params.frame.head_dim;
  if (is_hedgehog(params.feature_map)) {
    return head_dim > 128 ? launch_combine<T, 256, 4, 2>(params, job, stream)
                          : launch_combine<T, 128, 4, 2>(params, job, stream);
  }
  if (head_dim > 128) return launch_combine<T, 256, 4, 1>(params, job, stream);
  if (head_dim <= 64) return launch_combine<T, 64, 4, 1>(params, job, stream);
  return params.block_q <= 64 ? launch_combine<T, 128, 4, 1>(params, job, stream)
                              : launch_combine<T, 128, 8, 1>(params, job, stream);
}

}  // namespace

namespace {

/// The sums of all pairs, one pair after another where they take the place of states.
void aggregate_pairs(const LinearParams& params, const Space& space, void* stream) {
  const int32_t step = space.is_in_place ? 1 : params.wave.count;
  for (int32_t pair = 0; pair < params.wave.count; pair += step) {
    LinearParams part = params;
    part.wave = {params.wave.first + pair, step};
    const int64_t weights_stride = weights_elements(params) / params.wave.count;
    bf16_t* const sums = space.sums + pair * space.pair_stride;
    aggregate(part, space.weights + pair * weights_stride, space.weights_width,
              space.states + pair * space.states_stride, sums, false, stream);
  }
}

}  // namespace

int64_t linear_sums_bytes([[maybe_unused]] const LinearParams& params,
                          [[maybe_unused]] int64_t budget_bytes) {
#ifdef SPARLINE_WITH_SM90
  return linear_sums_sm90_bytes(params, budget_bytes);
#else
  return 0;
#endif
}
bool linear_sums([[maybe_unused]] const LinearParams& params,
                 [[maybe_unused]] const SparseForward& sparse, [[maybe_unused]] LinearSums& sums,
                 [[maybe_unused]] std::byte* workspace, [[maybe_unused]] void* stream) {
#ifdef SPARLINE_WITH_SM90
  return combines_sm90(sparse) && linear_sums_sm90(params, sums, workspace, stream);
#else
  return false;
#endif
}

int64_t linear_forward_bytes(const LinearParams& params) { return Space(params, nullptr).bytes; }

void linear_forward(const LinearParams& params, const Rows& o, std::byte* workspace, void* stream) {
  const Space space(params, workspace);
  CombineJob job{.x = params.q,
                 .o = o,
                 .sums = reinterpret_cast<const bf16*>(space.sums),
                 .pair_stride = space.pair_stride,
                 .weights = reinterpret_cast<const bf16*>(space.weights),
                 .proj = space.proj,
                 .width = space.width,
                 .weights_width = space.weights_width};
  if (is_hedgehog(params.feature_map)) {
    hedgehog_keys(params, space.y_keys, stream);
    hedgehog_queries(params, space.y_queries, stream);
    const int64_t head_dim = params.frame.head_dim;
    job.x = {.data = space.y_queries,
             .stride_h = params.frame.queries.length * head_dim,
             .stride_n = head_dim,
             .is_vectorised = head_dim % 8 == 0};
  }
  prepare_states(params, space.y_keys, space.states, space.weights, space.weights_width, space.proj,
                 stream);
  switch (choose_aggregation(params.scope)) {
    case Aggregation::kShared: sum_states(params, space.states, space.sums, false, stream); break;
    case Aggregation::kGemm: aggregate_pairs(params, space, stream); break;
  }
  switch (params.dtype) {
    case DType::kF16: return launch_combine<fp16>(params, job, stream);
    default: return launch_combine<bf16>(params, job, stream);
  }
}

}  // namespace sparline::cuda
