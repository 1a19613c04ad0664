"""Faithfulness: how much of what a model does its circuit alone does, and random circuits do."""

from dataclasses import dataclass

import numpy as np

from jaxmech.ablation import AblatedValues
from jaxmech.accuracy import predict
from jaxmech.bootstrap import bounds, resampled_means
from jaxmech.circuits import Circuit, Head
from jaxmech.compat import check_compat
from jaxmech.config import Config
from jaxmech.criteria.measure import POSITIVE, as_published, check_circuit, f_of, span
from jaxmech.evaluation import evaluate
from jaxmech.loading import Model
from jaxmech.metrics import ACCURACY, Metric, name_of
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions


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
        if self.metric in POSITIVE:
            return f"Faithfulness({self.metric}: ratio {self.ratio:.3f}, random circuits {span(self.random_ratios)})"
        random = span(self.random_recovered)
        return f"Faithfulness({self.metric}: recovered {self.recovered:.3f}, random circuits {random})"

    @property
    def ratio(self) -> float:
        """F of the circuit / F of the model; nan if the latter is not positive, as of a model that is always wrong.

        A function of the logits that is never positive has no ratio; see `recovered`.
        """
        return float(_ratio(f_of(self.metric, self.circuit.mean), f_of(self.metric, self.model.mean), self.rounded))

    @property
    def random_ratios(self) -> np.ndarray:
        """The same of every random circuit, float [R]."""
        return _ratio(f_of(self.metric, self.random.mean), f_of(self.metric, self.model.mean), self.rounded)

    @property
    def recovered(self) -> float:
        """(F of the circuit - F without any heads) / (F of the model - F without any heads).

        For metrics that are not near 0 where everything is ablated, such as logit differences. nan if ablation of
        everything takes nothing away.
        """
        part, none, whole = (f_of(self.metric, x.mean) for x in (self.circuit, self.empty, self.model))
        return float(_ratio(part - none, whole - none))

    @property
    def random_recovered(self) -> np.ndarray:
        """The same of every random circuit, float [R]."""
        parts, none, whole = (f_of(self.metric, x.mean) for x in (self.random, self.empty, self.model))
        return _ratio(parts - none, whole - none)

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
        part, whole = self._resampled(self.circuit, self.model, resamples=resamples, seed=seed)
        return _bounds_of_ratio(part, whole, level)

    def recovered_interval(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Lower and upper bound of `recovered`, as `confidence_interval` has those of `ratio`.

        Args:
          level: coverage, a fraction.
          resamples: bootstrap samples of the prompts; those in which ablation of everything takes nothing away are left
            out.
          seed: of these draws.
        """
        found = self._resampled(self.circuit, self.empty, self.model, resamples=resamples, seed=seed)
        part, none, whole = found
        return _bounds_of_ratio(part - none, whole - none, level)

    def _resampled(self, *of: Predictions, resamples: int, seed: int) -> list[np.ndarray]:
        """F on the same bootstrap samples of the prompts, float [resamples] of each."""
        means = (resampled_means(x.per_example, resamples=resamples, seed=seed) for x in of)
        return [f_of(self.metric, x) for x in means]


def faithfulness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    means: AblatedValues,
    *,
    random: int = 10,
    seed: int = 0,
    ablate_elsewhere: bool = True,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: Metric = ACCURACY,
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
      ablate_elsewhere: see `evaluate`; False leaves tokens without a role of the circuit as they are; it takes longer.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" draws random circuits with replacement and splits a head's number by the wrong count (j), and
        rounds accuracies to 0.01 before the ratio (k); docs/paper_compat.md.
      metric: what is measured, "accuracy", "probability", "log_probability", "logit_difference" or a function of the
        logits; see `evaluate`. Of log-probabilities, F is exp of the mean, the geometric mean of the probability.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.

    Raises:
      ValueError: see `evaluate`; random < 1, or compat="paper" with another metric than accuracy or with
        ablate_elsewhere=False.
    """
    check_circuit(circuit)
    if random < 1:
        raise ValueError(f"random={random}; expected at least 1 random circuit.")
    rng, paper = np.random.default_rng(seed), as_published(compat, metric, ablate_elsewhere)
    others = [random_circuit(model.config, circuit, rng, compat=compat) for _ in range(random)]
    options = {"metric": metric, "wrong_labels": wrong_labels}
    empty = {role: [] for role in circuit.roles.values()}
    tried = [circuit, empty, *others]
    found = evaluate(model, pairs, tried, means, ablate_elsewhere, batch_size=batch_size, keep_logits=False, **options)
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
    """A circuit with groups of the same sizes at the same roles as those of `circuit`.

    The heads of one role are drawn without replacement from all heads of the model, so that its groups are disjoint, as
    those of a discovered circuit are.

    Args:
      config: that of the model.
      circuit: whose sizes and roles are taken.
      rng: a generator, or a seed.
      compat: "paper" draws with replacement, and takes a head's number divided by the number of *layers* for its layer
        (j); layers that do not exist are left out, as they are there, and a head that is drawn twice for a group counts
        once.

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


def _of_circuits(found: Predictions, which: int | slice) -> Predictions:
    """Some of the circuits of `found`."""
    return Predictions(found.correct[which], measured=None if found.measured is None else found.measured[which])


def _bounds_of_ratio(part: np.ndarray, whole: np.ndarray, level: float) -> tuple[float, float]:
    """Central quantiles of the ratio of samples, of which those whose whole is not positive are left out."""
    ratios = _ratio(part, whole)
    low, high = bounds(ratios[whole > 0] if (whole > 0).any() else ratios, level)
    return float(low), float(high)


def _ratio(part: np.ndarray, whole: np.ndarray, rounded: bool = False) -> np.ndarray:
    if rounded:
        part, whole = np.round(part, 2), np.round(whole, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
