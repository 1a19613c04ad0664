"""What makes a circuit a good one: faithfulness, completeness and minimality, and how two circuits compare.

The criteria are those of Wang et al. 2022 (arXiv:2211.00593) in the form of Prakash et al. 2024, section 3.3 and
appendix. F, what a circuit or a model does, is its accuracy; or, where the right answer is rarely the most probable of
all tokens, another metric of `jaxmech.metrics`: the mean over prompts of the label's probability, of its logit
difference from a wrong answer, or of a function of the logits. Log-probabilities are negative, so that their ratio
would say nothing: F is exp of their mean, the geometric mean of the probability. Logit differences and functions may be
negative, too: faithfulness has `recovered` for them, and minimality takes differences. Nothing is rounded. Results keep
what was measured of each prompt, so that intervals are bootstrapped over prompts, the same ones for both sides of a
ratio.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jaxmech.accuracy import predict
from jaxmech.bootstrap import bounds, resampled_means
from jaxmech.circuits import Circuit, Head
from jaxmech.compat import check_compat
from jaxmech.config import Config
from jaxmech.evaluation import evaluate
from jaxmech.loading import Model
from jaxmech.metrics import ACCURACY, Function, name_of
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions

Subset = Mapping[str, Sequence[Head]]  # group -> some of its heads
POSITIVE = (ACCURACY, "probability", "log_probability")  # metrics whose F is not negative
EQUAL_DROPS = {True: 9, False: 5}  # decimals to which drops are compared: of accuracies, and of sums of float32


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """How much of what a model does its circuit alone does.

    Attributes:
      model: the model's own answers, `per_example` [B].
      circuit: the circuit's.
      empty: those of a circuit without heads: everything is ablated.
      random: those of random circuits of the same size, `per_example` [R, B].
      random_circuits: what these are.
      rounded: ratios are taken of accuracies rounded to 0.01, as the published code does (compat="paper").
      metric: what was measured.
    """

    model: Predictions
    circuit: Predictions
    empty: Predictions
    random: Predictions
    random_circuits: list[Circuit]
    rounded: bool = False
    metric: str = ACCURACY

    def __repr__(self) -> str:
        return f"Faithfulness({self.metric}: ratio {self.ratio:.3f}, random circuits {_span(self.random_ratios)})"

    @property
    def ratio(self) -> float:
        """F of the circuit / F of the model; nan if the latter is not positive: a model that is always wrong."""
        return float(_ratio(_f(self.metric, self.circuit.mean), _f(self.metric, self.model.mean), self.rounded))

    @property
    def random_ratios(self) -> np.ndarray:
        """The same of every random circuit, float [R]."""
        return _ratio(_f(self.metric, self.random.mean), _f(self.metric, self.model.mean), self.rounded)

    @property
    def recovered(self) -> float:
        """(F of the circuit - F without any heads) / (F of the model - F without any heads).

        For metrics that are not near 0 where everything is ablated, such as logit differences. nan if ablation of
        everything takes nothing away.
        """
        part, none, whole = (_f(self.metric, x.mean) for x in (self.circuit, self.empty, self.model))
        return float(_ratio(part - none, whole - none))

    def confidence_interval(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Lower and upper bound of `ratio`, bootstrapped over prompts.

        Samples in which F of the model is not positive are left out; nan if there is no other. Where circuit and model
        answer the same prompts right, every sample has the ratio 1 and the interval has no width; how sure that is, the
        intervals of `circuit` and `model` say.

        Args:
          level: coverage, a fraction.
          resamples: bootstrap samples of the prompts, drawn with replacement.
          seed: of these draws.
        """
        samples = (resampled_means(x.per_example, resamples=resamples, seed=seed) for x in (self.circuit, self.model))
        part, whole = (_f(self.metric, means) for means in samples)
        ratios = _ratio(part, whole)
        low, high = bounds(ratios[whole > 0] if (whole > 0).any() else ratios, level)
        return float(low), float(high)


def faithfulness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    means: np.ndarray,
    *,
    random: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: str | Function = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Faithfulness:
    """Runs the circuit alone, the model, and `random` circuits with groups of the same sizes.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      circuit: the heads, with the roles at which they act.
      means: what ablated heads put out; see `evaluate`.
      random: how many random circuits.
      seed: of their draws.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" draws random circuits with replacement and splits a head's number by the wrong count (j), and
        rounds accuracies to 0.01 before the ratio (k); docs/paper_compat.md.
      metric: what is measured, "accuracy", "probability", "log_probability", "logit_difference" or a function of the
        logits; see `evaluate`.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference".

    Raises:
      ValueError: see `evaluate`; random < 1, or compat="paper" with another metric than accuracy.
    """
    _check_circuit(circuit)
    if random < 1:
        raise ValueError(f"random={random}; expected at least 1 random circuit.")
    rng, paper = np.random.default_rng(seed), _paper(compat, metric)
    others = [random_circuit(model.config, circuit, rng, compat=compat) for _ in range(random)]
    options = {"metric": metric, "wrong_labels": wrong_labels}
    empty = {role: [] for role in circuit.roles.values()}
    tried = [circuit, empty, *others]
    found = evaluate(model, pairs, tried, means, batch_size=batch_size, keep_logits=False, **options)
    whole = predict(model, pairs, batch_size=batch_size, keep_logits=False, **options)
    return Faithfulness(
        model=whole,
        circuit=_of_circuits(found, 0),
        empty=_of_circuits(found, 1),
        random=_of_circuits(found, slice(2, None)),
        random_circuits=others,
        rounded=paper,
        metric=name_of(metric),
    )


def random_circuit(
    config: Config, circuit: Circuit, rng: np.random.Generator | int, *, compat: str | None = None
) -> Circuit:
    """A circuit with groups of the same sizes at the same roles as those of `circuit`; `rng` is a generator, or a seed.

    The heads of one role are drawn without replacement from all heads that `config` has, so that its groups are
    disjoint, as those of a discovered circuit are. compat="paper" draws with replacement, and takes a head's number
    divided by the number of *layers* for its layer (j); layers that do not exist are left out, as they are there, and a
    head that is drawn twice for a group counts once.

    Raises:
      ValueError: the groups of a role have more heads together than `config` has.
    """
    rng = rng if isinstance(rng, np.random.Generator) else np.random.default_rng(rng)
    layers, heads = config.num_layers, config.num_heads
    drawn: dict[str, list[Head]] = {}
    for role in dict.fromkeys(circuit.roles.values()):
        sizes = {group: len(circuit.groups[group]) for group, r in circuit.roles.items() if r == role}
        if check_compat(compat):
            numbers = rng.integers(layers * heads, size=sum(sizes.values()))
            chosen = [(int(n) // layers, int(n) % heads) for n in numbers]
        else:
            if sum(sizes.values()) > layers * heads:
                raise ValueError(
                    f"The groups at {role!r} have {sum(sizes.values())} heads together, the model {layers * heads}; "
                    "random groups of their sizes cannot be disjoint."
                )
            numbers = rng.permutation(layers * heads)[: sum(sizes.values())]
            chosen = [(int(n) // heads, int(n) % heads) for n in numbers]
        for group, size in sizes.items():
            drawn[group] = [head for head in dict.fromkeys(chosen[:size]) if head[0] < layers]
            chosen = chosen[size:]
    return Circuit({group: drawn[group] for group in circuit.groups}, circuit.roles)


@dataclass(frozen=True, eq=False, repr=False)
class Completeness:
    """Whether circuit and model lose the same by the same knockouts.

    Attributes:
      names: of the S subsets K: "nothing", each group, and "random 1", "random 2", ...
      kinds: what each is, "nothing", "group" or "random".
      subsets: the K, group -> heads.
      circuit: answers of the circuit without K, `per_example` [S, B].
      model: answers of the model without K, `per_example` [S, B].
      metric: what was measured.
    """

    names: list[str]
    kinds: list[str]
    subsets: list[dict[str, list[Head]]]
    circuit: Predictions
    model: Predictions
    metric: str = ACCURACY

    def __repr__(self) -> str:
        return f"Completeness({self.metric}: gap {_span(self.gap)}, {len(self.names)} subsets)"

    @property
    def gap(self) -> np.ndarray:
        """|F of the circuit without K - F of the model without K|, float [S]; small for a complete circuit."""
        return np.abs(_f(self.metric, self.circuit.mean) - _f(self.metric, self.model.mean))


def completeness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    means: np.ndarray,
    *,
    random: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: str | Function = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Completeness:
    """Takes the same sets K of the circuit's heads from the circuit and from the model.

    K is empty, each whole group, and `random` sets in which every head of the circuit is with probability 1/2. "The
    model" has all heads at the circuit's roles. On both sides all heads are ablated at all other tokens, so that they
    differ in nothing but the heads at the roles.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      circuit: the heads, with the roles at which they act.
      means: what ablated heads put out; see `evaluate`.
      random: how many random sets.
      seed: of their draws.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" leaves the other tokens of the model alone, while the circuit's are ablated (l);
        docs/paper_compat.md.
      metric: what is measured, and `wrong_labels` [B] for "logit_difference"; see `faithfulness`.

    Raises:
      ValueError: see `evaluate`; random < 0, or compat="paper" with another metric than accuracy.
    """
    _check_circuit(circuit)
    if random < 0:
        raise ValueError(f"random={random}; expected at least 0 random sets.")
    rng, paper = np.random.default_rng(seed), _paper(compat, metric)
    groups = {group: list(heads) for group, heads in circuit.groups.items()}
    tried: list[tuple[str, str, dict[str, list[Head]]]] = [("nothing", "nothing", {})]
    tried += [("group", group, {group: heads}) for group, heads in groups.items() if heads]
    for i in range(random):
        half = {group: [head for head in heads if rng.random() < 0.5] for group, heads in groups.items()}
        tried.append(("random", f"random {i + 1}", half))
    kinds, names, subsets = (list(column) for column in zip(*tried, strict=True))
    every = [(layer, head) for layer in range(model.config.num_layers) for head in range(model.config.num_heads)]
    without = [_remove(circuit.heads_by_role, circuit, subset) for subset in subsets]
    model_without = [_remove({role: every for role in circuit.heads_by_role}, circuit, subset) for subset in subsets]
    options = {"batch_size": batch_size, "keep_logits": False, "metric": metric, "wrong_labels": wrong_labels}
    return Completeness(
        names=names,
        kinds=kinds,
        subsets=subsets,
        circuit=evaluate(model, pairs, without, means, **options),
        model=evaluate(model, pairs, model_without, means, ablate_elsewhere=not paper, **options),
        metric=name_of(metric),
    )


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
        scores = _span(np.concatenate([np.zeros(0), *self.scores.values()]))
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
    means: np.ndarray,
    *,
    threshold: float = 0.01,
    fraction: float = 0.3,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: str | Function = ACCURACY,
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
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" does not remove two heads of the same number in different layers together (d), and rounds
        accuracies to 0.01 (k); docs/paper_compat.md.
      metric: what is measured, and `wrong_labels` [B] for "logit_difference"; see `faithfulness`.

    Raises:
      ValueError: see `evaluate`; threshold < 0, fraction outside [0, 1], or compat="paper" with another metric than
        accuracy.
    """
    _check_circuit(circuit)
    if not (0 <= threshold < math.inf and 0 <= fraction <= 1):
        raise ValueError(f"threshold={threshold}, fraction={fraction}; expected threshold >= 0 and fraction in [0, 1].")
    paper = _paper(compat, metric)
    decimals = None if paper else EQUAL_DROPS[metric == ACCURACY]
    options = {"batch_size": batch_size, "keep_logits": False, "metric": metric, "wrong_labels": wrong_labels}
    groups = {group: list(heads) for group, heads in circuit.groups.items() if heads}

    def measured(subsets: Sequence[Subset]) -> np.ndarray:
        if not subsets:  # no group has heads
            return np.zeros(0)
        circuits = [_remove(circuit.heads_by_role, circuit, subset) for subset in subsets]
        found = _f(metric, evaluate(model, pairs, circuits, means, **options).mean)
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


def overlap(circuit: Circuit, reference: Circuit) -> dict[str, tuple[float, float]]:
    """Precision and recall of `circuit` against `reference`, group by group of both: {group: (precision, recall)}.

    Precision is the share of the circuit's heads that the reference has in the same group, recall the share of the
    reference's that the circuit has; nan where a group is empty.
    """
    found = {}
    for group in [group for group in circuit.groups if group in reference.groups]:
        ours, theirs = set(map(tuple, circuit.groups[group])), set(map(tuple, reference.groups[group]))
        common = len(ours & theirs)
        found[group] = tuple(common / len(x) if x else math.nan for x in (ours, theirs))
    return found


def _check_circuit(circuit: Circuit) -> None:
    if not isinstance(circuit, Circuit):
        raise TypeError(
            f"Found a {type(circuit).__name__}; expected a Circuit, whose heads are in groups: jm.Circuit({{group: "
            "heads}, {group: role})."
        )


def _paper(compat: str | None, metric: str | Function) -> bool:
    """Whether it is to be as in the published code, which knows no metric but accuracy."""
    paper = check_compat(compat)
    if paper and metric != ACCURACY:
        raise ValueError(f"metric={name_of(metric)!r} with compat='paper'; the published code measures accuracy alone.")
    return paper


def _f(metric: str | Function, mean: np.ndarray) -> np.ndarray:
    """F by the mean of a metric over prompts."""
    return np.exp(mean) if metric == "log_probability" else mean


def _span(values: np.ndarray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}" if values.size else "none"


def _of_circuits(found: Predictions, which: int | slice) -> Predictions:
    """Some of the circuits of `found`."""
    return Predictions(found.correct[which], measured=None if found.measured is None else found.measured[which])


def _ratio(part: np.ndarray, whole: np.ndarray, rounded: bool = False) -> np.ndarray:
    if rounded:
        part, whole = np.round(part, 2), np.round(whole, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


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


def _remove(heads_by_role: Mapping[str, Sequence[Head]], circuit: Circuit, subset: Subset) -> dict[str, list[Head]]:
    """Takes away the heads of `subset` at their groups' roles, also one that another group has at that role."""
    gone = {(circuit.roles[group], tuple(head)) for group, heads in subset.items() for head in heads}
    return {role: [head for head in heads if (role, tuple(head)) not in gone] for role, heads in heads_by_role.items()}
