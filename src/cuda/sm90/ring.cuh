// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace sparline::cuda {

/// Position in a ring, and the parity of the round: what a barrier's phase is waited for by.
template <int kSize>
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot < kSize) return;
    slot = 0;
    parity ^= 1;
  }
};

}  // namespace sparline::cuda
