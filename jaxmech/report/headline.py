"""What a study found in a sentence or two, and what makes it doubtful."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxmech.metrics import ACCURACY
from jaxmech.report.measures import Measure, measure_of
from jaxmech.report.words import SPACE, percent
from jaxmech.study import WHOLE_CIRCUIT, doubt


class Recovery(NamedTuple):
    """The head group that, patched from the tuned model into the base, helps most."""

    group: str
    component: str
    value: float  # of the base with it
    low: float  # of its interval
    share: float  # of the gain from base to tuned


def headline(results: Mapping[str, Any]) -> list[str]:
    """For each tuned model, what it gained over the base, and which group's CMAP recovers most of that."""
    base, *others = results["models"]
    known = results.get("accuracy") or {}
    return [" ".join(_sentences(results, base, tuned)) for tuned in others if base in known and tuned in known]


def doubts(results: Mapping[str, Any]) -> list[str]:
    """What makes the study of a model doubtful: one that hardly does the task."""
    known, chance, measure = results.get("accuracy") or {}, results.get("chance"), measure_of(results).name
    found = [doubt(model, known[model]["value"], chance, measure) for model in results["models"] if model in known]
    return [warning for warning in found if warning]


def recovery(groups: Mapping[str, Mapping[str, Any]], before: float, after: float) -> Recovery | None:
    """The best of {component: {group: {"value"}}} but the whole circuit, the first of equals; None without any."""
    found = [
        Recovery(group, component, entry["value"], entry["low"], (entry["value"] - before) / (after - before or 1))
        for component, entries in groups.items()
        for group, entry in entries.items()
        if group != WHOLE_CIRCUIT
    ]
    return max(found, key=lambda one: one.value, default=None)


def _sentences(results: Mapping[str, Any], base: str, tuned: str) -> Iterable[str]:
    known, measure = results["accuracy"], measure_of(results)
    prompts = f" of the {results['prompts']:,} prompts" if "prompts" in results else " of the prompts"
    before, after = (known[model]["accuracy"] for model in (base, tuned))
    answered = f"{tuned} answers {percent(after)}{prompts} right, {base} {percent(before)}"
    if measure.name != ACCURACY:
        yield f"{answered}."
        before, after = (known[model]["value"] for model in (base, tuned))
        answered = f"The {measure.long} is {measure.text(after)} in {tuned}, {measure.text(before)} in {base}"
    how = "a gain" if after > before else "a loss" if after < before else "a difference"
    yield f"{answered}: {how} of {measure.gap(after - before)}."
    groups = (results.get("cmap") or {}).get(tuned, {}).get("groups", {})
    if best := recovery(groups, before, after):
        yield from _recovered(measure, base, tuned, best, groups, before, after)


def _recovered(
    measure: Measure,
    base: str,
    tuned: str,
    best: Recovery,
    groups: Mapping[str, Mapping[str, Any]],
    before: float,
    after: float,
) -> Iterable[str]:
    """What patching of the best group, and of the whole circuit, makes of the gain."""
    if best.value <= before:
        its = "its accuracy" if measure.name == ACCURACY else "this"
        yield f"No single group of {tuned}, patched into {base}, raises {its}."
        return
    patched = f"Patching {best.group} of {tuned} into {base} ({best.component})"
    share = f", {100 * best.share:.0f}{SPACE}% of the gain" if after > before else ""
    doubt = "" if best.low > before else f"; the interval of this includes {measure.text(before)}"
    yield f"{patched} raises {measure.text(before)} to {measure.text(best.value)}{share}{doubt}."
    whole = groups[best.component].get(WHOLE_CIRCUIT)
    if whole and after > before:
        part = f"{100 * (whole['value'] - before) / (after - before):.0f}{SPACE}% of the gain"
        part = part if whole["value"] > before else f"no more than {base} alone"
        yield f"The whole circuit ({best.component}): {measure.text(whole['value'])}, {part}."
