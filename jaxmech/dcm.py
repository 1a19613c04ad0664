"""Desiderata-based component masking (DCM; Davies et al. 2023, arXiv:2307.03637): which heads carry what.

A mask over the heads of a group is trained so that patching the heads it selects from counterfactual prompts makes the
model say what a desideratum predicts (Prakash et al. 2024, section 4 and appendix):

    z <- m z + (1 - m) z_counterfactual        m = 1: the head is left alone, m = 0: it is patched
    loss = -mean target logit + lam sum(1 - m)

The counterfactual prompts are run once, and of the base prompts only what is clean; a step then runs, forward and
backward, the layers from the group's first on and the tokens from its role on (`jaxmech.cone`). All steps of all
epochs are one scan, and many runs are one call: `train_many` vmaps over desiderata, groups, lambdas and seeds. Inside,
a mask is [L, N], with 1 at the heads that are not in the group, so that groups of all sizes share a compilation.

Axes as in `jaxmech.model`, L being counted from the first layer that a group has; n counts the heads of a group, M
masks, E the entries of a batch.
"""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmech import cone
from jaxmech.batches import equal_parts
from jaxmech.compat import check_compat
from jaxmech.config import Config
from jaxmech.dcm_prompts import (
    Base,
    BasePrompts,
    Targets,
    collect_targets,
    cut,
    examples_at_a_time,
    examples_per_call,
    runs_at_a_time,
)
from jaxmech.interventions import head_mask
from jaxmech.loading import Model
from jaxmech.model import Params, label_logits, unembed
from jaxmech.pairs import Pairs
from jaxmech.sharding import over_rows, row_devices
from jaxmech.suffixes import Suffixes

__all__ = ["History", "Run", "accuracies", "accuracy", "select", "select_many", "train", "train_many"]

Heads = Sequence[Sequence[int]]
Name = TypeVar("Name", bound=Hashable)
Array = Any  # NumPy on the host, jax.Array inside jit


class History(NamedTuple):
    """Every step of a run."""

    loss: np.ndarray  # [steps] before the step's update
    mask: np.ndarray  # [steps, n] after it
    rows: np.ndarray  # [steps, E] the examples of the step; -1 where its batch is shorter


@dataclass(frozen=True)
class Run:
    """A trained mask.

    Attributes:
      heads: the n heads, (layer, head).
      mask: float32 [n] in [0, 1]; after the last step, or the best one by `select`.
      history: loss and mask of every step.
      step: the step after which `mask` was taken, from 1 on.
      validation_accuracy: of the rounded mask, if it was selected by validation.
    """

    heads: list[tuple[int, int]]
    mask: np.ndarray  # [n]
    history: History
    step: int
    validation_accuracy: float | None = None

    @property
    def selected(self) -> list[tuple[int, int]]:
        """The heads that the rounded mask patches: those with m <= 0.5."""
        return [head for head, m in zip(self.heads, self.mask, strict=True) if np.round(m) == 0]


def train(
    model: Model,
    train_pairs: Pairs,
    heads: Heads,
    role: str = "last",
    lam: float = 0.01,
    learning_rate: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    shuffle: bool = False,
    *,
    seed: int = 0,
) -> Run:
    """Trains one mask with Adam (optax), from m = 1; m is clipped to [0, 1] after every step.

    Args:
      train_pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      heads: distinct (layer, head), all at `role`.
      lam: weight of the number of patched heads in the loss, logits per head. With 0, nothing holds back the masks of
        heads that change nothing: Adam turns the rounding of their gradients into steps.
      epochs: passes over the pairs; the last batch of each may be shorter.
      shuffle: draw another order for every epoch from `seed`.

    Returns:
      The run; `mask` is that after the last step.

    Raises:
      ValueError: no corrupt prompts, an unknown role or head, a head named twice, fewer pairs than a batch, no epochs,
        or a lambda that is no number.
    """
    options = {"learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size, "shuffle": shuffle}
    runs = train_many(model, {"": train_pairs}, {"": heads}, role, lams=[lam], seeds=[seed], **options)
    return runs["", "", lam, seed]


def train_many(
    model: Model,
    train_pairs: Mapping[str, Pairs],
    groups: Mapping[str, Heads],
    role: str = "last",
    *,
    lams: Sequence[float] = (0.01,),
    seeds: Sequence[int] = (0,),
    learning_rate: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    shuffle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, str, float, int], Run]:
    """Trains a mask for every desideratum, group, lambda and seed at once; see `train`.

    Args:
      train_pairs: desideratum -> its pairs, equally many for each.
      groups: group -> its heads, all at `role`.
      progress: called with (calls done, calls in all); a call trains as many runs for as many steps as fit the memory.

    Returns:
      {(desideratum, group, lambda, seed): run}.
    """
    config = model.config
    for name, given in {"desiderata": train_pairs, "groups": groups, "lams": lams, "seeds": seeds}.items():
        if not given:
            raise ValueError(f"train_many has no {name}; expected at least one.")
    if epochs < 1 or not np.isfinite(lams).all():
        raise ValueError(f"epochs={epochs}, lams={list(lams)}; expected epochs >= 1 and finite lambdas.")
    chosen = {name: _check_heads(config, heads) for name, heads in groups.items()}
    counts = {len(pairs) for pairs in train_pairs.values()}
    if len(counts) != 1:
        raise ValueError(f"train_many needs equally many pairs for each desideratum; found {sorted(counts)}.")
    (count,) = counts
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}, but there are {count} pairs; expected at most that many.")
    first = _first_layer(config, [head for heads in chosen.values() for head in heads])
    orders = np.stack([_order(count, epochs, batch_size, seed if shuffle else None) for seed in seeds])
    base_key = {name: _prompts_key(pairs, role) for name, pairs in train_pairs.items()}
    sets = {key: train_pairs[name] for name, key in base_key.items()}  # desiderata may share their base prompts
    keys = list(itertools.product(train_pairs, groups, lams, seeds))
    place = [{name: i for i, name in enumerate(names)} for names in (train_pairs, groups, lams, seeds)]
    arguments = _Arguments(
        base=np.array([list(sets).index(base_key[desideratum]) for desideratum, *_ in keys]),
        data=np.array([place[0][desideratum] for desideratum, *_ in keys]),
        member=np.array([_members(config, chosen[group], first) for _, group, *_ in keys]),
        lam=np.array([lam for *_, lam, _ in keys], np.float32),
        order=np.array([place[3][seed] for *_, seed in keys]),
    )
    prompts = list(sets.values()), list(train_pairs.values())
    losses, masks = _run_all(model, *prompts, role, first, arguments, orders, learning_rate, progress)
    runs = {}
    for i, key in enumerate(keys):
        layers, heads = np.array(chosen[key[1]]).T
        history = History(losses[i], masks[i][:, layers - first, heads], orders[arguments.order[i]])
        runs[key] = Run(chosen[key[1]], history.mask[-1], history, len(history.mask))
    return runs


def accuracy(model: Model, pairs: Pairs, heads: Heads, masks: np.ndarray, role: str = "last") -> np.ndarray:
    """How often the model says the target when heads are patched by `masks`, at once for all of them: float [M].

    Args:
      pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      masks: float [M, n]; round them for the accuracy of a selection of heads.

    Raises:
      ValueError: as `train`, or masks of another shape.
    """
    heads, count = _check_heads(model.config, heads), len(masks)
    if np.shape(masks)[1:] != (len(heads),):
        raise ValueError(
            f"masks has shape {np.shape(masks)}; expected [M, {len(heads)}], of one mask [1, {len(heads)}]."
        )
    first = _first_layer(model.config, heads)
    layers, numbers = np.array(heads).T
    weights = np.zeros((2 ** (count - 1).bit_length(), *_members(model.config, heads, first).shape), np.float32)
    weights[:count, layers - first, numbers] = 1 - np.asarray(masks)  # few numbers of masks, so few compilations
    weights, correct = over_rows(model.weights, weights), []
    parts = list(equal_parts(len(pairs), examples_per_call(model.config, pairs, role, first, len(weights))))
    prompts = BasePrompts(model, [pairs], role, first, [rows for rows, _ in parts])
    for part, (rows, new) in enumerate(parts):
        batch = _Batch(prompts.run(part), collect_targets(model, pairs[rows], role, first))
        found = _answers(model.config, model.weights, batch, weights, first=first)
        correct.append(np.asarray(found == pairs.labels[rows])[:, new])
    return np.concatenate(correct, axis=1).mean(-1)[:count]


def accuracies(
    model: Model, pairs: Pairs, masks: Mapping[Name, tuple[Heads, np.ndarray]], role: str = "last"
) -> dict[Name, np.ndarray]:
    """`accuracy` of masks over several sets of heads, {name: (n heads, masks [M, n])}, in one pass over the prompts."""
    every = sorted({(int(layer), int(head)) for heads, _ in masks.values() for layer, head in heads})
    place = {head: i for i, head in enumerate(every)}
    together = []
    for heads, some in masks.values():
        together.append(np.ones((len(some), len(every)), np.float32))
        together[-1][:, [place[int(layer), int(head)] for layer, head in heads]] = some
    found = accuracy(model, pairs, every, np.concatenate(together), role)
    ends = np.cumsum([len(some) for some in together])[:-1]
    return dict(zip(masks, np.split(found, ends), strict=True))


def select(
    model: Model,
    run: Run,
    validation_pairs: Pairs,
    role: str = "last",
    *,
    every: int = 4,
    compat: str | None = None,
    train_pairs: Pairs | None = None,
) -> Run:
    """The run with the mask whose rounding is best on other pairs, among those after every `every` steps and the last.

    Ties go to the mask that patches fewer heads, then to the earlier one.

    Args:
      validation_pairs: as `train_pairs`, others.
      role: the one it was trained at.
      every: steps between two masks that are tried.
      compat: "paper" lets ties go to the mask that patches more heads (i), and takes `prev_query_box` from the training
        batch of the step instead of the validation pairs (h); see docs/paper_compat.md.
      train_pairs: what the run was trained on; for compat="paper" at `prev_query_box` alone.
    """
    options = {"every": every, "compat": compat, "train_pairs": train_pairs}
    return select_many(model, {"": run}, validation_pairs, role, **options)[""]


def select_many(
    model: Model,
    runs: Mapping[Name, Run],
    validation_pairs: Pairs,
    role: str = "last",
    *,
    every: int = 4,
    compat: str | None = None,
    train_pairs: Pairs | None = None,
) -> dict[Name, Run]:
    """`select` for several runs at one role, in one pass over the validation pairs."""
    paper = check_compat(compat)
    steps, rounded = {}, {}
    for name, run in runs.items():
        steps[name] = sorted({*range(every, len(run.history.mask) + 1, every), len(run.history.mask)})
        rounded[name] = np.round(run.history.mask[np.array(steps[name]) - 1])
    if paper and role == "prev_query_box":
        if train_pairs is None:
            raise ValueError('compat="paper" at prev_query_box validates at training positions; give train_pairs.')
        found = {}
        for name, run in runs.items():
            rows = [run.history.rows[step - 1] for step in steps[name]]
            moved = [_training_positions(validation_pairs, train_pairs, batch, role) for batch in rows]
            tried = zip(moved, rounded[name], strict=True)
            found[name] = [accuracy(model, pairs, run.heads, mask[None], role)[0] for pairs, mask in tried]
    else:
        distinct = {name: np.unique(masks, axis=0, return_inverse=True) for name, masks in rounded.items()}
        once = {name: (runs[name].heads, masks) for name, (masks, _) in distinct.items()}
        found = accuracies(model, validation_pairs, once, role)
        found = {name: found[name][index.reshape(-1)] for name, (_, index) in distinct.items()}

    def best(name: Name) -> Run:
        run, patched = runs[name], (rounded[name] == 0).sum(axis=1)
        rank = [(x, n if paper else -n, -i) for i, (x, n) in enumerate(zip(found[name], patched, strict=True))]
        i = rank.index(max(rank))
        step = steps[name][i]
        return Run(run.heads, run.history.mask[step - 1], run.history, step, float(found[name][i]))

    return {name: best(name) for name in runs}


class _Batch(NamedTuple):
    """Some examples."""

    base: Base
    targets: Targets


class _Arguments(NamedTuple):
    """What differs between the runs of one call; each has an axis of runs."""

    base: Array  # [] which base prompts
    data: Array  # [] which desideratum
    member: Array  # [L, N], bool, the heads of the group
    lam: Array  # []
    order: Array  # [] which order


def _prompts_key(pairs: Pairs, role: str) -> tuple[bytes, ...]:
    """The same for pairs with the same base prompts."""
    return pairs.clean.tobytes(), pairs.position(role).tobytes(), pairs.position("last").tobytes()


def _run_all(
    model: Model,
    sets: Sequence[Pairs],
    desiderata: Sequence[Pairs],
    role: str,
    first: int,
    arguments: _Arguments,
    orders: np.ndarray,
    learning_rate: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [runs, steps] and masks [runs, steps, L, N], as many steps and runs at a time as fit the memory budget.

    Args:
      sets: the base prompts.
      orders: [orders, steps, E].
    """
    config, weights = model.config, model.weights
    segments = cut(orders, examples_at_a_time(config, sets, role, first))
    prompts = BasePrompts(model, sets, role, first, [segment.rows for segment in segments])
    targets = [collect_targets(model, pairs, role, first) for pairs in desiderata]
    targets = jax.tree.map(lambda *x: jnp.stack(x), *targets)
    copies = row_devices(weights)
    at_a_time = copies * runs_at_a_time(config, sets, role, first, orders.shape[2])
    calls = list(equal_parts(len(arguments.lam), at_a_time, copies))
    chosen = [over_rows(weights, jax.tree.map(lambda x, runs=runs: x[runs], arguments)) for runs, _ in calls]
    states = [over_rows(weights, _unpatched(call.member, learning_rate)) for call in chosen]

    def advance(part: int) -> tuple[np.ndarray, np.ndarray]:  # a function, so that its prompts go before others come
        base, data = prompts.run(part), jax.tree.map(lambda x: x[:, segments[part].rows], targets)
        found = []
        for i, (call, (_, new)) in enumerate(zip(chosen, calls, strict=True)):
            inputs = base, data, call, segments[part].orders, states[i], learning_rate
            states[i], history = _train(config, weights, *inputs, first=first)
            found.append([np.asarray(x)[new] for x in history])
            if progress:
                progress(part * len(calls) + i + 1, len(segments) * len(calls))
        losses, masks = (np.concatenate(x) for x in zip(*found, strict=True))
        return losses, masks

    losses, masks = zip(*map(advance, range(len(segments))), strict=True)
    steps = orders.shape[1]
    return np.concatenate(losses, axis=1)[:, :steps], np.concatenate(masks, axis=1)[:, :steps]


@partial(jax.jit, static_argnames=("config", "first"))
def _train(
    config: Config,
    weights: Params,
    base: Base,
    data: Targets,
    arguments: _Arguments,
    orders: Array,
    states: Any,
    learning_rate: float,
    *,
    first: int,
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """The states behind all steps, and losses [runs, steps] and masks [runs, steps, L, N].

    Args:
      base: S sets of R prompts, one behind another.
      data: with an axis of desiderata in front, [desiderata, R, ...].
      orders: of the prompts, [orders, steps, E].
      states: mask and optimizer state before the first step, of every run.
    """
    optimizer = optax.adam(learning_rate)

    def run(one: _Arguments, state: Any):
        def step(carry, rows):
            mask, state = carry
            in_base = one.base * data.labels.shape[1] + rows
            batch = _Batch(jax.tree.map(lambda x: x[in_base], base), jax.tree.map(lambda x: x[one.data, rows], data))
            loss = partial(_loss, config, weights, batch, rows >= 0, one.lam, first)
            loss, gradient = jax.value_and_grad(loss)(mask)
            gradient = gradient * one.member  # Adam leaves alone what has never had a gradient
            updates, state = optimizer.update(gradient, state)
            mask = jnp.clip(mask + jnp.asarray(updates), 0, 1)
            return (mask, state), (loss, mask)

        return jax.lax.scan(step, state, orders[one.order])

    return jax.vmap(run)(arguments, states)


def _unpatched(member: np.ndarray, learning_rate: float) -> tuple[jax.Array, Any]:
    """The states of runs with members [runs, L, N] before their first step: masks of 1, and Adam's."""
    masks = jnp.ones(member.shape, jnp.float32)
    return masks, jax.vmap(optax.adam(learning_rate).init)(masks)


def _loss(
    config: Config,
    weights: Params,
    batch: _Batch,
    present: Array,
    lam: Array,
    first: int,
    mask: jax.Array,
) -> jax.Array:
    """The loss of a mask [L, N] on the examples of `batch` that are `present`, bool [E]."""
    x = _patched_stream(config, weights, batch, 1 - mask, first)
    target_logit = label_logits(config, weights, x, batch.targets.labels)
    return -jnp.sum(target_logit * present) / present.sum() + lam * (1 - mask).sum()


def _patched_stream(config: Config, weights: Params, batch: _Batch, weight: jax.Array, first: int) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], with every head patched by its weight [L, N]."""
    base = batch.base
    count, width, _ = base.resid_pre.shape
    suffixes = Suffixes.padded(base.p, base.last, width=width, prefix=base.k.shape[3])
    resid_pre = base.resid_pre.reshape(1, count * width, -1)  # of the first layer alone: no other is read
    k, v, z = (jnp.moveaxis(x, 1, 0) for x in (base.k, base.v, batch.targets.z))
    clean = cone.CleanCache(resid_pre=resid_pre, k=k, v=v, first=first)
    patches = {"z": (cone.HeadPatch(suffixes.first, weight, z),)}
    return cone.live_stream(config, weights, clean, suffixes, patches, first)


@partial(jax.jit, static_argnames=("config", "first"))
def _answers(config: Config, weights: Params, batch: _Batch, weight: Array, *, first: int) -> jax.Array:
    """The most probable next token with heads patched by each of the weights [M, L, N], int [M, B]."""

    base = jax.tree.map(lambda x: x[: len(batch.targets.labels)], batch.base)  # calls of prompts are filled up
    batch = batch._replace(base=base)

    def one(weight):
        return unembed(config, weights, _patched_stream(config, weights, batch, weight, first)).argmax(-1)

    return jax.vmap(one)(weight)


def _first_layer(config: Config, heads: Heads) -> int:
    """The lowest layer of `heads`, or the last but one, where a live stream starts at the latest."""
    return min(min(layer for layer, _ in heads), max(0, config.num_layers - 2))


def _members(config: Config, heads: Heads, first: int) -> np.ndarray:
    """The heads from layer `first` on as bool [L, N]."""
    return head_mask(config, heads)[first:]


def _order(count: int, epochs: int, batch_size: int, seed: int | None) -> np.ndarray:
    """The examples of every step, int [steps, E], -1 where a batch is shorter; in their own order without a seed."""
    rng = None if seed is None else np.random.default_rng(seed)
    fill = -count % batch_size
    orders = [np.arange(count) if rng is None else rng.permutation(count) for _ in range(epochs)]
    return np.concatenate([np.pad(x, (0, fill), constant_values=-1).reshape(-1, batch_size) for x in orders])


def _check_heads(config: Config, heads: Heads) -> list[tuple[int, int]]:
    chosen = [(int(layer), int(head)) for layer, head in heads]
    head_mask(config, chosen)
    if twice := [head for head in chosen if chosen.count(head) > 1]:
        raise ValueError(f"Head {twice[0]} is named twice in a group of DCM.")
    return chosen


def _training_positions(pairs: Pairs, train_pairs: Pairs, batch: np.ndarray, role: str) -> Pairs:
    """The pairs with `role` where the examples of a training batch have it, over and over again (compat, h)."""
    batch = np.resize(batch[batch >= 0], len(pairs))
    clean = np.minimum(train_pairs.position(role)[batch], pairs.position("last"))
    corrupt = np.minimum(train_pairs.corrupt_position(role)[batch], pairs.corrupt_position("last"))
    positions, corrupt_positions = {**pairs.positions, role: clean}, {**pairs.corrupt_positions, role: corrupt}
    return Pairs(pairs.clean, pairs.corrupt, pairs.labels, positions, corrupt_positions)
