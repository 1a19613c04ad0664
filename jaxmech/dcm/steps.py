"""The steps of trainings: all steps of all epochs are one scan, and many runs are one call.

A call is vmapped over desiderata, groups, lambdas and seeds. Inside, a mask is [L, U, N], with 1 at the heads that are
not in the group, so that groups of all sizes share a compilation.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.dcm.groups import Masked
from jaxmech.dcm.prompts import (
    Base,
    BasePrompts,
    Place,
    Segment,
    base_key,
    cut,
    examples_at_a_time,
    runs_at_a_time,
    suffix_capacity,
)
from jaxmech.dcm.stream import StepExamples, patched_stream
from jaxmech.dcm.targets import Counterfactuals, Targets
from jaxmech.loading import Model
from jaxmech.metrics import Metric, measure
from jaxmech.model import Params, label_logits, unembed
from jaxmech.pairs import Pairs
from jaxmech.sharding import over_rows, row_devices

TARGET_LOGIT = "target_logit"  # the logit of the target alone, which needs no others
Array = Any  # NumPy on the host, jax.Array inside jit
Key = tuple[str, str, float, int]  # desideratum, group, lambda, seed


class GroupsAt(NamedTuple):
    """The groups that are patched at one place."""

    place: Place
    units: int  # U
    groups: dict[str, Masked]

    def members(self, config: Config) -> dict[str, np.ndarray]:
        """The heads of each group, bool [L, U, N]."""
        shape, found = (config.num_layers - self.place.first_layer, self.units, config.num_heads), {}
        for name, group in self.groups.items():
            found[name] = np.zeros(shape, bool)
            found[name][group.within(self.place.first_layer)] = True
        return found


class How(NamedTuple):
    """How every desideratum and group is trained, see `jaxmech.dcm.train_many`."""

    lams: Sequence[float]
    seeds: Sequence[int]
    orders: np.ndarray  # [seeds, steps, E], the examples of every step; -1 where a batch is shorter
    learning_rate: float
    optimizer: optax.GradientTransformation | None
    metric: Metric


class Trained(NamedTuple):
    """What every step of a run leaves."""

    loss: np.ndarray  # [steps]
    mask: np.ndarray  # [steps, n]
    rows: np.ndarray  # [steps, E]


class Training:
    """Runs of some desiderata whose prompts are run once for the groups at all places.

    They go as many steps and runs at a time as fit the memory budget.

    Args:
      train_pairs: desideratum -> its pairs, equally many for each.
      at: the groups, by place.
    """

    def __init__(self, model: Model, train_pairs: Mapping[str, Pairs], at: Sequence[GroupsAt], how: How):
        self._model, self._pairs, self._how = model, list(train_pairs.values()), how
        places = [here.place for here in at]
        self._roles = list(dict.fromkeys(role for place in places for role in place.roles))
        self._last = max(int(group.layer.max()) for here in at for group in here.groups.values())
        key_of = {name: base_key(pairs, self._roles) for name, pairs in train_pairs.items()}
        sets = {key: train_pairs[name] for name, key in key_of.items()}  # desiderata may share their base prompts
        base_of = {name: list(sets).index(key) for name, key in key_of.items()}
        base = list(sets.values())
        self._segments = cut(how.orders, examples_at_a_time(model, base, places))
        self._prompts = BasePrompts(model, base, places, [segment.rows for segment in self._segments])
        self._runs = [_RunsAt(model, base, base_of, here, how) for here in at]

    @property
    def calls(self) -> int:
        """Of the compiled function that trains."""
        return len(self._segments) * sum(runs.calls for runs in self._runs)

    def run(self, progress: Callable[[], None]) -> Iterator[tuple[Key, Trained]]:
        """Trains; `progress` is called after every call."""
        targets_at = self._targets()

        def advance(part: int) -> None:  # a function, so that its prompts go before others come
            for runs, base, targets in zip(self._runs, self._prompts.run(part), targets_at, strict=True):
                runs.advance(base, targets, self._segments[part], progress)

        for part in range(len(self._segments)):
            advance(part)
        for runs in self._runs:
            yield from runs.trained()

    def _targets(self) -> list[Targets]:
        """Those at each place, with an axis of desiderata in front."""
        every = np.arange(len(self._pairs[0]))
        found = Counterfactuals(self._model, self._pairs, self._roles, [self._last] * len(self._pairs), [every]).run(0)
        places = [runs.place for runs in self._runs]
        roles = [tuple(map(self._roles.index, place.roles)) for place in places]
        return [_stacked(found, roles=of, first_layer=x.first_layer) for of, x in zip(roles, places, strict=True)]


class _RunsAt:
    """The runs of all groups at one place, and how far they are.

    Args:
      base: sets of base prompts.
      base_of: desideratum -> which set it has.
    """

    def __init__(self, model: Model, base: Sequence[Pairs], base_of: Mapping[str, int], at: GroupsAt, how: How):
        config, weights, self.place = model.config, model.weights, at.place
        self._model, self._at, self._how = model, at, how
        self._keys = list(itertools.product(base_of, at.groups, how.lams, how.seeds))
        names, seeds, members = list(base_of), list(how.seeds), at.members(config)
        every = _Arguments(
            base=np.array([base_of[desideratum] for desideratum, *_ in self._keys]),
            data=np.array([names.index(desideratum) for desideratum, *_ in self._keys]),
            member=np.array([members[group] for _, group, *_ in self._keys]),
            lam=np.array([lam for *_, lam, _ in self._keys], np.float32),
            order=np.array([seeds.index(seed) for *_, seed in self._keys]),
        )
        capacity, copies = suffix_capacity(base, at.place.roles, how.orders), row_devices(weights)
        examples = how.orders.shape[2]
        together = runs_at_a_time(model, base, at.place, examples, capacity, logits=how.metric != TARGET_LOGIT)
        parts = list(equal_parts(len(self._keys), copies * together, copies))
        self._new = [new for _, new in parts]
        self._calls = [over_rows(weights, jax.tree.map(lambda x, runs=runs: x[runs], every)) for runs, _ in parts]
        start = partial(_unpatched, learning_rate=how.learning_rate, optimizer=how.optimizer)
        self._states = [over_rows(weights, start(call.member)) for call in self._calls]
        self._static = {"first_layer": at.place.first_layer, "capacity": capacity}
        self._static |= {"optimizer": how.optimizer, "metric": how.metric}
        self._found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in parts]  # of each call, part by part

    @property
    def calls(self) -> int:
        return len(self._calls)

    def advance(self, base: Base, targets: Targets, segment: Segment, progress: Callable[[], None]) -> None:
        """The steps of a segment; targets are of all examples."""
        for i, call in enumerate(self._calls):
            inputs = base, targets, call, segment.rows, segment.orders, self._states[i], self._how.learning_rate
            self._states[i], found = _train(self._model.config, self._model.weights, *inputs, **self._static)
            losses, masks = (np.asarray(x)[self._new[i]] for x in found)
            self._found[i].append((losses, masks))
            progress()

    def trained(self) -> Iterator[tuple[Key, Trained]]:
        """What all steps have left."""
        orders, seeds = self._how.orders, list(self._how.seeds)
        steps = orders.shape[1]  # the last segment may repeat its last one
        whole = [[np.concatenate(x, axis=1)[:, :steps] for x in zip(*parts, strict=True)] for parts in self._found]
        losses, masks = (np.concatenate(x) for x in zip(*whole, strict=True))
        for key, loss, mask in zip(self._keys, losses, masks, strict=True):
            group = self._at.groups[key[1]].within(self.place.first_layer)
            yield key, Trained(loss, mask[(slice(None), *group)], orders[seeds.index(key[3])])


class _Arguments(NamedTuple):
    """What differs between the runs of one call; each has an axis of runs."""

    base: Array  # [] which base prompts
    data: Array  # [] which desideratum
    member: Array  # [L, U, N], bool, the heads of the group
    lam: Array  # []
    order: Array  # [] which order


@partial(jax.jit, static_argnames=("roles", "first_layer"))
def _stacked(targets: Sequence[Targets], *, roles: tuple[int, ...], first_layer: int) -> Targets:
    """Targets at some of their roles, layers from `first_layer` on, with an axis of desiderata in front."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(found.at(roles, first_layer) for found in targets))


@partial(jax.jit, static_argnames=("config", "first_layer", "capacity", "optimizer", "metric"))
def _train(
    config: Config,
    weights: Params,
    base: Base,
    data: Targets,
    arguments: _Arguments,
    examples: Array,
    orders: Array,
    states: Any,
    learning_rate: float,
    *,
    first_layer: int,
    capacity: int,
    optimizer: optax.GradientTransformation | None,
    metric: Metric,
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """The states behind all steps, and losses [runs, steps] and masks [runs, steps, L, U, N].

    Args:
      base: S sets of Q prompts, one behind another.
      data: of all examples, with an axis of desiderata in front, [desiderata, B, ...].
      examples: those of the prompts, [Q].
      orders: of the prompts, [orders, steps, E].
      states: mask and optimizer state before the first step, of every run.
    """
    optimizer = optax.with_extra_args_support(optimizer or optax.adam(learning_rate))
    layers = config.num_layers - first_layer

    def run(one: _Arguments, state: Any):
        def step(carry, rows):
            mask, state = carry
            in_base, in_data = one.base * len(examples) + rows, (one.data, examples[rows])
            batch = StepExamples(base.at(in_base, layers), jax.tree.map(lambda x: x[in_data], data))
            present = rows >= 0
            p = jnp.where(present[:, None], batch.base.p, batch.base.last[:, None])  # others take one token of capacity
            batch = batch._replace(base=batch.base._replace(p=p))

            def loss_of(mask):
                x = patched_stream(config, weights, batch, 1 - mask, first_layer, capacity)
                values = _values(config, weights, x, batch.targets, examples[rows], metric)
                return -jnp.sum(values * present) / present.sum() + one.lam * (1 - mask).sum()

            loss, gradient = jax.value_and_grad(loss_of)(mask)
            gradient = gradient * one.member
            more = {"value": loss, "grad": gradient, "value_fn": loss_of}  # some optimizers want these
            updates, state = optimizer.update(gradient, state, mask, **more)
            # Adam leaves alone what has never had a gradient; others may not.
            mask = jnp.clip(mask + jnp.where(one.member, jnp.asarray(updates), 0), 0, 1)
            return (mask, state), (loss, mask)

        return jax.lax.scan(step, state, orders[one.order])

    return jax.vmap(run)(arguments, states)


@partial(jax.jit, static_argnames="optimizer")
def _unpatched(
    member: Array, learning_rate: float, *, optimizer: optax.GradientTransformation | None
) -> tuple[jax.Array, Any]:
    """The states of runs with members [runs, L, U, N] before their first step: masks of 1, and the optimizer's."""
    masks = jnp.ones(member.shape, jnp.float32)
    return masks, jax.vmap((optimizer or optax.adam(learning_rate)).init)(masks)


def _values(
    config: Config, weights: Params, x: jax.Array, targets: Targets, rows: jax.Array, metric: Metric
) -> jax.Array:
    """What the metric says of each example by its last stream x [E, D], float32 [E]; `rows` [E] are those examples."""
    if metric == TARGET_LOGIT:
        return label_logits(config, weights, x, targets.labels)
    return measure(metric, unembed(config, weights, x), targets.labels, targets.wrong_labels, rows)
