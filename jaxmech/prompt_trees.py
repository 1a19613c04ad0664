"""Several prompts of each example, run as one tree of tokens, in which what they begin with alike is computed once.

The counterfactual prompts of an example's desiderata tell of one scene and part where one of them words it otherwise:
together, the fourteen have little more than half of the tokens that they have one by one. A token of the tree attends
to those before it on the paths of its prompts. This is exact, as what follows a token cannot change it.

Axes as in `jaxmech.model`; S prompts of each example are a tree of U tokens, P of which are kept.
"""

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
    mix_values,
    mlp_half,
    project,
    visible,
)

Array = Any  # NumPy on the host, jax.Array inside jit


class PromptTrees(NamedTuple):
    """The trees of B examples; behind a tree's own tokens are such that no prompt has."""

    tokens: Array  # [B, U]
    position: Array  # [B, U] in the prompts
    member: Array  # [B, S, U] bool, which prompts have the token
    kept: Array  # [B, P] tokens of the tree

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
        return cls(tokens, position, member, np.int32(kept))

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each tree, [B]."""
        return self.member.any(axis=1).sum(axis=1)

    def of(self, rows: np.ndarray, width: int) -> "PromptTrees":
        """Those of some examples, in `width` tokens, which may be more or fewer than there are."""
        fill = max(0, width - self.tokens.shape[1])

        def fitted(x: Array) -> Array:
            return np.pad(x[rows], [(0, 0)] * (x.ndim - 1) + [(0, fill)])[..., :width]

        return PromptTrees(fitted(self.tokens), fitted(self.position), fitted(self.member), self.kept[rows])


@partial(jax.jit, static_argnames="config")
def head_values(config: Config, weights: Params, trees: PromptTrees) -> jax.Array:
    """z [L, B, P, N, H] at the tokens that are kept."""
    position, member = trees.position, trees.member.astype(config.compute_dtype)
    on_a_path = jnp.einsum("bsu,bsv->buv", member, member)[:, None] > 0
    rotation, example = rope.angles(config, position), jnp.arange(len(position))[:, None]

    def layer(x, index_and_weights):
        index, weights = index_and_weights
        normed = attention_input(config, weights, x)
        q, k, v = (project(config, weights, site, normed) for site in ("q", "k", "v"))
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        (pattern,) = attention_pattern(config, q, [(k, on_a_path & visible(config, index, position, position))])
        z = mix_values(config, [(pattern, v)])
        return mlp_half(config, weights, x + attention_output(config, weights, z)), z[example, trees.kept]

    x = embed(config, weights, trees.tokens)
    return jax.lax.scan(layer, x, (jnp.arange(config.num_layers), weights["blocks"]))[1]
