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
from jaxmech.prompt_trees import Layout, PromptTrees, Stretch, pack, run_stretch, stretches
from jaxmech.sharding import over_rows, row_devices

SOFTMAX = 100  # multiply-adds that take as long as the softmax of one score, roughly
TOKENS_PER_CALL = 2**15  # of trees that run together: enough for a GPU
MULTIPLE = 8  # widths of several desiderata's trees are multiples of this: others share what is compiled
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
        self._model, self._copies = model, row_devices(model.weights)
        self._desiderata, self._parts = desiderata, parts
        self._runs: list[_Runs] = []
        self._layouts: list[Layout] = []  # of each stretch
        prompts = [check_tokens(model.config, np.asarray(pairs.corrupt)) for pairs in desiderata]
        T = max(x.shape[1] for x in prompts)
        together = np.stack([np.pad(x, ((0, 0), (0, T - x.shape[1]))) for x in prompts], axis=1)  # [B, S, T]
        at = np.stack([positions_of(pairs.corrupt_position, roles) for pairs in desiderata], axis=1)  # [B, S, R]
        length = at.max(axis=2) + 1
        trees, groups = _grown(model.config, together, length, at, layers)
        in_a_tree = trees.member.shape[1]
        each = self._trees_of_a_call(trees.sizes, trees.kept.shape[1], len(parts[0]))
        for sets, wanted in groups:
            rows = [part if in_a_tree > 1 else np.concatenate([len(at) * s + part for s in sets]) for part in parts]
            dealt = [_dealt(trees.sizes[of], each, self._copies) for of in rows]
            calls = [of[places] for of, places in zip(rows, dealt, strict=True)]
            self._runs.append(_Runs(sets, stretches(trees, wanted), dealt, calls))
        multiple = MULTIPLE if len(desiderata) > 1 else 1
        for stretch in zip(*(runs.route for runs in self._runs), strict=True):
            sizes = [x.trees.sizes[np.concatenate(runs.calls)] for x, runs in zip(stretch, self._runs, strict=True)]
            sizes = np.concatenate([x.reshape(-1, each) for x in sizes])
            self._layouts.append(Layout.of(sizes, multiple, in_a_tree))

    def _trees_of_a_call(self, sizes: np.ndarray, kept: int, count: int) -> int:
        """Of one on each copy of the model, if so many are to be run; few numbers, so few compilations.

        Args:
          sizes: of the trees.
          kept: tokens of a tree whose z is kept.
        """
        config = self._model.config
        tree = memory.of_forward(config, float(sizes.max())) + memory.of_heads(config, kept, config.num_layers)
        fitting = memory.fitting(self._model.weights, tree)
        most = min(fitting, math.ceil(TOKENS_PER_CALL / sizes.mean()))
        most = most if most >= count else 2 ** (most.bit_length() - 1)
        return math.ceil(count / (math.ceil(count / most) * self._copies))

    def run(self, part: int) -> list[Targets]:
        """Of each desideratum, z at the roles [B, L, R, N, H] and the labels of the pairs of a part."""
        values: dict[int, jax.Array] = {}
        rows, weights = self._parts[part], self._model.weights
        for runs in self._runs:
            found = []
            for examples in runs.calls[part]:
                x = z = trees = None
                for stretch, layout in zip(runs.route, self._layouts, strict=True):
                    trees = pack(stretch.trees, examples, layout, before=trees)
                    inputs = over_rows(weights, trees), stretch.start, stretch.stop, x, z
                    x, z = run_stretch(self._model.config, weights, *inputs)
                found.append(z)
            places = np.unique(runs.dealt[part], return_index=True)[1]
            values |= zip(runs.sets, _in_order(found, places, sets=len(runs.sets), count=len(rows)), strict=True)
        some = [pairs[rows] for pairs in self._desiderata]
        return [
            Targets(values[s], pairs.labels, pairs.labels if pairs.wrong_labels is None else pairs.wrong_labels)
            for s, pairs in enumerate(some)
        ]


class _Runs(NamedTuple):
    """Desiderata whose prompts are run together: all in one tree of each example, or those with one last layer."""

    sets: list[int]  # which desiderata
    route: list[Stretch]
    dealt: list[np.ndarray]  # of each part, what is in its calls [calls, copies, b] of all that is run for it
    calls: list[np.ndarray]  # the same as rows of all trees


def _grown(
    config: Config, prompts: np.ndarray, length: np.ndarray, positions: np.ndarray, layers: Sequence[int]
) -> tuple[PromptTrees, list[tuple[list[int], list[int]]]]:
    """One tree of each example's prompts, or each prompt alone, whichever is less work; see `PromptTrees.grow`.

    Returns:
      The trees, [B], or [S * B] of one prompt each, those of one desideratum behind those of another; and the
      desiderata that are run together, with the last layers of the prompts of their trees.
    """
    trees, several = PromptTrees.grow(prompts, length, positions), prompts.shape[1]
    if several > 1:
        alone = PromptTrees.grow(*(x.swapaxes(0, 1).reshape(-1, 1, *x.shape[2:]) for x in (prompts, length, positions)))
        if _work(config, alone) < _work(config, trees):
            return alone, [([s for s in range(several) if layers[s] == x], [x]) for x in dict.fromkeys(layers)]
    return trees, [(list(range(several)), list(layers))]


def _work(config: Config, trees: PromptTrees) -> float:
    """About how many multiply-adds a layer of all trees takes, or what else takes as long."""
    sizes, heads = trees.sizes.astype(float), config.num_heads * config.head_dim
    weights = 2 * config.width * (heads + config.num_kv_heads * config.head_dim) + 3 * config.width * config.mlp_width
    return float(weights * sizes.sum() + (2 * heads + SOFTMAX * config.num_heads) * (sizes**2).sum())


def _dealt(sizes: np.ndarray, each: int, copies: int) -> np.ndarray:
    """Which trees run together, [calls, copies, each], small ones first, so that every call has some of every size.

    Where prompts drop out, they keep their places.

    Args:
      sizes: of the trees, [B].
      copies: of the model, that share a call.
    """
    count = math.ceil(len(sizes) / (each * copies)) * copies
    order = np.resize(np.argsort(sizes, kind="stable"), max(count, len(sizes)))
    pieces = [np.pad(x := order[i::count], (0, each - len(x)), "edge") for i in range(count)]
    return np.stack(pieces).reshape(-1, copies, each)


@partial(jax.jit, static_argnames=("sets", "count"))
def _in_order(calls: Sequence[jax.Array], places: Array, *, sets: int, count: int) -> list[jax.Array]:
    """z [B, L, R, N, H] of each of S = `sets` desiderata, of B = `count` examples, from that of all calls.

    Args:
      calls: [pieces, L, b, P, N, H] each. A tree has all S prompts of an example, then P = S * R and B trees are
        wanted; or one prompt, then P = R and those of one desideratum are wanted behind those of another.
      places: where the trees that are wanted are in the calls, [B] or [S * B].
    """
    z = jnp.concatenate([jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in calls], axis=1)
    outer = len(places) // count
    z = z[:, places].reshape(len(z), outer, count, sets // outer, -1, *z.shape[3:])  # [L, ., B, ., R, N, H]
    return list(z.transpose(1, 3, 2, 0, 4, 5, 6).reshape(sets, count, len(z), -1, *z.shape[5:]))
