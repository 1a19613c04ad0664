"""What a section of the report is made of, and how a stage's results are gone through. No stage is known here."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from matplotlib.figure import Figure

from jaxmech.report.style import colour

Results = Mapping[str, Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Picture:
    """A figure that is yet to be drawn.

    Attributes:
      name: its file's name, without a suffix; made fit for a file system when it is written.
      draw: draws it.
      alt: what it shows, for who cannot see it.
      caption: what it is of.
    """

    name: str
    draw: Callable[[], Figure]
    alt: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      caption: what it is of.
      header: names of the columns.
      rows: cells, as text.
      numbers: which columns are numbers, and stand to the right.
      spans: (name, number of columns) of a line above the header; empty for none.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    numbers: Collection[int] = ()
    spans: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Section:
    """What stands under a heading.

    Attributes:
      text: what was done and how to read it.
      notes: what is missing or out of the ordinary.
      before: tables above the figures.
      rows: figures, those of one row side by side where there is room.
      tables: tables below the figures.
    """

    text: str
    notes: list[str] = field(default_factory=list)
    before: list[Table] = field(default_factory=list)
    rows: list[list[Picture]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def by_model(results: Results, stage: str) -> dict[str, Any]:
    """The stage's results in the order of the models, without empty ones."""
    found = results.get(stage) or {}
    return {model: found[model] for model in results["models"] if found.get(model)}


def without_heads(results: Results, stage: str) -> list[str]:
    """A note for each model of which the stage has an empty result, since no head is left in its circuit."""
    found = results.get(stage) or {}
    return [no_head_left(model) for model in results["models"] if model in found and not found[model]]


def no_head_left(model: str) -> str:
    """Why a stage was not run for a model."""
    return f"{model}: not run, because no head is left in its circuit."


def once_each(lists: Iterable[Iterable[Name]]) -> list[Name]:
    """All names, or heads, each once and in the order in which they come first."""
    return list(dict.fromkeys(name for names in lists for name in names))


def in_pairs(pictures: Iterable[Picture]) -> list[list[Picture]]:
    """Rows of two."""
    pictures = list(pictures)
    return [pictures[i : i + 2] for i in range(0, len(pictures), 2)]


def tint(results: Results, model: str) -> str:
    """The model's colour, the same in all figures."""
    return colour(results["models"].index(model))
