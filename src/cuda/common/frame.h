// SPDX-License-Identifier: Apache-2.0
//
// How kernels see a problem: axes cut into blocks, rows in memory, the map over block pairs. Plain
// values, passed to kernels as they are. Positions, blocks and sequences as in
// sparline/attention.h.
#pragma once

#include <cstdint>

#include "sparline/attention.h"

#if defined(__CUDACC__)
#define SPARLINE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPARLINE_HOST_DEVICE inline
#endif

namespace sparline::cuda {

/// One block of an axis, and the blocks of the other axis that belong to its sequence.
struct BlockInfo {
  int32_t begin = 0;        // first position
  int32_t rows = 0;         // >= 1
  int32_t other_begin = 0;  // blocks [other_begin, other_end) of the other axis
  int32_t other_end = 0;
  int32_t sequence = 0;  // counted 0, 1, ... over the sequences of the problem
  int32_t is_protected = 0;
  int32_t sequence_rows = 0;  // of this axis
  int32_t padding = 0;
};

/// The query or the key axis.
struct Axis {
  const BlockInfo* table = nullptr;  // (num_blocks), device; null: one sequence, nothing protected
  int32_t length = 0;                // N
  int32_t block_rows = 0;
  int32_t num_blocks = 0;        // T
  int32_t num_other_blocks = 0;  // T of the other axis
  int32_t num_sequences = 1;     // of the problem: same for both axes

  SPARLINE_HOST_DEVICE BlockInfo block(int32_t idx) const {
    if (table != nullptr) return table[idx];
    const int32_t begin = idx * block_rows;
    const int32_t rest = length - begin;
    return {begin, rest < block_rows ? rest : block_rows, 0, num_other_blocks, 0, 0, length, 0};
  }
  /// The first block whose sequence is not below `sequence`.
  SPARLINE_HOST_DEVICE int32_t first_block_of(int32_t sequence) const {
    if (table == nullptr) return sequence <= 0 ? 0 : num_blocks;
    int32_t begin = 0, end = num_blocks;
    while (begin < end) {
      const int32_t middle = begin + (end - begin) / 2;
      if (table[middle].sequence < sequence) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
};

/// The sizes every kernel needs.
struct Frame {
  Axis queries, keys;
  int32_t batch = 1, num_heads = 1, num_kv_heads = 1;
  int32_t head_dim = 0;  // D; tiles are wider, columns from D on hold zeros

  SPARLINE_HOST_DEVICE int32_t group() const { return num_heads / num_kv_heads; }
};

/// The (batch, kv head) pairs [first, first + count) that one call works on; pair = b H_kv + h_kv.
/// Workspace arrays "of the wave" count pairs, or query heads (pair - first) group + g, from the
/// first one.
struct Wave {
  int32_t first = 0, count = 0;
};

/// Rows of a (B, heads, N, width) tensor, found by position.
struct Rows {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_n = 0;  // in elements
  const int32_t* order = nullptr;                    // position -> row; null: the same
  bool is_vectorised = false;  // rows start at multiples of 16 bytes and are whole such vectors

  template <class T>
  SPARLINE_HOST_DEVICE T* head(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h;
  }
  /// Where position n lies, relative to head().
  SPARLINE_HOST_DEVICE int64_t offset(int32_t n) const {
    return (order == nullptr ? n : order[n]) * stride_n;
  }
  template <class T>
  SPARLINE_HOST_DEVICE T* row(int64_t b, int64_t h, int32_t n) const {
    return head<T>(b, h) + offset(n);
  }
  explicit operator bool() const { return data != nullptr; }
};

/// What a block map and protected spans say of a block pair (cpu/layout.h has the same rules).
struct PairMap {
  const void* data = nullptr;  // int8 classes, or float32 m if is_soft; null: all critical
  int64_t stride_b = 0, stride_h = 0, stride_i = 0, stride_j = 0;
  bool is_soft = false;
  LinearScope scope = LinearScope::kMarginal;

  SPARLINE_HOST_DEVICE int64_t offset(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * stride_b + h * stride_h + i * stride_i + j * stride_j;
  }
  SPARLINE_HOST_DEVICE int block_class(int64_t at) const {
    return static_cast<const int8_t*>(data)[at];
  }
  SPARLINE_HOST_DEVICE float soft(int64_t at) const { return static_cast<const float*>(data)[at]; }

  /// What exp(S) is multiplied by: m of a soft map, else 1 for a critical block and 0 for others.
  /// Both blocks are of one sequence; `is_protected`: one of them is.
  SPARLINE_HOST_DEVICE float sparse_weight(int64_t b, int64_t h, int64_t i, int64_t j,
                                           bool is_protected) const {
    if (data == nullptr || is_protected) return 1.0f;
    const int64_t at = offset(b, h, i, j);
    return is_soft ? soft(at) : (block_class(at) == 1 ? 1.0f : 0.0f);
  }
  /// What phi(q) phi(k) is multiplied by: 1 - m, or 1 for members of E_i. Same sequence.
  SPARLINE_HOST_DEVICE float linear_weight(int64_t b, int64_t h, int64_t i, int64_t j,
                                           bool is_query_protected, bool is_key_protected) const {
    if (is_query_protected) return 0.0f;
    if (scope == LinearScope::kAll) return 1.0f;
    if (data == nullptr || is_key_protected) return 0.0f;
    const int64_t at = offset(b, h, i, j);
    if (is_soft) return 1.0f - soft(at);
    const int value = block_class(at);
    return (scope == LinearScope::kMarginal ? value == 0 : value != 1) ? 1.0f : 0.0f;
  }
};

/// Which rows of query block i see key block j: bit j % 8 of byte j / 8 in row i groups + r / rows.
struct TileBits {
  uint8_t* data = nullptr;  // null: all rows see all
  int64_t stride_b = 0, stride_h = 0, stride_row = 0, stride_byte = 1;
  int32_t rows = 0;    // query rows that share a bit: tile_bits any number from 1 (a bit for every
                       // row), kept_bits a multiple of 16 or the whole block
  int32_t groups = 0;  // ceil(block_q / rows)

  SPARLINE_HOST_DEVICE int64_t offset(int64_t b, int64_t h, int64_t i, int32_t group,
                                      int64_t j) const {
    return b * stride_b + h * stride_h + (i * groups + group) * stride_row + j / 8 * stride_byte;
  }
};

/// One float per (batch, head, row): lse, alpha_logit; found by position like Rows.
struct RowScalars {
  float* data = nullptr;
  int64_t stride_b = 0, stride_h = 0;
  const int32_t* order = nullptr;

  SPARLINE_HOST_DEVICE float* at(int64_t b, int64_t h, int32_t n) const {
    return data + b * stride_b + h * stride_h + (order == nullptr ? n : order[n]);
  }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace sparline::cuda
