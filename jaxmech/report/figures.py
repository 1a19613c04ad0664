"""Figures of head scores. Colours are a diverging map that readers with colour blindness can tell apart."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxmech.discovery import Head
from jaxmech.files import replacing


def heat_map(mean: np.ndarray, chosen: Iterable[Head], title: str, subtitle: str = "") -> Figure:
    """Scores of every head, layer x head, with the chosen heads framed.

    Args:
      mean: float [L, N], relative change of the correct token's probability.
      chosen: (layer, head) pairs to frame.
      title: first line.
      subtitle: second line.
    """
    layers, heads = mean.shape
    figure = Figure(figsize=(2.6 + 0.36 * max(heads, 8), 1.7 + 0.36 * max(layers, 4)), layout="constrained")
    axes = figure.add_subplot()
    bound = max(float(np.abs(mean).max()), 1e-12)  # zero is the neutral colour, also where nothing has an effect
    image = axes.imshow(100 * mean, cmap="RdBu", vmin=-100 * bound, vmax=100 * bound, origin="lower", aspect="equal")
    for layer, head in chosen:
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.8))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(_ticks(heads))
    axes.set_yticks(_ticks(layers))
    axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d9d9d9", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_title(f"{title}\n" + subtitle if subtitle else title, fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=max(10, 3 * layers))
    bar.set_label("change of p(correct), %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes the figure as PNG at 160 dots per inch, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png")


def _ticks(count: int) -> np.ndarray:
    return np.arange(0, count, 1 if count <= 16 else 4)
