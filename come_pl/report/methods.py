"""Pictures of a comparison of methods, from the rows of `comparison.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from come_pl.report.style import INK, OKABE_ITO, PALE, SOFT, TITLE, model_name, number, save_picture, wrap

COLOURS = (*OKABE_ITO, INK, "#8a8a8a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
CEILING = 1e3  # × dense: a broken model is drawn there, however broken

Row = Mapping[str, Any]


def by_text(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for text in dict.fromkeys(row["text"] for row in rows):
        yield text, [row for row in rows if row["text"] == text]


def ground(rows: Sequence[Row], settings: Mapping[str, Any], text: str) -> str:
    """What every run had in common."""
    done = [row for row in rows if row["status"] == "finished"]
    tokens = sorted({row["calibration_tokens"] for row in done}) or [settings["tokens"]]
    words = f"Calibrated on {' to '.join(map(str, dict.fromkeys((tokens[0], tokens[-1]))))} tokens of "
    words += f"{Path(settings['calibration']).name} (windows of {settings['seqlen']}, seed {settings['seed']})"
    if done:
        words += f"; perplexity on {done[0]['evaluation_tokens']} held-out tokens of {Path(text).name}"
        words += f", dense {number(done[0]['dense'])}"
    return words + "."


def asked(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """What the scores of tasks are of; empty: no run has one."""
    scored = next((row for row in rows if "score" in row), None)
    if scored is None:
        return ""
    limit = f", {settings['limit']} questions of each" if settings.get("limit") else ""
    words = f" Tasks: mean score of {', '.join(scored['tasks'])}{limit}; dense {100 * scored['dense_score']:.1f}%"
    return words + f"; one standard error is about {100 * scored['score_stderr']:.1f}."


def plots(rows: Sequence[Row], settings: Mapping[str, Any], folder: Path, before: str = "") -> list[Path]:
    """`comparison.png` and `seconds.png` for the first evaluation text, `comparison-2.png` … for the second, and of
    tasks `tasks.png`; none without a result. `before`: what the names begin with."""
    found = [(text, chosen) for text, chosen in by_text(rows) if any(row["status"] == "finished" for row in chosen)]
    drawn = []
    for count, (text, chosen) in enumerate(found, 1):
        end = ".png" if count == 1 else f"-{count}.png"
        drawn.append(plot(chosen, settings, text, folder / f"{before}comparison{end}"))
        drawn.append(by_seconds(chosen, settings, text, folder / f"{before}seconds{end}"))
    if any("score" in row for row in rows):
        drawn.append(by_tasks(rows, settings, folder / f"{before}tasks.png"))
    return drawn


def _finding(curves: Mapping[str, Mapping[int, float]], layers: int) -> str:
    """The plot's title: who loses least, and how much."""
    depths = sorted({depth for curve in curves.values() for depth in curve})
    ranked = {d: sorted((c[d], label) for label, c in curves.items() if d in c) for d in depths}
    first = {depth: ranking[0][1] for depth, ranking in ranked.items()}
    deepest = depths[0]
    best, winner = ranked[deepest][0]
    costs = f"{number(best)}× the dense perplexity at {deepest} of {layers} layers"
    if len(curves) == 1:
        return f"{winner} costs {costs}"
    if len(set(first.values())) == 1:
        title = f"{winner} loses least{' at every depth' if len(depths) > 1 else ''}: {costs}"
        if len(ranked[deepest]) > 1:
            second, other = ranked[deepest][1]
            title += f", {other} {number(second)}×"
        return title
    others = " and ".join(f"{first[d]} at {d} ({number(ranked[d][0][0])}×)" for d in depths[:0:-1])
    return f"no method wins everywhere: {others}, then {winner} with {costs}"


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted` (ascending) and as near to it as can be, least squares.

    Isotonic regression of what is left when each gap is taken away; what passes an end is pushed back inside.
    """
    blocks: list[list[float]] = []
    for index, value in enumerate(wanted):
        blocks.append([value - index * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    room = max(high - gap * (len(wanted) - 1), low)
    return [min(max(value, low), room) + index * gap for index, value in enumerate(level)]


def _curves(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """× dense perplexity by method and depth."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["status"] == "finished":
            curves.setdefault(row["method"], {})[row["layers"]] = row["times_dense"] or math.inf
    return curves


def _ranking(curves: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Methods from the best to the worst; the same order, so the same colours, in every picture."""
    return sorted(curves, key=lambda label: (curves[label][min(curves[label])], label))


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % 8], "marker": MARKERS[(index + index // 8) % 8]}


def plot(rows: Sequence[Row], settings: Mapping[str, Any], text: str, path: Path) -> Path:
    """Draw × dense perplexity against depth, a line a method, named at its end; the picture's path."""
    layers = settings["layers"]
    curves = _curves(rows)
    failed = sorted({f"{row['method']} at {row['layers']}" for row in rows if row["status"] != "finished"})
    title = f"{model_name(settings['model'])}: {_finding(curves, layers)}"
    caption = f"Each line is a method, pruning from {layers} layers; lower is better. {ground(rows, settings, text)}"
    beyond = any(value > CEILING for curve in curves.values() for value in curve.values())
    caption += f" What is above {CEILING:,.0f}× is drawn there." * beyond
    caption += f" Failed: {', '.join(failed)}." * bool(failed)
    figure, axes, tall = _frame(title, caption, list(curves))
    _axes(axes, curves, layers)
    order = _ranking(curves)
    deepest = min(depth for curve in curves.values() for depth in curve)

    def said(label: str) -> str:
        depth = min(curves[label])
        value = curves[label][depth]
        words = f"{number(value)}×" if math.isfinite(value) else "not a number"
        return words + f" at {depth}" * (depth > deepest)

    shown = {label: {layers: 1.0} | {d: min(v, CEILING) for d, v in curve.items()} for label, curve in curves.items()}
    _lines(axes, tall, shown, order, said)
    parts = []
    for label in order:
        measured = sorted(curves[label].items(), reverse=True)
        parts.append(f"{label}: " + ", ".join(f"{depth} layers {number(value)}×" for depth, value in measured))
    words = f"{title}. {caption} Perplexity relative to the dense model, by method: {'; '.join(parts) or 'none'}."
    return save_picture(figure, path, title, words)


def _lines(
    axes: Axes,
    tall: float,
    curves: Mapping[str, Mapping[int, float]],
    order: Sequence[str],
    said: Callable[[str], str],
) -> None:
    """A line a method, from the dense model on, with its name and what is `said` of it at the end."""
    ends = []
    for index, label in enumerate(order):
        if label not in curves:
            continue
        depths = sorted(curves[label], reverse=True)
        values = [curves[label][depth] for depth in depths]
        style = _style(index)
        line = "-" if index % 16 < 8 else (0, (4, 1.5))
        axes.plot(depths, values, linestyle=line, linewidth=1.6, markersize=5.5, markevery=slice(1, None), **style)
        ends.append(((depths[-1], values[-1]), f"{_short(label)}  {said(label)}", style))
    _name_ends(axes, ends, tall)


def by_tasks(rows: Sequence[Row], settings: Mapping[str, Any], path: Path) -> Path:
    """Draw the mean score of tasks against depth, a line a method; the picture's path."""
    layers = settings["layers"]
    scored = [row for row in rows if "score" in row]
    curves: dict[str, dict[int, float]] = {}
    for row in scored:
        curves.setdefault(row["method"], {})[row["layers"]] = 100 * row["score"]
    dense, error = 100 * scored[0]["dense_score"], 100 * scored[0]["score_stderr"]
    deepest = min(row["layers"] for row in scored)
    best = min(curves, key=lambda label: (-curves[label].get(deepest, -1.0), label))
    most = f"{curves[best][deepest]:.1f}% at {deepest} of {layers} layers"
    title = f"{model_name(settings['model'])}: {best} answers most, {most}; dense {dense:.1f}%"
    caption = f"Each line is a method, pruning from {layers} layers; higher is better.{asked(rows, settings)}"
    caption += " Shaded: dense, give or take that."
    figure, axes, tall = _frame(title, caption, list(curves))
    _depths(axes, curves, layers, "mean score of the tasks, %")
    measured = [dense, *(value for curve in curves.values() for value in curve.values())]
    axes.set_ylim(min(measured) - 2 * error - 0.5, max(measured) + 2 * error + 0.5)
    axes.axhspan(dense - error, dense + error, color=PALE, lw=0, zorder=0)
    shown = {label: {layers: dense} | curve for label, curve in curves.items()}
    _lines(axes, tall, shown, _ranking(_curves(rows)), lambda label: f"{curves[label][min(curves[label])]:.1f}%")
    parts = [
        f"{label}: {', '.join(f'{d} layers {v:.1f}%' for d, v in curve.items())}" for label, curve in curves.items()
    ]
    return save_picture(figure, path, title, f"{title}. {caption} By method: {'; '.join(parts)}.")


def _frame(title: str, caption: str, labels: Sequence[str]) -> tuple[Figure, Axes, float]:
    """A figure with title and caption, its axes with room for names on their right, and their height in inches."""
    width, count = 9.6, len(labels)
    head, notes = wrap(title, width * 8.1), wrap(caption, width * 13.6)
    above, tall = 0.65 + 0.25 * len(head) + 0.18 * len(notes), max(3.4, 0.225 * count + 0.4)
    height = above + tall + 0.65
    figure = Figure(figsize=(width, height))
    figure.text(0.45 / width, 1 - 0.3 / height, "\n".join(head), **TITLE)
    below = 1 - (0.42 + 0.25 * len(head)) / height
    figure.text(0.45 / width, below, "\n".join(notes), size=8.5, color=SOFT, va="top", linespacing=1.4)
    side = min(4.2, 1.35 + 0.075 * max((len(label) for label in labels), default=0))
    return figure, figure.add_axes((1.0 / width, 0.65 / height, (width - 1.0 - side) / width, tall / height)), tall


def _short(label: str) -> str:
    return label if len(label) <= 38 else label[:37] + "…"


End = tuple[tuple[float, float], str, dict[str, Any]]  # (x, y), name, colour and marker


def _name_ends(axes: Axes, ends: Sequence[End], tall: float, lines: bool = True) -> None:
    """Names points at the right of axes that are `tall` inches high, with `lines` that lead to them."""
    inside = axes.transAxes.inverted()
    placed = [(inside.transform(axes.transData.transform(point)), said, style) for point, said, style in ends]
    placed.sort(key=lambda end: end[0][1])
    spots = _apart([float(end[0][1]) for end in placed], 0.205 / tall, 0.01, 0.99)
    for ((x, y), said, style), spot in zip(placed, spots, strict=True):
        across: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        if lines:
            axes.plot([x, 1.02, 1.045], [y, spot, spot], color=style["color"], lw=0.7, **across)
        axes.plot(1.06, spot, ms=5.5, **style, **across)
        axes.text(1.08, spot, said, size=9, color=INK, va="center_baseline", transform=axes.transAxes)


def _axes(axes: Axes, curves: Mapping[str, Mapping[int, float]], layers: int) -> None:
    _depths(axes, curves, layers, "held-out perplexity, × dense")
    top = min(max((v for curve in curves.values() for v in curve.values()), default=1.0), CEILING)
    axes.set(yscale="log")
    axes.set_ylim(0.97 * min(1.0, *(v for c in curves.values() for v in c.values()), 1.0), max(top * 1.08, 1.1))
    _times(axes)


def _depths(axes: Axes, curves: Mapping[str, Mapping[int, float]], layers: int, what: str) -> None:
    """The axis of layers left, from the dense model's at the left, and what is measured."""
    depths = sorted({layers, *(depth for curve in curves.values() for depth in curve)})
    axes.set(xlabel="decoder layers left", ylabel=what)
    slack = 0.03 * (depths[-1] - depths[0]) or 0.5
    axes.set_xlim(depths[-1] + slack, depths[0] - slack)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, color=SOFT, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    if len(depths) <= 10:
        axes.set_xticks(depths, [f"{d}\ndense" if d == layers else str(d) for d in depths])


def _times(axes: Axes) -> None:
    """A logarithmic axis of perplexity, × dense."""
    low, high = axes.get_ylim()
    few = high / low < 3
    axes.yaxis.set_major_locator(
        MaxNLocator(6) if few else LogLocator(subs=(1, 2, 5) if high < 300 else (1,), numticks=12)
    )
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}×"))
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)


def _fastest(points: Mapping[str, tuple[float, float]]) -> str:
    """The title of quality against seconds: who is best, and the fastest that is not much worse."""
    best = min(points, key=lambda label: points[label][::-1])
    seconds, times = points[best]
    fast = min((label for label in points if points[label][1] <= 2 * times), key=lambda label: points[label])
    title = f"{best} loses least, {number(times)}× the dense perplexity in {_seconds(seconds)}"
    if best == fast:
        return title
    return f"{title}; {fast} takes {_seconds(points[fast][0])}, with {number(points[fast][1])}×"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def by_seconds(rows: Sequence[Row], settings: Mapping[str, Any], text: str, path: Path) -> Path:
    """Draw × dense perplexity against the seconds that pruning took, a point a method, at the least depth; the
    picture's path."""
    done = [row for row in rows if row["status"] == "finished"]
    depth = min(row["layers"] for row in done)
    points = {r["method"]: (r["seconds"], r["times_dense"] or math.inf) for r in done if r["layers"] == depth}
    title = f"{model_name(settings['model'])} at {depth} of {settings['layers']} layers: {_fastest(points)}"
    caption = f"Each point is a method; left is faster, lower is better. {ground(rows, settings, text)}"
    caption += f" What is above {CEILING:,.0f}× is drawn there." * any(y > CEILING for _, y in points.values())
    order = _ranking(_curves(rows))
    absent = [label for label in order if label not in points]
    caption += f" Not at this depth: {', '.join(absent)}." * bool(absent)
    figure, axes, tall = _frame(title, caption, [f"{label} 00,000 s" for label in points])
    axes.set(xscale="log", yscale="log", xlabel="seconds to prune", ylabel="held-out perplexity, × dense")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, color=SOFT, labelcolor=INK)
    least, most = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    axes.set_xlim(max(least, 1e-3) / 1.3, max(most, 1e-3) * 1.3)
    shown = [min(y, CEILING) for _, y in points.values()]
    axes.set_ylim(0.97 * min(1.0, *shown, 1.0), max(1.08 * max(shown), 1.1))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / max(least, 1e-3) < 300 else (1,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    _times(axes)
    ends = []
    for index, label in enumerate(order):
        if label not in points:
            continue
        x, y = points[label]
        style = _style(index)
        axes.plot(x, min(y, CEILING), markersize=8, linestyle="none", clip_on=False, **style)
        said = f"{number(y)}×" if math.isfinite(y) else "not a number"
        ends.append(((x, min(y, CEILING)), f"{_short(label)}  {said}, {_seconds(x)}", style))
    _name_ends(axes, ends, tall, lines=False)
    words = f"{title}. {caption} " + "; ".join(said for _, said, _ in ends) + "."
    return save_picture(figure, path, title, words)
