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
from jaxmech.cone import live_cache
from jaxmech.config import Config
from jaxmech.loading import Model, check_tokens
from jaxmech.model import Params
from jaxmech.pairs import Pairs, positions_of
from jaxmech.shared_prefix import SharedPrompts, shared_length
from jaxmech.suffixes import Suffixes, suffix_lengths

Array = Any  # NumPy on the host, jax.Array inside jit


class Base(NamedTuple):
    """What is computed of base prompts: layers from the group's first on, tokens from the first role on."""

    resid_pre: Array  # [B, W, D] at the first layer, of the suffix, padded with copies of its last token's
    k: Array  # [B, L, K, T, H], rotated
    v: Array  # [B, L, K, T, H]
    p: Array  # [B, R]
    last: Array  # [B]


def base_key(pairs: Pairs, roles: Sequence[str]) -> tuple[bytes, ...]:
    """The same for pairs with the same base prompts."""
    return pairs.clean.tobytes(), positions_of(pairs.position, roles).tobytes(), pairs.position("last").tobytes()


class BasePrompts:
    """S sets of equally many base prompts, run part by part when they are asked for.

    Args:
      roles: the R whose tokens are patched.
      first_layer: the layer from which on they are kept.
      parts: indices of prompts, the same in every set and as many in every part, int [Q] each.
    """

    def __init__(
        self, model: Model, sets: Sequence[Pairs], roles: Sequence[str], first_layer: int, parts: Sequence[np.ndarray]
    ):
        self._model, self._first_layer = model, first_layer
        T, self._width = _lengths(sets, roles)
        tokens = np.stack([np.pad(x.clean, ((0, 0), (0, T - x.clean.shape[1]))) for x in sets])
        self._tokens = check_tokens(model.config, tokens.reshape(-1, T))  # [S * B, T]
        self._p = np.concatenate([positions_of(pairs.position, roles) for pairs in sets])
        self._last = np.concatenate([pairs.position("last") for pairs in sets])
        config, starts = model.config, len(sets[0]) * np.arange(len(sets))
        together = [(starts[:, None] + part).reshape(-1) for part in parts]
        kept = 2 * _base_bytes(config, sets, roles, 0)  # of all layers, and once transposed
        most = memory.fitting(model.weights, kept + memory.of_forward(config, T))
        calls = math.ceil(len(together[0]) / most)
        size = math.ceil(len(together[0]) / calls)
        self._rows = [np.resize(rows, (calls, size)) for rows in together]
        self._split = shared_length([self._tokens[call] for rows in self._rows for call in rows])

    def run(self, part: int) -> Base:
        """The prompts of a part, S * Q of them: set by set, and behind them what fills up the last call."""
        rows = self._rows[part]
        prompts = [SharedPrompts.split(self._tokens[call], *self._split) for call in rows]
        p, last = self._p[rows], self._last[rows]
        prompts = jax.tree.map(lambda *x: np.stack(x), *prompts)
        model, options = self._model, {"first_layer": self._first_layer, "width": self._width}
        resid_pre, k, v = _run_base(model.config, model.weights, prompts, p, last, **options)
        return Base(resid_pre, k, v, p.reshape(-1, p.shape[-1]), last.reshape(-1))


def examples_at_a_time(model: Model, sets: Sequence[Pairs], roles: Sequence[str], first_layer: int) -> int:
    """Prompts of each set that are held at a time, in half of the memory budget; the other half is for the runs."""
    return memory.fitting(model.weights, 2 * len(sets) * _base_bytes(model.config, sets, roles, first_layer))


def suffix_capacity(sets: Sequence[Pairs], roles: Sequence[str], batches: np.ndarray) -> int:
    """C, packed suffix tokens of any of the batches [..., E] of examples in any set, or a few more; at most E * W.

    Where a batch is shorter, its examples are -1, and count as suffixes of one token.
    """
    lengths = np.stack([suffix_lengths(positions_of(x.position, roles), x.position("last")) for x in sets])
    most = np.where(batches >= 0, lengths[:, batches], 1).sum(axis=-1).max()
    return min(few_sizes(aligned(int(most))), batches.shape[-1] * int(lengths.max()))


def runs_at_a_time(
    model: Model,
    sets: Sequence[Pairs],
    roles: Sequence[str],
    first_layer: int,
    examples: int,
    capacity: int,
    *,
    logits: bool,
) -> int:
    """Runs whose steps of so many examples, forward and backward, fit half of the memory budget.

    Args:
      capacity: see `suffix_capacity`.
      logits: a step needs those of all tokens, not the target's alone.
    """
    config, (T, width) = model.config, _lengths(sets, roles)
    stream = memory.of_streams(config, capacity, config.num_layers - first_layer)
    stream += 2 * (memory.of_tokens(config, capacity) + examples * memory.of_attention(config, width, T))
    stream += 2 * examples * memory.of_logits(config) if logits else 0
    kept = 2 * examples * _base_bytes(config, sets, roles, first_layer)
    return memory.fitting(model.weights, 2 * (kept + stream))


def masked_examples_at_a_time(
    model: Model, pairs: Pairs, roles: Sequence[str], first_layer: int, masks: int, besides: float
) -> int:
    """Examples whose prompts, whose streams for all masks, and what else each takes fit the memory budget.

    Args:
      besides: bytes.
    """
    config, (T, width) = model.config, _lengths([pairs], roles)
    stream = memory.of_tokens(config, width) + memory.of_attention(config, width, T) + memory.of_logits(config)
    kept = 2 * _base_bytes(config, [pairs], roles, first_layer)
    return memory.fitting(model.weights, kept + masks * stream + besides)


def _lengths(sets: Sequence[Pairs], roles: Sequence[str]) -> tuple[int, int]:
    """T and W of the base prompts."""
    widths = [suffix_lengths(positions_of(pairs.position, roles), pairs.position("last")).max() for pairs in sets]
    return max(pairs.clean.shape[1] for pairs in sets), int(max(widths))


def _base_bytes(config: Config, sets: Sequence[Pairs], roles: Sequence[str], first_layer: int) -> float:
    """Bytes of `Base` of one prompt."""
    T, width = _lengths(sets, roles)
    return memory.of_keys_and_values(config, T, config.num_layers - first_layer) + memory.of_streams(config, width, 1)


@partial(jax.jit, static_argnames=("config", "first_layer", "width"))
def _run_base(
    config: Config, weights: Params, prompts: SharedPrompts, p: Array, last: Array, *, first_layer: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """resid_pre, k and v as `Base` has them, of prompts in calls [calls, b, ...], one call after another."""

    def run(call):
        prompts, p, last = call
        length = prompts.prefixes.shape[1] + prompts.suffixes.shape[1]
        cache = live_cache(config, weights, prompts, Suffixes.padded(p, last, width=width, prefix=length), first_layer)
        assert cache.k is not None and cache.v is not None
        resid_pre = cache.resid_pre[0].reshape(len(p), width, -1)
        return resid_pre, jnp.moveaxis(cache.k, 0, 1), jnp.moveaxis(cache.v, 0, 1)

    kept = jax.lax.map(run, (prompts, p, last))
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
