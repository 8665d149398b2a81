# SPDX-License-Identifier: Apache-2.0
"""Renders the table of docs/methods.md: what each method can do, asked of plan() and tried.

A cell is "yes" if the plan finds a backend and, on the CPU, a small call runs forward and backward
with finite results; "no" if the library refuses it with an error of its own. Anything else is a
bug, and ends the script.

python tools/method_table.py [--check]      --check fails if the page is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import sparline
from sparline.methods import BlockRouter, ChunkRouter, Method, Recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
START = "<!-- from here: tools/method_table.py -->\n"
GRID = sparline.Grid(4, 8, 8)
N = GRID.length

#: What is asked of each method, beyond a plain forward and backward.
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {"cu_seqlens_q": [0, N, 2 * N]},
    "protected": {"protected_q": [(0, 7)], "protected_k": [(0, 7)]},
    "grouped heads": {"kv_heads": 1},
    "low-bit": {"low_bit": True},
    "token order": {"token_order": "hilbert"},
}
COLUMNS = ["forward", "backward", "CPU", "CUDA", *VARIANTS]


def make(name: str, **options: Any) -> Method:
    if name in ("dynsparse", "blasst"):
        options["log_threshold"] = -4.0
    return sparline.method(name, **options)


def tensors(num_rows: int, num_heads: int) -> torch.Tensor:
    return torch.randn(1, num_heads, num_rows, 16, requires_grad=True)


def ask(name: str, kv_heads: int = 2, **asked: Any) -> tuple[bool, bool]:
    """Whether a forward and a backward run."""
    call = {key: asked.pop(key) for key in list(asked) if key.startswith(("cu_", "protected"))}
    num_rows = call.get("cu_seqlens_q", [N])[-1]
    q, k, v = tensors(num_rows, 2), tensors(num_rows, kv_heads), tensors(num_rows, kv_heads)
    try:
        method = make(name, **asked)
        if "backend: none" in sparline.explain(q, k, method=method, grid=GRID, **call):
            return False, False
        o = sparline.attention(q, k, v, method=method, grid=GRID, **call)
    except (ValueError, NotImplementedError):
        return False, False
    gradients = torch.autograd.grad(o.square().sum(), (q, k, v))
    assert o.isfinite().all(), f"{name} {asked} {call}: o is not finite"
    assert all(g.isfinite().all() for g in gradients), f"{name} {asked} {call}: gradients"
    return True, any(bool(g.any()) for g in gradients)


def runs_on_cuda(name: str) -> bool:
    q = tensors(N, 2)
    return "backend: none" not in sparline.explain(
        q, q, method=make(name), grid=GRID, device="cuda"
    )


def cells(name: str) -> list[str]:
    forward, backward = ask(name)
    answers = [forward, backward, forward, runs_on_cuda(name)]
    answers += [all(ask(name, **variant)) for variant in VARIANTS.values()]
    return ["yes" if answer else "no" for answer in answers]


def parts(recipe: Recipe) -> list[str]:
    """Router, tile policy and combination, in a few words."""
    router = "every block"
    if isinstance(recipe.router, BlockRouter):
        names = {
            "top_k": "top-k",
            "top_p": "top-p",
            "union": "top-k or top-p",
            "intersection": "top-k and top-p",
        }
        router = ("learned " if recipe.combine == "blend" else "") + names[recipe.router.selection]
        if recipe.router.min_similarity is not None:
            router += " of alike blocks"
    elif isinstance(recipe.router, ChunkRouter):
        who = "query block" if recipe.router.pool_queries else "token"
        router = f"chunks for each {who}"
    elif recipe.combine == "linear":
        router = "none"
    policy = "-"
    if recipe.skip is not None:
        against = {"kept_lse": "kept lse", "running_max": "running max"}[recipe.skip.reference]
        policy = f"skip below {against}"
    elif isinstance(recipe.router, ChunkRouter) and not recipe.router.pool_queries:
        policy = "a bit for each row"
    combine = {
        "sparse": "o_s",
        "linear": "o_l",
        "sum": "o_s + o_l",
        "projection": "o_s + o_l Wᵀ + b",
        "blend": "α o_s + (1 − α) o_l",
    }[recipe.combine]
    if recipe.has_coarse_branch:
        combine = "G_c o_c + G_f o_s"
    scope = f" ({recipe.linear_scope})" if recipe.has_linear_branch else ""
    return [router, policy, combine + scope]


def learned(method: Method) -> str:
    module = sparline.nn.module_for(method, head_dim=16, num_heads=2, hidden_dim=32)
    names = dict.fromkeys(name.split(".")[0] for name, _ in module.named_parameters())
    return ", ".join(f"`{name}`" for name in names) or "-"


def render() -> str:
    lines = [
        START,
        "| name | router | tile policy | combination | learned |",
        "|---|---|---|---|---|",
    ]
    for name in sparline.METHODS:
        method = make(name)
        row = [f"`{name}`", *parts(method.recipe), learned(method)]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "| name | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| `{name}` | " + " | ".join(cells(name)) + " |" for name in sparline.METHODS]
    lines += ["", "What each is:", ""]
    lines += [f"- `{name}`: {sparline.methods.summary(name)}" for name in sparline.METHODS]
    return "\n".join(lines) + "\n"


def main() -> int:
    torch.manual_seed(0)
    text = PAGE.read_text()
    page = text.split(START)[0] + render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
        print(f"wrote {PAGE}")
    elif text != page:
        print(f"{PAGE} is not what the library says. Run: python tools/method_table.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
