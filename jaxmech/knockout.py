"""Attention knockout (Geva et al. 2023, arXiv:2304.14767): a role may not attend to others, from a layer upwards.

What the source may not read changes nothing before the source, nor below the first layer that is blocked: every first
layer costs a forward pass of the tokens from the source on alone (`jaxmech.cone`), of several from the first on.
"""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmech import memory
from jaxmech.batches import Batches, calls_of_equal_size
from jaxmech.cone import CleanCache, Cone, Knockout, live_cache, live_start, live_stream
from jaxmech.config import Config
from jaxmech.gathered import Gathered
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Metric
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs, one_or_more, positions_of
from jaxmech.predictions import Predictions, answers
from jaxmech.sharding import over_rows, row_devices
from jaxmech.suffixes import Suffixes, suffix_lengths

TOKENS_PER_CALL = 4096  # suffix tokens of all first layers that run together
Array = Any  # NumPy on the host, jax.Array inside jit


def knockout(
    model: Model,
    pairs: Pairs,
    source: str | Sequence[str] = "last",
    target: str | Sequence[str] | np.ndarray = "query_box",
    *,
    window: int | None = None,
    batch_size: int | None = None,
    keep_logits: bool = True,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Predictions:
    """Forbids the attention from `source` to `target` in layers >= l, for every l.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      source: role of the query, or several roles, none of which may attend to targets before it.
      target: the keys, which are before the source: a role, or several; the position of one in each clean prompt, int
        [B], see `random_target`; or which tokens of each clean prompt they are, bool [B, T], see `Pairs.between`.
      window: how many layers are blocked, from l on, or as many as there are; None: all. Geva et al. block windows
        around a layer: with an odd window, theirs around l + window // 2 is entry l here.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      keep_logits: return the logits, float32 [L, B, V].
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function of the
        logits, see `predict`; it is measured whether or not logits are kept.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.

    Returns:
      Predictions with `accuracy` [L], `correct` [L, B], `logits` [L, B, V] and, of another metric, `measured` [L, B];
      entry l blocks layers >= l, or l to l + window - 1.

    Raises:
      ValueError: an unknown role or metric, a window of no layers, a target that is not before the source, or before
        one of several, in every prompt, or a source that has no target before it.
    """
    config, options = model.config, {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(config, pairs, config.num_layers, **options)
    window = config.num_layers if window is None else window
    if not isinstance(window, Integral) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window={window!r}; expected a number of layers from 1 on, or None for all from each on.")
    last = pairs.position("last")
    p, keys = blocked(pairs, source, target)
    tokens = check_prompts(config, pairs)
    if batch_size is None:
        length = float(suffix_lengths(p, last).mean())
        batch_size = memory.fitting(model.weights, memory.of_live_sweep(config, length, tokens.shape[1], 1))
    batches = Batches.plan([tokens], p, last, batch_size)
    work, copies = batches.capacity / TOKENS_PER_CALL, row_devices(model.weights)
    calls = calls_of_equal_size(np.arange(config.num_layers), work, most=config.num_layers, copies=copies)

    def run_batch(rows: np.ndarray) -> None:  # a function, so that its cache goes before the next one comes
        suffixes = batches.suffixes(rows)
        clean = _clean_cache(config, model.weights, batches.prompts(rows), suffixes)
        for starts in calls:
            run = over_rows(model.weights, starts)
            inputs = _State(clean, suffixes, keys[rows], window)
            found = _answers(config, model.weights, inputs, run, keep_logits=gathered.needs_logits)
            gathered.add(rows, *found, at=starts)

    for rows in batches.rows:
        run_batch(rows)
    return gathered.predictions()


def blocked(
    pairs: Pairs, source: str | Sequence[str], target: str | Sequence[str] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the source is, [B, R], and what it may not attend to, bool [B, T]; arguments and errors as `knockout`."""
    p, keys = positions_of(pairs.position, one_or_more(source, "source")), _keys(pairs, target)
    _check_before(keys, p, source, target)
    return p, keys


def random_target(pairs: Pairs, source: str = "last", seed: int = 0) -> np.ndarray:
    """A token before `source` in each clean prompt, int [B], for a control: not the first one, and none with a role.

    The first token is left out because many heads attend to it when they have nothing to do. Where no other token is
    left, it may be any before the source.

    Args:
      pairs: the prompts, with their roles.
      source: role of the query.
      seed: of the draws.

    Raises:
      ValueError: the source is the first token of a prompt, so that nothing is before it.
    """
    rng = np.random.default_rng(seed)
    named = np.stack(list(pairs.positions.values()), axis=1)
    chosen = []
    for p, roles in zip(pairs.position(source), named, strict=True):
        if p < 1:
            raise ValueError(f"source={source!r} is the first token of a prompt; there is nothing before it.")
        free = np.setdiff1d(np.arange(1, p), roles)
        chosen.append(rng.choice(free if len(free) else np.arange(p)))
    return np.array(chosen)


class _State(NamedTuple):
    """What a batch of examples brings to every call."""

    clean: CleanCache
    suffixes: Suffixes
    keys: Array  # [B, T] bool, the tokens that may not be attended to
    window: Array  # [] how many layers are blocked


@partial(jax.jit, static_argnames="config")
def _clean_cache(config: Config, weights: Params, prompts, suffixes: Suffixes) -> CleanCache:
    return live_cache(config, weights, prompts, suffixes)


@partial(jax.jit, static_argnames=("config", "keep_logits"))
def _answers(
    config: Config, weights: Params, inputs: _State, starts: Array, *, keep_logits: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Answers [I, B] and logits [I, B, V] for the first blocked layers starts [I], in increasing order."""
    cone = Cone(config, weights, inputs.clean, inputs.suffixes)
    first_layer = live_start(config, starts[0])

    def one(start):
        blocked = Knockout(inputs.keys, start, start + inputs.window)
        x = live_stream(cone, {}, first_layer, knockout=blocked)
        logits = unembed(config, weights, x)
        return answers(logits), logits if keep_logits else None

    return jax.vmap(one)(starts)


def _keys(pairs: Pairs, target: str | Sequence[str] | np.ndarray) -> np.ndarray:
    """The tokens that `target` names, bool [B, T]."""
    tokens = np.arange(pairs.clean.shape[1])
    if isinstance(target, str):
        return tokens == _position(pairs, target)[:, None]
    if isinstance(target, Sequence) and len(target) and all(isinstance(role, str) for role in target):
        return np.any([tokens == _position(pairs, role)[:, None] for role in target], axis=0)
    target = np.asarray(target)
    if target.shape == pairs.clean.shape and target.dtype == bool:
        return target
    if target.shape != (len(pairs),) or not np.issubdtype(target.dtype, np.integer):
        raise ValueError(
            f"target has shape {target.shape} and dtype {target.dtype}; expected roles, integer positions "
            f"[{len(pairs)}], or which tokens, bool {list(pairs.clean.shape)}."
        )
    if target.min() < 0:
        raise ValueError(f"target holds the position {target.min()}; positions are counted from the start, from 0 on.")
    if target.max() >= len(tokens):
        raise ValueError(f"target holds the position {target.max()}; the prompts have {len(tokens)} tokens.")
    return tokens == target[:, None]


def _position(pairs: Pairs, role: str) -> np.ndarray:
    if role not in pairs.positions:
        roles = ", ".join(sorted(pairs.positions))
        raise ValueError(
            f"Unknown target {role!r}; name roles of these pairs ({roles}), or give positions [B] or which tokens, "
            "bool [B, T]. The default, 'query_box', is a role of the boxes task."
        )
    return pairs.position(role)


def _check_before(
    keys: np.ndarray, p: np.ndarray, source: str | Sequence[str], target: str | Sequence[str] | np.ndarray
) -> None:
    """ValueError unless the `keys` [B, T] of every prompt are some, all before the last of its sources p [B, R]."""
    name = "tokens" if isinstance(target, np.ndarray) else repr(target)
    if (nothing := ~keys.any(axis=1)).any():
        raise ValueError(f"target selects no token of example {int(nothing.argmax())}; a knockout blocks some.")
    furthest = keys.shape[1] - 1 - keys[:, ::-1].argmax(axis=1)
    end = p.max(axis=1)
    if (furthest >= end).any():
        row = int((furthest >= end).argmax())
        raise ValueError(
            f"target={name} is at {furthest[row]} in example {row}, source={source!r} at {end[row]}; a token attends "
            "to earlier ones, so the target must be before the source."
        )
    nearest = keys.argmax(axis=1)[:, None]
    if (nearest >= p).any():
        row, r = (int(i) for i in np.argwhere(nearest >= p)[0])
        raise ValueError(
            f"source={source!r}: {list(source)[r]!r} is at {p[row, r]} in example {row}, where no target is before it."
        )
