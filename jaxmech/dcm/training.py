"""Training of masks: all steps of all epochs are one scan, and many runs are one call.

`train_many` vmaps over desiderata, groups, lambdas and seeds. Inside, a mask is [L, U, N], with 1 at the heads that are
not in the group, so that groups of all sizes share a compilation.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.dcm.groups import Group, Masked, Role, as_group, check_roles, first_layer_of, masked, patched_roles
from jaxmech.dcm.prompts import (
    Base,
    BasePrompts,
    Place,
    base_key,
    cut,
    examples_at_a_time,
    runs_at_a_time,
    suffix_capacity,
)
from jaxmech.dcm.runs import History, Run
from jaxmech.dcm.stream import StepExamples, patched_stream
from jaxmech.dcm.targets import Targets, collect_targets
from jaxmech.loading import Model
from jaxmech.metrics import METRICS, Metric, check_metric, measure
from jaxmech.model import Params, label_logits, unembed
from jaxmech.pairs import Pairs
from jaxmech.sharding import over_rows, row_devices

TARGET_LOGIT = "target_logit"  # the logit of the target alone, which needs no others
Array = Any  # NumPy on the host, jax.Array inside jit


def train(
    model: Model,
    train_pairs: Pairs,
    heads: Group,
    role: Role = "last",
    lam: float = 0.01,
    learning_rate: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    shuffle: bool = False,
    *,
    seed: int = 0,
    metric: Metric = TARGET_LOGIT,
    optimizer: optax.GradientTransformation | None = None,
) -> Run:
    """Trains one mask with Adam or another optimizer of optax, from m = 1; m is clipped to [0, 1] after every step.

    A head's z is m times its own plus 1 - m times that of the counterfactual prompt: 0 patches it, 1 leaves it alone.

    Args:
      model: the model, which stays as it is.
      train_pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      heads: distinct (layer, head), all at `role`; or {role: heads} or a `Circuit`, whose roles must be different
        tokens of every prompt, and where a head at two roles has two masks.
      role: the role at which the heads are patched, or several, at all of which a head has one mask: the tokens of a
        name, say. Not used where `heads` name their roles.
      lam: weight of the number of patched heads in the loss, logits per head. With 0, nothing holds back the masks of
        heads that change nothing: Adam turns the rounding of their gradients into steps.
      learning_rate: that of Adam.
      epochs: passes over the pairs; the last batch of each may be shorter.
      batch_size: pairs in one step.
      shuffle: draw another order for every epoch from `seed`.
      seed: of these orders.
      metric: what masks are trained to raise: "target_logit", the paper's; or one of `jaxmech.metrics`,
        "logit_difference" by the pairs' `wrong_labels`; or a function of the logits, see `path_patch`, that can be
        differentiated. The loss is minus its mean, and `lam` counts in its units.
      optimizer: one of optax, in place of Adam with `learning_rate`. Each new object compiles anew.

    Returns:
      The run; `mask` is that after the last step.

    Raises:
      TypeError: an optimizer that is none of optax.
      ValueError: no corrupt prompts, an unknown role or head, a head named twice, fewer pairs than a batch, no epochs,
        a lambda or learning rate that is no number, an unknown metric, roles that are one token and would give it two
        values, or a loss that is not finite.
    """
    options = {"learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size, "shuffle": shuffle}
    options |= {"metric": metric, "optimizer": optimizer}
    runs = train_many(model, {"": train_pairs}, {"": heads}, role, lams=[lam], seeds=[seed], **options)
    return runs["", "", lam, seed]


def train_many(
    model: Model,
    train_pairs: Mapping[str, Pairs],
    groups: Mapping[str, Group],
    role: Role = "last",
    *,
    lams: Sequence[float] = (0.01,),
    seeds: Sequence[int] = (0,),
    learning_rate: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    shuffle: bool = False,
    metric: Metric = TARGET_LOGIT,
    optimizer: optax.GradientTransformation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, str, float, int], Run]:
    """Trains a mask for every desideratum, group, lambda and seed at once; see `train`.

    Args:
      model: the model, which stays as it is.
      train_pairs: desideratum -> its pairs, equally many for each.
      groups: name -> heads of a group, all at `role`; or, in all groups, {role: heads} or a `Circuit`. Names say
        nothing of roles: {"early": heads} is a group at `role`.
      role: the role at which the heads are patched, or several; see `train`.
      lams: the lambdas, weights of the number of patched heads in the loss; `lam` of `train`.
      seeds: the seeds; without `shuffle` they make no difference.
      learning_rate: that of Adam.
      epochs: passes over the pairs.
      batch_size: pairs in one step.
      shuffle: draw another order for every epoch from the seed.
      metric: what masks are trained to raise; see `train`.
      optimizer: one of optax, in place of Adam with `learning_rate`.
      progress: called with (calls done, calls in all); a call trains as many runs for as many steps as fit the memory.

    Returns:
      {(desideratum, group, lambda, seed): run}.
    """
    config = model.config
    for name, given in {"desiderata": train_pairs, "groups": groups, "lams": lams, "seeds": seeds}.items():
        if not given:
            raise ValueError(f"train_many has no {name}; expected at least one.")
    count = _check_training(config, train_pairs, lams, learning_rate, optimizer, epochs, batch_size, metric)
    groups = {name: as_group(group) for name, group in groups.items()}
    if empty := [name for name, group in groups.items() if not group]:
        raise ValueError(f"No heads given in the group {empty[0]!r}; expected at least one to be masked.")
    patched = patched_roles(groups.values(), role)
    roles = patched.roles
    for pairs in train_pairs.values():
        check_roles(pairs, patched)
    chosen = {name: masked(config, group, roles) for name, group in groups.items()}
    first_layer = first_layer_of(config, chosen.values())
    orders = np.stack([_order(count, epochs, batch_size, seed if shuffle else None) for seed in seeds])
    key_of = {name: base_key(pairs, roles) for name, pairs in train_pairs.items()}
    sets = {key: train_pairs[name] for name, key in key_of.items()}  # desiderata may share their base prompts
    keys = list(itertools.product(train_pairs, groups, lams, seeds))
    number = [{name: i for i, name in enumerate(names)} for names in (train_pairs, groups, lams, seeds)]
    arguments = _Arguments(
        base=np.array([list(sets).index(key_of[desideratum]) for desideratum, *_ in keys]),
        data=np.array([number[0][desideratum] for desideratum, *_ in keys]),
        member=np.array([_member(config, chosen[group], patched.units, first_layer) for _, group, *_ in keys]),
        lam=np.array([lam for *_, lam, _ in keys], np.float32),
        order=np.array([number[3][seed] for *_, seed in keys]),
    )
    prompts = list(sets.values()), list(train_pairs.values())
    how = learning_rate, optimizer, metric
    losses, masks = _run_all(model, *prompts, roles, first_layer, arguments, orders, *how, progress)
    if not np.isfinite(losses).all():
        count = int((~np.isfinite(losses).all(axis=1)).sum())
        raise ValueError(
            f"The loss of {count} of {len(losses)} trainings is not finite; look at the model's parameters, or try "
            "dtype float32 or bfloat16."
        )
    runs = {}
    for i, key in enumerate(keys):
        group = chosen[key[1]]
        history = History(losses[i], masks[i][(slice(None), *group.within(first_layer))], orders[arguments.order[i]])
        runs[key] = Run(group.heads, group.roles, history.mask[-1], history, len(history.mask))
    return runs


def _check_training(
    config: Config,
    train_pairs: Mapping[str, Pairs],
    lams: Sequence[float],
    learning_rate: float,
    optimizer: optax.GradientTransformation | None,
    epochs: int,
    batch_size: int,
    metric: Metric,
) -> int:
    """How many pairs every desideratum has; ValueError and TypeError as `train`."""
    if not isinstance(optimizer, optax.GradientTransformation | None):
        raise TypeError(f"optimizer={optimizer!r}; expected one of optax, such as optax.sgd(0.1), or None for Adam.")
    if epochs < 1 or not np.isfinite(lams).all():
        raise ValueError(f"epochs={epochs}, lams={list(lams)}; expected epochs >= 1 and finite lambdas.")
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate={learning_rate}; expected a positive number.")
    if not callable(metric) and metric not in (TARGET_LOGIT, *METRICS):
        raise ValueError(f"metric={metric!r}; expected one of {', '.join((TARGET_LOGIT, *METRICS))}, or a function.")
    for pairs in train_pairs.values() if metric != TARGET_LOGIT else ():
        check_metric(metric, None, pairs, config.vocab_size)
    counts = {len(pairs) for pairs in train_pairs.values()}
    if len(counts) != 1:
        raise ValueError(f"train_many needs equally many pairs for each desideratum; found {sorted(counts)}.")
    (count,) = counts
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}, but there are {count} pairs; expected at most that many.")
    return count


def _member(config: Config, group: Masked, units: int, first_layer: int) -> np.ndarray:
    """The heads of a group, bool [L, U, N]."""
    member = np.zeros((config.num_layers - first_layer, units, config.num_heads), bool)
    member[group.within(first_layer)] = True
    return member


class _Arguments(NamedTuple):
    """What differs between the runs of one call; each has an axis of runs."""

    base: Array  # [] which base prompts
    data: Array  # [] which desideratum
    member: Array  # [L, U, N], bool, the heads of the group
    lam: Array  # []
    order: Array  # [] which order


def _run_all(
    model: Model,
    sets: Sequence[Pairs],
    desiderata: Sequence[Pairs],
    roles: Sequence[str],
    first_layer: int,
    arguments: _Arguments,
    orders: np.ndarray,
    learning_rate: float,
    optimizer: optax.GradientTransformation | None,
    metric: Metric,
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [runs, steps] and masks [runs, steps, L, U, N], as many steps and runs at a time as fit the memory budget.

    Args:
      sets: the base prompts.
      orders: [orders, steps, E].
    """
    config, weights = model.config, model.weights
    place = Place(roles, first_layer)
    segments = cut(orders, examples_at_a_time(model, sets, place))
    prompts = BasePrompts(model, sets, [place], [segment.rows for segment in segments])
    last = first_layer + int(np.flatnonzero(arguments.member.any(axis=(0, 2, 3)))[-1])
    targets = _stacked(collect_targets(model, desiderata, roles, [last] * len(desiderata)), first_layer=first_layer)
    copies = row_devices(weights)
    capacity = suffix_capacity(sets, roles, orders)
    together = runs_at_a_time(model, sets, place, orders.shape[2], capacity, logits=metric != TARGET_LOGIT)
    calls = list(equal_parts(len(arguments.lam), copies * together, copies))
    chosen = [over_rows(weights, jax.tree.map(lambda x, runs=runs: x[runs], arguments)) for runs, _ in calls]
    states = [over_rows(weights, _unpatched(call.member, learning_rate, optimizer=optimizer)) for call in chosen]
    static = {"first_layer": first_layer, "capacity": capacity, "optimizer": optimizer, "metric": metric}

    def advance(part: int) -> tuple[np.ndarray, np.ndarray]:  # a function, so that its prompts go before others come
        (base,), (rows, orders), found = prompts.run(part), segments[part], []
        for i, (call, (_, new)) in enumerate(zip(chosen, calls, strict=True)):
            inputs = base, targets, call, rows, orders, states[i], learning_rate
            states[i], history = _train(config, weights, *inputs, **static)
            found.append([np.asarray(x)[new] for x in history])
            if progress:
                progress(part * len(calls) + i + 1, len(segments) * len(calls))
        losses, masks = (np.concatenate(x) for x in zip(*found, strict=True))
        return losses, masks

    losses, masks = zip(*map(advance, range(len(segments))), strict=True)
    steps = orders.shape[1]
    return np.concatenate(losses, axis=1)[:, :steps], np.concatenate(masks, axis=1)[:, :steps]


@partial(jax.jit, static_argnames="first_layer")
def _stacked(targets: Sequence[Targets], *, first_layer: int) -> Targets:
    """Targets at all roles, layers from `first_layer` on, with an axis of desiderata in front."""
    roles = range(targets[0].z.shape[2])
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

    def run(one: _Arguments, state: Any):
        def step(carry, rows):
            mask, state = carry
            in_base, in_data = one.base * len(examples) + rows, (one.data, examples[rows])
            batch = StepExamples(jax.tree.map(lambda x: x[in_base], base), jax.tree.map(lambda x: x[in_data], data))
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


def _order(count: int, epochs: int, batch_size: int, seed: int | None) -> np.ndarray:
    """The examples of every step, int [steps, E], -1 where a batch is shorter; in their own order without a seed."""
    rng = None if seed is None else np.random.default_rng(seed)
    fill = -count % batch_size
    orders = [np.arange(count) if rng is None else rng.permutation(count) for _ in range(epochs)]
    return np.concatenate([np.pad(x, (0, fill), constant_values=-1).reshape(-1, batch_size) for x in orders])
