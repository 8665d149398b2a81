# SPDX-License-Identifier: Apache-2.0
"""Writes measurements as one HTML page that needs nothing else, PNGs and a JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparline import density, video
from sparline.methods import TOKEN_ORDERS

from . import figures
from .figures import Figure
from .measure import (
    CLASSES,
    KEEP_RATIOS,
    PICTURE_HEADS,
    QUERY_BLOCKS,
    RANK_ROWS,
    Measurement,
)

FORMAT = "sparline-inspect-1"
TEMPLATE = Path(__file__).with_name("report.html")

#: A cell: what is shown, and what it is sorted by (None: what is shown).
Cell = tuple[str, float | None]


def write_report(
    folder: Path,
    measurements: Sequence[Measurement],
    run: dict[str, Any],
    keep_ratio: float,
    clip: video.Clip | None = None,
) -> list[Path]:
    """Writes report.html, report.json and figures/*.png. ``run`` says what was run, for the head of
    the page; ``clip`` is what the pipeline made."""
    maps = [figures.draw_maps(m) for m in measurements]
    recall = figures.draw_recall(measurements, keep_ratio)
    errors = figures.draw_errors(measurements)
    skipping = figures.draw_skipping(measurements, keep_ratio)
    rank = figures.draw_rank(measurements)
    rows = _error_rows(measurements)
    parts = {
        "title": html.escape(f"Attention of {run['model']}"),
        "lead": html.escape(_lead(measurements, keep_ratio)),
        "run": "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
            for name, value in run.items()
        ),
        "cards": "".join(
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>'
            for value, text in _findings(measurements, keep_ratio)
        ),
        "clip": _clip(clip),
        "maps": "".join(map(_figure, maps)),
        "mass_table": _mass_table(measurements),
        "recall": _figure(recall),
        "recall_table": _recall_table(measurements, keep_ratio),
        "density": f"{100 * keep_ratio:g} %",
        "errors": _figure(errors),
        "summary_table": _summary_table(measurements),
        "num_rows": str(len(rows)),
        "step_options": _options(str(m.step) for m in measurements),
        "layer_options": _options(str(m.layer) for m in measurements),
        "method_options": _options(e.method for m in measurements for e in m.errors),
        "rows_table": _table(
            ("step", "layer", "head", "method", "density, %", "FLOPs, %", "relative L1", "cosine"),
            rows,
            texts=(3,),
        ),
        "skipping": _figure(skipping),
        "skip_tiles": str(density.SKIP_TILES),
        "recall_sparsity": f"{100 * measurements[0].recall.sparsity[_level(keep_ratio)]:.1f} %",
        "rank": _figure(rank),
        "rank_rows": str(RANK_ROWS),
        "rank_table": _rank_table(measurements),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in _notes(measurements)),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text)

    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    written = [folder / "report.html", folder / "report.json"]
    written[0].write_text(page, encoding="utf-8")
    told = {"format": FORMAT, "run": run, "measurements": [m.to_dict() for m in measurements]}
    written[1].write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
    for figure in (*maps, recall, errors, skipping, rank):
        written.append(pictures / f"{figure.name}.png")
        written[-1].write_bytes(figure.png)
    return written


# Words ------------------------------------------------------------------------------------------


def _lead(measurements: Sequence[Measurement], keep_ratio: float) -> str:
    first = measurements[0]
    tokens = " × ".join(str(side) for side in first.grid[:3])
    layers = _listed("layer", (m.layer for m in measurements))
    steps = _listed("step", (m.step for m in measurements))
    return (
        f"{first.num_heads} heads of {first.head_dim}, {tokens} tokens; {layers} in {steps}; "
        f"methods compared at {100 * keep_ratio:g} % density."
    )


def _listed(noun: str, numbers: Iterable[int]) -> str:
    texts = [str(n) for n in sorted(set(numbers))]
    if len(texts) == 1:
        return f"{noun} {texts[0]}"
    return f"{noun}s {', '.join(texts[:-1])} and {texts[-1]}"


def _findings(measurements: Sequence[Measurement], keep_ratio: float) -> list[tuple[str, str]]:
    """The few figures to take away: (figure, what it is)."""
    level = _level(keep_ratio)

    def kept(router: str, order: str) -> float:
        values = [_mean(getattr(m.recall, router)[order][level]) for m in measurements]
        return _mean(values)

    top_k, order = max((kept("top_k", o), o) for o in TOKEN_ORDERS)
    best = kept("oracle", order)
    sparsity = measurements[0].recall.sparsity[level]
    raster = kept("top_k", "raster")
    cards = [
        (
            f"{100 * top_k:.0f} % recall",
            f"of the dense mass is what top-k keeps at {100 * sparsity:.0f} % sparsity, tokens in "
            f"{order} order (in raster order {100 * raster:.0f} %). An oracle keeps "
            f"{100 * best:.0f} %.",
        )
    ]
    errors: dict[str, list[float]] = {}
    for m in measurements:
        for e in m.errors:
            if 0.5 * keep_ratio <= e.density <= 1.5 * keep_ratio:
                errors.setdefault(e.method, []).extend(e.relative_l1)
    if errors:
        means = {name: _mean(values) for name, values in errors.items()}
        name = min(means, key=lambda n: means[n])
        cards.append(
            (
                name,
                f"is nearest to dense among the methods at {100 * keep_ratio:g} % density: "
                f"relative L1 {means[name]:.3f}, worst head {max(errors[name]):.3f}.",
            )
        )
    looked = {
        name: max(_mean(levels) for m in measurements for levels in getattr(m.skipping, name))
        for name in ("dynsparse", "blasst")
    }
    cards.append(
        (
            f"{100 * looked['dynsparse']:.0f} % of the tiles",
            "at most does DynSparse skip inside the loop, up to a threshold of "
            f"{measurements[0].skipping.log_thresholds[-1]:g}; BLASST "
            f"{100 * looked['blasst']:.0f} %.",
        )
    )
    rank = {
        part: statistics.median(h for m in measurements for h in m.rank[part].effective)
        for part in ("all", "marginal")
    }
    rows = measurements[0].rank["all"].ranks[-1]
    cards.append(
        (
            f"rank {rank['marginal']:.0f} of {rows}",
            "is the median effective rank of the marginal part, "
            f"{rank['all']:.0f} that of all weights.",
        )
    )
    return cards


def _notes(measurements: Sequence[Measurement]) -> list[str]:
    recall = f"at most {QUERY_BLOCKS} evenly spaced query blocks"
    notes = [
        "q, k and v are those that the model hands to its attention, after the rotary embedding; "
        "of a batch the last item, which is the conditional one under guidance. The model itself "
        "always went on with its own dense attention.",
        f"Dense weights are computed in float32, block by block, for {recall}; recall is the mean "
        "of their rows.",
        "Density is the share of score elements that enter the softmax. It is set by keep_ratio or "
        "a count where the method has one; keep_mass of the top-p rules, threshold of VMoBA and "
        "log_threshold of the in-loop methods are searched for on the captured tensors. "
        "VMoBA takes the partition of its layer, or boxes where that is too coarse.",
        "Learned tensors have their initial values: SLA's projection is zero, so that sla, sla1 "
        "and sla_main equal sparse until they are trained; SLA2's alpha is the share of the dense "
        "mass that its router keeps; VSA's coarse gate is zero.",
        "Figures of the random router are expectations. Errors, recall and ranks are of single "
        "calls: they say nothing about what a fine-tuned model would make of a method.",
    ]
    if measurements[0].num_heads > PICTURE_HEADS:
        notes.append(f"Maps show {PICTURE_HEADS} evenly spaced heads; tables have all.")
    return notes


# Tables -----------------------------------------------------------------------------------------


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    texts: Sequence[int] = (),
) -> str:
    """``texts``: columns of words; such a last column may wrap."""
    kinds = ["text" if n in texts else "" for n in range(len(heads))]
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{html.escape(text)}</button></th>'
        for text, kind in zip(heads, kinds, strict=True)
    )
    body = []
    for row in rows:
        cells = []
        for c, (text, value) in enumerate(row):
            kind = kinds[c] + (" setting" if kinds[c] and c == len(row) - 1 else "")
            attributes = f' class="{kind.strip()}"' if kind else ""
            attributes += "" if value is None else f' data-value="{value:.9g}"'
            cells.append(f"<td{attributes}>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _percent(value: float, digits: int = 1) -> Cell:
    return f"{100 * value:.{digits}f}", value


def _fixed(value: float, digits: int = 4) -> Cell:
    return f"{value:.{digits}f}", value


def _error_rows(measurements: Sequence[Measurement]) -> list[list[Cell]]:
    return [
        [
            (str(m.step), None),
            (str(m.layer), None),
            (str(head), None),
            (e.method, None),
            _percent(e.density, 2),
            _percent(e.flops),
            _fixed(e.relative_l1[head]),
            _fixed(e.cosine[head]),
        ]
        for m in measurements
        for e in m.errors
        for head in range(m.num_heads)
    ]


def _summary_table(measurements: Sequence[Measurement]) -> str:
    by_method: dict[str, list[Any]] = {}
    for m in measurements:
        for e in m.errors:
            by_method.setdefault(e.method, []).append(e)
    rows: list[list[Cell]] = []
    for name, found in by_method.items():
        l1 = [x for e in found for x in e.relative_l1]
        cosine = [x for e in found for x in e.cosine]
        rows.append(
            [
                (name, None),
                _percent(_mean([e.density for e in found]), 2),
                _percent(_mean([e.flops for e in found])),
                _fixed(_mean(l1)),
                _fixed(max(l1)),
                _fixed(_mean(cosine)),
                _fixed(min(cosine)),
                (_setting_range([e.setting for e in found]), None),
            ]
        )
    rows.sort(key=lambda row: row[3][1] or 0.0)
    heads = (
        "method",
        "density, %",
        "FLOPs, %",
        "relative L1",
        "worst",
        "cosine",
        "worst",
        "options",
    )
    return _table(heads, rows, texts=(0, 7))


def _setting_range(settings: Sequence[str]) -> str:
    """What the settings of several calls have in common: ``a=1 b=2`` and ``a=1 b=5`` give
    ``a=1, b=2 to 5``."""
    values: dict[str, list[str]] = {}
    for setting in settings:
        for item in setting.split():
            key, _, value = item.partition("=")
            values.setdefault(key, []).append(value)
    parts = []
    for key, texts in values.items():
        distinct = list(dict.fromkeys(texts))
        if len(distinct) == 1:
            parts.append(f"{key}={distinct[0]}")
            continue
        try:
            distinct.sort(key=float)
            parts.append(f"{key}={distinct[0]} to {distinct[-1]}")
        except ValueError:  # words
            parts.append(f"{key}={'|'.join(distinct)}")
    return ", ".join(parts)


def _head_table(
    heads: Sequence[str],
    measurements: Sequence[Measurement],
    cells: Callable[[Measurement, int], Iterable[Cell]],
) -> str:
    """A row for each step, layer and head."""
    rows = [
        [(str(m.step), None), (str(m.layer), None), (str(head), None), *cells(m, head)]
        for m in measurements
        for head in range(m.num_heads)
    ]
    return _table(("step", "layer", "head", *heads), rows)


def _mass_table(measurements: Sequence[Measurement]) -> str:
    return _head_table(
        [f"{name}, % of dense mass" for name in CLASSES],
        measurements,
        lambda m, head: [_percent(m.class_mass[name][head]) for name in CLASSES],
    )


def _recall_table(measurements: Sequence[Measurement], keep_ratio: float) -> str:
    level = _level(keep_ratio)
    routers = [(o, r) for o in TOKEN_ORDERS for r in ("top_k", "oracle")]
    return _head_table(
        [f"{order} {router.replace('_', '-')}, %" for order, router in routers],
        measurements,
        lambda m, head: [
            _percent(getattr(m.recall, router)[order][level][head]) for order, router in routers
        ],
    )


def _rank_table(measurements: Sequence[Measurement]) -> str:
    kinds = [(k, part) for k in ("effective", "stable") for part in measurements[0].rank]
    return _head_table(
        [f"{kind}, {part}" for kind, part in kinds],
        measurements,
        lambda m, head: [_fixed(getattr(m.rank[part], kind)[head], 1) for kind, part in kinds],
    )


# Small parts ------------------------------------------------------------------------------------


def _level(keep_ratio: float) -> int:
    """The level of recall that is nearest to the density of the comparison."""
    return min(range(len(KEEP_RATIOS)), key=lambda n: abs(KEEP_RATIOS[n] - keep_ratio))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _options(values: Iterable[str]) -> str:
    distinct = dict.fromkeys(values)
    return '<option value="">all</option>' + "".join(
        f"<option>{html.escape(value)}</option>" for value in distinct
    )


def _figure(figure: Figure) -> str:
    return f"<figure>{figure.svg}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"


def _clip(clip: video.Clip | None) -> str:
    """A strip of the frames that were generated."""
    if clip is None:
        return ""
    frames = clip[np.linspace(0, len(clip) - 1, min(len(clip), 8)).round().astype(int)]
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    strip.thumbnail((1280, 1280))  # small clips stay as they are
    data = io.BytesIO()
    strip.save(data, format="png")
    text = base64.b64encode(data.getvalue()).decode()
    return (
        f'<figure><img alt="Frames of the generated clip" src="data:image/png;base64,{text}" '
        f'width="{min(1100, 130 * len(frames))}"><figcaption>What the pipeline made while it was '
        "watched, with its own dense attention.</figcaption></figure>"
    )
