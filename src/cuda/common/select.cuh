// SPDX-License-Identifier: Apache-2.0
//
// Prefixes of a ranking without sorting it. Entries of a row rank by (key ascending, index
// ascending); a bisection on keys, then on indices, finds the entry that ends a prefix of a given
// length or weight. All sums are of integers: no order of adding changes a result.
#pragma once

#include "cuda/common/row_group.cuh"

namespace sparline::cuda {

constexpr uint32_t kNaNKey = 0xff800001u;  // just past the key of -inf
constexpr uint32_t kNoKey = 0xffffffffu;   // of what is not ranked

/// Larger scores have smaller keys; -0 is 0, NaN comes last.
__device__ __forceinline__ uint32_t rank_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  const uint32_t key = bits >> 31 != 0 ? bits : bits ^ 0x7fffffffu;
  return score == score ? key : kNaNKey;
}
/// NaN weighs like -inf.
__device__ __forceinline__ float score_of(uint32_t key) {
  if (key >= kNaNKey) return __uint_as_float(0xff800000u);
  return __uint_as_float(key >> 31 != 0 ? key : ~key & 0x7fffffffu);
}

/// exp(scale (score - best)) in units of 2^-31; equal infinities weigh the same.
__device__ __forceinline__ uint32_t softmax_weight(uint32_t key, float best, float scale) {
  const float score = score_of(key);
  if (score == best) return 1u << 31;
  return static_cast<uint32_t>(
      fmaf(fminf(fmaxf(expf(scale * (score - best)), 0.0f), 1.0f), 0x1p31f, 0.5f));
}

/// The last entry of a prefix.
struct Cut {
  uint32_t key = 0;
  int32_t last = 0x7fffffff;  // index of the last entry with that key

  __device__ __forceinline__ bool has(uint32_t other_key, int32_t j) const {
    return other_key < key + (j <= last ? 1u : 0u);  // no key is the last number
  }
};

/// The ranked entries of a row.
template <bool kIsOneWarp, bool kIsHeld, int kItems = kRowItems>
struct Ranking {
  using Group = RowGroup<kIsOneWarp>;
  using Walk = RowWalk<kIsOneWarp, kIsHeld, kItems>;

  /// `key_of(j)`: kNoKey for what is not ranked. The row is not empty.
  template <class KeyOf>
  __device__ Ranking(Group& row_group, int32_t row_begin, int32_t row_end, const KeyOf& key_of)
      : group(row_group), walk(row_group, row_begin, row_end), begin(row_begin), end(row_end) {
    uint32_t count = 0;
    walk.for_each([&](int32_t j, int n) {
      // Without a branch, so that a lane's loads do not wait for each other.
      const uint32_t key_inside = key_of(min(j, end - 1));
      const uint32_t key = j < end ? key_inside : kNoKey;
      if constexpr (kIsHeld) keys[n] = key;
      count += key != kNoKey;
      least = min(least, key);
      most = max(most, key + 1);  // 0 for kNoKey
    });
    const uint2 range = group.all(make_uint2(least, most), make_uint2(kNoKey, 0u), [](uint2 x) {
      return make_uint2(__reduce_min_sync(kAllLanes, x.x), __reduce_max_sync(kAllLanes, x.y));
    });
    least = range.x;
    most = range.y - 1;  // not used where none is ranked
    num = group.sum(count);
  }

  /// body(key, j, n) for the entries of this lane; those that are not ranked have kNoKey.
  template <class KeyOf, class Body>
  __device__ __forceinline__ void for_each(const KeyOf& key_of, const Body& body) const {
    walk.for_each([&](int32_t j, int n) {
      if constexpr (kIsHeld) {
        body(keys[n], j, n);
      } else {
        body(key_of(j), j, n);
      }
    });
  }

  Group& group;
  const Walk walk;
  const int32_t begin, end;
  uint32_t keys[kIsHeld ? kItems : 1];
  uint32_t num = 0;  // of ranked entries
  uint32_t least = kNoKey, most = 0;
};

/// The key that ends a prefix of `wanted` entries lies in [low, high]; at most `high`: `reached`.
struct KeyRange {
  uint32_t low, high, reached, wanted;

  __device__ __forceinline__ bool is_open() const { return low < high; }

  /// Halves scores twice, then keys once: scores of one magnitude take half as many steps as their
  /// keys would, and scores of any take at most three times as many.
  __device__ __forceinline__ uint32_t middle(int step) const {
    const uint32_t key = step % 3 == 2 ? low + (high - low) / 2
                                       : rank_key(fmaf(0.5f, score_of(low), 0.5f * score_of(high)));
    return min(max(key, low), high - 1);
  }
  /// `count`: how many keys are at most `key`, a middle().
  __device__ __forceinline__ void narrow(uint32_t key, uint32_t count) {
    if (count < wanted) {
      low = key + 1;
    } else {
      high = key;
      reached = count;
      if (count == wanted) low = high;
    }
  }
};

/// The ends of the prefixes of `wanted[0]` and of `wanted[1]` entries, both at least 1.
template <class Ranking, class KeyOf>
__device__ __forceinline__ void find_cuts(const Ranking& ranking, const KeyOf& key_of,
                                          const uint32_t (&wanted)[2], Cut (&cuts)[2]) {
  const auto count = [&](const auto& has_first, const auto& has_second) {
    uint32_t first = 0, second = 0;
    ranking.for_each(key_of, [&](uint32_t key, int32_t j, int) {
      first += has_first(key, j);
      second += has_second(key, j);
    });
    return ranking.group.sums(first, second);
  };

  KeyRange ranges[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    ranges[c] = {ranking.least, ranking.most, ranking.num, wanted[c]};
    if (wanted[c] == ranking.num) ranges[c].low = ranking.most;
  }
  for (int step = 0; ranges[0].is_open() || ranges[1].is_open(); ++step) {
    const uint32_t middle[2] = {ranges[0].middle(step), ranges[1].middle(step)};
    uint2 counts;
    if (ranges[0].is_open() && ranges[1].is_open()) {
      counts = count([&](uint32_t key, int32_t) { return key <= middle[0]; },
                     [&](uint32_t key, int32_t) { return key <= middle[1]; });
    } else {
      const uint32_t only = ranges[0].is_open() ? middle[0] : middle[1];
      uint32_t num = 0;
      ranking.for_each(key_of, [&](uint32_t key, int32_t, int) { num += key <= only; });
      counts.x = counts.y = ranking.group.sum(num);
    }
    if (ranges[0].is_open()) ranges[0].narrow(middle[0], counts.x);
    if (ranges[1].is_open()) ranges[1].narrow(middle[1], counts.y);
  }
  cuts[0] = {.key = ranges[0].high};
  cuts[1] = {.key = ranges[1].high};
  const uint32_t high[2] = {ranges[0].high, ranges[1].high};
  const uint32_t reached[2] = {ranges[0].reached, ranges[1].reached};
  if (reached[0] == wanted[0] && reached[1] == wanted[1]) return;

  // Some of the entries with an equal key are in, those with the lowest indices.
  const uint2 below = count([&](uint32_t key, int32_t) { return key < high[0]; },
                            [&](uint32_t key, int32_t) { return key < high[1]; });
  int32_t first[2], last[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    last[c] = ranking.end - 1;
    first[c] = reached[c] == wanted[c] ? last[c] : ranking.begin;
  }
  while (first[0] < last[0] || first[1] < last[1]) {
    const int32_t middle[2] = {first[0] + (last[0] - first[0]) / 2,
                               first[1] + (last[1] - first[1]) / 2};
    const uint2 counts =
        count([&](uint32_t key, int32_t j) { return key == high[0] && j <= middle[0]; },
              [&](uint32_t key, int32_t j) { return key == high[1] && j <= middle[1]; });
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (first[c] == last[c]) continue;
      const uint32_t num = c == 0 ? below.x + counts.x : below.y + counts.y;
      if (num < wanted[c]) {
        first[c] = middle[c] + 1;
      } else {
        last[c] = middle[c];
      }
    }
  }
  cuts[0].last = last[0];
  cuts[1].last = last[1];
}

/// The number of the best entries whose softmax(scale score) sums to at least `mass` < 1, at least
/// one; is_longest: the most whose sum is at most `mass`.
template <bool kIsHeld, class Ranking, class KeyOf>
__device__ __forceinline__ uint32_t count_of_mass(const Ranking& ranking, const KeyOf& key_of,
                                                  double mass, bool is_longest, float scale) {
  const float best = score_of(ranking.least);
  uint32_t weights[sizeof(ranking.keys) / sizeof(uint32_t)] = {};
  const auto weight_of = [&](uint32_t key, int n) {
    if constexpr (kIsHeld) {
      return weights[n];
    } else {
      return key == kNoKey ? 0u : softmax_weight(key, best, scale);
    }
  };
  if constexpr (kIsHeld) {
    ranking.for_each(key_of, [&](uint32_t key, int32_t, int n) {
      weights[n] = key == kNoKey ? 0u : softmax_weight(key, best, scale);
    });
  }
  // Entries that are not ranked weigh nothing, so that their keys need no test.
  const auto mass_of = [&](const auto& is_in) {
    uint64_t sum = 0;
    ranking.for_each(key_of, [&](uint32_t key, int32_t, int n) {
      if (is_in(key)) sum += weight_of(key, n);
    });
    return ranking.group.sum(sum);
  };

  const double wanted = mass * static_cast<double>(mass_of([](uint32_t) { return true; }));
  const auto whole = static_cast<uint64_t>(wanted);
  const bool is_whole = static_cast<double>(whole) == wanted;
  const uint64_t needed = is_longest || !is_whole ? whole + 1 : whole;
  uint32_t low = ranking.least, high = ranking.most;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (mass_of([&](uint32_t key) { return key <= middle; }) >= needed) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }

  // All entries with the key `high` weigh the same.
  const uint64_t below = mass_of([&](uint32_t key) { return key < high; });
  uint32_t count = 0;
  ranking.for_each(key_of, [&](uint32_t key, int32_t, int) { count += key < high; });
  count = ranking.group.sum(count);
  const uint32_t weight = softmax_weight(high, best, scale);
  const uint64_t missing = needed > below ? needed - below : 0;
  uint64_t reached = count + (weight == 0 ? 1 : (missing + weight - 1) / weight);
  if (is_longest && reached > 0) --reached;
  return static_cast<uint32_t>(min(max(reached, uint64_t{1}), uint64_t{ranking.num}));
}

}  // namespace sparline::cuda
