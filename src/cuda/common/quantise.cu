// SPDX-License-Identifier: Apache-2.0
//
// Keys and values of the low-bit forward (docs/math.md, "Low bit"), in three launches:
//   by key block: int8 codes of k less its mean key and their one step; the largest |v| by channel
//   by sequence: the steps of v, delta_v = max |v| / v_range by channel
//   by key block: e4m3 codes of v / delta_v
// All of it moves memory: each element of k is read once and each of v twice, 16 bytes a load where
// rows allow.
#include "cuda/common/low_bit.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {
namespace {

constexpr int kMaxBlockKeys = 128;
constexpr float kInt8Range = 127.0f;

struct Params {
  Frame frame;
  Wave wave;
  Rows k, v;
  const float* k_mean;  // (B, H_kv, sequences, D) or null
  float v_range;
  int8_t* k_codes;
  float* k_steps;  // (pairs, T_n)
  uint8_t* v_codes;
  float* v_steps;  // (pairs, sequences, D)
  float* v_peaks;  // (pairs, T_n, D)
};

/// The key block of a thread block.
struct Place {
  int64_t idx;   // of the wave: pair T_n + j
  int32_t pair;  // of the wave
  int64_t b, h_kv;
  BlockInfo block;
};
__device__ __forceinline__ Place place(const Params& params, uint32_t idx) {
  const int32_t num_blocks = params.frame.keys.num_blocks;
  const auto pair = static_cast<int32_t>(idx / num_blocks);
  const int32_t of_all = params.wave.first + pair;
  return {idx, pair, of_all / params.frame.num_kv_heads, of_all % params.frame.num_kv_heads,
          params.frame.keys.block(static_cast<int32_t>(idx % num_blocks))};
}

// k, and the peaks of v --------------------------------------------------------------------------

template <class T, int kHeadDim>
struct KeysBlock {
  static constexpr int kThreads = 2 * kHeadDim, kWarps = kThreads / kWarpSize;
  static constexpr int kColumns = 16;  // of k that a thread reads together: 16 bytes of codes
  static constexpr int kItems = kMaxBlockKeys * kHeadDim / kColumns / kThreads;
  static constexpr int kValueColumns = 8;  // of v
  static constexpr int kValueRows = kThreads / (kHeadDim / kValueColumns);

  const Params& params;
  const Place& at;

  /// Codes and step of k. An item is one key and 16 columns; items stand as their codes do, so
  /// that codes are stored side by side. A thread's items share columns.
  __device__ void keys(float* warp_peaks) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int32_t head_dim = params.frame.head_dim;
    const int col = thread / kCodeGroup % (kHeadDim / kColumns) * kColumns;
    const int num_items = padded_keys(params.frame.keys) * (kHeadDim / kColumns);
    const auto key_of = [](int item) { return item / kHeadDim * kCodeGroup + item % kCodeGroup; };
    uint32_t pairs[kItems][kColumns / 2];
    const uint16_t* const head = params.k.template head<const uint16_t>(at.b, at.h_kv);
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int key = key_of(thread + n * kThreads);
      const bool is_valid = key < at.block.rows;
      const uint16_t* const row = is_valid ? head + params.k.offset(at.block.begin + key) : head;
      load_elements<kColumns>(pairs[n], row, col, head_dim, is_valid, params.k.is_vectorised);
    }
    float mean[kColumns] = {};
    if (params.k_mean != nullptr) {
      const int64_t pair = int64_t{params.wave.first} + at.pair;
      const float* const row =
          params.k_mean + (pair * params.frame.keys.num_sequences + at.block.sequence) * head_dim;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) mean[c] = col + c < head_dim ? row[col + c] : 0.0f;
    }
    const auto key_row = [&](int n, float (&x)[kColumns]) {
      const bool is_valid = key_of(thread + n * kThreads) < at.block.rows;
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        const float2 pair = to_floats<T>(pairs[n][c / 2]);
        x[c] = is_valid ? pair.x - mean[c] : 0.0f;
        x[c + 1] = is_valid ? pair.y - mean[c + 1] : 0.0f;
      }
    };
    float peak = 0.0f;
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      float x[kColumns];
      key_row(n, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) peak = fmaxf(peak, fabsf(x[c]));
    }
    peak = warp_max(peak);
    if (lane_index() == 0) warp_peaks[warp_index()] = peak;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, warp_peaks[w]);
    const float step = step_of(peak, kInt8Range);
    if (thread == 0) params.k_steps[at.idx] = step;

    const Divisor divisor(step);
    uint4* const codes = reinterpret_cast<uint4*>(params.k_codes) + at.idx * num_items;
#pragma unroll
    for (int n = 0; n < kItems; ++n) {
      const int item = thread + n * kThreads;
      if (item >= num_items) break;
      float x[kColumns];
      key_row(n, x);
      codes[item] = make_uint4(int8_codes(x, divisor), int8_codes(x + 4, divisor),
                               int8_codes(x + 8, divisor), int8_codes(x + 12, divisor));
    }
  }

  /// The largest |v| of each channel.
  __device__ void value_peaks(float (&row_peaks)[kValueRows][kHeadDim]) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int32_t head_dim = params.frame.head_dim;
    const int col = thread % (kHeadDim / kValueColumns) * kValueColumns;
    const int first = thread / (kHeadDim / kValueColumns);
    const uint16_t* const head = params.v.template head<const uint16_t>(at.b, at.h_kv);
    float peaks[kValueColumns] = {};
#pragma unroll 8
    for (int r = first; r < at.block.rows; r += kValueRows) {
      uint32_t pairs[kValueColumns / 2];
      load_elements<kValueColumns>(pairs, head + params.v.offset(at.block.begin + r), col, head_dim,
                                   true, params.v.is_vectorised);
#pragma unroll
      for (int c = 0; c < kValueColumns; c += 2) {
        const float2 pair = to_floats<T>(pairs[c / 2]);
        peaks[c] = fmaxf(peaks[c], fabsf(pair.x));
        peaks[c + 1] = fmaxf(peaks[c + 1], fabsf(pair.y));
      }
    }
#pragma unroll
    for (int c = 0; c < kValueColumns; ++c) row_peaks[first][col + c] = peaks[c];
    __syncthreads();
    if (thread >= head_dim) return;
    float peak = 0.0f;
#pragma unroll
    for (int r = 0; r < kValueRows; ++r) peak = fmaxf(peak, row_peaks[r][thread]);
    params.v_peaks[at.idx * head_dim + thread] = peak;
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim)
    quantise_keys_kernel(const __grid_constant__ Params params) {
  begin_kernel();
  using Block = KeysBlock<T, kHeadDim>;
  __shared__ float warp_peaks[Block::kWarps];
  __shared__ float row_peaks[Block::kValueRows][kHeadDim];
  const Place at = place(params, blockIdx.x);
  const Block block{params, at};
  block.keys(warp_peaks);
  block.value_peaks(row_peaks);
}

// The steps of v ---------------------------------------------------------------------------------

/// The first key block of sequence `number` or of a later one.
__device__ __forceinline__ int32_t first_block(const Axis& keys, int32_t number) {
  if (keys.table == nullptr) return number == 0 ? 0 : keys.num_blocks;
  int32_t begin = 0, end = keys.num_blocks;
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (keys.table[middle].sequence < number) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

constexpr int kStepThreads = 512;

/// One sequence of one pair: kSlices threads share a channel.
template <int kHeadDim>
__global__ void __launch_bounds__(kStepThreads)
    value_steps_kernel(const __grid_constant__ Params params) {
  begin_kernel();
  constexpr int kSlices = kStepThreads / kHeadDim;
  __shared__ float slices[kSlices][kHeadDim];
  const Axis& keys = params.frame.keys;
  const int32_t head_dim = params.frame.head_dim;
  const auto pair = static_cast<int32_t>(blockIdx.x / keys.num_sequences);
  const auto sequence = static_cast<int32_t>(blockIdx.x % keys.num_sequences);
  const int32_t begin = first_block(keys, sequence), end = first_block(keys, sequence + 1);
  const int d = static_cast<int>(threadIdx.x) % kHeadDim;
  const int slice = static_cast<int>(threadIdx.x) / kHeadDim;
  float peak = 0.0f;
  if (d < head_dim) {
    const float* const peaks = params.v_peaks + int64_t{pair} * keys.num_blocks * head_dim + d;
#pragma unroll 8
    for (int32_t j = begin + slice; j < end; j += kSlices) {
      peak = fmaxf(peak, peaks[int64_t{j} * head_dim]);
    }
  }
  slices[slice][d] = peak;
  __syncthreads();
  if (slice != 0 || d >= head_dim) return;
#pragma unroll
  for (int n = 1; n < kSlices; ++n) peak = fmaxf(peak, slices[n][d]);
  params.v_steps[int64_t{blockIdx.x} * head_dim + d] = step_of(peak, params.v_range);
}

// The codes of v ---------------------------------------------------------------------------------

constexpr int kValueThreads = 128;

/// A thread reads four columns of the 16 keys of a group, and stores four rows of codes.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kValueThreads)
    quantise_values_kernel(const __grid_constant__ Params params) {
  begin_kernel();
  constexpr int kColumns = 4, kColumnItems = kHeadDim / kColumns;
  static_assert(kValueThreads % kColumnItems == 0);  // a thread's items share columns
  const Place at = place(params, blockIdx.x);
  const int32_t head_dim = params.frame.head_dim;
  const int col = static_cast<int>(threadIdx.x) % kColumnItems * kColumns;
  const int64_t steps_row = int64_t{at.pair} * params.frame.keys.num_sequences + at.block.sequence;
  const float* const steps = params.v_steps + steps_row * head_dim;
  const Divisor divisors[kColumns] = {Divisor(col < head_dim ? steps[col] : 1.0f),
                                      Divisor(col < head_dim ? steps[col + 1] : 1.0f),
                                      Divisor(col + 2 < head_dim ? steps[col + 2] : 1.0f),
                                      Divisor(col + 2 < head_dim ? steps[col + 3] : 1.0f)};
  const uint16_t* const head = params.v.template head<const uint16_t>(at.b, at.h_kv);
  const int32_t num_keys = padded_keys(params.frame.keys);
  uint4* const codes =
      reinterpret_cast<uint4*>(params.v_codes) + at.idx * (num_keys / kCodeGroup) * kHeadDim;

  for (int group = static_cast<int>(threadIdx.x) / kColumnItems; group * kCodeGroup < num_keys;
       group += kValueThreads / kColumnItems) {
    uint32_t pairs[kCodeGroup][kColumns / 2];
#pragma unroll
    for (int r = 0; r < kCodeGroup; ++r) {
      const int key = group * kCodeGroup + r;
      const bool is_valid = key < at.block.rows;
      const uint16_t* const row = is_valid ? head + params.v.offset(at.block.begin + key) : head;
      load_elements<kColumns>(pairs[r], row, col, head_dim, is_valid, params.v.is_vectorised);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const auto value = [&](int place) {
        const float2 pair = to_floats<T>(pairs[key_at(place)][c / 2]);
        return divisors[c].quotient(c % 2 == 0 ? pair.x : pair.y);
      };
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        words[n] = e4m3_codes(value(4 * n), value(4 * n + 1)) |
                   e4m3_codes(value(4 * n + 2), value(4 * n + 3)) << 16;
      }
      codes[group * kHeadDim + col + c] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

template <class T, int kHeadDim>
void quantise(const Params& params, void* stream) {
  const Axis& keys = params.frame.keys;
  const int64_t num_blocks = int64_t{params.wave.count} * keys.num_blocks;
  launch(quantise_keys_kernel<T, kHeadDim>, {.blocks = num_blocks, .threads = 2 * kHeadDim}, stream,
         params);
  launch(value_steps_kernel<kHeadDim>,
         {.blocks = int64_t{params.wave.count} * keys.num_sequences, .threads = kStepThreads},
         stream, params);
  launch(quantise_values_kernel<T, kHeadDim>, {.blocks = num_blocks, .threads = kValueThreads},
         stream, params);
}

}  // namespace

int64_t code_bytes(const Frame& frame, int64_t pairs) {
  return pairs * frame.keys.num_blocks * padded_keys(frame.keys) * padded_head_dim(frame.head_dim);
}

void quantise_keys_values(const SparseForward& params, int8_t* k_codes, float* k_steps,
                          uint8_t* v_codes, float* v_steps, float* v_peaks, void* stream) {
  const Params all{.frame = params.frame,
                   .wave = params.wave,
                   .k = params.k,
                   .v = params.v,
                   .k_mean = params.k_mean,
                   .v_range = static_cast<float>(params.low_bit.v_range),
                   .k_codes = k_codes,
                   .k_steps = k_steps,
                   .v_codes = v_codes,
                   .v_steps = v_steps,
                   .v_peaks = v_peaks};
  const auto with = [&](auto type) {
    using T = decltype(type);
    switch (padded_head_dim(params.frame.head_dim)) {
      case 64: return quantise<T, 64>(all, stream);
      case 128: return quantise<T, 128>(all, stream);
      default: return quantise<T, 256>(all, stream);
    }
  };
  params.dtype == DType::kBF16 ? with(bf16{}) : with(fp16{});
}

}  // namespace sparline::cuda
