"""A clean forward pass of prompts that begin alike, in which what they share is computed once.

In the boxes task every box of a scene is queried in turn, and the scenes of corrupt prompts are those of others: most
of the tokens of a batch stand in a few scenes that its prompts share. This pass computes every distinct prefix once,
and for each prompt only what follows it. It is exact, as what follows cannot change what stands before.

Axes as in `jaxmech.model`; R prompts of T tokens are U distinct prefixes of P tokens and R suffixes of T - P.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import rope
from jaxmech.compiled_sizes import few_sizes
from jaxmech.config import Config
from jaxmech.model import (
    Params,
    added,
    attention_input,
    attention_pattern,
    embed,
    heads_output,
    mix_values,
    mlp_half,
    rotated_qkv,
    visible,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedPrompts:
    """Prompts [R, T] as distinct prefixes and what follows them."""

    prefixes: Any  # [U, P] token ids
    owner: Any  # [R] the prefix of each prompt
    suffixes: Any  # [R, T - P] token ids

    @classmethod
    def split(cls, tokens: np.ndarray, length: int, count: int) -> "SharedPrompts":
        """Splits the prompts `tokens` [R, T] after P = `length` tokens; prefixes are filled up to U = `count`."""
        if length == 0:
            return cls(np.zeros((1, 0), np.int32), np.zeros(len(tokens), np.int32), tokens)
        prefixes, owner = np.unique(tokens[:, :length], axis=0, return_inverse=True)
        prefixes = np.pad(prefixes, ((0, count - len(prefixes)), (0, 0)))
        return cls(prefixes, owner.reshape(-1), tokens[:, length:])


def shared_length(batches: Sequence[np.ndarray]) -> tuple[int, int]:
    """P and U for batches of prompts [R, T]: where to split so that the fewest tokens are computed; P = 0 is no split.

    U is the largest number of distinct prefixes of one batch, rounded up. Where sharing saves less than a tenth, P = 0.
    """
    rows, total = batches[0].shape

    def tokens_computed(length: int) -> tuple[int, int]:
        most = max(int(distinct[length]) for distinct in distinct_prefixes) if length else 1
        count = min(few_sizes(most), rows)
        return count * length + rows * (total - length), count

    distinct_prefixes = [_distinct_prefixes(tokens) for tokens in batches]
    costs = [tokens_computed(length) for length in range(total)]
    best = min(range(len(costs)), key=lambda length: costs[length][0])
    return (best, costs[best][1]) if costs[best][0] < 0.9 * costs[0][0] else (0, 1)


def _distinct_prefixes(tokens: np.ndarray) -> np.ndarray:
    """How many distinct prefixes of 0, 1, .., T - 1 tokens the prompts [R, T] have: [T]."""
    ordered = tokens[np.lexsort(tokens.T[::-1])]
    differs = ordered[1:] != ordered[:-1]
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), tokens.shape[1])  # where neighbours part
    return 1 + (first[:, None] < np.arange(tokens.shape[1])).sum(axis=0)


def observe_prompts(
    config: Config, params: Params, prompts: SharedPrompts, observe: Callable[[dict[str, jax.Array]], Any]
) -> Any:
    """What `observe` keeps of every layer, stacked over layers.

    Args:
      observe: a function from a layer's {site: activation [R, T, ...]}, for the sites resid_pre, k (rotated), v, z and
        heads_out (see `jaxmech.model.heads_output`), k and v per kv head, to what is kept of it.
    """
    length, total = prompts.prefixes.shape[1], prompts.prefixes.shape[1] + prompts.suffixes.shape[1]
    at_prefix, at_suffix = jnp.arange(length), jnp.arange(length, total)

    def layer(streams, index_and_weights):
        (prefix, suffix), (index, weights) = streams, index_and_weights
        prefix, before = _layer(config, index, weights, prefix, at_prefix, [])
        shared = [(before["k"][prompts.owner], before["v"][prompts.owner], at_prefix)]
        suffix, after = _layer(config, index, weights, suffix, at_suffix, shared)
        return (prefix, suffix), observe(
            {site: jnp.concatenate([x[prompts.owner], after[site]], axis=1) for site, x in before.items()}
        )

    streams = embed(config, params, prompts.prefixes), embed(config, params, prompts.suffixes)
    return jax.lax.scan(layer, streams, (jnp.arange(config.num_layers), params["blocks"]))[1]


def _layer(
    config: Config,
    index: jax.Array,
    weights: Params,
    x: jax.Array,
    position: jax.Array,
    before: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Layer `index` on x [R, T, D] at `position` [T] that also attends to the (k, v, position) `before`; its sites."""
    rotation = rope.of_layer(config, index, rope.rotations(config, position))
    q, k, v = rotated_qkv(config, weights, attention_input(config, weights, x), rotation)
    blocks = [*before, (k, v, position)]
    patterns = attention_pattern(config, q, [(keys, visible(config, index, position, at)) for keys, _, at in blocks])
    z = mix_values(config, [(pattern, values) for pattern, (_, values, _) in zip(patterns, blocks, strict=True)])
    heads_out = heads_output(config, weights, z)
    sites = {"resid_pre": x, "k": k, "v": v, "z": z, "heads_out": heads_out}
    return mlp_half(config, weights, x + added(config, weights, "attn", heads_out)), sites
