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
                                       {"projection", Combine::kProjection}});
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
  } else if (key == "critical_ratio") {
    spec.rule.critical_ratio = number<double>(key, value);
  } else if (key == "negligible_ratio") {
    spec.rule.negligible_ratio = number<double>(key, value);
  } else if (key == "count_rounding") {
    spec.rule.rounding = one_of<CountRounding>(key, value,
                                               {{"floor", CountRounding::kFloor},
                                                {"round", CountRounding::kRound},
                                                {"ceil", CountRounding::kCeil}});
  } else if (key == "smooth_k") {
    spec.rule.smooth_k = one_of<bool>(key, value, {{"0", false}, {"1", true}});
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
