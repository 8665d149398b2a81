// SPDX-License-Identifier: Apache-2.0
//
// SLA from C++, forward and backward, on random data: plan, allocate what the plan says, run.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "sparline/attention.h"

namespace {

/// Scratch as the library asks for it: aligned to 64 bytes.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : size_(static_cast<size_t>((bytes + 63) / 64 * 64)),
        memory_(static_cast<std::byte*>(std::aligned_alloc(64, size_ + 64)), std::free) {}
  std::span<std::byte> span() { return {memory_.get(), size_}; }

 private:
  size_t size_;
  std::unique_ptr<std::byte, void (*)(void*)> memory_;
};

std::vector<float> random_values(int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

}  // namespace

int main() try {
  using namespace sparline;
  constexpr int64_t kBatch = 1, kHeads = 4, kRows = 1000, kDim = 64;
  const Executor executor = default_executor();

  // What to compute: SLA as in the paper, 64 x 64 blocks.
  const Problem problem{.batch = kBatch,
                        .num_heads = kHeads,
                        .num_kv_heads = kHeads,
                        .num_queries = kRows,
                        .num_keys = kRows,
                        .head_dim = kDim,
                        .block_q = 64,
                        .block_k = 64,
                        .combine = Combine::kProjection,
                        .block_map = sparline::BlockMap::kClass,
                        .feature_map = FeatureMap::kSoftmax,
                        .linear_scope = LinearScope::kMarginal};
  const Plan plan = sparline::plan(problem, {.num_threads = executor.num_threads});
  std::printf("sparline %s\n%s\n", version(), explain(plan).c_str());

  // Memory belongs to the caller. Rows of one head lie kHeads * kDim apart here: (batch, length,
  // heads, head_dim).
  const int64_t count = kBatch * kHeads * kRows * kDim;
  const auto view = [](std::vector<float>& values) {
    return TensorView{.data = values.data(),
                      .dtype = DType::kF32,
                      .shape = {kBatch, kHeads, kRows, kDim},
                      .stride = {kRows * kHeads * kDim, kDim, kHeads * kDim, 1}};
  };
  std::vector<float> q = random_values(count, 1), k = random_values(count, 2);
  std::vector<float> v = random_values(count, 3), d_o = random_values(count, 4);
  std::vector<float> o(count), lse(kBatch * kHeads * kRows);
  std::vector<float> d_q(count), d_k(count), d_v(count);
  std::vector<float> proj_weight(kDim * kDim, 0.01F), proj_bias(kDim, 0.0F);
  std::vector<float> d_proj_weight(kDim * kDim), d_proj_bias(kDim);
  const TensorView lse_view = contiguous_view(lse.data(), DType::kF32, {1, kBatch, kHeads, kRows});
  const auto weights_view = [](std::vector<float>& weight, std::vector<float>& bias) {
    return Weights{.proj_weight = contiguous_view(weight.data(), DType::kF32, {1, 1, kDim, kDim}),
                   .proj_bias = contiguous_view(bias.data(), DType::kF32, {1, 1, 1, kDim})};
  };

  // Which blocks matter.
  const auto query_blocks = static_cast<int64_t>(plan.query_blocks.size());
  const auto key_blocks = static_cast<int64_t>(plan.key_blocks.size());
  std::vector<int8_t> classes(kBatch * kHeads * query_blocks * key_blocks);
  const TensorView block_class =
      contiguous_view(classes.data(), DType::kI8, {kBatch, kHeads, query_blocks, key_blocks});
  Workspace route_space(plan.route_workspace_bytes);
  route(plan,
        {.q = view(q),
         .k = view(k),
         .rule = {.critical_ratio = 0.2, .negligible_ratio = 0.1},
         .block_class = block_class},
        route_space.span(), {.executor = &executor});

  Workspace forward_space(plan.forward_workspace_bytes);
  forward(plan,
          {.q = view(q),
           .k = view(k),
           .v = view(v),
           .block_map = block_class,
           .weights = weights_view(proj_weight, proj_bias),
           .o = view(o),
           .lse = lse_view},
          forward_space.span(), {.executor = &executor});

  Workspace backward_space(plan.backward_workspace_bytes);
  backward(plan,
           {.d_o = view(d_o),
            .q = view(q),
            .k = view(k),
            .v = view(v),
            .o = view(o),
            .lse = lse_view,
            .block_map = block_class,
            .weights = weights_view(proj_weight, proj_bias),
            .d_q = view(d_q),
            .d_k = view(d_k),
            .d_v = view(d_v),
            .d_weights = weights_view(d_proj_weight, d_proj_bias)},
           backward_space.span(), {.executor = &executor});

  // The gradient of the projection bias is the sum of d_o over all rows.
  double bias_error = 0.0;
  for (int64_t d = 0; d < kDim; ++d) {
    double sum = 0.0;
    for (int64_t at = d; at < count; at += kDim) sum += d_o[at];
    bias_error = std::max(bias_error, std::abs(sum - d_proj_bias[d]));
  }
  int64_t critical = 0;
  for (int8_t block : classes) critical += block == 1;
  std::printf("critical blocks: %lld of %zu, o[0] %.6f, d_q[0] %.6f, bias gradient off by %.1e\n",
              static_cast<long long>(critical), classes.size(), o[0], d_q[0], bias_error);
  return bias_error < 1e-2 ? 0 : 1;
} catch (const sparline::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
