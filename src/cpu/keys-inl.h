// SPDX-License-Identifier: Apache-2.0
//
// What the staging of keys and values does beyond a copy: the mean key of a sequence, and the int8
// and e4m3 roundings of the low-bit forward.
//
// Both need a value of the whole sequence (the mean of k, the largest |v|). Each block leaves its
// own in a table (T_n x ld), then one pass over the table replaces it by that of the sequence: no
// atomics, an order of summation that depends on the problem alone.

#if defined(SPARLINE_CPU_KEYS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_KEYS_INL_H_
#undef SPARLINE_CPU_KEYS_INL_H_
#else
#define SPARLINE_CPU_KEYS_INL_H_
#endif

#include "cpu/int8_gemm-inl.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- values of a sequence

/// out = the sum of the rows of a tile.
HWY_INLINE void column_sums(const float* tile, int64_t ld, int64_t num_rows, int64_t num,
                            float* out) {
  std::fill_n(out, pad(num), 0.0f);
  for (int64_t r = 0; r < num_rows; ++r) add_scaled(num, 1.0f, tile + r * ld, out);
}

/// y = max(|x|, y)
HWY_INLINE void raise_to_abs(int64_t num, const float* x, float* y) {
  const FloatTag d;
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    hn::StoreU(hn::Max(hn::Abs(hn::LoadU(d, x + at)), hn::LoadU(d, y + at)), d, y + at);
  });
}

/// out = max |.| down the columns of a tile.
HWY_INLINE void column_peaks(const float* tile, int64_t ld, int64_t num_rows, int64_t num,
                             float* out) {
  std::fill_n(out, pad(num), 0.0f);
  for (int64_t r = 0; r < num_rows; ++r) raise_to_abs(num, tile + r * ld, out);
}

/// Replaces the row of each block by that of its sequence: gather(row, total) over its blocks, then
/// finish(total, number of its keys).
template <class Gather, class Finish>
void over_sequences(const std::vector<Block>& blocks, int64_t num, int64_t ld, float* table,
                    const Gather& gather, const Finish& finish) {
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  for (int64_t first = 0, next = 0; first < num_blocks; first = next) {
    float* const total = table + first * ld;
    int64_t num_rows = blocks[first].rows;
    for (next = first + 1; next < num_blocks && blocks[next].sequence == blocks[first].sequence;
         ++next) {
      gather(table + next * ld, total);
      num_rows += blocks[next].rows;
    }
    finish(total, num_rows);
    for (int64_t j = first + 1; j < next; ++j) std::copy_n(total, pad(num), table + j * ld);
  }
}

/// table: from sums over blocks to the mean row of each block's sequence.
inline void means_of_sequences(const std::vector<Block>& blocks, int64_t num, int64_t ld,
                               float* table) {
  over_sequences(
      blocks, num, ld, table,
      [&](const float* row, float* total) { add_scaled(num, 1.0f, row, total); },
      [&](float* total, int64_t rows) { scale_row(num, 1.0f / static_cast<float>(rows), total); });
}

HWY_INLINE void subtract_row(const float* row, int64_t ld, int64_t num_rows, int64_t num,
                             float* tile) {
  for (int64_t r = 0; r < num_rows; ++r) add_scaled(num, -1.0f, row, tile + r * ld);
}

// ---- low bit

/// The step of a group of values whose largest magnitude is `peak` and whose largest code is
/// `range`; 1 where all is zero.
HWY_INLINE float step_of(float peak, float range) {
  const float step = peak / range;
  return step > 0.0f ? step : 1.0f;
}

/// table: from the largest |v| of blocks to the step of each block's sequence, per channel.
inline void steps_of_sequences(const std::vector<Block>& blocks, int64_t num, int64_t ld,
                               float range, float* table) {
  over_sequences(
      blocks, num, ld, table,
      [&](const float* row, float* total) { raise_to_abs(num, row, total); },
      [&](float* total, int64_t) {
        for (int64_t c = 0; c < pad(num); ++c) total[c] = step_of(total[c], range);
      });
}

/// x / step as int8 code, to nearest even. Sums of products of two such codes stay below 2^24 and
/// are exact as float32 too.
HWY_INLINE IntVec int8_code(FloatVec x, FloatVec step) {
  const FloatTag d;
  const FloatVec code = hn::Round(hn::Div(x, step));
  const FloatVec clamped = hn::Min(hn::Max(code, hn::Set(d, -127.0f)), hn::Set(d, 127.0f));
  return hn::ConvertTo(IntTag(), clamped);
}

/// The nearest e4m3 value, ties to even, saturating at 448: adding and subtracting 1.5 2^23 steps
/// leaves whole steps, and a step is 2^-3 of the power of two below |x|, at least 2^-9.
HWY_INLINE FloatVec e4m3(FloatVec x) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  x = hn::Min(hn::Max(x, hn::Set(d, -448.0f)), hn::Set(d, 448.0f));
  const FloatVec power = hn::BitCast(d, hn::And(hn::BitCast(di, x), hn::Set(di, 0x7f800000)));
  const FloatVec shift = hn::Mul(hn::Max(power, hn::Set(d, 0x1p-6f)), hn::Set(d, 1.5f * 0x1p20f));
  return hn::Sub(hn::Add(x, shift), shift);
}

/// The int8 codes of a block of keys (rows x ld_codes); returns their one step.
inline float quantise_keys(const float* tile, int64_t ld, int64_t num_rows, int64_t num,
                           int16_t* codes, int64_t ld_codes) {
  const FloatTag d;
  const hn::Rebind<int16_t, FloatTag> d16;
  FloatVec peak = hn::Zero(d);
  for (int64_t r = 0; r < num_rows; ++r) {
    for_each_vector(num, [&](int64_t at) HWY_ATTR {
      peak = hn::Max(hn::Abs(hn::LoadU(d, tile + r * ld + at)), peak);
    });
  }
  const float step = step_of(hn::GetLane(hn::MaxOfLanes(d, peak)), 127.0f);
  for (int64_t r = 0; r < num_rows; ++r) {
    for_each_vector(num, [&](int64_t at) HWY_ATTR {
      const IntVec code = int8_code(hn::LoadU(d, tile + r * ld + at), hn::Set(d, step));
      hn::StoreU(hn::DemoteTo(d16, code), d16, codes + r * ld_codes + at);
    });
  }
  return step;
}

/// Replaces values by e4m3(v / step), a step per channel.
inline void quantise_values(const float* steps, int64_t ld, int64_t num_rows, int64_t num,
                            float* tile) {
  const FloatTag d;
  for (int64_t r = 0; r < num_rows; ++r) {
    float* const row = tile + r * ld;
    for_each_vector(num, [&](int64_t at) HWY_ATTR {
      hn::StoreU(e4m3(hn::Div(hn::LoadU(d, row + at), hn::LoadU(d, steps + at))), d, row + at);
    });
  }
}

/// The int8 codes of queries, given transposed (D x ld_rows), as pairs (D / 2 x ld_rows) with a
/// step for every `group` rows, a multiple of kPadFloats; steps (ld_rows) gets the step of each
/// row.
inline void quantise_queries(const float* q_t, int64_t head_dim, int64_t ld_rows, int64_t num_rows,
                             int64_t group, int32_t* pairs, float* steps) {
  const FloatTag d;
  for (int64_t begin = 0; begin < num_rows; begin += group) {
    const int64_t rows = std::min(group, num_rows - begin);
    FloatVec peak = hn::Zero(d);
    for (int64_t c = 0; c < head_dim; ++c) {
      for_each_vector(rows, [&](int64_t at) HWY_ATTR {
        peak = hn::Max(hn::Abs(hn::LoadU(d, q_t + c * ld_rows + begin + at)), peak);
      });
    }
    const float step = step_of(hn::GetLane(hn::MaxOfLanes(d, peak)), 127.0f);
    std::fill_n(steps + begin, pad(rows), step);
    for (int64_t c = 0; c < head_dim; c += 2) {
      for_each_vector(rows, [&](int64_t at) HWY_ATTR {
        const float* const x = q_t + c * ld_rows + begin + at;
        const IntVec first = int8_code(hn::LoadU(d, x), hn::Set(d, step));
        const IntVec second = int8_code(hn::LoadU(d, x + ld_rows), hn::Set(d, step));
        hn::StoreU(code_pairs(first, second), IntTag(), pairs + c / 2 * ld_rows + begin + at);
      });
    }
  }
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_KEYS_INL_H_
