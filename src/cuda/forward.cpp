// SPDX-License-Identifier: Apache-2.0
//
// The stages of the forward (docs/math.md, "Forward"):
//   block tables, where segments need them; the mean key of smoothed keys, unless it is given
//   o_s and lse of all heads; under low bit wave by wave, after the codes of its keys and values
//   wave by wave, o_s in o becomes the combination with o_l
// or, where Hopper's kernels serve both branches, the sums of the linear branch of all heads first,
// then o_s, combined at once
#include <iterator>
#include <limits>
#include <utility>

#include "cuda/device.h"
#include "cuda/host.h"
#include "cuda/sm90/tiles.h"

namespace sparline::cuda {
namespace {

/// Codes and steps of the keys and values of a wave.
struct Codes {
  int8_t* k_codes;   // code_bytes()
  float* k_steps;    // (pairs, T_n)
  uint8_t* v_codes;  // code_bytes()
  float* v_steps;    // (pairs, num_sequences, D)
  float* v_peaks;    // (pairs, T_n, D)

  Codes(const Frame& frame, int64_t pairs, Arena& arena) {
    const int64_t codes = code_bytes(frame, pairs);
    const int64_t blocks = pairs * frame.keys.num_blocks;
    k_codes = arena.take<int8_t>(codes);
    k_steps = arena.take<float>(blocks);
    v_codes = arena.take<uint8_t>(codes);
    v_steps = arena.take<float>(pairs * frame.keys.num_sequences * frame.head_dim);
    v_peaks = arena.take<float>(blocks * frame.head_dim);
  }
};

/// Whether LinearSums has room for the H_i of all query blocks: for one a sequence beside those in
/// o's rows.
bool has_room_for_sums(const Plan& plan) {
  int64_t last = std::numeric_limits<int64_t>::min();  // the blocks of a sequence are neighbours
  return std::ranges::all_of(plan.query_blocks, [&](const Block& block) {
    if (block.is_protected || block.rows >= plan.problem.head_dim) return true;
    return std::exchange(last, block.sequence) != block.sequence;
  });
}

/// Bytes of what the caller has at the same time: the map, lse, and alpha of every row.
int64_t bytes_beside(const Plan& plan) {
  const Problem& p = plan.problem;
  const int64_t map_bytes = p.block_map == BlockMap::kNone    ? 0
                            : p.block_map == BlockMap::kClass ? 1
                                                              : 4;
  const int64_t num_blocks = std::ssize(plan.query_blocks) * std::ssize(plan.key_blocks);
  const int64_t scalars = p.combine == Combine::kBlend ? 2 : 1;
  return p.batch * p.num_heads * num_blocks * map_bytes + 4 * scalars * num_rows(p);
}

/// Bytes that waves may take, so that everything together is half of q, or the whole workspace
/// kFreeBytes, which nobody minds. `used_bytes`: of what else that holds.
int64_t wave_budget(const Plan& plan, int64_t used_bytes) {
  constexpr int64_t kFreeBytes = int64_t{4} << 20;
  const int64_t half = q_bytes(plan.problem) / 2 - bytes_beside(plan);
  return std::max(kFreeBytes, half) - used_bytes;
}

/// Elements of LinearSums::ragged.
int64_t ragged_size(const Problem& p, const Frame& frame) {
  return p.batch * p.num_heads * frame.queries.num_sequences * p.head_dim * p.head_dim;
}

/// Also where the plan is made without a device.
bool is_hopper(const Plan& plan) {
  return plan.target.cuda_arch == 0 || plan.target.cuda_arch == 90;
}

const char* why_linear_is_portable(const Plan& plan, const Frame& frame) {
  const Problem& p = plan.problem;
  if (!has_linear_branch(p)) return "there is none";
  if (!is_hopper(plan)) return "the device is not Hopper";
  if (const char* const why = why_forward_is_portable(plan); *why != '\0') return why;
  if (p.skip.reference != SkipReference::kNone)
    return "the sparse kernel does not combine under a skip rule";
  if (has_feature_weights(p)) return "hedgehog maps have no other";
  if (p.block_q < p.head_dim) return "block_q is below head_dim";
  if (p.block_k > 64) return "block_k is above 64";
  if (!has_room_for_sums(plan)) return "a sequence has blocks of fewer rows than head_dim";
  // Half of the budget: the other one is for states, of which linear_sums() keeps fewer then.
  if (ragged_size(p, frame) * 2 > wave_budget(plan, 0) / 2) return "its sequences are too many";
  return "";
}

/// What the forward keeps in its workspace. The stages follow one another on a stream, so that what
/// belongs to one stage alone shares `scratch`.
struct ForwardSpace {
  Frame frame;
  bool is_low_bit, is_linear, has_sparse;
  float* k_mean;        // (B, H_kv, num_sequences, D), if keys are smoothed: where it is found
  float* row_votes;     // (B, H, T_m), under a skip rule
  uint32_t* num_taken;  // where Hopper's forward may serve, else null
  bool has_sums;        // whether the linear branch may take that road
  LinearSums sums;      // without o
  std::byte* scratch;
  int64_t pairs_per_wave, total_bytes;

  ForwardSpace(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    Arena arena(base);
    frame = take_frame(plan, arena);
    is_linear = has_linear_branch(p);
    has_sparse = p.combine != Combine::kLinear || has_protected_queries(plan);
    is_low_bit = p.low_bit.is_enabled && has_sparse;
    const int64_t mean_floats = num_pairs(p) * frame.keys.num_sequences * p.head_dim;
    const int64_t sum_floats = int64_t{num_pairs(p)} * frame.keys.num_blocks * p.head_dim;
    const bool has_skip = p.skip.reference != SkipReference::kNone;
    k_mean = arena.take<float>(p.smooth_k ? mean_floats : 0);
    row_votes = arena.take<float>(has_skip ? p.batch * p.num_heads * frame.queries.num_blocks : 0);
    const bool may_be_hopper = is_hopper(plan) && *why_forward_is_portable(plan) == '\0';
    num_taken = may_be_hopper ? arena.take<uint32_t>(1) : nullptr;
    const auto wave_bytes = [&](int64_t pairs) {
      LinearParams params = linear_params(plan, frame);
      params.wave.count = static_cast<int32_t>(pairs);
      return std::max(is_linear ? linear_forward_bytes(params) : 0,
                      is_low_bit ? codes_bytes(pairs) : 0);
    };
    const LinearParams all_pairs = linear_params(plan, frame);
    has_sums = *why_linear_is_portable(plan, frame) == '\0' && linear_sums_bytes(all_pairs, 0) > 0;
    if (has_sums) {
      sums.ragged = arena.take<bf16_t>(ragged_size(p, frame));
      sums.z = arena.take<float>(p.batch * p.num_heads * frame.queries.num_blocks * p.head_dim);
    }
    sums.budget_bytes = wave_budget(plan, arena.used_bytes());
    pairs_per_wave =
        cuda::pairs_per_wave(num_pairs(p), plan.heads_per_wave, sums.budget_bytes, wave_bytes);
    Arena k_sums;
    k_sums.take<float>(p.smooth_k ? sum_floats : 0);
    scratch = arena.take<std::byte>(
        std::max({k_sums.used_bytes(), wave_bytes(pairs_per_wave),
                  has_sums ? linear_sums_bytes(all_pairs, sums.budget_bytes) : 0}));
    total_bytes = arena.used_bytes();
  }

 private:
  int64_t codes_bytes(int64_t pairs) const {
    Arena arena;
    Codes(frame, pairs, arena);
    return arena.used_bytes();
  }
};

}  // namespace

const char* why_forward_is_portable(const Plan& plan) {
  const Problem& p = plan.problem;
  if (p.low_bit.is_enabled) return "low bit has no other";
  if (p.skip.reference != SkipReference::kNone && p.skip.rows != 0 && p.skip.rows != p.block_q &&
      p.skip.rows != 64) {
    return "rows that skip apart by other numbers than 64 have no other";
  }
  if (p.block_map == BlockMap::kSoft) return "soft maps have no other";
  if (p.bit_rows > 0) return "tile bits have no other";
  if (p.head_dim != 64 && p.head_dim != 128) return "head_dim is neither 64 nor 128";
  if (p.skip.reference != SkipReference::kNone && p.block_q <= 64) {
    return "skip rules have no other where block_q is below 65";
  }
  const bool is_apart = p.skip.rows == 64;
  const Tiles tiles = p.skip.reference == SkipReference::kNone ? Tiles::kPlain
                      : is_apart                               ? Tiles::kSkippedApart
                                                               : Tiles::kSkipped;
  if (std::ssize(plan.key_blocks) > most_key_blocks(tiles, p.head_dim, tile_rows(p.block_q))) {
    return "its lists have no room for so many key blocks";
  }
  return "";
}

const char* why_linear_is_portable(const Plan& plan) {
  Arena arena;
  return why_linear_is_portable(plan, take_frame(plan, arena));
}

int64_t forward_workspace_bytes(const Plan& plan) {
  return ForwardSpace(plan, nullptr).total_bytes;
}
int64_t forward_pairs_per_wave(const Plan& plan) {
  return ForwardSpace(plan, nullptr).pairs_per_wave;
}

void forward(const Plan& plan, const ForwardArgs& args, std::byte* workspace, void* stream) {
  const Problem& p = plan.problem;
  const ForwardSpace space(plan, workspace);
  fill_tables(plan, space.frame, stream);
  const DenseFloats row_votes(args.row_votes, space.row_votes);

  SparseForward sparse{.frame = space.frame,
                       .wave = {0, num_pairs(p)},
                       .dtype = p.dtype,
                       .block_q = p.block_q,
                       .block_k = p.block_k,
                       .q = rows_of(args.q, args.query_order),
                       .k = rows_of(args.k, args.key_order),
                       .v = rows_of(args.v, args.key_order),
                       .o = rows_of(args.o, args.query_order),
                       .lse = scalars_of(args.lse, args.query_order),
                       .scale = static_cast<float>(p.softmax_scale),
                       .map = map_of(p, args.block_map),
                       .tile_bits = bits_of(p, args.tile_bits, p.bit_rows),
                       .skip = p.skip,
                       .kept_bits = bits_of(p, args.kept_bits, p.skip.rows),
                       .row_votes = row_votes.data,
                       .tile_order = ints(args.tile_order),
                       .tile_order_stride = args.tile_order.stride[2],
                       .is_protected_only = p.combine == Combine::kLinear,
                       .low_bit = p.low_bit,
                       .num_taken = space.num_taken};
  const auto clear_num_taken = [&] {
    if (space.num_taken != nullptr) clear(space.num_taken, sizeof(*space.num_taken), stream);
  };
  if (!space.has_sums) clear_num_taken();  // well before the forward, which would wait for it
  if (p.smooth_k) {
    sparse.k_mean = find_k_mean(plan, space.frame, sparse.k, args.k_mean,
                                reinterpret_cast<float*>(space.scratch), space.k_mean, stream);
  }
  LinearParams linear = linear_params(plan, space.frame);
  linear.q = sparse.q;
  linear.k = sparse.k;
  linear.v = sparse.v;
  linear.map = sparse.map;
  linear.k_mean = sparse.k_mean;
  set_weights(linear, args.weights, args.query_order);
  if (!space.is_low_bit) sparse.low_bit = {};
  LinearSums sums = space.sums;
  sums.o = sparse.o;
  if (space.has_sums && linear_sums(linear, sparse, sums, space.scratch, stream)) {
    sparse.linear = {.is_on = true,
                     .ragged_sums = sums.ragged,
                     .sums_z = sums.z,
                     .combine = p.combine,
                     .feature_map = p.feature_map,
                     .epsilon = linear.epsilon,
                     .bias = linear.proj_bias,
                     .alpha_logit = linear.alpha_logit};
    sparse.num_taken = sums.num_taken;
  } else if (space.has_sums) {
    clear_num_taken();
  }
  if (!space.is_low_bit) sparse_forward(sparse, stream);  // without a sparse branch: lse alone

  const bool is_linear_left = space.is_linear && !sparse.linear.is_on;
  const bool has_waves = space.is_low_bit || is_linear_left;
  for_each_wave(has_waves ? num_pairs(p) : 0, space.pairs_per_wave, [&](const Wave& wave) {
    if (space.is_low_bit) {
      Arena arena(space.scratch);
      const Codes codes(space.frame, wave.count, arena);
      sparse.wave = wave;
      sparse.k_codes = codes.k_codes;
      sparse.k_steps = codes.k_steps;
      sparse.v_codes = codes.v_codes;
      sparse.v_steps = codes.v_steps;
      quantise_keys_values(sparse, codes.k_codes, codes.k_steps, codes.v_codes, codes.v_steps,
                           codes.v_peaks, stream);
      sparse_forward_low_bit(sparse, stream);
    }
    if (is_linear_left) {
      linear.wave = wave;
      linear_forward(linear, sparse.o, space.scratch, stream);
    }
  });
  row_votes.finish(stream);
}

}  // namespace sparline::cuda
