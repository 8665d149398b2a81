// SPDX-License-Identifier: Apache-2.0
//
// The instruction sets that the CPU kernels are compiled for, one per register file: SSE4, AVX2,
// AVX-512, and NEON on Arm (and Highway's scalar target as the floor). Include before any Highway
// header. Scalable vectors are left out: the kernels keep tiles in arrays of vectors.
#pragma once

#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
