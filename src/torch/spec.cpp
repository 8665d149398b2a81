// SPDX-License-Identifier: Apache-2.0
#include "torch/spec.h"

#include <charconv>
#include <set>
#include <sstream>
#include <utility>

namespace sparline {
namespace {

[[noreturn]] void fail(const std::string& key, const std::string& rule, const std::string& value) {
  throw Error(ErrorCode::kInvalidArgument,
              "spec: " + key + " must be " + rule + ", got \"" + value +
                  "\". The keys and values are listed in src/torch/spec.h.");
}

template <class T>
T number(const std::string& key, const std::string& value) {
  T result{};
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
  if (error != std::errc() || end != value.data() + value.size()) fail(key, "a number", value);
  return result;
}

template <class T>
using Choices = std::initializer_list<std::pair<const char*, T>>;

template <class T>
T one_of(const std::string& key, const std::string& value, Choices<T> choices) {
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  fail(key, "one of " + names, value);
}

bool flag(const std::string& key, const std::string& value) {
  return one_of<bool>(key, value, {{"0", false}, {"1", true}});
}

void set(Spec& spec, const std::string& key, const std::string& value) {
  Problem& problem = spec.problem;
  if (key == "block_q") {
    problem.block_q = number<int>(key, value);
  } else if (key == "block_k") {
    problem.block_k = number<int>(key, value);
  } else if (key == "scale") {
    problem.softmax_scale = number<double>(key, value);
  } else if (key == "epsilon") {
    problem.epsilon = number<double>(key, value);
  } else if (key == "combine") {
    problem.combine = one_of<Combine>(key, value,
                                      {{"sparse", Combine::kSparse},
                                       {"linear", Combine::kLinear},
                                       {"sum", Combine::kSum},
                                       {"projection", Combine::kProjection},
                                       {"blend", Combine::kBlend}});
  } else if (key == "feature_map") {
    problem.feature_map = one_of<FeatureMap>(key, value,
                                             {{"softmax", FeatureMap::kSoftmax},
                                              {"elu1", FeatureMap::kElu1},
                                              {"relu", FeatureMap::kRelu},
                                              {"identity", FeatureMap::kIdentity},
                                              {"hedgehog", FeatureMap::kHedgehog},
                                              {"hedgehog_exp", FeatureMap::kHedgehogExp}});
  } else if (key == "linear_scope") {
    problem.linear_scope = one_of<LinearScope>(key, value,
                                               {{"marginal", LinearScope::kMarginal},
                                                {"complement", LinearScope::kComplement},
                                                {"all", LinearScope::kAll}});
  } else if (key == "backend") {
    spec.backend = value;
  } else if (key == "smooth_k") {
    problem.smooth_k = flag(key, value);
  } else if (key == "device") {
    spec.device = one_of<Device>(key, value, {{"cpu", Device::kCPU}, {"cuda", Device::kCUDA}});
  } else if (key == "cuda_arch") {
    spec.cuda_arch = number<int>(key, value);
  } else if (key == "block_map") {
    problem.block_map = one_of<BlockMap>(
        key, value,
        {{"none", BlockMap::kNone}, {"class", BlockMap::kClass}, {"soft", BlockMap::kSoft}});
  } else if (key == "bit_rows") {
    problem.bit_rows = number<int>(key, value);
  } else if (key == "skip") {
    problem.skip.reference = one_of<SkipReference>(key, value,
                                                   {{"none", SkipReference::kNone},
                                                    {"running_max", SkipReference::kRunningMax},
                                                    {"kept_lse", SkipReference::kKeptLse}});
  } else if (key == "skip_threshold") {
    problem.skip.log_threshold = number<double>(key, value);
  } else if (key == "skip_rows") {
    problem.skip.rows = number<int>(key, value);
  } else if (key == "low_bit") {
    problem.low_bit.is_enabled = flag(key, value);
  } else if (key == "low_bit_q_rows") {
    problem.low_bit.q_rows = number<int>(key, value);
  } else if (key == "p_range") {
    problem.low_bit.p_range = number<double>(key, value);
  } else if (key == "v_range") {
    problem.low_bit.v_range = number<double>(key, value);
  } else if (key == "recompute_lse") {
    spec.recompute_lse = flag(key, value);
  } else if (key == "selection") {
    spec.rule.selection = one_of<Selection>(key, value,
                                            {{"top_k", Selection::kTopK},
                                             {"top_p", Selection::kTopP},
                                             {"union", Selection::kUnion},
                                             {"intersection", Selection::kIntersection}});
  } else if (key == "critical_ratio") {
    spec.rule.critical_ratio = number<double>(key, value);
  } else if (key == "critical_count") {
    spec.rule.critical_count = number<int64_t>(key, value);
  } else if (key == "critical_mass") {
    spec.rule.critical_mass = number<double>(key, value);
  } else if (key == "longest_prefix") {
    spec.rule.is_longest_prefix = flag(key, value);
  } else if (key == "min_similarity") {
    spec.rule.min_similarity = number<double>(key, value);
  } else if (key == "negligible_ratio") {
    spec.rule.negligible_ratio = number<double>(key, value);
  } else if (key == "count_rounding") {
    spec.rule.rounding = one_of<CountRounding>(key, value,
                                               {{"floor", CountRounding::kFloor},
                                                {"round", CountRounding::kRound},
                                                {"ceil", CountRounding::kCeil}});
  } else if (key == "smooth_router") {
    spec.rule.smooth_k = flag(key, value);
  } else if (key == "k_mean") {
    spec.gives_k_mean = flag(key, value);
  } else if (key == "row_votes") {
    spec.counts_votes = flag(key, value);
  } else {
    fail("a key", "known", key);
  }
}

}  // namespace

Spec parse_spec(const std::string& text) {
  Spec spec;
  std::set<std::string> seen;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) fail("each word", "key=value", word);
    const std::string key = word.substr(0, equals);
    if (!seen.insert(key).second) fail(key, "given once", text);
    set(spec, key, word.substr(equals + 1));
  }
  return spec;
}

}  // namespace sparline
