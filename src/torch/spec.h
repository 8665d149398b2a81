// SPDX-License-Identifier: Apache-2.0
//
// The `spec` argument of the operators: what to compute, as one string of "key=value" words.
// Strings are constants to torch.compile, and a new option needs no new schema.
#pragma once

#include <string>

#include "sparline/attention.h"

namespace sparline {

struct Spec {
  Problem problem;  // all but sizes, dtype, segments and has_block_map: those come with the tensors
  RouteRule rule;
  std::string backend;
};

/// Keys, each at most once, in any order; a key left out keeps the default of Problem and
/// RouteRule:
///   block_q block_k            ints
///   scale epsilon              numbers; scale 0 is 1 / sqrt(D)
///   combine                    sparse linear sum projection
///   feature_map                softmax elu1 relu identity hedgehog hedgehog_exp
///   linear_scope               marginal complement all
///   backend                    the name of a compiled backend
///   critical_ratio negligible_ratio  numbers in [0, 1]   (route)
///   count_rounding             floor round ceil          (route)
///   smooth_k                   0 1                       (route)
/// Throws Error{kInvalidArgument} for anything else.
Spec parse_spec(const std::string& text);

}  // namespace sparline
