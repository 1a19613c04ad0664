"""Figures of two quantities against each other: completeness, masks over steps, knockouts by layer, and DCM's grid.

Owns the drawing; what the numbers mean is said in the sections' modules.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxmech.metrics import ACCURACY
from jaxmech.report.measures import Measure
from jaxmech.report.style import (
    DASHES,
    INK,
    MARKERS,
    MUTED,
    PALE,
    WIDTH,
    ink_on,
    legend_below,
    limits_of,
    new_axes,
    other_colour,
    styled,
    value_axis,
    wrapped,
)
from jaxmech.report.words import percent

Entry = Mapping[str, Any]


@styled
def completeness_scatter(entries: Sequence[Entry], measure: Measure) -> Figure:
    """Circuit without K against model without K; entries {"name", "kind", "circuit", "model"}."""
    figure, axes = new_axes(3.3)
    fixed, sides = measure.name == ACCURACY, ("model", "circuit")
    low, high = (0, 100) if fixed else limits_of(measure.unit * entry[side] for entry in entries for side in sides)
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
    random = [entry for entry in entries if entry["kind"] == "random"]
    axes.scatter(
        *([measure.unit * entry[side] for entry in random] for side in sides),
        s=12, color=PALE, edgecolor=MUTED, linewidth=0.5, zorder=2, label="random heads",
    )  # fmt: skip
    for i, entry in enumerate(entry for entry in entries if entry not in random):
        shade = INK if entry["kind"] == "nothing" else other_colour(i - 1)
        look = {"s": 46, "color": shade, "marker": MARKERS[i % len(MARKERS)], "alpha": 0.85, "linewidth": 0}
        place = (measure.unit * entry[side] for side in sides)
        axes.scatter(*place, zorder=3, label=wrapped(entry["name"]), **look)
    for which, side in (("x", "model"), ("y", "circuit")):
        value_axis(axes, which, measure, (), f"{side} without K: {measure.label}")
    limits = (-4, 104) if fixed else (low, high)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[1:] + handles[:1], names[1:] + names[:1], loc="outside right center", title="K")
    return figure


@styled
def knockout_curves(curves: Mapping[str, Sequence[float]], own: float | None, measure: Measure) -> Figure:
    """What is measured against the first blocked layer, a curve per pair of roles; `own`: of the model alone."""
    figure, axes = new_axes(2.75 + 0.17 * ((len(curves) + 2) // 2))
    if own is not None:
        axes.axhline(measure.unit * own, color=INK, linewidth=1, linestyle="--", label="no knockout")
    named = [name for name in curves if not name.endswith("random")]
    for i, (name, values) in enumerate(curves.items()):
        shade = other_colour(named.index(name)) if name in named else MUTED
        look = {"color": shade, "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.5}
        marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4 if len(values) <= 16 else 2.5}
        height = measure.unit * np.array(values, float)
        axes.plot(range(len(values)), height, label=name.replace("->", "→"), **look, **marker)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    axes.set_xlabel("first blocked layer")
    shown = [*(value for values in curves.values() for value in values), *([] if own is None else [own])]
    value_axis(axes, "y", measure, shown, top=104)
    legend_below(figure, axes, 2)
    return figure


@styled
def dcm_grid(columns: Mapping[str, Mapping[str, Entry]], desiderata: Sequence[str]) -> Figure:
    """Accuracy and number of selected heads, {column: {desideratum: run}}, in numbers and shades of blue.

    Under the name of a desideratum stands the accuracy of the unpatched model.
    """
    lines = max((1 + wrapped(name, 20).count("\n") for name in desiderata), default=1)
    figure, axes = new_axes(0.75 + (0.44 if lines == 1 else 0.5) * len(desiderata))
    table, shades = np.full((len(desiderata), len(columns)), np.nan), colormaps["Blues"]
    for j, runs in enumerate(columns.values()):
        for i, name in enumerate(desiderata):
            if name not in runs:
                axes.text(j, i, "not run", ha="center", va="center", color=MUTED, fontsize=7.5, style="italic")
                continue
            run = runs[name]
            table[i, j] = run["test"]
            text = f"{percent(run['test'])}\n{len(run['selected'])} of {len(run['heads'])}"
            ink = ink_on(shades(run["test"])[:3])
            axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=8, linespacing=1.05)
    axes.imshow(table, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(
        range(len(columns)), ["\n".join(wrapped(part, 14) for part in name.split("\n")) for name in columns]
    )
    names = [wrapped(name, 20) + _unpatched(columns, name) for name in desiderata]
    axes.set_yticks(range(len(desiderata)), names, linespacing=1.05)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(desiderata) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def _unpatched(columns: Mapping[str, Mapping[str, Entry]], name: str) -> str:
    """A line with the unpatched accuracy on a desideratum, of each column where they differ; "" if it is not known."""
    known = [percent(runs[name]["unpatched"]) for runs in columns.values() if "unpatched" in runs.get(name, {})]
    return f"\n({' / '.join(known if len(set(known)) > 1 else known[:1])})" if known else ""


@styled
def mask_trajectories(runs: Mapping[str, Entry], tint: str) -> Figure:
    """Masks of a group's heads over the steps, a panel per desideratum; selected heads in `tint`, the others grey."""
    columns = 3
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(WIDTH, 0.35 + 1.22 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(runs) :]:
        panel.set_visible(False)
    for i, (name, run) in enumerate(runs.items()):
        panel = panels.flat[i]
        masks, selected = np.array(run["masks"], float), {tuple(head) for head in run["selected"]}
        for head, values in zip(run["heads"], masks.T, strict=True):
            chosen = tuple(head) in selected
            look = {"color": tint, "linewidth": 1.4, "zorder": 3} if chosen else {"color": "#8f8f8f", "linewidth": 0.8}
            panel.plot(range(1, len(values) + 1), values, **look)
        panel.axvline(run["step"], color=INK, linewidth=0.8, linestyle=":")
        panel.set_title(wrapped(name, 20), fontsize=7.5)
        panel.set_ylim(-0.05, 1.05)
        panel.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        panel.tick_params(labelsize=7.5, labelbottom=i + columns >= len(runs))
        panel.grid(axis="y")
    figure.supxlabel("step", fontsize=8.5)
    figure.supylabel("mask", fontsize=8.5)
    return figure
