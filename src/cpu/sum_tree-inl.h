// SPDX-License-Identifier: Apache-2.0
//
// Sums over arbitrary subsets of blocks, without subtraction. Block states (h_j and z_j, or their
// gradients) are the leaves; node (level, n) is the sum of leaves [n 2^level, (n + 1) 2^level). A
// subset is the union of a few aligned runs: a row with c critical blocks out of T needs about c
// log2(T / c) additions for its complement instead of T - c. "Total minus critical" would need only
// c, but in float32 it leaves rounding noise where the true sum is tiny or zero, and the linear
// branch divides by such a sum.

#if defined(SPARLINE_CPU_SUM_TREE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_SUM_TREE_INL_H_
#undef SPARLINE_CPU_SUM_TREE_INL_H_
#else
#define SPARLINE_CPU_SUM_TREE_INL_H_
#endif

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class SumTree {
 public:
  SumTree(float* data, int64_t num_leaves, int64_t leaf_floats)
      : data_(data), num_leaves_(num_leaves), leaf_floats_(leaf_floats) {}

  float* leaf(int64_t n) const { return data_ + n * leaf_floats_; }

  /// Fills the inner nodes' floats [begin, end) (multiples of kPadFloats): slices can be built in
  /// parallel.
  void build(int64_t begin, int64_t end) const {
    const FloatTag d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    float* below = data_;
    for (int64_t count = num_leaves_; count > 1; count /= 2) {
      float* const level = below + count * leaf_floats_;
      for (int64_t n = 0; n < count / 2; ++n) {
        const float* HWY_RESTRICT left = below + 2 * n * leaf_floats_;
        const float* HWY_RESTRICT right = left + leaf_floats_;
        float* HWY_RESTRICT sum = level + n * leaf_floats_;
        for (int64_t at = begin; at < end; at += lanes) {
          hn::StoreU(hn::Add(hn::LoadU(d, left + at), hn::LoadU(d, right + at)), d, sum + at);
        }
      }
      below = level;
    }
  }

  /// sum += the leaves n of `range` with is_member[n]. Returns whether there was one.
  bool add_members(BlockRange range, const uint8_t* is_member, float* sum) const {
    bool any = false;
    for (int64_t n = range.begin; n < range.end;) {
      if (!is_member[n]) {
        ++n;
        continue;
      }
      any = true;
      int64_t run = 1;  // leaves covered; doubles while aligned, inside the range and full
      const float* level = data_;
      int64_t count = num_leaves_;
      while (n % (2 * run) == 0 && n + 2 * run <= range.end &&
             std::all_of(is_member + n + run, is_member + n + 2 * run,
                         [](uint8_t member) { return member != 0; })) {
        level += count * leaf_floats_;
        count /= 2;
        run *= 2;
      }
      add_scaled(leaf_floats_, 1.0f, level + n / run * leaf_floats_, sum);
      n += run;
    }
    return any;
  }

 private:
  float* data_;
  int64_t num_leaves_;
  int64_t leaf_floats_;
};

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_SUM_TREE_INL_H_
