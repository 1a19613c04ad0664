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
from jaxmech.batches import equal_parts
from jaxmech.compiled_sizes import few_sizes
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts, check_tokens
from jaxmech.pairs import Pairs, positions_of
from jaxmech.prompt_trees import PromptTrees, run_stretch, stretches
from jaxmech.sharding import over_rows, row_devices

SOFTMAX = 100  # multiply-adds that take as long as the softmax of one score, roughly
TOKENS_PER_CALL = 2**15  # of trees that run together: enough for a GPU, and few, so that trees are of similar size
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


def collect_targets(
    model: Model, desiderata: Sequence[Pairs], roles: Sequence[str], layers: Sequence[int]
) -> list[Targets]:
    """Runs the counterfactual prompts, in parts, and keeps z at the roles: [B, L, R, N, H] of each.

    Args:
      desiderata: equally many pairs of each.
      layers: the last layer of each whose z is needed.
    """
    for pairs in desiderata:
        check_prompts(model.config, pairs)
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
    found = [z for trees, wanted in grown for z in _values(model, trees, wanted, multiple)]
    return [
        Targets(z, pairs.labels, pairs.labels if pairs.wrong_labels is None else pairs.wrong_labels)
        for z, pairs in zip(found, desiderata, strict=True)
    ]


def _work(config: Config, trees: PromptTrees) -> float:
    """About how many multiply-adds a layer of all trees takes, or what else takes as long."""
    sizes, heads = trees.sizes.astype(float), config.num_heads * config.head_dim
    weights = 2 * config.width * (heads + config.num_kv_heads * config.head_dim) + 3 * config.width * config.mlp_width
    return float(weights * sizes.sum() + (2 * heads + SOFTMAX * config.num_heads) * (sizes**2).sum())


def _values(model: Model, trees: PromptTrees, layers: Sequence[int], multiple: int) -> list[jax.Array]:
    """z [B, L, R, N, H] of each of the S prompts that the trees have, at their R roles, up to `layers` [S].

    Args:
      multiple: for `few_sizes`, of the trees' widths.
    """
    config, weights, sizes = model.config, model.weights, trees.sizes
    order = np.argsort(sizes, kind="stable")  # trees of similar size run together
    fitting = memory.fitting(weights, memory.of_forward(config, float(sizes.max())))
    size = min(fitting, math.ceil(TOKENS_PER_CALL / sizes.mean()))
    parts = [order[part] for part, _ in equal_parts(len(order), size, row_devices(weights))]
    found, route = [], stretches(trees, layers)
    for rows in parts:
        x = z = None
        for stretch in route:
            width = few_sizes(int(stretch.trees.sizes[rows].max()), multiple)
            here = over_rows(weights, stretch.trees.of(rows, width))
            x, z = run_stretch(config, weights, stretch._replace(trees=here), x, z)
        found.append(z)
    together = np.concatenate(parts)
    return _in_order(found, np.unique(together, return_index=True)[1], sets=len(layers))


@partial(jax.jit, static_argnames="sets")
def _in_order(parts: Sequence[jax.Array], places: Array, *, sets: int) -> list[jax.Array]:
    """z [B, L, R, N, H] of each of S `sets` of prompts, of trees that are at `places` [B] of the parts.

    Args:
      parts: [L, b, S * R, N, H] each, set by set.
    """
    z = jnp.concatenate(parts, axis=1)[:, places]
    z = z.reshape(*z.shape[:2], sets, -1, *z.shape[-2:])  # [L, B, S, R, N, H]
    return list(z.swapaxes(0, 2))
