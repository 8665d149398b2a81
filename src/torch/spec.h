// SPDX-License-Identifier: Apache-2.0
//
// The `spec` argument of the operators: what to compute, as one string of "key=value" words.
// Strings are constants to torch.compile, and a new option needs no new schema.
#pragma once

#include <optional>
#include <string>

#include "sparline/attention.h"

namespace sparline {

struct Spec {
  Problem problem;  // all but sizes, dtype and segments: those come with the tensors
  RouteRule rule;
  bool gives_k_mean = false;   // of the router: also the mean keys
  bool counts_votes = false;   // of a skip rule: also row_votes
  bool recompute_lse = false;  // after a low-bit forward the backward makes itself an exact lse
  std::string backend;
  std::optional<Device> device;  // another than that of the tensors
  int cuda_arch = 0;             // another than that of their device
};

/// Keys, each at most once, in any order; a key left out keeps the default of Problem and
/// RouteRule:
///   block_q block_k            ints
///   scale epsilon              numbers; scale 0 is 1 / sqrt(D)
///   combine                    sparse linear sum projection blend
///   feature_map                softmax elu1 relu identity hedgehog hedgehog_exp
///   linear_scope               marginal complement all
///   smooth_k                   0 1: of the operator
///   block_map                  none class soft           (explain; else the map itself tells)
///   device                     cpu cuda                  (explain; else the tensors tell)
///   cuda_arch                  int                       (explain; 0 asks the device)
///   bit_rows                   int
///   skip                       none running_max kept_lse
///   skip_threshold skip_rows   number (natural log), int
///   row_votes                  0 1: also return row_votes; needs skip   (attend)
///   low_bit recompute_lse      0 1
///   low_bit_q_rows             int
///   p_range v_range            numbers
///   backend                    the name of a compiled backend
///   selection                  top_k top_p union intersection   (route)
///   critical_ratio critical_mass negligible_ratio   numbers in [0, 1]   (route)
///   critical_count             int, in place of critical_ratio   (route)
///   count_rounding             floor round ceil          (route)
///   smooth_router              0 1                       (route)
///   k_mean                     0 1: also return the mean keys; needs smooth_router   (route)
///   longest_prefix             0 1                       (route)
///   min_similarity             number                    (route)
/// Throws Error{kInvalidArgument} for anything else.
Spec parse_spec(const std::string& text);

}  // namespace sparline
