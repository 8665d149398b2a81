// SPDX-License-Identifier: Apache-2.0
//
// Block tables: segments become blocks on the device. Segments travel as kernel parameters, which a
// captured graph keeps.
#include <algorithm>
#include <vector>

#include "cuda/common/platform.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRunsPerLaunch = 96;  // 3 KB; kernels take up to 4 KB of parameters

/// A segment that has rows: its blocks are entries first_block, first_block + 1, ... of the table.
struct Run {
  int32_t begin, end;
  int32_t first_block;
  int32_t other_begin, other_end;
  int32_t sequence, is_protected, sequence_rows;
};

struct Runs {
  Run run[kRunsPerLaunch];
};

/// One thread block for each segment.
__global__ void __launch_bounds__(kThreads)
    fill_block_table_kernel(const Runs runs, int32_t block_rows, BlockInfo* table) {
  begin_kernel();
  const Run& run = runs.run[blockIdx.x];
  const int32_t num_blocks = (run.end - run.begin + block_rows - 1) / block_rows;
  for (int32_t n = static_cast<int32_t>(threadIdx.x); n < num_blocks; n += kThreads) {
    const int32_t begin = run.begin + n * block_rows;
    const int32_t rest = run.end - begin;
    table[run.first_block + n] = {begin,
                                  rest < block_rows ? rest : block_rows,
                                  run.other_begin,
                                  run.other_end,
                                  run.sequence,
                                  run.is_protected,
                                  run.sequence_rows,
                                  0};
  }
}

int32_t blocks_of(const Segment& segment, int block_rows) {
  return static_cast<int32_t>((segment.end - segment.begin + block_rows - 1) / block_rows);
}

/// One sequence on one axis.
struct Sequence {
  int32_t number = 0;  // as in the segments
  int32_t num_rows = 0;
  int32_t begin = 0, end = 0;  // its blocks
};

/// In order; a sequence may have no rows.
std::vector<Sequence> sequences_of(std::span<const Segment> segments, int block_rows) {
  std::vector<Sequence> sequences;
  int32_t end = 0;
  for (const Segment& segment : segments) {
    if (sequences.empty() || sequences.back().number != segment.sequence) {
      sequences.push_back({.number = segment.sequence, .begin = end, .end = end});
    }
    end += blocks_of(segment, block_rows);
    sequences.back().end = end;
    sequences.back().num_rows += static_cast<int32_t>(segment.end - segment.begin);
  }
  return sequences;
}

}  // namespace

void fill_block_table(std::span<const Segment> segments, int block_rows,
                      std::span<const Segment> others, int other_block_rows, BlockInfo* table,
                      void* stream) {
  const std::vector<Sequence> here = sequences_of(segments, block_rows);
  const std::vector<Sequence> there = sequences_of(others, other_block_rows);
  Runs runs{};
  int64_t num_runs = 0;
  const auto flush = [&] {
    launch(fill_block_table_kernel, {.blocks = num_runs, .threads = kThreads}, stream, runs,
           block_rows, table);
    num_runs = 0;
  };

  // Both lists ascend: sequence numbers are counted as they merge.
  size_t here_idx = 0, there_idx = 0;
  int32_t sequence = 0, first_block = 0, other_end = 0;
  for (const Segment& segment : segments) {
    if (here[here_idx].number != segment.sequence) {
      ++here_idx;
      ++sequence;
    }
    for (; there_idx < there.size() && there[there_idx].number < segment.sequence; ++there_idx) {
      other_end = there[there_idx].end;
      const bool is_counted = here_idx > 0 && there[there_idx].number == here[here_idx - 1].number;
      if (!is_counted) ++sequence;
    }
    const bool is_there = there_idx < there.size() && there[there_idx].number == segment.sequence;
    const int32_t num_blocks = blocks_of(segment, block_rows);
    if (num_blocks == 0) continue;
    runs.run[num_runs++] = {.begin = static_cast<int32_t>(segment.begin),
                            .end = static_cast<int32_t>(segment.end),
                            .first_block = first_block,
                            .other_begin = is_there ? there[there_idx].begin : other_end,
                            .other_end = is_there ? there[there_idx].end : other_end,
                            .sequence = sequence,
                            .is_protected = segment.is_protected ? 1 : 0,
                            .sequence_rows = here[here_idx].num_rows};
    first_block += num_blocks;
    if (num_runs == kRunsPerLaunch) flush();
  }
  flush();
}

}  // namespace sparline::cuda
