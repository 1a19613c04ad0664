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
padding. Attention alone unpacks them, in *buckets* of examples with suffixes of similar length, whose padding is small.

Axes as in `jaxmech.model`; C counts the packed suffix tokens of all examples; in a bucket, b counts its examples, W the
tokens of its longest suffix and P those of its longest prefix. Layer bounds are traced, so that one compilation serves
every sender layer and every set of receivers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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


class Span(NamedTuple):
    """The extent of a bucket of neighbouring examples."""

    start: int  # its first example
    stop: int  # behind its last one
    width: int  # W, at least its longest suffix
    prefix: int  # P, at least its longest prefix, and not 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bucket:
    """Neighbouring examples that attend together."""

    packed: jax.Array  # [b, W] packed index of each suffix's tokens; behind the last one, that of the last one
    position: jax.Array  # [b] p of each
    length: jax.Array  # [b] tokens of each suffix
    span: Span = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Suffixes:
    """Where the packed suffix tokens p..last of each example lie."""

    example: jax.Array  # [C] example that a packed token belongs to
    position: jax.Array  # [C] its position in the prompt
    unpacked: jax.Array  # [C] its index among the unpacked tokens of all buckets, [b, W] of each one behind another
    first: jax.Array  # [B] packed index of each example's p
    last: jax.Array  # [B] and of its last token
    buckets: tuple[Bucket, ...]

    @classmethod
    def pack(cls, p: np.ndarray, last: np.ndarray, *, capacity: int, spans: Sequence[Span]) -> "Suffixes":
        """The suffixes from p [B] to last [B], packed and filled up to C = capacity with copies of the first token.

        Args:
          capacity: C, at least the sum of the lengths.
          spans: the buckets; together all examples, in order.
        """
        length = last - p + 1
        example = np.repeat(np.arange(len(p)), length)
        first = np.cumsum(length) - length
        offset = np.arange(len(example)) - first[example]
        sizes = [(span.stop - span.start) * span.width for span in spans]
        row = np.concatenate(
            [sum(sizes[:i]) + np.arange(s.stop - s.start) * s.width for i, s in enumerate(spans)]
        )  # [B] index of each example's first unpacked token
        fill = (0, capacity - len(example))
        example, offset = np.pad(example, fill), np.pad(offset, fill)
        buckets = []
        for span in spans:
            of = slice(span.start, span.stop)
            packed = first[of, None] + np.minimum(np.arange(span.width), length[of, None] - 1)
            buckets.append(Bucket(jnp.asarray(packed), jnp.asarray(p[of]), jnp.asarray(length[of]), span))
        return cls(
            example=jnp.asarray(example),
            position=jnp.asarray(p[example] + offset),
            unpacked=jnp.asarray(row[example] + offset),
            first=jnp.asarray(first),
            last=jnp.asarray(first + length - 1),
            buckets=tuple(buckets),
        )


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

    x = clean.resid_pre[start, suffixes.first]
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

    x = clean.resid_pre[start, suffixes.first]
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
        qkv[via] = _patched(config, qkv[via], suffixes.first, receivers, i)
    q, k = (rope.rotate(qkv[site], *rotation) for site in ("q", "k"))
    z = []
    for bucket in suffixes.buckets:
        token = jnp.arange(bucket.span.width)
        causal = token[:, None] >= token  # [W, W]
        z.append(_attend(config, clean, bucket, i, q[bucket.packed], k, qkv["v"], causal))
    unpacked = jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in z])
    return mlp_half(config, layer, x + attention_output(config, layer, unpacked[suffixes.unpacked]))


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
    normed = norm(config, layer["attn_norm"], x)
    qkv = {site: project(config, layer, site, normed) for site in ("k", "v")}
    qkv["q"] = project(config, layer, "q", normed[suffixes.last])  # [B, N, H]
    if via == "q":
        patched = _patched(config, qkv["q"], jnp.arange(len(suffixes.last)), receivers, i)
        qkv["q"] = jnp.where((suffixes.first == suffixes.last)[:, None, None], patched, qkv["q"])
    else:
        qkv[via] = _patched(config, qkv[via], suffixes.first, receivers, i)
    q = rope.rotate(qkv["q"], *rope.angles(config, suffixes.position[suffixes.last]))[:, None]  # [B, 1, N, H]
    k = rope.rotate(qkv["k"], *rope.angles(config, suffixes.position))
    z = []
    for bucket in suffixes.buckets:
        within = jnp.arange(bucket.span.width) < bucket.length[:, None, None, None]  # [b, 1, 1, W]
        queries = q[bucket.span.start : bucket.span.stop]
        z.append(_attend(config, clean, bucket, i, queries, k, qkv["v"], within))
    attn_out = attention_output(config, layer, jnp.concatenate(z))[:, 0]
    return mlp_half(config, layer, x[suffixes.last] + attn_out)


def _patched(config: Config, x: jax.Array, at_p: jax.Array, receivers: Receivers, i: Layer) -> jax.Array:
    """q, k or v [C, N or K, H] of layer i with the receivers' inputs at the tokens `at_p` [B]; per query head."""
    x = per_query_head(config, x)
    return x.at[at_p].set(jnp.where(receivers.heads[i][:, None], receivers.inputs[i], x[at_p]))


def _attend(
    config: Config,
    clean: CleanCache,
    bucket: Bucket,
    i: Layer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
) -> jax.Array:
    """z [b, T, N, H] of one bucket's rotated queries q over its clean prefixes and its suffixes, under one softmax.

    Args:
      k, v: of all packed suffix tokens, [C, K or N, H].
      allowed: suffix tokens that each query may attend to, broadcastable to [b, N, T, W].
    """
    assert clean.k is not None and clean.v is not None
    span = bucket.span
    prefix_k, prefix_v = (x[i, span.start : span.stop, : span.prefix] for x in (clean.k, clean.v))
    prefix = jnp.arange(span.prefix) < bucket.position[:, None, None, None]  # [b, 1, 1, P]
    patterns = attention_pattern(config, q, [(prefix_k, prefix), (k[bucket.packed], allowed)])
    return mix_values(config, list(zip(patterns, (prefix_v, v[bucket.packed]), strict=True)))


def _layer(weights: Params, i: Layer) -> Params:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), weights["blocks"])
