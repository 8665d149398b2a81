// SPDX-License-Identifier: Apache-2.0
//
// The stages of the router: block tables, where segments need them, then the classes.
#include "cuda/device.h"
#include "cuda/host.h"

namespace sparline::cuda {
namespace {

/// What the router keeps in its workspace.
struct RouteSpace {
  Frame frame;
  float* projections;  // (H, D, D), for a matrix of all heads beside one for each head
  std::byte* scratch;
  int64_t total_bytes;

  RouteSpace(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    Arena arena(base);
    frame = take_frame(plan, arena);
    projections = arena.take<float>(p.num_heads * p.head_dim * p.head_dim);
    scratch = arena.take<std::byte>(scratch_bytes());
    total_bytes = arena.used_bytes();
  }

 private:
  /// A plan knows no rule: room for the one that takes most.
  int64_t scratch_bytes() const {
    int64_t most = 0;
    for (const Selection selection :
         {Selection::kTopK, Selection::kTopP, Selection::kUnion, Selection::kIntersection}) {
      const RouteRule rule{
          .selection = selection, .critical_mass = 0.5, .smooth_k = true, .min_similarity = 0.5};
      most = std::max(most, route_bytes(frame, rule, /*has_projections=*/true));
    }
    return most;
  }
};

/// One matrix (D, D) for each head, in `out`.
const float* repeat(const float* matrix, const Problem& p, float* out, void* stream) {
  const int64_t num = p.head_dim * p.head_dim, bytes = num * size_bytes(DType::kF32);
  for (int64_t h = 0; h < p.num_heads; ++h) {
    copy_rows(out + h * num, bytes, matrix, bytes, bytes, 1, stream);
  }
  return out;
}

}  // namespace

int64_t route_workspace_bytes(const Plan& plan) { return RouteSpace(plan, nullptr).total_bytes; }

void route(const Plan& plan, const RouteArgs& args, std::byte* workspace, void* stream) {
  const Problem& p = plan.problem;
  const RouteSpace space(plan, workspace);
  fill_tables(plan, space.frame, stream);
  RouteParams params{.frame = space.frame,
                     .dtype = p.dtype,
                     .q = rows_of(args.q, args.query_order),
                     .k = rows_of(args.k, args.key_order),
                     .scale = static_cast<float>(p.softmax_scale),
                     .rule = args.rule,
                     .proj_q = floats(args.proj_q),
                     .proj_k = floats(args.proj_k),
                     .block_class = map_of(p, args.block_class),
                     .k_mean = floats(args.k_mean)};
  params.block_class.is_soft = false;
  const bool is_q_shared = args.proj_q.shape[1] == 1, is_k_shared = args.proj_k.shape[1] == 1;
  if (args.proj_q && !(is_q_shared && is_k_shared)) {
    params.proj_stride_h = p.head_dim * p.head_dim;
    if (is_q_shared) params.proj_q = repeat(params.proj_q, p, space.projections, stream);
    if (is_k_shared) params.proj_k = repeat(params.proj_k, p, space.projections, stream);
  }
  route(params, space.scratch, stream);
}

}  // namespace sparline::cuda
