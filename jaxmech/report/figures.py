"""Figures of all heads of a model, layer x head. Colours are a diverging map with zero in the middle."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jaxmech.report.style import RULE, ink_on, new_axes, styled


@styled
def heat_map(
    mean: np.ndarray,
    chosen: Iterable[Sequence[int]],
    title: str,
    subtitle: str = "",
    *,
    bound: float | None = None,
    label: str = "change of p(correct), %",
    unit: float = 100,
    moved: Iterable[Sequence[int]] = (),
) -> Figure:
    """Scores of every head, layer x head; chosen heads are framed, those that moved to another group struck out, too.

    Args:
      mean: float [L, N], relative change of the correct token's probability, or another number.
      chosen: (layer, head) pairs to frame.
      title: first line.
      subtitle: second line.
      bound: the number at which the colours end, to compare figures; the largest of `mean` by default.
      label: what is shown.
      moved: (layer, head) pairs to frame and to strike out.
      unit: what numbers are multiplied with; 100 shows fractions in percent.
    """
    layers, heads = mean.shape
    cell = min(0.42, 3.45 / heads, 6 / layers)  # inches
    figure, axes = new_axes(0.95 + cell * max(layers, 4))
    if bound is None:
        bound = float(np.nanmax(np.abs(mean), initial=0))
    bound = unit * max(bound, 1e-12)  # zero is the neutral colour, also where nothing has an effect
    # "none" keeps one pixel per head in SVG, which is then drawn with sharp edges.
    image = axes.imshow(
        unit * mean, cmap="RdBu", vmin=-bound, vmax=bound, origin="lower", aspect="equal", interpolation="none"
    )
    moved = list(moved)
    for layer, head in [*moved, *chosen]:
        frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=4.5 * cell)
        axes.add_patch(frame).set(clip_on=False, zorder=3)
    for layer, head in moved:
        ink = ink_on([float(x) for x in image.to_rgba(unit * mean[layer, head])[:3]])
        look = {"color": ink, "linewidth": max(0.9, 4.5 * cell), "solid_capstyle": "butt"}
        axes.plot([head - 0.4, head + 0.4], [layer - 0.4, layer + 0.4], zorder=4, **look)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(_ticks(heads))
    axes.set_yticks(_ticks(layers))
    axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=RULE, linewidth=min(0.5, 2 * cell))
    axes.tick_params(which="minor", length=0)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_title(f"{title}\n{subtitle}" if subtitle else title)
    beside = axes.inset_axes((1 + 0.1 / (cell * heads), 0, 0.13 / (cell * heads), 1))  # as high as the map
    figure.colorbar(image, cax=beside, ticks=MaxNLocator(6)).set_label(label)
    return figure


def _ticks(count: int) -> np.ndarray:
    return np.arange(0, count, 1 if count <= 16 else 4 if count <= 48 else 8)
