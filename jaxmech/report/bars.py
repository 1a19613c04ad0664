"""Figures of accuracies and scores as horizontal bars, which leave room for long names.

Owns the drawing; what the numbers mean is said in the sections' modules. Entries are those of the study's results:
{"value", "low", "high"}, of the study's measure.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmech.report.measures import Measure
from jaxmech.report.style import (
    INK,
    MUTED,
    PALE,
    colour,
    legend_below,
    new_axes,
    other_colour,
    percent_axis,
    styled,
    value_axis,
    wrapped,
)
from jaxmech.report.words import MINUS, percent

Entry = Mapping[str, Any]
WHISKERS = {"fmt": "none", "ecolor": INK, "elinewidth": 1, "capsize": 2}
SLOT = 0.19  # inches a bar takes, with its gap


@styled
def model_bars(found: Mapping[str, Entry], models: Sequence[str], measure: Measure) -> Figure:
    """What is measured of each model, with its interval; {model: entry}."""
    figure, axes = new_axes(0.75 + 0.4 * len(found))
    for y, (model, entry) in enumerate(found.items()):
        axes.barh(y, measure.unit * entry["value"], height=0.62, color=colour(models.index(model)))
        _interval(axes, y, entry, measure)
        _beside(axes, y, measure.with_interval(entry))
    _name_rows(axes, list(range(len(found))), [wrapped(model) for model in found])
    value_axis(axes, "x", measure, _ends(found.values()))
    return figure


@styled
def faithfulness_bars(
    rows: Sequence[tuple[str, str, Entry]], models: Sequence[str], measure: Measure, share: str
) -> Figure:
    """Circuit and model side by side; rows of (circuit of, in model, entry), `share`: "ratio" or "recovered"."""
    names = [f"{wrapped(f'circuit of {of}', 22)}\n{wrapped(f'in {model}', 22)}" for of, model, _ in rows]
    lines = max((name.count("\n") + 1 for name in names), default=0)
    figure, axes = new_axes(1.3 + max(3.6 * SLOT, 0.15 * lines) * len(rows))
    for y, (_, model, entry) in enumerate(rows):
        tint = colour(models.index(model))
        for side, place, face in (("model", y - 0.25, "white"), ("circuit", y + 0.05, tint)):
            axes.barh(place, measure.unit * entry[side]["value"], height=0.28, color=face, edgecolor=tint)
            _interval(axes, place, entry[side], measure)
        drawn = [measure.unit * value for value in entry["random"]]
        axes.scatter(
            drawn, np.full(len(drawn), y + 0.3), s=12, color=PALE, edgecolor=MUTED, linewidth=0.6, clip_on=False
        )
        _beside(axes, y - 0.1, percent(entry[share]["value"]))
    _beside(axes, -0.62, share, va="bottom", color=MUTED)
    _name_rows(axes, list(range(len(rows))), names)
    shown = _ends(entry[side] for *_, entry in rows for side in ("model", "circuit"))
    value_axis(axes, "x", measure, [*shown, *(x for *_, entry in rows for x in entry["random"])])
    axes.barh(0, 0, color="white", edgecolor=INK, label="model")
    axes.barh(0, 0, color=INK, label="circuit alone")
    axes.scatter([], [], s=12, color=PALE, edgecolor=MUTED, linewidth=0.6, label="random circuits")
    legend_below(figure, axes, 3)
    return figure


@styled
def minimality_bars(groups: Mapping[str, Sequence[Entry]], threshold: float, tint: str) -> Figure:
    """Score of each head, on a scale that is logarithmic above the threshold; infinite scores reach the right edge."""
    groups = {group: entries for group, entries in groups.items() if entries}
    count = sum(map(len, groups.values())) + len(groups)
    figure, axes = new_axes(1.0 + SLOT * max(count, 3))
    places = _grouped_rows(
        axes, {g: [f"{e['head'][0]}.{e['head'][1]}" for e in entries] for g, entries in groups.items()}
    )
    right = _score_axis(axes, [e["score"] for entries in groups.values() for e in entries], threshold)
    for entries, ys in zip(groups.values(), places, strict=True):
        for entry, y in zip(entries, ys, strict=True):
            value = right if entry["score"] is None else 100 * entry["score"]
            face = tint if entry["kept"] else "white"
            axes.barh(y, value, height=0.66, color=face, edgecolor=tint if entry["kept"] else MUTED, linewidth=0.8)
            if entry["score"] is None:
                axes.text(0.995, y, "∞", transform=axes.get_yaxis_transform(), va="center", ha="right", color="white")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(100 * threshold, color=INK, linewidth=1, linestyle="--", label=f"threshold, {100 * threshold:g} %")
    axes.set_ylabel("layer.head")
    axes.barh(0, 0, color=tint, edgecolor=tint, label="kept")
    axes.barh(0, 0, color="white", edgecolor=MUTED, label="left out")
    legend_below(figure, axes, 3)
    return figure


@styled
def patching_bars(groups: Mapping[str, Mapping[str, Mapping[str, Entry]]], models: Sequence[str]) -> Figure:
    """Mean and standard deviation of accuracies, {group: {desideratum: {model: {"mean", "std", "values"}}}}."""
    groups = {group: entries for group, entries in groups.items() if entries}
    count = sum(map(len, groups.values()))
    step = max(1.3, 0.62 * len(models))  # two lines of a name
    figure, axes = new_axes(1.1 + SLOT * (step * count + len(groups)))
    labels = {group: [wrapped(name, 22) for name in entries] for group, entries in groups.items()}
    places = _grouped_rows(axes, labels, step)
    height = 0.78 * step / len(models)
    for entries, ys in zip(groups.values(), places, strict=True):
        for by_model, y in zip(entries.values(), ys, strict=True):
            if all(entry["mean"] is None for entry in by_model.values()):
                axes.text(1, y, "no head selected", va="center", color=MUTED, fontsize=7.5, style="italic")
                continue
            for model, entry in by_model.items():
                i = models.index(model)
                if entry["mean"] is not None:
                    place = y + (i - (len(models) - 1) / 2) * height
                    axes.barh(place, 100 * entry["mean"], height=0.88 * height, color=colour(i))
                    axes.errorbar(100 * entry["mean"], place, xerr=100 * (entry["std"] or 0), **WHISKERS)
    percent_axis(axes, label="accuracy on the desideratum's target, %")
    for i, model in enumerate(models):
        axes.barh(0, 0, color=colour(i), label=wrapped(model, 24))
    legend_below(figure, axes, 3)
    return figure


@styled
def cmap_bars(components: Mapping[str, Mapping[str, Entry]], lines: Mapping[str, float], measure: Measure) -> Figure:
    """What is measured of the base with each group patched, {component: {group: entry}}; `lines`: of {model} alone."""
    groups = list(dict.fromkeys(group for entries in components.values() for group in entries))
    step = max(1.0, 0.9 * len(components))
    figure, axes = new_axes(1.45 + SLOT * (step * len(groups)))
    ys, height = [step * i for i in range(len(groups))], 0.84 * step / max(len(components), 1)
    for i, (component, entries) in enumerate(components.items()):
        axes.barh(0, 0, color=other_colour(i), label=component)
        for y, group in zip(ys, groups, strict=True):
            if group in entries:
                place = y + (i - (len(components) - 1) / 2) * height
                bar = measure.unit * entries[group]["value"]
                axes.barh(place, bar, height=0.88 * height, color=other_colour(i))
                _interval(axes, place, entries[group], measure)
    for (model, value), dashes in zip(lines.items(), ("-", "--"), strict=False):
        axes.axvline(measure.unit * value, color=INK, linewidth=1.1, linestyle=dashes, label=wrapped(model, 24))
    _name_rows(axes, ys, [wrapped(group) for group in groups], margin=step / 2)
    shown = _ends(entry for entries in components.values() for entry in entries.values())
    value_axis(axes, "x", measure, [*shown, *lines.values()])
    legend_below(figure, axes, 4)
    return figure


def _beside(axes: Axes, y: float, text: str, **look: Any) -> None:
    """Text to the right of a row."""
    axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), **{"va": "center", **look})


def _ends(entries: Iterable[Entry]) -> list[float]:
    """The ends of all bars and whiskers."""
    return [entry[name] for entry in entries for name in ("value", "low", "high")]


def _interval(axes: Axes, y: float, entry: Entry, measure: Measure) -> None:
    """A whisker from low to high."""
    value, low, high = (measure.unit * entry[name] for name in ("value", "low", "high"))
    axes.errorbar(value, y, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], **WHISKERS)


def _name_rows(axes: Axes, ys: Sequence[float], names: Sequence[str], margin: float = 0.6) -> None:
    """Names the rows, first on top."""
    axes.set_yticks(ys, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim((ys[-1] if ys else 0) + margin, (ys[0] if ys else 0) - margin)


def _score_axis(axes: Axes, scores: Sequence[float | None], threshold: float) -> float:
    """Percentages, linear up to the threshold and in powers of ten beyond; returns the right end, above all scores."""
    finite, unit = [100 * score for score in scores if score is not None], 100 * threshold or 1.0
    left, right = -0.2 * unit if min(finite, default=0) >= -0.15 * unit else -1.2 * unit, 10 * unit
    while min(finite, default=0) < left:
        left *= 10
    while max(finite, default=0) >= right:
        right *= 10
    axes.set_xscale("symlog", linthresh=unit, linscale=0.6)
    axes.set_xlim(left, right)
    steps = [unit * 10.0**i for i in range(12) if unit * 10.0**i <= right]
    ticks = [-step for step in reversed(steps) if -step >= left] + [0] + steps
    axes.set_xticks(ticks, [f"{tick:,.12g}".replace("-", MINUS) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x")
    axes.set_xlabel("score, %")
    return right


def _grouped_rows(axes: Axes, groups: Mapping[str, Sequence[str]], step: float = 1.0) -> list[list[float]]:
    """Rows under the names of their groups, each in a line of its own; the place of every row."""
    places, names, y = [], [], 0.0
    for group, rows in groups.items():
        look = {"weight": "bold", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}, "zorder": 4}
        axes.text(0.012, y, group, transform=axes.get_yaxis_transform(), va="center", **look)
        ys = [y + 0.5 + step * (i + 0.5) for i in range(len(rows))]
        places.append(ys)
        names += rows
        y += 1 + step * len(rows)
    _name_rows(axes, [place for ys in places for place in ys], names, margin=0.7 * step)
    axes.set_ylim(y - 0.4, -0.6)
    return places
