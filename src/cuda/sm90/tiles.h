// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace sparline::cuda {

/// The Hopper forward's kernels differ in what happens to tiles of keys.
enum class Tiles {
  kPlain,
  kLinear,       // the last one of a query block is that of the linear branch
  kSkipped,      // a skip rule decides over each key block; values are loaded of those that stay
  kSkippedRuns,  // the same, tiles of one key block of at most 64 keys
  kSkippedApart  // the same, for every 64 rows of a query block by themselves
};

/// Query rows of a tile. Two thread blocks with tiles of 64 share a multiprocessor.
constexpr int tile_rows(int64_t block_q) { return block_q <= 64 ? 64 : 128; }

/// For how many key blocks a kernel's lists have room (sparse_fwd_shared.cuh).
constexpr int32_t most_key_blocks(Tiles tiles, int head_dim, int rows) {
  if (rows == 64) return 16384;
  if (head_dim == 64) return 32768;
  if (tiles == Tiles::kSkippedApart) return 1184;
  if (tiles == Tiles::kSkippedRuns) return 1280;
  return tiles == Tiles::kSkipped ? 2048 : 3392;
}

}  // namespace sparline::cuda
