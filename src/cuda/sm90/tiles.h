// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sparline::cuda {

/// The Hopper forward's kernels differ in what happens to tiles of keys.
enum class Tiles {
  kPlain,
  kLinear,       // the last one of a query block is that of the linear branch
  kSkipped,      // a skip rule decides over each key block; values are loaded of those that stay
  kSkippedApart  // the same, for every 64 rows of a query block by themselves
};

}  // namespace sparline::cuda
