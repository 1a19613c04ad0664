"""Minimality: what every head is good for once the heads that could stand in for it are gone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jaxmech.ablation import AblatedValues
from jaxmech.circuits import Circuit, Head
from jaxmech.criteria.measure import POSITIVE, Subset, as_published, check_circuit, f_of, removed, span
from jaxmech.evaluation import evaluate
from jaxmech.loading import Model
from jaxmech.metrics import ACCURACY, Metric, name_of
from jaxmech.pairs import Pairs

EQUAL_DROPS = {True: 9, False: 5}  # decimals to which drops are compared: of accuracies, and of sums of float32


@dataclass(frozen=True, eq=False, repr=False)
class Minimality:
    """What every head of a circuit is good for.

    Attributes:
      pairs: group -> F of the circuit without heads i and j, float [n, n]; on the diagonal, without i alone.
      partners: group -> for each head, the other heads that were taken away with it.
      before: group -> for each head, F without its partners, float [n].
      after: group -> without its partners and itself, float [n].
      whole: F of the whole circuit.
      threshold: the least score of a head that stays.
      circuit: the circuit of the heads that stay.
      metric: what was measured.
    """

    pairs: dict[str, np.ndarray]
    partners: dict[str, list[list[Head]]]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    whole: float
    threshold: float
    circuit: Circuit
    metric: str = ACCURACY

    def __repr__(self) -> str:
        left, every = (sum(map(len, x)) for x in (self.circuit.groups.values(), self.scores.values()))
        scores = span(np.concatenate([np.zeros(0), *self.scores.values()]))
        return f"Minimality({self.metric}: {left} of {every} heads stay, scores {scores})"

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """before / after - 1 of every head, by group, float [n].

        inf where F is positive before and not after: nothing is right without it. 0 where it is not positive before:
        without its partners the circuit does nothing that the head could be needed for. Of logit differences and
        functions of the logits, which may be negative, (before - after) / |whole|.
        """
        scores = partial(_significance, self.metric, self.whole)
        return {group: scores(self.before[group], self.after[group]) for group in self.before}


def minimality(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    means: AblatedValues,
    *,
    threshold: float = 0.01,
    fraction: float = 0.3,
    ablate_elsewhere: bool = True,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Minimality:
    """Scores every head when the heads that could stand in for it are gone.

    Within each group, the circuit is run without every pair of heads. A head's partners are the heads of its group
    without which it matters most: the up to ceil(fraction n) others j with the largest F(C - j) - F(C - i - j), if that
    is positive. Its score is F(C - partners) / F(C - partners - i) - 1, or, of a metric that may be negative,
    (F(C - partners) - F(C - partners - i)) / |F(C)|; heads that score less than `threshold` leave.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      circuit: the heads, with the roles at which they act.
      means: what ablated heads put out; see `evaluate`.
      threshold: a fraction, the paper's 1 %.
      fraction: how many of a group's heads can be a head's partners, the paper's top 30 %.
      ablate_elsewhere: see `faithfulness`.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" does not remove two heads of the same number in different layers together (d), and rounds
        accuracies to 0.01 (k); docs/paper_compat.md.
      metric: what is measured, and `wrong_labels` [B] for "logit_difference"; see `faithfulness`.

    Raises:
      ValueError: see `evaluate`; threshold < 0, fraction outside [0, 1], or compat="paper" with another metric than
        accuracy or ablate_elsewhere=False.
    """
    check_circuit(circuit)
    if not (0 <= threshold < math.inf and 0 <= fraction <= 1):
        raise ValueError(f"threshold={threshold}, fraction={fraction}; expected threshold >= 0 and fraction in [0, 1].")
    paper = as_published(compat, metric, ablate_elsewhere)
    decimals = None if paper else EQUAL_DROPS[metric == ACCURACY]
    options = {"batch_size": batch_size, "keep_logits": False, "metric": metric, "wrong_labels": wrong_labels}
    options["ablate_elsewhere"] = ablate_elsewhere
    groups = {group: list(heads) for group, heads in circuit.groups.items() if heads}

    def measured(subsets: Sequence[Subset]) -> np.ndarray:
        if not subsets:  # no group has heads
            return np.zeros(0)
        circuits = [removed(circuit.heads_by_role, circuit, subset) for subset in subsets]
        found = f_of(metric, evaluate(model, pairs, circuits, means, **options).mean)
        return np.round(found, 2) if paper else found

    together = {group: [(i, j) for i in range(len(h)) for j in range(i, len(h))] for group, h in groups.items()}
    subsets = [{g: _pair(groups[g][i], groups[g][j], paper)} for g, both in together.items() for i, j in both]
    whole, *found = measured([{}, *subsets])
    found = iter(found)
    without = {group: _symmetric(len(groups[group]), both, found) for group, both in together.items()}
    partners = {
        g: [_partners(hs, i, without[g], fraction, decimals) for i in range(len(hs))] for g, hs in groups.items()
    }
    steps = [({g: partners[g][i]}, {g: [*partners[g][i], h]}) for g, hs in groups.items() for i, h in enumerate(hs)]
    found = iter(measured([subset for step in steps for subset in step]).reshape(-1, 2))
    both = {group: np.array([next(found) for _ in heads]) for group, heads in groups.items()}
    before, after = ({group: x[:, i] for group, x in both.items()} for i in (0, 1))
    result = Minimality(without, partners, before, after, float(whole), threshold, circuit, name_of(metric))
    scores = result.scores
    drop = {g: [h for h, score in zip(groups[g], scores[g], strict=True) if score < threshold] for g in groups}
    return replace(result, circuit=circuit.without(drop))


def _significance(metric: str, whole: float, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric not in POSITIVE:
            return (before - after) / abs(whole)
        return np.where(after > 0, before / after - 1, np.where(before > 0, np.inf, 0.0))


def _pair(one: Head, other: Head, paper: bool) -> list[Head]:
    """Heads to remove together; the published code removes one alone if both have the same number (d)."""
    return [one] if one == other or (paper and one[1] == other[1]) else [one, other]


def _symmetric(size: int, entries: Sequence[tuple[int, int]], values) -> np.ndarray:
    matrix = np.zeros((size, size))
    for i, j in entries:
        matrix[i, j] = matrix[j, i] = next(values)
    return matrix


def _partners(heads: Sequence[Head], i: int, without: np.ndarray, fraction: float, decimals: int | None) -> list[Head]:
    """The heads without which head i matters most, ties in their order; `without` [n, n] as `Minimality.pairs`."""
    drop = np.diag(without) - without[i]
    if decimals is not None:  # the published code lets the last bit of a difference decide between drops that are equal
        drop = np.round(drop, decimals)
    order = [int(j) for j in np.argsort(-drop, kind="stable") if j != i]
    return [heads[j] for j in order[: math.ceil(fraction * len(heads))] if drop[j] > 0]
