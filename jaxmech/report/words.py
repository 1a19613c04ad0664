"""Numbers as text. Nothing is rounded before it is printed."""

from collections.abc import Iterable, Sequence

SPACE, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
TINY = 1e-6  # a fraction that four decimals of a percentage do not show


def percent(value: float | None) -> str:
    """A fraction as "61.1 %", with a space that does not break; "-" for None.

    What is neither 0 nor 1 does not read so: 0.9997 is "99.97 %".
    """
    if value is None:
        return "-"
    if 0 < value < TINY:
        return f"{100 * value:.1e}{SPACE}%"
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
    if 0 < high < TINY:
        return f"[{100 * low:.1e}, {100 * high:.1e}]"
    digits = next((n for n in (1, 2, 3) if round(100 * low, n) < round(100 * high, n)), 4)
    digits = digits if high - low > 1e-6 else 1
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]".replace("-", MINUS)


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
