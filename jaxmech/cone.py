"""The causal cone: computing only what an intervention can reach.

A decoder is causal. A change at layer l and position p reaches nothing below l and nothing left of p; what lies outside
is read from one clean run. This file owns that clean run's cache and the two streams that run through the cone.
Everything here is exact, and the mathematics of a layer is that of `jaxmech.model`. Functions are written for one
sender (or mask, or start layer) and a batch of examples, and vmapped where they are used.

Each example has one or more tokens p that are patched, which may be the same. The *frozen* stream is the residual
stream at p when every attention output is held at its clean value and only the MLPs are recomputed: no other token, no
attention. The *live* stream is an ordinary forward pass of the suffix from the first p to the last token, in which
queries attend to the clean keys and values of the prefix and to their own. Path patching sends both through the cone;
DCM, sweeps of cross-model patching and of knockouts the live one alone.

Suffixes are packed, see `jaxmech.suffixes`, whose axes this file shares. Layer bounds may be traced, so that one
compilation serves every sender layer and every set of receivers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmech import rope
from jaxmech.attention import attention_pattern, mix_values, per_query_head, visible
from jaxmech.config import Config
from jaxmech.interventions import mixed
from jaxmech.model import Params, added, attention_input, attention_output, layer_weights, mlp_half, project
from jaxmech.shared_prefix import SharedPrompts, Sites, observe_prompts
from jaxmech.suffixes import Bucket, Suffixes

Layer = jax.Array | int  # index of a layer, traced or not


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CleanCache:
    """What the cone reads from the clean run, in layers from `first_layer` on; None is what no stream reads."""

    resid_pre: jax.Array  # [L, C, D], at the suffix tokens
    heads_out: jax.Array | None = None  # [L, B, R, D], the sum of all heads at p, for a frozen stream
    k: jax.Array | None = None  # [L, B, K, T, H], rotated, for a live stream; heads first, as products over them want
    v: jax.Array | None = None  # [L, B, K, T, H]
    first_layer: int = field(default=0, metadata={"static": True})  # that of the first entries, also of a `HeadPatch`


class Cone(NamedTuple):
    """What the streams of a batch of examples run through."""

    config: Config
    weights: Params
    clean: CleanCache
    suffixes: Suffixes


class Change(NamedTuple):
    """What a sender adds to the sum of the heads of its layer at p (`jaxmech.model.heads_output`)."""

    layer: jax.Array  # []
    delta: jax.Array  # [B, R, D]


class HeadPatch(NamedTuple):
    """Other values for heads' q, k, v (before RoPE, per query head) or z at p; see `jaxmech.interventions.Patch`."""

    weight: jax.Array  # [L, N], or [L, 1, N], [L, R, N] or [L, B, R, N], bool or float
    value: jax.Array  # [L, B, R, N, H]


Patches = Mapping[str, HeadPatch]  # by site: q, k, v or z


class Knockout(NamedTuple):
    """Forbids the queries at p to attend to tokens before them, in the layers from `start` to before `stop`."""

    keys: jax.Array  # [B, T] bool, the tokens
    start: Layer
    stop: Layer


def clean_cache(
    config: Config, weights: Params, prompts: SharedPrompts, p: jax.Array, suffixes: Suffixes, *, live: bool
) -> tuple[CleanCache, jax.Array]:
    """Runs clean and corrupt prompts once and keeps what the cone needs.

    Args:
      prompts: the B clean prompts and the B corrupt ones behind them.
      p: int [2B, R], the sender's tokens in each.
      live: keep what a live stream needs.

    Returns:
      The cache of the clean prompts, and corrupt - clean of z at p, [L, B, R, N, H].
    """
    row, count = jnp.arange(len(p))[:, None], len(p) // 2

    def observe(sites):
        z = sites.at("z", row, p)
        kept = {"heads_out": sites.at("heads_out", row[:count], p[:count]), "delta_z": z[count:] - z[:count]}
        kept["resid_pre"] = sites.at("resid_pre", suffixes.example, suffixes.position)
        return kept | (keys_and_values(sites, count) if live else {})

    kept = observe_prompts(config, weights, prompts, observe)
    delta_z = kept.pop("delta_z")
    return CleanCache(**kept), delta_z


def live_cache(config: Config, weights: Params, prompts: SharedPrompts, suffixes: Suffixes) -> CleanCache:
    """Runs the B clean prompts once and keeps what a live stream needs."""

    def observe(sites):
        return keys_and_values(sites) | {"resid_pre": sites.at("resid_pre", suffixes.example, suffixes.position)}

    return CleanCache(**observe_prompts(config, weights, prompts, observe))


def keys_and_values(sites: Sites, count: int | None = None) -> dict[str, jax.Array]:
    """Those of the first `count` prompts or of all, as `CleanCache` has them."""
    return {to: jnp.swapaxes(sites.whole(site, count), 1, 2) for to, site in (("k", "rotated_k"), ("v", "v"))}


def live_start(config: Config, layer: Layer) -> Layer:
    """Where a live stream starts whose first patched layer is `layer`: there, but below the last if there are more."""
    top = max(0, config.num_layers - 2)
    return min(layer, top) if isinstance(layer, int) else jnp.minimum(layer, top)


def frozen_stream(cone: Cone, change: Change, start: Layer) -> jax.Array:
    """resid_post of the last layer at p, [B, R, D], in the frozen stream of `change`, advanced from layer `start`."""

    def advance(i, x):
        return _frozen_layer(cone, change, i, x)

    x = cone.clean.resid_pre[start, cone.suffixes.at_p]
    return jax.lax.fori_loop(start, cone.config.num_layers, advance, x)


def receiver_inputs(cone: Cone, change: Change, receivers: jax.Array, via: str, start: Layer, stop: Layer) -> jax.Array:
    """What the `receivers` [L, N] read through `via` at p in the frozen stream of `change`: [L, B, R, N, H].

    Args:
      start: layer from which the stream is advanced; at most the sender's.
      stop: the last receiver layer.
    """
    config = cone.config

    def read(i, x, inputs):
        layer = layer_weights(cone.weights, i)
        read_here = project(config, layer, via, attention_input(config, layer, x))
        return inputs.at[i].set(per_query_head(config, read_here))

    def read_if_received(i, x, inputs):
        return jax.lax.cond(receivers[i].any(), read, lambda i, x, inputs: inputs, i, x, inputs)

    def advance(i, carry):
        x, inputs = carry
        return _frozen_layer(cone, change, i, x), read_if_received(i, x, inputs)

    x = cone.clean.resid_pre[start, cone.suffixes.at_p]
    inputs = jnp.zeros((config.num_layers, *x.shape[:2], config.num_heads, config.head_dim), x.dtype)
    x, inputs = jax.lax.fori_loop(start, stop, advance, (x, inputs))
    return read_if_received(stop, x, inputs)


def live_stream(
    cone: Cone, patches: Patches, start: Layer, stop: Layer | None = None, knockout: Knockout | None = None
) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], of a clean run that is patched in its suffixes.

    Args:
      start: layer from which the stream is advanced, see `live_start`; at most the first that is patched.
      stop: the last patched layer; None: the model's, and then, if `start` is static, the stream can be differentiated.
      knockout: attention to forbid.
    """

    # Only a layer's input is kept for the backward pass. What else it would keep are slices of the weights, which
    # together are a copy of the model.
    @jax.checkpoint
    def patched(i, x):
        return _live_layer(cone, i, x, patches, knockout)

    def plain(i, x):
        return _live_layer(cone, i, x, {}, knockout)

    top = cone.config.num_layers - 1
    x = cone.clean.resid_pre[start - cone.clean.first_layer]
    if top > 0:
        # The first layer stands outside the loop: its input is the clean stream for every sender, so that under vmap
        # its norms and projections are computed once for all of them.
        x = patched(start, x)
        x = jax.lax.fori_loop(start + 1, top if stop is None else jnp.minimum(stop + 1, top), patched, x)
        if stop is not None:
            x = jax.lax.fori_loop(jnp.maximum(start, stop) + 1, top, plain, x)
    return _last_layer(cone, x, patches, knockout)


def _frozen_layer(cone: Cone, change: Change, i: Layer, x: jax.Array) -> jax.Array:
    """Layer i of the frozen stream x [B, R, D]: the clean attention output, the change if it is here, and the MLP."""
    assert cone.clean.heads_out is not None
    config, layer = cone.config, layer_weights(cone.weights, i)
    heads_out = cone.clean.heads_out[i] + jnp.where(i == change.layer, change.delta, 0)
    return mlp_half(config, layer, x + added(config, layer, "attn", heads_out))


def _live_layer(cone: Cone, i: Layer, x: jax.Array, patches: Patches, knockout: Knockout | None) -> jax.Array:
    """Layer i of the live stream x [C, D]."""
    config, suffixes, layer = cone.config, cone.suffixes, layer_weights(cone.weights, i)
    normed = attention_input(config, layer, x)
    rotation = rope.of_layer(config, i, rope.rotations(config, suffixes.position))

    def site(name: str, activation: jax.Array) -> jax.Array:
        return _patched(cone, i, patches.get(name), activation)

    q, k, v = (site(name, project(config, layer, name, normed)) for name in ("q", "k", "v"))
    q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
    z = []
    for bucket in suffixes.buckets:
        token = jnp.arange(bucket.span.width)
        causal = token[:, None] >= token  # [W, W]
        at_p = (token[:, None] == bucket.patched[:, None]).any(-1)[:, None, :, None]  # [b, 1, W, 1]
        queries = _Queries(q[bucket.packed], bucket.position[:, None] + token, causal, at_p)
        z.append(_attend(cone, bucket, i, queries, k, v, knockout))
    unpacked = jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in z])
    z = site("z", unpacked[suffixes.unpacked])
    return mlp_half(config, layer, x + attention_output(config, layer, z))


def _last_layer(cone: Cone, x: jax.Array, patches: Patches, knockout: Knockout | None) -> jax.Array:
    """The last layer of the live stream x [C, D] at `last` only, [B, D]; other tokens give their keys and values."""
    config, suffixes, i = cone.config, cone.suffixes, cone.config.num_layers - 1
    layer = layer_weights(cone.weights, i)

    def rotated(activation: jax.Array, position: jax.Array) -> jax.Array:
        return rope.rotate(activation, rope.of_layer(config, i, rope.rotations(config, position)))

    normed = attention_input(config, layer, x)

    def site(name: str, activation: jax.Array) -> jax.Array:
        """Patches k or v of all suffix tokens, q or z [B, N, H] of `last` where that is p."""
        patch = patches.get(name)
        if patch is None or name in ("k", "v"):
            return _patched(cone, i, patch, activation)
        new = _mixed(patch, i - cone.clean.first_layer, activation[:, None])  # [B, R, N, H]
        for r, at_p in enumerate(suffixes.at_p.T):
            activation = jnp.where((at_p == suffixes.at_last)[:, None, None], new[:, r], activation)
        return activation

    k, v = (site(name, project(config, layer, name, normed)) for name in ("k", "v"))
    q = site("q", project(config, layer, "q", normed[suffixes.at_last]))  # [B, N, H]
    q = rotated(q, suffixes.position[suffixes.at_last])[:, None]  # [B, 1, N, H]
    k = rotated(k, suffixes.position)
    z = []
    for bucket in suffixes.buckets:
        within = jnp.arange(bucket.span.width) < bucket.length[:, None, None, None]  # [b, 1, 1, W]
        at_p = (bucket.length[:, None] == bucket.patched + 1).any(-1)[:, None, None, None]  # whether `last` is one
        position = (bucket.position + bucket.length - 1)[:, None]
        queries = _Queries(q[bucket.span.start : bucket.span.stop], position, within, at_p)
        z.append(_attend(cone, bucket, i, queries, k, v, knockout))
    attn_out = attention_output(config, layer, site("z", jnp.concatenate(z)[:, 0]))
    return mlp_half(config, layer, x[suffixes.at_last] + attn_out)


def _patched(cone: Cone, i: Layer, patch: HeadPatch | None, activation: jax.Array) -> jax.Array:
    """Layer i's q, k, v or z [C, N, H] of the packed tokens, patched at p."""
    if patch is None:
        return activation
    activation, at_p = per_query_head(cone.config, activation), cone.suffixes.at_p
    new = _mixed(patch, i - cone.clean.first_layer, activation[at_p])
    return activation.at[at_p].set(new)


def _mixed(patch: HeadPatch, entry: Layer, old: jax.Array) -> jax.Array:
    """The activations `old` [B, R, N, H] of one layer, that entry of the patch, with the patch's values."""
    return mixed(old, jnp.asarray(patch.weight)[entry][..., None], patch.value[entry])


class _Queries(NamedTuple):
    """The queries of one bucket."""

    q: jax.Array  # [b, T, N, H], rotated
    position: jax.Array  # [b, T]
    allowed: jax.Array  # suffix tokens that each may attend to, broadcastable to [b, N, T, W]
    at_p: jax.Array  # which are at p, where a knockout acts; broadcastable to [b, N, T, P]


def _attend(
    cone: Cone,
    bucket: Bucket,
    i: Layer,
    queries: _Queries,
    k: jax.Array,
    v: jax.Array,
    knockout: Knockout | None,
) -> jax.Array:
    """z [b, T, N, H] of one bucket's queries over its clean prefixes and its suffixes, under one softmax.

    Args:
      k, v: of all packed suffix tokens, [C, K or N, H].
    """
    config, clean = cone.config, cone.clean
    assert clean.k is not None and clean.v is not None
    span, entry = bucket.span, i - clean.first_layer
    of_bucket = slice(span.start, span.stop), slice(None), slice(span.prefix)
    prefix_k, prefix_v = (jnp.swapaxes(x[entry][of_bucket], 1, 2) for x in (clean.k, clean.v))  # [b, P, K, H]
    token, allowed = jnp.arange(span.prefix), queries.allowed
    prefix = token < bucket.position[:, None, None, None]  # [b, 1, 1, P]
    if config.window:
        prefix &= visible(config, i, queries.position, token)
        allowed &= visible(config, i, queries.position, bucket.position[:, None] + jnp.arange(span.width))
    if knockout is not None:
        of = queries.at_p & (i >= knockout.start) & (i < knockout.stop)
        keys = knockout.keys[span.start : span.stop]
        prefix &= ~(keys[:, None, None, : span.prefix] & of)
        if bucket.patched.shape[1] > 1:  # of several, the later ones have earlier tokens in the suffix
            own = bucket.position[:, None] + jnp.arange(span.width)
            within = jnp.take_along_axis(keys, jnp.minimum(own, keys.shape[1] - 1), axis=1)
            before = own[:, None, None] < queries.position[:, None, :, None]  # [b, 1, T, W]
            allowed &= ~(within[:, None, None] & before & of)
    patterns = attention_pattern(config, queries.q, [(prefix_k, prefix), (k[bucket.packed], allowed)])
    return mix_values(config, list(zip(patterns, (prefix_v, v[bucket.packed]), strict=True)))
