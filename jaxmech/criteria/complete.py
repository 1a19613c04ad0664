"""Completeness: whether circuit and model lose the same when the same heads are taken away."""

from dataclasses import dataclass

import numpy as np

from jaxmech.ablation import AblatedValues
from jaxmech.circuits import Circuit, Head
from jaxmech.criteria.measure import as_published, check_circuit, f_of, removed, span
from jaxmech.evaluation import evaluate
from jaxmech.loading import Model
from jaxmech.metrics import ACCURACY, Metric, name_of
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions


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
        return f"Completeness({self.metric}: gap {span(self.gap)}, {len(self.names)} subsets)"

    @property
    def gap(self) -> np.ndarray:
        """|F of the circuit without K - F of the model without K|, float [S]; small for a complete circuit."""
        return np.abs(f_of(self.metric, self.circuit.mean) - f_of(self.metric, self.model.mean))


def completeness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    means: AblatedValues,
    *,
    random: int = 20,
    seed: int = 0,
    ablate_elsewhere: bool = True,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Completeness:
    """Takes the same sets K of the circuit's heads from the circuit and from the model.

    K is empty, each whole group, and `random` sets in which every head of the circuit is with probability 1/2. "The
    model" has all heads at the circuit's roles. On both sides all heads are ablated at all other tokens, or none are,
    so that they differ in nothing but the heads at the roles.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      circuit: the heads, with the roles at which they act.
      means: what ablated heads put out; see `evaluate`.
      random: how many random sets.
      seed: of their draws.
      ablate_elsewhere: False leaves all other tokens as they are, on both sides; see `faithfulness`.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" leaves the other tokens of the model alone, while the circuit's are ablated (l);
        docs/paper_compat.md.
      metric: what is measured, and `wrong_labels` [B] for "logit_difference"; see `faithfulness`.

    Raises:
      ValueError: see `evaluate`; random < 0, or compat="paper" with another metric than accuracy or
        ablate_elsewhere=False.
    """
    check_circuit(circuit)
    if random < 0:
        raise ValueError(f"random={random}; expected at least 0 random sets.")
    rng, paper = np.random.default_rng(seed), as_published(compat, metric, ablate_elsewhere)
    groups = {group: list(heads) for group, heads in circuit.groups.items()}
    tried: list[tuple[str, str, dict[str, list[Head]]]] = [("nothing", "nothing", {})]
    tried += [("group", group, {group: heads}) for group, heads in groups.items() if heads]
    for i in range(random):
        half = {group: [head for head in heads if rng.random() < 0.5] for group, heads in groups.items()}
        tried.append(("random", f"random {i + 1}", half))
    kinds, names, subsets = (list(column) for column in zip(*tried, strict=True))
    every = [(layer, head) for layer in range(model.config.num_layers) for head in range(model.config.num_heads)]
    without = [removed(circuit.heads_by_role, circuit, subset) for subset in subsets]
    model_without = [removed({role: every for role in circuit.heads_by_role}, circuit, subset) for subset in subsets]
    options = {"batch_size": batch_size, "keep_logits": False, "metric": metric, "wrong_labels": wrong_labels}
    return Completeness(
        names=names,
        kinds=kinds,
        subsets=subsets,
        circuit=evaluate(model, pairs, without, means, ablate_elsewhere, **options),
        model=evaluate(model, pairs, model_without, means, ablate_elsewhere and not paper, **options),
        metric=name_of(metric),
    )
