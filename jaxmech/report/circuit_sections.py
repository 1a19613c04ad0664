"""Sections on the models and their circuits: accuracy, discovery, and the criteria of a circuit.

Owns the words and what is shown. Each function returns its section, or None where its stage was not run; the figures
are drawn when the page is written.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxmech.chain import receivers_text
from jaxmech.report import bars, curves
from jaxmech.report.figures import heat_map
from jaxmech.report.parts import Picture, Results, Section, Table, by_model, in_pairs, once_each, tint
from jaxmech.report.words import (
    CHANGED,
    SPACE,
    Changed,
    counted,
    head_name,
    listing,
    percent,
    signed,
    with_interval,
)

ROLES = {
    "last": "the last token",
    "query_box": "the box's label in the question",
    "prev_query_box": "the earlier occurrence of that label",
}
MOST_HEADS = 8  # named in a description
ELSEWHERE = 0.1  # of accuracy that heads at other tokens make, which is worth a note


def accuracy(results: Results) -> Section | None:
    """Accuracy of each model."""
    if not (found := by_model(results, "accuracy")):
        return None
    values = listing(f"{model} {with_interval(entry)}" for model, entry in found.items())
    alt, caption = f"Bars of accuracy: {values}.", "Accuracy, with its interval in brackets."
    text = (
        "How often the most probable next token is the right answer. Whiskers here and below are 95 % intervals over "
        "prompts: of accuracies by Wilson's score, of ratios and scores by bootstrap, unless said otherwise."
    )
    if results.get("chance") is not None:
        text += f" Naming any object of the scene would be right for {percent(results['chance'])}."
    draw = partial(bars.accuracy_bars, found, results["models"])
    return Section(text, rows=[[Picture("accuracy", draw, alt, caption)]])


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
        f"receivers carry the change. Colour is the mean {_changed(results).long}, so the reddest heads matter most; "
        "frames mark those chosen for the group, named layer.head. A head that a later stage at the same token selects "
        "as well leaves the earlier group for the later one, and is struck out. The maps of a group share one scale."
    )
    return Section(text, notes, [_chain(results["chain"])] if results.get("chain") else [], rows)


def minimality(results: Results) -> Section | None:
    """Score of each head of each circuit."""
    if not (found := by_model(results, "minimality")):
        return None
    row, notes = [], []
    for model, entry in found.items():
        every = [e for entries in entry["groups"].values() for e in entries]
        leave = {g: [head_name(e["head"]) for e in es if not e["kept"]] for g, es in entry["groups"].items()}
        gone = "; ".join(f"{', '.join(names)} of {group}" for group, names in leave.items() if names)
        notes.append(f"{model}: {sum(e['kept'] for e in every)} of {counted(len(every), 'head')} stay. {_leave(gone)}")
        draw = partial(bars.minimality_bars, entry["groups"], entry["threshold"], tint(results, model))
        scores = "; ".join(f"{group}: {_scores(entries)}" for group, entries in entry["groups"].items() if entries)
        alt = f"Bars of the scores of {counted(len(every), 'head')} of {model}. {scores or 'There are none'}."
        row.append(Picture(f"minimality-{model}", draw, alt, f"Minimality scores in {model}."))
    threshold = listing(sorted({f"{100 * entry['threshold']:g} %" for entry in found.values()}))
    text = (
        "Every head was taken from its circuit after the heads that could stand in for it; its score is the accuracy "
        f"before, divided by the accuracy after, minus 1. Heads below the threshold of {threshold} (dashed) leave the "
        "circuit. The scale is linear up to the threshold and logarithmic beyond; ∞ means that nothing is right "
        "without the head."
    )
    return Section(text, notes, rows=in_pairs(row))


def faithfulness(results: Results) -> Section | None:
    """Every circuit in every model."""
    found = [
        (of, model, entries[model])
        for of, entries in by_model(results, "faithfulness").items()
        for model in results["models"]
        if model in entries
    ]
    if not found:
        return None
    rows = [
        [of, model, with_interval(e["model"]), with_interval(e["circuit"]), _ratio(e["ratio"]), _range(e["random"])]
        for of, model, e in found
    ]
    values = listing(f"of {of} in {model} {percent(e['ratio']['value'])}" for of, model, e in found)
    picture = Picture(
        "faithfulness",
        partial(bars.faithfulness_bars, found, results["models"]),
        f"Bars of accuracy, circuit beside model. The circuit's accuracy as a share of the model's: {values}.",
        "Accuracy of model and circuit; on the right their ratio.",
    )
    text = (
        "All heads outside a circuit were replaced by their mean outputs. A faithful circuit is nearly as accurate as "
        "the model (ratio near 100 %); circuits of as many random heads show what size alone does."
    )
    header = ["circuit of", "in model", "model", "circuit", "ratio", "random circuits"]
    table = Table(
        "Accuracy and ratio with 95 % intervals; lowest to highest random circuit.", header, rows, range(2, 6)
    )
    notes = [
        f"{of}: its circuit alone answers nothing right in {of} itself. The chain has missed heads that it needs, or "
        "minimality has taken them away; what follows says little about this circuit."
        for of, model, e in found
        if of == model and e["circuit"]["accuracy"] == 0 < e["model"]["accuracy"]
    ]
    return Section(text, notes, rows=[[picture]], tables=[table])


def overlap(results: Results) -> Section | None:
    """Precision and recall of the base's circuit against the others'."""
    if not (found := by_model(results, "overlap")):
        return None
    base = results["models"][0]
    rows = [
        [tuned, group, percent(entry["precision"]), percent(entry["recall"])]
        for tuned, groups in found.items()
        for group, entry in groups.items()
    ]
    text = (
        f"Precision is the share of the heads of {base}'s circuit that the fine-tuned model's has in the same group, "
        f"recall the share of the fine-tuned model's that {base}'s has; 100 % in both means the same heads."
    )
    table = Table(
        f"The circuit of {base} against the others'.", ["against", "group", "precision", "recall"], rows, (2, 3)
    )
    return Section(text, tables=[table])


def completeness(results: Results) -> Section | None:
    """Circuit without K against model without K."""
    if not (found := by_model(results, "completeness")):
        return None
    row = []
    for model, entries in found.items():
        named = listing(
            f"{e['name']} {percent(e['model'])} and {percent(e['circuit'])}" for e in entries if e["kind"] != "random"
        )
        alt = f"Scatter of {len(entries)} sets K taken from {model} (first) and from its circuit (second): {named}."
        caption = f"{model}. {_gaps(entries)}"
        row.append(Picture(f"completeness-{model}", partial(curves.completeness_scatter, entries), alt, caption))
    text = (
        "The same heads K of the circuit were taken from the circuit and from the model, which has all heads at the "
        "tokens where the circuit's are. At all other tokens heads are ablated in both (with --compat paper, in the "
        "circuit alone). If the circuit has all that matters at its tokens, both lose the same and the points lie on "
        "the diagonal; below it, the model has heads there that the circuit lacks."
    )
    return Section(text, _needed_elsewhere(results), rows=in_pairs(row))


def _needed_elsewhere(results: Results) -> list[str]:
    """Of models that do much worse when heads are ablated at the tokens where their circuits have none."""
    accuracy, found = by_model(results, "accuracy"), by_model(results, "completeness")
    kept = {model: e["model"] for model, entries in found.items() for e in entries if e["kind"] == "nothing"}
    return [
        f"With all heads at the tokens where its circuit has some, and none elsewhere, {model} answers "
        f"{percent(at_roles)} right; left alone, {percent(whole)}. Heads at other tokens matter, too, of which "
        "completeness says nothing."
        for model, at_roles in kept.items()
        if (whole := accuracy.get(model, {}).get("accuracy", 0)) - at_roles > ELSEWHERE
    ]


def heads(results: Results) -> Section | None:
    """A table of all heads of all circuits."""
    if not (found := by_model(results, "discovery")):
        return None
    minimal, crossed = by_model(results, "minimality"), by_model(results, "cmap")
    header, spans, changed = ["group", "role", "head"], [("", 3)], _changed(results)
    score = "score, %" if changed.unit == 100 else "score"
    for model in found:
        columns = [score, "kept"] if model in minimal else [score]
        header, spans = header + columns, [*spans, (model, len(columns))]
    header += [f"z of {tuned}" for tuned in crossed]
    spans += [(f"change of {results['models'][0]}'s accuracy by", len(crossed))] if crossed else []
    rows = []
    for group in once_each(entry["groups"] for entry in found.values()):
        role = next(entry["roles"][group] for entry in found.values() if group in entry["roles"])
        for head in once_each(map(tuple, entry["groups"].get(group, [])) for entry in found.values()):
            row = [group, role, head_name(head)]
            for model, entry in found.items():
                row.append(_score(entry, group, head, changed))
                if model in minimal:
                    row.append(_kept(minimal[model]["groups"].get(group, []), head))
            rows.append(row + [_single(entry["heads"], role, head) for entry in crossed.values()])
    text = (
        f"All heads of the circuits as layer.head: the mean {changed.long} with its 95 % interval (without one where "
        "the model's own circuit does not have the head in this group), whether minimality kept it, and by how many "
        "points the fine-tuned model's output (z) of this head alone changes the base's accuracy."
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
    changed = _changed(results)
    named = [f"{head_name(h)}{SPACE}({changed.signed(float(mean[tuple(h)]))})" for h in chosen[:MOST_HEADS]]
    more = [f"{len(chosen) - MOST_HEADS} more"] if len(chosen) > MOST_HEADS else []
    scores = listing(named + more) or "no head chosen"
    moved = results["discovery"][model].get("moved", {}).get(group, [])
    went = "".join(f" {sentence}" for sentence in _went(moved, mean, changed))
    alt = f"Heat map of {mean.shape[0]} layers by {mean.shape[1]} heads. Framed: {scores}.{went}"
    look = {"bound": bound, "moved": [one["head"] for one in moved], "label": changed.label, "unit": changed.unit}
    draw = partial(heat_map, mean, chosen, f"{group} in {model}", where, **look)
    return Picture(f"circuit-{group}-{model}", draw, alt, f"{group} in {model}: {scores}.{went}")


def _changed(results: Results) -> Changed:
    """What the scores of discovery are changes of."""
    return CHANGED[results.get("metric", "probability")]


def _went(moved: Sequence[Mapping[str, Any]], mean: np.ndarray, changed: Changed) -> Iterable[str]:
    """Which heads went to which groups, a sentence for each of those."""
    for to in dict.fromkeys(one["to"] for one in moved):
        heads = [one["head"] for one in moved if one["to"] == to]
        named = listing(f"{head_name(h)}{SPACE}({changed.signed(float(mean[tuple(h)]))})" for h in heads)
        yield f"{'Head' if len(heads) == 1 else 'Heads'} {named} went to {to}."


def _gaps(entries: Sequence[Mapping[str, Any]]) -> str:
    """The largest gap of sets that are not empty, beside that of circuit and model as they are."""
    if not any(e["model"] or e["circuit"] for e in entries):
        return "Nothing is answered right, with heads taken away or without, so there is nothing to compare."
    whole = [f"with nothing taken away it is {100 * e['gap']:.1f}" for e in entries if e["kind"] == "nothing"]
    sets = [e for e in entries if e["kind"] != "nothing"]
    if not sets:
        return "There is no head to take away."
    widest = max(sets, key=lambda e: e["gap"])
    return f"The largest gap is {100 * widest['gap']:.1f} points, for K: {'; '.join([widest['name'], *whole])}."


def _leave(gone: str) -> str:
    return f"These leave: {gone}." if gone else "None leaves."


def _scores(entries: Iterable[Mapping[str, Any]]) -> str:
    values = ((e["head"], "infinite" if e["score"] is None else signed(e["score"], "%")) for e in entries)
    return listing(f"{head_name(head)} {value}" for head, value in values)


def _ratio(ratio: Mapping[str, Any]) -> str:
    if ratio["low"] is None or ratio["high"] is None:
        return percent(ratio["value"])
    return with_interval(ratio, "value")


def _range(values: Sequence[float]) -> str:
    """The lowest and the highest, once if they read the same."""
    if not values:
        return "-"
    low, high = percent(min(values)), percent(max(values))
    return high if low == high else f"{low.removesuffix(f'{SPACE}%')} to {high}"


def _score(entry: Mapping[str, Any], group: str, head: tuple[int, ...], changed: Changed) -> str:
    for one in entry["heads"].get(group, []):
        if tuple(one["head"]) == head:
            return f"{_bare(changed, one['score'])} {changed.interval(one['low'], one['high'])}"
    return _bare(changed, entry["means"][group][head[0]][head[1]]) if group in entry["means"] else "-"


def _bare(changed: Changed, score: float) -> str:
    """A score without its unit, which the column says."""
    return changed.signed(score).removesuffix(f"{SPACE}%")


def _kept(entries: Sequence[Mapping[str, Any]], head: tuple[int, ...]) -> str:
    found = [entry["kept"] for entry in entries if tuple(entry["head"]) == head]
    return ("yes" if found[0] else "no") if found else "-"


def _single(sweeps: Mapping[str, Any], role: str, head: tuple[int, ...]) -> str:
    """The change of accuracy by one head."""
    return signed(sweeps[role]["accuracy"][head[0]][head[1]] - sweeps[role]["unpatched"]) if role in sweeps else "-"
