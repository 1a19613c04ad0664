"""How figures look and are written: one width, one font, colours that readers with colour blindness tell apart.

A figure is as wide as a phone's screen shows legibly; the page sets several side by side where there is room.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmech.files import replacing
from jaxmech.metrics import ACCURACY
from jaxmech.report.measures import Measure

WIDTH = 4.8  # inches, of every figure
INK, MUTED, PALE, RULE = "#222222", "#595959", "#b8b8b8", "#d9d9d9"  # text on white: 15.9 and 7.0 to 1
# After Okabe & Ito and Tol; all at least 3 to 1 on white, the blue, the red and the purple fit for text (4.5 to 1).
COLOURS = ("#0072b2", "#c14a00", "#00805c", "#8b3a8b", "#946c00", "#3d7d93", "#a83250", "#5b6f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#8a8a8a",
    "ytick.color": "#8a8a8a",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollars
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.6,
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "jaxmech",  # equal figures, equal bytes
}
styled = rc_context(SETTINGS)
"""Decorator of functions that draw."""


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of the common width, `height` inches high, with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes the figure, whole or not at all: as SVG if `path` ends so, else as PNG at 160 dots per inch.

    Nothing in the file depends on the time, so that equal figures are equal bytes.
    """
    vector = Path(path).suffix == ".svg"
    options = {"format": "svg", "metadata": {"Date": None}} if vector else {"format": "png", "dpi": 160}
    with rc_context(SETTINGS), replacing(path) as temporary:
        figure.savefig(temporary, **options)


def colour(i: int) -> str:
    """The i-th colour, that of the i-th model; they repeat."""
    return COLOURS[i % len(COLOURS)]


def other_colour(i: int) -> str:
    """The i-th colour of what is not a model, another than those of the first three models."""
    return COLOURS[3 + i % (len(COLOURS) - 3)]


def ink_on(shade: Sequence[float]) -> str:
    """Black or white, whichever is read better on a shade (red, green, blue in 0..1); at least 4.5 to 1 on any."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shade]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # WCAG 2
    return "black" if luminance > 0.179 else "white"


def percent_axis(axes: Axes, which: str = "x", label: str = "accuracy, %", top: float = 100) -> None:
    """Makes one axis ("x" or "y") one of percentages from 0 to `top`, with a grid."""
    limits, ticks, name = {
        "x": (axes.set_xlim, axes.set_xticks, axes.set_xlabel),
        "y": (axes.set_ylim, axes.set_yticks, axes.set_ylabel),
    }[which]
    limits(0, top)
    ticks(range(0, 101, 20))
    name(label)
    axes.grid(axis="x" if which == "x" else "y")


def value_axis(
    axes: Axes, which: str, measure: Measure, values: Iterable[float], label: str = "", top: float = 100
) -> None:
    """Makes one axis ("x" or "y") that of a measure: accuracies from 0 to `top`, others as far as `values` reach."""
    label = label or measure.label
    if measure.name == ACCURACY:
        percent_axis(axes, which, label, top)
        return
    low, high = limits_of(measure.unit * value for value in values)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(label)
    axes.grid(axis="x" if which == "x" else "y")


def limits_of(values: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis that shows the values and 0, with room beyond those that are not 0."""
    values = [0.0, *values]
    margin = 0.05 * (max(values) - min(values) or 1.0)
    return min(values) - margin * (min(values) < 0), max(values) + margin


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """The legend of `axes` under the figure, if there is anything to name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(handles)))


def wrapped(name: str, width: int = 16) -> str:
    """`name` in lines of at most `width` characters, broken after - _ / + or a space where that is possible."""
    lines = [""]
    for part in _parts(name, width):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip(" ") for line in lines)


def _parts(name: str, width: int) -> Iterable[str]:
    for part in re.findall(r"[^-_/+ ]*[-_/+ ]?", name):
        yield from (part[i : i + width] for i in range(0, len(part), width))
