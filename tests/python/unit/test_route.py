# SPDX-License-Identifier: Apache-2.0
"""The router's rules: counts, rounding, ties, NaN, packed sequences, protected spans.

Inputs are small integers in power-of-two blocks, so that scores are exact on every backend and ties
are real ties.
"""

import math

import oracle
import pytest
import torch
from torch import Tensor

import sparline
from sparline import SLA, SLA2, VSA, Grid, VMoBA, Weights


def rows_of_scores(scores: list[float], rows: int = 16) -> tuple[Tensor, Tensor]:
    """q and k with one query block whose score for key block j is scores[j] (scale 1)."""
    q = torch.zeros(1, 1, rows, 4)
    q[..., 0] = 1
    k = torch.zeros(1, 1, rows * len(scores), 4)
    k[..., 0] = torch.tensor(scores).repeat_interleave(rows)
    return q, k


def classes(scores: list[float], backend: str, **options: object) -> list[int]:
    q, k = rows_of_scores(scores)
    method = SLA(**{"block_q": 16, "block_k": 16, "smooth_k": "none", **options})
    block_map = sparline.route(q, k, method=method, scale=1.0, backend=backend)
    assert block_map.dtype == torch.int8
    result: list[int] = block_map[0, 0, 0].tolist()
    return result


def test_three_classes(backend: str) -> None:
    scores = [3.0, 9.0, 1.0, 7.0, 5.0, 2.0, 8.0, 4.0, 6.0, 0.0]
    expected = [0, 1, -1, 0, 0, -1, 1, 0, 0, -1]
    assert classes(scores, backend, keep_ratio=0.2, negligible_ratio=0.3) == expected


def test_ties_go_to_the_lower_index(backend: str) -> None:
    """First n_h of (score falling, index rising) are critical, the last n_l negligible."""
    assert classes([5.0] * 5, backend, keep_ratio=0.4, negligible_ratio=0.4) == [1, 1, 0, -1, -1]
    scores = [1.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    expected = [0, 1, 1, 0, -1, -1]
    assert classes(scores, backend, keep_ratio=0.34, negligible_ratio=0.34) == expected


def test_signed_zeros_tie(backend: str) -> None:
    assert classes([0.0, -0.0, 0.0], backend, keep_ratio=0.34, negligible_ratio=0.34) == [1, 0, -1]
    assert classes([-0.0, 0.0, 0.0], backend, keep_ratio=0.34, negligible_ratio=0.34) == [1, 0, -1]


def test_nan_ranks_lowest(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    scores = [nan, -1.0, 2.0, nan, 1.0]
    expected = [-1, 0, 1, -1, 1]
    assert classes(scores, backend, keep_ratio=0.4, negligible_ratio=0.4) == expected
    # Behind minus infinity too, and in index order among themselves. An infinite key times the zero
    # components of q would be NaN itself, so the sign comes through q's only component.
    q, k = rows_of_scores([nan, 1.0, nan, 2.0])
    q, k = q[..., :1].repeat(1, 1, 1, 4), k[..., :1].repeat(1, 1, 1, 4)
    k[:, :, 16:32] = -inf
    method = SLA(keep_ratio=0.5, negligible_ratio=0.25, block_q=16, block_k=16, smooth_k="none")
    block_map = sparline.route(q, k, method=method, backend=backend)
    assert block_map[0, 0, 0].tolist() == [0, 1, -1, 1]


def test_nan_stays_in_its_head(backend: str) -> None:
    q, k = (torch.randn(2, 2, 64, 8) for _ in range(2))
    method = SLA(keep_ratio=0.5, block_q=16, block_k=16)
    clean = sparline.route(q, k, method=method, backend=backend)
    k[0, 1, 5, 3] = float("nan")
    dirty = sparline.route(q, k, method=method, backend=backend)
    same = torch.ones(2, 2, dtype=torch.bool)
    same[0, 1] = False
    assert torch.equal(clean[same], dirty[same])


@pytest.mark.parametrize("rounding", ["floor", "round", "ceil"])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.05, 0.25, 0.29, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("total", [1, 2, 10, 100])
def test_counts(ratio: float, total: int, rounding: str, backend: str) -> None:
    """At least one critical block, at most all; negligible blocks from what is left."""
    scores = [float((7 * n) % 101) for n in range(total)]
    options = {"keep_ratio": ratio, "negligible_ratio": 0.25, "count_rounding": rounding}
    got = classes(scores, backend, **options)
    num_critical, num_negligible = oracle.counts(total, ratio, 0.25, rounding)
    assert (got.count(1), got.count(-1)) == (num_critical, num_negligible)
    assert got == oracle.classify(scores, num_critical, num_negligible)


def test_counts_by_hand(backend: str) -> None:
    """Products in double: 0.29 x 100 is 28.999..., and halves round away from zero."""
    scores = [float(n) for n in range(100)]
    for rounding, expected in (("floor", 28), ("round", 29), ("ceil", 29)):
        got = classes(scores, backend, keep_ratio=0.29, count_rounding=rounding)
        assert got.count(1) == expected
    assert classes(scores[:10], backend, keep_ratio=0.25, count_rounding="round").count(1) == 3
    assert classes(scores[:10], backend, keep_ratio=0.24, count_rounding="round").count(1) == 2


def test_published_counts() -> None:
    """T_n = 512 and 1182: 25 and 59 blocks at 5 %, 15 and 35 at 3 %."""
    assert [int(0.05 * 512), int(0.03 * 512), int(0.05 * 1182), int(0.03 * 1182)] == [
        25,
        15,
        59,
        35,
    ]
    assert oracle.counts(512, 0.05, 0.1, "floor") == (25, 51)
    assert sparline.reference.count_blocks(0.03, 1182, "floor") == 35


def test_ragged_blocks_pool_their_own_rows(backend: str) -> None:
    """The last block averages the rows that it has; padding would change the order."""
    q = torch.ones(1, 1, 5, 4)
    k = torch.zeros(1, 1, 17, 4)
    k[:, :, :16] = 1.0
    k[:, :, 16] = 2.0  # one row: its mean is 2, not 2/16
    method = SLA(keep_ratio=0.5, block_q=16, block_k=16, smooth_k="none")
    assert sparline.route(q, k, method=method, backend=backend)[0, 0, 0].tolist() == [0, 1]


def test_smoothing_does_not_change_the_order(backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-3, 4, (1, 2, 64, 8), generator=generator).float()
    k = torch.randint(-3, 4, (1, 2, 128, 8), generator=generator).float()
    options = {"keep_ratio": 0.3, "block_q": 16, "block_k": 16}
    maps = [
        sparline.route(q, k, method=SLA(smooth_k=mode, **options), backend=backend)
        for mode in ("router", "none", "all")
    ]
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_smoothing_saves_low_precision(backend: str) -> None:
    """A large common offset of the keys drowns the differences unless it is taken away first."""
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, 1, 256, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    shifted = (k + 1000.0).float()
    exact = (shifted.double() - 1000.0).float()
    method = SLA(keep_ratio=0.25, block_q=16, block_k=16)
    on_shifted = sparline.route(q.float(), shifted, method=method, backend=backend)
    expected = sparline.route(q.float(), exact, method=method, backend=backend)
    assert (on_shifted == expected).float().mean() > 0.99


def test_packed_sequences(backend: str) -> None:
    """Counts per sequence; blocks stop at borders; other sequences are -1."""
    q, k = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 90, 8)
    method = SLA(keep_ratio=0.5, negligible_ratio=0.25, block_q=16, block_k=16)
    block_map = sparline.route(
        q, k, method=method, cu_seqlens_q=[0, 20, 70], cu_seqlens_k=[0, 65, 90], backend=backend
    )
    assert block_map.shape == (1, 1, 2 + 4, 5 + 2)
    first, second = block_map[0, 0, :2], block_map[0, 0, 2:]
    assert (first[:, 5:] == -1).all()
    assert (second[:, :5] == -1).all()
    assert ((first[:, :5] == 1).sum(-1) == 2).all()
    assert ((first[:, :5] == -1).sum(-1) == 1).all()
    assert ((second[:, 5:] == 1).sum(-1) == 1).all()
    alone = sparline.route(q[:, :, 20:], k[:, :, 65:], method=method, backend=backend)
    assert torch.equal(second[:, 5:], alone[0, 0])


def test_protected_spans(backend: str) -> None:
    """Protected keys come on top of n_h, and T_n counts the others only."""
    q, k = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 20 + 160, 8)
    method = SLA(keep_ratio=0.2, negligible_ratio=0.1, block_q=16, block_k=16)
    block_map = sparline.route(
        q, k, method=method, protected_q=[(0, 10)], protected_k=[(0, 20)], backend=backend
    )[0, 0]
    assert block_map.shape == (1 + 4, 2 + 10)
    assert (block_map[0] == 1).all()  # a protected query attends everything
    assert (block_map[:, :2] == 1).all()
    assert ((block_map[1:, 2:] == 1).sum(-1) == 2).all()
    assert ((block_map[1:, 2:] == -1).sum(-1) == 1).all()


def test_everything_protected(backend: str) -> None:
    q, k = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 40, 8)
    block_map = sparline.route(q, k, method=SLA(), protected_k=[(0, 40)], backend=backend)
    assert (block_map == 1).all()


def test_a_sequence_without_keys(backend: str) -> None:
    """Its queries have nothing to attend: zeros, lse minus infinity, zero gradients."""
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for n in (30, 20, 20))
    method = SLA(keep_ratio=0.5, combine="sum", block_q=16, block_k=16)
    o, lse = sparline.attention(
        q,
        k,
        v,
        method=method,
        cu_seqlens_q=[0, 10, 30],
        cu_seqlens_k=[0, 0, 20],
        return_lse=True,
        backend=backend,
    )
    assert (o[:, :, :10] == 0).all()
    assert (lse[:, :, :10] == -torch.inf).all()
    o.sum().backward()
    assert (q.grad[:, :, :10] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_grouped_heads_share_keys(backend: str) -> None:
    q, k = torch.randn(1, 6, 64, 8), torch.randn(1, 2, 64, 8)
    method = SLA(keep_ratio=0.5, block_q=16, block_k=16)
    grouped = sparline.route(q, k, method=method, backend=backend)
    repeated = sparline.route(q, k.repeat_interleave(3, 1), method=method, backend=backend)
    assert torch.equal(grouped, repeated)


# Other selections -------------------------------------------------------------------------------

# Shares of exp(score) over ln 8, 4, 2, 1, 1: 1/2, 1/4, 1/8, 1/16, 1/16.
HALVES = [math.log(2.0), math.log(8.0), 0.0, math.log(4.0), 0.0]


@pytest.mark.parametrize(
    ("mass", "longest", "expected"),
    [
        (0.49, False, [0, 1, 0, 0, 0]),
        (0.6, False, [0, 1, 0, 1, 0]),
        (0.8, False, [1, 1, 0, 1, 0]),
        (0.9, False, [1, 1, 1, 1, 0]),  # the tie goes to the lower index
        (1.0, False, [1, 1, 1, 1, 1]),
        (0.0, False, [0, 1, 0, 0, 0]),
        (0.49, True, [0, 1, 0, 0, 0]),  # at least one
        (0.6, True, [0, 1, 0, 0, 0]),
        (0.8, True, [0, 1, 0, 1, 0]),
        (0.9, True, [1, 1, 0, 1, 0]),
        (1.0, True, [1, 1, 1, 1, 1]),
    ],
)
def test_top_p(mass: float, longest: bool, expected: list[int], backend: str) -> None:
    """The fewest blocks with the mass; or, as SpargeAttn's code, the most that stay below it."""
    options = {"keep_mass": mass, "longest_prefix": longest, "negligible_ratio": 0.0}
    assert classes(HALVES, backend, selection="top_p", **options) == expected


@pytest.mark.parametrize(
    ("selection", "ratio", "mass", "count"),
    [
        ("union", 0.2, 0.8, 3),
        ("union", 0.8, 0.6, 4),
        ("intersection", 0.2, 0.8, 1),
        ("intersection", 0.8, 0.6, 2),
        ("intersection", 0.0, 0.0, 1),
    ],
)
def test_top_k_and_top_p(
    selection: str, ratio: float, mass: float, count: int, backend: str
) -> None:
    got = classes(
        HALVES,
        backend,
        selection=selection,
        keep_ratio=ratio,
        keep_mass=mass,
        negligible_ratio=0.4,
    )
    assert [got[j] for j in (1, 3, 0, 2, 4)][:count] == [1] * count
    assert got.count(1) == count
    assert got.count(-1) == min(2, 5 - count)


def test_mass_counts_scores_with_scale(backend: str) -> None:
    """At half the scale the best block has too little mass."""
    q, k = rows_of_scores([2 * x for x in HALVES])
    method = SLA.top_p(keep_mass=0.49, block_q=16, block_k=16, smooth_k="none")
    for scale, count in ((0.5, 1), (0.25, 2)):
        block_map = sparline.route(q, k, method=method, scale=scale, backend=backend)
        assert (block_map == 1).sum() == count


def test_unlike_blocks_are_computed(backend: str) -> None:
    """Rows +x and -x have the mean cosine 0: such keys are critical for all queries and not
    ranked, and such queries attend everything."""
    q, k = rows_of_scores([1.0, 0.0, 3.0, 2.0, 4.0])
    k[..., 1] = 1.0  # rows of one block point one way, zero scores included
    q = q.repeat(1, 1, 2, 1)
    k[:, :, 16:32:2] = -k[:, :, 17:32:2]  # block 1
    q[:, :, 16::2] = -q[:, :, 17::2]
    options = {"keep_ratio": 0.4, "negligible_ratio": 0.4, "min_similarity": 0.5}
    method = SLA(smooth_k="none", block_q=16, block_k=16, **options)
    block_map = sparline.route(q, k, method=method, scale=1.0, backend=backend)
    assert block_map[0, 0].tolist() == [[-1, 1, 1, -1, 1], [1] * 5]
    method = SLA(smooth_k="none", block_q=16, block_k=16, **{**options, "min_similarity": None})
    block_map = sparline.route(q, k, method=method, scale=1.0, backend=backend)
    assert (block_map == 1).sum(dim=-1).tolist() == [[[2, 2]]]


def test_learned_router(backend: str) -> None:
    """Matrices that negate the scores turn the order around; one pair for each head, or for all."""
    q, k = rows_of_scores([3.0, 9.0, 1.0, 7.0, 5.0])
    q, k = q.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1)
    method = SLA2(keep_ratio=0.4, block_q=16, block_k=16)
    eye = torch.eye(4)
    per_head = Weights(router_q=torch.stack([eye, -eye]), router_k=torch.stack([eye, eye]))
    block_map = sparline.route(q, k, method=method, weights=per_head, scale=1.0, backend=backend)
    assert block_map[0, :, 0].tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]
    shared = Weights(router_q=eye, router_k=-eye)
    block_map = sparline.route(q, k, method=method, weights=shared, scale=1.0, backend=backend)
    assert block_map[0, :, 0].tolist() == [[1, 0, 1, 0, 0]] * 2


def test_routing_needs_no_other_weights(backend: str) -> None:
    """Feature maps, projections and alpha act later."""
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    for cls in (SLA, SLA2):
        maps = [
            sparline.route(q, k, method=cls(keep_ratio=0.5, feature_map=name), backend=backend)
            for name in ("softmax", "hedgehog")
        ]
        assert torch.equal(*maps)


@pytest.mark.parametrize(("options", "count"), [({"keep_ratio": 0.3}, 3), ({"num_cubes": 4}, 4)])
def test_vsa_picks_cubes(options: dict[str, float], count: int, backend: str) -> None:
    """Every cube is a block, on both axes; the ratio of them is rounded up."""
    q, k = torch.randn(1, 2, 9 * 16, 8), torch.randn(1, 2, 9 * 16, 8)
    method = VSA(cube=(2, 2, 4), **options)
    block_map = sparline.route(q, k, method=method, grid=Grid(2, 6, 12), backend=backend)
    assert block_map.shape == (1, 2, 9, 9)
    assert ((block_map == 1).sum(dim=-1) == count).all()
    # 5 x 3 x 7 tokens are 3 x 2 x 2 cubes, most of them cut off, and a block of text on each side.
    q = k = torch.randn(1, 1, 105 + 14, 8)
    packed = sparline.route(q, k, method=method, grid=Grid(5, 3, 7, 5, 9), backend=backend)
    assert packed.shape == (1, 1, 14, 14)


def test_vsa_counts_cubes_of_each_sequence(backend: str) -> None:
    q = k = torch.randn(1, 1, 48 + 160, 8)
    block_map = sparline.route(
        q,
        k,
        method=VSA(num_cubes=2, cube=(1, 4, 4)),
        grid=[Grid(3, 4, 4), Grid(10, 4, 4)],
        cu_seqlens_q=[0, 48, 208],
        backend=backend,
    )
    assert ((block_map == 1).sum(dim=-1) == 2).all()


def test_vmoba_by_hand(backend: str) -> None:
    """Four chunks of one frame. Queries look for chunk 2; each also attends its own, and the map
    shows a block where any row of it does."""
    k = torch.zeros(1, 1, 4 * 16, 4)
    for chunk in range(4):
        k[:, :, 16 * chunk : 16 * (chunk + 1), chunk] = 1.0
    q = torch.zeros(1, 1, 4 * 16, 4)
    q[..., 2] = 1.0
    q[:, :, 5, 2], q[:, :, 5, 3] = 0.0, 1.0  # but one looks for chunk 3
    method = VMoBA(partition="1d", frames_1d=1, block_q=16, block_k=16)
    call = {"method": method, "grid": Grid(4, 4, 4), "backend": backend}
    block_map = sparline.route(q, k, **call)
    # Chunk 2's own queries would be left alone and take their best other one, the first of a tie.
    expected = [[1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    assert block_map[0, 0].tolist() == expected
    v = torch.arange(64.0).reshape(1, 1, 64, 1).repeat(1, 1, 1, 4)
    o = sparline.attention(q, k, v, scale=1e-6, **call)[0, 0, :, 0]  # flat: means of what is seen
    centre = [7.5, 23.5, 39.5, 55.5]
    assert o[4].item() == pytest.approx((centre[0] + centre[2]) / 2, abs=1e-3)
    assert o[5].item() == pytest.approx((centre[0] + centre[3]) / 2, abs=1e-3)
    assert o[40].item() == pytest.approx((centre[0] + centre[2]) / 2, abs=1e-3)


def test_vmoba_ranks_equal_gates_by_index(backend: str) -> None:
    q = k = torch.zeros(1, 1, 64, 4)
    for number, expected in ((1, 1), (2, 2), (3, 3)):
        method = VMoBA(partition="1d", frames_1d=1, num_chunks=number, block_q=16, block_k=16)
        block_map = sparline.route(q, k, method=method, grid=Grid(4, 4, 4), backend=backend)
        assert block_map[0, 0, 0].tolist() == [1] * expected + [0] * (4 - expected)
    method = VMoBA(partition="1d", frames_1d=1, threshold=0.4, block_q=16, block_k=16)
    block_map = sparline.route(q, k, method=method, grid=Grid(4, 4, 4), backend=backend)
    assert block_map[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_vmoba_modes_share_a_budget(backend: str) -> None:
    """Ranked over a head, a query with large gates takes chunks from one with small gates."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 64, 8, generator=generator) for _ in range(2))
    q[:, :, :16] *= 30
    shared = {"partition": "1d", "frames_1d": 1, "block_q": 16, "block_k": 16, "threshold": 0.6}
    counts = []
    for mode in ("query_head", "head_global"):
        method = VMoBA(mode=mode, pool_queries=True, **shared)
        block_map = sparline.route(q, k, method=method, grid=Grid(4, 4, 4), backend=backend)
        assert (block_map.diagonal(dim1=2, dim2=3) == 1).all()
        counts.append((block_map == 1).sum(dim=-1).flatten().tolist())
    assert counts[0] != counts[1]
