"""Numbers as text, and the study's headline in words. Nothing is rounded before it is printed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmech.study import WHOLE_CIRCUIT, doubt

SPACE, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"


class Changed(NamedTuple):
    """What the scores of a metric are changes of."""

    short: str
    long: str
    unit: int  # what numbers are multiplied with to be read; 100 is percent

    @property
    def label(self) -> str:
        """For an axis."""
        return f"change of {self.short}{', %' * (self.unit == 100)}"

    def signed(self, value: float) -> str:
        """A mean score, "−1.5 %" or "−0.150"."""
        return signed(value, "%") if self.unit == 100 else f"{value:+.3f}".replace("-", MINUS)

    def interval(self, low: float, high: float) -> str:
        """Its interval, "[−2.0, −1.0]" in percent, or "[−0.200, −0.100]"."""
        return percent_interval(low, high) if self.unit == 100 else f"[{low:.3f}, {high:.3f}]".replace("-", MINUS)


CHANGED = {
    "probability": Changed("p(correct)", "relative change of the right answer's probability", 100),
    "log_probability": Changed("log p(correct)", "change of the right answer's log-probability", 1),
    "logit_difference": Changed("the logit difference", "change of the right answer's logit minus the wrong one's", 1),
}


class Recovery(NamedTuple):
    """The head group that, patched from the tuned model into the base, helps most."""

    group: str
    component: str
    accuracy: float
    low: float  # of its interval
    share: float  # of the gain from base to tuned


def percent(value: float | None) -> str:
    """A fraction as "61.1 %", with a space that does not break; "-" for None.

    What is neither 0 nor 1 does not read so: 0.9997 is "99.97 %".
    """
    if value is None:
        return "-"
    digits = next((n for n in (1, 2, 3) if not _reads_as_end(value, n)), 4)
    return f"{100 * value:.{digits}f}{SPACE}%"


def _reads_as_end(value: float, digits: int) -> bool:
    """Whether a fraction would be rounded to 0 or 100 %, and is neither, but for the rounding of floats."""
    return any(abs(value - end) > 1e-9 and round(100 * value, digits) == 100 * end for end in (0, 1))


def signed(value: float, unit: str = "") -> str:
    """A fraction as a change in percent or points, "+1.5" or "−1.5", with a unit behind a space that does not break."""
    return f"{100 * value:+.1f}".replace("-", MINUS) + (SPACE + unit if unit else "")


def percent_interval(low: float, high: float) -> str:
    """An interval of fractions as "[58.1, 64.0]", with so many digits that it is seen to be one, "[99.98, 99.99]"."""
    digits = next((n for n in (1, 2, 3) if round(100 * low, n) < round(100 * high, n)), 4)
    digits = digits if high - low > 1e-6 else 1
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]".replace("-", MINUS)


def with_interval(entry: Mapping[str, Any], key: str = "accuracy") -> str:
    """An entry {key, low, high} as "61.1 % [58.1, 64.0]"; "-" if its value is None."""
    if entry[key] is None:
        return "-"
    return f"{percent(entry[key])} {percent_interval(entry['low'], entry['high'])}"


def head_name(head: Sequence[int]) -> str:
    """[3, 6] as "3.6", layer.head."""
    return f"{head[0]}.{head[1]}"


def counted(number: int, noun: str) -> str:
    """A number of things, "1 head" or "2 heads"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listing(names: Iterable[str]) -> str:
    """Names as "a, b and c"."""
    *most, last = list(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def headline(results: Mapping[str, Any]) -> list[str]:
    """For each tuned model, what it gained over the base, and which group's CMAP recovers most of that."""
    base, *others = results["models"]
    known = results.get("accuracy") or {}
    return [" ".join(_sentences(results, base, tuned)) for tuned in others if base in known and tuned in known]


def doubts(results: Mapping[str, Any]) -> list[str]:
    """What makes the study of a model doubtful: one that hardly does the task."""
    known, chance = results.get("accuracy") or {}, results.get("chance")
    found = [doubt(model, known[model]["accuracy"], chance) for model in results["models"] if model in known]
    return [warning for warning in found if warning]


def _sentences(results: Mapping[str, Any], base: str, tuned: str) -> Iterable[str]:
    accuracy = results["accuracy"]
    before, after = accuracy[base]["accuracy"], accuracy[tuned]["accuracy"]
    prompts = f" of the {results['prompts']:,} prompts" if "prompts" in results else " of the prompts"
    how = "a gain" if after > before else "a loss" if after < before else "a difference"
    points = f"{how} of {100 * abs(after - before):.1f} points"
    yield f"{tuned} answers {percent(after)}{prompts} right, {base} {percent(before)}: {points}."
    groups = (results.get("cmap") or {}).get(tuned, {}).get("groups", {})
    best = recovery(groups, before, after)
    if best is None:
        return
    if best.accuracy <= before:
        yield f"No single group of {tuned}, patched into {base}, raises its accuracy."
        return
    patched = f"Patching {best.group} of {tuned} into {base} ({best.component})"
    share = f", {100 * best.share:.0f}{SPACE}% of the gain" if after > before else ""
    doubt = "" if best.low > before else f"; the interval of this includes {percent(before)}"
    yield f"{patched} raises {percent(before)} to {percent(best.accuracy)}{share}{doubt}."
    whole = groups[best.component].get(WHOLE_CIRCUIT)
    if whole and after > before:
        part = f"{100 * (whole['accuracy'] - before) / (after - before):.0f}{SPACE}% of the gain"
        part = part if whole["accuracy"] > before else f"no more than {base} alone"
        yield f"The whole circuit ({best.component}): {percent(whole['accuracy'])}, {part}."


def recovery(groups: Mapping[str, Mapping[str, Any]], before: float, after: float) -> Recovery | None:
    """The best of {component: {group: {"accuracy"}}} but the whole circuit, the first of equals; None without any."""
    found = [
        Recovery(
            group, component, entry["accuracy"], entry["low"], (entry["accuracy"] - before) / (after - before or 1)
        )
        for component, entries in groups.items()
        for group, entry in entries.items()
        if group != WHOLE_CIRCUIT
    ]
    return max(found, key=lambda one: one.accuracy, default=None)
