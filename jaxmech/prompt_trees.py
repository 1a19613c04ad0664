"""Several prompts of each example, run as one tree of tokens, in which what they begin with alike is computed once.

The counterfactual prompts of an example's desiderata tell of one scene and part where one of them words it otherwise:
together, the fourteen have little more than half of the tokens that they have one by one. A token of the tree attends
to those before it on the paths of its prompts. This is exact, as what follows a token cannot change it.

Of each prompt, z of some tokens is wanted, in the layers up to one that may differ between prompts. A tree goes through
the layers in stretches: where prompts end, the tokens that no other prompt has drop out.

Axes as in `jaxmech.model`; S prompts of each example are a tree of U tokens, P of which are kept.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import rope
from jaxmech.config import Config
from jaxmech.model import (
    Params,
    attention_input,
    attention_output,
    attention_pattern,
    embed,
    layer_weights,
    mix_values,
    mlp_half,
    project,
    visible,
)

WORTH_DROPPING = 0.8  # of the tokens that the trees have
Array = Any  # NumPy on the host, jax.Array inside jit


class PromptTrees(NamedTuple):
    """The trees of B examples; the rest of each row is padding, tokens that no prompt has."""

    tokens: Array  # [B, U]
    position: Array  # [B, U] in the prompts
    member: Array  # [B, S, U] bool, which prompts have the token
    kept: Array  # [B, P] tokens of the tree; any of prompts that have dropped out
    before: Array  # [B, U] where the tokens were before prompts dropped out

    @classmethod
    def grow(cls, prompts: np.ndarray, length: np.ndarray, positions: np.ndarray) -> "PromptTrees":
        """The trees of prompts.

        Args:
          prompts: int [B, S, T].
          length: int [B, S], tokens of each that count.
          positions: int [B, S, R], tokens of each that are kept: P = S * R, prompt by prompt.
        """
        (count, several, width), row = prompts.shape, np.arange(len(prompts))
        token, size = np.arange(width), np.zeros(count, int)
        node = np.zeros(prompts.shape, int)  # where each prompt's tokens are in the tree
        for s in range(several):
            common, like = np.zeros(count, int), np.zeros(count, int)
            for other in range(s):
                both = np.minimum(length[:, s], length[:, other])
                alike = (prompts[:, s] == prompts[:, other]) & (token < both[:, None])
                shared = np.cumprod(alike, axis=1).sum(axis=1)
                common, like = np.maximum(common, shared), np.where(shared > common, other, like)
            own = (size - common)[:, None] + token
            node[:, s] = np.where(token < common[:, None], node[row, like], own)
            size += length[:, s] - common
        example, prompt, at = np.nonzero(token < length[..., None])
        there = node[example, prompt, at]
        tokens, position = np.zeros((2, count, int(size.max())), np.int32)
        member = np.zeros((count, several, int(size.max())), bool)
        tokens[example, there], position[example, there] = prompts[example, prompt, at], at
        member[example, prompt, there] = True
        kept = np.take_along_axis(node, positions, axis=2).reshape(count, -1)
        before = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return cls(tokens, position, member, np.int32(kept), before)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each tree, [B]."""
        return self.member.any(axis=1).sum(axis=1)

    def only(self, prompts: np.ndarray) -> "PromptTrees":
        """Without the tokens that only others than `prompts`, bool [S], have."""
        member = self.member & prompts[:, None]
        before = np.argsort(~member.any(axis=1), axis=1, kind="stable")
        now = np.argsort(before, axis=1)
        before = before[:, : int(member.any(axis=1).sum(axis=1).max())]
        stays = np.repeat(prompts, self.kept.shape[1] // len(prompts))
        return PromptTrees(
            np.take_along_axis(self.tokens, before, axis=1),
            np.take_along_axis(self.position, before, axis=1),
            np.take_along_axis(member, before[:, None], axis=2),
            np.int32(np.where(stays, np.take_along_axis(now, self.kept, axis=1), 0)),
            np.int32(before),
        )

    def of(self, rows: np.ndarray, width: int) -> "PromptTrees":
        """Those of some examples, in `width` tokens, which may be more or fewer than there are."""
        fill = max(0, width - self.tokens.shape[1])

        def fitted(x: Array) -> Array:
            return np.pad(x[rows], [(0, 0)] * (x.ndim - 1) + [(0, fill)])[..., :width]

        tokens, position, member, before = map(fitted, (self.tokens, self.position, self.member, self.before))
        return PromptTrees(tokens, position, member, self.kept[rows], before)


class Stretch(NamedTuple):
    """Layers through which trees go as they are."""

    trees: PromptTrees
    start: int
    stop: int  # the layer above, of which only z of the tokens that are kept is computed


def stretches(trees: PromptTrees, layers: Sequence[int]) -> list[Stretch]:
    """Where prompts drop out whose z is wanted up to `layers` [S], wherever many tokens go with them."""
    wanted, found, start = np.asarray(layers), [], 0
    for stop in sorted(set(layers)):
        rest = trees.only(wanted > stop)
        if stop == max(layers) or rest.sizes.sum() < WORTH_DROPPING * trees.sizes.sum():
            found.append(Stretch(trees, start, stop))
            trees, start = rest, stop
    return found


@partial(jax.jit, static_argnames="config", donate_argnames="z")
def run_stretch(
    config: Config, weights: Params, stretch: Stretch, x: Array = None, z: Array = None
) -> tuple[jax.Array, jax.Array]:
    """Runs the trees through a stretch of layers.

    Args:
      x: the residual stream that the stretch before ended with; None in the first.
      z: what was found until then, which is added to; None in the first.

    Returns:
      resid_pre of the layer `stop`, [B, U, D]; and z [L, B, P, N, H] up to that layer at the tokens that are kept, 0
      above the last layer of each prompt.
    """
    trees, example = stretch.trees, jnp.arange(len(stretch.trees.tokens))[:, None]
    position, member = trees.position, trees.member.astype(config.compute_dtype)
    on_a_path = jnp.einsum("bsu,bsv->buv", member, member) > 0
    stays = jnp.repeat(trees.member.any(axis=2), trees.kept.shape[1] // trees.member.shape[1], axis=1)[..., None, None]
    everywhere, kept = (slice(None),), (example, trees.kept)

    def attend(i, x, at):
        """z of layer i at tokens of the trees."""
        layer = layer_weights(weights, i)
        normed = attention_input(config, layer, x)
        q, k, v = (project(config, layer, site, y) for site, y in (("q", normed[at]), ("k", normed), ("v", normed)))
        rotation = rope.of_layer(config, i, rope.rotations(config, position))
        q, k = rope.rotate(q, rope.Rotation(*(x[at] for x in rotation))), rope.rotate(k, rotation)
        allowed = on_a_path[at][:, None] & visible(config, i, position[at], position)
        (pattern,) = attention_pattern(config, q, [(k, allowed)])
        return mix_values(config, [(pattern, v)])

    def advance(i, carry):
        x, found = carry
        here, layer = attend(i, x, everywhere), layer_weights(weights, i)
        found = found.at[i].set(jnp.where(stays, here[kept], found[i]))
        return mlp_half(config, layer, x + attention_output(config, layer, here)), found

    if x is None:
        x = embed(config, weights, trees.tokens)
        z = jnp.zeros((config.num_layers, *trees.kept.shape, config.num_heads, config.head_dim), x.dtype)
    else:
        x = x[example, trees.before]
    x, z = jax.lax.fori_loop(stretch.start, stretch.stop, advance, (x, z))
    return x, z.at[stretch.stop].set(jnp.where(stays, attend(stretch.stop, x, kept), z[stretch.stop]))
