# SPDX-License-Identifier: Apache-2.0
"""The operators as PyTorch sees them: schemas, fakes, autograd, autocast, vmap.

Whether the numbers are right is tested elsewhere; here it is that every argument arrives and every
output is what the fakes promise.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import sparline  # noqa: F401  (loads the operators)

BLOCKS = "block_q=32 block_k=16 scale=0 epsilon=0"
SPARSE = f"{BLOCKS} combine=sparse"
ROUTE_SPEC = (
    "block_q=32 block_k=16 scale=0 critical_ratio=0.4 critical_count=0 negligible_ratio=0.1 "
    "count_rounding=floor smooth_router=1 selection=union critical_mass=0.5 longest_prefix=0 "
    "min_similarity=0.1"
)
NUM_QUERIES, NUM_KEYS = 40, 50
EMPTY = torch.empty(0)
SEGMENTS = ([0, 5, 0, 1, 5, 17, 0, 0, 17, 40, 1, 0], [0, 5, 0, 1, 5, 30, 0, 0, 30, 50, 1, 0])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv() -> list[Tensor]:
    shapes = ((1, 2, NUM_QUERIES, 8), (1, 1, NUM_KEYS, 8), (1, 1, NUM_KEYS, 8))
    return [random(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def order(length: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(3)).int()


def num_blocks(segments: list[int], length: int, block_rows: int) -> int:
    pairs = zip(segments[0::4], segments[1::4], strict=True) if segments else [(0, length)]
    return sum(-(-(end - begin) // block_rows) for begin, end in pairs)


def arguments(feature: str, packed: bool = False) -> tuple[Any, ...]:
    """All arguments of ``attend`` for one part of its surface."""
    query_segments, key_segments = SEGMENTS if packed else ([], [])
    rows = num_blocks(query_segments, NUM_QUERIES, 32)
    columns = num_blocks(key_segments, NUM_KEYS, 16)
    block_map: Tensor | None = None
    tile_bits = query_order = key_order = tile_order = k_mean = None
    weights: list[Tensor] = []
    spec = SPARSE
    if feature == "projection":
        block_map = (random(1, 2, rows, columns).sign()).to(torch.int8)
        shapes = ((8, 8), (8,), (2, 8, 8), (2, 8), (1, 8, 8), (1, 8))
        weights = [(0.3 * random(*s, seed=9)).requires_grad_() for s in shapes] + [EMPTY]
        spec = f"{BLOCKS} combine=projection feature_map=hedgehog linear_scope=complement"
    elif feature == "soft":
        block_map = random(1, 2, rows, columns).sigmoid().requires_grad_()
        weights = [EMPTY] * 6 + [random(1, 2, NUM_QUERIES).requires_grad_()]
        spec = f"{BLOCKS} combine=blend feature_map=softmax linear_scope=complement smooth_k=1"
    elif feature == "bits":
        shape = (1, 2, 2 * rows, -(-columns // 8))
        tile_bits = torch.randint(256, shape, dtype=torch.uint8)
        query_order, key_order = order(NUM_QUERIES), order(NUM_KEYS)
        spec = f"{SPARSE} bit_rows=16"
    elif feature == "skip":
        tile_order = torch.arange(columns - 1, -1, -1).int().expand(1, 1, rows, columns)
        tile_order = tile_order.contiguous()
        spec = f"{SPARSE} skip=kept_lse skip_threshold=-1.0 skip_rows=16"
    elif feature == "smooth":
        block_map = (random(1, 2, rows, columns).sign()).to(torch.int8)
        k_mean = random(1, 1, 2 if packed else 1, 8, seed=5)
        spec = f"{BLOCKS} combine=sum feature_map=elu1 linear_scope=complement smooth_k=1"
    elif feature == "low_bit":
        k_mean = random(1, 1, 2 if packed else 1, 8, seed=5)
        spec = (
            f"{SPARSE} smooth_k=1 low_bit=1 low_bit_q_rows=16 p_range=448.0 v_range=2.25 "
            "recompute_lse=1"
        )
    else:
        assert feature == "dense"
    return (
        *qkv(),
        block_map,
        tile_bits,
        query_order,
        key_order,
        tile_order,
        k_mean,
        weights,
        query_segments,
        key_segments,
        spec,
    )


FEATURES = ["dense", "projection", "soft", "bits", "skip", "smooth", "low_bit"]


def detached(x: Any) -> Any:
    if isinstance(x, list):
        return [detached(item) for item in x]
    return x.detach() if isinstance(x, Tensor) else x


def backward_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with which autograd calls ``attend_backward``."""
    with torch.no_grad():
        o, lse, kept_bits, _ = torch.ops.sparline.attend(*args)
    q, k, v, block_map, tile_bits, query_order, key_order, _, *rest = detached(list(args))
    bits = kept_bits if "skip=" in rest[-1] else tile_bits
    d_o = torch.ones_like(o)
    return (d_o, q, k, v, o, lse, block_map, bits, query_order, key_order, *rest)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_attend(feature: str, packed: bool) -> None:
    """Schema, autograd registration, fakes, and AOT dispatch with dynamic shapes."""
    args = arguments(feature, packed)
    torch.library.opcheck(torch.ops.sparline.attend, args)
    torch.library.opcheck(
        torch.ops.sparline.attend_backward,
        backward_arguments(args),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("spec", [ROUTE_SPEC, f"{ROUTE_SPEC} k_mean=1"])
def test_route(packed: bool, projected: bool, spec: str) -> None:
    q, k, _ = (x.detach() for x in qkv())
    projections = (random(2, 8, 8), random(8, 8)) if projected else (None, None)
    orders = (order(NUM_QUERIES), order(NUM_KEYS))
    segments = SEGMENTS if packed else ([], [])
    args = (q, k, *projections, *orders, *segments, spec)
    torch.library.opcheck(torch.ops.sparline.route, args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = (mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args)
        fakes = torch.ops.sparline.route(*fake_args)
    for real, fake in zip(torch.ops.sparline.route(*args), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_route_gives_the_mean_keys_if_asked() -> None:
    """Of every sequence that either axis names, over all of its keys."""
    q, k, _ = (x.detach() for x in qkv())
    segments = [0, 5, 0, 0, 5, 40, 2, 0], [0, 7, 0, 1, 7, 30, 0, 0, 30, 50, 3, 0]
    plain = torch.ops.sparline.route(q, k, *[None] * 4, *segments, ROUTE_SPEC)
    asked = torch.ops.sparline.route(q, k, *[None] * 4, *segments, f"{ROUTE_SPEC} k_mean=1")
    assert torch.equal(plain[0], asked[0])
    assert (plain[1].shape, plain[1].dtype) == ((0,), torch.float32)
    rows = [k[:, :, :30].mean(dim=2), torch.zeros(1, 1, 8), k[:, :, 30:].mean(dim=2)]
    torch.testing.assert_close(asked[1], torch.stack(rows, dim=2))
    spec = ROUTE_SPEC.replace("smooth_router=1", "smooth_router=0")
    with pytest.raises(RuntimeError, match="route: k_mean must be absent unless smooth_k is on"):
        torch.ops.sparline.route(q, k, *[None] * 4, [], [], f"{spec} k_mean=1")


SMOOTH = ["smooth", "low_bit"]


def with_k_mean(args: tuple[Any, ...], k_mean: Tensor | None) -> tuple[Any, ...]:
    """Arguments of ``attend`` or of its backward with other mean keys."""
    return *args[:-5], k_mean, *args[-4:]


@pytest.mark.parametrize("feature", SMOOTH)
@pytest.mark.parametrize("packed", [False, True])
def test_mean_keys_of_the_router_give_the_same_bits(feature: str, packed: bool) -> None:
    args = arguments(feature, packed)
    _, k_mean = torch.ops.sparline.route(
        *(x.detach() for x in args[:2]), *[None] * 4, *args[-3:-1], f"{ROUTE_SPEC} k_mean=1"
    )
    given, found = with_k_mean(args, k_mean), with_k_mean(args, None)
    for a, b in zip(
        torch.ops.sparline.attend(*given), torch.ops.sparline.attend(*found), strict=True
    ):
        assert torch.equal(a, b)
    *given_gradients, _ = torch.ops.sparline.attend_backward(*backward_arguments(given))
    *found_gradients, _ = torch.ops.sparline.attend_backward(*backward_arguments(found))
    for a, b in zip(given_gradients, found_gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("feature", SMOOTH)
def test_mean_keys_that_are_given_are_those_that_are_used(feature: str) -> None:
    """Zeros leave keys as they are; k_mean has no gradient, d_k goes through the mean of k."""
    args = with_k_mean(arguments(feature), torch.zeros(1, 1, 1, 8).requires_grad_())
    unsmoothed = (*with_k_mean(args, None)[:-1], args[-1].replace("smooth_k=1", "smooth_k=0"))
    o, lse, *_ = torch.ops.sparline.attend(*args)
    expected, expected_lse, *_ = torch.ops.sparline.attend(*unsmoothed)
    assert torch.equal(o, expected)
    assert torch.equal(lse, expected_lse)
    assert not torch.equal(lse, torch.ops.sparline.attend(*with_k_mean(args, None))[1])
    d_q, d_k, d_v, *_ = torch.ops.sparline.attend_backward(*backward_arguments(args))
    exact_q, exact_k, exact_v, *_ = torch.ops.sparline.attend_backward(
        *backward_arguments(unsmoothed)
    )
    torch.testing.assert_close(d_q, exact_q)
    torch.testing.assert_close(d_v, exact_v)
    if feature == "smooth":
        torch.testing.assert_close(d_k, exact_k - exact_k.mean(dim=2, keepdim=True))
    o.sum().backward()
    assert args[-5].grad is None


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize(
    ("k_mean", "message"),
    [
        (torch.zeros(1, 1, 2, 8), r"have shape \(1, 1, 1, 8\), got \(1, 1, 2, 8\)"),
        (torch.zeros(1, 2, 1, 8), r"have shape \(1, 1, 1, 8\), got \(1, 2, 1, 8\)"),
        (torch.zeros(1, 1, 1, 8, dtype=torch.float16), "have dtype float32, got float16"),
        (torch.zeros(1, 1, 1, 9)[..., 1:], "be aligned to 8 bytes, got an address 4 past"),
    ],
)
def test_mean_keys_are_checked(call: str, k_mean: Tensor, message: str) -> None:
    args = backward_arguments(arguments("smooth"))
    if call == "forward":
        args = detached(list(arguments("smooth")))
    op = {"forward": torch.ops.sparline.attend, "backward": torch.ops.sparline.attend_backward}
    with pytest.raises(RuntimeError, match=f"{call}: k_mean must {message}"):
        op[call](*with_k_mean(tuple(args), k_mean))
    plain = (*args[:-1], args[-1].replace("smooth_k=1", "smooth_k=0"))
    with pytest.raises(RuntimeError, match=f"{call}: k_mean must be absent unless smooth_k is on"):
        op[call](*plain)


def test_soft_top_k() -> None:
    scores = random(2, 3, 5, 21).requires_grad_()
    kappa = torch.full((2, 3, 5), 4.5)
    torch.library.opcheck(torch.ops.sparline.soft_top_k, (scores, kappa, 0.1))
    soft_map = torch.ops.sparline.soft_top_k(scores, kappa, 0.1)
    torch.testing.assert_close(soft_map.sum(dim=-1), kappa, rtol=2e-5, atol=0)
    soft_map.sum().backward()  # an expanded gradient; the sum cannot change
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-4
    torch.library.opcheck(
        torch.ops.sparline.soft_top_k_backward,
        (torch.ones(2, 3, 5, 21), soft_map.detach(), 0.1),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_the_backward_operator(feature: str) -> None:
    """Every differentiable argument gets its gradient, and nothing else does."""
    args = arguments(feature)
    d_q, d_k, d_v, d_block_map, d_weights = torch.ops.sparline.attend_backward(
        *backward_arguments(args)
    )
    o, *constants = torch.ops.sparline.attend(*args)
    assert not any(x.requires_grad for x in constants)
    o.sum().backward()
    q, k, v, block_map, *_, weights, _, _, _ = args
    for x, gradient in ((q, d_q), (k, d_k), (v, d_v)):
        assert torch.equal(x.grad, gradient)
    if feature == "soft":
        assert torch.equal(block_map.grad, d_block_map)
        assert block_map.grad.abs().sum() > 0
    else:
        assert d_block_map.shape == (0,)
    for weight, gradient in zip(weights, d_weights, strict=True):
        if weight.requires_grad:
            assert torch.equal(weight.grad, gradient)
            assert weight.grad.abs().sum() > 0


def test_fakes_keep_strides() -> None:
    """What the fakes promise about shape, dtype and strides is what the kernels return."""
    for feature in FEATURES:
        args = detached(list(arguments(feature)))
        args[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
        real = torch.ops.sparline.attend(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake_args = [
                [mode.from_tensor(item) for item in x]
                if isinstance(x, list) and x and isinstance(x[0], Tensor)
                else mode.from_tensor(x)
                if isinstance(x, Tensor)
                else x
                for x in args
            ]
            fake = torch.ops.sparline.attend(*fake_args)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), feature


def test_skipped_tiles_are_an_output() -> None:
    *rest, spec = arguments("skip")
    o, *_, kept_bits, row_votes = torch.ops.sparline.attend(*rest, f"{spec} row_votes=1")
    assert (kept_bits.shape, kept_bits.dtype) == ((1, 2, 4, 1), torch.uint8)
    assert (row_votes.shape, row_votes.dtype) == ((1, 2, 2), torch.float32)
    same_o, *_, same_bits, row_votes = torch.ops.sparline.attend(*rest, spec)
    assert torch.equal(same_o, o)
    assert torch.equal(same_bits, kept_bits)
    assert row_votes.shape == (0,)
    *_, kept_bits, row_votes = torch.ops.sparline.attend(*arguments("dense"))
    assert kept_bits.shape == row_votes.shape == (0,)
    *rest, spec = arguments("dense")
    with pytest.raises(RuntimeError, match=r"row_votes must be absent .*skip"):
        torch.ops.sparline.attend(*rest, f"{spec} row_votes=1")


def test_recomputed_lse_is_that_of_exact_scores() -> None:
    """The backward then equals the exact operator's, but for delta, which reads the rounded o."""
    args = arguments("low_bit")
    exact = (*args[:-1], f"{SPARSE} smooth_k=1")
    with torch.no_grad():
        _, lse, *_ = torch.ops.sparline.attend(*args)
        _, exact_lse, *_ = torch.ops.sparline.attend(*exact)
    assert not torch.equal(lse, exact_lse)
    given = list(backward_arguments(args))
    recomputed = torch.ops.sparline.attend_backward(*given)
    given[5], given[-1] = exact_lse, exact[-1]
    expected = torch.ops.sparline.attend_backward(*given)
    for a, b in zip(recomputed[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["query_order", "key_order", "tile_order"])
def test_orders_must_be_permutations(name: str) -> None:
    """A wrong one would read and write where no row is; it is refused before anything runs."""
    q, k, v = (x.detach() for x in qkv())
    spec = f"{SPARSE} low_bit=1"  # which takes a tile_order
    length = {"query_order": NUM_QUERIES, "key_order": NUM_KEYS, "tile_order": 4}[name]
    for bad, got in ((length, f"got {length}"), (-1, "got -1"), (0, "got 0 twice")):
        wrong = torch.arange(length).int()
        wrong[length - 1] = bad
        orders: dict[str, Tensor | None] = dict.fromkeys(("query_order", "key_order", "tile_order"))
        orders[name] = wrong.expand(1, 1, 2, length) if name == "tile_order" else wrong
        message = f"{name} must be a permutation of 0 .. {length - 1}, {got}"
        with pytest.raises(RuntimeError, match=f"forward: {message}"):
            torch.ops.sparline.attend(q, k, v, None, None, *orders.values(), None, [], [], [], spec)
        if name != "tile_order":
            rows = list(orders.values())[:2]
            with pytest.raises(RuntimeError, match=f"route: {message}"):
                torch.ops.sparline.route(q, k, None, None, *rows, [], [], ROUTE_SPEC)


def test_autocast() -> None:
    """q, k and v take the autocast dtype; soft maps and weights stay float32, as does SoftTop-k."""
    args = arguments("soft")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse, *_ = torch.ops.sparline.attend(*args)
        soft_map = torch.ops.sparline.soft_top_k(
            random(1, 1, 4, 9).bfloat16(), torch.full((4,), 2.0), 0.1
        )
    assert (o.dtype, lse.dtype, soft_map.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    o.float().sum().backward()
    assert args[0].grad.dtype == args[3].grad.dtype == torch.float32


def test_no_double_backward() -> None:
    args = arguments("dense")
    (d_q,) = torch.autograd.grad(
        torch.ops.sparline.attend(*args)[0].square().sum(), args[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        d_q.sum().backward()


def test_vmap_is_refused() -> None:
    q, k, v = (x.detach() for x in qkv())
    calls = [
        lambda x: torch.ops.sparline.attend(x, k, v, *[None] * 6, [], [], [], SPARSE),
        lambda x: torch.ops.sparline.route(x, k, *[None] * 4, [], [], ROUTE_SPEC),
        lambda x: torch.ops.sparline.soft_top_k(x, torch.full((2 * NUM_QUERIES,), 2.0), 0.1),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="reshape the extra dimension"):
            torch.func.vmap(call)(q[None])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("blocks=16", "a key must be known"),
        ("skip=sometimes", "skip must be one of none, running_max, kept_lse"),
        ("selection=best", "selection must be one of top_k, top_p, union, intersection"),
        ("low_bit=2", "low_bit must be one of 0, 1"),
        ("skip_threshold=low", "skip_threshold must be a number"),
        ("block_map=hard", "block_map must be one of none, class, soft"),
    ],
)
def test_spec_errors(word: str, message: str) -> None:
    q, k, _ = (x.detach() for x in qkv())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparline.explain(q, k, [], [], f"block_q=32 block_k=16 {word}")


def test_explain_takes_the_kind_of_map_from_the_spec() -> None:
    q, k, _ = (x.detach() for x in qkv())
    spec = f"{BLOCKS} combine=blend feature_map=softmax linear_scope=complement block_map=soft"
    assert "soft" in torch.ops.sparline.explain(q, k, [], [], spec)
