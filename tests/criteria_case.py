"""A model, prompts and a circuit whose criteria are worked out by full forward passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import full_forward
import numpy as np

import jaxmech as jm

PROMPTS = 36  # accuracies that differ from their rounding to 0.01
GROUPS = {
    "readers": [(2, 3), (1, 3), (3, 0), (2, 1), (0, 2), (1, 1)],
    "movers": [(3, 2), (2, 2)],
    "binders": [(0, 0), (1, 2), (1, 0), (0, 3)],
    "nobody": [],
}
ROLES = {"readers": "last", "movers": "last", "binders": "query_box", "nobody": "early"}
CIRCUIT = jm.Circuit(GROUPS, ROLES)
EMPTY = jm.Circuit({"nobody": []}, {"nobody": "early"})
EVERY_HEAD = [(layer, head) for layer in range(4) for head in range(4)]
Heads = Mapping[str, Sequence[tuple[int, int]]]  # by role


@dataclass(frozen=True)
class Case:
    """A model, prompts with labels, and means; answers are those of full forward passes."""

    model: jm.Model
    pairs: jm.Pairs
    means: np.ndarray
    known: dict = field(default_factory=dict)

    def answers(self, heads: Heads, elsewhere: bool = True) -> np.ndarray:
        """The next token [B] with all heads ablated but those of each role."""
        key = elsewhere, *((role, frozenset(chosen)) for role, chosen in heads.items())
        if key not in self.known:
            whole = not elsewhere and all(len(chosen) == len(EVERY_HEAD) for chosen in heads.values())
            evaluated = lambda: full_forward.evaluate(self.model, self.pairs, heads, self.means, elsewhere)  # noqa: E731
            self.known[key] = self.own_answers() if whole else evaluated().argmax(-1)
        return self.known[key]

    def correct(self, heads: Heads, elsewhere: bool = True) -> np.ndarray:
        return self.answers(heads, elsewhere) == self.pairs.labels

    def count(self, heads: Heads, elsewhere: bool = True) -> int:
        return int(self.correct(heads, elsewhere).sum())

    def own_answers(self) -> np.ndarray:
        return full_forward.last_logits(self.model, self.pairs).argmax(-1)

    def with_labels(self, labels: np.ndarray) -> "Case":
        return replace(self, pairs=replace(self.pairs, labels=labels))


def left(circuit: jm.Circuit, gone: Heads) -> dict[str, list[tuple[int, int]]]:
    """The heads of each role without those of `gone`, by group."""
    heads = {role: [] for role in circuit.roles.values()}
    for group, members in circuit.groups.items():
        heads[circuit.roles[group]] += [head for head in members if head not in gone.get(group, ())]
    return heads


def made(random_model: Callable[..., jm.Model], random_pairs: Callable[..., jm.Pairs]) -> Case:
    """The case of the fixtures `random_model` and `random_pairs`.

    Labels are what the model says, or the circuit, or the circuit without some heads: accuracies between 0 and 1.
    """
    model = random_model(num_kv_heads=2)
    pairs = random_pairs(model, count=PROMPTS)
    case = Case(model, pairs, jm.mean_activations(model, random_pairs(model, count=50, seed=5).clean))
    weaker = [{"readers": [(3, 0), (1, 1)]}, {"readers": [(2, 3)], "binders": [(1, 0)]}, {"binders": [(0, 3)]}]
    said = [case.answers(left(CIRCUIT, gone)) for gone in ({}, *weaker)]
    said += [case.own_answers()] * 3 + [pairs.labels]
    return case.with_labels(np.choose(np.arange(PROMPTS) % len(said), said))
