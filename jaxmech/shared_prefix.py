"""A forward pass of prompts that begin alike, in which what they share is computed once.

In the boxes task every box of a scene is queried in turn, and the scenes of corrupt prompts are those of others: most
of the tokens of a batch stand in a few scenes that its prompts share. This pass computes every distinct prefix once,
and for each prompt only what follows it, which may be patched. It is exact, as what follows cannot change what stands
before.

Axes as in `jaxmech.model`; R prompts of T tokens are U distinct prefixes of P tokens and R suffixes of T - P.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import rope
from jaxmech.attention import attention_pattern, mix_values, per_query_head, visible
from jaxmech.compiled_sizes import few_sizes
from jaxmech.config import Config
from jaxmech.interventions import Patch, apply_patch
from jaxmech.model import Params, added, attention_input, embed, heads_output, mlp_half, project


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


def shared_length(batches: Sequence[np.ndarray], most: int | None = None) -> tuple[int, int]:
    """P and U for batches of prompts [R, T]: where to split so that the fewest tokens are computed; P = 0 is no split.

    U is the largest number of distinct prefixes of one batch, rounded up. Where sharing saves less than a tenth, P = 0.

    Args:
      most: P is no larger.
    """
    rows, total = batches[0].shape

    def tokens_computed(length: int) -> tuple[int, int]:
        most = max(int(distinct[length]) for distinct in distinct_prefixes) if length else 1
        count = min(few_sizes(most), rows)
        return count * length + rows * (total - length), count

    distinct_prefixes = [_distinct_prefixes(tokens) for tokens in batches]
    costs = [tokens_computed(length) for length in range(total if most is None else min(total, most + 1))]
    best = min(range(len(costs)), key=lambda length: costs[length][0])
    return (best, costs[best][1]) if costs[best][0] < 0.9 * costs[0][0] else (0, 1)


def splitter(
    tokens: np.ndarray, parts: Sequence[np.ndarray], pieces: int, most: int | None = None
) -> Callable[[np.ndarray], SharedPrompts]:
    """A function from one of the `parts`, rows of the prompts `tokens` [B, T], to these prompts, split.

    All parts are split alike, each in so many `pieces` of equal size: [pieces, ...] of every array. `most` as in
    `shared_length`.
    """

    def cut(rows: np.ndarray) -> np.ndarray:
        return tokens[rows.reshape(pieces, -1)]

    split = shared_length([piece for rows in parts for piece in cut(rows)], most)
    return lambda rows: jax.tree.map(lambda *x: np.stack(x), *(SharedPrompts.split(x, *split) for x in cut(rows)))


def _distinct_prefixes(tokens: np.ndarray) -> np.ndarray:
    """How many distinct prefixes of 0, 1, .., T - 1 tokens the prompts [R, T] have: [T]."""
    ordered = tokens[np.lexsort(tokens.T[::-1])]
    differs = ordered[1:] != ordered[:-1]
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), tokens.shape[1])  # where neighbours part
    return 1 + (first[:, None] < np.arange(tokens.shape[1])).sum(axis=0)


class Sites(NamedTuple):
    """A layer's activations by site: resid_pre, q, k and v (before RoPE), rotated_k, z and heads_out."""

    prefixes: dict[str, jax.Array]  # [U, P, ...]
    suffixes: dict[str, jax.Array]  # [R, T - P, ...]
    owner: jax.Array  # [R]

    def whole(self, site: str, count: int | None = None) -> jax.Array:
        """Of all tokens of the first `count` prompts, or of all prompts: [R, T, ...]."""
        owner, suffixes = self.owner[:count], self.suffixes[site][:count]
        return jnp.concatenate([self.prefixes[site][owner], suffixes], axis=1)

    def at(self, site: str, prompt: jax.Array, position: jax.Array) -> jax.Array:
        """Of some tokens: those at `position` of each `prompt`, which broadcast."""
        prefixes, suffixes = self.prefixes[site], self.suffixes[site]
        length = prefixes.shape[1]
        after = suffixes[prompt, jnp.maximum(position - length, 0)]
        if length == 0:
            return after
        before = prefixes[self.owner[prompt], jnp.minimum(position, length - 1)]
        in_prefix = (position < length).reshape(*position.shape, *(1,) * (after.ndim - position.ndim))
        return jnp.where(in_prefix, before, after)


def observe_prompts(config: Config, params: Params, prompts: SharedPrompts, observe: Callable[[Sites], Any]) -> Any:
    """What `observe` keeps of every layer's sites, stacked over layers."""
    return _run(config, params, prompts, {}, observe)[1]


def patched_prompts(
    config: Config, params: Params, prompts: SharedPrompts, patches: Mapping[str, Patch], at: jax.Array
) -> jax.Array:
    """resid_post of the last layer at the tokens `at` [R] of prompts that are patched behind their prefixes: [R, D].

    Args:
      patches: by site, "q", "k", "v" (per query head) or "z", at positions in the prompts. Neither these nor `at` are
        in a prefix.
    """
    length = prompts.prefixes.shape[1]
    behind = {site: replace(patch, positions=patch.positions - length) for site, patch in patches.items()}
    x, _ = _run(config, params, prompts, behind, lambda sites: None)
    return x[jnp.arange(len(x)), at - length]


def _run(
    config: Config,
    params: Params,
    prompts: SharedPrompts,
    patches: Mapping[str, Patch],
    observe: Callable[[Sites], Any],
) -> tuple[jax.Array, Any]:
    """resid_post of the last layer of the suffixes, [R, T - P, D], and what is observed; patches are of suffixes."""
    length, total = prompts.prefixes.shape[1], prompts.prefixes.shape[1] + prompts.suffixes.shape[1]
    at_prefix, at_suffix = jnp.arange(length), jnp.arange(length, total)

    def layer(streams, index_and_weights):
        (prefix, suffix), (index, weights) = streams, index_and_weights
        prefix, before = _layer(config, index, weights, prefix, at_prefix, [], {})
        shared = [(before["rotated_k"][prompts.owner], before["v"][prompts.owner], at_prefix)]
        suffix, after = _layer(config, index, weights, suffix, at_suffix, shared, patches)
        return (prefix, suffix), observe(Sites(before, after, prompts.owner))

    streams = embed(config, params, prompts.prefixes), embed(config, params, prompts.suffixes)
    (_, x), observed = jax.lax.scan(layer, streams, (jnp.arange(config.num_layers), params["blocks"]))
    return x, observed


def _layer(
    config: Config,
    index: jax.Array,
    weights: Params,
    x: jax.Array,
    position: jax.Array,
    before: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    patches: Mapping[str, Patch],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Layer `index` on x [R, T, D] at `position` [T] that also attends to the (k, v, position) `before`; its sites."""

    def site(name: str, activation: jax.Array) -> jax.Array:
        return apply_patch(per_query_head(config, activation), patches[name], index) if name in patches else activation

    normed = attention_input(config, weights, x)
    q, k, v = (site(name, project(config, weights, name, normed)) for name in ("q", "k", "v"))
    rotation = rope.of_layer(config, index, rope.rotations(config, position))
    rotated_k = rope.rotate(k, rotation)
    blocks = [*before, (rotated_k, v, position)]
    masks = [(keys, visible(config, index, position, at)) for keys, _, at in blocks]
    patterns = attention_pattern(config, rope.rotate(q, rotation), masks)
    z = site("z", mix_values(config, [(p, values) for p, (_, values, _) in zip(patterns, blocks, strict=True)]))
    heads_out = heads_output(config, weights, z)
    sites = {"resid_pre": x, "q": q, "k": k, "v": v, "rotated_k": rotated_k, "z": z, "heads_out": heads_out}
    return mlp_half(config, weights, x + added(config, weights, "attn", heads_out)), sites
