"""What desiderata say about the base prompts: z of their counterfactual prompts, and the tokens that they predict.

The counterfactual prompts are run once, up to the last layer and token whose z is patched. Of several desiderata, those
of an example are run as one tree of tokens (`jaxmech.prompt_trees`), if that is less work than one by one: they may
share too little, and in a small model attention to the tokens of other prompts, which is masked, takes longer than what
is saved.

Axes as in `jaxmech.dcm`; S counts desiderata, R roles.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts, check_tokens
from jaxmech.pairs import Pairs, positions_of
from jaxmech.prompt_trees import Layout, PromptTrees, pack, run_stretch, stretches
from jaxmech.sharding import over_rows, row_devices

SOFTMAX = 100  # multiply-adds that take as long as the softmax of one score, roughly
TOKENS_PER_CALL = 2**15  # of trees that run together: enough for a GPU
ALIKE = 8  # widths of several desiderata's trees are multiples of this: others share what is compiled
Array = Any  # NumPy on the host, jax.Array inside jit


class Targets(NamedTuple):
    """What a desideratum says about the base prompts."""

    z: Array  # [B, L, R, N, H], of the counterfactual prompts at the roles; layers above those asked for may be 0
    labels: Array  # [B]
    wrong_labels: Array  # [B], the labels where there are none

    def at(self, roles: Sequence[int], first_layer: int) -> "Targets":
        """At some of the roles that were collected, layers from `first_layer` on."""
        z = jnp.stack([self.z[:, first_layer:, role] for role in roles], axis=2)
        return Targets(z, self.labels, self.wrong_labels)


class Counterfactuals:
    """The counterfactual prompts of desiderata, run part by part when they are asked for.

    Args:
      desiderata: equally many pairs of each.
      roles: those whose z is kept.
      layers: the last layer of each desideratum whose z is needed.
      parts: indices of pairs, as many in every part, int [B] each.
    """

    def __init__(
        self,
        model: Model,
        desiderata: Sequence[Pairs],
        roles: Sequence[str],
        layers: Sequence[int],
        parts: Sequence[np.ndarray],
    ):
        for pairs in desiderata:
            check_prompts(model.config, pairs)
        self._desiderata, self._parts = desiderata, parts
        prompts = [check_tokens(model.config, np.asarray(pairs.corrupt)) for pairs in desiderata]
        T = max(x.shape[1] for x in prompts)
        together = np.stack([np.pad(x, ((0, 0), (0, T - x.shape[1]))) for x in prompts], axis=1)  # [B, S, T]
        at = np.stack([positions_of(pairs.corrupt_position, roles) for pairs in desiderata], axis=1)  # [B, S, R]
        length = at.max(axis=2) + 1
        grown = [(PromptTrees.grow(together, length, at), list(layers))]
        if len(desiderata) > 1:
            alone = [PromptTrees.grow(*(x[:, [s]] for x in (together, length, at))) for s in range(len(desiderata))]
            if sum(_work(model.config, trees) for trees in alone) < _work(model.config, grown[0][0]):
                grown = [(trees, [layer]) for trees, layer in zip(alone, layers, strict=True)]
        multiple = ALIKE if len(desiderata) > 1 else 1
        self._trees = [_Trees(model, trees, wanted, parts, multiple) for trees, wanted in grown]

    def run(self, part: int) -> list[Targets]:
        """Of each desideratum, z at the roles [B, L, R, N, H] and the labels of the pairs of a part."""
        found = [z for trees in self._trees for z in trees.run(part)]
        some = [pairs[self._parts[part]] for pairs in self._desiderata]
        return [
            Targets(z, pairs.labels, pairs.labels if pairs.wrong_labels is None else pairs.wrong_labels)
            for z, pairs in zip(found, some, strict=True)
        ]


def _work(config: Config, trees: PromptTrees) -> float:
    """About how many multiply-adds a layer of all trees takes, or what else takes as long."""
    sizes, heads = trees.sizes.astype(float), config.num_heads * config.head_dim
    weights = 2 * config.width * (heads + config.num_kv_heads * config.head_dim) + 3 * config.width * config.mlp_width
    return float(weights * sizes.sum() + (2 * heads + SOFTMAX * config.num_heads) * (sizes**2).sum())


class _Trees:
    """Trees of S prompts, which are run in calls of one shape.

    Args:
      layers: of the S prompts.
      parts: see `Counterfactuals`.
      multiple: for `few_sizes`, of the trees' widths.
    """

    def __init__(
        self, model: Model, trees: PromptTrees, layers: Sequence[int], parts: Sequence[np.ndarray], multiple: int
    ):
        self._model, self._several = model, len(layers)
        sizes, copies = trees.sizes, row_devices(model.weights)
        fitting = memory.fitting(model.weights, memory.of_forward(model.config, float(sizes.max())))
        most = min(fitting, math.ceil(TOKENS_PER_CALL / sizes.mean()))
        self._calls = [_calls(sizes[rows], most, copies) for rows in parts]
        self._examples = [rows[calls] for rows, calls in zip(parts, self._calls, strict=True)]
        self._route = stretches(trees, layers)
        every = np.concatenate(self._examples).reshape(-1, self._examples[0].shape[-1])
        self._layouts = [Layout.of(stretch.trees.sizes[every], multiple) for stretch in self._route]

    def run(self, part: int) -> list[jax.Array]:
        """z [B, L, R, N, H] of each of the S prompts of a part's examples, at the tokens that the trees keep."""
        config, weights = self._model.config, self._model.weights
        found = []
        for examples in self._examples[part]:
            x = z = trees = None
            for stretch, layout in zip(self._route, self._layouts, strict=True):
                trees = pack(stretch.trees, examples, layout, before=trees)
                x, z = run_stretch(config, weights, over_rows(weights, trees), stretch.start, stretch.stop, x, z)
            found.append(z)
        return _in_order(found, np.unique(self._calls[part], return_index=True)[1], sets=self._several)


def _calls(sizes: np.ndarray, most: int, copies: int) -> np.ndarray:
    """Which trees run together, [calls, copies, b], small ones first, so that every call has some of every size.

    Several calls have few numbers of trees, so that other sets of examples share what is compiled.

    Args:
      sizes: of the trees, [B].
      most: trees of a call.
      copies: of the model, that share a call.
    """
    if most < len(sizes):
        most = 2 ** (most.bit_length() - 1)
    count = math.ceil(len(sizes) / most) * copies
    order = np.resize(np.argsort(sizes, kind="stable"), max(count, len(sizes)))
    dealt = [order[i::count] for i in range(count)]
    return np.stack([np.pad(x, (0, len(dealt[0]) - len(x)), "edge") for x in dealt]).reshape(-1, copies, len(dealt[0]))


@partial(jax.jit, static_argnames="sets")
def _in_order(parts: Sequence[jax.Array], places: Array, *, sets: int) -> list[jax.Array]:
    """z [B, L, R, N, H] of each of S `sets` of prompts, of trees that are at `places` [B] of the parts.

    Args:
      parts: [pieces, L, b, S * R, N, H] each, set by set.
    """
    z = jnp.concatenate([jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in parts], axis=1)
    z = z[:, places]
    z = z.reshape(*z.shape[:2], sets, -1, *z.shape[-2:])  # [L, B, S, R, N, H]
    return list(z.swapaxes(0, 2))
