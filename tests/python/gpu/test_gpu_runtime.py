# SPDX-License-Identifier: Apache-2.0
"""How the operators behave on a device: bits, graphs, streams, waits, memory, compile, messages."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparline
from sparline import BLASST, SLA, SLA2, VSA, Dense, DynSparse, Grid, LowBit, VMoBA, Weights
from sparline.bench import learned_weights
from sparline.methods import Method

pytestmark = pytest.mark.gpu

GRID = Grid(4, 16, 30)
HEADS, HEAD_DIM = 4, 64
BLOCKS: dict[str, Any] = {"block_q": 128, "block_k": 64}
TEXT: dict[str, Any] = {"protected_q": [(0, 100)], "protected_k": [(0, 100)]}
PACKS: dict[str, Any] = {"cu_seqlens_q": [0, 500, GRID.length]}

CALLS: dict[str, tuple[Method, dict[str, Any]]] = {
    "dense": (Dense(), {}),
    "sla": (SLA.paper(keep_ratio=0.2, **BLOCKS), {}),
    "sla1": (SLA.sla1(keep_ratio=0.2, **BLOCKS), {}),
    "sla_main": (SLA.sla_main(keep_ratio=0.2, **BLOCKS), {}),
    "sla-packed-protected": (SLA.paper(keep_ratio=0.2, **BLOCKS), {**TEXT, **PACKS}),
    "sla-hedgehog": (SLA.sla1(keep_ratio=0.2, feature_map="hedgehog", **BLOCKS), {}),
    "sla-cubes": (SLA.sla1(keep_ratio=0.2, token_order="cubes", **BLOCKS), {"grid": GRID}),
    "sparse": (SLA.sparse_only(keep_ratio=0.2, **BLOCKS), {}),
    "linear": (SLA.linear_only(**BLOCKS), {}),
    "top_p": (SLA.top_p(keep_mass=0.3, **BLOCKS), {}),
    "sparge": (SLA.sparge(min_similarity=0.05, keep_mass=0.5), {}),
    "sla2": (SLA2(keep_ratio=0.2), {}),
    "sla2-token": (SLA2(keep_ratio=0.2, alpha_shape="token"), {}),  # 64 values for 1920 tokens
    "sla2-soft": (SLA2(keep_ratio=0.2, router_mode="soft"), {}),
    "sla2-low-bit": (SLA2(keep_ratio=0.2, low_bit=LowBit()), {}),
    "dynsparse": (DynSparse(log_threshold=-2.0), {}),
    "dynsparse-diagonal": (DynSparse(log_threshold=-2.0, tile_order="diagonal_first"), {}),
    "blasst-low-bit": (BLASST(log_threshold=-1.0, low_bit=LowBit(), decide_rows=32), {}),
    "vsa": (VSA(keep_ratio=0.2), {"grid": GRID}),
    "vmoba": (VMoBA(partition="2d"), {"grid": GRID}),
    "vmoba_block": (VMoBA(partition="3d", pool_queries=True), {"grid": GRID}),
}
every_call = pytest.mark.parametrize("name", CALLS)


@dataclasses.dataclass
class Call:
    """One call with leaves of its own, whose values can be drawn anew in place."""

    method: Method
    options: dict[str, Any]
    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    weights: Weights

    @staticmethod
    def make(name: str, device: Any = "cuda", dtype: torch.dtype = torch.bfloat16) -> Call:
        method, options = CALLS[name]
        shape = (2, HEADS, GRID.length, HEAD_DIM)
        q, k, v, d_o = (torch.empty(shape, dtype=dtype, device=device) for _ in range(4))
        weights = learned_weights(method, HEADS, HEAD_DIM)._asdict()
        if method.recipe.has_feature_weights:
            eye = torch.eye(HEAD_DIM).repeat(HEADS, 1, 1)
            noise = torch.randn(2, HEADS, HEAD_DIM, HEAD_DIM, generator=_seeded(5))
            matrices = 0.5 * eye + 0.3 * noise / HEAD_DIM**0.5
            weights |= {"feature_weight_q": matrices[0], "feature_weight_k": matrices[1]}
        moved = {key: None if w is None else w.to(device) for key, w in weights.items()}
        call = Call(method, options, q, k, v, d_o, Weights(**moved))
        call.draw(0)
        for leaf in call.leaves:
            leaf.requires_grad_()
        return call

    @property
    def leaves(self) -> list[Tensor]:
        is_soft = getattr(self.method, "router_mode", "hard") != "hard"
        learned = [
            w
            for key, w in self.weights._asdict().items()
            if w is not None and (is_soft or not key.startswith("router"))
        ]
        return [self.q, self.k, self.v, *learned]

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """New values in place: smooth along the sequence, so that blocks differ."""
        for n, x in enumerate((self.q, self.k, self.v, self.d_o)):
            noise = torch.randn(x.shape, generator=_seeded(10 * seed + n))
            drift = torch.randn(*x.shape[:2], 24, x.shape[3], generator=_seeded(10 * seed + n + 4))
            drift = drift.repeat_interleave(-(-x.shape[2] // 24), dim=2)[:, :, : x.shape[2]]
            x.copy_(noise + drift)

    def forward(self) -> tuple[Tensor, Tensor]:
        return sparline.attention(
            self.q,
            self.k,
            self.v,
            method=self.method,
            weights=self.weights,
            return_lse=True,
            **self.options,
        )

    def run(self) -> list[Tensor]:
        """o, lse and all gradients."""
        o, lse = self.forward()
        return [o.detach(), lse, *torch.autograd.grad(o, self.leaves, self.d_o)]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert not a.isnan().any(), f"result {n} holds NaN"
        different = (a != b).sum().item()
        assert different == 0, f"result {n} differs in {different} of {a.numel()} elements"


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error <= tolerance, f"result {n} differs by {error:.2e} (relative L2)"


def fill_free_memory(value: float) -> None:
    """Leaves ``value`` in the blocks that the caching allocator hands out next, of every size."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    sizes = [1 << n for n in range(9, 30)]  # 512 bytes to 512 MB
    blocks = [
        torch.full((size // 4,), value, device="cuda")
        for size in sizes
        for _ in range(8 if size <= 1 << 22 else 2)
    ]
    del blocks
    torch.cuda.synchronize()


# Bits -------------------------------------------------------------------------------------------


@every_call
def test_twice_the_same_bits_on_any_memory(name: str) -> None:
    """Forward and backward, on memory that holds zeros and on memory that holds NaN."""
    call = Call.make(name)
    fill_free_memory(0.0)
    first = call.run()
    fill_free_memory(float("nan"))
    same_bits(call.run(), first)
    same_bits(call.run(), first)


@pytest.mark.parametrize("name", ["dense", "sla1", "sla2", "dynsparse"])
def test_a_head_does_not_depend_on_its_neighbours(name: str) -> None:
    """The last head alone gives its own bits: nothing follows from how heads share the device."""
    call = Call.make(name)
    weights = call.weights
    if weights.alpha_logit is not None:
        weights = weights._replace(alpha_logit=weights.alpha_logit[-1:])
    whole = call.forward()[0][:, -1:]
    q, k, v = (x.detach()[:, -1:] for x in (call.q, call.k, call.v))
    with torch.no_grad():
        alone = sparline.attention(q, k, v, method=call.method, weights=weights)
    same_bits([alone], [whole])


# Streams, graphs, waiting -----------------------------------------------------------------------


@every_call
def test_graph_capture_and_replay(name: str) -> None:
    """A captured forward and backward gives the bits of an eager call on whatever is in the static
    inputs by then."""
    call = Call.make(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = call.run()
    for seed in (1, 2):
        call.draw(seed)
        graph.replay()
        captured = [x.clone() for x in static]
        same_bits(captured, call.run())


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@every_call
def test_no_call_waits_for_the_device(name: str, waiting_is_an_error: Callable[[], None]) -> None:
    """After the first call, which may copy tables of positions to the device."""
    call = Call.make(name)
    call.run()
    torch.cuda.synchronize()
    waiting_is_an_error()
    call.run()


@pytest.mark.parametrize("name", ["dense", "sla", "sla2", "sla2-soft", "dynsparse", "vsa"])
def test_runs_on_the_current_stream(name: str) -> None:
    """Behind a long wait on a side stream, forward and backward see what was written there, and
    their workspace is not given away before they are done."""
    call = Call.make(name)
    call.draw(1)
    expected = call.run()
    fresh = [x.detach().clone() for x in (call.q, call.k, call.v, call.d_o)]
    call.draw(0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        with torch.no_grad():
            for x, y in zip((call.q, call.k, call.v, call.d_o), fresh, strict=True):
                x.copy_(y)
        results = call.run()
    for _ in range(4):  # on the default stream, in memory that is free by then
        torch.full((1 << 24,), float("nan"), device="cuda")
    stream.synchronize()
    same_bits(results, expected)


# Compile ----------------------------------------------------------------------------------------

COMPILED = ["dense", "sla", "sla1", "sla-packed-protected", "sla-cubes", "sla2", "sla2-soft"]
COMPILED += ["dynsparse-diagonal", "sla2-low-bit", "vsa", "vmoba"]


@pytest.mark.parametrize("name", COMPILED)
def test_compile_fullgraph(name: str) -> None:
    """One graph, forward and backward. The results may differ by what torch's own decompositions
    round apart: how alpha is interpolated, for one."""
    torch._dynamo.reset()
    call = Call.make(name)
    expected = call.run()
    compiled = torch.compile(Call.forward, fullgraph=True, backend="aot_eager")
    o, lse = compiled(call)
    close([o.detach(), lse, *torch.autograd.grad(o, call.leaves, call.d_o)], expected, 1e-3)


@pytest.mark.parametrize("name", ["sla", "sla2"])
def test_compile_with_inductor(name: str) -> None:
    """The default compiler fuses what surrounds the operators, and its results may round apart."""
    torch._dynamo.reset()
    call = Call.make(name)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = sparline.attention(
            q * 1.5, k, v, method=call.method, weights=call.weights, **call.options
        )
        return o.sin()

    results = []
    for f in (step, torch.compile(step, fullgraph=True)):
        o = f(call.q, call.k, call.v)
        results.append([o, *torch.autograd.grad(o, call.leaves, call.d_o)])
    close(results[1], results[0], 1e-2)


def test_autocast() -> None:
    """float32 tensors under autocast run in bfloat16, and their gradients come back in float32."""
    call = Call.make("sla", dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        o, _ = call.forward()
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o, call.leaves, call.d_o.to(o.dtype))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# Memory -----------------------------------------------------------------------------------------


def peak_extra(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes at the peak above what was allocated before, and the result."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


MEMORY: dict[str, Method] = {
    "dense": Dense(),
    "sla": SLA.paper(keep_ratio=0.05, **BLOCKS),
    "sla1": SLA.sla1(keep_ratio=0.05, **BLOCKS),
    "sla2": SLA2(keep_ratio=0.05),
    "dynsparse": DynSparse(log_threshold=-5.0),
    "sla2-low-bit": SLA2(keep_ratio=0.05, low_bit=LowBit()),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name: str, tell: Any) -> None:
    """At the shape of Wan 2.1 1.3B: a forward takes at most half of q beside its results, and a
    training step at most 1.1 times the memory of one with FlashAttention 2."""
    method, heads, length, head_dim = MEMORY[name], 12, 32760, 128
    q, k, v, d_o = (
        torch.randn(1, heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    host = learned_weights(method, heads, head_dim)
    weights = Weights(*(None if w is None else w.cuda().requires_grad_() for w in host))
    learned = [w for w in weights if w is not None]
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Any:
        with torch.no_grad():
            return sparline.attention(q, k, v, method=method, weights=weights, return_lse=True)

    def step(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Any:
        o = attend(q, k, v)
        return o, torch.autograd.grad(o, inputs, d_o, allow_unused=True)

    extra, results = peak_extra(forward)
    extra -= sum(map(size_of, results))
    del results

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = sparline.attention(q, k, v, method=method, weights=weights)
        return o

    peak, _ = peak_extra(lambda: step(ours, [*leaves, *learned]))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash, _ = peak_extra(lambda: step(scaled_dot_product_attention, leaves))
    resident = sum(map(size_of, (q, k, v, d_o)))
    share, ratio = extra / size_of(q), (resident + peak) / (resident + flash)
    tell([
        f"memory {name:<14} forward {extra / 1e6:7.1f} MB beside its results = {share:.2f} q, "
        f"step {(resident + peak) / 1e6:7.1f} MB = {ratio:.2f} x FlashAttention 2's"
    ])  # fmt: skip
    assert share <= 0.5
    assert ratio <= 1.10


# Messages ---------------------------------------------------------------------------------------


def test_float32_is_refused_with_a_way_out() -> None:
    q = torch.randn(1, 2, 64, 64, device="cuda")
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match="bfloat16") as caught:
        sparline.attention(q, q, q, method=Dense())
    assert "reference" in str(caught.value)
    assert sparline.attention(q, q, q, method=Dense(), backend="reference").is_cuda


def test_the_cpu_backend_is_refused() -> None:
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, ValueError), match=r"CPU|cpu"):
        sparline.attention(q, q, q, method=Dense(), backend="cpu")


def test_mixed_devices_are_refused() -> None:
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be on one device, got cuda:0, cpu, cuda:0"):
        sparline.attention(q, q.cpu(), q, method=Dense())


WRONG_DEVICES = """
import torch, sparline
from sparline import SLA, SLA2, Weights
q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
for wrong in (
    {"block_map": torch.ones(1, 1, dtype=torch.int8), "method": SLA()},
    {"weights": Weights(proj_weight=torch.zeros(64, 64)), "method": SLA()},
    {"weights": Weights(alpha_logit=torch.zeros(2, 1)), "method": SLA2()},
    {"weights": Weights(router_q=torch.eye(64), router_k=torch.eye(64)), "method": SLA2()},
):
    try:
        sparline.attention(q, q, q, **wrong)
    except (RuntimeError, ValueError) as error:
        assert "CUDA error" not in str(error), error
        assert any(word in str(error).lower() for word in ("device", "cuda", "cpu")), error
    else:
        raise AssertionError(f"accepted: {list(wrong)[0]}")
    torch.cuda.synchronize()
print("refused")
"""


def test_operands_elsewhere_are_refused() -> None:
    """Before anything is launched: a host pointer in a kernel would end the process's device
    context, which is why this one has a process of its own."""
    done = subprocess.run([sys.executable, "-c", WRONG_DEVICES], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr[-2000:]


WHERE_MEMORY_BEGINS = """
import torch, sparline
from sparline import SLA, DynSparse
# Tensors at the begin of segments of their own, before which nothing is mapped.
segments = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda") for _ in range(12)]
segments = segments[1::2]
torch.cuda.empty_cache()
for rows, block_k in ((12, 64), (12, 128), (100, 64), (300, 64), (300, 128)):
    for head_dim in (64, 128):
        for kind in (0, 1):
            tensors = []
            for n in range(3):
                begin = segments[(n + rows) % len(segments)][: 2 * rows * head_dim]
                tensors.append(begin.view(torch.bfloat16).view(1, 1, rows, head_dim).normal_())
            blocks = -(-rows // 128), -(-rows // block_k)
            block_map = torch.full((1, 1, *blocks), kind, dtype=torch.int8, device="cuda")
            method = SLA.sparse_only(block_q=128, block_k=block_k)
            o = sparline.attention(*tensors, method=method, block_map=block_map)
            copies = [x.clone() for x in tensors]
            assert torch.equal(o, sparline.attention(*copies, method=method, block_map=block_map))
            for skips in (DynSparse(log_threshold=-1.0, block_q=128, block_k=block_k),
                          DynSparse(log_threshold=-1.0, block_q=128, block_k=block_k,
                                    decide_rows=64)):
                o = sparline.attention(*tensors, method=skips)
                assert torch.equal(o, sparline.attention(*copies, method=skips))
            torch.cuda.synchronize()
print("same")
"""


def test_nothing_before_a_tensor_is_touched() -> None:
    """Also where a query block has no keys: maps that the copy engine reads by may begin before
    their tensor."""
    done = subprocess.run(
        [sys.executable, "-c", WHERE_MEMORY_BEGINS], capture_output=True, text=True
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_explain_names_the_device() -> None:
    q = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    text = sparline.explain(q, q, method=SLA())
    assert text.startswith("backend: cuda")
    assert "workspace_bytes" in text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
@pytest.mark.parametrize("name", ["dense", "sla", "sla2"])
def test_second_gpu(name: str) -> None:
    """Tensors of another device than the current one run there."""
    first, second = Call.make(name, "cuda:0").run(), Call.make(name, "cuda:1").run()
    assert all(x.device.index == 1 for x in second)
    same_bits([x.to("cuda:0") for x in second], first)


# In-loop methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DynSparse(log_threshold=-2.0), BLASST(log_threshold=-1.0)])
def test_more_is_skipped_at_a_higher_threshold(method: Method) -> None:
    call = Call.make("dynsparse")
    sparsities = []
    for shift in (4.0, 1.0, 0.1):
        changed = dataclasses.replace(method, log_threshold=shift * method.log_threshold)  # type: ignore[attr-defined]
        told = sparline.tile_statistics(call.q, call.k, call.v, method=changed, recall=True)
        assert told.recall is not None
        assert told.recall.min() >= 0.0
        assert told.recall.max() <= 1.0 + 1e-4
        sparsities.append(told.sparsity)
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] > 0.0


def test_no_threshold_is_dense() -> None:
    """-inf skips nothing. Not the same bits: without a rule a row may keep an older maximum."""
    call = Call.make("dense")
    dense = call.forward()
    call.method = DynSparse(log_threshold=float("-inf"))
    for actual, expected in zip(call.forward(), dense, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-3)
