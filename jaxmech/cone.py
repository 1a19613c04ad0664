"""The causal cone: computing only what an intervention can reach.

A decoder is causal. A change at layer l and position p reaches nothing below l and nothing left of p; what lies outside
is read from one clean run. This file owns that clean run's cache and the layers of the two streams that path patching
sends through the cone. Everything here is exact, written for one example, and vmapped where it is used; the
mathematics of a layer is that of `jaxmech.model`.

The *frozen* stream is the residual stream at p when every attention output is held at its clean value and only the
MLPs are recomputed: one token, no attention. The *live* stream is an ordinary forward pass of the suffix p, p+1, ... in
which queries attend to the clean keys and values of the prefix and to their own.

Axes as in `jaxmech.model`; W counts the tokens of the suffix (the same for every example, the longest suffix; what
stands behind an example's last token is never attended to by what stands before).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxmech import rope
from jaxmech.config import Config
from jaxmech.model import (
    Params,
    attention_output,
    attention_pattern,
    forward,
    mix_values,
    mlp,
    norm,
    per_query_head,
    project,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CleanCache:
    """What the cone reads from the clean run. The last three are None where no live stream runs."""

    resid_mid: jax.Array  # [L, B, D], at p
    attn_out: jax.Array  # [L, B, D], at p
    z: jax.Array  # [L, B, N, H], at p
    resid_pre: jax.Array | None = None  # [L, B, W, D], from p on
    k: jax.Array | None = None  # [L, B, T, K, H], rotated
    v: jax.Array | None = None  # [L, B, T, K, H]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Suffix:
    """Where an example's suffix lies; with a leading axis B before vmap."""

    cos: jax.Array  # [W, H/2]
    sin: jax.Array  # [W, H/2]
    prefix: jax.Array  # [T] bool: keys left of p
    last: jax.Array  # [] index of the prompt's last token within the suffix


def clean_cache(config: Config, weights: Params, tokens: jax.Array, p: jax.Array, width: int | None) -> CleanCache:
    """Runs the clean prompts once and keeps what the cone of position p needs.

    Args:
      tokens: int [B, T].
      p: int [B], the sender's position.
      width: W, number of suffix tokens for the live stream; None if only the frozen stream runs.
    """
    example = jnp.arange(len(p))
    rotation = rope.angles(config, jnp.arange(tokens.shape[1]))

    def observe(sites):
        kept = {site: sites[site][example, p] for site in ("resid_mid", "attn_out", "z")}
        if width is not None:
            window = jnp.minimum(p[:, None] + jnp.arange(width), tokens.shape[1] - 1)  # [B, W]
            kept["resid_pre"] = sites["resid_pre"][example[:, None], window]
            kept |= {"k": rope.rotate(sites["k"], *rotation), "v": sites["v"]}
        return kept

    _, kept = forward(config, weights, tokens, observe=observe, logits_at=p)
    return CleanCache(**kept)


def z_at(config: Config, weights: Params, tokens: jax.Array, p: jax.Array) -> jax.Array:
    """z [L, B, N, H] of the prompts `tokens` [B, T] at position p [B]."""
    example = jnp.arange(len(p))
    return forward(config, weights, tokens, observe=lambda sites: sites["z"][example, p], logits_at=p)[1]


def suffixes(config: Config, p: jax.Array, last: jax.Array, length: int, width: int) -> Suffix:
    """The suffix of each example, fields with leading axis B, from p [B] and last [B] in prompts of T = length."""
    cos, sin = rope.angles(config, p[:, None] + jnp.arange(width))
    return Suffix(cos, sin, prefix=jnp.arange(length) < p[:, None], last=last - p)


def frozen_layer(config: Config, weights: Params, x: jax.Array, attn_out: jax.Array) -> jax.Array:
    """One layer of the frozen stream x [D]: the clean attention output [D], then the MLP."""
    return mlp_half(config, weights, x + attn_out)


def mlp_half(config: Config, weights: Params, x: jax.Array) -> jax.Array:
    """The second half of a layer: resid_mid [..., D] to resid_post [..., D]."""
    return x + mlp(config, weights, norm(config, weights["mlp_norm"], x))


def live_layer(
    config: Config, weights: Params, x: jax.Array, prefix: tuple[jax.Array, jax.Array], suffix: Suffix
) -> jax.Array:
    """One layer of the live stream x [W, D]; `prefix` is the clean (k, v), each [T, K, H]."""
    normed = norm(config, weights["attn_norm"], x)
    qkv = {site: project(config, weights, site, normed) for site in ("q", "k", "v")}
    return mlp_half(config, weights, x + _suffix_attention(config, weights, qkv, prefix, suffix))


def twin_layer(
    config: Config,
    weights: Params,
    x: jax.Array,
    attn_out: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    suffix: Suffix,
    receivers: jax.Array,
    via: str,
) -> jax.Array:
    """One layer of both streams at once, x [1 + W, D]: the frozen token first, then the live suffix.

    At p the receivers' q, k or v (named by `via`; bool `receivers` [N], per query head) is taken from the frozen stream
    and put in place of the live stream's own. Both streams share the matrix products.
    """
    normed = norm(config, weights["attn_norm"], x)
    qkv = {site: project(config, weights, site, normed if site == via else normed[1:]) for site in ("q", "k", "v")}
    both = per_query_head(config, qkv[via])  # [1 + W, N, H]
    qkv[via] = both[1:].at[0].set(jnp.where(receivers[:, None], both[0], both[1]))
    live = _suffix_attention(config, weights, qkv, prefix, suffix)
    return mlp_half(config, weights, x + jnp.concatenate([attn_out[None], live]))


def _suffix_attention(config: Config, weights: Params, qkv: dict, prefix: tuple, suffix: Suffix) -> jax.Array:
    """attn_out [W, D] of the suffix: prefix and suffix are two blocks of keys under one softmax."""
    q, k = (rope.rotate(qkv[site], suffix.cos, suffix.sin) for site in ("q", "k"))
    token = jnp.arange(q.shape[0])
    causal = token[:, None, None] >= token  # [W, 1, W]
    patterns = attention_pattern(config, q, [(prefix[0], suffix.prefix), (k, causal)])
    z = mix_values(config, list(zip(patterns, (prefix[1], qkv["v"]), strict=True)))
    return attention_output(config, weights, z)
