// SPDX-License-Identifier: Apache-2.0
//
// What the host sequences share: views as kernels take them, the axes of a plan, waves, and one
// function for each pass.
#pragma once

#include <algorithm>

#include "core/workspace.h"
#include "cuda/kernels.h"

namespace sparline::cuda {

int64_t route_workspace_bytes(const Plan& plan);
int64_t forward_workspace_bytes(const Plan& plan);
int64_t backward_workspace_bytes(const Plan& plan);
/// Pairs of one call of the linear branch or of the low-bit stages, at most.
int64_t forward_pairs_per_wave(const Plan& plan);
int64_t backward_pairs_per_wave(const Plan& plan);

void route(const Plan& plan, const RouteArgs& args, std::byte* workspace, void* stream);
void forward(const Plan& plan, const ForwardArgs& args, std::byte* workspace, void* stream);
void backward(const Plan& plan, const BackwardArgs& args, std::byte* workspace, void* stream);

// Views ------------------------------------------------------------------------------------------

/// (B, heads, N, width) rows, found through `order` where there is one.
Rows rows_of(const TensorView& view, const TensorView& order);
/// (1, B, heads, N) scalars; an absent view gives absent scalars.
RowScalars scalars_of(const TensorView& view, const TensorView& order);
PairMap map_of(const Problem& problem, const TensorView& block_map);
/// `rows`: query rows that share a bit; an absent view lets all rows see all.
TileBits bits_of(const Problem& problem, const TensorView& bits, int rows);

/// Floats that a kernel writes densely: straight into the caller's tensor where that is dense, else
/// into `scratch`, from where finish() copies them.
class DenseFloats {
 public:
  DenseFloats(const TensorView& view, float* scratch);
  void finish(void* stream) const;

  float* data;  // null for an absent view

 private:
  TensorView view_;
};

inline float* floats(const TensorView& view) { return static_cast<float*>(view.data); }
inline const int32_t* ints(const TensorView& view) {
  return static_cast<const int32_t*>(view.data);
}

// The problem ------------------------------------------------------------------------------------

/// Its axes. Takes their block tables from `arena`, if they need any; fill_tables() writes them.
Frame take_frame(const Plan& plan, Arena& arena);
void fill_tables(const Plan& plan, const Frame& frame, void* stream);

inline int32_t num_pairs(const Problem& problem) {
  return static_cast<int32_t>(problem.batch * problem.num_kv_heads);
}
inline int64_t num_rows(const Problem& problem) {
  return problem.batch * problem.num_heads * problem.num_queries;
}
inline int64_t q_bytes(const Problem& problem) {
  return num_rows(problem) * problem.head_dim * size_bytes(problem.dtype);
}
/// Why the forward of the problem takes the portable kernel on Hopper; empty where it takes that of
/// sm90/, which needs rows in memory order besides. forward.cpp
const char* why_forward_is_portable(const Plan& plan);
/// Likewise the forward of its linear branch: the one rule for workspace, launch and explain().
const char* why_linear_is_portable(const Plan& plan);
/// Whether some rows are dense attention whatever the method is.
bool has_protected_queries(const Plan& plan);

/// The linear branch of the problem, without pointers.
LinearParams linear_params(const Plan& plan, const Frame& frame);
void set_weights(LinearParams& params, const Weights& weights, const TensorView& query_order);

/// Where the mean keys of all sequences are, (B, H_kv, num_sequences, D): the caller's, or those
/// that it finds and leaves in `means`. `sums`: scratch of (B, H_kv, T_n, D).
const float* find_k_mean(const Plan& plan, const Frame& frame, const Rows& k,
                         const TensorView& given, float* sums, float* means, void* stream);

// Waves ------------------------------------------------------------------------------------------

/// The number of pairs that run together: as many as fit into `budget_bytes`, at least one, at most
/// `most`; then no more than the same number of waves needs.
template <class Bytes>
int64_t pairs_per_wave(int64_t num_pairs, int64_t most, int64_t budget_bytes, const Bytes& bytes) {
  int64_t fits = 1, too_many = std::min(num_pairs, most) + 1;
  while (fits + 1 < too_many) {  // bytes() rises with the number of pairs
    const int64_t middle = (fits + too_many) / 2;
    (bytes(middle) <= budget_bytes ? fits : too_many) = middle;
  }
  const int64_t num_waves = (num_pairs + fits - 1) / fits;
  return (num_pairs + num_waves - 1) / num_waves;
}

/// body(wave) for all pairs in turn.
template <class Body>
void for_each_wave(int64_t num_pairs, int64_t pairs_per_wave, const Body& body) {
  for (int64_t first = 0; first < num_pairs; first += pairs_per_wave) {
    body(Wave{.first = static_cast<int32_t>(first),
              .count = static_cast<int32_t>(std::min(pairs_per_wave, num_pairs - first))});
  }
}

}  // namespace sparline::cuda
