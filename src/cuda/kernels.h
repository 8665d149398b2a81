// SPDX-License-Identifier: Apache-2.0
//
// Between the host sequences (forward.cpp, backward.cpp, route.cpp) and the kernels: one function
// for each stage. All pointers are device memory, all calls are asynchronous on `stream` (a
// cudaStream_t), nothing is allocated, nothing waits. Workspace arrays are dense; their shapes are
// given. "T" is the problem's dtype, bf16 or fp16. Everything is overwritten, never accumulated
// into, unless said so.
#pragma once

#include <cstddef>
#include <span>

#include "cuda/common/frame.h"

namespace sparline::cuda {

using bf16_t = uint16_t;  // bits of a bf16, as the host sees it

// Blocks of axes ---------------------------------------------------------------------------------

/// Fills `table` (num_blocks) of one axis from its segments: `segments` and `others` (of the other
/// axis) are host memory, read during the call (they travel as kernel parameters, so that a graph
/// capture keeps them). common/blocks.cu
void fill_block_table(std::span<const Segment> segments, int block_rows,
                      std::span<const Segment> others, int other_block_rows, BlockInfo* table,
                      void* stream);

// Pooling and routing ----------------------------------------------------------------------------

/// sums[pair or (b, head)][block][d] = the sum of the rows of a block, float32 (B, heads, T, D).
/// common/pool.cu
void block_sums(const Frame& frame, const Axis& axis, DType dtype, const Rows& rows, int num_heads,
                float* sums, void* stream);
/// means[b][head][sequence][d] = the mean row of a sequence, from the sums of its blocks, in a
/// fixed order.
void sequence_means(const Frame& frame, const Axis& axis, int num_heads, const float* sums,
                    float* means, void* stream);

struct RouteParams {
  Frame frame;
  DType dtype = DType::kBF16;
  Rows q, k;
  float scale = 1.0f;
  RouteRule rule;
  const float* proj_q = nullptr;  // (1 or H, D, D), y = x W^T; null: identity
  const float* proj_k = nullptr;
  int64_t proj_stride_h = 0;  // 0: shared by heads
  PairMap block_class;        // out, int8; data is written
  float* k_mean = nullptr;    // out (B, H_kv, num_sequences, D), or null; only if rule.smooth_k
};
/// common/route.cu. Workspace: route_bytes.
int64_t route_bytes(const Frame& frame, const RouteRule& rule, bool has_projections);
void route(const RouteParams& params, std::byte* workspace, void* stream);

/// common/soft_top_k.cu
void soft_top_k(const SoftTopKArgs& args, void* stream);
void soft_top_k_backward(const SoftTopKBackwardArgs& args, void* stream);

// The sparse branch ------------------------------------------------------------------------------

/// The linear branch as the last tile of every query block (Hopper): o = a o_s + c phi(q) H_i, from
/// what linear_sums() left: row f of H_i (D x D, bf16 whatever T is) is row f of the block in o,
/// until the block's result takes its place.
struct LinearTail {
  bool is_on = false;
  const bf16_t* ragged_sums = nullptr;  // as in LinearSums
  const float* sums_z = nullptr;        // likewise: NaN where E_i is empty, and there H_i is finite
  Combine combine = Combine::kSum;      // of kProjection only the bias is left: W is in H_i
  FeatureMap feature_map = FeatureMap::kSoftmax;  // not a hedgehog map
  float epsilon = 0.0f;
  const float* bias = nullptr;  // (D), of the projection; may be null
  RowScalars alpha_logit;
};
struct SparseForward {
  Frame frame;
  Wave wave;
  DType dtype = DType::kBF16;
  int block_q = 128, block_k = 64;
  Rows q, k, v;
  Rows o;          // out: o_s; protected and other rows alike
  RowScalars lse;  // out: natural log; -inf for a row without critical keys
  float scale = 1.0f;
  float scale_log2 = 0.0f;  // scale log2(e), filled in by the launch: kernels read it as a constant
  PairMap map;
  TileBits tile_bits;  // in
  SkipRule skip;
  TileBits kept_bits;          // out, if skip is on; every byte of the wave's rows is written
  float* row_votes = nullptr;  // out (B, H, T_m); may be null
  const int32_t* tile_order = nullptr;  // (T_m, T_n)
  int64_t tile_order_stride = 0;
  const float* k_mean = nullptr;   // (B, H_kv, num_sequences, D); null: keys as they are. lse is
                                   // that of scores with the mean taken off
  bool is_protected_only = false;  // only blocks that are dense attention (combine is kLinear);
                                   // other rows: o is left alone, lse = -inf
  // Low bit, all null otherwise (sm80/sparse_low_bit.cu):
  LowBit low_bit;
  const int8_t* k_codes =
      nullptr;                     // of the wave, code_bytes(); laid out as common/low_bit.cuh says
  const float* k_steps = nullptr;  // of the wave (pairs, T_n)
  const uint8_t* v_codes = nullptr;  // of the wave, code_bytes(), e4m3
  const float* v_steps = nullptr;    // of the wave (pairs, num_sequences, D)
  LinearTail linear{};               // in: H_i lies in o's rows
  uint32_t* num_taken = nullptr;     // scratch, 0 before the launch: query blocks that CTAs took
                                     // beside their first ones; for sparse_forward_sm90() alone
};
void sparse_forward(const SparseForward& params, void* stream);
/// The same on Hopper; false, and nothing is launched, where it does not serve the device or the
/// problem. Only in builds with SPARLINE_WITH_SM90. sm90/sparse_fwd.cu
bool sparse_forward_sm90(const SparseForward& params, void* stream);
/// Whether that one serves the problem with `linear` on.
bool combines_sm90(const SparseForward& params);
void sparse_forward_low_bit(const SparseForward& params, void* stream);
/// Bytes of k_codes, and of v_codes: whole blocks of keys, both sides padded. common/quantise.cu
int64_t code_bytes(const Frame& frame, int64_t pairs);
/// Codes and steps of the wave's keys and values, less k_mean where there is one.
/// v_peaks: scratch float32 (pairs, T_n, D).
void quantise_keys_values(const SparseForward& params, int8_t* k_codes, float* k_steps,
                          uint8_t* v_codes, float* v_steps, float* v_peaks, void* stream);

/// What the sparse backward knows of each query row, by position: (B, H, N_q) each. Where the
/// branches are blended, dO_s = share dO, and both numbers stand for that:
///   share P = exp2(S_log2 - lse_log2)   and   dS = (share P) (dO v^T - delta)
struct RowStats {
  float* lse_log2 = nullptr;  // lse of scores scale q k^T log2(e) of the keys as stored (not
                              // smoothed), base 2, less log2(share); +inf for a row without
                              // critical keys or whose share is 0
  float* delta = nullptr;     // what dP loses: rowsum(dO o_s)
};
struct SparseBackward {
  Frame frame;
  DType dtype = DType::kBF16;
  int block_q = 128, block_k = 64;
  Rows q, k, v, o, d_o;
  RowScalars lse;
  float scale = 1.0f;
  PairMap map;
  TileBits tile_bits;
  const float* k_mean = nullptr;   // as in SparseForward
  bool is_protected_only = false;  // as in SparseForward
  RowStats stats;
  Rows d_q, d_k, d_v;  // out; if adds_linear, what they hold (T) is added
  bool adds_linear = false;
  const float* d_k_mean = nullptr;  // (B, H_kv, num_sequences, D): taken off every row of d_k;
                                    // null: nothing
  float* d_block_map = nullptr;  // (B, H, T_m, T_n) float32, soft map: what it holds is added to;
                                 // cleared by the caller
};
/// lse_log2 and delta = rowsum(dO o) of every row, as for a share of 1. sm80/sparse_bwd.cu
void row_stats(const SparseBackward& params, void* stream);
/// d_q by rows, then d_k and d_v by columns: no atomics. With smoothed keys d_q is that of the
/// smoothed keys.
void sparse_backward(const SparseBackward& params, void* stream);

// The linear branch ------------------------------------------------------------------------------
// States are bf16 whatever T is. A state is (h, z): h (F x D) row-major, then z (F), then zeros up
// to state_width(F, D), a multiple of 8. F-features come in slices of D: one for most maps; for the
// hedgehog maps slice 0 is made from y and slice 1 from -y, y = x W^T + b.

int64_t state_width(int64_t num_features, int64_t head_dim);

struct LinearParams {
  Frame frame;
  Wave wave;
  DType dtype = DType::kBF16;
  int block_q = 128, block_k = 64;
  Combine combine = Combine::kProjection;
  FeatureMap feature_map = FeatureMap::kSoftmax;
  LinearScope scope = LinearScope::kMarginal;
  bool is_soft = false;
  float epsilon = 0.0f;
  Rows q, k, v;
  PairMap map;                    // map.scope is set
  const float* k_mean = nullptr;  // as in SparseForward
  // Weights, float32, dense; null where absent. alpha_logit by position through its order.
  const float *proj_weight = nullptr, *proj_bias = nullptr;
  const float *feature_weight_q = nullptr, *feature_bias_q = nullptr;
  const float *feature_weight_k = nullptr, *feature_bias_k = nullptr;
  RowScalars alpha_logit;
};

/// o: in o_s (not read for kLinear), out the combination (spec: o_s + o_l, o_s + o_l W^T + b, a o_s
/// + (1 - a) o_l, o_l). Rows of protected query blocks are left alone. sm80/linear_fwd.cu
int64_t linear_forward_bytes(const LinearParams& params);
void linear_forward(const LinearParams& params, const Rows& o, std::byte* workspace, void* stream);

/// The sums of states for the Hopper sparse kernel, which combines as it goes: H_i lies in o's own
/// rows until that kernel overwrites them. With Combine::kProjection h_j is phi(k_j)^T (v_j W^T),
/// so that only the bias is left to add.
struct LinearSums {
  Rows o;                    // out: row f of H_i, bf16 whatever T is, is row f of query block i
  bf16_t* ragged = nullptr;  // out (B, H, num_sequences, D, D): H_i where a block has fewer rows
  float* z = nullptr;        // out (B, H, T_m, D): Z_i; NaN where E_i is empty
  uint32_t* num_taken = nullptr;  // out: SparseForward's, 0
  int64_t budget_bytes = 0;       // in: of the workspace; one pair's states are there in any case
};
/// All pairs in one launch, and only where `sparse` is then combined with them; else false, and
/// nothing is launched. The wave is the whole problem, of which why_linear_is_portable() (host.h)
/// has nothing to say. Bytes: 0 in builds without Hopper's kernels. sm80/linear_fwd.cu
int64_t linear_sums_bytes(const LinearParams& params, int64_t budget_bytes);
bool linear_sums(const LinearParams& params, const SparseForward& sparse, LinearSums& sums,
                 std::byte* workspace, void* stream);
/// Those on Hopper. Only in builds with SPARLINE_WITH_SM90. sm90/linear_sums.cu
int64_t linear_sums_sm90_bytes(const LinearParams& params, int64_t budget_bytes);
bool linear_sums_sm90(const LinearParams& params, LinearSums& sums, std::byte* workspace,
                      void* stream);

struct LinearBackward {
  LinearParams forward;
  Rows d_o;
  RowStats stats;      // in: of o, as from row_stats; out: of o_s and its share. Rows of protected
                       // query blocks are left alone
  Rows d_q, d_k, d_v;  // out, T: the linear branch's part, zeros where it has none
  float* d_k_sums = nullptr;  // out, if k_mean: (B, H_kv, T_n, D), sums of d_k over blocks
  float* d_block_map =
      nullptr;  // out, if is_soft: (B, H, T_m, T_n) of the wave's heads, the linear part
  float *d_proj_weight = nullptr, *d_proj_bias = nullptr;  // += over waves; cleared by the caller
  float *d_feature_weight_q = nullptr, *d_feature_bias_q = nullptr;  // likewise
  float *d_feature_weight_k = nullptr, *d_feature_bias_k = nullptr;  // likewise
  RowScalars d_alpha_logit;                                          // out; 0 for protected rows
};
/// sm80/linear_bwd.cu
int64_t linear_backward_bytes(const LinearBackward& params);
void linear_backward(const LinearBackward& params, std::byte* workspace, void* stream);

// Pieces of the linear branch that both passes use (sm80/linear_state.cu)
// ---------------------------

/// y = x W^T + b of the wave's key heads (pairs, N_k, D) or query heads (pairs group, N_q, D), T,
/// by position, with k_mean taken off x for keys. Hedgehog maps only.
void hedgehog_keys(const LinearParams& params, void* y, void* stream);
void hedgehog_queries(const LinearParams& params, void* y, void* stream);
/// states[pair][block j] = (h_j, z_j), bf16 (pairs, T_n, state_width). `y`: from hedgehog_keys.
void key_states(const LinearParams& params, const void* y, bf16_t* states, void* stream);
/// weights[head][i][j] (query heads of the wave, T_m, padded T_n): linear_weight of the pair, bf16;
/// for a soft map the rounding error follows in a second plane (T_m rows further), so that the two
/// add up. `width`: padded T_n, a multiple of 8, zeros at the end. Rows and columns of other
/// sequences are 0.
void linear_weights(const LinearParams& params, bf16_t* weights, int64_t width, void* stream);
/// sums[head][i] = sum over j of weights[head][i][j] states[pair of head][j]; with is_transposed
/// sums[pair][j] = sum over heads of the group and i of weights[head][i][j] states[head][i].
void aggregate(const LinearParams& params, const bf16_t* weights, int64_t width,
               const bf16_t* states, bf16_t* sums, bool is_transposed, void* stream);

}  // namespace sparline::cuda
