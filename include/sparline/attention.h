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
  bool has_block_map = false;  // false: every block is critical
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
  int cuda_arch = 0;      // CUDA: 80, 90, ...
  std::string backend{};  // empty: the best that fits; else one by name ("cpu"); SPARLINE_BACKEND
                          // overrides it
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

/// What the call runs on: the caller's CUDA stream, or the executor of the CPU loops (null:
/// default_executor()).
struct Stream {
  void* cuda_stream = nullptr;
  const Executor* executor = nullptr;
};

enum class CountRounding : uint8_t { kFloor, kRound, kCeil };  // round: half away from zero

/// SLA's block classification (SLA Eq. 2-3). Of the T_n unprotected key blocks of its sequence each
/// query block makes n_h = clamp(rounded(critical_ratio T_n), 1, T_n) critical (1) and the last n_l
/// = min(T_n - n_h, rounded(negligible_ratio T_n)) negligible (-1), in the total order (pooled
/// score descending, index ascending; NaN last); the rest is marginal (0). Protected keys and every
/// block of a protected query are 1; blocks of another sequence are -1.
struct RouteRule {
  double critical_ratio = 0.05;    // k_h in [0, 1]
  double negligible_ratio = 0.10;  // k_l in [0, 1]
  CountRounding rounding = CountRounding::kFloor;
  bool smooth_k = true;  // subtract the mean key of the sequence before pooling
};

struct RouteArgs {
  TensorView q;  // (B, H, N_q, D)
  TensorView k;  // (B, H_kv, N_k, D)
  RouteRule rule;
  TensorView block_class;  // out, int8 (B, H, T_m, T_n): 1 critical, 0 marginal, -1 negligible
};

/// Learned tensors, float32, row-major. Absent where the problem does not use them.
struct Weights {
  TensorView proj_weight{};       // (1, 1, D, D), y = x W^T + b, shared by all heads
  TensorView proj_bias{};         // (1, 1, 1, D); absent: no bias
  TensorView feature_weight_q{};  // (1, H, D, D), hedgehog maps: y = x W^T + b per query head
  TensorView feature_bias_q{};    // (1, 1, H, D)
  TensorView feature_weight_k{};  // (1, H_kv, D, D)
  TensorView feature_bias_k{};    // (1, 1, H_kv, D)
};

struct ForwardArgs {
  TensorView q;              // (B, H, N_q, D)
  TensorView k;              // (B, H_kv, N_k, D)
  TensorView v;              // (B, H_kv, N_k, D)
  TensorView block_class{};  // int8 (B, H, T_m, T_n) if problem.has_block_map; strides may be 0;
                             // overridden by protected spans
  Weights weights{};
  TensorView o;    // out, (B, H, N_q, D), every element written
  TensorView lse;  // out, float32 (1, B, H, N_q): natural log of the critical sum; -inf for a row
                   // without critical keys
};

/// Gradients have the shape and dtype of what they belong to; all are overwritten, never
/// accumulated into.
struct BackwardArgs {
  TensorView d_o;
  TensorView q;
  TensorView k;
  TensorView v;
  TensorView o;    // of the forward
  TensorView lse;  // of the forward
  TensorView block_class{};
  Weights weights{};
  TensorView d_q;       // out
  TensorView d_k;       // out
  TensorView d_v;       // out
  Weights d_weights{};  // out, present exactly where `weights` is
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

/// The library's version, "major.minor.patch".
const char* version();

}  // namespace sparline
