# SPDX-License-Identifier: Apache-2.0
"""The second definition: dense, N x N, one token at a time where order matters.

Written from docs/math.md alone and sharing no code with the package, so that a mistake would have
to be made twice. Blocks exist only as a number per token, and both branches are full N x N products
under expanded masks; only what is defined tile by tile (skipping, low bits) walks tiles. Gradients
come from autograd, except where the published backward is not the derivative of the forward.

Decisions that rounding may turn (block maps, skipped tiles, chosen chunks) are checked apart from
the arithmetic: ``check_map`` and ``check_skips`` judge the package's own decision and let near-ties
pass, ``choose_chunks`` says which rows are near-ties.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Where tokens stand -----------------------------------------------------------------------------


class Place(NamedTuple):
    """A token of a grid: in the text before it (region 0), on it (1) or in the text after it (2),
    in which box, and where; tuples sort in the order of the boxes."""

    sequence: int
    region: int
    box: tuple[int, int, int]
    site: tuple[int, int, int]


def places(grids: Sequence[Sequence[int]], box: tuple[int, int, int]) -> list[Place]:
    """Every token of every sequence in memory order; a 0 in ``box`` is the whole axis."""
    found = []
    for n, (frames, height, width, prefix, suffix) in enumerate(grids):
        found += [Place(n, 0, (0, 0, 0), (0, 0, token)) for token in range(prefix)]
        for t in range(frames):
            for h in range(height):
                for w in range(width):
                    sides = [
                        side or full
                        for side, full in zip(box, (frames, height, width), strict=True)
                    ]
                    corner = (t // sides[0], h // sides[1], w // sides[2])
                    found.append(Place(n, 1, corner, (t, h, w)))
        found += [Place(n, 2, (0, 0, 0), (0, 0, token)) for token in range(suffix)]
    return found


class Tokens:
    """Per token of one axis, by its row in memory: its block, its row in that block, its sequence,
    whether it is protected.

    ``order[p]`` is the row at position p. Offsets and spans count positions; ``borders`` are
    positions where a block ends early.
    """

    def __init__(
        self,
        length: int,
        block_rows: int,
        offsets: Sequence[int] | None,
        spans: Sequence[tuple[int, int]],
        order: Sequence[int] | None = None,
        borders: Sequence[int] = (),
    ) -> None:
        starts = set(offsets[:-1]) if offsets else {0}
        starts |= {row for begin, end in spans if end > begin for row in (begin, end)}
        starts |= set(borders)
        self.order = list(range(length)) if order is None else list(order)
        self.block = np.zeros(length, dtype=np.int64)
        self.row_in_block = np.zeros(length, dtype=np.int64)
        self.sequence = np.zeros(length, dtype=np.int64)
        self.protected = np.zeros(length, dtype=bool)
        block, rows_in_block = -1, 0
        for position, n in enumerate(self.order):
            if position in starts or rows_in_block == block_rows or position == 0:
                block, rows_in_block = block + 1, 0
            self.block[n] = block
            self.row_in_block[n] = rows_in_block
            rows_in_block += 1
            if offsets:  # the last sequence that starts at or before this token
                self.sequence[n] = max(
                    s for s, start in enumerate(offsets[:-1]) if start <= position
                )
            self.protected[n] = any(begin <= position < end for begin, end in spans)
        self.num_blocks = block + 1

    def rows(self, block: int) -> np.ndarray:
        """The tokens of a block, in order."""
        return np.array([n for n in self.order if self.block[n] == block])

    def sequence_of(self, block: int) -> int:
        return int(self.sequence[self.rows(block)[0]])

    def is_protected(self, block: int) -> bool:
        return bool(self.protected[self.rows(block)[0]])


def group_of(heads: int, kv_heads: int) -> Tensor:
    """The key/value head of every query head."""
    return torch.arange(heads) * kv_heads // heads


def smoothed(k: Tensor, tokens: Tokens) -> Tensor:
    """k (B, H_kv, N_k, D) minus the mean key of its sequence."""
    same = torch.from_numpy(tokens.sequence[:, None] == tokens.sequence).to(k.dtype)
    return k - (same / same.sum(dim=1, keepdim=True)) @ k


def means(x: Tensor, tokens: Tokens) -> Tensor:
    """The mean row of every block, (B, H, T, D)."""
    rows = [torch.from_numpy(tokens.rows(n)) for n in range(tokens.num_blocks)]
    return torch.stack([x[:, :, r].mean(dim=2) for r in rows], dim=2)


# The operator -----------------------------------------------------------------------------------


def features(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if name in ("hedgehog", "hedgehog_exp"):
        y = torch.einsum("bhnd,hed->bhne", x, weight)
        if bias is not None:
            y = y + bias[None, :, None, :]
        both = torch.stack([y, -y])  # (2, B, H, N, D)
        both = both.exp() if name == "hedgehog_exp" else torch.softmax(both, dim=-1)
        return torch.cat(list(both), dim=-1)
    if name == "softmax":
        return torch.softmax(x, dim=-1)
    if name == "elu1":
        return torch.nn.functional.elu(x) + 1
    return torch.relu(x) if name == "relu" else x


def softmax_branch(
    q: Tensor, k: Tensor, v: Tensor, m: Tensor, scale: float, hides: bool
) -> tuple[Tensor, Tensor]:
    """o_s and lse, with exp(S) weighed by m (B, H, N_q, N_k). ``hides`` takes scores with m = 0 out
    of all arithmetic; else they stay, so that m has its gradient there."""
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    hidden = torch.full_like(scores, -math.inf)
    top = torch.where(m > 0, scores, hidden).detach().amax(dim=-1, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    p = m * (torch.where(m > 0, scores, hidden) if hides else scores).sub(top).exp()
    total = p.sum(dim=-1, keepdim=True)
    p = p * (total > 0)  # a row that sees nothing is 0 and has no gradient
    o = torch.einsum("bhqk,bhkd->bhqd", p / torch.where(total > 0, total, 1.0), v)
    return o, (top + total.log()).squeeze(-1).detach()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor | None,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    scale: float,
    combine: str,
    feature_map: str = "softmax",
    scope: str = "marginal",
    epsilon: float = 0.0,
    smooths: bool = False,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    feature_weights: Sequence[Tensor | None] = (None, None, None, None),
    alpha_logit: Tensor | None = None,
    kept: Tensor | None = None,
    low_bit: dict[str, Any] | None = None,
    visits: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse in the dtype of the arguments, q k v o all (B, H, N, D); weights as in Weights.

    Args:
        pairs: for each pair of tokens its class, or the soft map's m, (B, H, N_q, N_k).
        alpha_logit: of each query, (H, N_q).
        kept: pairs of tokens that the sparse branch may see at all, bool (B, H, N_q, N_k).
        low_bit: options of the quantised forward.
        visits: for each query block, in which order it visits key blocks.
    """
    head = group_of(q.shape[1], k.shape[1])
    visible = torch.from_numpy(q_tokens.sequence[:, None] == k_tokens.sequence[None, :])
    forced = torch.from_numpy(q_tokens.protected[:, None] | k_tokens.protected[None, :])
    if pairs is None:
        pairs = torch.ones(q.shape[:3] + k.shape[2:3], dtype=torch.int8)
    is_soft = pairs.is_floating_point()
    if is_soft:
        m = torch.where(forced, torch.ones_like(pairs), pairs) * visible
    else:
        m = (visible & (forced | (pairs == 1))).to(q.dtype)
    seen = m if kept is None else m * (kept | forced)

    k_smooth = smoothed(k, k_tokens) if smooths else k
    if low_bit is None:
        o_s, lse = softmax_branch(q, k_smooth[:, head], v[:, head], seen, scale, not is_soft)
    else:  # the published backward does not look at the mean
        k_fixed = k + (k_smooth - k).detach()
        o_s, lse = LowBitBranch.apply(
            q, k_fixed, v, seen > 0, q_tokens, k_tokens, scale, low_bit, visits
        )
    if combine == "sparse":
        return o_s, lse

    w = {
        "marginal": (visible & ~forced & (pairs == 0)).to(q.dtype),
        "complement": visible * (1 - m),
        "all": visible * torch.ones_like(m),
    }[scope]
    weight_q, bias_q, weight_k, bias_k = feature_weights
    phi_q = features(q, feature_map, weight_q, bias_q)
    phi_k = features(k_smooth, feature_map, weight_k, bias_k)[:, head]
    a = torch.einsum("bhqf,bhkf->bhqk", phi_q, phi_k) * w
    denominator = a.sum(dim=-1, keepdim=True) + epsilon
    good = (denominator > 0) & denominator.isfinite() & (w > 0).any(dim=-1, keepdim=True)
    a = a * good / torch.where(good, denominator, torch.ones_like(denominator))
    o_l = torch.einsum("bhqk,bhkd->bhqd", a, v[:, head])
    protected = torch.from_numpy(q_tokens.protected)[:, None]
    if combine == "blend":
        assert alpha_logit is not None
        alpha = torch.where(good, torch.sigmoid(alpha_logit)[None, :, :, None], 1.0)
        return torch.where(protected, o_s, alpha * o_s + (1 - alpha) * o_l), lse
    if combine == "projection":
        o_l = torch.einsum("bhqd,ed->bhqe", o_l, proj_weight)
        if proj_bias is not None:
            o_l = o_l + proj_bias
    if combine == "linear":  # no softmax is taken outside protected rows
        lse = torch.where(protected[:, 0], lse, torch.full_like(lse, -math.inf))
    o = o_l if combine == "linear" else o_s + o_l
    return torch.where(protected, o_s, o), lse


def to_pairs(block_map: Tensor, q_tokens: Tokens, k_tokens: Tokens) -> Tensor:
    """What a block map says of each pair of tokens."""
    return block_map[..., torch.from_numpy(q_tokens.block), :][
        ..., torch.from_numpy(k_tokens.block)
    ]


def spread_alpha(alpha_logit: Tensor, shape: str, tokens: Tokens) -> Tensor:
    """alpha_logit (H, 1 or places) for each query, (H, N_q).

    Places that were learned for another number of blocks or tokens are interpolated linearly, end
    to end, in each sequence of its own. ``shape`` is "block" or "token".
    """
    if alpha_logit.shape[1] == 1:
        return alpha_logit.expand(-1, len(tokens.block))
    columns = []
    for n in range(len(tokens.block)):
        mates = np.flatnonzero(tokens.sequence == tokens.sequence[n])
        if shape == "token":
            index, total = mates.tolist().index(n), len(mates)
        else:
            blocks = sorted(set(tokens.block[mates].tolist()))
            index, total = blocks.index(tokens.block[n]), len(blocks)
        last = alpha_logit.shape[1] - 1
        x = 0.0 if total == 1 else index * last / (total - 1)
        low = min(int(x), last)
        high = min(low + 1, last)
        columns.append(alpha_logit[:, low] * (1 - (x - low)) + alpha_logit[:, high] * (x - low))
    return torch.stack(columns, dim=1)


# Low bits ---------------------------------------------------------------------------------------


def _e4m3_values() -> np.ndarray:
    """What the 127 non-negative codes of e4m3 mean, in order; the 128th is NaN."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 512 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.array(values)


_E4M3 = _e4m3_values()
_E4M3_MIDDLES = (_E4M3[:-1] + _E4M3[1:]) / 2


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest value of e4m3, halves to the even code, saturating at 448."""
    magnitude = x.abs().double().numpy()
    code = np.searchsorted(_E4M3_MIDDLES, magnitude, side="left")  # a middle goes to the lower code
    is_middle = magnitude == _E4M3_MIDDLES[np.minimum(code, len(_E4M3_MIDDLES) - 1)]
    code = np.where(is_middle & (code % 2 == 1), code + 1, code)
    return torch.from_numpy(_E4M3[code]).to(x.dtype) * x.sign()


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in [-127, 127] and the step, one per leading index over the last two dimensions."""
    step = x.abs().amax(dim=(-1, -2), keepdim=True) / 127
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (x / step).round().clamp(-127, 127), step


def low_bit_scores(
    q: Tensor, k: Tensor, q_tokens: Tokens, k_tokens: Tokens, scale: float, q_rows: int
) -> Tensor:
    """scale q k^T of quantised q and k, (B, H, N_q, N_k); k has all heads of q."""
    q_int, k_int, q_step, k_step = (torch.zeros_like(x) for x in (q, k, q, k))
    for i in range(q_tokens.num_blocks):
        rows = q_tokens.rows(i)
        size = q_rows or len(rows)
        for begin in range(0, len(rows), size):
            group = torch.from_numpy(rows[begin : begin + size])
            q_int[:, :, group], q_step[:, :, group] = to_int8(q[:, :, group])
    for j in range(k_tokens.num_blocks):
        rows = torch.from_numpy(k_tokens.rows(j))
        k_int[:, :, rows], k_step[:, :, rows] = to_int8(k[:, :, rows])
    product = torch.einsum("bhqd,bhkd->bhqk", q_int, k_int)
    return product * q_step[..., :1] * k_step[..., 0][:, :, None] * scale


class LowBitBranch(torch.autograd.Function):
    """o_s and lse with INT8 q k^T and e4m3 p v, walking tiles; the published backward, which is
    that of exact arithmetic but for the o and lse that it is given."""

    @staticmethod
    def forward(ctx, q, k, v, seen, q_tokens, k_tokens, scale, options, visits):  # type: ignore
        head = group_of(q.shape[1], k.shape[1])
        q, k, v = q.detach(), k.detach()[:, head], v.detach()[:, head]
        scores = low_bit_scores(q, k, q_tokens, k_tokens, scale, options["q_rows"])
        v_step = torch.ones_like(v)
        for s in set(k_tokens.sequence.tolist()):
            rows = torch.from_numpy(np.flatnonzero(k_tokens.sequence == s))
            top = v[:, :, rows].abs().amax(dim=2, keepdim=True) / options["v_range"]
            v_step[:, :, rows] = torch.where(top > 0, top, torch.ones_like(top))
        v_small = to_e4m3(v / v_step)
        o = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], -math.inf)
        for i in range(q_tokens.num_blocks):
            rows = torch.from_numpy(q_tokens.rows(i))
            top = q.new_full((*q.shape[:2], len(rows), 1), -math.inf)
            total, sums = torch.zeros_like(top), torch.zeros_like(q[:, :, rows])
            for j in visits[i] if visits else range(k_tokens.num_blocks):
                columns = torch.from_numpy(k_tokens.rows(j))
                tile_seen = seen[:, :, rows][..., columns]
                tile = scores[:, :, rows][..., columns]
                tile = torch.where(tile_seen, tile, torch.full_like(tile, -math.inf))
                new_top = torch.maximum(top, tile.amax(dim=-1, keepdim=True))
                safe = torch.where(new_top.isfinite(), new_top, torch.zeros_like(new_top))
                shrink = (top - safe).exp()
                p = (tile - safe).exp()
                total = total * shrink + p.sum(dim=-1, keepdim=True)
                p_small = to_e4m3(p * options["p_range"])
                sums = sums * shrink + p_small @ v_small[:, :, columns]
                top = new_top
            total_or_one = torch.where(total > 0, total, torch.ones_like(total))
            step = v_step[:, :, _any_key(q_tokens, k_tokens, i)]  # one for the whole sequence
            o[:, :, rows] = sums / total_or_one * step / options["p_range"]
            lse[:, :, rows] = torch.where(total > 0, top + total.log(), top).squeeze(-1)
        exact_lse = lse
        if options["recompute_lse"]:
            exact_lse = softmax_branch(q, k, v, seen.to(q.dtype), scale, True)[1]
        ctx.save_for_backward(q, k, v, seen, o, exact_lse)
        ctx.scale, ctx.num_kv_heads = scale, int(head.max()) + 1
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, d_lse):  # type: ignore[no-untyped-def]
        q, k, v, seen, o, lse = ctx.saved_tensors
        scores = ctx.scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
        p = torch.where(seen, (scores - lse[..., None]).exp(), torch.zeros_like(scores))
        d_p = torch.einsum("bhqd,bhkd->bhqk", d_o, v)
        d_s = p * (d_p - (d_o * o).sum(dim=-1, keepdim=True))
        d_q = ctx.scale * torch.einsum("bhqk,bhkd->bhqd", d_s, k)
        d_k = ctx.scale * torch.einsum("bhqk,bhqd->bhkd", d_s, q)
        d_v = torch.einsum("bhqk,bhqd->bhkd", p, d_o)
        shared = (ctx.num_kv_heads, -1)
        d_k, d_v = (x.unflatten(1, shared).sum(dim=2) for x in (d_k, d_v))
        return d_q, d_k, d_v, *[None] * 6


def _any_key(q_tokens: Tokens, k_tokens: Tokens, block: int) -> list[int]:
    """One key of the sequence of a query block, as an index; any key where it has none."""
    keys = np.flatnonzero(k_tokens.sequence == q_tokens.sequence_of(block))
    return [int(keys[0]) if len(keys) else 0]


# Routers ----------------------------------------------------------------------------------------


def pooled_scores(
    q: Tensor,
    k: Tensor,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scale: float,
    proj_q: Tensor | None = None,
    proj_k: Tensor | None = None,
) -> Tensor:
    """scale x mean q . mean k for every pair of blocks, (B, H, T_m, T_n); with matrices (D, D) or
    (H, D, D) both means go through them first."""
    u, w = means(q, q_tokens), means(k, k_tokens)[:, group_of(q.shape[1], k.shape[1])]
    if proj_q is not None and proj_k is not None:
        u = torch.einsum("bhid,hed->bhie", u, proj_q.expand(q.shape[1], -1, -1))
        w = torch.einsum("bhjd,hed->bhje", w, proj_k.expand(q.shape[1], -1, -1))
    return scale * torch.einsum("bhid,bhjd->bhij", u, w)


def soft_top_k(scores: Tensor, kappa: float, temperature: float) -> Tensor:
    """m = sigmoid(x / tau + lambda) along the last dimension, sum m = kappa.

    lambda comes from bisection, then takes one step of Newton's method that autograd sees: it
    changes nothing but has the derivative of the implicit function.
    """
    if kappa >= scores.shape[-1]:
        return torch.ones_like(scores) + 0 * scores
    y = scores / temperature
    with torch.no_grad():
        low, high = (-y.amax(dim=-1, keepdim=True) - 800, -y.amin(dim=-1, keepdim=True) + 800)
        for _ in range(200):
            middle = (low + high) / 2
            is_low = torch.sigmoid(y + middle).sum(dim=-1, keepdim=True) < kappa
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        shift = (low + high) / 2
        m = torch.sigmoid(y + shift)
        slope = (m * (1 - m)).sum(dim=-1, keepdim=True).clamp(min=1e-12)
    excess = torch.sigmoid(y + shift).sum(dim=-1, keepdim=True) - kappa
    return torch.sigmoid(y + shift - excess / slope)


def soft_map(
    scores: Tensor,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    keep_ratio: float,
    temperature: float,
    softmax: bool,
) -> Tensor:
    """SoftTop-k over the unprotected key blocks of each query block's sequence; 1 and 0 elsewhere
    are the overlay's business."""
    rows = []
    for i in range(q_tokens.num_blocks):
        free = [
            j
            for j in range(k_tokens.num_blocks)
            if k_tokens.sequence_of(j) == q_tokens.sequence_of(i) and not k_tokens.is_protected(j)
        ]
        row = torch.zeros_like(scores[:, :, i])
        if free:
            x = scores[:, :, i][..., free]
            x = torch.softmax(x, dim=-1) if softmax else x
            kappa = max(1.0, keep_ratio * len(free))  # at least one, as in the hard map
            row = row.index_copy(-1, torch.tensor(free), soft_top_k(x, kappa, temperature))
        rows.append(row)
    return torch.stack(rows, dim=2)


def counts(
    total: int, keep_ratio: float, negligible_ratio: float, rounding: str
) -> tuple[int, int]:
    """How many of ``total`` blocks are critical and negligible."""
    critical = min(total, max(1, _count(keep_ratio, total, rounding)))
    return critical, min(total - critical, _count(negligible_ratio, total, rounding))


def _count(ratio: float, total: int, rounding: str) -> int:
    x = float(ratio) * float(total)
    if rounding == "floor":
        return int(x)
    whole = int(x)
    fraction = x - whole
    return whole + (1 if (fraction >= 0.5 if rounding == "round" else fraction > 0) else 0)


def classify(scores: Sequence[float], num_critical: int, num_negligible: int) -> list[int]:
    """Classes of one row of scores by the total order: score falling, index rising, NaN last."""
    order = sorted(
        range(len(scores)),
        key=lambda j: (math.isnan(scores[j]), 0 if math.isnan(scores[j]) else -scores[j], j),
    )
    classes = [0] * len(scores)
    for rank, j in enumerate(order):
        if rank < num_critical:
            classes[j] = 1
        elif rank >= len(scores) - num_negligible:
            classes[j] = -1
    return classes


def similarities(x: Tensor, tokens: Tokens) -> np.ndarray:
    """The mean cosine of all pairs of rows of each block, a row with itself included, (B, H, T)."""
    found = []
    for n in range(tokens.num_blocks):
        rows = x[:, :, torch.from_numpy(tokens.rows(n))]
        lengths = rows.norm(dim=-1, keepdim=True)
        unit = rows / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        found.append((unit @ unit.mT).mean(dim=(-1, -2)))
    return torch.stack(found, dim=-1).double().numpy()


def _critical_bounds(
    scores: np.ndarray, num_critical: int, rules: dict[str, Any], tolerance: float
) -> tuple[int, int]:
    """The fewest and the most critical blocks of one row of ranked scores that the rules allow."""
    total = len(scores)
    selection = rules.get("selection", "top_k")
    top_k = min(num_critical, total)
    if selection == "top_k":
        return top_k, top_k
    p = np.sort(np.exp(scores - scores.max()))[::-1]
    sums = np.cumsum(p) / p.sum()
    tolerance = 1e-5 + 10 * tolerance

    def prefix(mass: float) -> int:
        if rules.get("longest_prefix", False):  # the longest whose sum is at most the mass
            return max(1, int((sums <= mass).sum()))
        return min(total, int((sums < mass).sum()) + 1)  # the shortest that reaches it

    low, high = prefix(rules["keep_mass"] - tolerance), prefix(rules["keep_mass"] + tolerance)
    if selection == "union":
        return max(low, top_k), max(high, top_k)
    if selection == "intersection":
        return min(low, top_k), min(high, top_k)
    return low, high


def check_map(
    block_map: Tensor,
    scores: Tensor,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    keep_ratio: float,
    negligible_ratio: float,
    rounding: str,
    tolerance: float,
    keep_count: int | None = None,
    similarity: tuple[np.ndarray, np.ndarray] | None = None,
    **rules: Any,
) -> None:
    """Asserts counts and order of a whole map; scores closer than ``tolerance`` may swap.

    ``similarity`` holds how much above the least similarity each query and key block is; blocks
    below zero are computed in full, and those within the tolerance may go either way.
    """
    classes, all_scores = block_map.numpy(), scores.detach().double().numpy()
    k_sequence = np.array([k_tokens.sequence_of(j) for j in range(k_tokens.num_blocks)])
    k_protected = np.array([k_tokens.is_protected(j) for j in range(k_tokens.num_blocks)])
    for i in range(q_tokens.num_blocks):
        same = k_sequence == q_tokens.sequence_of(i)
        row = classes[:, :, i]
        assert (row[..., ~same] == -1).all(), f"row {i}: another sequence is not -1"
        if q_tokens.is_protected(i):
            assert (row[..., same] == 1).all(), f"row {i}: a protected query row is not all 1"
            continue
        assert (row[..., same & k_protected] == 1).all(), f"row {i}: protected keys are not 1"
        free = np.flatnonzero(same & ~k_protected)
        num_critical, _ = counts(len(free), keep_ratio, negligible_ratio, rounding)
        num_negligible = _count(negligible_ratio, len(free), rounding)
        if keep_count is not None:
            num_critical = min(keep_count, len(free))
        for b, h in np.ndindex(*row.shape[:2]):
            if not len(free):
                continue
            picked, ranked = row[b, h, free], np.ones(len(free), dtype=bool)
            where = f"batch {b}, head {h}, row {i}"
            if similarity is not None:
                q_margin, k_margin = similarity[0][b, h, i], similarity[1][b, h, free]
                if min(abs(q_margin), np.abs(k_margin).min()) < 1e-5:
                    continue
                if q_margin < 0:
                    assert (picked == 1).all(), f"{where}: unlike queries are not computed in full"
                    continue
                ranked = k_margin > 0
                assert (picked[~ranked] == 1).all(), f"{where}: unlike keys are not computed"
                if not ranked.any():
                    continue
            picked, score = picked[ranked], all_scores[b, h, i, free][ranked]
            low, high = _critical_bounds(score, num_critical, rules, tolerance)
            found = int((picked == 1).sum())
            assert low <= found <= high, f"{where}: {found} critical, not {low}..{high}"
            rest = min(len(score) - found, num_negligible)
            assert (picked == -1).sum() == rest, f"{where}: negligible count"
            for upper, lower in ((picked == 1, picked != 1), (picked != -1, picked == -1)):
                lowest = np.where(upper, score, np.inf).min(initial=np.inf)
                highest = np.where(lower, score, -np.inf).max(initial=-np.inf)
                assert lowest >= highest - tolerance, f"{where}: wrong order"


class Choice(NamedTuple):
    """Of a chunk router: which keys each query attends, (B, H, N_q, N_k), and the queries for which
    rounding may turn a choice, (B, H, N_q)."""

    kept: Tensor
    unsure: Tensor


def choose_chunks(
    q: Tensor,
    k: Tensor,
    q_groups: np.ndarray,
    q_chunks: np.ndarray,
    k_chunks: np.ndarray,
    q_sequence: np.ndarray,
    *,
    mode: str,
    threshold: float,
    num_chunks: int | None,
    tolerance: float = 1e-4,
) -> Choice:
    """VMoBA, one query at a time. ``q_groups`` numbers the queries that choose together (pooled
    queries), ``*_chunks`` the chunk of every token, over all sequences."""
    batch, heads, num_queries, _ = q.shape
    keys = k.double()[:, group_of(heads, k.shape[1])]
    queries = q.double()
    chunk_ids = sorted(set(k_chunks.tolist()))
    chunk_means = torch.stack(
        [keys[:, :, torch.from_numpy(k_chunks == c)].mean(dim=2) for c in chunk_ids], dim=2
    )
    groups = sorted(set(q_groups.tolist()))
    members = [np.flatnonzero(q_groups == g) for g in groups]
    pooled = torch.stack([queries[:, :, torch.from_numpy(r)].mean(dim=2) for r in members], dim=2)
    gate = torch.einsum("bhgd,bhcd->bhgc", pooled, chunk_means).numpy()
    sequence_of_chunk = {int(c): int(s) for c, s in zip(q_chunks, q_sequence, strict=True)}
    chosen = np.zeros(gate.shape, dtype=bool)
    unsure = np.zeros(gate.shape[:3], dtype=bool)
    own = [{chunk_ids.index(c) for c in q_chunks[r].tolist()} for r in members]
    legal = [
        [
            n
            for n, c in enumerate(chunk_ids)
            if sequence_of_chunk[c] == int(q_sequence[members[g][0]])
        ]
        for g in range(len(groups))
    ]
    for b in range(batch):
        for s in sorted(set(q_sequence.tolist())):
            rows = [g for g in range(len(groups)) if int(q_sequence[members[g][0]]) == s]
            everything = [(h, g) for h in range(heads) for g in rows]
            pools = {
                "query_head": [[pair] for pair in everything],
                "head_global": [[(h, g) for g in rows] for h in range(heads)],
                "overall": [everything],
            }["query_head" if num_chunks is not None else mode]
            for pool in pools:
                entries = [(h, g, c) for h, g in pool for c in legal[g]]
                _choose(
                    entries,
                    gate[b],
                    own,
                    chosen[b],
                    unsure[b],
                    threshold,
                    num_chunks,
                    wants_another=num_chunks is None and mode == "query_head",
                    tolerance=tolerance,
                )
    kept = np.zeros((batch, heads, num_queries, len(k_chunks)), dtype=bool)
    doubt = np.zeros((batch, heads, num_queries), dtype=bool)
    column = np.array([chunk_ids.index(c) for c in k_chunks.tolist()])
    for g, rows_of_group in enumerate(members):
        kept[:, :, rows_of_group] = chosen[:, :, g][..., None, :][..., column]
        doubt[:, :, rows_of_group] = unsure[:, :, g][..., None]
    return Choice(torch.from_numpy(kept), torch.from_numpy(doubt))


def _choose(
    entries: list[tuple[int, int, int]],
    gate: np.ndarray,
    own: list[set[int]],
    chosen: np.ndarray,
    unsure: np.ndarray,
    threshold: float,
    num_chunks: int | None,
    wants_another: bool,
    tolerance: float,
) -> None:
    """Entries (head, group, chunk) that are ranked together: the shortest prefix whose share of the
    min-max normalised gate reaches the threshold, or ``num_chunks``, and all own chunks."""
    values = np.array([gate[entry] for entry in entries])
    spread = values.max() - values.min()
    share = (values - values.min()) / spread if spread > 0 else np.ones(len(values))
    share = share / share.sum()
    order = sorted(range(len(entries)), key=lambda n: (-values[n], n))
    is_own = np.array([c in own[g] for _, g, c in entries])
    doubtful = set()
    if num_chunks is None:
        count, gathered = 1, share[order[0]]
        while count < len(order) and gathered < threshold:
            if threshold - gathered < tolerance:
                doubtful.add(order[count])
            gathered += share[order[count]]
            count += 1
        if gathered - threshold < tolerance:
            doubtful.update(order[count : count + 1])
    else:
        count = min(num_chunks, len(order))
    kept = set(order[:count]) | set(np.flatnonzero(is_own).tolist())
    others = [n for n in order if not is_own[n]]
    cuts = [order[count - 1 : count + 1]]
    if wants_another and others and not kept & set(others):
        kept.add(others[0])
        cuts.append(others[:2])
    for pair in cuts:  # who is just inside and who just outside
        near = values[pair[0]] - values[pair[-1]]
        reach = tolerance * (1 + abs(values[pair[0]]))
        if 0 < near < reach:
            doubtful |= {n for n in order if abs(values[n] - values[pair[0]]) < 2 * reach}
    for n in kept:
        chosen[entries[n]] = True
    for n in doubtful:
        unsure[entries[n][:2]] = True


# Tiles that are skipped in the loop -------------------------------------------------------------


def tile_orders(name: str, q_tokens: Tokens, k_tokens: Tokens) -> list[list[int]]:
    """For each query block, in which order it visits the key blocks of its sequence."""
    rows, columns = (dict(zip(t.block, t.sequence, strict=True)) for t in (q_tokens, k_tokens))

    def visits(block: int, sequence: int) -> list[int]:
        own = [n for n in sorted(rows) if rows[n] == sequence]
        keys = [n for n in sorted(columns) if columns[n] == sequence]
        middle = Fraction(2 * own.index(block) + 1, 2) * len(keys) / len(own) - Fraction(1, 2)

        def rank(j: int) -> tuple[Fraction, ...]:
            if name == "ascending":
                return (Fraction(j),)
            if name == "reverse":
                return (Fraction(-j),)
            is_sink = name == "sink_first" and j == 0
            return (Fraction(-1) if is_sink else abs(j - middle), Fraction(j))

        return [keys[j] for j in sorted(range(len(keys)), key=rank)]

    return [visits(block, rows[block]) for block in sorted(rows)]


def kept_tiles(kept_bits: Tensor, num_columns: int) -> np.ndarray:
    """Packed bits as bool (B, H, rows of bits, T_n)."""
    flags = np.unpackbits(kept_bits.numpy(), axis=-1, bitorder="little")
    assert not flags[..., num_columns:].any(), "bits behind the last tile are set"
    return flags[..., :num_columns].astype(bool)


def kept_pairs(
    kept: np.ndarray, q_tokens: Tokens, k_tokens: Tokens, block_q: int, group_rows: int
) -> Tensor:
    """Kept tiles as pairs of tokens, bool (B, H, N_q, N_k)."""
    groups = -(-block_q // group_rows)
    row = q_tokens.block * groups + q_tokens.row_in_block // group_rows
    return torch.from_numpy(kept[:, :, row][..., k_tokens.block])


def check_skips(
    kept: np.ndarray,
    row_votes: Tensor,
    scores: Tensor,
    q_tokens: Tokens,
    k_tokens: Tokens,
    visits: Sequence[Sequence[int]],
    *,
    reference: str,
    log_threshold: float,
    block_q: int,
    group_rows: int,
    slack: float,
) -> None:
    """Walks the tiles as the package did and asserts each of its decisions; tests that come within
    ``slack`` of the threshold may go either way. scores (B, H, N_q, N_k), kept (B, H, T_m G, T_n).
    """
    s = scores.detach().double().numpy()
    groups = -(-block_q // group_rows)
    for b, h in np.ndindex(*s.shape[:2]):
        for i in range(q_tokens.num_blocks):
            rows = q_tokens.rows(i)
            where = f"batch {b}, head {h}, query block {i}"
            top, energy = np.full(len(rows), -np.inf), np.zeros(len(rows))
            least_votes = most_votes = 0
            assert not kept[b, h, i * groups + -(-len(rows) // group_rows) : (i + 1) * groups].any()
            for j in visits[i]:
                bits = kept[b, h, i * groups : (i + 1) * groups, j]
                if k_tokens.sequence_of(j) != q_tokens.sequence_of(i):
                    assert not bits.any(), f"{where}, tile {j}: another sequence is kept"
                    continue
                is_forced = k_tokens.is_protected(j) or q_tokens.is_protected(i)
                tile = s[b, h][rows][:, k_tokens.rows(j)]
                best = tile.max(axis=1)
                with np.errstate(divide="ignore"):
                    base = top if reference == "running_max" else top + np.log(energy)
                margin = np.where(np.isfinite(base), best - base - log_threshold, np.inf)
                if is_forced:
                    margin[:] = np.inf
                least_votes += int((margin < -slack).sum())
                most_votes += int((margin < slack).sum())
                for g, begin in enumerate(range(0, len(rows), group_rows)):
                    part = slice(begin, begin + group_rows)
                    largest = margin[part].max()
                    if abs(largest) > slack:
                        assert bits[g] == (largest > 0), (
                            f"{where}, tile {j}, group {g}: kept is {bits[g]}, and the largest "
                            f"margin over the threshold {largest:.3e}"
                        )
                    if bits[g]:
                        new_top = np.maximum(top[part], best[part])
                        energy[part] = energy[part] * np.exp(top[part] - new_top) + np.exp(
                            tile[part] - new_top[:, None]
                        ).sum(axis=1)
                        top[part] = new_top
            votes = row_votes[b, h, i].item()
            assert least_votes <= votes <= most_votes, (
                f"{where}: {votes} votes, not {least_votes}..{most_votes}"
            )


# Video sparse attention -------------------------------------------------------------------------


def coarse_branch(
    q: Tensor, k: Tensor, v: Tensor, q_tokens: Tokens, k_tokens: Tokens, scale: float
) -> Tensor:
    """Dense attention among the means of blocks, the same for all tokens of a block."""
    head = group_of(q.shape[1], k.shape[1])
    pooled = means(q, q_tokens), means(k, k_tokens)[:, head], means(v, k_tokens)[:, head]
    q_sequence = [q_tokens.sequence_of(i) for i in range(q_tokens.num_blocks)]
    k_sequence = [k_tokens.sequence_of(j) for j in range(k_tokens.num_blocks)]
    m = torch.tensor([[a == b for b in k_sequence] for a in q_sequence]).to(q.dtype)
    m = m.expand(*q.shape[:2], -1, -1)
    o, _ = softmax_branch(*pooled, m, scale, hides=True)
    return o[:, :, torch.from_numpy(q_tokens.block)]
