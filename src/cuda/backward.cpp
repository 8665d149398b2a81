// SPDX-License-Identifier: Apache-2.0
//
// The stages of the backward (docs/math.md, "Backward"):
//   block tables and the mean key, as in the forward; lse in log2 units and delta of every row
//   wave by wave, the linear branch: its parts of d_q, d_k, d_v and of the soft map's gradient;
//     the rows' statistics become those of o_s
//   the mean over keys of its d_k, if keys are smoothed
//   the sparse branch, added to what is there
#include "cuda/device.h"
#include "cuda/host.h"

namespace sparline::cuda {
namespace {

/// What the backward keeps in its workspace; what belongs to one stage alone shares `scratch`.
struct BackwardSpace {
  Frame frame;
  bool is_linear, is_soft;
  RowStats stats;
  float* k_mean;       // (B, H_kv, num_sequences, D), if keys are smoothed: where it is found
  float* d_k_sums;     // (B, H_kv, T_n, D), likewise: of the linear branch
  float* d_k_mean;     // (B, H_kv, num_sequences, D), likewise
  float* d_block_map;  // (B, H, T_m, T_n), under a soft map
  std::byte* scratch;
  int64_t pairs_per_wave, total_bytes;

  BackwardSpace(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    Arena arena(base);
    frame = take_frame(plan, arena);
    is_linear = has_linear_branch(p);
    is_soft = p.block_map == BlockMap::kSoft;
    const int64_t mean_floats =
        p.smooth_k ? int64_t{num_pairs(p)} * frame.keys.num_sequences * p.head_dim : 0;
    const int64_t sum_floats =
        p.smooth_k ? int64_t{num_pairs(p)} * frame.keys.num_blocks * p.head_dim : 0;
    const int64_t map_floats = p.batch * p.num_heads * frame.queries.num_blocks *
                               static_cast<int64_t>(frame.keys.num_blocks);
    stats.lse_log2 = arena.take<float>(num_rows(p));
    stats.delta = arena.take<float>(num_rows(p));
    k_mean = arena.take<float>(mean_floats);
    d_k_sums = arena.take<float>(is_linear ? sum_floats : 0);
    d_k_mean = arena.take<float>(is_linear ? mean_floats : 0);
    d_block_map = arena.take<float>(is_soft ? map_floats : 0);
    const auto wave_bytes = [&](int64_t pairs) {
      if (!is_linear) return int64_t{0};
      LinearBackward params;
      params.forward = linear_params(plan, frame);
      params.forward.wave.count = static_cast<int32_t>(pairs);
      return linear_backward_bytes(params);
    };
    // A training step may peak at 1.10 times FlashAttention 2's; with this much it is at 0.93.
    // Where q is small, few launches matter more than few bytes.
    const int64_t budget = std::max(int64_t{32} << 20, q_bytes(p) * 16 / 5);
    pairs_per_wave = cuda::pairs_per_wave(num_pairs(p), plan.heads_per_wave, budget, wave_bytes);
    Arena sums;
    sums.take<float>(sum_floats);
    scratch = arena.take<std::byte>(std::max(sums.used_bytes(), wave_bytes(pairs_per_wave)));
    total_bytes = arena.used_bytes();
  }
};

void clear_weight_grads(const Weights& grads, void* stream) {
  for (const TensorView* grad :
       {&grads.proj_weight, &grads.proj_bias, &grads.feature_weight_q, &grads.feature_bias_q,
        &grads.feature_weight_k, &grads.feature_bias_k}) {
    if (!*grad) continue;
    const auto& shape = grad->shape;
    clear(grad->data, shape[0] * shape[1] * shape[2] * shape[3] * size_bytes(grad->dtype), stream);
  }
}

}  // namespace

int64_t backward_workspace_bytes(const Plan& plan) {
  return BackwardSpace(plan, nullptr).total_bytes;
}
int64_t backward_pairs_per_wave(const Plan& plan) {
  return BackwardSpace(plan, nullptr).pairs_per_wave;
}

void backward(const Plan& plan, const BackwardArgs& args, std::byte* workspace, void* stream) {
  const Problem& p = plan.problem;
  const BackwardSpace space(plan, workspace);
  fill_tables(plan, space.frame, stream);
  const DenseFloats d_block_map(args.d_block_map, space.d_block_map);
  const bool has_skip = p.skip.reference != SkipReference::kNone;

  SparseBackward sparse{
      .frame = space.frame,
      .dtype = p.dtype,
      .block_q = p.block_q,
      .block_k = p.block_k,
      .q = rows_of(args.q, args.query_order),
      .k = rows_of(args.k, args.key_order),
      .v = rows_of(args.v, args.key_order),
      .o = rows_of(args.o, args.query_order),
      .d_o = rows_of(args.d_o, args.query_order),
      .lse = scalars_of(args.lse, args.query_order),
      .scale = static_cast<float>(p.softmax_scale),
      .map = map_of(p, args.block_map),
      .tile_bits = bits_of(p, args.tile_bits, has_skip ? p.skip.rows : p.bit_rows),
      .is_protected_only = p.combine == Combine::kLinear,
      .stats = space.stats,
      .d_q = rows_of(args.d_q, args.query_order),
      .d_k = rows_of(args.d_k, args.key_order),
      .d_v = rows_of(args.d_v, args.key_order),
      .adds_linear = space.is_linear,
      .d_block_map = d_block_map.data};
  if (p.smooth_k) {
    sparse.k_mean = find_k_mean(plan, space.frame, sparse.k, args.k_mean,
                                reinterpret_cast<float*>(space.scratch), space.k_mean, stream);
  }
  row_stats(sparse, stream);
  if (d_block_map.data != nullptr) {
    const int64_t num_entries = p.batch * p.num_heads * space.frame.queries.num_blocks *
                                static_cast<int64_t>(space.frame.keys.num_blocks);
    clear(d_block_map.data, num_entries * size_bytes(DType::kF32), stream);
  }

  if (space.is_linear) {
    clear_weight_grads(args.d_weights, stream);
    LinearBackward linear{
        .forward = linear_params(plan, space.frame),
        .d_o = sparse.d_o,
        .stats = space.stats,
        .d_q = sparse.d_q,
        .d_k = sparse.d_k,
        .d_v = sparse.d_v,
        .d_k_sums = p.smooth_k ? space.d_k_sums : nullptr,
        .d_block_map = d_block_map.data,
        .d_proj_weight = floats(args.d_weights.proj_weight),
        .d_proj_bias = floats(args.d_weights.proj_bias),
        .d_feature_weight_q = floats(args.d_weights.feature_weight_q),
        .d_feature_bias_q = floats(args.d_weights.feature_bias_q),
        .d_feature_weight_k = floats(args.d_weights.feature_weight_k),
        .d_feature_bias_k = floats(args.d_weights.feature_bias_k),
        .d_alpha_logit = scalars_of(args.d_weights.alpha_logit, args.query_order)};
    linear.forward.q = sparse.q;
    linear.forward.k = sparse.k;
    linear.forward.v = sparse.v;
    linear.forward.map = sparse.map;
    linear.forward.k_mean = sparse.k_mean;
    set_weights(linear.forward, args.weights, args.query_order);
    for_each_wave(num_pairs(p), space.pairs_per_wave, [&](const Wave& wave) {
      linear.forward.wave = wave;
      linear_backward(linear, space.scratch, stream);
    });
    if (p.smooth_k) {
      sequence_means(space.frame, space.frame.keys, static_cast<int>(p.num_kv_heads),
                     space.d_k_sums, space.d_k_mean, stream);
      sparse.d_k_mean = space.d_k_mean;
    }
  }
  const bool has_sparse = p.combine != Combine::kLinear || has_protected_queries(plan);
  if (has_sparse || sparse.d_k_mean != nullptr) sparse_backward(sparse, stream);
  d_block_map.finish(stream);
}

}  // namespace sparline::cuda
