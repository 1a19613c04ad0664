"""The causal cone: computing only what an intervention can reach.

A decoder is causal. A change at layer l and position p reaches nothing below l and nothing left of p; what lies outside
is read from one clean run. This file owns that clean run's cache and the two streams that path patching sends through
the cone. Everything here is exact, and the mathematics of a layer is that of `jaxmech.model`. Functions are written for
one sender and a batch of examples, and vmapped over senders where they are used.

The *frozen* stream is the residual stream at p when every attention output is held at its clean value and only the
MLPs are recomputed: one token per example, no attention. The *live* stream is an ordinary forward pass of the suffix
p, p+1, ..., last, in which queries attend to the clean keys and values of the prefix and to their own.

Suffixes differ in length, so they are *packed*: the suffix tokens of all examples stand one after another on one axis,
and everything that acts on single tokens (norms, projections, MLPs: nearly all the work) runs on that axis without
padding. Attention alone unpacks them.

Axes as in `jaxmech.model`; C counts the packed suffix tokens of all examples, W the tokens of the longest suffix. Layer
bounds are traced, so that one compilation serves every sender layer and every set of receivers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import rope
from jaxmech.config import Config
from jaxmech.model import (
    Params,
    attention_output,
    attention_pattern,
    mix_values,
    mlp_half,
    norm,
    per_query_head,
    project,
)
from jaxmech.shared_prefix import SharedPrompts, observe_prompts

Layer = jax.Array | int  # index of a layer, traced or not


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Suffixes:
    """Where the packed suffix tokens p..last of each example lie."""

    example: jax.Array  # [C] example that a packed token belongs to
    position: jax.Array  # [C] its position in the prompt
    offset: jax.Array  # [C] its index within its suffix
    packed: jax.Array  # [B, W] packed index of each suffix's tokens; behind the last one, that of the last one
    length: jax.Array  # [B] tokens of each suffix

    @classmethod
    def pack(cls, p: np.ndarray, last: np.ndarray, *, capacity: int, width: int) -> "Suffixes":
        """The suffixes from p [B] to last [B], packed and filled up to C = capacity with copies of the first token.

        Args:
          capacity: C, at least the sum of the lengths.
          width: W, at least the largest length.
        """
        length = last - p + 1
        example = np.repeat(np.arange(len(p)), length)
        start = np.cumsum(length) - length
        offset = np.arange(len(example)) - start[example]
        fill = (0, capacity - len(example))
        example, offset = np.pad(example, fill), np.pad(offset, fill)
        packed = start[:, None] + np.minimum(np.arange(width), length[:, None] - 1)
        return cls(*map(jnp.asarray, (example, p[example] + offset, offset, packed, length)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CleanCache:
    """What the cone reads from the clean run. The last two are None where no live stream runs."""

    resid_pre: jax.Array  # [L, C, D], at the suffix tokens
    attn_out: jax.Array  # [L, B, D], at p
    k: jax.Array | None = None  # [L, B, T, K, H], rotated
    v: jax.Array | None = None  # [L, B, T, K, H]


class Change(NamedTuple):
    """What a sender adds to the attention output of its layer at p."""

    layer: jax.Array  # []
    delta: jax.Array  # [B, D]


class Receivers(NamedTuple):
    """Receiver heads, and what they read from the frozen stream at p: q, k or v before RoPE, named by `via`."""

    heads: jax.Array  # [L, N] bool
    inputs: jax.Array  # [L, B, N, H]; layers without receivers hold zeros


def clean_cache(
    config: Config, weights: Params, prompts: SharedPrompts, p: jax.Array, suffixes: Suffixes, *, live: bool
) -> tuple[CleanCache, jax.Array]:
    """Runs clean and corrupt prompts once and keeps what the cone needs.

    Args:
      prompts: the B clean prompts and the B corrupt ones behind them.
      p: int [2B], the sender's position in each.
      live: keep what a live stream needs.

    Returns:
      The cache of the clean prompts, and corrupt - clean of z at p, [L, B, N, H].
    """
    row, count = jnp.arange(len(p)), len(p) // 2

    def observe(sites):
        at_p = {site: sites[site][row, p] for site in ("attn_out", "z")}
        kept = {"attn_out": at_p["attn_out"][:count], "delta_z": at_p["z"][count:] - at_p["z"][:count]}
        kept["resid_pre"] = sites["resid_pre"][suffixes.example, suffixes.position]
        return kept | {site: sites[site][:count] for site in ("k", "v") if live}

    kept = observe_prompts(config, weights, prompts, observe)
    delta_z = kept.pop("delta_z")
    return CleanCache(**kept), delta_z


def frozen_stream(
    config: Config, weights: Params, clean: CleanCache, suffixes: Suffixes, change: Change, start: Layer
) -> jax.Array:
    """resid_post of the last layer at p, [B, D], in the frozen stream of `change`, advanced from layer `start` on."""

    def advance(i, x):
        return _frozen_layer(config, weights, clean, change, i, x)

    x = clean.resid_pre[start, suffixes.packed[:, 0]]
    return jax.lax.fori_loop(start, config.num_layers, advance, x)


def receiver_inputs(
    config: Config,
    weights: Params,
    clean: CleanCache,
    suffixes: Suffixes,
    change: Change,
    receivers: jax.Array,
    via: str,
    start: Layer,
    stop: Layer,
) -> jax.Array:
    """What the `receivers` [L, N] read through `via` at p in the frozen stream of `change`: [L, B, N, H].

    Args:
      start: layer from which the stream is advanced; at most the sender's.
      stop: the last receiver layer.
    """

    def read(i, x, inputs):
        layer = _layer(weights, i)
        read_here = project(config, layer, via, norm(config, layer["attn_norm"], x))
        return inputs.at[i].set(per_query_head(config, read_here))

    def read_if_received(i, x, inputs):
        return jax.lax.cond(receivers[i].any(), read, lambda i, x, inputs: inputs, i, x, inputs)

    def advance(i, carry):
        x, inputs = carry
        return _frozen_layer(config, weights, clean, change, i, x), read_if_received(i, x, inputs)

    x = clean.resid_pre[start, suffixes.packed[:, 0]]
    inputs = jnp.zeros((config.num_layers, len(x), config.num_heads, config.head_dim), x.dtype)
    x, inputs = jax.lax.fori_loop(start, stop, advance, (x, inputs))
    return read_if_received(stop, x, inputs)


def live_stream(
    config: Config,
    weights: Params,
    clean: CleanCache,
    suffixes: Suffixes,
    receivers: Receivers,
    via: str,
    start: Layer,
    stop: Layer,
) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], when the receivers' inputs replace the clean ones at p.

    Args:
      start: layer from which the stream is advanced: at most the first receiver's, and below the last layer.
      stop: the last receiver layer.
    """

    def patched(i, x):
        return _live_layer(config, weights, clean, suffixes, i, x, receivers, via)

    def plain(i, x):
        return _live_layer(config, weights, clean, suffixes, i, x)

    top = config.num_layers - 1
    # The first layer stands outside the loop: its input is the clean stream for every sender, so that under vmap its
    # norms and projections are computed once for all of them.
    x = patched(start, clean.resid_pre[start])
    x = jax.lax.fori_loop(start + 1, jnp.minimum(stop + 1, top), patched, x)
    x = jax.lax.fori_loop(jnp.maximum(start, stop) + 1, top, plain, x)
    return _last_layer(config, weights, clean, suffixes, x, receivers, via)


def _frozen_layer(
    config: Config, weights: Params, clean: CleanCache, change: Change, i: Layer, x: jax.Array
) -> jax.Array:
    """Layer i of the frozen stream x [B, D]: the clean attention output, the change if it is here, and the MLP."""
    attn_out = clean.attn_out[i] + jnp.where(i == change.layer, change.delta, 0)
    return mlp_half(config, _layer(weights, i), x + attn_out)


def _live_layer(
    config: Config,
    weights: Params,
    clean: CleanCache,
    suffixes: Suffixes,
    i: Layer,
    x: jax.Array,
    receivers: Receivers | None = None,
    via: str = "",
) -> jax.Array:
    """Layer i of the live stream x [C, D]."""
    layer = _layer(weights, i)
    normed = norm(config, layer["attn_norm"], x)
    rotation = rope.angles(config, suffixes.position)
    qkv = {site: project(config, layer, site, normed) for site in ("q", "k", "v")}
    if receivers is not None:
        qkv[via] = _patched(config, qkv[via], suffixes.packed[:, 0], receivers, i)
    q, k = (rope.rotate(qkv[site], *rotation)[suffixes.packed] for site in ("q", "k"))  # [B, W, N or K, H]
    token = jnp.arange(q.shape[1])
    causal = token[:, None, None] >= token  # [W, 1, W]
    z = _attend(config, clean, suffixes, i, q, k, qkv["v"][suffixes.packed], causal)
    packed_z = z[suffixes.example, suffixes.offset]  # [C, N, H]
    return mlp_half(config, layer, x + attention_output(config, layer, packed_z))


def _last_layer(
    config: Config,
    weights: Params,
    clean: CleanCache,
    suffixes: Suffixes,
    x: jax.Array,
    receivers: Receivers,
    via: str,
) -> jax.Array:
    """The last layer of the live stream x [C, D] at `last` only, [B, D]; other tokens give their keys and values."""
    i = config.num_layers - 1
    layer = _layer(weights, i)
    last = jnp.take_along_axis(suffixes.packed, suffixes.length[:, None] - 1, axis=1)[:, 0]
    normed = norm(config, layer["attn_norm"], x)
    qkv = {site: project(config, layer, site, normed) for site in ("k", "v")}
    qkv["q"] = project(config, layer, "q", normed[last])  # [B, N, H]
    at_p = suffixes.packed[:, 0]
    if via == "q":
        patched = _patched(config, qkv["q"], jnp.arange(len(last)), receivers, i)
        qkv["q"] = jnp.where((at_p == last)[:, None, None], patched, qkv["q"])
    else:
        qkv[via] = _patched(config, qkv[via], at_p, receivers, i)
    q = rope.rotate(qkv["q"], *rope.angles(config, suffixes.position[last]))[:, None]  # [B, 1, N, H]
    k = rope.rotate(qkv["k"], *rope.angles(config, suffixes.position))[suffixes.packed]
    width = suffixes.packed.shape[1]
    within = jnp.arange(width) < suffixes.length[:, None, None, None]  # [B, 1, 1, W]
    z = _attend(config, clean, suffixes, i, q, k, qkv["v"][suffixes.packed], within)
    return mlp_half(config, layer, x[last] + attention_output(config, layer, z)[:, 0])


def _patched(config: Config, x: jax.Array, at_p: jax.Array, receivers: Receivers, i: Layer) -> jax.Array:
    """q, k or v [C, N or K, H] of layer i with the receivers' inputs at the tokens `at_p` [B]; per query head."""
    x = per_query_head(config, x)
    return x.at[at_p].set(jnp.where(receivers.heads[i][:, None], receivers.inputs[i], x[at_p]))


def _attend(
    config: Config,
    clean: CleanCache,
    suffixes: Suffixes,
    i: Layer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
) -> jax.Array:
    """z [B, T, N, H] of rotated queries q over the clean prefix and the suffix: two blocks of keys, one softmax."""
    assert clean.k is not None and clean.v is not None
    p = suffixes.position[suffixes.packed[:, 0]]
    prefix = jnp.arange(clean.k.shape[2]) < p[:, None, None, None]  # [B, 1, 1, T]
    patterns = attention_pattern(config, q, [(clean.k[i], prefix), (k, allowed)])
    return mix_values(config, list(zip(patterns, (clean.v[i], v), strict=True)))


def _layer(weights: Params, i: Layer) -> Params:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), weights["blocks"])
