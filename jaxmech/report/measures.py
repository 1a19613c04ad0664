"""What numbers of a study are of: its measure, and the metric of its scores, with their units.

A study's results name both, "measure" and "metric".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmech.metrics import ACCURACY
from jaxmech.report.words import MINUS, SPACE, percent, percent_interval, signed


class Changed(NamedTuple):
    """What the scores of a metric are changes of."""

    short: str
    long: str
    unit: int  # what numbers are multiplied with to be read
    mark: str  # what is written behind them then, "%", "points" or nothing

    @property
    def label(self) -> str:
        """For an axis."""
        return f"change of {self.short}{f', {self.mark}' * bool(self.mark)}"

    def signed(self, value: float) -> str:
        """A mean score, "−1.5 %", "+1.5 points" or "−0.150"."""
        return f"{self.bare(value)}{SPACE}{self.mark}" if self.mark else self.bare(value)

    def bare(self, value: float) -> str:
        """The same without its unit, "−1.5"."""
        return signed(value) if self.unit == 100 else _plain(value, "+")

    def interval(self, low: float, high: float) -> str:
        """Its interval, "[−2.0, −1.0]" in percent, or "[−0.200, −0.100]"."""
        return percent_interval(low, high) if self.unit == 100 else f"[{_plain(low)}, {_plain(high)}]"


CHANGED = {
    ACCURACY: Changed("accuracy", "change of accuracy", 100, "points"),
    "probability": Changed("p(correct)", "relative change of the right answer's probability", 100, "%"),
    "log_probability": Changed("log p(correct)", "change of the right answer's log-probability", 1, ""),
    "logit_difference": Changed("logit difference", "change of the right answer's logit minus the wrong one's", 1, ""),
}


class Measure(NamedTuple):
    """What models and circuits are measured by: F of `jaxmech.criteria`."""

    name: str  # as a metric
    short: str
    long: str
    unit: int  # what numbers are multiplied with to be read; 100 is percent

    @property
    def label(self) -> str:
        """For an axis."""
        return f"{self.short}{', %' * (self.unit == 100)}"

    @property
    def title(self) -> str:
        """With a capital, for the beginning of a sentence."""
        return self.short[0].upper() + self.short[1:]

    def text(self, value: float | None) -> str:
        """F, "61.1 %" or "2.513"; "-" for None."""
        return percent(value) if self.unit == 100 else "-" if value is None else _plain(value)

    def gap(self, value: float) -> str:
        """A difference of two F, whichever is larger: "1.5 points" or "0.150"."""
        return f"{100 * abs(value):.1f} points" if self.unit == 100 else _plain(abs(value))

    def with_interval(self, entry: Mapping[str, Any]) -> str:
        """An entry {"value", "low", "high"} as "61.1 % [58.1, 64.0]" or "2.513 [2.204, 2.810]"."""
        low, high = entry["low"], entry["high"]
        bounds = percent_interval(low, high) if self.unit == 100 else f"[{_plain(low)}, {_plain(high)}]"
        return f"{self.text(entry['value'])} {bounds}"


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(ACCURACY, "accuracy", "accuracy", 100),
        Measure("probability", "p(correct)", "mean probability of the right answer", 100),
        Measure("log_probability", "typical p(correct)", "geometric mean of the right answer's probability", 100),
        Measure("logit_difference", "logit difference", "mean of the right answer's logit minus the wrong one's", 1),
    )
}


def changed_of(results: Mapping[str, Any]) -> Changed:
    """What the scores of a study's discovery are changes of."""
    return CHANGED[results.get("metric", "probability")]


def measure_of(results: Mapping[str, Any]) -> Measure:
    """What a study's models and circuits are measured by."""
    return MEASURES[results.get("measure", ACCURACY)]


def share_with_interval(entry: Mapping[str, Any]) -> str:
    """A fraction {"value", "low", "high"} as "61.1 % [58.1, 64.0]", "61.1 %" without bounds, "-" if it has no value."""
    if entry["value"] is None or entry["low"] is None or entry["high"] is None:
        return percent(entry["value"])
    return f"{percent(entry['value'])} {percent_interval(entry['low'], entry['high'])}"


def _plain(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("-", MINUS)
