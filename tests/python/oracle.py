# SPDX-License-Identifier: Apache-2.0
"""The second definition: dense, N x N, one token at a time where order matters.

Written from docs/math.md alone and sharing no code with the package, so that a mistake would have
to be made twice. Blocks exist only as a number per token; both branches are full N x N products
under expanded masks. Gradients come from autograd.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Tokens:
    """Per token of one axis: its block, its sequence, whether it is protected."""

    def __init__(
        self,
        length: int,
        block_rows: int,
        offsets: Sequence[int] | None,
        spans: Sequence[tuple[int, int]],
    ) -> None:
        starts = set(offsets[:-1]) if offsets else {0}
        borders = starts | {row for begin, end in spans if end > begin for row in (begin, end)}
        self.block = np.zeros(length, dtype=np.int64)
        self.sequence = np.zeros(length, dtype=np.int64)
        self.protected = np.zeros(length, dtype=bool)
        block, rows_in_block = -1, 0
        for n in range(length):
            if n in borders or rows_in_block == block_rows or n == 0:
                block, rows_in_block = block + 1, 0
            rows_in_block += 1
            self.block[n] = block
            if offsets:  # the last sequence that starts at or before this token
                self.sequence[n] = max(s for s, start in enumerate(offsets[:-1]) if start <= n)
            self.protected[n] = any(begin <= n < end for begin, end in spans)
        self.num_blocks = block + 1


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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor | None,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    scale: float,
    combine: str,
    feature_map: str = "softmax",
    scope: str = "marginal",
    epsilon: float = 0.0,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    feature_weights: Sequence[Tensor | None] = (None, None, None, None),
) -> tuple[Tensor, Tensor]:
    """o and lse in the dtype of the arguments, all (B, H, N, D); weights as in SLAWeights."""
    head = torch.arange(q.shape[1]) * k.shape[1] // q.shape[1]  # kv head of every query head
    visible = torch.from_numpy(q_tokens.sequence[:, None] == k_tokens.sequence[None, :])
    forced = torch.from_numpy(q_tokens.protected[:, None] | k_tokens.protected[None, :])
    if block_map is None:
        cls = torch.ones(q.shape[:3] + k.shape[2:3], dtype=torch.int8)
    else:
        cls = block_map[..., q_tokens.block, :][..., k_tokens.block]
    critical = visible & (forced | (cls == 1))  # (B,H,N_q,N_k)

    scores = scale * torch.einsum("bhqd,bhkd->bhqk", q, k[:, head])
    hidden = torch.full_like(scores, -math.inf)
    any_key = critical.any(dim=-1, keepdim=True)
    p = torch.softmax(torch.where(critical | ~any_key, scores, hidden), dim=-1)
    o_s = torch.einsum("bhqk,bhkd->bhqd", p * any_key, v[:, head])
    lse = torch.logsumexp(torch.where(critical, scores, hidden).detach(), dim=-1)
    if combine == "sparse":
        return o_s, lse

    in_scope = {
        "marginal": visible & ~forced & (cls == 0),
        "complement": visible & ~critical,
        "all": visible & torch.ones_like(critical),
    }[scope]
    weight_q, bias_q, weight_k, bias_k = feature_weights
    phi_q = features(q, feature_map, weight_q, bias_q)
    phi_k = features(k, feature_map, weight_k, bias_k)[:, head]
    a = torch.einsum("bhqf,bhkf->bhqk", phi_q, phi_k) * in_scope
    denominator = a.sum(dim=-1, keepdim=True) + epsilon
    good = (denominator > 0) & denominator.isfinite() & in_scope.any(dim=-1, keepdim=True)
    a = a * good / torch.where(good, denominator, torch.ones_like(denominator))
    o_l = torch.einsum("bhqk,bhkd->bhqd", a, v[:, head])
    if combine == "projection":
        o_l = torch.einsum("bhqd,ed->bhqe", o_l, proj_weight)
        if proj_bias is not None:
            o_l = o_l + proj_bias
    protected = torch.from_numpy(q_tokens.protected)
    if combine == "linear":  # no softmax is taken outside protected rows
        lse = torch.where(protected, lse, torch.full_like(lse, -math.inf))
    o = o_l if combine == "linear" else o_s + o_l
    return torch.where(protected[:, None], o_s, o), lse


def pooled_scores(
    q: Tensor, k: Tensor, q_tokens: Tokens, k_tokens: Tokens, scale: float
) -> np.ndarray:
    """scale x mean q . mean k for every pair of blocks, float64 (B, H, T_m, T_n)."""
    q_rows, k_rows = q.double().numpy(), k.double().numpy()
    means = [
        np.stack([x[:, :, t.block == n].mean(axis=2) for n in range(t.num_blocks)], axis=2)
        for x, t in ((q_rows, q_tokens), (k_rows, k_tokens))
    ]
    group = q.shape[1] // k.shape[1]
    return scale * np.einsum("bhid,bhjd->bhij", means[0], np.repeat(means[1], group, axis=1))


def counts(
    total: int, keep_ratio: float, negligible_ratio: float, rounding: str
) -> tuple[int, int]:
    """How many of ``total`` blocks are critical and negligible."""

    def count(ratio: float) -> int:
        x = float(ratio) * float(total)
        if rounding == "floor":
            return int(x)
        whole = int(x)
        fraction = x - whole
        return whole + (1 if (fraction >= 0.5 if rounding == "round" else fraction > 0) else 0)

    critical = min(total, max(1, count(keep_ratio)))
    return critical, min(total - critical, count(negligible_ratio))


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


def check_map(
    block_map: Tensor,
    scores: np.ndarray,
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    keep_ratio: float,
    negligible_ratio: float,
    rounding: str,
    tolerance: float,
) -> None:
    """Asserts counts and order of a whole map; scores closer than ``tolerance`` may swap."""
    classes = block_map.numpy()
    first_q = [int(np.flatnonzero(q_tokens.block == i)[0]) for i in range(q_tokens.num_blocks)]
    first_k = [int(np.flatnonzero(k_tokens.block == j)[0]) for j in range(k_tokens.num_blocks)]
    k_sequence, k_protected = k_tokens.sequence[first_k], k_tokens.protected[first_k]
    for i, token in enumerate(first_q):
        same = k_sequence == q_tokens.sequence[token]
        row = classes[:, :, i]
        assert (row[..., ~same] == -1).all(), f"row {i}: another sequence is not -1"
        if q_tokens.protected[token]:
            assert (row[..., same] == 1).all(), f"row {i}: a protected query row is not all 1"
            continue
        assert (row[..., same & k_protected] == 1).all(), f"row {i}: protected keys are not 1"
        free = same & ~k_protected
        num_critical, num_negligible = counts(
            int(free.sum()), keep_ratio, negligible_ratio, rounding
        )
        picked, score = row[..., free], scores[:, :, i][..., free]
        assert ((picked == 1).sum(axis=-1) == num_critical).all(), f"row {i}: critical count"
        assert ((picked == -1).sum(axis=-1) == num_negligible).all(), f"row {i}: negligible count"
        for upper, lower in ((picked == 1, picked != 1), (picked != -1, picked == -1)):
            lowest = np.where(upper, score, np.inf).min(axis=-1, initial=np.inf)
            highest = np.where(lower, score, -np.inf).max(axis=-1, initial=-np.inf)
            assert (lowest >= highest - tolerance).all(), f"row {i}: wrong order"
