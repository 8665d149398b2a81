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
/// In place of the score of what is not ranked: a NaN that no sum of products is.
constexpr uint32_t kNoScore = 0xffffffffu;

/// Turns the bits of a number into its key, and its key into its bits.
__device__ __forceinline__ uint32_t reversed_unless_negative(uint32_t bits) {
  return bits ^ (~static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) & 0x7fffffffu);
}
/// Larger scores have smaller keys; -0 is 0, NaN comes last. kNoScore has kNoKey.
__device__ __forceinline__ uint32_t rank_key(float score) {
  const uint32_t key = reversed_unless_negative(__float_as_uint(score + 0.0f));
  const uint32_t key_of_none = __float_as_uint(score) == kNoScore ? kNoKey : kNaNKey;
  return score == score ? key : key_of_none;
}
/// NaN for what is not ranked or is NaN.
__device__ __forceinline__ float number_of(uint32_t key) {
  return __uint_as_float(reversed_unless_negative(key));
}
/// NaN weighs like -inf.
__device__ __forceinline__ float score_of(uint32_t key) {
  return key >= kNaNKey ? __uint_as_float(0xff800000u) : number_of(key);
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
  static constexpr int32_t kNoTie = 0x7fffffff;  // it has all that have its key

  uint32_t key = 0;
  int32_t last = kNoTie;  // index of the last entry with that key

  __device__ __forceinline__ bool is_tied() const { return last != kNoTie; }
  __device__ __forceinline__ bool has(uint32_t other_key, int32_t j) const {
    return other_key < key + (j <= last ? 1u : 0u);  // no key is the last number
  }
};

/// The ranked entries of a row.
template <bool kIsOneWarp, bool kIsHeld, int kItems = kRowItems>
struct Ranking {
  using Group = RowGroup<kIsOneWarp>;
  using Walk = RowWalk<kIsOneWarp, kIsHeld, kItems>;

  /// `score_at(j)`: kNoScore for what is not ranked; has_unranked: whether there may be such. The
  /// row is not empty.
  template <class ScoreAt>
  __device__ Ranking(Group& row_group, int32_t row_begin, int32_t row_end, bool has_unranked,
                     const ScoreAt& score_at)
      : group(row_group), walk(row_group, row_begin, row_end), begin(row_begin), end(row_end) {
    walk.for_each([&](int32_t j, int n) {
      // A load and no more depends on j, so that a lane's loads do not wait for each other.
      float score = __uint_as_float(kNoScore);
      if (j < end) score = score_at(j);
      const uint32_t key = rank_key(score);
      if constexpr (kIsHeld) keys[n] = key;
      least = min(least, key);
      most = max(most, key + 1);  // 0 for kNoKey
    });
    const uint2 range = group.all(make_uint2(least, most), make_uint2(kNoKey, 0u), [](uint2 x) {
      return make_uint2(__reduce_min_sync(kAllLanes, x.x), __reduce_max_sync(kAllLanes, x.y));
    });
    least = range.x;
    most = range.y - 1;  // not used where none is ranked
    num = static_cast<uint32_t>(end - begin);
    if (has_unranked) {
      uint32_t count = 0;
      for_each(score_at, [&](uint32_t key, int32_t, int) { count += key != kNoKey; });
      num = group.sum(count);
    }
  }

  /// body(key, j, n) for the entries of this lane; those that are not ranked have kNoKey.
  template <class ScoreAt, class Body>
  __device__ __forceinline__ void for_each(const ScoreAt& score_at, const Body& body) const {
    walk.for_each([&](int32_t j, int n) {
      if constexpr (kIsHeld) {
        body(keys[n], j, n);
      } else {
        body(rank_key(score_at(j)), j, n);
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
template <class Ranking, class ScoreAt>
__device__ __forceinline__ void search_cuts(const Ranking& ranking, const ScoreAt& score_at,
                                            const uint32_t (&wanted)[2], Cut (&cuts)[2]) {
  const auto count = [&](const auto& has_first, const auto& has_second) {
    uint32_t first = 0, second = 0;
    ranking.for_each(score_at, [&](uint32_t key, int32_t j, int) {
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
      ranking.for_each(score_at, [&](uint32_t key, int32_t, int) { num += key <= only; });
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

/// Shared memory of a warp that ranks a row alone.
struct alignas(16) WarpBins {
  static constexpr int kLaneBins = 8, kBins = kLaneBins * kWarpSize;

  uint32_t counts[kBins];          // zeros between rows
  uint32_t none[4];                // the first one counts what is not ranked: nobody reads it
  uint64_t candidates[kWarpSize];  // key, then index

  __device__ __forceinline__ void clear() {
    uint4* const own = reinterpret_cast<uint4*>(counts + lane_index() * kLaneBins);
    own[0] = own[1] = make_uint4(0u, 0u, 0u, 0u);
  }
};

/// Entries of a row that rank next to each other: `before` of the row rank before them.
struct KeySpan {
  uint32_t least = kNoKey, most = 0, before = 0;
};

/// Turns keys of a span into bins of equal width, as numbers from kFirst on.
struct BinScale {
  // 2: its last bit is 2^-22, and of a bin's number and this no more is left than of the number
  // when they are made an address.
  static constexpr uint32_t kFirst = 0x40000000u;

  float best, scale;

  __device__ BinScale(const KeySpan& span, int num_bins) : best(number_of(span.least)) {
    const float spread = best - number_of(span.most);
    const bool is_usable = spread > 1e-30f && spread < 1e30f;
    scale = is_usable ? __fdividef((num_bins - 1) * 0x1p-22f, spread) : 0.0f;
  }
  __device__ __forceinline__ uint32_t bin(uint32_t key) const {
    return __float_as_uint(fmaf(best - number_of(key), scale, 2.0f));
  }
};

/// The same of a row that one warp holds, without a search: entries are counted in bins, and the
/// few in the bins where a prefix ends are compared with each other. False where these are more
/// than a warp has lanes, and `spans` what is in the bins; cuts are as they were. `bin_at(key)`:
/// rises with the key, past those of all bins for an entry that is in none. wanted[0] <= wanted[1],
/// of the entries in bins.
template <class Ranking, class ScoreAt, class BinAt>
__device__ __forceinline__ bool find_cuts_in_bins(const Ranking& ranking, const ScoreAt& score_at,
                                                  const BinAt& bin_at, const uint32_t (&wanted)[2],
                                                  WarpBins& bins, Cut (&cuts)[2],
                                                  KeySpan (&spans)[2]) {
  constexpr int kItems = sizeof(ranking.keys) / sizeof(uint32_t), kLaneBins = WarpBins::kLaneBins;
  constexpr uint32_t kFirst = BinScale::kFirst, kCountMask = 0xfffu;
  static_assert(kItems * kWarpSize <= kCountMask && WarpBins::kBins <= 256);
  const int lane = lane_index();

  __syncwarp();  // all lanes have read the candidates of the row before
  bins.candidates[lane] = ~uint64_t{0};
  __syncwarp();  // of the zeros, in all lanes
  uint32_t bin_of[kItems];
  ranking.for_each(score_at, [&](uint32_t key, int32_t, int n) {
    bin_of[n] = min(bin_at(key), kFirst + WarpBins::kBins);
    atomicAdd(&bins.counts[bin_of[n] - kFirst], 1u);
  });
  __syncwarp();

  // Each lane looks for the ends in its own bins.
  const uint4* const own = reinterpret_cast<const uint4*>(bins.counts + lane * kLaneBins);
  const uint4 low = own[0], high = own[1];
  bins.clear();
  const uint32_t counts[kLaneBins] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t sum = 0;
#pragma unroll
  for (int n = 0; n < kLaneBins; ++n) sum += counts[n];
  uint32_t past = sum;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, past, step);
    past += lane >= step ? before : 0;
  }
  const uint32_t begin = past - sum;
  uint32_t end_bin[2] = {};  // entries in earlier bins, in this one << 12, bin << 24
  uint32_t num_before = begin;
#pragma unroll
  for (int n = 0; n < kLaneBins; ++n) {
    const uint32_t bin = num_before + (counts[n] << 12) + (static_cast<uint32_t>(n) << 24);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (num_before < wanted[c]) end_bin[c] = bin;
    }
    num_before += counts[n];
  }
  uint32_t first_wanted[2], count[2], bin[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const bool is_here = begin < wanted[c] && wanted[c] <= past;
    const uint32_t mine = end_bin[c] + (static_cast<uint32_t>(lane * kLaneBins) << 24);
    const uint32_t found = __reduce_max_sync(kAllLanes, is_here ? mine : 0u);
    first_wanted[c] = wanted[c] - 1 - (found & kCountMask);
    count[c] = found >> 12 & kCountMask;
    bin[c] = kFirst + (found >> 24);
  }
  const uint32_t num = count[0] + (bin[0] != bin[1] ? count[1] : 0u);  // of candidates
  if (num > kWarpSize) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      spans[c] = {.before = wanted[c] - 1 - first_wanted[c]};
      ranking.for_each(score_at, [&](uint32_t key, int32_t, int n) {
        if (bin_of[n] != bin[c]) return;
        spans[c].least = min(spans[c].least, key);
        spans[c].most = max(spans[c].most, key);
      });
      spans[c].least = __reduce_min_sync(kAllLanes, spans[c].least);
      spans[c].most = __reduce_max_sync(kAllLanes, spans[c].most);
    }
    return false;
  }
  if (bin[0] != bin[1]) first_wanted[1] += count[0];

  uint32_t is_candidate[(kItems + 31) / 32] = {};
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    if (bin_of[n] == bin[0] || bin_of[n] == bin[1]) is_candidate[n / 32] |= 1u << n % 32;
  }
  uint32_t num_found = 0;
#pragma unroll
  for (int word = 0; word < (kItems + 31) / 32; ++word) {
    uint32_t rest = is_candidate[word];
#pragma unroll 1
    while (true) {
      const uint32_t votes = __ballot_sync(kAllLanes, rest != 0);
      if (votes == 0) break;
      if (rest != 0) {
        const int n = word * 32 + __ffs(static_cast<int>(rest)) - 1;
        const int32_t j = ranking.walk.first() + n * kWarpSize;
        bins.candidates[num_found + __popc(votes & ((1u << lane) - 1))] =
            uint64_t{rank_key(score_at(j))} << 32 | static_cast<uint32_t>(j);
        rest &= rest - 1;
      }
      num_found += __popc(votes);
    }
  }
  __syncwarp();
  const uint64_t mine = bins.candidates[lane];
  uint32_t rank = 0;
#pragma unroll 1
  for (int first = 0; first < static_cast<int>(num); first += 4) {
#pragma unroll
    for (int n = 0; n < 4; ++n) rank += bins.candidates[first + n] < mine;
  }

  const auto key = static_cast<uint32_t>(mine >> 32);
  bool is_tied = false;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    cuts[c].key = __reduce_max_sync(kAllLanes, rank == first_wanted[c] ? key : 0u);
    is_tied |= rank > first_wanted[c] && key == cuts[c].key;
  }
  if (!__any_sync(kAllLanes, is_tied)) return true;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    cuts[c].last = static_cast<int32_t>(
        __reduce_max_sync(kAllLanes, rank == first_wanted[c] ? static_cast<uint32_t>(mine) : 0u));
  }
  return true;
}

/// The ends of the prefixes of `first` and of `second` entries, 1 <= first <= second.
template <bool kIsOneWarp, bool kIsHeld, int kItems, class ScoreAt>
__device__ __forceinline__ void find_cuts(const Ranking<kIsOneWarp, kIsHeld, kItems>& ranking,
                                          const ScoreAt& score_at, uint32_t first, uint32_t second,
                                          WarpBins* bins, Cut (&cuts)[2]) {
  const bool has_all = second == ranking.num;  // whose end is known
  if constexpr (kIsOneWarp && kIsHeld) {
    constexpr uint32_t kNone = BinScale::kFirst + WarpBins::kBins;
    const uint32_t wanted[2] = {first, has_all ? first : second};
    const KeySpan all{.least = ranking.least, .most = ranking.most};
    const BinScale scale(all, WarpBins::kBins);
    KeySpan spans[2];
    bool is_found = scale.scale > 0.0f;
    if (is_found) {
      is_found = find_cuts_in_bins(
          ranking, score_at, [&](uint32_t key) { return scale.bin(key); }, wanted, *bins, cuts,
          spans);
      if (!is_found) {  // once more, with half of the bins for each of the two
        constexpr int kHalf = WarpBins::kBins / 2;
        const BinScale scales[2] = {BinScale(spans[0], kHalf), BinScale(spans[1], kHalf)};
        const uint32_t lengths[2] = {spans[0].most - spans[0].least,
                                     spans[1].most - spans[1].least};
        const bool is_one = spans[0].least == spans[1].least;
        const auto bin_at = [&](uint32_t key) {
          if (key - spans[0].least <= lengths[0]) return scales[0].bin(key);
          return key - spans[1].least <= lengths[1] ? scales[1].bin(key) + kHalf : kNone;
        };
        uint32_t rest[2] = {wanted[0] - spans[0].before, wanted[1] - spans[1].before};
        if (!is_one) {
          uint32_t num = 0;
          ranking.for_each(score_at, [&](uint32_t key, int32_t, int) {
            num += key - spans[0].least <= lengths[0];
          });
          rest[1] += __reduce_add_sync(kAllLanes, num);
        }
        KeySpan unused[2];
        is_found = find_cuts_in_bins(ranking, score_at, bin_at, rest, *bins, cuts, unused);
      }
    }
    if (is_found) {
      if (has_all) cuts[1] = {.key = ranking.most};
      return;
    }
  }
  search_cuts(ranking, score_at, {first, second}, cuts);
}

/// The number of the best entries whose softmax(scale score) sums to at least `mass` < 1, at least
/// one; is_longest: the most whose sum is at most `mass`.
template <bool kIsHeld, class Ranking, class ScoreAt>
__device__ __forceinline__ uint32_t count_of_mass(const Ranking& ranking, const ScoreAt& score_at,
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
    ranking.for_each(score_at, [&](uint32_t key, int32_t, int n) {
      weights[n] = key == kNoKey ? 0u : softmax_weight(key, best, scale);
    });
  }
  // Entries that are not ranked weigh nothing, so that their keys need no test.
  const auto mass_of = [&](const auto& is_in) {
    uint64_t sum = 0;
    ranking.for_each(score_at, [&](uint32_t key, int32_t, int n) {
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
  ranking.for_each(score_at, [&](uint32_t key, int32_t, int) { count += key < high; });
  count = ranking.group.sum(count);
  const uint32_t weight = softmax_weight(high, best, scale);
  const uint64_t missing = needed > below ? needed - below : 0;
  uint64_t reached = count + (weight == 0 ? 1 : (missing + weight - 1) / weight);
  if (is_longest && reached > 0) --reached;
  return static_cast<uint32_t>(min(max(reached, uint64_t{1}), uint64_t{ranking.num}));
}

}  // namespace sparline::cuda
