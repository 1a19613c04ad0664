"""Sections on what the groups do and which got better: DCM, activation patching, CMAP and attention knockout.

As `jaxmech.report.circuit_sections`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxmech.report import bars, curves
from jaxmech.report.figures import heat_map
from jaxmech.report.measures import CHANGED, Measure, measure_of
from jaxmech.report.parts import (
    Picture,
    Results,
    Section,
    Table,
    by_model,
    in_pairs,
    no_head_left,
    once_each,
    tint,
    without_heads,
)
from jaxmech.report.words import counted, head_name, listing, percent
from jaxmech.study import WHOLE_CIRCUIT

Runs = Mapping[str, Mapping[str, Any]]  # desideratum -> a run of DCM


def dcm(results: Results) -> Section | None:
    """What each group carries: accuracies of the trained masks, and the masks over the steps."""
    if not (found := by_model(results, "dcm")):
        return None
    common, variants = {}, {}
    for model, groups in found.items():
        common[model], variants[model] = _split(groups)
    rows = [_grids(common, variants)]
    for group in once_each(common.values()):
        having = {model: groups[group] for model, groups in common.items() if groups.get(group)}
        rows += in_pairs(_masks(results, model, group, runs, "masks") for model, runs in having.items())
    apart = [(model, group, runs) for model, groups in variants.items() for group, runs in groups.items()]
    rows += in_pairs(_masks(results, *one, "variant-masks") for one in apart)
    boxes = "positional" in once_each(runs for groups in found.values() for runs in groups.values())
    of_boxes = ": the position of the right segment, the object, or the box's label" * boxes
    text = (
        "A mask over the heads of a group was trained so that patching the selected heads from another prompt makes "
        "the model say what a desideratum predicts. High accuracy on held-out prompts with few selected heads means "
        f"that these carry that information{of_boxes}. Compare it with how often the model says the same with nothing "
        "patched (unpatched), which is what no selected head gives, too."
    )
    return Section(text, without_heads(results, "dcm"), rows=rows, tables=[_selections(found)])


def activation_patching(results: Results) -> Section | None:
    """The heads that DCM selected, patched in every model."""
    if not (found := by_model(results, "activation_patching")):
        return None
    row = []
    for of, groups in found.items():
        values = listing(
            f"{group}, {name}: {' / '.join(percent(by[m]['mean']) for m in results['models'] if m in by)}"
            for group, desiderata in groups.items()
            for name, by in desiderata.items()
        )
        draw = partial(bars.patching_bars, groups, results["models"])
        alt = f"Bars of mean accuracy in {listing(results['models'])}. {values}."
        row.append(Picture(f"activation_patching-{of}", draw, alt, f"Heads of {of}'s circuit, in every model."))
    text = (
        "The heads that DCM selected were patched from other prompts, in every model: where heads of one model work as "
        "well in another, both use them for the same. Bars are means over draws of prompts, whiskers one standard "
        "deviation."
    )
    return Section(text, without_heads(results, "activation_patching"), rows=in_pairs(row))


def cmap(results: Results) -> Section | None:
    """Heads of the fine-tuned models at work in the base."""
    whole = by_model(results, "cmap")
    found = {tuned: entry for tuned, entry in whole.items() if any(entry["groups"].values())}
    if not found:
        return None
    base, rows, tables = results["models"][0], [], []
    notes = [no_head_left(tuned) for tuned in whole if tuned not in found]
    measure = measure_of(results)
    known = {model: entry["value"] for model, entry in by_model(results, "accuracy").items()}
    for tuned, entry in found.items():
        lines = {model: known[model] for model in (base, tuned) if model in known}
        values = listing(
            f"{group} ({component}) {measure.text(one['value'])}"
            for component, by_group in entry["groups"].items()
            for group, one in by_group.items()
        )
        draw = partial(bars.cmap_bars, entry["groups"], lines, measure)
        alt, caption = (
            f"Bars of {measure.short} of {base} with {values}.",
            f"{measure.title} of {base}, patched by {tuned}.",
        )
        pictures = [Picture(f"cmap-{tuned}", draw, alt, caption)]
        pictures += _single_heads(results, tuned)
        rows.append(pictures)
        tables.append(_cmap_table(measure, base, tuned, entry["groups"]))
    text = (
        f"Activations of the heads of the fine-tuned model's circuit were patched into {base} on the same prompts. "
        f"What fine-tuning improved takes {base} from its own {measure.short} (solid line) towards the fine-tuned "
        "model's (dashed). z is a head's output; q, k and v are its query, key and value. The heat maps patch the z of "
        "one head at a time; frames mark the heads of the fine-tuned model's circuit."
    )
    return Section(text, notes, rows=rows, tables=tables)


def knockout(results: Results) -> Section | None:
    """What is measured against the first blocked layer."""
    if not (found := by_model(results, "knockout")):
        return None
    measure, known, row = measure_of(results), by_model(results, "accuracy"), []
    for model, by_edge in found.items():
        worst = listing(f"{edge} at least {measure.text(min(values))}" for edge, values in by_edge.items())
        own = known[model]["value"] if model in known else None
        draw = partial(curves.knockout_curves, by_edge, own, measure)
        alt = f"Curves of {measure.short} of {model} against the first layer in which attention is blocked: {worst}."
        row.append(Picture(f"knockout-{model}", draw, alt, f"{model}; source → target."))
    text = (
        "Attention from a source token to a target token was forbidden in a layer and all above it. Where a curve has "
        f"come up to the model's own {measure.short} (dashed), the source has read what it needs in the layers below."
    )
    return Section(text, rows=in_pairs(row))


def _split(groups: Mapping[str, Runs]) -> tuple[dict[str, Runs], dict[str, Runs]]:
    """Runs on the desiderata of several groups, and on those of a single group, if there are several groups."""
    names = once_each(groups.values())
    several = [name for name in names if len(groups) == 1 or sum(name in runs for runs in groups.values()) > 1]
    common: dict[str, Runs] = {}
    variants: dict[str, Runs] = {}
    for group, runs in groups.items():
        common[group] = {name: run for name, run in runs.items() if name in several}
        if single := {name: run for name, run in runs.items() if name not in several}:
            variants[group] = single
    return common, variants


def _grids(common: Mapping[str, Mapping[str, Runs]], variants: Mapping[str, Mapping[str, Runs]]) -> list[Picture]:
    """A grid for each model, and one of the variants for all."""
    grids = []
    for model, groups in common.items():
        caption = f"{model}: test accuracy, and how many of the group's heads were selected{_brackets(groups)}."
        grids.append(_grid(f"dcm-{model}", groups, once_each(groups.values()), caption))
    columns = {f"{model}\n{group}": runs for model, groups in variants.items() for group, runs in groups.items()}
    caption = f"Desiderata that were tried on one group alone{_brackets(columns)}."
    return grids + ([_grid("dcm-variants", columns, once_each(columns.values()), caption)] if columns else [])


def _brackets(columns: Mapping[str, Runs]) -> str:
    """What stands in brackets under the names of desiderata."""
    known = any("unpatched" in run for runs in columns.values() for run in runs.values())
    return "; in brackets the accuracy with nothing patched" if known else ""


def _grid(file: str, columns: Mapping[str, Runs], names: list[str], caption: str) -> Picture:
    values = "; ".join(
        f"{' '.join(column.split())}: {listing(_cell(name, runs[name]) for name in names if name in runs)}"
        for column, runs in columns.items()
        if runs
    )
    return Picture(file, partial(curves.dcm_grid, columns, names), f"Grid. {values}.", caption)


def _cell(name: str, run: Mapping[str, Any]) -> str:
    before = f", {percent(run['unpatched'])} unpatched" if "unpatched" in run else ""
    return f"{name} {percent(run['test'])} with {counted(len(run['selected']), 'head')}{before}"


def _masks(results: Results, model: str, group: str, runs: Runs, kind: str) -> Picture:
    chosen = listing(f"{name}: {_selected(run)} of {len(run['heads'])}" for name, run in runs.items())
    alt = f"Lines of the mask of each head over the steps. Selected, {chosen}."
    caption = f"{group} in {model}: mask of each head. Coloured heads were selected (0.5 or less at the dotted step)."
    draw = partial(curves.mask_trajectories, runs, tint(results, model))
    return Picture(f"dcm-{kind}-{group}-{model}", draw, alt, caption)


def _selections(found: Mapping[str, Mapping[str, Runs]]) -> Table:
    """Which heads were selected, group x desideratum, all models side by side."""
    known = any("unpatched" in run for groups in found.values() for runs in groups.values() for run in runs.values())
    columns = ["selected", "test", *["unpatched"] * known, "validation", "step"]
    header, rows = ["group", "desideratum", *columns * len(found)], []
    for group in once_each(found.values()):
        for name in once_each(groups.get(group, {}) for groups in found.values()):
            row = [group, name]
            for groups in found.values():
                run = groups.get(group, {}).get(name)
                row += [_run_cell(column, run) for column in columns] if run else ["-"] * len(columns)
            rows.append(row)
    caption = (
        "The selected heads, their accuracy beside the unpatched model's, and the step after which the mask was taken."
    )
    numbers = [i for i, name in enumerate(header) if name in columns[1:]]
    return Table(caption, header, rows, numbers, [("", 2), *((model, len(columns)) for model in found)])


def _run_cell(column: str, run: Mapping[str, Any]) -> str:
    match column:
        case "selected":
            return f"{_selected(run)} (of {len(run['heads'])})"
        case "step":
            return str(run["step"])
    return percent(run.get(column))


def _selected(run: Mapping[str, Any]) -> str:
    return ", ".join(map(head_name, run["selected"])) or "none"


def _single_heads(results: Results, tuned: str) -> list[Picture]:
    """What each head does to what the study measures of the base, a map per role, all on one scale."""
    base, pictures, changed = results["models"][0], [], CHANGED[measure_of(results).name]
    found = results["cmap"][tuned]["heads"]
    changes = {role: np.array(x["change"], float) for role, x in found.items()}
    bound = max((float(abs(change).max()) for change in changes.values()), default=0)
    for role, change in changes.items():
        layer, head = (int(i) for i in np.unravel_index(change.argmax(), change.shape))
        best = f"{head_name((layer, head))} ({changed.signed(change[layer, head])})"
        look = {"bound": bound, "label": changed.label, "unit": changed.unit}
        title = f"single heads of {tuned} in {base}"
        draw = partial(heat_map, change, _heads_at(results, tuned, role), title, f"z at {role}", **look)
        of = f"{base}'s {changed.short}"
        alt = f"Heat map of the change of {of} by each head of {tuned} at {role}. Best: {best}."
        caption = f"{tuned} at {role}, {counted(found[role]['prompts'], 'prompt')}; best: {best}."
        pictures.append(Picture(f"cmap-heads-{role}-{tuned}", draw, alt, caption))
    return pictures


def _heads_at(results: Results, model: str, role: str) -> list[list[int]]:
    """The heads of the model's circuit at a role, as far as it is known."""
    found = by_model(results, "discovery").get(model)
    if not found:
        return []
    groups = by_model(results, "minimality").get(model, {}).get("circuit", found["groups"])
    return [head for group, at in found["roles"].items() if at == role for head in groups.get(group, [])]


def _cmap_table(measure: Measure, base: str, tuned: str, components: Mapping[str, Mapping[str, Any]]) -> Table:
    groups = sorted(once_each(components.values()), key=lambda group: group == WHOLE_CIRCUIT)
    rows = [[g, *(measure.with_interval(by[g]) if g in by else "-" for by in components.values())] for g in groups]
    caption = (
        f"{measure.short[0].upper() + measure.short[1:]} of {base} with activations of {tuned}, with 95 % intervals."
    )
    return Table(caption, ["group", *components], rows, range(1, 1 + len(components)))
