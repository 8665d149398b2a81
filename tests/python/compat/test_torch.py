# SPDX-License-Identifier: Apache-2.0
"""The operators inside PyTorch: opcheck, compile, checkpointing, autocast, functorch."""

import contextlib
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch._dynamo.testing
from cases import CASES, make_inputs, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import sparline
from sparline import SLA, SLA2, Dense, LowBit, Weights
from sparline.methods import Method

BLOCKS = {"block_q": 16, "block_k": 16}
ROUTE_SPEC = (
    "block_q=16 block_k=16 critical_ratio=0.4 negligible_ratio=0.1 count_rounding=floor "
    "smooth_router=1"
)


def qkv(
    num_queries: int = 40, num_keys: int = 50, requires_grad: bool = False, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 2, num_queries, 8), (1, 1, num_keys, 8), (1, 1, num_keys, 8))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


def op_weights(requires_grad: bool = False) -> list[Tensor]:
    shapes = ((8, 8), (8,), (2, 8, 8), (2, 8), (1, 8, 8), (1, 8))
    generator = torch.Generator().manual_seed(1)
    return [
        (0.3 * torch.randn(s, generator=generator)).requires_grad_(requires_grad) for s in shapes
    ]


class Recorder(TorchDispatchMode):
    """Notes every call of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sparline":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operator calls that a case makes, forward and backward, with their arguments."""
    case = CASES[name]
    with Recorder() as recorder:
        run(case, make_inputs(case), "cpu")
    return recorder.calls


def each_tensor(args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(
        change(x)
        if isinstance(x, Tensor)
        else [change(w) for w in x]
        if isinstance(x, list) and x and isinstance(x[0], Tensor)
        else x
        for x in args
    )


# Between them every operator, every optional argument and every optional result.
EVERY_OPERAND = [
    "dense-packed",
    "gqa-hedgehog",
    "packed-protected",
    "sla2-softmax-hard",
    "sla2-packed-protected-soft",
    "dynsparse-reverse",
    "sla-cubes-packed",
    "vmoba-2d-head_global",
    "low-bit-sla2",
]


@pytest.mark.parametrize("name", EVERY_OPERAND)
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fakes, and AOT dispatch with static and dynamic shapes."""
    for op, args in recorded(name):
        args = each_tensor(args, Tensor.detach)
        is_backward = op.name().endswith("_backward")
        if not is_backward and op is not torch.ops.sparline.route.default:
            args = each_tensor(args, lambda x: x.requires_grad_() if x.is_floating_point() else x)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        if not is_backward:
            tests += ("test_autograd_registration",)
        torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize("name", [*EVERY_OPERAND, "bnhd", "padded"])
def test_fakes_keep_strides(name: str) -> None:
    """What the fakes promise about shape, dtype and strides is what the kernels return."""
    for op, args in recorded(name):
        real = op(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*each_tensor(args, mode.from_tensor))
        real, fake = (
            [x for part in (y if isinstance(y, tuple) else (y,)) for x in _flat(part)]
            for y in (real, fake)
        )
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


COMPILED = [
    "dense",
    "sla-paper",
    "gqa-hedgehog",
    "bnhd",
    "packed-protected",
    "smooth-all",
    "sla2-softmax-hard",
    "sla2-packed-protected-soft",
    "top-p",
    "sparge",
    "dynsparse-reverse",
    "dense-cubes",
    "vsa-gates",
    "vmoba-1d-query_head",
    "vmoba-2d-head_global",
    "vmoba-block",
    "low-bit-sla2",
    "low-bit-dynsparse",
]


@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph(name: str) -> None:
    """One graph, forward and backward, equal to eager bit for bit."""
    case = CASES[name]
    inputs = make_inputs(case)
    eager = run(case, inputs, "cpu")
    torch._dynamo.reset()
    attention = sparline.attention
    try:
        sparline.attention = torch.compile(attention, fullgraph=True, backend="aot_eager")
        compiled = run(case, inputs, "cpu")
    finally:
        sparline.attention = attention
    assert torch.equal(eager.o, compiled.o)
    assert torch.equal(eager.lse, compiled.lse)
    for key, gradient in eager.gradients.items():
        assert torch.equal(gradient, compiled.gradients[key]), key


@pytest.mark.parametrize("method", [SLA(keep_ratio=0.4, **BLOCKS), SLA2(keep_ratio=0.4, **BLOCKS)])
def test_compile_dynamic_shapes(method: Method) -> None:
    """A change of length neither breaks the graph nor recompiles for every length."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparline.attention(q, k, v, method=method)

    graphs = []
    for length in (40, 57, 96, 131):
        q, k, v = qkv(length, length)
        assert torch.equal(f(q, k, v), sparline.attention(q, k, v, method=method))
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


def test_compile_two_methods() -> None:
    """One compiled function over layers with other options: a graph each, no symbolic numbers."""
    torch._dynamo.reset()
    compiled = torch.compile(sparline.attention, fullgraph=True, backend="aot_eager")
    q, k, v = qkv()
    for method in (
        SLA(keep_ratio=0.4),
        SLA(keep_ratio=0.7, block_q=16),
        Dense(32, 16),
        sparline.DynSparse(-2.0, 16, 16),
    ):
        for scale in (None, 0.3):
            expected = sparline.attention(q, k, v, method=method, scale=scale)
            assert torch.equal(compiled(q, k, v, method=method, scale=scale), expected)


def test_compile_module_with_inductor() -> None:
    """The default compiler around the module: forward, backward and the surrounding arithmetic."""
    torch._dynamo.reset()
    module = sparline.nn.SLA(8, method=SLA(keep_ratio=0.4, **BLOCKS))
    torch.nn.init.normal_(module.proj_l.weight)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q * 2, k, v).sin()

    results = []
    for g in (f, torch.compile(f, fullgraph=True)):
        q, k, v = qkv(requires_grad=True)
        module.zero_grad()
        o = g(q, k, v)
        o.sum().backward()
        results.append((o, q.grad, k.grad, v.grad, module.proj_l.weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "method", [SLA(keep_ratio=0.4, combine="sum", **BLOCKS), SLA2(keep_ratio=0.4, **BLOCKS)]
)
def test_activation_checkpointing(reentrant: bool, method: Method) -> None:
    results = []
    for wrap in (False, True):
        q, k, v = qkv(requires_grad=True)

        def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sparline.attention(q, k, v, method=method)

        o = checkpoint(f, q, k, v, use_reentrant=reentrant) if wrap else f(q, k, v)
        o.square().sum().backward()
        results.append((q.grad, k.grad, v.grad))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("save", [True, False])
def test_selective_checkpointing_by_op(save: bool) -> None:
    """A policy may keep our output or recompute it, by the operator's name."""
    calls = 0
    attend = torch.ops.sparline.attend.default

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal calls
            calls += func is attend
            return func(*args, **(kwargs or {}))

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = save and op is attend
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    method = SLA(keep_ratio=0.4, combine="sum", **BLOCKS)
    q, k, v = qkv(requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparline.attention(q.sin(), k, v, method=method).cos()

    with Counter():
        o = checkpoint(
            f,
            q,
            k,
            v,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        o.sum().backward()
    assert calls == (1 if save else 2)
    expected = torch.autograd.grad(f(q, k, v).sum(), q)[0]
    assert torch.equal(q.grad, expected)


class Poison(TorchDispatchMode):
    """Adds one to the mean keys that the router gives, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_means = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.sparline.route.default and result[1].numel() > 0:
            self.num_means += 1
            result = (result[0], result[1] + 1.0)
        return result


@pytest.mark.parametrize(
    ("method", "is_given", "is_used"),
    [
        (SLA2(keep_ratio=0.4, **BLOCKS), True, True),
        (SLA2(keep_ratio=0.4, low_bit=LowBit(), **BLOCKS), True, True),
        (SLA(keep_ratio=0.4, combine="sum", smooth_k="all", **BLOCKS), True, True),
        (SLA.sparse_only(keep_ratio=0.4, low_bit=LowBit(), **BLOCKS), True, True),
        (SLA(keep_ratio=0.4, combine="sum", **BLOCKS), False, False),
        (SLA(keep_ratio=0.4, combine="sum", smooth_k="none", **BLOCKS), False, False),
        (SLA2(keep_ratio=0.4, router_mode="soft", **BLOCKS), False, False),
        (SLA2(keep_ratio=0.4, router_mode="straight_through", **BLOCKS), True, False),
    ],
)
def test_the_router_hands_over_the_mean_keys(method: Method, is_given: bool, is_used: bool) -> None:
    """Where the operator subtracts the same ones, forward and backward."""
    results = []
    for poison in (None, Poison()):
        q, k, v = qkv(requires_grad=True)
        with poison or contextlib.nullcontext():
            o, lse = sparline.attention(q, k, v, method=method, return_lse=True)
        o.square().sum().backward()
        results.append((lse, q.grad))
    assert poison is not None
    assert poison.num_means == is_given
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned) != is_used


def test_under_autocast_keys_to_be_rounded_keep_their_own_mean() -> None:
    """Those that came in 16 bits are what the router saw."""
    method = SLA2(keep_ratio=0.4, **BLOCKS)
    for dtype, is_used in ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True)):
        q, k, v = (x.to(dtype) for x in qkv())
        with Recorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
            o = sparline.attention(q, k, v, method=method)
        (args,) = (args for op, args in recorder.calls if op is torch.ops.sparline.attend.default)
        assert o.dtype == torch.bfloat16
        assert isinstance(args[8], Tensor) == is_used, dtype


def test_autocast(backend: str) -> None:
    """q, k and v are cast, weights are not, and gradients come back in the incoming dtype."""
    method = SLA(keep_ratio=0.4, **BLOCKS)
    q, k, v = qkv(requires_grad=True)
    weights = Weights(*op_weights(requires_grad=True)[:2])
    block_map = sparline.route(q, k, method=method, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = sparline.attention(
            q, k, v, method=method, weights=weights, return_lse=True, backend=backend
        )
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    expected = sparline.attention(
        q.bfloat16(),
        k.bfloat16(),
        v.bfloat16(),
        method=method,
        weights=weights,
        block_map=block_map,
        backend=backend,
    )
    assert torch.equal(o, expected)
    o.float().sum().backward()
    assert q.grad.dtype == torch.float32
    assert weights.proj_weight.grad.dtype == torch.float32


def test_autocast_under_compile() -> None:
    torch._dynamo.reset()
    method = SLA(keep_ratio=0.4, combine="sum", **BLOCKS)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sparline.attention(q, k, v, method=method)

    q, k, v = qkv()
    assert torch.equal(f(q, k, v), torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v))


def test_double_backward_is_refused() -> None:
    q, k, v = qkv(requires_grad=True)
    o = sparline.attention(q, k, v, method=Dense())
    (d_q,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        d_q.sum().backward()


def test_lse_is_a_constant(backend: str) -> None:
    q, k, v = qkv(requires_grad=True)
    _, lse = sparline.attention(q, k, v, method=Dense(), return_lse=True, backend=backend)
    assert not lse.requires_grad


def test_functional_transforms_are_refused() -> None:
    """With one clear sentence, instead of a wrong derivative or an error from deep inside."""
    q, k, v = qkv()

    def loss(q: Tensor) -> Tensor:
        return sparline.attention(q, k, v, method=Dense()).square().sum()

    with pytest.raises(NotImplementedError, match="reshape the extra dimension into the batch"):
        torch.func.vmap(loss)(q[None])
    with pytest.raises(NotImplementedError, match="reverse-mode autograd only"):
        torch.func.grad(loss)(q)
    with pytest.raises(NotImplementedError, match="reverse-mode autograd only"):
        torch.func.jvp(loss, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="reverse-mode autograd only"):
            loss(dual)
    with pytest.raises(NotImplementedError, match="reshape the extra dimension into the batch"):
        torch.func.vmap(lambda q: torch.ops.sparline.route(q, k, *[None] * 4, [], [], ROUTE_SPEC))(
            q[None]
        )


def test_reference_takes_functional_transforms() -> None:
    q, k, v = qkv()

    def loss(q: Tensor) -> Tensor:
        return sparline.attention(q, k, v, method=Dense(), backend="reference").square().sum()

    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])


def test_partial_gradients() -> None:
    """Gradients of any subset of the inputs, and of expanded (stride 0) output gradients."""
    method = SLA(keep_ratio=0.4, **BLOCKS)
    weights = Weights(*op_weights()[:2])
    full = qkv(requires_grad=True)
    o = sparline.attention(*full, method=method, weights=weights)
    expected = torch.autograd.grad(o, full, torch.ones_like(o))
    for n in range(3):
        some = [x.detach().requires_grad_(i == n) for i, x in enumerate(full)]
        sparline.attention(*some, method=method, weights=weights).sum().backward()
        assert torch.equal(some[n].grad, expected[n])
    weight = weights.proj_weight.requires_grad_()
    o = sparline.attention(
        *(x.detach() for x in full), method=method, weights=weights._replace(proj_weight=weight)
    )
    o.sum().backward()
    assert weight.grad is not None


def test_inference_mode_and_no_grad() -> None:
    q, k, v = qkv(requires_grad=True)
    expected = sparline.attention(q, k, v, method=Dense()).detach()
    with torch.inference_mode():
        assert torch.equal(sparline.attention(q, k, v, method=Dense()), expected)
    with torch.no_grad():
        assert not sparline.attention(q, k, v, method=Dense()).requires_grad


def test_case_prints_as_python() -> None:
    """A failure can be pasted back."""
    for case in CASES.values():
        assert eval(repr(case), vars(cases)) == case
