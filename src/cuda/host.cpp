// SPDX-License-Identifier: Apache-2.0
#include "cuda/host.h"

#include "cuda/device.h"

namespace sparline::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;

/// Whether each row is whole vectors of 16 bytes that start at multiples of 16 bytes.
bool is_vectorised(const TensorView& view) {
  const int64_t element = size_bytes(view.dtype);
  if (reinterpret_cast<uintptr_t>(view.data) % kVectorBytes != 0) return false;
  if (view.shape[3] * element % kVectorBytes != 0) return false;
  for (int d = 0; d < 3; ++d) {
    if (view.shape[d] > 1 && view.stride[d] * element % kVectorBytes != 0) return false;
  }
  return true;
}

/// One sequence for both axes and nothing protected: blocks follow from the block size alone.
bool is_plain(const Problem& problem) {
  const auto& queries = problem.query_segments;
  const auto& keys = problem.key_segments;
  return queries.size() == 1 && keys.size() == 1 && !queries[0].is_protected &&
         !keys[0].is_protected && queries[0].sequence == keys[0].sequence;
}

}  // namespace

Rows rows_of(const TensorView& view, const TensorView& order) {
  return {.data = view.data,
          .stride_b = view.stride[0],
          .stride_h = view.stride[1],
          .stride_n = view.stride[2],
          .order = ints(order),
          .is_vectorised = is_vectorised(view)};
}

RowScalars scalars_of(const TensorView& view, const TensorView& order) {
  return {.data = floats(view),
          .stride_b = view.stride[1],
          .stride_h = view.stride[2],
          .order = ints(order)};
}

PairMap map_of(const Problem& problem, const TensorView& block_map) {
  return {.data = block_map.data,
          .stride_b = block_map.stride[0],
          .stride_h = block_map.stride[1],
          .stride_i = block_map.stride[2],
          .stride_j = block_map.stride[3],
          .is_soft = problem.block_map == BlockMap::kSoft,
          .scope = problem.linear_scope};
}

TileBits bits_of(const Problem& problem, const TensorView& bits, int rows) {
  if (!bits) return {};
  return {.data = static_cast<uint8_t*>(bits.data),
          .stride_b = bits.stride[0],
          .stride_h = bits.stride[1],
          .stride_row = bits.stride[2],
          .stride_byte = bits.stride[3],
          .rows = rows,
          .groups = static_cast<int32_t>(bit_groups(problem, rows))};
}

DenseFloats::DenseFloats(const TensorView& view, float* scratch)
    : data(view ? scratch : nullptr), view_(view) {
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    if (view.shape[d] > 1 && view.stride[d] != stride) return;
    stride *= view.shape[d];
  }
  data = floats(view);
}

void DenseFloats::finish(void* stream) const {
  if (data == view_.data) return;
  const auto [num_batches, num_heads, num_rows, width] = view_.shape;
  const auto element = static_cast<int64_t>(sizeof(float));
  const float* from = data;
  for (int64_t b = 0; b < num_batches; ++b) {
    for (int64_t h = 0; h < num_heads; ++h, from += num_rows * width) {
      copy_rows(view_.row<float>(b, h, 0), view_.stride[2] * element, from, width * element,
                width * element, num_rows, stream);
    }
  }
}

Frame take_frame(const Plan& plan, Arena& arena) {
  const Problem& p = plan.problem;
  const auto num_query_blocks = static_cast<int32_t>(plan.query_blocks.size());
  const auto num_key_blocks = static_cast<int32_t>(plan.key_blocks.size());
  const auto num_sequences = static_cast<int32_t>(sequence_numbers(p).size());
  const auto take_table = [&](int32_t num_blocks) {
    return is_plain(p) ? nullptr : arena.take<BlockInfo>(num_blocks);
  };
  return {.queries = {.table = take_table(num_query_blocks),
                      .length = static_cast<int32_t>(p.num_queries),
                      .block_rows = p.block_q,
                      .num_blocks = num_query_blocks,
                      .num_other_blocks = num_key_blocks,
                      .num_sequences = num_sequences},
          .keys = {.table = take_table(num_key_blocks),
                   .length = static_cast<int32_t>(p.num_keys),
                   .block_rows = p.block_k,
                   .num_blocks = num_key_blocks,
                   .num_other_blocks = num_query_blocks,
                   .num_sequences = num_sequences},
          .batch = static_cast<int32_t>(p.batch),
          .num_heads = static_cast<int32_t>(p.num_heads),
          .num_kv_heads = static_cast<int32_t>(p.num_kv_heads),
          .head_dim = static_cast<int32_t>(p.head_dim)};
}

void fill_tables(const Plan& plan, const Frame& frame, void* stream) {
  const Problem& p = plan.problem;
  if (is_plain(p)) return;
  const auto fill = [&](std::span<const Segment> segments, int block_rows,
                        std::span<const Segment> others, int other_block_rows, const Axis& axis) {
    fill_block_table(segments, block_rows, others, other_block_rows,
                     const_cast<BlockInfo*>(axis.table), stream);
  };
  fill(p.query_segments, p.block_q, p.key_segments, p.block_k, frame.queries);
  fill(p.key_segments, p.block_k, p.query_segments, p.block_q, frame.keys);
}

bool has_protected_queries(const Plan& plan) {
  return std::ranges::any_of(plan.query_blocks, &Block::is_protected);
}

LinearParams linear_params(const Plan& plan, const Frame& frame) {
  const Problem& p = plan.problem;
  LinearParams params;
  params.frame = frame;
  params.wave = {.first = 0, .count = num_pairs(p)};
  params.dtype = p.dtype;
  params.block_q = p.block_q;
  params.block_k = p.block_k;
  params.combine = p.combine;
  params.feature_map = p.feature_map;
  params.scope = p.linear_scope;
  params.is_soft = p.block_map == BlockMap::kSoft;
  params.epsilon = static_cast<float>(p.epsilon);
  return params;
}

void set_weights(LinearParams& params, const Weights& weights, const TensorView& query_order) {
  params.proj_weight = floats(weights.proj_weight);
  params.proj_bias = floats(weights.proj_bias);
  params.feature_weight_q = floats(weights.feature_weight_q);
  params.feature_bias_q = floats(weights.feature_bias_q);
  params.feature_weight_k = floats(weights.feature_weight_k);
  params.feature_bias_k = floats(weights.feature_bias_k);
  params.alpha_logit = scalars_of(weights.alpha_logit, query_order);
}

const float* find_k_mean(const Plan& plan, const Frame& frame, const Rows& k,
                         const TensorView& given, float* sums, float* means, void* stream) {
  if (given) return floats(given);
  const Problem& p = plan.problem;
  const int num_heads = static_cast<int>(p.num_kv_heads);
  block_sums(frame, frame.keys, p.dtype, k, num_heads, sums, stream);
  sequence_means(frame, frame.keys, num_heads, sums, means, stream);
  return means;
}

}  // namespace sparline::cuda
