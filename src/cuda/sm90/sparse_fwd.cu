// SPDX-License-Identifier: Apache-2.0
//
// What the Hopper forward serves: compute capability 9.0, head_dim 64 or 128, rows in memory order
// that the copy engine can read; of policies on tiles a skip rule of whole query blocks of 65 to
// 128 rows, or of every 64 rows of them. The environment variable SPARLINE_CUDA_ARCH=80, read once,
// keeps to the portable kernels.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/common/platform.cuh"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/sm90/tiles.h"

namespace sparline::cuda {
namespace {

bool is_forced_portable() {
  static const bool is_forced = [] {
    const char* const arch = std::getenv("SPARLINE_CUDA_ARCH");
    if (arch == nullptr || *arch == '\0') return false;
    if (std::strcmp(arch, "80") != 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  std::string("SPARLINE_CUDA_ARCH must be 80, for the portable kernels, got ") +
                      arch + ". Unset it to let the device decide.");
    }
    return true;
  }();
  return is_forced;
}

bool has_skip(const SparseForward& p) { return p.skip.reference != SkipReference::kNone; }

/// Whether the two warpgroups decide apart, each for its rows.
bool is_apart(const SparseForward& p) {
  return has_skip(p) && p.kept_bits.groups == 2 && p.kept_bits.rows == 64;
}

bool fits(const SparseForward& p) {
  const bool has_policy = p.map.is_soft || p.tile_bits.data != nullptr || p.tile_order != nullptr ||
                          p.low_bit.is_enabled;
  const bool has_groups = has_skip(p) && p.kept_bits.groups > 1 && !is_apart(p);
  const int32_t head_dim = p.frame.head_dim;
  return !has_policy && !has_groups && (head_dim == 64 || head_dim == 128) &&
         (p.block_q > 64 || !has_skip(p)) && p.o.is_vectorised && p.o.order == nullptr &&
         p.lse.order == nullptr;
}

}  // namespace

template <int kHeadDim, Tiles kTiles, int kTileQ = 128>
bool sparse_forward_sm90(const SparseForward& params, int num_multiprocessors,
                         void* stream);  // sparse_fwd.cuh

namespace {

bool serves(const SparseForward& params) {
  return !is_forced_portable() && fits(params) && current_device().arch == 90;
}

template <Tiles kTiles>
bool serve(const SparseForward& params, int num_multiprocessors, void* stream) {
  const bool is_wide = params.frame.head_dim == 128;
  if constexpr (kTiles == Tiles::kPlain || kTiles == Tiles::kLinear) {
    if (tile_rows(params.block_q) == 64) {
      if constexpr (kTiles == Tiles::kPlain) {
        if (is_wide)
          return sparse_forward_sm90<128, kTiles, 64>(params, num_multiprocessors, stream);
      }
      // At head_dim 128 such blocks have no room for H_i.
      return !is_wide && sparse_forward_sm90<64, kTiles, 64>(params, num_multiprocessors, stream);
    }
  }
  return is_wide ? sparse_forward_sm90<128, kTiles>(params, num_multiprocessors, stream)
                 : sparse_forward_sm90<64, kTiles>(params, num_multiprocessors, stream);
}

}  // namespace

bool combines_sm90(const SparseForward& params) {
  // Launches nothing on no multiprocessors.
  return serves(params) && !has_skip(params) && serve<Tiles::kLinear>(params, 0, nullptr);
}

bool sparse_forward_sm90(const SparseForward& params, void* stream) {
  if (!serves(params)) return false;
  const int num_multiprocessors = current_device().num_multiprocessors;
  if (is_apart(params)) return serve<Tiles::kSkippedApart>(params, num_multiprocessors, stream);
  if (has_skip(params)) {
    return (params.block_k <= 64 &&
            serve<Tiles::kSkippedRuns>(params, num_multiprocessors, stream)) ||
           serve<Tiles::kSkipped>(params, num_multiprocessors, stream);
  }
  return params.linear.is_on ? serve<Tiles::kLinear>(params, num_multiprocessors, stream)
                             : serve<Tiles::kPlain>(params, num_multiprocessors, stream);
}

}  // namespace sparline::cuda
