"""Small pictures that a phone can show: repair, distillation, latency."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from come_pl.distillation.curves import COLUMNS, CURVES, VALIDATION, read_rows
from come_pl.report.layers import load_record
from come_pl.report.style import GREY, INK, OKABE_ITO, PALE, SOFT, TITLE, number, plural, save_picture, wrap

WIDTH = 5.6  # inches; ten-point text is then still read on a phone


def canvas(title: str, tall: float) -> tuple[Figure, Axes]:
    """A figure with its title, and axes `tall` inches high."""
    head = wrap(title, 64)
    above, below = 0.32 + 0.21 * len(head), 0.55
    height = above + tall + below
    figure = Figure(figsize=(WIDTH, height))
    figure.text(0.1 / WIDTH, 1 - 0.1 / height, "\n".join(head), **(TITLE | {"size": 11}))
    axes = figure.add_axes((0.72 / WIDTH, below / height, 1 - 0.87 / WIDTH, tall / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9.5, color=SOFT, labelcolor=INK)
    axes.set_axisbelow(True)
    return figure, axes


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}–{high}"


def refits(run_dir: Path, path: Path | None = None) -> Path | None:
    """Draw what each closed-form repair left of a layer's error; None for a run without repairs."""
    steps, _, _ = load_record(run_dir)
    found = [
        [(group[-1], e) for group, e in zip(step["groups"], step["scores"]["refit_error"]) if e is not None]
        for step in steps
        if (step.get("scores") or {}).get("refit_error")
    ]
    values = [error for points in found for _, error in points]
    if not values:
        return None
    removed = [100 * (1 - value) for value in values]
    title = f"Repair in closed form took away {_range(removed, '.0f')}% of a layer's error on unseen windows"
    figure, axes = canvas(title, 2.5)
    sweep = found[-1] if len(found[-1]) > 1 else []
    single = [points for points in found if points is not sweep]
    for index, points in enumerate(single):
        label = "after its own step" if index == 0 else None
        axes.plot(*zip(*points), "o", color=OKABE_ITO[5], markersize=6, label=label, linestyle="none")
    if sweep:
        axes.plot(*zip(*sweep), "s-", color=OKABE_ITO[0], markersize=4.5, linewidth=1.4, label="sweep at the end")
    axes.axhline(1, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("1: no repair", (1, 1), (0, 5), ("axes fraction", "data"), "offset points", ha="right", color=SOFT)
    axes.set(
        xlabel="repaired layer, by the last dense layer that it stands for", ylabel="error left, share", ylim=(0, 1.12)
    )
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=PALE)
    if sweep and single:
        axes.legend(fontsize=9.5, frameon=False, loc="lower left")
    words = f"{title}. Error left, as a share of the error without repair, by the last dense layer stood for: "
    words += "; ".join(f"{layer}: {error:.2f}" for points in found for layer, error in points) + "."
    return save_picture(figure, path or Path(run_dir) / "refit.png", title, words)


def _smooth(values: Sequence[float]) -> tuple[float, float]:
    """Loss at the beginning and at the end: means over a tenth of the steps."""
    size = max(1, len(values) // 10)
    return mean(values[:size]), mean(values[-size:])


def _learned(curves: Mapping[str, Sequence[float]]) -> str:
    """The distillation curves' title: how far each loss fell."""
    fell = {}
    for name, values in curves.items():
        begin, end = _smooth(values)
        fell[name] = 100 * (1 - end / begin) if begin > 0 else 0.0
    best, worst = max(fell, key=lambda n: fell[n]), min(fell, key=lambda n: fell[n])
    if len(fell) == 1:
        return f"The loss fell by {fell[best]:.0f}%" if fell[best] >= 0.5 else "The loss did not fall"
    if fell[best] < 0.5:
        return "No loss fell"
    if fell[worst] < 0.5:
        return f"The loss of {best} fell most ({fell[best]:.0f}%), that of {worst} not at all"
    return f"Every loss fell, by {_range(list(fell.values()), '.0f')}%: {best} most, {worst} least"


def distillation(run_dir: Path, path: Path | None = None) -> Path | None:
    """Draw each layer's loss, and the validation loss, over the tokens read; None without curves."""
    run_dir = Path(run_dir)
    rows = read_rows(run_dir / CURVES)
    names = [n for n in (rows[0] if rows else {}) if n not in COLUMNS] or ["loss"]
    curves = {n: [(r["tokens"], r[n]) for r in rows if n in r and r[n] > 0 and math.isfinite(r[n])] for n in names}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    title = _learned({name: [value for _, value in points] for name, points in curves.items()})
    figure, axes = canvas(title, 3.0)
    few = len(curves) <= len(OKABE_ITO)
    for index, (name, points) in enumerate(curves.items()):
        colour = OKABE_ITO[index] if few else colormaps["viridis"](0.05 + 0.85 * index / (len(curves) - 1))
        axes.plot(*zip(*points), color=colour, linewidth=1.5, label=name, marker="o" if len(points) < 3 else None)
    by_step = {row["step"]: row["tokens"] for row in rows}
    seen = [(by_step[r["step"]], r["val_loss"]) for r in read_rows(run_dir / VALIDATION) if r["step"] in by_step]
    if seen:
        axes.plot(*zip(*seen), color=INK, linewidth=1.2, linestyle=(0, (4, 2)), marker="o", markersize=4)
        axes.lines[-1].set_label("held-out, sum" if len(curves) > 1 else "held-out")
    kind = (load_record(run_dir)[1].get("method") or {}).get("loss")
    kind = kind if all(name.startswith("layer") for name in curves) else None
    axes.set(xlabel="tokens trained on", ylabel=f"loss ({kind})" if kind else "loss", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=PALE)
    shown = axes.get_legend_handles_labels()
    if len(shown[1]) > 1:
        _legend_below(figure, axes, *shown)
    words = f"{title}. Losses over {rows[-1]['tokens']:,.0f} tokens, first to last: "
    words += "; ".join("{}: {:.3g} to {:.3g}".format(n, *_smooth([v for _, v in p])) for n, p in curves.items()) + "."
    if seen:
        words += f" Held-out loss: {seen[0][1]:.3g} to {seen[-1][1]:.3g}."
    return save_picture(figure, path or run_dir / "distill.png", title, words)


def _legend_below(figure: Figure, axes: Axes, handles: Any, labels: Any) -> None:
    """A legend under the axes, as many rows as it takes; the figure grows by it."""
    more = 0.22 * math.ceil(len(labels) / 4) + 0.1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + more)
    for artist in figure.texts:
        artist.set_y(1 - (1 - artist.get_position()[1]) * height / (height + more))
    x, y, w, h = axes.get_position().bounds
    axes.set_position((x, (y * height + more) / (height + more), w, h * height / (height + more)))
    box: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.01), "bbox_transform": figure.transFigure}
    axes.legend(handles, labels, ncols=4, fontsize=9, frameon=False, handlelength=1.4, columnspacing=1.2, **box)


def latency(file: Path, path: Path | None = None) -> Path | None:
    """Draw the seconds of the dense model and of the pruned one, from `latency.json`; None if nothing was measured."""
    info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    results: list[dict[str, Any]] = info.get("results") or []
    if not results:
        return None
    title = latency_finding(info)
    kinds = [("prompt", "ms for a prompt"), ("generation", "ms for a new token")]
    tall = 0.35 + 0.56 * len(results)
    figure, first = canvas(title, 2 * tall + 0.75)
    first.remove()
    width, height = figure.get_size_inches()
    parts = []
    for index, (kind, unit) in enumerate(kinds):
        bottom = 0.55 + (1 - index) * (tall + 0.75)
        axes = figure.add_axes((1.55 / width, bottom / height, 1 - 2.15 / width, tall / height))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=9.5, color=SOFT, labelcolor=INK)
        top = 0.0
        for row, result in enumerate(results):
            share = result["new_tokens"] if kind == "generation" else 1
            for offset, which, name, colour in (
                (-0.19, "dense", "dense", GREY),
                (0.19, "model", "pruned", OKABE_ITO[0]),
            ):
                if which not in result:
                    continue
                low, middle, high = (
                    1000 * result[which][f"{kind}_seconds"][k] / share for k in ("low", "median", "high")
                )
                label = name if row == 0 else None
                axes.barh(row + offset, middle, 0.36, color=colour, label=label)
                axes.plot([low, high], [row + offset] * 2, color=INK, linewidth=1.6)
                axes.annotate(
                    number(middle), (high, row + offset), (4, 0), "data", "offset points", va="center", size=9
                )
                top = max(top, high)
                parts.append(f"{_load(result)}, {name}: {number(middle)} {unit}")
        axes.set_yticks(range(len(results)), [_load(result).replace(", ", "\n") for result in results])
        axes.set(xlim=(0, top * 1.05 or 1), ylim=(len(results) - 0.5, -0.5), xlabel=unit)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.grid(axis="x", color=PALE)
        axes.set_axisbelow(True)
        if index == 0 and len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(
                fontsize=9, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.1, 0.97), borderpad=0.1
            )
    words = f"{title}. Medians, with a line from quartile to quartile. {'; '.join(parts)}."
    return save_picture(figure, path or file.with_name("latency.png"), title, words)


def _load(result: Mapping[str, Any]) -> str:
    return f"batch {result['batch']}, prompt {result['prompt']}"


def latency_finding(info: Mapping[str, Any]) -> str:
    """How many times faster, next to the ideal."""
    results = [result["speed_up"] for result in info["results"] if "speed_up" in result]
    if not results:
        tokens = [result["model"]["generation_tokens_per_second"] for result in info["results"]]
        return f"The model writes {_range(tokens, ',.1f')} tokens a second"
    write, read = ([result[part]["median"] for result in results] for part in ("generation", "prompt"))
    best = info.get("ideal") or {}
    title = f"Writing is {_range(write, '.2f')}× as fast as with the dense model, reading {_range(read, '.2f')}×"
    if best:
        title += f"; the ideal is {best['layers']:.2f}× ({plural(info['dense']['layers'], 'layer')} → "
        title += f"{info['model']['layers']})"
    return title
