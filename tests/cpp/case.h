// SPDX-License-Identifier: Apache-2.0
//
// Random problems with their inputs, and one way to run them. A case is a function of its seed.
#pragma once

#include <cstdint>
#include <string>

#include "memory.h"
#include "oracle.h"
#include "sparline/attention.h"

namespace sparline::testing {

struct Case {
  uint64_t seed = 0;
  Problem problem{};
  RouteRule rule{};
  Device device = Device::kCPU;  // kCUDA: under the emulator, where its memory is the host's
  int64_t heads_per_wave = 0;    // fewer than the plan says; 0: as it says
  Layout layout = Layout::kBHND;
  double magnitude = 1.0;  // standard deviation of q and k
  bool has_proj_bias = true;
  bool shares_block_map = false;  // one map for all heads and batch items, by strides of 0
  bool has_query_order = false;
  bool has_key_order = false;
  bool has_tile_order = false;
  bool wants_row_votes = true;  // of a skip rule
  bool brings_k_mean = false;   // where keys are smoothed: the router's mean keys
};

/// Any legal problem: ragged, packed, protected, grouped, strided, reordered, with bits, skipped
/// tiles or low-bit tiles, of every dtype, map, scope and combination.
Case random_case(uint64_t seed);

/// The case as one line that can be pasted: the seed makes all of it, the rest is for the eye.
std::string describe(const Case& c);

/// Inputs that fit the problem, already rounded to its dtype.
oracle::Inputs random_inputs(const Case& c);

/// Forward and backward through the library, with guards around all memory; what they found goes to
/// `misuse`.
oracle::Outputs run(const Case& c, const oracle::Inputs& inputs, std::string* misuse,
                    const Executor& executor = default_executor(2));

/// The classes that route() finds.
std::vector<int8_t> run_route(const Case& c, const oracle::Array& q, const oracle::Array& k,
                              std::string* misuse, const Executor& executor = default_executor(2));

/// The mean keys that route() finds for the forward and the backward.
oracle::Array run_k_mean(const Case& c, const oracle::Inputs& inputs, std::string* misuse,
                         const Executor& executor = default_executor(2));

/// max |got - want| over max(|want|, floor): the one metric of these tests. NaN is infinitely
/// wrong.
double error(const oracle::Array& got, const oracle::Array& want, double floor = 0.1);

/// Empty if all outputs of the case are near enough, else each tensor that is not.
std::string compare(const Case& c, const oracle::Outputs& got, const oracle::Outputs& want,
                    double slack = 1.0);

}  // namespace sparline::testing
