"""Sections on the criteria of a circuit: minimality, faithfulness, completeness, and how far circuits overlap.

As `jaxmech.report.circuit_sections`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxmech.criteria.measure import POSITIVE
from jaxmech.metrics import ACCURACY
from jaxmech.report import bars, curves
from jaxmech.report.measures import Measure, measure_of, share_with_interval
from jaxmech.report.parts import Picture, Results, Section, Table, by_model, in_pairs, tint
from jaxmech.report.words import SPACE, counted, head_name, listing, percent, signed

# What heads at other tokens make of accuracy or probability, or their share of a logit difference, worth a note.
ELSEWHERE = 0.1
_SHARES = {"ratio": "their ratio", "recovered": "what is recovered"}


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
        "Every head was taken from its circuit after the heads that could stand in for it; its score is "
        f"{_score_of_minimality(measure_of(results))}. Heads below the threshold of {threshold} (dashed) leave the "
        "circuit. The scale is linear up to the threshold and logarithmic beyond."
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
    measure = measure_of(results)
    share = "ratio" if measure.name in POSITIVE else "recovered"
    good = f"has nearly the {measure.short} of the model"
    if measure.name == ACCURACY:
        good = "is nearly as accurate as the model"
    where = "" if results.get("ablate_elsewhere", True) else ", at its tokens alone"
    text = (
        f"All heads outside a circuit were replaced by their mean outputs{where}. A faithful circuit {good} "
        f"({share} near 100 %); circuits of as many random heads show what size alone does."
    )
    if share == "recovered":
        text += f" Recovered is the circuit's share of what all heads of the model add to the {measure.short}."
    values = listing(f"of {of} in {model} {percent(e[share]['value'])}" for of, model, e in found)
    picture = Picture(
        "faithfulness",
        partial(bars.faithfulness_bars, found, results["models"], measure, share),
        f"Bars of {measure.short}, circuit beside model, and {_SHARES[share]}: {values}.",
        f"{measure.title} of model and circuit; on the right {_SHARES[share]}.",
    )
    nothing = "answers nothing right" if measure.name == ACCURACY else f"has a {measure.short} of 0 or less"
    notes = [
        f"{of}: its circuit alone {nothing} in {of} itself. The chain has missed heads that it needs, or "
        "minimality has taken them away; what follows says little about this circuit."
        for of, model, e in found
        if of == model and e["circuit"]["value"] <= 0 < e["model"]["value"]
    ]
    return Section(text, notes, rows=[[picture]], tables=[_faithfulness_table(measure, share, found)])


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
    measure, row = measure_of(results), []
    for model, entries in found.items():
        named = listing(
            f"{e['name']} {measure.text(e['model'])} and {measure.text(e['circuit'])}"
            for e in entries
            if e["kind"] != "random"
        )
        alt = f"Scatter of {len(entries)} sets K taken from {model} (first) and from its circuit (second): {named}."
        caption = f"{model}. {_gaps(measure, entries)}"
        draw = partial(curves.completeness_scatter, entries, measure)
        row.append(Picture(f"completeness-{model}", draw, alt, caption))
    elsewhere = "All other tokens are as in the model, on both sides."
    if results.get("ablate_elsewhere", True):
        elsewhere = "At all other tokens heads are ablated in both (with --compat paper, in the circuit alone)."
    text = (
        "The same heads K of the circuit were taken from the circuit and from the model, which has all heads at the "
        f"tokens where the circuit's are. {elsewhere} If the circuit has all that matters at its tokens, both lose the "
        "same and the points lie on the diagonal; below it, the model has heads there that the circuit lacks."
    )
    return Section(text, _needed_elsewhere(results), rows=in_pairs(row))


def _faithfulness_table(measure: Measure, share: str, found: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    """Model and circuit, with their `share` and random circuits."""
    columns = {"model": "model", "circuit": "circuit"} | ({"empty": "no heads"} if share == "recovered" else {})
    rows = [
        [
            *(of, model, *(measure.with_interval(entry[side]) for side in columns)),
            *(share_with_interval(entry[share]), _range(measure, entry["random"])),
        ]
        for of, model, entry in found
    ]
    header = ["circuit of", "in model", *columns.values(), share, "random circuits"]
    caption = f"{measure.title} and {_SHARES[share]}, with 95 % intervals; lowest to highest random circuit."
    return Table(caption, header, rows, range(2, len(header)))


def _needed_elsewhere(results: Results) -> list[str]:
    """Of models that do much worse when heads are ablated at the tokens where their circuits have none."""
    measure, known, found = measure_of(results), by_model(results, "accuracy"), by_model(results, "completeness")
    kept = {model: e["model"] for model, entries in found.items() for e in entries if e["kind"] == "nothing"}
    wholes = {model: known[model]["value"] for model in kept if model in known}
    has = "answers {} right" if measure.name == ACCURACY else f"has a {measure.short} of {{}}"
    return [
        f"With all heads at the tokens where its circuit has some, and none elsewhere, {model} "
        f"{has.format(measure.text(kept[model]))}; left alone, {measure.text(whole)}. Heads at other tokens matter, "
        "too, of which completeness says nothing; --no-ablate-elsewhere leaves them as they are."
        for model, whole in wholes.items()
        if whole - kept[model] > ELSEWHERE * (1 if measure.unit == 100 else abs(whole))
    ]


def _gaps(measure: Measure, entries: Sequence[Mapping[str, Any]]) -> str:
    """The largest gap of sets that are not empty, beside that of circuit and model as they are."""
    if not any(e["model"] or e["circuit"] for e in entries):
        return "Nothing is answered right, with heads taken away or without, so there is nothing to compare."
    whole = [
        f"with nothing taken away it is {measure.gap(e['gap']).removesuffix(' points')}"
        for e in entries
        if e["kind"] == "nothing"
    ]
    sets = [e for e in entries if e["kind"] != "nothing"]
    if not sets:
        return "There is no head to take away."
    widest = max(sets, key=lambda e: e["gap"])
    return f"The largest gap is {measure.gap(widest['gap'])}, for K: {'; '.join([widest['name'], *whole])}."


def _leave(gone: str) -> str:
    return f"These leave: {gone}." if gone else "None leaves."


def _scores(entries: Iterable[Mapping[str, Any]]) -> str:
    values = ((e["head"], "infinite" if e["score"] is None else signed(e["score"], "%")) for e in entries)
    return listing(f"{head_name(head)} {value}" for head, value in values)


def _range(measure: Measure, values: Sequence[float]) -> str:
    """The lowest and the highest, once if they read the same."""
    if not values:
        return "-"
    low, high = measure.text(min(values)), measure.text(max(values))
    return high if low == high else f"{low.removesuffix(f'{SPACE}%')} to {high}"


def _score_of_minimality(measure: Measure) -> str:
    """What a score is, in words."""
    if measure.name not in POSITIVE:
        return f"what the {measure.short} falls by, as a share of the whole circuit's"
    nothing = "nothing is right" if measure.name == ACCURACY else "nothing is left of it"
    words = f"the {measure.short} before, divided by the {measure.short} after, minus 1"
    return f"{words}; ∞ means that {nothing} without the head"
