"""The two ways to run circuits: through their vital tokens, or through what follows the first of these.

Where all heads are ablated, the residual stream depends on the token and its position alone: there is no attention left
that could bring in anything else. So it is computed once for every distinct pair of them, whatever the number of
prompts and circuits, and each circuit costs a forward pass of its vital tokens, which attend to the ablated ones.

Where tokens without a role are left as they are, nothing changes before the first vital token: each circuit costs a
forward pass of the tokens from there on, on the causal cone (`jaxmech.cone`).

Axes as in `jaxmech.model`; R vital tokens of a prompt, C circuits, U distinct tokens, and S sources of ablated values:
one, or one for each example, or one for each role and one for tokens without a role.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory, rope
from jaxmech.attention import attention_pattern, mix_values, visible
from jaxmech.batches import Batches, calls_of_equal_size, equal_parts
from jaxmech.cone import CleanCache, Cone, HeadPatch, live_cache, live_start, live_stream
from jaxmech.config import Config
from jaxmech.loading import Model
from jaxmech.model import (
    Params,
    attention_input,
    attention_output,
    embed,
    mlp_half,
    project,
    rotated_qkv,
    unembed,
)
from jaxmech.patching import at_tokens
from jaxmech.predictions import answers
from jaxmech.sharding import over_rows, row_devices
from jaxmech.shared_prefix import SharedPrompts
from jaxmech.suffixes import Suffixes, suffix_lengths

TOKENS_PER_CALL = 4096  # suffix tokens of all circuits that run together
Array = Any  # NumPy on the host, jax.Array inside jit
# Indices of circuits and of examples, and their answers [C, B] and logits [C, B, V], None if they are not asked for.
Passes = Iterator[tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array | None]]]


class Circuits(NamedTuple):
    """Circuits over all roles."""

    keep: np.ndarray  # [C, L, R, N] bool, their heads
    named: np.ndarray  # [C, R] bool, the roles that each names


class Prompts(NamedTuple):
    """Prompts, and where a circuit can have heads."""

    tokens: Array  # [B, T]
    vital: Array  # [B, R]
    last: Array  # [B]

    def of(self, rows: np.ndarray) -> "Prompts":
        """Those of some examples."""
        return Prompts(*(x[rows] for x in self))


class Ablation(NamedTuple):
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


def vital_passes(
    model: Model,
    prompts: Prompts,
    ablation: Ablation,
    circuits: Circuits,
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


class _Vital(NamedTuple):
    """`Prompts`, their tokens among the distinct ones, and the sources of what ablated heads put out there."""

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


def _parts(
    model: Model, prompts: Prompts, ablation: Ablation, batch_size: int | None
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


def suffix_passes(
    model: Model, prompts: Prompts, ablation: Ablation, circuits: Circuits, batch_size: int | None, *, keep_logits: bool
) -> Passes:
    """Runs what follows the first token with a role of any circuit; tokens without one of a circuit are left alone."""
    config, weights, copies = model.config, model.weights, row_devices(model.weights)
    used = np.flatnonzero(circuits.named.any(axis=0)) if circuits.named.any() else np.arange(1)
    keep, named, vital = circuits.keep[:, :, used], circuits.named[:, used], prompts.vital[:, used]
    length, tokens = float(suffix_lengths(vital, prompts.last).mean()), prompts.tokens.shape[1]
    stream = memory.of_tokens(config, length) + memory.of_attention(config, length, tokens) + memory.of_logits(config)
    if batch_size is None:
        values = memory.of_heads(config, vital.shape[1], config.num_layers)
        batch_size = memory.fitting(weights, memory.of_live_sweep(config, length, tokens, 1) + values)
    batches = Batches.plan([prompts.tokens], vital, prompts.last, batch_size)
    ablated: np.ndarray = np.any(named[:, None, :, None] & ~keep, axis=(2, 3))  # [C, L]
    first = np.where(ablated.any(axis=1), ablated.argmax(axis=1), config.num_layers)
    order = np.argsort(first, kind="stable")  # so that those of a call start in similar layers
    # As many circuits in a call as there is work for, but no more than fit half of the memory budget.
    share = 2 * len(batches.rows[0]) * stream / memory.budget(weights)
    work = max(batches.capacity / TOKENS_PER_CALL, share)
    calls = calls_of_equal_size(order, work, most=len(order), copies=copies)

    def run_batch(rows: np.ndarray) -> Passes:  # a function, so that its cache goes before the next one comes
        values, source = ablation.of(config, rows)
        suffixes = batches.suffixes(rows)
        inputs = _prepare(config, weights, batches.prompts(rows), suffixes, vital[rows], source, values)
        for chosen in calls:
            here = over_rows(weights, (keep[chosen], named[chosen]))
            yield chosen, rows, _suffix_answers(config, weights, inputs, *here, keep_logits=keep_logits)

    for rows in batches.rows:
        yield from run_batch(rows)


class _Suffixes(NamedTuple):
    """What a batch of examples brings to every call."""

    clean: CleanCache
    suffixes: Suffixes
    vital: Array  # [B, R]
    values: Array  # [L, B, R, N, H], the ablated ones there


@partial(jax.jit, static_argnames="config")
def _prepare(
    config: Config,
    weights: Params,
    prompts: SharedPrompts,
    suffixes: Suffixes,
    vital: Array,
    source: Array,
    values: Array,
) -> _Suffixes:
    """Runs the prompts as they are, and looks up the ablated values [L, S, T, N, H] at the vital tokens."""
    clean = live_cache(config, weights, prompts, suffixes)
    return _Suffixes(clean, suffixes, vital, jax.vmap(partial(_at_vital, vital, source))(values))


@partial(jax.jit, static_argnames=("config", "keep_logits"))
def _suffix_answers(
    config: Config, weights: Params, inputs: _Suffixes, keep: Array, named: Array, *, keep_logits: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Answers [C, B] and logits [C, B, V] of circuits keep [C, L, R, N] that name roles [C, R]."""
    vital, cone = inputs.vital, Cone(config, weights, inputs.clean, inputs.suffixes)
    same = vital[:, :, None] == vital[:, None, :]  # [B, R, R]: roles that are one token
    changed = (jnp.asarray(named)[:, None, :, None] & ~jnp.asarray(keep)).any((0, 2, 3))  # [L]
    start = live_start(config, changed.argmax())

    def one(keep, named):
        named = (same & named).any(-1)[..., None]  # [B, R, 1]
        ablated = named & ~at_tokens(vital, keep)  # [L, B, R, N]
        logits = unembed(config, weights, live_stream(cone, {"z": HeadPatch(ablated, inputs.values)}, start))
        return answers(logits), logits if keep_logits else None

    return jax.vmap(one)(keep, named)


def _at_vital(vital: jax.Array, source: jax.Array, values: jax.Array) -> jax.Array:
    """One layer's values [S, T, N, H] at the vital positions [B, R] of prompts with sources [B, T]: [B, R, N, H]."""
    return values[jnp.take_along_axis(source, vital, axis=1), vital]
