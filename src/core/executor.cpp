// SPDX-License-Identifier: Apache-2.0
#include <omp.h>

#include "sparline/attention.h"

namespace sparline {
namespace {

void openmp_parallel_for(int num_threads, int64_t count, void (*body)(void*, int64_t),
                         void* body_context) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t idx = 0; idx < count; ++idx) body(body_context, idx);
}

}  // namespace

Executor default_executor(int num_threads) {
  return {.num_threads = num_threads > 0 ? num_threads : omp_get_max_threads(),
          .parallel_for = openmp_parallel_for};
}

}  // namespace sparline
