"""What DCM keeps of its base prompts, and how a training is cut where that does not fit the memory.

A step needs the keys and values of all their tokens in all layers from the group's first on: gigabytes for a thousand
prompts of a large model. They are computed for as many steps at a time as the memory budget holds, a *segment*; if all
fit, there is one segment, and every prompt is run once.

Axes as in `jaxmech.dcm`; S counts sets of base prompts, Q the prompts of each that are held at a time, W the tokens of
the longest suffix.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.compiled_sizes import aligned, few_sizes
from jaxmech.cone import keys_and_values
from jaxmech.config import Config
from jaxmech.loading import Model, check_tokens
from jaxmech.model import Params
from jaxmech.pairs import Pairs, positions_of
from jaxmech.shared_prefix import SharedPrompts, observe_prompts, splitter
from jaxmech.suffixes import suffix_lengths

Array = Any  # NumPy on the host, jax.Array inside jit


class Place(NamedTuple):
    """Where masks patch."""

    roles: Sequence[str]  # R
    first_layer: int


class Base(NamedTuple):
    """What is computed of base prompts: layers from the group's first on, tokens from the first role on."""

    resid_pre: Array  # [B, W, D] at the first layer, of the suffix, padded with copies of its last token's
    k: Array  # [B, L or more, K, T, H], rotated; more are of layers below the first
    v: Array  # [B, L or more, K, T, H]
    p: Array  # [B, R]
    last: Array  # [B]

    def at(self, rows: Array, layers: int) -> "Base":
        """The prompts `rows` [E], with k and v of the last `layers` layers alone."""
        below = self.k.shape[1] - layers
        k, v = self.k[rows, below:], self.v[rows, below:]
        return Base(self.resid_pre[rows], k, v, self.p[rows], self.last[rows])


def base_key(pairs: Pairs, roles: Sequence[str]) -> tuple[bytes, ...]:
    """The same for pairs with the same base prompts."""
    return pairs.clean.tobytes(), positions_of(pairs.position, roles).tobytes(), pairs.position("last").tobytes()


class BasePrompts:
    """S sets of equally many base prompts, run part by part when they are asked for.

    Args:
      places: where masks patch them.
      parts: indices of prompts, the same in every set and as many in every part, int [Q] each.
    """

    def __init__(self, model: Model, sets: Sequence[Pairs], places: Sequence[Place], parts: Sequence[np.ndarray]):
        self._model, self._first_layers = model, tuple(here.first_layer for here in places)
        T, self._widths = _lengths(sets, places)
        tokens = np.stack([np.pad(x.clean, ((0, 0), (0, T - x.clean.shape[1]))) for x in sets])
        tokens = check_tokens(model.config, tokens.reshape(-1, T))  # [S * B, T]
        self._p = [np.concatenate([positions_of(pairs.position, here.roles) for pairs in sets]) for here in places]
        self._last = np.concatenate([pairs.position("last") for pairs in sets])
        config, starts = model.config, len(sets[0]) * np.arange(len(sets))
        together = [(starts[:, None] + part).reshape(-1) for part in parts]
        everywhere = [here._replace(first_layer=0) for here in places]
        kept = 2 * _base_bytes(config, sets, everywhere)  # of all layers, and once transposed
        most = memory.fitting(model.weights, kept + memory.of_forward(config, T))
        calls = math.ceil(len(together[0]) / most)
        size = math.ceil(len(together[0]) / calls)
        self._rows = [np.resize(rows, (calls, size)) for rows in together]
        self._prompts = splitter(tokens, self._rows, calls)

    def run(self, part: int) -> list[Base]:
        """The prompts of a part, S * Q of them: set by set, and behind them what fills up the last call.

        Returns:
          What is kept for each place, with the same k and v.
        """
        rows = self._rows[part]
        model, last, positions = self._model, self._last[rows], [p[rows] for p in self._p]
        suffixes = [
            np.minimum(p.min(axis=-1)[..., None] + np.arange(width), last[..., None])
            for p, width in zip(positions, self._widths, strict=True)
        ]
        found, k, v = _run_base(
            model.config, model.weights, self._prompts(rows), suffixes, first_layers=self._first_layers
        )
        return [
            Base(resid_pre, k, v, p.reshape(-1, p.shape[-1]), last.reshape(-1))
            for resid_pre, p in zip(found, positions, strict=True)
        ]


def examples_at_a_time(model: Model, sets: Sequence[Pairs], places: Sequence[Place]) -> int:
    """Prompts of each set that are held at a time, in half of the memory budget; the other half is for the runs."""
    return memory.fitting(model.weights, 2 * len(sets) * _base_bytes(model.config, sets, places))


def suffix_capacity(sets: Sequence[Pairs], roles: Sequence[str], batches: np.ndarray) -> int:
    """C, packed suffix tokens of any of the batches [..., E] of examples in any set, or a few more; at most E * W.

    Where a batch is shorter, its examples are -1, and count as suffixes of one token.
    """
    lengths = np.stack([suffix_lengths(positions_of(x.position, roles), x.position("last")) for x in sets])
    most = np.where(batches >= 0, lengths[:, batches], 1).sum(axis=-1).max()
    return min(few_sizes(aligned(int(most))), batches.shape[-1] * int(lengths.max()))


def runs_at_a_time(
    model: Model, sets: Sequence[Pairs], place: Place, examples: int, capacity: int, *, logits: bool
) -> int:
    """Runs whose steps of so many examples, forward and backward, fit half of the memory budget.

    Args:
      capacity: see `suffix_capacity`.
      logits: a step needs those of all tokens, not the target's alone.
    """
    config, (T, (width,)) = model.config, _lengths(sets, [place])
    stream = memory.of_streams(config, capacity, config.num_layers - place.first_layer)
    stream += 2 * (memory.of_tokens(config, capacity) + examples * memory.of_attention(config, width, T))
    stream += 2 * examples * memory.of_logits(config) if logits else 0
    kept = 2 * examples * _base_bytes(config, sets, [place])
    return memory.fitting(model.weights, 2 * (kept + stream))


def masked_examples_at_a_time(
    model: Model, pairs: Pairs, places: Sequence[Place], masks: Sequence[int], besides: float
) -> int:
    """Examples whose prompts, whose streams for the masks at one place, and what else each takes fit the memory budget.

    Args:
      masks: that run together, at each place.
      besides: bytes.
    """
    config, (T, widths) = model.config, _lengths([pairs], places)

    def stream(width: int) -> float:
        return memory.of_tokens(config, width) + memory.of_attention(config, width, T) + memory.of_logits(config)

    streams = max(count * stream(width) for count, width in zip(masks, widths, strict=True))
    return memory.fitting(model.weights, 2 * _base_bytes(config, [pairs], places) + streams + besides)


def _lengths(sets: Sequence[Pairs], places: Sequence[Place]) -> tuple[int, list[int]]:
    """T of the base prompts, and W of each place where they are patched."""
    ends = [pairs.position("last") for pairs in sets]
    widths = [
        max(
            int(suffix_lengths(positions_of(pairs.position, here.roles), last).max())
            for pairs, last in zip(sets, ends, strict=True)
        )
        for here in places
    ]
    return max(pairs.clean.shape[1] for pairs in sets), widths


def _base_bytes(config: Config, sets: Sequence[Pairs], places: Sequence[Place]) -> float:
    """Bytes of `Base` of one prompt, for all places where it is patched."""
    T, widths = _lengths(sets, places)
    layers = config.num_layers - min(here.first_layer for here in places)
    return memory.of_keys_and_values(config, T, layers) + memory.of_streams(config, sum(widths), 1)


@partial(jax.jit, static_argnames=("config", "first_layers"))
def _run_base(
    config: Config,
    weights: Params,
    prompts: SharedPrompts,
    suffixes: Sequence[Array],
    *,
    first_layers: tuple[int, ...],
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """resid_pre of each of the suffixes, k and v as `Base` has them, of prompts in calls [calls, b, ...].

    One call runs after another.

    Args:
      suffixes: the tokens kept from each of the first layers, [calls, b, W] each.
    """

    def run(call):
        prompts, suffixes = call

        def observe(sites):
            row = jnp.arange(len(prompts.owner))[:, None]
            return keys_and_values(sites) | {"resid_pre": [sites.at("resid_pre", row, at) for at in suffixes]}

        kept = observe_prompts(config, weights, prompts, observe)
        resid_pre = [x[first] for x, first in zip(kept["resid_pre"], first_layers, strict=True)]
        k, v = (jnp.moveaxis(kept[site][min(first_layers) :], 0, 1) for site in ("k", "v"))
        return resid_pre, k, v

    kept = jax.lax.map(run, (prompts, suffixes))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)


class Segment(NamedTuple):
    """Consecutive steps whose examples are held at a time."""

    rows: np.ndarray  # [Q] the examples
    orders: np.ndarray  # [orders, steps, E] those of every step, as indices into `rows`; -1 where its batch is shorter


def cut(orders: np.ndarray, most: int) -> list[Segment]:
    """Segments of all steps of `orders` [orders, steps, E] with at most `most` examples, but of one step at least.

    All segments are of one shape: the last repeats its last step, and those with fewer examples repeat some.
    """
    steps = orders.shape[1]

    def in_sizes_of(size: int) -> list[np.ndarray]:
        return [orders[:, np.minimum(np.arange(first, first + size), steps - 1)] for first in range(0, steps, size)]

    def examples(part: np.ndarray) -> np.ndarray:
        return np.unique(part[part >= 0])

    sizes = sorted({math.ceil(steps / count) for count in range(1, steps + 1)}, reverse=True)
    fitting = (size for size in sizes if max(len(examples(part)) for part in in_sizes_of(size)) <= most)
    parts = in_sizes_of(next(fitting, 1))
    longest = max(len(examples(part)) for part in parts)
    return [
        Segment(np.resize(examples(part), longest), np.where(part >= 0, np.searchsorted(examples(part), part), -1))
        for part in parts
    ]
