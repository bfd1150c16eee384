"""Pictures of a pruning run, from its ``record.jsonl`` and ``run.json``: which layers became which, and the scores.

A PNG's ``Description`` is its text alternative.  A step's ``layers`` index the model as it stood before that step.
"""

import json
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.ticker import LogLocator, MaxNLocator

from come_pl.report.style import GREY, INK, OKABE_ITO, PALE, SOFT, TITLE, model_name, plural, save_picture, wrap

Step = dict[str, Any]
State = list[dict[int, float]]  # per layer: dense layer it stands for -> share of its channels (0: dropped)

SCORES = {  # key -> (panel title, colour bar label)
    "block_influence": ("Block influence: how much each layer changes the hidden state", "1 − cosine(in, out)"),
    "span_distance": ("Span distance: how far the hidden state moves across each merge site", "distance"),
    "loss_without": ("Calibration loss without each layer", "nats per token"),
    "loss_bridged": ("Calibration loss with a linear map in each layer's place", "nats per token"),
    "repaired_divergence": ("Divergence without each layer, once the one below stands in", "KL, nats per token"),
    "gap_divergence": ("Divergence without each gap chosen, once the layer below stands in", "KL, nats per token"),
    "angular_distance": ("Angular distance: how far the last token turns across each block", "angle / π"),
    "magnitude": ("Magnitude: how large each layer's weights are", "reduced |W|"),
    "taylor": ("Taylor: how much each layer's weights matter to the loss, to first order", "reduced |W · ∂L/∂W|"),
    "distance_from_top": ("Distance from the last layer", "layers"),
    "window_distance": ("Window distance: how much the hidden state turns across each window", "1 − cosine"),
    "final_similarity": ("Final similarity: how true the output stays if a window is merged", "cosine with dense"),
    "macro_influence": ("Macro influence: how much the output turns without each layer", "1 − cosine"),
    "refitted_error": (
        "Repaired error: what a merge at each site tried would still get wrong",
        "squared error / token",
    ),
    "shared_information": ("Shared information: what each layer has in common with all", "normalised information"),
}
BY_SITE = (  # at a site's first layer
    *("span_distance", "angular_distance", "window_distance", "final_similarity", "refitted_error"),
)
NOT_OF_LAYERS = (  # scores whose lists do not go by layer
    *("ratio_loss", "ratio_losses", "training_loss", "refit_error", "channels_kept", "path_divergence"),
)


def load_record(run_dir: Path) -> tuple[list[Step], dict[str, Any], int]:
    """Steps, run.json (empty where absent) and the dense model's number of layers (0 where nothing says)."""
    record, run_file = run_dir / "record.jsonl", run_dir / "run.json"
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    steps: list[Step] = [json.loads(line) for line in lines if line.strip()]
    run: dict[str, Any] = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
    layers = (run.get("model") or {}).get("layers")
    if not layers and steps:
        grouped = [layer for group in steps[-1].get("groups") or [] for layer in group]
        layers = max(grouped) + 1 if grouped else len((steps[0].get("scores") or {}).get("block_influence") or [])
    return steps, run, int(layers or 0)


def _apply(state: State, step: Step) -> State:
    """The layers after one step."""
    layers, groups, where = list(step["layers"]), step.get("groups"), f"step {step.get('step', '?')}"
    ratio = np.abs(np.asarray(step.get("ratio") or [1.0] * len(layers), dtype=float))  # a blend may subtract
    if not layers or min(layers) < 0 or max(layers) >= len(state) or len(ratio) != len(layers):
        raise ValueError(f"{where}: layers {layers} in ratio {ratio} do not fit a model of {len(state)} layers")
    if step.get("kind") == "drop":
        new = [dict(layer) for index, layer in enumerate(state) if index not in layers]
        for teacher in [t for index in layers for t in state[index]] if new else []:
            home = next((i for i, group in enumerate(groups or []) if teacher in group), max(min(layers) - 1, 0))
            new[home][teacher] = 0.0
    else:
        parts = zip(layers, ratio / ratio.sum(), strict=True)
        joined = {t: float(r) * share for index, r in parts for t, share in state[index].items()}
        new = [*state[: min(layers)], joined, *state[max(layers) + 1 :]]
    if not new or (groups is not None and [set(layer) for layer in new] != [set(group) for group in groups]):
        raise ValueError(f"{where}: its groups do not follow from its layers {layers}")
    return [dict(sorted(layer.items())) for layer in new]


def _states(steps: Sequence[Step], teacher_layers: int) -> list[State]:
    """The model's layers before the first step and after each."""
    return list(accumulate(steps, _apply, initial=[{layer: 1.0} for layer in range(teacher_layers)]))


def shares(steps: Sequence[Step], teacher_layers: int) -> list[dict[int, float]]:
    """Per layer of the pruned model: dense layer -> its share of the channels; they sum to 1, a dropped one has 0."""
    return _states(steps, teacher_layers)[-1]


def _span(layers: Sequence[int]) -> str:
    """Where the touched layers lie: the shortest window that holds 80 % of them, if much shorter than the whole."""
    ordered, need = sorted(layers), math.ceil(0.8 * len(layers))
    low, high = min(zip(ordered, ordered[need - 1 :], strict=False), key=lambda window: window[1] - window[0])
    if high - low + 1 > 0.75 * (ordered[-1] - ordered[0] + 1):
        return f"within layers {ordered[0]}–{ordered[-1]}"
    return f"mostly in layers {low}–{high}"


def _finding(steps: Sequence[Step], final: State, run: dict[str, Any], dense: int) -> str:
    title = f"{plural(dense, 'layer')}, none merged or dropped"
    if steps:
        drops = sum(s == 0 for layer in final for s in layer.values())
        # a merge that keeps one layer whole is a drop of the others
        merges = sum(step.get("kind") != "drop" and all(step.get("ratio") or [1]) for step in steps)
        did = [plural(merges, "merge")] * bool(merges) + [plural(drops, "layer") + " dropped"] * bool(drops)
        where = _span([t for layer in final for t, s in layer.items() if s < 1])
        title = f"{plural(dense, 'layer')} became {len(final)}: {' and '.join(did)}, {where}"
    for data, value in (run.get("perplexity") or {}).items():
        pair = (value.get("dense"), value.get("pruned")) if isinstance(value, dict) else ()
        numbers = [float(v) for v in pair if isinstance(v, int | float) and v > 0]
        if len(numbers) == 2:  # no-break spaces keep the comparison on one line
            was, now = (f"{v:,.{0 if v >= 1000 else 1}f}" for v in numbers)
            change = f"perplexity {was} → {now} ({numbers[1] / numbers[0]:,.2f}×) on {Path(data).name}"
            return title + "\u00a0· " + change.replace(" ", "\u00a0")
    return title


def _caption(steps: Sequence[Step], merged: bool, dropped: bool) -> str:
    """How the merge map is read."""
    caption = "Read from left to right; the text enters at the top. Each ribbon leads from a layer of the dense model "
    caption += "to the layer that stands for it in the shallower one. Grey: kept unchanged"
    repaired = any(step.get("weights") for step in steps) and dropped
    caption += " (but for repairs). " if repaired else ". "
    caption += "Colour: neighbours merged into one layer; its bar shows whose channels it kept. " * merged
    taken = any((step.get("scores") or {}).get("channels_kept") for step in steps)
    kept = (
        "a repair gave some of its feed-forward channels to the layer below"
        if taken
        else "none of its weights are kept"
    )
    return caption + f"Hatched: dropped, {kept}." * dropped


def merge_map(run_dir: Path, path: Path | None = None) -> Path:
    """Draw which dense layers became which layers of the pruned model; the picture's path."""
    steps, run, dense = load_record(Path(run_dir))
    final = shares(steps, dense)
    title = _finding(steps, final, run, dense)
    real = [{t: s for t, s in layer.items() if s > 0} for layer in final]
    dropped = sorted(t for layer in final for t, s in layer.items() if s == 0)
    merged = [index for index, layer in enumerate(real) if len(layer) > 1]
    caption = _caption(steps, bool(merged), bool(dropped))
    pitch = min(0.31, max(0.2, 11 / max(dense, 1)))
    box, size, width = 0.8 * pitch, min(9.0, pitch * 72 * 0.46), 9.6 if merged else 7.2
    head, notes = wrap(title, width * 8.1), wrap(caption, width * 13.6)
    height = (top := 1.0 + 0.25 * len(head) + 0.175 * len(notes)) + dense * pitch + 0.35
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # inches, downwards
    axes.axis("off")
    axes.text(0.45, 0.35, "\n".join(head), **TITLE)
    axes.text(0.45, 0.45 + 0.25 * len(head), "\n".join(notes), size=8.5, color=SOFT, va="top", linespacing=1.4)
    left, wide, right, bar = 0.45, 0.62, 4.0, 4.7
    heading: dict[str, Any] = {"size": 9.5, "weight": "bold", "color": INK, "va": "bottom"}
    model = model_name(str((run.get("model") or {}).get("path") or ""))[:60]
    axes.text(left, height - 0.1, model, size=8, color=SOFT, va="bottom")
    axes.text(left, top - 0.09, f"Dense model, {plural(dense, 'layer')}", **heading)
    axes.text(right, top - 0.09, f"New model, {plural(len(final), 'layer')}", **heading)
    if merged and merged[0]:
        said = "Whose channels each merged layer kept (layer: share)"
        axes.text(bar, top + merged[0] * pitch - 0.09, said, size=8.5, color=SOFT, va="bottom")

    def block(x: float, y: float, w: float, colour: Any, text: str, **style: Any) -> None:
        axes.add_patch(Rectangle((x, y), w, box, facecolor=colour, **({"edgecolor": "none"} | style)))
        ink = INK if float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))) > 0.5 else "white"
        axes.text(x + w / 2, y + box / 2, text, size=size, color=ink, ha="center", va="center_baseline")

    bend = (a := left + wide) + 0.85 * bool(dropped)  # straight past the word "dropped"
    mid = (bend + right) / 2
    codes = [Curve.MOVETO, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.LINETO]
    for index, layer in enumerate(real):
        base = OKABE_ITO[merged.index(index) % len(OKABE_ITO)] if index in merged else GREY
        low, x = top + index * pitch, bar
        block(right, low, wide, base, str(index))
        for (teacher, share), white in zip(layer.items(), np.linspace(0.0, 0.62, len(layer)), strict=True):
            source, end = top + teacher * pitch, low + share * box
            tint = tuple(float(1 - (1 - white) * (1 - part)) for part in to_rgb(base))
            block(left, source, wide, tint, str(teacher))
            corners = [(a, source), (bend, source), (mid, source), (mid, low), (right, low), (right, end)]
            corners += [(mid, end), (mid, source + box), (bend, source + box), (a, source + box)]
            shape = PathPatch(Curve(corners, codes), facecolor=tint, edgecolor="none")
            axes.add_patch(shape).set_alpha(0.6 if index in merged else 0.3)
            if index in merged:
                span = share * (width - bar - 0.45)
                texts = (f"{teacher}: {100 * share:.0f}%", str(teacher), "")
                fits = next(text for text in texts if len(text) * size * 0.0082 + 0.03 <= span or not text)
                block(x, top + index * pitch, max(span - 0.02, 0.005), tint, fits)
                x += span
            low = end
    for teacher in dropped:
        block(left, top + teacher * pitch, wide, "white", "", edgecolor="#9a9a9a", hatch="////", linewidth=0.8)
        where = (a + 0.1, top + teacher * pitch + box / 2)
        axes.text(*where, f"{teacher} dropped", size=size, color=SOFT, va="center_baseline")
    parts = [" + ".join(f"{t} ({100 * s:.0f}%)" for t, s in real[index].items()) for index in merged]
    words = f"{title}. Map of {dense} dense layers (left) to {len(final)} new layers (right)."
    words += f" Merged layers, with each dense layer's share of channels: {'; '.join(parts)}." * bool(parts)
    words += f" Dropped: {', '.join(map(str, dropped))}." * bool(dropped)
    return save_picture(figure, path or Path(run_dir) / "merge_map.png", title, words)


def _grids(steps: Sequence[Step], states: Sequence[State], dense: int) -> dict[str, np.ndarray]:
    """Per available score: steps x dense layers, each layer's value over the dense layers it stands for."""
    grids: dict[str, np.ndarray] = {}
    for row, (step, state) in enumerate(zip(steps, states, strict=False)):
        for key, values in (step.get("scores") or {}).items():
            fits = isinstance(values, list) and len(values) in (len(state), len(state) - len(step["layers"]) + 1)
            if fits and key not in NOT_OF_LAYERS:
                grid = grids.setdefault(key, np.full((len(steps), dense), np.nan))
                for value, layer in zip(values, state, strict=False):
                    grid[row, list(layer)] = np.nan if value is None or not math.isfinite(value) else value
    kept = [key for key in [*SCORES, *sorted(set(grids) - set(SCORES))] if key in grids]
    return {key: grids[key] for key in kept if np.isfinite(grids[key]).any()}


def _verdict(grids: dict[str, np.ndarray], steps: Sequence[Step], states: Sequence[State], run: dict[str, Any]) -> str:
    """The scores' title: do the steps fall where the layers do least?"""
    if not grids:
        return "This record holds no layer scores to draw"
    name = str((run.get("method") or {}).get("name") or "the method").replace("come", "CoMe")
    verb = "drops" if steps[0].get("kind") == "drop" else "merges"
    chosen = [[t for i in step["layers"] for t in state[i]] for step, state in zip(steps, states, strict=False)]
    influence = grids["block_influence"][0] if "block_influence" in grids else np.array([np.nan])
    if not np.isfinite(influence).all():
        return f"{name} {verb} {_span([t for layers in chosen for t in layers])}: the scores behind each step"
    size = min(max(3, round(len(influence) / 4)), len(influence))
    low = int(np.argmin(np.convolve(influence, np.ones(size), "valid")))
    inside = sum(np.mean([low <= t < low + size for t in layers]) >= 0.5 for layers in chosen)
    makes = f": {name} makes" if 2 * inside >= len(steps) else f", but {name} makes only"
    count = f"{inside} of its {plural(len(steps), verb[:-1])}"
    return f"Layers {low}–{low + size - 1} change the hidden state least{makes} {count} there"


def _heat(axes: Axes, legend: Axes, key: str, grid: np.ndarray, steps: Sequence[Step], states: Sequence[State]) -> None:
    """One score: dense layers across, steps down, the chosen layers (for spans: the chosen site) outlined."""
    name, unit = SCORES.get(key, (key.replace("_", " ").capitalize(), key.replace("_", " ")))
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    log, site = low > 0 and high / low > 20, key in BY_SITE
    norm = LogNorm(low, high) if log else Normalize(low, high if high > low else low + 1e-9)
    axes.set(facecolor=PALE, xlabel="dense layer", ylabel="pruning step")
    edges = np.arange(grid.shape[1] + 1) - 0.5, np.arange(grid.shape[0] + 1) + 0.5
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="YlGnBu", norm=norm)
    axes.invert_yaxis()
    for row, (step, state) in enumerate(zip(steps, states, strict=False)):
        picked = [t for index in (step["layers"][:1] if site else step["layers"]) for t in state[index]]
        corner, extent = (min(picked) - 0.5, row + 0.5), max(picked) - min(picked) + 1
        for colour, line in (("black", 3.0), ("white", 1.4)):
            axes.add_patch(Rectangle(corner, extent, 1, fill=False, ec=colour, lw=line, zorder=4, clip_on=False))
    note = "each site at its first layer, the chosen one outlined" if site else "layers chosen at each step outlined"
    note += ("; grey: no score" if np.isnan(grid).any() else "") + ("; colours on a log scale" if log else "")
    axes.set_title(name, loc="left", size=10.5, weight="bold", color=INK, pad=19)
    axes.annotate(note, (0, 1), (0, 5), "axes fraction", textcoords="offset points", size=8.5, color=SOFT)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    legend.tick_params(labelsize=8.5, color=SOFT, labelcolor=INK)
    ticks = LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)) if log else None
    axes.figure.colorbar(mesh, cax=legend, label=unit, ticks=ticks, format="%g")
    legend.minorticks_off()


def importance(run_dir: Path, path: Path | None = None) -> Path:
    """Draw each step's layer scores, the layers it chose and what that cost; the picture's path."""
    steps, run, dense = load_record(Path(run_dir))
    states = _states(steps, dense)
    grids = _grids(steps, states, dense)
    title = _verdict(grids, steps, states, run)
    kinds = (("loss", "Calibration loss"), ("kl", "KL divergence from the dense model"))
    after = list(zip(map(len, states[1:]), steps, strict=True))
    costs = {name: [(n, s[key]) for n, s in after if s.get(key) is not None] for key, name in kinds}
    costs = {name: points for name, points in costs.items() if points}
    curves = {name: points for name, points in costs.items() if len(points) > 1 or not grids}
    head = wrap(title, 8.1 * (width := min(14.0, max(9.0, 3.0 + 0.13 * dense))))
    tall, between, above = min(6.0, max(1.3, 0.2 * len(steps))), 1.25, 0.97 + 0.27 * len(head)  # inches
    rows = [tall] * len(grids) + [1.5] * bool(curves) or [0.5]
    height = above + sum(rows) + between * (len(rows) - 1) + 0.65
    figure = Figure(figsize=(width, height))
    figure.text(0.45 / width, 1 - 0.3 / height, "\n".join(head), **TITLE)

    def panel(x: float, y: float, w: float, h: float) -> Axes:
        axes = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5, color=SOFT, labelcolor=INK)
        return axes

    y, half = above, (width - 2.3) / 2
    for key, grid in grids.items():
        _heat(panel(0.85, y, width - 2.3, tall), panel(width - 1.3, y, 0.16, tall), key, grid, steps, states)
        y += tall + between
    for column, (name, points) in enumerate(curves.items()):
        axes = panel(0.85 + column * (half + 0.95), y, half, 1.5)
        left, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(left, values, color=OKABE_ITO[5 * column], marker="o", markersize=4, linewidth=1.8)
        axes.annotate(f"{values[-1]:.3g}", (left[-1], values[-1]), (0, 7), "data", "offset points", ha="center", size=9)
        axes.set_title(name, loc="left", size=10.5, weight="bold", color=INK)
        axes.set(xlabel="layers left", ylabel="nats / token", xlim=(max(left) + 0.5, min(left) - 0.5), ymargin=0.22)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=PALE)
    if not grids and not costs:
        words = "The run's steps hold no per-layer scores, calibration loss or KL: nothing to draw here."
        figure.text(0.45 / width, 0.9 / height, words, color=SOFT, size=10.5)
    names = ", ".join(key.replace("_", " ") for key in grids) or "none"
    words = f"{title}. Heat maps over {dense} dense layers, {plural(len(steps), 'step')}: {names}. "
    words += " ".join(f"{name} ends at {p[-1][1]:.3g} with {p[-1][0]} layers left." for name, p in costs.items())
    return save_picture(figure, path or Path(run_dir) / "importance.png", title, words.strip())
