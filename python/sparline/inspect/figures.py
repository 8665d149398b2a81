# SPDX-License-Identifier: Apache-2.0
"""The plots of a report. Each is drawn once and kept in two forms: SVG whose ink follows the page's
theme, and PNG on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .measure import Heads, Measurement

#: Stands for the ink of the page, and is replaced by it in SVG.
INK = "#010203"
#: Mid-tones that read on white and on black.
BLUE, ORANGE, GREEN, RED, VIOLET, GREY = (
    "#3a86d0",
    "#e0851b",
    "#2f9e6e",
    "#d1495b",
    "#8f68c9",
    "#8a9099",
)
ORDER_COLOURS = {"raster": BLUE, "cubes": ORANGE, "hilbert": GREEN}
PART_COLOURS = {"all": GREY, "critical": ORANGE, "marginal": BLUE}
SERIES = (BLUE, ORANGE, GREEN, RED, VIOLET, GREY)
CLASS_COLOURS = {"critical": ORANGE, "marginal": BLUE, "negligible": "#d9dce1"}
#: Relative errors up to here are rounding.
NOISE = 1e-4

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
}


class Figure(NamedTuple):
    name: str
    caption: str
    svg: str
    png: bytes


def _drawn(
    name: str, caption: str, size: tuple[float, float], draw: Callable[[Canvas], None]
) -> Figure:
    """Runs ``draw`` on an empty canvas of ``size`` inches."""
    style: Any = {**STYLE, "svg.hashsalt": name}  # or clip paths of two figures share a name
    with mpl.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas)
        png, svg = io.BytesIO(), io.StringIO()
        canvas.savefig(png, format="png", dpi=130, facecolor="white")
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'[("]#([^)"]+)', text))  # drop names that a page of many has twice
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    return Figure(name, caption, text, png.getvalue())


def place(measurement: Measurement) -> str:
    return f"step {measurement.step}, layer {measurement.layer}"


# Maps -------------------------------------------------------------------------------------------


def draw_maps(measurement: Measurement) -> Figure:
    """Dense mass, pooled score and classes of each head, one above the other."""
    maps = measurement.maps

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots(3, len(maps.heads), squeeze=False, sharex=True, sharey=True)
        spread = LogNorm(1e-2, 1e2)
        colours = np.array([to_rgb(CLASS_COLOURS[name]) for name in CLASS_COLOURS])
        for column, head in enumerate(maps.heads):
            pictures = (
                maps.mass[column].numpy(),
                maps.score[column].numpy(),
                np.einsum("cij,cr->ijr", maps.classes[column].numpy(), colours).clip(0.0, 1.0),
            )
            for ax, picture in zip(axes[:, column], pictures, strict=True):
                image = ax.imshow(
                    picture if picture.ndim == 3 else picture.clip(1e-2, 1e2),
                    norm=None if picture.ndim == 3 else spread,
                    cmap="magma",
                    interpolation="nearest",
                    extent=(0.0, 1.0, 1.0, 0.0),
                    aspect="equal",
                )
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_visible(False)
                if picture.ndim == 2:
                    scale = image
            axes[0, column].set_title(f"head {head}")
        for ax, label in zip(axes[:, 0], ("dense mass", "pooled score", "classes"), strict=True):
            ax.set_ylabel(label)
        bar = canvas.colorbar(scale, ax=axes[:2], pad=0.015, fraction=0.02, aspect=28)
        bar.set_label("times an even spread")
        bar.outline.set_visible(False)
        canvas.legend(
            handles=[Patch(color=c, label=n) for n, c in CLASS_COLOURS.items()],
            loc="outside lower center",
            ncols=3,
        )

    return _drawn(
        f"maps-step{measurement.step}-layer{measurement.layer}",
        place(measurement).capitalize(),
        (1.2 + 1.75 * len(maps.heads), 5.9),
        draw,
    )


# Curves -----------------------------------------------------------------------------------------


def _panels(
    measurements: Sequence[Measurement],
    name: str,
    caption: str,
    labels: tuple[str, str],
    legend: list[Line2D],
    draw_one: Callable[[Any, Measurement], None],
) -> Figure:
    """One panel for each step (downwards) and layer (to the right)."""
    steps = sorted({m.step for m in measurements})
    layers = sorted({m.layer for m in measurements})

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots(len(steps), len(layers), squeeze=False, sharex=True, sharey=True)
        for ax in axes.flat:
            ax.set_visible(False)
        for measurement in measurements:
            ax = axes[steps.index(measurement.step), layers.index(measurement.layer)]
            ax.set_visible(True)
            ax.set_title(place(measurement))
            draw_one(ax, measurement)
        canvas.supxlabel(labels[0], fontsize=9.0)
        canvas.supylabel(labels[1], fontsize=9.0)
        canvas.legend(handles=legend, loc="outside upper center", ncols=min(len(legend), 7))

    size = (max(7.2, 1.0 + 2.75 * len(layers)), 1.0 + 2.1 * len(steps))
    return _drawn(name, caption, size, draw)


def _line(
    ax: Any,
    x: Sequence[float],
    levels: Sequence[Heads],
    colour: str,
    style: str = "o-",
    width: float = 1.5,
) -> None:
    """Mean of heads."""
    mean = np.array(levels).mean(axis=1)  # of (X, H)
    ax.plot(x, mean, style, color=colour, linewidth=width, markersize=2 * width)


def _band(ax: Any, x: Sequence[float], levels: Sequence[Heads], colour: str) -> None:
    """From the lowest head to the highest."""
    values = np.array(levels)
    low, high = values.min(axis=1), values.max(axis=1)
    ax.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)


def _key(label: str, colour: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", markersize=3, label=label)


def draw_recall(measurements: Sequence[Measurement], keep_ratio: float) -> Figure:
    def draw_one(ax: Any, m: Measurement) -> None:
        recall = m.recall
        sparsity = [100 * s for s in recall.sparsity]
        for order, colour in ORDER_COLOURS.items():
            width = 3.0 if order == "cubes" else 1.5  # the Hilbert curve may cover it
            top_k, oracle = (
                [[100 * h for h in x] for x in levels[order]]
                for levels in (recall.top_k, recall.oracle)
            )
            _line(ax, sparsity, oracle, colour, "--", width)
            _line(ax, sparsity, top_k, colour, "o-", width)
        ax.plot(sparsity, [100 * r for r in recall.random], ":", color=GREY, linewidth=1.5)
        ax.axvline(100 * (1 - keep_ratio), color=INK, linewidth=0.6, alpha=0.5)
        ax.set_ylim(0, 102)

    legend = [_key(f"top-k, {order}", colour) for order, colour in ORDER_COLOURS.items()]
    legend += [
        Line2D([], [], color=GREY, linestyle="--", label="oracle of each order"),
        Line2D([], [], color=GREY, linestyle=":", label="random"),
    ]
    return _panels(
        measurements,
        "recall",
        "Mean of heads; the table below has each of them. The upright line is the density of the "
        "comparison.",
        ("sparsity, % of blocks", "dense softmax mass kept, %"),
        legend,
        draw_one,
    )


def draw_skipping(measurements: Sequence[Measurement], keep_ratio: float) -> Figure:
    def draw_one(ax: Any, m: Measurement) -> None:
        for levels, colour in ((m.skipping.dynsparse, VIOLET), (m.skipping.blasst, GREEN)):
            percent = [[100 * h for h in x] for x in levels]
            _line(ax, m.skipping.log_thresholds, percent, colour)
            _band(ax, m.skipping.log_thresholds, percent, colour)
        ax.axhline(100 * (1 - keep_ratio), color=INK, linewidth=0.6, alpha=0.5)
        ax.set_ylim(-2, 102)

    legend = [_key("DynSparse", VIOLET), _key("BLASST", GREEN)]
    return _panels(
        measurements,
        "skipping",
        "Tiles of 128 x 64, all rows of a tile agreeing; the band spans the heads. The level line "
        "is the density of the comparison.",
        ("threshold, natural logarithm", "tiles skipped, %"),
        legend,
        draw_one,
    )


def draw_rank(measurements: Sequence[Measurement]) -> Figure:
    def draw_one(ax: Any, m: Measurement) -> None:
        for part, colour in PART_COLOURS.items():
            rank = m.rank[part]
            percent = [[100 * h for h in x] for x in rank.energy]
            _line(ax, rank.ranks, percent, colour)
            if part != "all":
                _band(ax, rank.ranks, percent, colour)
        ax.set_xscale("log", base=2)
        ax.set_ylim(0, 102)
        ticks = m.rank["all"].ranks[::2]
        ax.set_xticks(ticks, [str(t) for t in ticks])

    legend = [_key(f"{part} blocks", colour) for part, colour in PART_COLOURS.items()]
    return _panels(
        measurements,
        "rank",
        "Energy (squared weights) in the first singular directions; the band spans the heads. The "
        "higher on the left, the better a linear branch can stand in.",
        ("singular directions", "energy, %"),
        legend,
        draw_one,
    )


# Errors -----------------------------------------------------------------------------------------


def draw_errors(measurements: Sequence[Measurement]) -> Figure:
    """Every method's error, a dot for each step, layer and head; and what it costs."""
    points: dict[str, list[tuple[int, float]]] = {}
    cost: dict[str, list[float]] = {}
    for m in measurements:
        for error in m.errors:
            points.setdefault(error.method, []).extend((m.step, x) for x in error.relative_l1)
            cost.setdefault(error.method, []).append(error.flops)
    mean = {name: float(np.mean([x for _, x in dots])) for name, dots in points.items()}
    names = sorted(mean, key=lambda name: mean[name])
    steps = sorted({m.step for m in measurements})

    def draw(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        # Dense attention differs by rounding alone: it is written at the edge, not drawn.
        shown = [x for dots in points.values() for _, x in dots if x > NOISE]
        lowest = 0.6 * min(shown, default=NOISE)
        for y, name in enumerate(names):
            if mean[name] <= NOISE:
                left.annotate(
                    f"{mean[name]:.0e}, rounding",
                    (lowest, y),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.0,
                )
            for n, step in enumerate(steps):
                x = [value for s, value in points[name] if s == step and value > NOISE]
                offset = 0.22 * (n - (len(steps) - 1) / 2) / max(1, (len(steps) - 1) / 2)
                left.scatter(
                    x,
                    [y + offset] * len(x),
                    s=11,
                    color=SERIES[n % len(SERIES)],
                    alpha=0.8,
                    linewidths=0,
                )
            if mean[name] > NOISE:
                left.plot([mean[name]] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1.4)
            value = 100 * float(np.mean(cost[name]))
            right.barh(y, value, height=0.55, color=GREY)
            right.annotate(
                f"{value:.1f}", (value, y), (3, 0), textcoords="offset points", va="center"
            )
        left.set_xscale("log")
        left.set_xlim(left=lowest)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlabel("relative L1 error against dense attention")
        right.set_xlabel("FLOPs, % of dense")
        right.set_xlim(0, 118)
        right.grid(axis="y", visible=False)
        handles = [
            Line2D(
                [], [], color=SERIES[n % len(SERIES)], marker="o", linestyle="", label=f"step {s}"
            )
            for n, s in enumerate(steps)
        ]
        handles.append(Line2D([], [], color=INK, label="mean"))
        canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles))

    return _drawn(
        "errors",
        "A dot for each step, layer and head. Learned tensors have their initial values.",
        (9.4, 1.1 + 0.3 * len(names)),
        draw,
    )
