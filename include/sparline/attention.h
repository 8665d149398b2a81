// SPDX-License-Identifier: Apache-2.0
//
// Sparse-linear attention. Letters are the paper's: q k v o, lse, phi, h (sum of phi(k) v^T), z
// (sum of phi(k)); i is a query block, j a key block; B H H_kv N_q N_k D F as in docs/math.md.
//
//   Problem  what to compute            (a value; no pointers)
//   plan()   how it will be computed    (pure: allocates nothing on the device, launches nothing)
//   route() / forward() / backward()    (memory, workspace and stream belong to the caller; nothing
//   global)
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sparline/error.h"
#include "sparline/tensor.h"

namespace sparline {

/// A run of rows [begin, end) of the query or key axis. Packed sequences and protected (text,
/// condition) spans are both segments: blocks never straddle a segment border and pooling never
/// mixes segments. Queries of a sequence see the keys of the same sequence number only. Zero-length
/// segments are legal and produce nothing.
struct Segment {
  int64_t begin = 0;
  int64_t end = 0;
  int32_t sequence = 0;
  bool is_protected =
      false;  // keys: critical for every query; queries: exactly dense attention, o = o_s
};

/// A block of rows [begin, begin + rows): `block_q` or `block_k` rows, fewer at the end of a
/// segment.
struct Block {
  int64_t begin = 0;
  int32_t rows = 0;
  int32_t sequence = 0;
  bool is_protected = false;
};

/// phi of the linear branch, applied to unscaled q and k rows (docs/math.md, "Feature maps").
enum class FeatureMap : uint8_t { kSoftmax, kElu1, kRelu, kIdentity, kHedgehog, kHedgehogExp };

/// The key blocks E_i over which the linear branch of query block i sums.
enum class LinearScope : uint8_t {
  kMarginal,    // class 0
  kComplement,  // class 0 or -1
  kAll,         // every block of the sequence
};

/// How the branches form the output.
enum class Combine : uint8_t {
  kSparse,      // o = o_s                        (dense attention is this without a block map)
  kLinear,      // o = o_l
  kSum,         // o = o_s + o_l
  kProjection,  // o = o_s + o_l W^T + b          (SLA Eq. 6)
  kBlend,       // o = a o_s + (1 - a) o_l, a = sigmoid(alpha_logit), one for each query row; a row
                // whose linear branch is empty takes a = 1  (SLA2 Eq. 13)
};

/// What the block map holds.
enum class BlockMap : uint8_t {
  kNone,   // no map: every block of the sequence is critical
  kClass,  // int8: 1 critical, 0 marginal, -1 negligible
  kSoft,   // float32 m in [0, 1]: the sparse branch weighs exp(S) by m, the linear branch phi(q)
           // phi(k) by 1 - m; linear_scope must be kComplement  (SLA2, stage 1)
};

/// In-loop skipping (training-free). Key blocks are visited one after another, S = scale q k^T is
/// computed, and the tile is dropped where max S - reference < log_threshold for every row that
/// decides: no exponential, no P V, no change of the running maximum and sum.
enum class SkipReference : uint8_t {
  kNone,
  kRunningMax,  // the running maximum of the row                     (BLASST)
  kKeptLse,     // ln of the row's sum of exp(S) over the kept tiles  (DynSparse Eq. 5-7)
};
struct SkipRule {
  SkipReference reference = SkipReference::kNone;
  double log_threshold = 0.0;  // natural log, < 0; -inf skips nothing
  int rows = 0;  // rows of a query block that decide together: a multiple of 16 below block_q, or
                 // block_q; 0 stands for block_q
};

/// Low-bit forward of the sparse branch (SageAttention2++). q and k become int8, delta = max |x| /
/// 127 over `q_rows` query rows (0: the query block) and over a key block; p = exp(S - running max)
/// becomes e4m3(p_range p); v becomes e4m3(v / delta_v), delta_v = max |v| / v_range per channel
/// over the sequence. Rounding to nearest even; delta = 1 where all is zero. Row sums stay float32
/// and unrounded. The backward is that of the unquantised operator with the forward's o and lse.
struct LowBit {
  bool is_enabled = false;
  int q_rows = 0;  // as skip.rows
  double p_range = 448.0;
  double v_range = 448.0;
};

struct Problem {
  int64_t batch = 1;
  int64_t num_heads = 1;       // H, query heads
  int64_t num_kv_heads = 1;    // H_kv; H mod H_kv = 0, query head h reads kv head h / (H / H_kv)
  int64_t num_queries = 0;     // N_q >= 1
  int64_t num_keys = 0;        // N_k >= 1
  int64_t head_dim = 0;        // D, even, 4..256
  DType dtype = DType::kF32;   // of q, k, v, o and their gradients; weights are always float32
  int block_q = 128;           // 16..128
  int block_k = 64;            // 16..128
  double softmax_scale = 0.0;  // 0: 1 / sqrt(D)
  Combine combine = Combine::kSparse;
  BlockMap block_map = BlockMap::kNone;
  int bit_rows = 0;       // tile_bits: rows of a query block that share a bit; 0: no tile bits
  bool smooth_k = false;  // subtract the mean key of its sequence from every key, float32, for all
                          // of the operator. The backward passes the linear branch's d_k through
                          // the mean; the sparse branch's sums to zero already
  SkipRule skip{};
  LowBit low_bit{};
  FeatureMap feature_map = FeatureMap::kSoftmax;
  LinearScope linear_scope = LinearScope::kMarginal;
  double epsilon = 0.0;                   // added to the linear denominator
  std::vector<Segment> query_segments{};  // empty: one sequence, nothing protected
  std::vector<Segment>
      key_segments{};  // in order, contiguous, covering [0, N); sequence numbers never decrease
};

/// F: features per row, D or 2 D (the hedgehog maps).
int64_t feature_dim(const Problem& problem);
/// Whether a linear branch exists at all.
bool has_linear_branch(const Problem& problem);
/// Whether the feature map has learned weights.
bool has_feature_weights(const Problem& problem);
/// Rows of bits that one query block takes in tile_bits and kept_bits: ceil(block_q / rows), where
/// rows 0 stands for block_q.
int64_t bit_groups(const Problem& problem, int rows);
/// The sequence numbers that the segments of either axis name, ascending: S of them. Row s of a
/// k_mean is that of number s of the list.
std::vector<int32_t> sequence_numbers(const Problem& problem);
/// The segments of one axis cut into blocks; `segments` empty stands for one sequence of `length`
/// rows.
std::vector<Block> make_blocks(std::span<const Segment> segments, int64_t length, int block_rows);

enum class Device : uint8_t { kCPU, kCUDA };

/// Who runs the parallel loops of the CPU backend. `parallel_for` calls body(body_context, idx) for
/// idx in [0, count), in any order, from at most `num_threads` threads, and returns when all are
/// done. Bodies do not throw.
struct Executor {
  int num_threads = 1;
  void (*parallel_for)(int num_threads, int64_t count, void (*body)(void*, int64_t),
                       void* body_context) = nullptr;
};

/// The library's own executor (OpenMP); num_threads 0: as many as the machine offers.
Executor default_executor(int num_threads = 0);

struct Target {
  Device device = Device::kCPU;
  int num_threads = 1;    // CPU: sizes the workspace; results never depend on it
  int cuda_arch = 0;      // CUDA: 80, 90, ...; 0: not known, taken for one that fits
  std::string backend{};  // empty: the best that fits; else one by name ("cpu", "cuda");
                          // SPARLINE_BACKEND overrides it
};

class Backend;  // src/core/backend.h

/// The one decision: does it fit, which backend, which tiles, how much workspace, and why.
struct Plan {
  Problem problem;  // normalised: softmax_scale and segments filled in
  Target target;
  const Backend* backend = nullptr;  // null: nothing fits, `reason` says why
  std::string reason;
  std::vector<Block> query_blocks;  // T_m of them
  std::vector<Block> key_blocks;    // T_n of them
  int64_t heads_per_wave = 1;       // (batch, kv head) pairs in flight together, at most
  int64_t route_workspace_bytes = 0;
  int64_t forward_workspace_bytes = 0;
  int64_t backward_workspace_bytes = 0;
  std::vector<std::string> rejected;  // "name: why", one for each backend that was passed over
};

/// Pure. Throws Error{kInvalidArgument} if the problem breaks a rule; a legal problem that nothing
/// can run gives a plan without a backend.
Plan plan(const Problem& problem, const Target& target);

/// The plan in words: backend, SIMD target or kernel, blocks, workspace_bytes, what was rejected
/// and why.
std::string explain(const Plan& plan);

/// Names of the compiled backends and, for each, what it would use on this machine ("cpu: AVX2, 2
/// cores").
std::vector<std::string> compiled_backends();
/// What the CUDA backend was compiled for ("sm_80", "sm_90", "PTX 90"); empty in a build without
/// it.
std::vector<std::string> compiled_cuda_archs();
/// Target::cuda_arch of a CUDA device of this process; 0 for no such device and in a build without
/// CUDA.
int device_arch(int device_index);

/// What the call runs on: the caller's CUDA stream, whose device is the current one, or the
/// executor of the CPU loops (null: default_executor()). On a stream calls only launch: they are
/// done when the stream is.
struct Stream {
  void* cuda_stream = nullptr;
  const Executor* executor = nullptr;
};

enum class CountRounding : uint8_t { kFloor, kRound, kCeil };  // round: half away from zero

/// How a query block picks its critical key blocks from a row of pooled scores.
enum class Selection : uint8_t {
  kTopK,          // the n_h best
  kTopP,          // the fewest best whose softmax mass reaches critical_mass
  kUnion,         // either
  kIntersection,  // both; at least one
};

/// Block classification (SLA Eq. 2-3; SpargeAttention2; SpargeAttn). Scores are Zc = scale u w^T
/// with u = pool(q) Wq^T, w = pool(k) Wk^T. Of the T_n unprotected key blocks of its sequence each
/// query block ranks all by (score descending, index ascending; NaN last). Top-k keeps n_h =
/// clamp(rounded(critical_ratio T_n), 1, T_n); top-p the smallest prefix whose softmax(Zc) sums to
/// at least critical_mass (never none). Of what is not critical (1) the last n_l = min(rest,
/// rounded(negligible_ratio T_n)) are negligible (-1); others are marginal (0). Protected keys and
/// every block of a protected query are 1; blocks of another sequence are -1.
struct RouteRule {
  Selection selection = Selection::kTopK;
  double critical_ratio = 0.05;    // k_h in [0, 1]
  int64_t critical_count = 0;      // n_h itself, in place of the ratio; 0: use the ratio
  double critical_mass = 1.0;      // p in [0, 1]
  double negligible_ratio = 0.10;  // k_l in [0, 1]
  CountRounding rounding = CountRounding::kFloor;
  bool smooth_k = true;            // subtract the mean key of the sequence before pooling
  bool is_longest_prefix = false;  // SpargeAttn's top-p: the longest prefix whose sum is at most p
  double min_similarity = -1.0;    // SpargeAttn's theta: blocks whose rows' mean pairwise cosine is
                                 // below it are not ranked; such keys are critical for all queries,
                                 // and for such queries all keys are. -1: off
};

struct RouteArgs {
  TensorView q;  // (B, H, N_q, D)
  TensorView k;  // (B, H_kv, N_k, D)
  RouteRule rule;
  TensorView proj_q{};  // float32 (1, 1 or H, D, D), y = x W^T on pooled rows; absent: identity
  TensorView proj_k{};  // likewise, per query head; present exactly where proj_q is
  TensorView query_order{};  // int32 (1, 1, 1, N_q), as in ForwardArgs
  TensorView key_order{};    // int32 (1, 1, 1, N_k)
  TensorView block_class;    // out, int8 (B, H, T_m, T_n): 1 critical, 0 marginal, -1 negligible
  TensorView k_mean{};  // out, float32 (B, H_kv, S, D): the mean key of each sequence, 0 for one
                        // without keys; optional, only if rule.smooth_k
};

/// SoftTop-k (SLA2 Eq. 17): per row of scores x, m_j = sigmoid(x_j / tau + lambda) with lambda such
/// that sum m = kappa, by bisection in float32. Scores of -inf are left out (m = 0); kappa at or
/// above the number of the others makes them all 1, with gradient 0.
struct SoftTopKArgs {
  TensorView scores;         // float32 (B, H, T_m, T_n)
  TensorView kappa;          // float32 (1, 1, 1, B H T_m): one for each row, > 0
  double temperature = 0.1;  // tau > 0
  TensorView soft_map;       // out, float32 like scores
};

/// Its exact vector-Jacobian product by implicit differentiation, with s = m (1 - m):
/// d_x = s / tau (d_m - sum(s d_m) / sum(s)).
struct SoftTopKBackwardArgs {
  TensorView d_soft_map;  // float32 (B, H, T_m, T_n)
  TensorView soft_map;    // of the forward
  double temperature = 0.1;
  TensorView d_scores;  // out
};

/// Learned tensors, float32, row-major. Absent where the problem does not use them.
struct Weights {
  TensorView proj_weight{};       // (1, 1, D, D), y = x W^T + b, shared by all heads
  TensorView proj_bias{};         // (1, 1, 1, D); absent: no bias
  TensorView feature_weight_q{};  // (1, H, D, D), hedgehog maps: y = x W^T + b per query head
  TensorView feature_bias_q{};    // (1, 1, H, D)
  TensorView feature_weight_k{};  // (1, H_kv, D, D)
  TensorView feature_bias_k{};    // (1, 1, H_kv, D)
  TensorView alpha_logit{};       // (1, B, H, N_q), blend
};

/// Blocks are cut from rows in the order that `query_order` and `key_order` give: position n of the
/// axis is row order[n] of q and o, or of k and v. Absent: as stored. Segments speak of positions;
/// every tensor with a row axis (q, k, v, o, lse, alpha_logit and gradients) stays in memory order.
struct ForwardArgs {
  TensorView q;            // (B, H, N_q, D)
  TensorView k;            // (B, H_kv, N_k, D)
  TensorView v;            // (B, H_kv, N_k, D)
  TensorView block_map{};  // int8 or float32 (B, H, T_m, T_n) if problem.block_map says so;
                           // strides may be 0; overridden by protected spans
  TensorView tile_bits{};  // uint8 (B, H, T_m G, ceil(T_n / 8)), G = bit_groups(bit_rows), if
                           // problem.bit_rows > 0. Bit j % 8 of byte j / 8 in row i G + g: whether
                           // rows [g, g + 1) bit_rows of query block i attend critical key block
                           // j. Overridden by protected spans
  TensorView query_order{};  // int32 (1, 1, 1, N_q), a permutation
  TensorView key_order{};    // int32 (1, 1, 1, N_k), a permutation
  TensorView tile_order{};   // int32 (1, 1, T_m, T_n): the order in which key blocks are visited, a
                            // permutation of [0, T_n) per row, strides may be 0. Absent: ascending.
                            // Only with skip or low_bit, whose results depend on it
  TensorView k_mean{};  // float32 (B, H_kv, S, D), aligned to 8 bytes: the mean keys of k, as
                        // route() gives them. Absent: found again, with the same bits. Only if
                        // problem.smooth_k
  Weights weights{};
  TensorView o;            // out, (B, H, N_q, D), every element written
  TensorView lse;          // out, float32 (1, B, H, N_q): natural log of the critical sum; -inf
                           // for a row without critical keys
  TensorView kept_bits{};  // out, uint8 (B, H, T_m G, ceil(T_n / 8)), G = bit_groups(skip.rows):
                           // the tiles that were not skipped; present if problem.skip is on
  TensorView row_votes{};  // out, float32 (1, B, H, T_m): (row, tile) pairs that passed the skip
                           // test alone; optional, only if problem.skip is on
};

/// Gradients have the shape and dtype of what they belong to; all are overwritten, never
/// accumulated into. A problem with a skip rule is differentiated as the same problem without it,
/// with bit_rows = skip.rows (block_q for 0) and the forward's kept_bits as tile_bits; one with
/// low_bit as the same without it.
struct BackwardArgs {
  TensorView d_o;
  TensorView q;
  TensorView k;
  TensorView v;
  TensorView o;    // of the forward
  TensorView lse;  // of the forward
  TensorView block_map{};
  TensorView tile_bits{};
  TensorView query_order{};
  TensorView key_order{};
  TensorView k_mean{};  // as in ForwardArgs; gradients are those through the mean of k all the same
  Weights weights{};
  TensorView d_q;            // out
  TensorView d_k;            // out
  TensorView d_v;            // out
  TensorView d_block_map{};  // out, float32 (B, H, T_m, T_n); present for a soft map
  Weights d_weights{};       // out, present exactly where `weights` is
};

/// The calls below validate their arguments, then run. `workspace` holds at least the plan's
/// *_workspace_bytes, aligned to 64 bytes (device memory for a CUDA plan); its contents are
/// scratch. Results are bit-for-bit equal for every number of threads.
void route(const Plan& plan, const RouteArgs& args, std::span<std::byte> workspace,
           Stream stream = {});
void forward(const Plan& plan, const ForwardArgs& args, std::span<std::byte> workspace,
             Stream stream = {});
void backward(const Plan& plan, const BackwardArgs& args, std::span<std::byte> workspace,
              Stream stream = {});

/// SoftTop-k needs no plan: `target` picks the backend. Validates, then runs.
void soft_top_k(const Target& target, const SoftTopKArgs& args, Stream stream = {});
void soft_top_k_backward(const Target& target, const SoftTopKBackwardArgs& args,
                         Stream stream = {});

/// The library's version, "major.minor.patch".
const char* version();

}  // namespace sparline
