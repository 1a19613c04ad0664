"""The report of a study: its results as one page that opens without a network, and every figure as PNG and SVG.

Equal results give equal bytes. Owns the order of the sections; what they say is in their own modules, what the page
looks like in template.html.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jaxmech.files import write_text
from jaxmech.report import circuit_sections, criteria_sections, patching_sections
from jaxmech.report.headline import doubts, headline
from jaxmech.report.measures import measure_of
from jaxmech.report.parts import Picture, Results, Section, Table
from jaxmech.report.style import save_figure
from jaxmech.report.words import SPACE, listing

# Title, stage of the study, and what makes the section.
HEADINGS: tuple[tuple[str, str, Callable[[Results], Section | None]], ...] = (
    ("Accuracy", "accuracy", circuit_sections.accuracy),
    ("Circuits", "discovery", circuit_sections.circuits),
    ("Minimality", "minimality", criteria_sections.minimality),
    ("Faithfulness", "faithfulness", criteria_sections.faithfulness),
    ("Overlap of the circuits", "overlap", criteria_sections.overlap),
    ("Completeness", "completeness", criteria_sections.completeness),
    ("What the groups carry (DCM)", "dcm", patching_sections.dcm),
    ("Activation patching", "activation_patching", patching_sections.activation_patching),
    ("Cross-model activation patching (CMAP)", "cmap", patching_sections.cmap),
    ("Attention knockout", "knockout", patching_sections.knockout),
    ("Table of heads", "discovery", circuit_sections.heads),
)


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
    timings: Mapping[str, Any],
) -> Path:
    """Writes report.html and figures/NAME.png and NAME.svg to `folder`, each whole or not at all.

    Args:
      folder: made if it is not there.
      results: a study's results, as `jaxmech study` writes them to results.json; "models" must be there, any stage may
        be missing, and its section then says so.
      settings, versions, timings: shown at the end; values are JSON, timings are seconds.

    Returns:
      The path of the page.

    Raises:
      ValueError: the results name no models.
    """
    if not results.get("models"):
        raise ValueError(f"results name no models, only {sorted(results)}; expected 'models', the base first.")
    folder = Path(folder)
    built = [(_title(results, title, stage), stage, build(results)) for title, stage, build in HEADINGS]
    files = _file_names(picture.name for *_, section in built for picture in _pictures(section))
    sections = [
        {
            "id": _slug(title),
            "title": title,
            "section": section,
            "rows": _rows(folder, section, files),
            "not_run": _not_run(results, stage),
        }
        for title, stage, section in built
    ]
    page = _template().render(
        base=results["models"][0],
        models=results["models"],
        names=listing(results["models"]),
        others=listing(results["models"][1:]),
        headline=headline(results),
        doubts=doubts(results),
        results=results,
        sections=sections,
        settings=_flat("Settings", settings),
        versions=_flat("Versions", versions),
        timings=_seconds(timings),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _title(results: Results, title: str, stage: str) -> str:
    """The section on accuracy is named after what the study measures."""
    return measure_of(results).title if stage == "accuracy" else title


def _not_run(results: Results, stage: str) -> str:
    if stage in results.get("left_out", ()):
        return "Left out: no desiderata were given (--desideratum)."
    return "Not run, because no head is left in any circuit." if results.get(stage) else "Not run."


def report_files(folder: str | Path, results: Mapping[str, Any]) -> list[Path]:
    """The files that `write_report` writes for these results."""
    folder = Path(folder)
    files = _file_names(picture.name for *_, build in HEADINGS for picture in _pictures(build(results)))
    figures = [folder / "figures" / f"{name}{suffix}" for name in files.values() for suffix in (".png", ".svg")]
    return [folder / "report.html", *figures]


def _template():
    loader = FileSystemLoader(Path(__file__).parent)
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, keep_trailing_newline=True, **options)
    environment.filters["tight"] = lambda text: text.replace(" %", f"{SPACE}%")
    return environment.get_template("template.html")


def _pictures(section: Section | None) -> list[Picture]:
    return [picture for row in section.rows for picture in row] if section else []


def _rows(folder: Path, section: Section | None, files: Mapping[str, str]) -> list[list[dict[str, Any]]]:
    """Draws the section's figures, one at a time, and returns what the template shows of each."""
    rows = section.rows if section else []
    return [[_drawn(folder / "figures" / files[picture.name], picture) for picture in row] for row in rows]


def _drawn(path: Path, picture: Picture) -> dict[str, Any]:
    figure = picture.draw()
    figure.draw_without_rendering()  # the layout settles with the second drawing, once the ticks are known
    for suffix in (".png", ".svg"):
        save_figure(figure, path.with_name(path.name + suffix))
        figure.set_layout_engine("none")  # one layout for both, as it takes a third of the time
    source = base64.b64encode(path.with_name(path.name + ".svg").read_bytes()).decode()
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return {"picture": picture, "source": source, "width": width, "height": height}


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """{name: file name} that every file system takes, all different, also where case is ignored."""
    files: dict[str, str] = {}
    for name in names:
        slug, i = _slug(name), 2
        while slug.lower() in {file.lower() for file in files.values()}:
            slug, i = f"{_slug(name)}-{i}", i + 1
        files[name] = slug
    return files


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-.")[:120] or "unnamed"


def _flat(caption: str, values: Mapping[str, Any]) -> Table:
    """Nested values, one line each, named by their place."""
    return Table(caption, ["name", "value"], [[name, _text(value)] for name, value in _leaves(values)])


def _seconds(timings: Mapping[str, Any]) -> Table:
    leaves = [(name, value) for name, value in _leaves(timings) if isinstance(value, int | float)]
    caption = f"Timings, {sum(value for _, value in leaves):,.1f} s in all"
    return Table(caption, ["name", "seconds"], [[name, f"{value:,.1f}"] for name, value in leaves], (1,))


def _leaves(values: Mapping[str, Any], name: str = "") -> Iterable[tuple[str, Any]]:
    """(place, value) of everything that is no mapping itself; a list of mappings is numbered."""
    for key, value in values.items():
        place = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, place)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            yield from ((f"{place}.{i}", item) for i, item in enumerate(value))
        else:
            yield place, value


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        nested = any(isinstance(item, list | tuple) for item in value)
        return ("; " if nested else ", ").join(map(_text, value)) or "-"
    return "-" if value is None else repr(value) if isinstance(value, str) and not value.strip() else str(value)
