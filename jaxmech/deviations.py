"""How far our activations are from transformers' own, and how far they may be.

float32, precision "highest": |ours - theirs| is at most `FLOAT32` of the largest |theirs| of that site and layer. The
two differ in the order of summation only: by 4e-6 at most in tiny models of all families, and in 24 layers 512 wide. A
wrong weight, scale or mask gives 1e-2 and more.

bfloat16: here transformers is not right either, so its own float32 run is the judge. The root mean square of (ours in
bfloat16 - theirs in float32) over that site and layer is at most `BFLOAT16` times that of (theirs in bfloat16 - theirs
in float32), theirs being the worse of eager attention and SDPA, between which transformers lets its users choose. The
root mean square, because the largest of many roundings is a matter of luck: in tiny models of all families it came to
2.1 times theirs, and SDPA's to as much of eager attention's, where the root mean square came to 1.2 times. The factor
2 is one bit; it leaves room for short prompts, which have fewer numbers to average (8 tokens: 1.9 times). This is a
coarse check of where bfloat16 is rounded. Whether the mathematics is right is for the comparison in float32 to say.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmech.interventions import SITES

FLOAT32 = 1e-4
BFLOAT16 = 2.0
ROUNDING = 2.0**-9  # of one rounding to bfloat16, relative and at most

Activations = Mapping[str, np.ndarray]  # float32; {site: [L, B, T, ...], "logits": [B, T, V]}


@dataclass(frozen=True)
class Comparison:
    """How far one site of one layer is from transformers' own.

    Attributes:
      dtype: in which both ran.
      site: one of `SITES`, "logits", or "inv_freq" and "attention_factor" of RoPE.
      layer: None where there is none.
      deviation: relative; its measure is that of the dtype, see above.
      allowed: what it may be.
    """

    dtype: str
    site: str
    layer: int | None
    deviation: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the deviation is no larger than allowed."""
        return self.deviation <= self.allowed

    @property
    def excess(self) -> float:
        """The deviation as a multiple of what is allowed."""
        return self.deviation / self.allowed

    @property
    def where(self) -> str:
        """The site and its layer, in words."""
        return self.site if self.layer is None else f"{self.site} of layer {self.layer}"


def compare_float32(ours: Activations, exact: Activations) -> Iterator[Comparison]:
    """Compares our float32 activations with theirs, in the order of computation."""
    for site, layer in _order(exact):
        deviation = largest_deviation(_at(ours, site, layer), _at(exact, site, layer))
        yield Comparison("float32", site, layer, deviation, FLOAT32)


def compare_bfloat16(ours: Activations, exact: Activations, theirs: Sequence[Activations]) -> Iterator[Comparison]:
    """Judges our bfloat16 activations by the float32 ones, in the order of computation.

    Args:
      exact: transformers' in float32.
      theirs: transformers' in bfloat16, by one or more implementations of attention; any may lack a site.
    """
    for site, layer in _order(exact):
        expected = _at(exact, site, layer)
        own = [mean_square_deviation(_at(run, site, layer), expected) for run in theirs if site in run]
        # Where theirs hit on the exact numbers, as a bfloat16 embedding does, one rounding is still none too many.
        allowed = BFLOAT16 * max([ROUNDING, *filter(np.isfinite, own)])
        deviation = mean_square_deviation(_at(ours, site, layer), expected)
        yield Comparison("bfloat16", site, layer, deviation, allowed)


def largest_deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|; infinite where a number is not finite."""
    return _relative(found, expected, lambda x: np.abs(x).max())


def mean_square_deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of found - expected over that of expected; infinite where a number is not finite."""
    return _relative(found, expected, lambda x: np.sqrt(np.square(x).mean()))


def _relative(found: np.ndarray, expected: np.ndarray, size: Callable[[np.ndarray], Any]) -> float:
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference, scale = size(np.subtract(found, expected, dtype=np.float64)), size(expected.astype(np.float64))
    if difference == 0:
        return 0.0
    return float(difference / scale) if scale else float("inf")


def _order(activations: Activations) -> Iterator[tuple[str, int | None]]:
    """Every site of every layer in the order of computation, then the logits."""
    for layer in range(len(activations["resid_pre"])):
        yield from ((site, layer) for site in SITES)
    yield "logits", None


def _at(activations: Activations, site: str, layer: int | None) -> np.ndarray:
    return activations[site] if layer is None else activations[site][layer]
