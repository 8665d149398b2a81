// SPDX-License-Identifier: Apache-2.0
//
// The instruction sets that the CPU kernels are compiled for, one per register file: SSE4, AVX2,
// AVX-512, and NEON on Arm (and Highway's scalar target as the floor). Include before any Highway
// header. Scalable vectors are left out: the kernels keep tiles in arrays of vectors. AVX3_DL too:
// Highway 1.0.3 compiles it for AVX-VNNI, but selects it by AVX512-VNNI, and what compilers make of
// that (vpdpwssd in VEX form) is an illegal instruction on Ice Lake and Zen 4.
#pragma once

#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
