# SPDX-License-Identifier: Apache-2.0
"""The reference on cases small enough to do by hand: selections, skipped tiles, roundings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparline import reference
from sparline.methods import BlockRouter, LowBit, Recipe, Skip
from sparline.reference import Segment

LN2 = math.log(2.0)


def make_qk(scores: list[float], rows: int = 2) -> tuple[Tensor, Tensor]:
    """One query block whose unscaled score for key block j is scores[j]."""
    q, k = torch.zeros(1, 1, rows, 2), torch.zeros(1, 1, rows * len(scores), 2)
    q[..., 0] = 1
    k[..., 0] = torch.tensor(scores).repeat_interleave(rows)
    return q, k


def route(scores: list[float], scale: float = 1.0, **options: Any) -> list[int]:
    router = BlockRouter(**{"smooth_k": False, **options})
    classes = reference.route(*make_qk(scores), router, 2, 2, scale=scale)
    result: list[int] = classes[0, 0, 0].tolist()
    return result


# Shares of the softmax: 1/4, 1/2, 1/16, 1/8, 1/16.
SHARES = [math.log(x) for x in (4.0, 8.0, 1.0, 2.0, 1.0)]


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        (0.0, [0, 1, 0, 0, 0]),
        (0.49, [0, 1, 0, 0, 0]),
        (0.51, [1, 1, 0, 0, 0]),
        (0.74, [1, 1, 0, 0, 0]),
        (0.9, [1, 1, 1, 1, 0]),  # of the two equal ones the first
        (0.99, [1, 1, 1, 1, 1]),
        (1.0, [1, 1, 1, 1, 1]),
    ],
)
def test_top_p_keeps_the_shortest_prefix(mass: float, expected: list[int]) -> None:
    assert route(SHARES, selection="top_p", keep_mass=mass) == expected


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        (0.0, [0, 1, 0, 0, 0]),  # never none
        (0.74, [0, 1, 0, 0, 0]),
        (0.76, [1, 1, 0, 0, 0]),
        (0.9, [1, 1, 0, 1, 0]),
        (0.95, [1, 1, 1, 1, 0]),
        (1.0, [1, 1, 1, 1, 1]),
    ],
)
def test_the_longest_prefix_stays_below_the_mass(mass: float, expected: list[int]) -> None:
    found = route(SHARES, selection="top_p", keep_mass=mass, longest_prefix=True)
    assert found == expected


def test_top_p_measures_scaled_scores() -> None:
    """At half the scale the shares are 2 : 2.83 : 1 : 1.41 : 1 of 8.24."""
    options = {"selection": "top_p", "keep_mass": 0.7}
    assert route(SHARES, **options) == [1, 1, 0, 0, 0]
    assert route(SHARES, scale=0.5, **options) == [1, 1, 0, 1, 0]


def test_top_p_of_one_keeps_shares_that_round_to_zero() -> None:
    assert route([0.0, -400.0, 5.0], selection="top_p", keep_mass=1.0) == [1, 1, 1]


def test_union_and_intersection_are_the_longer_and_the_shorter_prefix() -> None:
    few, many = {"keep_ratio": 0.2}, {"keep_ratio": 0.6}  # 1 and 3 of 5; a mass of 0.7 takes 2
    two, three = [1, 1, 0, 0, 0], [1, 1, 0, 1, 0]
    one = [0, 1, 0, 0, 0]
    assert route(SHARES, selection="union", keep_mass=0.7, **few) == two
    assert route(SHARES, selection="union", keep_mass=0.7, **many) == three
    assert route(SHARES, selection="intersection", keep_mass=0.7, **few) == one
    assert route(SHARES, selection="intersection", keep_mass=0.7, **many) == two
    assert route(SHARES, selection="intersection", keep_mass=0.0, keep_ratio=0.0) == one


def test_keep_count_takes_the_place_of_the_ratio() -> None:
    assert route(SHARES, keep_ratio=1.0, keep_count=2) == [1, 1, 0, 0, 0]
    assert route(SHARES, keep_ratio=0.0, keep_count=9) == [1, 1, 1, 1, 1]


def test_negligible_blocks_are_what_a_selection_leaves() -> None:
    """The last of the order, after as many critical ones as the selection takes."""
    assert route(SHARES, selection="top_p", keep_mass=0.7, negligible_ratio=0.4) == [
        1,
        1,
        -1,
        0,
        -1,
    ]
    assert route(SHARES, selection="top_p", keep_mass=0.9, negligible_ratio=0.4) == [1, 1, 1, 1, -1]


def test_scores_that_are_not_finite_weigh_nothing() -> None:
    nan, inf = math.nan, math.inf
    options = {"selection": "top_p", "keep_mass": 0.9}
    assert route([1.0, nan, 1.0], **options) == [1, 0, 1]
    assert route([nan, nan], **options) == [1, 0]  # still at least one
    q, k = make_qk([1.0, 2.0, 3.0])
    k[:, :, :2] = -inf
    q[..., 1], k[..., 1] = 0.0, 0.0
    router = BlockRouter(selection="top_p", keep_mass=0.9, smooth_k=False)
    assert reference.route(q[..., :1], k[..., :1], router, 2, 2)[0, 0, 0].tolist() == [0, 1, 1]


def test_unlike_key_blocks_are_critical_without_being_ranked() -> None:
    q, k = make_qk([5.0, 4.0, 3.0, 2.0])
    k[0, 0, 0] = torch.tensor([0.0, 5.0])  # block 0: cosines 1, 0, 0, 1
    k[0, 0, 1] = torch.tensor([50.0, 0.0])
    router = BlockRouter(keep_ratio=0.25, negligible_ratio=0.25, smooth_k=False, min_similarity=0.6)
    assert reference.route(q, k, router, 2, 2)[0, 0, 0].tolist() == [1, 1, 0, -1]
    # T counts block 0 all the same: 3/4 of 4 are 3, and all three that are ranked.
    router = BlockRouter(keep_ratio=0.75, smooth_k=False, min_similarity=0.6)
    assert reference.route(q, k, router, 2, 2)[0, 0, 0].tolist() == [1, 1, 1, 1]
    # A mean cosine of exactly the threshold is like enough.
    router = BlockRouter(keep_ratio=0.25, smooth_k=False, min_similarity=0.5)
    assert reference.route(q, k, router, 2, 2)[0, 0, 0].tolist() == [1, 0, 0, 0]


def test_unlike_query_blocks_attend_everything() -> None:
    q, k = make_qk([5.0, 4.0, 3.0, 2.0])
    q = torch.cat([q, q], dim=2)
    q[0, 0, 3] *= -1
    router = BlockRouter(keep_ratio=0.25, smooth_k=False, min_similarity=0.6)
    classes = reference.route(q, k, router, 2, 2)
    assert classes[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


def test_router_matrices_turn_the_order() -> None:
    q, k = make_qk([1.0, 2.0, 3.0])
    router = BlockRouter(keep_count=1, smooth_k=False)
    eye = torch.eye(2)
    plain = reference.route(q, k, router, 2, 2, proj_q=eye, proj_k=eye)
    assert plain[0, 0, 0].tolist() == [0, 0, 1]
    per_head = torch.stack([eye, -eye])
    q = q.expand(1, 2, -1, -1)  # two query heads over one key head
    turned = reference.route(q, k, router, 2, 2, proj_q=eye.expand(2, 2, 2), proj_k=per_head)
    assert turned[0, :, 0].tolist() == [[0, 0, 1], [1, 0, 0]]


def test_scores_are_ranked_before_they_are_scaled() -> None:
    """Scores that only differ before a tiny scale flushes them to zero do not tie."""
    assert route([1.0, 2.0], scale=1e-45, keep_count=1) == [0, 1]


def test_orders_say_which_rows_form_a_block() -> None:
    x = torch.arange(6.0).reshape(1, 1, 6, 1)
    order = torch.tensor([5, 0, 4, 1, 3, 2], dtype=torch.int32)
    segments = [Segment(0, 3), Segment(3, 3, 1), Segment(3, 6, 2)]
    assert reference.pool(x, segments, 2, order).flatten().tolist() == [2.5, 4.0, 2.0, 2.0]
    assert reference.pool(x.to(torch.bfloat16), (), 4).dtype == torch.float32


# In-loop skipping -------------------------------------------------------------------------------


def skip(tiles: list[list[float]], rule: Skip, **options: Any) -> tuple[Any, ...]:
    """tiles[r][j]: every score of row r with tile j (2 keys); scores are natural logarithms."""
    scores = torch.tensor(tiles, dtype=torch.float64)
    num_rows, num_tiles = scores.shape
    q = torch.eye(num_rows, dtype=torch.float64)[None, None]  # row r picks component r of a key
    k = scores.mT.repeat_interleave(2, dim=0)[None, None]
    recipe = Recipe(num_rows, 2, skip=rule)
    _, lse, kept, votes = reference.attend(q, k, k, recipe, scale=1.0, **options)
    bits = [[int(byte) >> j & 1 for j in range(num_tiles)] for byte in kept.flatten()]
    return bits, votes.flatten().tolist(), lse.exp().flatten().tolist()


def test_skipping_against_the_running_maximum() -> None:
    row = [0.0, -1.0, 2.0, 0.5, 1.5]
    bits, votes, sums = skip([row], Skip("running_max", -0.9))
    assert bits == [[1, 0, 1, 0, 1]]  # -1 < 0 - 0.9; 0.5 < 2 - 0.9; but 1.5 is not
    assert votes == [2.0]
    assert sums == pytest.approx([2 * (1 + math.exp(2) + math.exp(1.5))])


def test_skipping_against_the_kept_energy() -> None:
    """Each tile holds two keys e^0; the sum before tile j is 2j, and 1 / 2j < 1/5 from j = 3 on,
    where the energy stays as it is."""
    rule = Skip("kept_lse", -math.log(5.0))
    bits, votes, sums = skip([[0.0] * 6], rule)
    assert bits == [[1, 1, 1, 0, 0, 0]]
    assert votes == [3.0]
    assert sums == pytest.approx([6.0])
    assert skip([[0.0] * 6], Skip("running_max", -math.log(5.0)))[0] == [[1] * 6]
    assert skip([[0.0] * 6], Skip("kept_lse", -math.inf))[0] == [[1] * 6]


def test_a_group_skips_what_all_its_rows_vote_against() -> None:
    tiles = [[0.0, -9.0, -9.0], [0.0, 0.0, -9.0], [0.0, -9.0, -9.0]]
    bits, votes, sums = skip(tiles, Skip("running_max", -1.0))
    assert bits == [[1, 1, 0]]
    assert votes == [5.0]
    assert sums == pytest.approx([2 + 2 * math.exp(-9), 4, 2 + 2 * math.exp(-9)])
    bits, votes, _ = skip(tiles, Skip("running_max", -1.0, rows=2))  # rows 0, 1 and row 2
    assert bits == [[1, 1, 0], [1, 0, 0]]
    assert votes == [5.0]


def test_the_order_of_the_tiles_decides() -> None:
    row = [0.0, 1.0, 2.0, 3.0]
    assert skip([row], Skip("running_max", -0.5))[0] == [[1, 1, 1, 1]]
    reverse = torch.tensor([[3, 2, 1, 0]])
    assert skip([row], Skip("running_max", -0.5), tile_order=reverse)[0] == [[0, 0, 0, 1]]


def test_protected_keys_are_never_skipped_and_not_asked() -> None:
    segments = [Segment(0, 4), Segment(4, 6, 0, True), Segment(6, 8)]
    row = [5.0, 0.0, 0.0, 0.0]
    bits, votes, _ = skip([row], Skip("running_max", -1.0), key_segments=segments)
    assert bits == [[1, 0, 1, 0]]
    assert votes == [2.0]


def test_bits_of_many_tiles_fill_bytes_from_the_lowest_bit() -> None:
    row = [0.0] + [-9.0] * 9 + [0.0]
    q, k = torch.ones(1, 1, 1, 1), torch.tensor(row)[None, None, :, None]
    recipe = Recipe(1, 1, skip=Skip("running_max", -1.0))
    _, _, kept, _ = reference.attend(q, k, k, recipe)
    assert kept is not None
    assert kept.flatten().tolist() == [0b00000001, 0b00000100]


# Low bit ----------------------------------------------------------------------------------------


def e4m3(code: int) -> float:
    """What one of the 127 non-negative codes stands for."""
    exponent, mantissa = divmod(code, 8)
    return mantissa / 512 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e4m3_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    codes = torch.tensor([e4m3(code) for code in range(127)], dtype=dtype)
    assert codes[-1] == 448
    middles = (codes[:-1] + codes[1:]) / 2
    even = codes[:-1].where(torch.arange(126) % 2 == 0, codes[1:])
    tiny = torch.finfo(dtype).eps
    for sign in (1, -1):
        assert torch.equal(reference.round_e4m3(sign * codes), sign * codes)
        assert torch.equal(reference.round_e4m3(sign * middles), sign * even)
        assert torch.equal(reference.round_e4m3(sign * middles * (1 + tiny)), sign * codes[1:])
        assert torch.equal(reference.round_e4m3(sign * middles * (1 - tiny)), sign * codes[:-1])


def test_e4m3_saturates() -> None:
    x = torch.tensor([448.0, 463.9, 464.0, 1e9, math.inf, -480.0, -math.inf])
    assert reference.round_e4m3(x).tolist() == [448.0] * 5 + [-448.0] * 2
    assert reference.round_e4m3(torch.tensor([2.0**-11, -(2.0**-10)])).tolist() == [0.0, 0.0]


def test_e4m3_agrees_with_torch() -> None:
    x = torch.cat([torch.randn(10_000) * scale for scale in (1e-3, 0.1, 1.0, 100.0)])
    cast = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(reference.round_e4m3(x), cast)


def test_int8_rounds_to_nearest_even_in_blocks() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, -2.5, 0.0, 0.0, -254.0, 1.0, 3.0, 5.0])[None, None, :, None]
    blocks = reference.make_blocks([Segment(0, 4), Segment(4, 6), Segment(6, 10)], 10, 4)
    rounded, delta = reference.round_int8(x, blocks)
    assert rounded.flatten().tolist() == [127, 0, 2, -2, 0, 0, -127, 0, 2, 2]
    assert delta.flatten().tolist() == [1.0] * 6 + [2.0] * 4


def test_values_have_one_scale_for_each_channel_of_a_sequence() -> None:
    segments = [Segment(0, 2), Segment(2, 3, 1), Segment(3, 4, 1, True)]
    v = torch.tensor([[448.0, 1.0], [17.0, 0.0], [448.0 * 4, 0.0], [17.0 * 4, 0.0]])[None, None]
    q = torch.zeros(1, 1, 2, 2)
    o, lse, _, _ = reference.attend(
        q,
        torch.zeros_like(v),
        v,
        Recipe(2, 1, low_bit=LowBit()),
        query_segments=[Segment(0, 1), Segment(1, 2, 1)],
        key_segments=segments,
    )
    # 17 = 16 + 1 is a tie between 16 and 18, and 4 x 17 in a sequence whose scale is 4 likewise.
    assert o[0, 0].tolist() == [[(448 + 16) / 2, 0.5], [(448 + 16) / 2 * 4, 0.0]]
    assert lse[0, 0].tolist() == pytest.approx([LN2, LN2])


def test_probabilities_are_rounded_as_they_stand_when_visited() -> None:
    """Two keys with scores 0 and ln 3. Ascending, the first is rounded at e^0; in reverse, at 1/3.
    The sum that divides them is not rounded."""
    q = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    k = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)[None, None]
    v = torch.tensor([[448.0, 0.0], [0.0, 448.0]], dtype=torch.float64)[None, None]
    recipe = Recipe(1, 1, low_bit=LowBit())
    options = {"scale": math.log(3.0) / 2}
    o, lse, _, _ = reference.attend(q, k, v, recipe, **options)
    assert o.flatten().tolist() == pytest.approx([448 / 4, 448 * 3 / 4], abs=1e-9)
    reverse = torch.tensor([[1, 0]])
    o, _, _, _ = reference.attend(q, k, v, recipe, tile_order=reverse, **options)
    third = 144.0  # of 448 / 3 = 149.3, between 144 and 160
    assert o.flatten().tolist() == pytest.approx([third * 3 / 4, 448 * 3 / 4], abs=1e-9)
    assert lse.item() == pytest.approx(math.log(4.0))
