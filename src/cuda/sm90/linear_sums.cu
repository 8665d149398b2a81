// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/linear_sums.cuh"

#include <algorithm>

#include "core/workspace.h"
#include "cuda/device.h"
#include "cuda/sm90/tensor_map.h"

namespace sparline::cuda {
namespace {

/// The pairs whose states are there at a time: two, so that the states of one are made while those
/// of the other are added up, and more where 32 MiB, which stay in L2, hold them. One where two
/// would take more than `budget_bytes`.
int64_t num_slots(const LinearParams& params, int64_t pair_bytes, int64_t budget_bytes) {
  constexpr int64_t kCacheBytes = int64_t{32} << 20;
  const int64_t most = std::min(std::max(2 * pair_bytes, kCacheBytes), budget_bytes);
  return std::clamp<int64_t>(most / pair_bytes, 1, params.wave.count);
}

struct Space {
  bf16* states;
  bf16* z;
  uint2* bits;
  float* empty_rows;
  uint32_t* counters;
  int64_t num_counters, total_bytes;
  int32_t slots, tiles_m, tiles_n, chunks;

  Space(const LinearParams& params, int64_t budget_bytes, std::byte* base) {
    using Traits = LinearSumsTraits<bf16, 128>;
    const Frame& frame = params.frame;
    const int64_t head_dim = frame.head_dim, num_blocks = frame.keys.num_blocks;
    const int64_t pairs = params.wave.count, heads = pairs * frame.group();
    tiles_m = (frame.queries.num_blocks + Traits::kTileM - 1) / Traits::kTileM;
    tiles_n = static_cast<int32_t>(head_dim * head_dim / Traits::kTileN) + 1;  // and one of z
    chunks = (frame.keys.num_blocks + Traits::kChunk - 1) / Traits::kChunk;
    Arena arena(base);
    bits = arena.take<uint2>(heads * tiles_m * chunks * Traits::kTileM);
    empty_rows = arena.take<float>(heads * tiles_m * Traits::kTileM);
    num_counters = 2 + pairs + pairs * chunks;
    const int64_t others = arena.used_bytes() + num_counters * 4;
    slots = static_cast<int32_t>(
        num_slots(params, num_blocks * head_dim * (head_dim + 1) * 2, budget_bytes - others));
    states = arena.take<bf16>(slots * num_blocks * head_dim * head_dim);
    z = arena.take<bf16>(slots * num_blocks * head_dim);
    counters = arena.take<uint32_t>(num_counters);  // last: the arrays before it keep whole lines
    total_bytes = arena.used_bytes();
  }
};

/// False, and nothing is launched, where the device does not hold a single CTA. The kernel begins
/// only when all of its CTAs can: not before a kernel of another stream that holds a multiprocessor
/// has ended, however long that runs.
template <class T, int kHeadDim>
bool launch_sums(const LinearSumsParams& params, const Space& space, void* stream) {
  using Traits = LinearSumsTraits<T, kHeadDim>;
  const auto kernel = linear_sums_sm90_kernel<Traits>;
  LaunchShape shape{.threads = Traits::kThreads,
                    .shared_bytes = sizeof(LinearSumsShared<Traits>),
                    .is_cooperative = true};
  const int64_t num_resident =
      int64_t{current_device().num_multiprocessors} * resident_blocks(kernel, shape);
  shape.blocks = std::min<int64_t>(num_resident, std::max(params.num_units, params.num_tiles));
  if (shape.blocks == 0) return false;
  clear(space.counters, space.num_counters * static_cast<int64_t>(sizeof(uint32_t)), stream);
  launch(kernel, shape, stream, params);
  return true;
}
template <class T>
bool launch_sums(const LinearSumsParams& params, const Space& space, void* stream) {
  return params.linear.frame.head_dim == 64 ? launch_sums<T, 64>(params, space, stream)
                                            : launch_sums<T, 128>(params, space, stream);
}

}  // namespace

int64_t linear_sums_sm90_bytes(const LinearParams& params, int64_t budget_bytes) {
  return Space(params, budget_bytes, nullptr).total_bytes;
}

bool linear_sums_sm90(const LinearParams& params, LinearSums& sums, std::byte* workspace,
                      void* stream) {
  using Traits = LinearSumsTraits<bf16, 128>;
  if (!sums.o.is_vectorised || sums.o.order != nullptr) return false;
  const Frame& f = params.frame;
  const Space space(params, sums.budget_bytes, workspace);
  LinearSumsParams p{.linear = params,
                     .o = sums.o,
                     .ragged = reinterpret_cast<bf16*>(sums.ragged),
                     .sums_z = sums.z,
                     .state_data = space.states,
                     .z_data = space.z,
                     .bits = space.bits,
                     .empty_rows = space.empty_rows,
                     .bits_made = space.counters,
                     .num_units = params.wave.count * f.keys.num_blocks,
                     .num_tiles = params.wave.count * f.group() * space.tiles_m * space.tiles_n,
                     .tiles_m = space.tiles_m,
                     .tiles_n = space.tiles_n,
                     .chunks = space.chunks,
                     .slots = space.slots};
  sums.num_taken = p.bits_made + 1;  // cleared with the counters: a launch less
  p.pair_done = p.bits_made + 2;
  p.chunk_ready = p.pair_done + params.wave.count;
  const int64_t width = int64_t{f.head_dim} * f.head_dim;
  const Rows states{.data = space.states,
                    .stride_h = f.keys.num_blocks * width,
                    .stride_n = width,
                    .is_vectorised = true};
  const Rows z{.data = space.z,
               .stride_h = int64_t{f.keys.num_blocks} * f.head_dim,
               .stride_n = f.head_dim,
               .is_vectorised = true};
  const bool is_encoded = encode_rows(p.k, params.k, params.dtype, f.batch, f.num_kv_heads,
                                      f.keys.length, f.head_dim, Traits::kRunK) &&
                          encode_rows(p.v, params.v, params.dtype, f.batch, f.num_kv_heads,
                                      f.keys.length, f.head_dim, Traits::kRunK) &&
                          encode_rows(p.states, states, DType::kBF16, 1, space.slots,
                                      f.keys.num_blocks, width, Traits::kChunk) &&
                          encode_rows(p.z, z, DType::kBF16, 1, space.slots, f.keys.num_blocks,
                                      f.head_dim, Traits::kChunk) &&
                          encode_cut_rows(p.cut_states, states, DType::kBF16, 1, space.slots,
                                          f.keys.num_blocks, width, Traits::kChunk) &&
                          encode_cut_rows(p.cut_z, z, DType::kBF16, 1, space.slots,
                                          f.keys.num_blocks, f.head_dim, Traits::kChunk);
  if (!is_encoded) return false;
  return params.dtype == DType::kBF16 ? launch_sums<bf16>(p, space, stream)
                                      : launch_sums<fp16>(p, space, stream);
}

}  // namespace sparline::cuda
