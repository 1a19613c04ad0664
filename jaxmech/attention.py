"""Attention: which keys a query sees, the pattern over one or more blocks of keys, and z.

Axes as in `jaxmech.model`. Several blocks under one softmax are what the causal cone needs: a suffix attends to a
prefix that other rows share, and to itself, and nothing is copied.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import jax
import jax.numpy as jnp

from jaxmech.arithmetic import capped, einsum
from jaxmech.config import Config

FORBIDDEN = float(jnp.finfo(jnp.float32).min)
# Values of fewer keys are mixed by sums, no matrix products: GPUs would pad these by copies, and CPUs take many times
# as long. So are scores of fewer queries and keys on GPUs. On TPUs all are products, since their compiler fails at some
# such sums (libtpu 0.0.52), and on CPUs scores are, where it fails at gradients through grouped heads (jaxlib 0.10.2).
FEW_KEYS = 8


def visible(config: Config, layer: jax.Array | int, query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether queries at positions `query` [..., T] may attend to keys at `key` [..., S]: bool [..., 1, T, S].

    Keys behind the query are hidden, and those out of its window in a layer that has one. The 1 stands for the heads.
    """
    distance = (query[..., :, None] - key[..., None, :])[..., None, :, :]
    seen = distance >= 0
    if not config.window:
        return seen
    unlimited = jnp.isin(jnp.asarray(layer), jnp.asarray(config.full_layers, jnp.int32))
    return seen & ((distance < config.window) | unlimited)


def per_query_head(config: Config, x: jax.Array) -> jax.Array:
    """Repeats k or v [..., K, H] for each query head of its group: [..., N, H]. Does nothing if it is so already."""
    return jnp.repeat(x, config.num_heads // x.shape[-2], axis=-2)


def attention_pattern(config: Config, q: jax.Array, keys: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """Attention probabilities of q [..., T, N, H] over one or more blocks of keys, under one softmax.

    Several blocks let a suffix attend to a shared prefix without copying it: prefix and suffix are two blocks. Heads
    stand before queries here, the order in which products over heads come and go, so that nothing is transposed.

    Args:
      q: rotated queries.
      keys: (k, allowed) of each block: rotated keys [..., S, K, H], where K may differ between blocks and divides N;
        and a mask that broadcasts to [..., N, T, S], True where attention is allowed.

    Returns:
      A pattern [..., N, T, S] for each block, in the compute dtype; together they sum to 1 over S.
    """
    scores = [jnp.where(allowed, _scores(config, q, k), FORBIDDEN) for k, allowed in keys]
    largest = reduce(jnp.maximum, (s.max(axis=-1, keepdims=True, initial=FORBIDDEN) for s in scores))
    weights = [jnp.exp(s - jax.lax.stop_gradient(largest)) for s in scores]
    total = reduce(jnp.add, (w.sum(axis=-1, keepdims=True) for w in weights))
    return [(w / total).astype(config.compute_dtype) for w in weights]


def _scores(config: Config, q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled dot products [..., N, T, S] in float32 of q [..., T, N, H] and k [..., S, K, H]."""

    def product(q, k):
        grouped = _grouped(q, k.shape[-2])
        return _all_heads(einsum(config, "...tkgh,...skh->...kgts", grouped, k, out=jnp.float32), q.shape[-2])

    def transposed_product(q, k):
        grouped, k = jnp.moveaxis(_grouped(q, k.shape[-2]), -4, -2), jnp.swapaxes(k, -3, -2)
        return _all_heads(einsum(config, "...kgth,...ksh->...kgts", grouped, k, out=jnp.float32), q.shape[-2])

    def sum_over_head(q, k):
        q, k = q[..., :, None, :, :].astype(jnp.float32), per_query_head(config, k)[..., None, :, :, :]
        return jnp.moveaxis((q * k).sum(-1), -1, -3)  # [..., T, S, N] to [..., N, T, S]

    few = max(q.shape[-3], k.shape[-3]) < FEW_KEYS
    scores = _on_gpu_or_else(sum_over_head if few else transposed_product, product, q, k)
    return capped(config.score_cap, scores * (config.score_scale or config.head_dim**-0.5))


def mix_values(config: Config, blocks: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """z [..., T, N, H]: the values v [..., S, K, H] of each block weighted by its pattern [..., N, T, S]."""
    return reduce(jnp.add, (_mix(config, pattern, v) for pattern, v in blocks))


def _mix(config: Config, pattern: jax.Array, v: jax.Array) -> jax.Array:
    groups = v.shape[-2], pattern.shape[-3] // v.shape[-2]
    grouped = pattern.reshape(*pattern.shape[:-3], *groups, *pattern.shape[-2:])

    def product(weights, v):
        return einsum(config, "...kgts,...skh->...tkgh", weights, v)

    def transposed_product(weights, v):
        return jnp.moveaxis(einsum(config, "...kgts,...ksh->...kgth", weights, jnp.swapaxes(v, -3, -2)), -2, -4)

    def sum_over_keys(weights, v):
        weights = jnp.moveaxis(weights, -2, -4)[..., None]  # [..., T, K, G, S, 1]
        values = v[..., None, :, :, None, :].astype(jnp.float32)  # [..., 1, S, K, 1, H]
        products = (weights[..., s, :] * values[..., s, :, :, :] for s in range(v.shape[-3]))
        return reduce(jnp.add, products).astype(v.dtype)

    if 0 < v.shape[-3] < FEW_KEYS:
        z = jax.lax.platform_dependent(grouped, v, tpu=product, default=sum_over_keys)
    else:
        z = _on_gpu_or_else(transposed_product, product, grouped, v)
    return z.reshape(*z.shape[:-3], pattern.shape[-3], config.head_dim)


def _on_gpu_or_else(on_gpu: Callable[..., jax.Array], other: Callable[..., jax.Array], *x: jax.Array) -> jax.Array:
    """The same of x, as one or the other computes it.

    XLA exchanges the operands of a product for GPUs so that it transposes what comes in and goes out, unless queries
    stand first and H last. For CPUs it does not, and rows of a batch are rounded alike only as they are.
    """
    return jax.lax.platform_dependent(*x, cuda=on_gpu, rocm=on_gpu, default=other)


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """q [..., T, N, H] as [..., T, K, G, H]."""
    return q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def _all_heads(scores: jax.Array, heads: int) -> jax.Array:
    """Scores [..., K, G, T, S] as [..., N, T, S]."""
    return scores.reshape(*scores.shape[:-4], heads, *scores.shape[-2:])
