"""Circuit evaluation: how well a model does when all heads but a circuit's are ablated.

As in Prakash et al. 2024, section 3, a circuit's heads act at *vital* positions, the tokens of its roles. Everywhere
else every head is ablated, and at the vital positions every head that is not in the circuit at that role: its z is
replaced, by its mean over other prompts at the same position as a rule, or by zero, or by its value on another prompt.

Where all heads are ablated, the residual stream depends on the token and its position alone: there is no attention left
that could bring in anything else. So it is computed once for every distinct pair of them, whatever the number of
prompts and circuits, and each circuit costs a forward pass of its vital tokens, which attend to the ablated ones.

Axes as in `jaxmech.model`; R vital tokens of a prompt, C circuits, U distinct tokens, and S sources of ablated values:
one, or one for each example, or one for each role and one for tokens without a role.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory, rope
from jaxmech.ablation import AblatedValues, RoleMeans
from jaxmech.attention import attention_pattern, mix_values, visible
from jaxmech.batches import equal_parts
from jaxmech.circuits import Circuit, HeadsByRole, as_heads_by_role
from jaxmech.compiled_sizes import few_counts
from jaxmech.config import Config
from jaxmech.gathered import Gathered
from jaxmech.interventions import Interventions, Patch, head_mask
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Metric
from jaxmech.model import (
    Params,
    attention_input,
    attention_output,
    embed,
    forward,
    mlp_half,
    project,
    rotated_qkv,
    unembed,
)
from jaxmech.pairs import Pairs
from jaxmech.patching import at_tokens
from jaxmech.predictions import Predictions, answers
from jaxmech.sharding import over_rows, row_devices

Array = Any  # NumPy on the host, jax.Array inside jit
# Indices of circuits and of examples, and their answers [C, B] and logits [C, B, V], None if they are not asked for.
Passes = Iterator[tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array | None]]]


def evaluate(
    model: Model,
    pairs: Pairs,
    circuits: Sequence[HeadsByRole],
    means: AblatedValues,
    ablate_elsewhere: bool = True,
    *,
    batch_size: int | None = None,
    keep_logits: bool = True,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Predictions:
    """Runs many circuits at once on the clean prompts.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      circuits: C of them: a `Circuit`, or {role: [(layer, head)]}; a role may have no heads.
      means: float [T or more, L, N, H], what ablated heads put out, see `mean_activations`; or what `role_means` found,
        for prompts of unequal length; or [B, T or more, L, N, H], values for each example, see `resampled_activations`;
        or 0, for zero ablation.
      ablate_elsewhere: ablate all heads at the tokens that are not in a circuit's roles; False leaves these tokens as
        they are, and runs every circuit in a full forward pass.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      keep_logits: return the logits, float32 [C, B, V]; many circuits of a large vocabulary need much memory.
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function of the
        logits, see `predict`; it is measured whether or not logits are kept.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.

    Returns:
      Predictions with `accuracy` [C], `correct` [C, B], `logits` [C, B, V] and, of another metric, `measured` [C, B].

    Raises:
      ValueError: no circuits, an unknown role, head or metric, or means that do not fit the model and the prompts.
    """
    config = model.config
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1.")
    roles, keep, named = _circuit_masks(config, circuits)
    prompts = _Prompts(
        tokens=check_prompts(config, pairs),
        vital=np.stack([pairs.position(role) for role in roles], axis=1),
        last=pairs.position("last"),
    )
    ablation = _ablation(config, means, pairs)
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(config, pairs, len(keep), **options)
    # Circuits that fill up a call are the first again: few numbers of circuits, so few compilations.
    filled = _Circuits(*(np.resize(x, (few_counts(len(x)), *x.shape[1:])) for x in (keep, named)))
    run = _vital_passes if ablate_elsewhere else _full_passes
    for chosen, rows, found in run(model, prompts, ablation, filled, batch_size, keep_logits=gathered.needs_logits):
        gathered.add(rows, *found, at=chosen % len(keep))
    return gathered.predictions()


def _vital_passes(
    model: Model,
    prompts: "_Prompts",
    ablation: "_Ablation",
    circuits: "_Circuits",
    batch_size: int | None,
    *,
    keep_logits: bool,
) -> Passes:
    """Runs the vital tokens of all circuits, every other token ablated; a role that one does not name has no heads."""
    config, weights, copies = model.config, model.weights, row_devices(model.weights)
    size, parts = _parts(model, prompts, ablation, batch_size)
    vital = prompts.vital.shape[1]
    circuit = memory.of_tokens(config, vital) + memory.of_attention(config, vital, vital + prompts.tokens.shape[1])
    per_call = memory.fitting(weights, size * (circuit + memory.of_logits(config)))
    for rows, index, distinct in parts:
        values, source = ablation.of(config, rows)
        batch = _Vital(*prompts.of(rows), index, source)
        ablated = _ablated_everywhere(config, weights, batch, values, distinct)
        for chosen, _ in equal_parts(len(circuits.keep), per_call, copies):
            here = over_rows(weights, circuits.keep[chosen])
            yield chosen, rows, _vital_answers(config, weights, batch, ablated, here, keep_logits=keep_logits)


def _full_passes(
    model: Model,
    prompts: "_Prompts",
    ablation: "_Ablation",
    circuits: "_Circuits",
    batch_size: int | None,
    *,
    keep_logits: bool,
) -> Passes:
    """Runs full forward passes, one circuit after another, in which tokens without a role are as in the model."""
    config, weights = model.config, model.weights
    logits = memory.of_logits(config)
    if batch_size is None:
        batch_size = memory.fitting(weights, memory.of_forward(config, prompts.tokens.shape[1]) + logits)
    size = min(len(prompts.tokens), batch_size)
    per_call = memory.fitting(weights, size * logits)
    for rows, _ in equal_parts(len(prompts.tokens), size, row_devices(weights)):
        here = over_rows(weights, prompts.of(rows))
        values, source = ablation.of(config, rows)
        at_vital = _values_at_vital(here.vital, source, values)
        for chosen, _ in equal_parts(len(circuits.keep), per_call):
            masks = circuits.keep[chosen], circuits.named[chosen]
            yield chosen, rows, _full_answers(config, weights, here, at_vital, *masks, keep_logits=keep_logits)


class _Circuits(NamedTuple):
    """Circuits over all roles."""

    keep: np.ndarray  # [C, L, R, N] bool, their heads
    named: np.ndarray  # [C, R] bool, the roles that each names


class _Prompts(NamedTuple):
    """Prompts, and where a circuit can have heads."""

    tokens: Array  # [B, T]
    vital: Array  # [B, R]
    last: Array  # [B]

    def of(self, rows: np.ndarray) -> "_Prompts":
        """Those of some examples."""
        return _Prompts(*(x[rows] for x in self))


class _Ablation(NamedTuple):
    """What ablated heads put out, by source and position, and the source of each token."""

    values: np.ndarray  # [S, T, L, N, H]
    source: np.ndarray  # [B, T]
    own: bool  # every example has a source of its own

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """The source of each token of some examples among those that `of` gives, int32 [b, T]."""
        own = np.broadcast_to(np.arange(len(rows))[:, None], (len(rows), self.source.shape[1]))
        return np.asarray(own if self.own else self.source[rows], np.int32)

    def of(self, config: Config, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values [L, S, T, N, H] of some examples, in the compute dtype, and their sources [b, T]."""
        here = self.values[rows] if self.own else self.values
        return np.moveaxis(here, 2, 0).astype(config.compute_dtype), self.sources(rows)


class _Vital(NamedTuple):
    """`_Prompts`, their tokens among the distinct ones, and the sources of what ablated heads put out there."""

    tokens: Array  # [B, T]
    vital: Array  # [B, R]
    last: Array  # [B]
    index: Array  # [B, T] which distinct token each is
    source: Array  # [B, T]


class _Distinct(NamedTuple):
    """The distinct combinations of a token, its position and the source of its ablated values."""

    token: Array  # [U]
    position: Array  # [U]
    source: Array  # [U]


class _Ablated(NamedTuple):
    """What does not depend on the circuit when all heads are ablated outside the vital positions."""

    k: Array  # [L, U, K, H], rotated
    v: Array  # [L, U, K, H]
    z: Array  # [L, B, R, N, H], the ablated values at the vital positions


@partial(jax.jit, static_argnames="config")
def _ablated_everywhere(config: Config, weights: Params, batch: _Vital, values: Array, distinct: _Distinct) -> _Ablated:
    """Runs the distinct tokens with every head ablated; values [L, S, T, N, H]."""
    rotations = rope.rotations(config, distinct.position)

    def layer(x, inputs):
        index, layer_weights, z = inputs
        rotation = rope.of_layer(config, index, rotations)
        normed = attention_input(config, layer_weights, x)
        k, v = (project(config, layer_weights, site, normed) for site in ("k", "v"))
        attn_out = attention_output(config, layer_weights, z.astype(x.dtype))  # [S, T, D]
        x = mlp_half(config, layer_weights, x + attn_out[distinct.source, distinct.position])
        return x, _Ablated(rope.rotate(k, rotation), v, _at_vital(batch.vital, batch.source, z))

    x = embed(config, weights, distinct.token)
    return jax.lax.scan(layer, x, (jnp.arange(config.num_layers), weights["blocks"], values))[1]


@partial(jax.jit, static_argnames=("config", "keep_logits"))
def _vital_answers(
    config: Config, weights: Params, batch: _Vital, ablated: _Ablated, keep: Array, *, keep_logits: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Answers [C, B] and logits [C, B, V] of circuits keep [C, L, R, N] by forward passes of the vital tokens."""
    logits = jax.vmap(partial(_circuit_logits, config, weights, batch, ablated))(keep)
    return answers(logits), logits if keep_logits else None


def _circuit_logits(config: Config, weights: Params, batch: _Vital, ablated: _Ablated, keep: jax.Array) -> jax.Array:
    """Logits [B, V] of one circuit, keep bool [L, R, N]."""
    vital = batch.vital  # [B, R]
    same = vital[:, :, None] == vital[:, None, :]  # [B, R, R]: roles that are one token
    again = (same & jnp.tri(vital.shape[1], k=-1, dtype=bool)).any(-1)  # [B, R]: a token that an earlier role names
    token = jnp.arange(batch.tokens.shape[1])
    is_vital = (vital[:, :, None] == token).any(1)  # [B, T]
    rotations = rope.rotations(config, vital)

    def layer(x, inputs):
        index, layer_weights, constant, kept = inputs
        normed = attention_input(config, layer_weights, x)
        q, k, v = rotated_qkv(config, layer_weights, normed, rope.of_layer(config, index, rotations))
        before = visible(config, index, vital, token) & ~is_vital[:, None, None]  # [B, 1, R, T]
        own = visible(config, index, vital, vital) & ~again[:, None, None]  # [B, 1, R, R]
        keys = [(constant.k[batch.index], before), (k, own)]
        patterns = attention_pattern(config, q, keys)
        z = mix_values(config, list(zip(patterns, (constant.v[batch.index], v), strict=True)))
        kept = (same[..., None] & kept).any(2)  # [B, R, N]
        z = jnp.where(kept[..., None], z, constant.z.astype(z.dtype))
        return mlp_half(config, layer_weights, x + attention_output(config, layer_weights, z)), None

    example = jnp.arange(len(vital))
    x = embed(config, weights, batch.tokens[example[:, None], vital])  # [B, R, D]
    x, _ = jax.lax.scan(layer, x, (jnp.arange(config.num_layers), weights["blocks"], ablated, keep))
    at_last = (vital == batch.last[:, None]).argmax(1)
    return unembed(config, weights, x[example, at_last])


@jax.jit
def _values_at_vital(vital: Array, source: Array, values: Array) -> jax.Array:
    """The ablated values [L, B, R, N, H] at the vital positions [B, R] of prompts with sources [B, T]."""
    return jax.vmap(partial(_at_vital, vital, source))(values)


def _at_vital(vital: jax.Array, source: jax.Array, values: jax.Array) -> jax.Array:
    """One layer's values [S, T, N, H] at the vital positions [B, R] of prompts with sources [B, T]: [B, R, N, H]."""
    return values[jnp.take_along_axis(source, vital, axis=1), vital]


@partial(jax.jit, static_argnames=("config", "keep_logits"))
def _full_answers(
    config: Config, weights: Params, prompts: _Prompts, values: Array, keep: Array, named: Array, *, keep_logits: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Answers [C, B] and logits [C, B, V] of circuits keep [C, L, R, N] by full forward passes, one after another."""
    same = prompts.vital[:, :, None] == prompts.vital[:, None, :]  # [B, R, R]

    def one(circuit):
        kept, roles = circuit
        named = (same & roles).any(-1)[..., None]  # [B, R, 1]; tokens that no role of the circuit names are left alone
        ablated = named & ~at_tokens(prompts.vital, kept)  # [L, B, R, N]
        patch = Patch(ablated, values, prompts.vital)
        logits = forward(config, weights, prompts.tokens, Interventions(z=patch), logits_at=prompts.last)[0]
        return answers(logits), logits if keep_logits else None

    return jax.lax.map(one, (keep, named))


def _circuit_masks(config: Config, circuits: Sequence[HeadsByRole]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All roles, `last` the first; the heads of each circuit, bool [C, L, R, N]; the roles it names, bool [C, R]."""
    if isinstance(circuits, Mapping | Circuit):
        raise TypeError("One circuit given; expected a list of them: evaluate(model, pairs, [circuit], means).")
    if not len(circuits):
        raise ValueError("No circuits given; expected a list of circuits or of {role: [(layer, head)]}.")
    by_role = [{role: list(heads) for role, heads in as_heads_by_role(circuit).items()} for circuit in circuits]
    roles = list(dict.fromkeys(["last", *(role for heads in by_role for role in heads)]))
    keep = np.zeros((len(circuits), config.num_layers, len(roles), config.num_heads), bool)
    for circuit, heads in zip(keep, by_role, strict=True):
        for role, chosen in heads.items():
            if chosen:
                circuit[:, roles.index(role)] = head_mask(config, chosen)
    return roles, keep, np.array([[role in heads for role in roles] for heads in by_role])


def _ablation(config: Config, means: AblatedValues, pairs: Pairs) -> _Ablation:
    """The ablated values and their sources; ValueError unless they fit the model and reach as far as the prompts."""
    (count, length), heads = pairs.clean.shape, (config.num_layers, config.num_heads, config.head_dim)
    if isinstance(means, RoleMeans):
        given, own, source = means.by_position, False, _source_by_role(means, pairs)
        values = np.stack([given, *(np.broadcast_to(x, given.shape) for x in means.by_role.values())])
    else:
        given = np.asarray(means)
        values = np.zeros((length, *heads), np.float32) if not given.ndim and given == 0 else given
        values = values[None] if values.ndim == 4 else values
        own = values.ndim == 5 and len(values) > 1
        source = np.broadcast_to(np.arange(count)[:, None] * own, (count, length))
    fits = values.ndim == 5 and values.shape[2:] == heads and values.shape[1] >= length
    if not fits or (own and len(values) != count):
        raise ValueError(
            f"means has shape {given.shape}; this model and these prompts need [{length} or more, L, N, H] with "
            f"L, N, H = {heads}, or [{count}, {length} or more, L, N, H]. Means must come from prompts at least "
            "as long."
        )
    values, token = values[:, :length], np.arange(length)
    missing = ~np.isfinite(values.sum(axis=(2, 3, 4), dtype=np.float64))  # [S, T]
    needed = missing[source, token] & (token <= pairs.position("last")[:, None])
    if needed.any():
        raise ValueError(
            f"means holds numbers that are not finite at position {int(needed.any(0).argmax())}, which the prompts "
            "reach. Did none of the prompts that they come from reach it? Else look at the model and its dtype."
        )
    return _Ablation(np.where(missing[..., None, None, None], 0, values) if missing.any() else values, source, own)


def _source_by_role(means: RoleMeans, pairs: Pairs) -> np.ndarray:
    """1 and more for tokens with the roles of `means`, of several the first; 0 for others: int [B, T]."""
    source = np.zeros(pairs.clean.shape, int)
    for i, role in reversed(list(enumerate(means.by_role, start=1))):
        source[np.arange(len(pairs)), pairs.position(role)] = i
    return source


def _parts(
    model: Model, prompts: _Prompts, ablation: _Ablation, batch_size: int | None
) -> tuple[int, list[tuple[np.ndarray, np.ndarray, _Distinct]]]:
    """The examples in parts that fit the memory budget, and how many each has.

    Of each part: its examples, and what `_distinct_tokens` says of them.
    """
    config, length = model.config, prompts.tokens.shape[1]
    layers, vital = config.num_layers, prompts.vital.shape[1]
    distinct = memory.of_keys_and_values(config, 1, layers) + memory.of_tokens(config, 1)  # what such a token takes
    example = memory.of_heads(config, vital + length * ablation.own, layers) + memory.of_logits(config)
    example += memory.of_keys_and_values(config, length, 1) + memory.of_tokens(config, vital)
    size, budget = len(prompts.tokens) if batch_size is None else batch_size, memory.budget(model.weights)
    while True:
        rows = [rows for rows, _ in equal_parts(len(prompts.tokens), size)]
        found = _distinct_tokens([(prompts.tokens[part], ablation.sources(part)) for part in rows])
        size, taken = len(rows[0]), len(found[0][1].token) * distinct + len(rows[0]) * example
        if batch_size is not None or taken <= budget or size == 1:
            return size, [(part, *which) for part, which in zip(rows, found, strict=True)]
        size = max(1, min(size - 1, int(size * budget / taken)))  # smaller parts share fewer tokens: look again


def _distinct_tokens(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, _Distinct]]:
    """For each batch of tokens and their sources [B, T]: which distinct token each is, int [B, T], and these.

    They are equally many in each batch.
    """
    found = []
    for tokens, source in batches:
        position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        rows = np.stack([tokens, position, source], axis=-1).reshape(-1, 3)
        distinct, index = np.unique(rows, axis=0, return_inverse=True)
        found.append((index.reshape(tokens.shape), distinct))
    most = max(len(distinct) for _, distinct in found)
    padded = [(index, np.pad(distinct, ((0, most - len(distinct)), (0, 0)))) for index, distinct in found]
    return [(index, _Distinct(*distinct.T)) for index, distinct in padded]
