"""Desiderata-based component masking (DCM; Davies et al. 2023, arXiv:2307.03637): which heads carry what.

A mask over the heads of a group is trained so that patching the heads it selects from counterfactual prompts makes the
model say what a desideratum predicts (Prakash et al. 2024, section 4 and appendix):

    z <- m z + (1 - m) z_counterfactual        m = 1: the head is left alone, m = 0: it is patched
    loss = -mean target logit + lam sum(1 - m)

The counterfactual prompts are run once, and of the base prompts only what is clean; a step then runs, forward and
backward, the layers from the group's first on and the tokens from its role on (`jaxmech.cone`). All steps of all
epochs are one scan, and many runs are one call: `train_many` vmaps over desiderata, groups, lambdas and seeds.

Axes as in `jaxmech.model`; n counts the heads of a group, M masks, E the entries of a batch.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmech import cone
from jaxmech.batches import equal_parts
from jaxmech.compat import check_compat
from jaxmech.config import Config
from jaxmech.interventions import head_mask
from jaxmech.loading import Model, check_tokens
from jaxmech.model import Params, norm, unembed
from jaxmech.pairs import Pairs
from jaxmech.patching import examples_per_call, head_values
from jaxmech.shared_prefix import SharedPrompts
from jaxmech.suffixes import Suffixes

Heads = Sequence[Sequence[int]]
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
      lam: weight of the number of patched heads in the loss, logits per head.
      epochs: passes over the pairs; the last batch of each may be shorter.
      shuffle: draw another order for every epoch from `seed`.

    Returns:
      The run; `mask` is that after the last step.

    Raises:
      ValueError: no corrupt prompts, an unknown role or head, a head named twice, or fewer pairs than a batch.
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
) -> dict[tuple[str, str, float, int], Run]:
    """Trains a mask for every desideratum, group, lambda and seed at once; see `train`.

    Args:
      train_pairs: desideratum -> its pairs, equally many for each.
      groups: group -> its heads, equally many for each, all at `role`.

    Returns:
      {(desideratum, group, lambda, seed): run}.
    """
    config = model.config
    chosen = {name: _check_heads(config, heads) for name, heads in groups.items()}
    counts = {len(pairs) for pairs in train_pairs.values()}, {len(heads) for heads in chosen.values()}
    if any(len(count) != 1 for count in counts):
        raise ValueError(
            f"train_many needs equally many pairs for each desideratum and heads for each group; found {counts}."
        )
    (count,), _ = counts
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}, but there are {count} pairs; expected at most that many.")
    first = _first_layer(config, [head for heads in chosen.values() for head in heads])
    data = _stacked([_collect(model, pairs, role, first) for pairs in train_pairs.values()])
    orders = np.stack([_order(count, epochs, batch_size, seed if shuffle else None) for seed in seeds])
    keys = list(itertools.product(train_pairs, groups, lams, seeds))
    place = [{name: i for i, name in enumerate(names)} for names in (train_pairs, groups, lams, seeds)]
    arguments = _Arguments(
        data=np.array([place[0][desideratum] for desideratum, *_ in keys]),
        heads=np.array([chosen[group] for _, group, *_ in keys]),
        lam=np.array([lam for *_, lam, _ in keys], np.float32),
        order=np.array([place[3][seed] for *_, seed in keys]),
    )
    losses, masks = _train(config, model.weights, data, arguments, orders, learning_rate, first=first)
    losses, masks = np.asarray(losses), np.asarray(masks)
    return {
        key: Run(chosen[key[1]], masks[i, -1], History(losses[i], masks[i], orders[arguments.order[i]]), masks.shape[1])
        for i, key in enumerate(keys)
    }


def accuracy(model: Model, pairs: Pairs, heads: Heads, masks: np.ndarray, role: str = "last") -> np.ndarray:
    """How often the model says the target when heads are patched by `masks`, at once for all of them: float [M].

    Args:
      pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      masks: float [M, n]; round them for the accuracy of a selection of heads.
    """
    heads = _check_heads(model.config, heads)
    first = _first_layer(model.config, heads)
    correct = []
    for rows, new in equal_parts(len(pairs), max(1, examples_per_call(model.config, pairs) // len(masks))):
        data = _collect(model, pairs[rows], role, first)
        found = _answers(model.config, model.weights, data, np.array(heads), np.asarray(masks, np.float32), first=first)
        correct.append(np.asarray(found == pairs.labels[rows])[:, new])
    return np.concatenate(correct, axis=1).mean(-1)


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
      compat: "paper" lets ties go to the mask that patches more heads (i), and takes `prev_query_box` from the training
        batch of the step instead of the validation pairs (h); see docs/paper_compat.md.
      train_pairs: what the run was trained on; for compat="paper" at `prev_query_box` alone.
    """
    paper = check_compat(compat)
    steps = sorted({*range(every, len(run.history.mask) + 1, every), len(run.history.mask)})
    rounded = np.round(run.history.mask[np.array(steps) - 1])
    if paper and role == "prev_query_box":
        if train_pairs is None:
            raise ValueError('compat="paper" at prev_query_box validates at training positions; give train_pairs.')
        moved = [_training_positions(validation_pairs, train_pairs, run.history.rows[step - 1], role) for step in steps]
        found = [
            accuracy(model, pairs, run.heads, mask[None], role)[0] for pairs, mask in zip(moved, rounded, strict=True)
        ]
    else:
        distinct, index = np.unique(rounded, axis=0, return_inverse=True)
        found = accuracy(model, validation_pairs, run.heads, distinct, role)[index.reshape(-1)]
    patched = (rounded == 0).sum(axis=1)
    best = max(range(len(steps)), key=lambda i: (found[i], patched[i] if paper else -patched[i], -steps[i]))
    return Run(run.heads, run.history.mask[steps[best] - 1], run.history, steps[best], float(found[best]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Data:
    """What is computed once of the pairs: layers from the group's first on, tokens from the role on."""

    resid_pre: Array  # [B, W, D] at the first layer, of the suffix, padded with copies of its last token's
    k: Array  # [L, B, T, K, H], rotated
    v: Array  # [L, B, T, K, H]
    z: Array  # [L, B, N, H], of the counterfactual prompts at the role
    p: Array  # [B]
    last: Array  # [B]
    labels: Array  # [B]


class _Arguments(NamedTuple):
    """What differs between the runs of one call; each has an axis of runs."""

    data: Array  # [] which pairs
    heads: Array  # [n, 2]
    lam: Array  # []
    order: Array  # [] which order


def _collect(model: Model, pairs: Pairs, role: str, first: int) -> _Data:
    """Runs the prompts of `pairs`, in parts, and keeps what training needs."""
    config = model.config
    p, corrupt_p, last = pairs.position(role), pairs.corrupt_position(role), pairs.position("last")
    tokens, corrupt = check_tokens(config, pairs.clean), check_tokens(config, np.asarray(pairs.corrupt))
    width, size = int((last - p).max()) + 1, examples_per_call(config, pairs)
    parts = []
    for rows, new in equal_parts(len(pairs), size):
        z = head_values(model, (corrupt, corrupt_p[:, None]), rows, sites=("z",))["z"][first:, :, 0]
        part = _clean(config, model.weights, tokens[rows], p[rows], last[rows], z, first=first, width=width)
        parts.append(jax.tree.map(lambda x, axis, new=new: jnp.compress(new, x, axis), part, _EXAMPLE_AXES))
    found = jax.tree.map(lambda axis, *xs: jnp.concatenate(xs, axis), _EXAMPLE_AXES, *parts)
    return _Data(**found, p=p, last=last, labels=pairs.labels)


_EXAMPLE_AXES = {"resid_pre": 0, "k": 1, "v": 1, "z": 1}


@partial(jax.jit, static_argnames=("config", "first", "width"))
def _clean(config: Config, weights: Params, tokens, p, last, z, *, first: int, width: int) -> dict[str, jax.Array]:
    suffixes = Suffixes.padded(p, last, width=width, prefix=tokens.shape[1])
    whole = SharedPrompts(jnp.zeros((1, 0), jnp.int32), jnp.zeros(len(tokens), jnp.int32), tokens)
    cache = cone.live_cache(config, weights, whole, suffixes, first)
    assert cache.k is not None and cache.v is not None
    return {"resid_pre": cache.resid_pre[0].reshape(len(tokens), width, -1), "k": cache.k, "v": cache.v, "z": z}


def _stacked(data: Sequence[_Data]) -> _Data:
    """The data of several desiderata with an axis in front, padded to one length."""
    width, length = max(x.resid_pre.shape[1] for x in data), max(x.k.shape[2] for x in data)

    def pad(x: Array, axis: int, size: int) -> Array:
        return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    padded = [
        _Data(pad(x.resid_pre, 1, width), pad(x.k, 2, length), pad(x.v, 2, length), x.z, x.p, x.last, x.labels)
        for x in data
    ]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *padded)


@partial(jax.jit, static_argnames=("config", "first"))
def _train(
    config: Config,
    weights: Params,
    data: _Data,
    arguments: _Arguments,
    orders: Array,
    learning_rate: float,
    *,
    first: int,
) -> tuple[jax.Array, jax.Array]:
    """Losses [runs, steps] and masks [runs, steps, n]; data has an axis of desiderata, orders [seeds, steps, E]."""
    optimizer = optax.adam(learning_rate)

    def run(one: _Arguments):
        def step(carry, rows):
            mask, state = carry
            batch = _rows(data, one.data, rows)
            loss = partial(_loss, config, weights, batch, rows >= 0, one.heads, one.lam, first)
            loss, gradient = jax.value_and_grad(loss)(mask)
            updates, state = optimizer.update(gradient, state)
            mask = jnp.clip(mask + jnp.asarray(updates), 0, 1)
            return (mask, state), (loss, mask)

        mask = jnp.ones(len(one.heads), jnp.float32)
        return jax.lax.scan(step, (mask, optimizer.init(mask)), orders[one.order])[1]

    return jax.vmap(run)(arguments)


def _rows(data: _Data, desideratum: Array, rows: Array) -> _Data:
    """The examples `rows` of one desideratum."""
    by_example = {name: getattr(data, name)[desideratum, rows] for name in ("resid_pre", "p", "last", "labels")}
    by_layer = {name: jnp.moveaxis(getattr(data, name)[desideratum, :, rows], 0, 1) for name in ("k", "v", "z")}
    return _Data(**by_example, **by_layer)


def _loss(
    config: Config,
    weights: Params,
    batch: _Data,
    present: Array,
    heads: Array,
    lam: Array,
    first: int,
    mask: jax.Array,
) -> jax.Array:
    """The loss on the examples of `batch` that are `present`, bool [E]."""
    x = norm(config, weights["final_norm"], _patched_stream(config, weights, batch, heads, mask, first))
    # The target's logit alone: the row of the unembedding that belongs to it.
    rows = weights["embed"][batch.labels] if config.tie_embeddings else weights["unembed"][:, batch.labels].T
    target_logit = jnp.sum(x.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)
    return -jnp.sum(target_logit * present) / present.sum() + lam * (1 - mask).sum()


def _patched_stream(
    config: Config, weights: Params, batch: _Data, heads: Array, mask: jax.Array, first: int
) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], under the mask [n] of heads [n, 2]."""
    count, width, _ = batch.resid_pre.shape
    suffixes = Suffixes.padded(batch.p, batch.last, width=width, prefix=batch.k.shape[2])
    resid_pre = batch.resid_pre.reshape(1, count * width, -1)  # of the first layer alone: no other is read
    clean = cone.CleanCache(resid_pre=resid_pre, k=batch.k, v=batch.v, first=first)
    weight = jnp.zeros((config.num_layers - first, config.num_heads), mask.dtype)
    weight = weight.at[heads[:, 0] - first, heads[:, 1]].set(1 - mask)
    patches = {"z": (cone.HeadPatch(suffixes.first, weight, batch.z),)}
    return cone.live_stream(config, weights, clean, suffixes, patches, first)


@partial(jax.jit, static_argnames=("config", "first"))
def _answers(config: Config, weights: Params, data: _Data, heads: Array, masks: Array, *, first: int) -> jax.Array:
    """The most probable next token under each mask, int [M, B]."""

    def one(mask):
        return unembed(config, weights, _patched_stream(config, weights, data, heads, mask, first)).argmax(-1)

    return jax.vmap(one)(masks)


def _first_layer(config: Config, heads: Heads) -> int:
    """The lowest layer of `heads`, or the last but one, where a live stream starts at the latest."""
    return min(min(layer for layer, _ in heads), max(0, config.num_layers - 2))


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
