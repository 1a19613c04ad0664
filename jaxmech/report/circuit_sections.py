"""Sections on the models and how their circuits were found.

Owns the words and what is shown. Each function returns its section, or None where its stage was not run; the figures
are drawn when the page is written.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxmech.chain import receivers_text
from jaxmech.metrics import ACCURACY
from jaxmech.report import bars
from jaxmech.report.figures import heat_map
from jaxmech.report.measures import CHANGED, Changed, changed_of, measure_of
from jaxmech.report.parts import Picture, Results, Section, Table, by_model, in_pairs, once_each
from jaxmech.report.words import SPACE, head_name, listing, percent

ROLES = {
    "last": "the last token",
    "query_box": "the box's label in the question",
    "prev_query_box": "the earlier occurrence of that label",
}
MOST_HEADS = 8  # named in a description


def accuracy(results: Results) -> Section | None:
    """Accuracy of each model, or what else the study measures."""
    if not (found := by_model(results, "accuracy")):
        return None
    measure, notes = measure_of(results), []
    values = listing(f"{model} {measure.with_interval(entry)}" for model, entry in found.items())
    alt, caption = f"Bars of {measure.short}: {values}.", f"{measure.title}, with its interval in brackets."
    text = "How often the most probable next token is the right answer."
    if measure.name != ACCURACY:
        text = f"What models and circuits are measured by here: the {measure.long}, in short {measure.short}."
        answered = listing(f"{model} {percent(entry['accuracy'])}" for model, entry in found.items())
        notes.append(f"Accuracy, that is, how often the most probable next token is the right answer: {answered}.")
    text += (
        " Whiskers here and below are 95 % intervals over prompts: of accuracies by Wilson's score, of all else by "
        "bootstrap, unless said otherwise."
    )
    if results.get("chance") is not None:
        text += f" Naming any object of the scene would be right for {percent(results['chance'])}."
    draw = partial(bars.model_bars, found, results["models"], measure)
    return Section(text, notes, rows=[[Picture("accuracy", draw, alt, caption)]])


def circuits(results: Results) -> Section | None:
    """The chain of sweeps, and a heat map of every stage in every model."""
    if not (found := by_model(results, "discovery")):
        return None
    rows = []
    for group in once_each(entry["means"] for entry in found.values()):
        maps = {m: np.array(entry["means"][group], float) for m, entry in found.items() if group in entry["means"]}
        bound = float(max(np.nanmax(np.abs(mean), initial=0) for mean in maps.values()))
        rows += in_pairs(_stage_map(results, group, model, mean, bound) for model, mean in maps.items())
    notes = [f"{model}: {entry['stopped']}" for model, entry in found.items() if entry.get("stopped")]
    text = (
        "Path patching: every head in turn gets its output on a corrupt prompt, and only the paths to the stage's "
        f"receivers carry the change. Colour is the mean {changed_of(results).long}, so the reddest heads matter most; "
        "frames mark those chosen for the group, named layer.head. A head that a later stage at the same token selects "
        "as well leaves the earlier group for the later one, and is struck out. The maps of a group share one scale."
    )
    return Section(text, notes, [_chain(results["chain"])] if results.get("chain") else [], rows)


def heads(results: Results) -> Section | None:
    """A table of all heads of all circuits."""
    if not (found := by_model(results, "discovery")):
        return None
    minimal, crossed = by_model(results, "minimality"), by_model(results, "cmap")
    header, spans, changed = ["group", "role", "head"], [("", 3)], changed_of(results)
    single = CHANGED[measure_of(results).name]
    score = "score, %" if changed.unit == 100 else "score"
    for model in found:
        columns = [score, "kept"] if model in minimal else [score]
        header, spans = header + columns, [*spans, (model, len(columns))]
    header += [f"z of {tuned}" for tuned in crossed]
    spans += [(f"change of {results['models'][0]}'s {single.short} by", len(crossed))] if crossed else []
    rows = []
    for group in once_each(entry["groups"] for entry in found.values()):
        role = next(entry["roles"][group] for entry in found.values() if group in entry["roles"])
        for head in once_each(map(tuple, entry["groups"].get(group, [])) for entry in found.values()):
            row = [group, role, head_name(head)]
            for model, entry in found.items():
                row.append(_score(entry, group, head, changed))
                if model in minimal:
                    row.append(_kept(minimal[model]["groups"].get(group, []), head))
            rows.append(row + [_single(entry["heads"], role, head, single) for entry in crossed.values()])
    text = (
        f"All heads of the circuits as layer.head: the mean {changed.long} with its 95 % interval (without one where "
        "the model's own circuit does not have the head in this group), whether minimality kept it, and "
        f"what the fine-tuned model's output (z) of this head alone does in the base: {single.long}"
        f"{f', {single.mark}' * bool(single.mark)}."
    )
    return Section(text, tables=[Table("Heads of the circuits.", header, rows, range(3, len(header)), spans)])


def _chain(chain: Sequence[Mapping[str, Any]]) -> Table:
    """The stages of discovery."""
    rows = [
        [stage["group"], stage["sender"], _receivers(stage) or "the logits", stage["via"] or "-", str(stage["k"])]
        for stage in chain
    ]
    known = [f"{role} is {ROLES[role]}" for role in dict.fromkeys(stage["sender"] for stage in chain) if role in ROLES]
    caption = "The sweeps that find the groups, in order" + (f"; {listing(known)}." if known else ".")
    return Table(caption, ["group", "sender at", "receivers", "via", "heads, at most"], rows, (4,))


def _receivers(stage: Mapping[str, Any]) -> str:
    return receivers_text(stage["receivers"] or "")


def _stage_map(results: Results, group: str, model: str, mean: np.ndarray, bound: float) -> Picture:
    chosen = results["discovery"][model]["groups"].get(group, [])
    stage = next((stage for stage in results.get("chain") or [] if stage["group"] == group), None)
    where = ""
    if stage:
        reads = "logits" if stage["receivers"] is None else f"{stage['via']} of {_receivers(stage)}"
        where = f"from {stage['sender']} to {reads}"
    changed = changed_of(results)
    named = [f"{head_name(h)}{SPACE}({changed.signed(float(mean[tuple(h)]))})" for h in chosen[:MOST_HEADS]]
    more = [f"{len(chosen) - MOST_HEADS} more"] if len(chosen) > MOST_HEADS else []
    scores = listing(named + more) or "no head chosen"
    moved = results["discovery"][model].get("moved", {}).get(group, [])
    went = "".join(f" {sentence}" for sentence in _went(moved, mean, changed))
    alt = f"Heat map of {mean.shape[0]} layers by {mean.shape[1]} heads. Framed: {scores}.{went}"
    look = {"bound": bound, "moved": [one["head"] for one in moved], "label": changed.label, "unit": changed.unit}
    draw = partial(heat_map, mean, chosen, f"{group} in {model}", where, **look)
    return Picture(f"circuit-{group}-{model}", draw, alt, f"{group} in {model}: {scores}.{went}")


def _went(moved: Sequence[Mapping[str, Any]], mean: np.ndarray, changed: Changed) -> Iterable[str]:
    """Which heads went to which groups, a sentence for each of those."""
    for to in dict.fromkeys(one["to"] for one in moved):
        heads = [one["head"] for one in moved if one["to"] == to]
        named = listing(f"{head_name(h)}{SPACE}({changed.signed(float(mean[tuple(h)]))})" for h in heads)
        yield f"{'Head' if len(heads) == 1 else 'Heads'} {named} went to {to}."


def _score(entry: Mapping[str, Any], group: str, head: tuple[int, ...], changed: Changed) -> str:
    for one in entry["heads"].get(group, []):
        if tuple(one["head"]) == head:
            return f"{changed.bare(one['score'])} {changed.interval(one['low'], one['high'])}"
    return changed.bare(entry["means"][group][head[0]][head[1]]) if group in entry["means"] else "-"


def _kept(entries: Sequence[Mapping[str, Any]], head: tuple[int, ...]) -> str:
    found = [entry["kept"] for entry in entries if tuple(entry["head"]) == head]
    return ("yes" if found[0] else "no") if found else "-"


def _single(sweeps: Mapping[str, Any], role: str, head: tuple[int, ...], changed: Changed) -> str:
    """The change by one head."""
    return changed.bare(sweeps[role]["change"][head[0]][head[1]]) if role in sweeps else "-"
