"""Activation patching: heads' activations at the roles of a prompt, replaced by those of another prompt or model.

Owns the patched forward pass that activation patching and cross-model activation patching (`jaxmech.cmap`) share. Axes
as in `jaxmech.model`; R counts the roles.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.attention import per_query_head
from jaxmech.batches import equal_parts
from jaxmech.circuits import HeadsByRole, role_masks
from jaxmech.compat import check_compat, last_column, same_positions
from jaxmech.config import Config
from jaxmech.gathered import Gathered
from jaxmech.interventions import Patch
from jaxmech.loading import Model, check_prompts, check_tokens
from jaxmech.metrics import ACCURACY, Metric
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs, positions_of
from jaxmech.predictions import Predictions, answers
from jaxmech.sharding import on_devices_of, over_rows, row_devices
from jaxmech.shared_prefix import SharedPrompts, observe_prompts, patched_prompts, splitter

Array = Any  # NumPy on the host, jax.Array inside jit


def patch_activations(
    model: Model,
    pairs: Pairs,
    heads_by_role: HeadsByRole,
    *,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
    keep_logits: bool = True,
) -> Predictions:
    """Answers to the clean prompts when heads' z are those of the corrupt (counterfactual) prompts, role by role.

    Args:
      model: the model that is run.
      pairs: clean and corrupt prompts; labels are the answers that count as right, a desideratum's targets, say.
      heads_by_role: the heads patched at each role, {role: [(layer, head)]}, or a `Circuit`.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" reads z of `prev_query_box` at the clean prompt's position also in the corrupt one, and takes the
        last column of the padded prompts for their last token (docs/paper_compat.md, e and f).
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function of the
        logits, see `predict`; it is measured whether or not logits are kept.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.
      keep_logits: return the logits, float32 [B, V]; without, they stay on the device.

    Returns:
      Predictions with `accuracy` [], `correct` [B], `logits` [B, V] and, of another metric, `measured` [B].

    Raises:
      ValueError: no corrupt prompts, an unknown role, head or metric, no heads at all, or a head at two roles that are
        one token of a clean prompt and two of its corrupt one.
    """
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(model.config, pairs, **options)
    if check_compat(compat):
        pairs = same_positions(last_column(pairs), "prev_query_box")
    roles, mask = role_masks(model.config, heads_by_role)
    positions = positions_of(pairs.corrupt_position, roles)
    _check_one_source(roles, mask, positions_of(pairs.position, roles), positions)
    source = check_tokens(model.config, np.asarray(pairs.corrupt)), positions
    values = partial(captured_heads, model, source, sites=("z",))
    return patched_predictions(model, pairs, roles, mask, values, batch_size, gathered)


def patched_predictions(
    model: Model,
    pairs: Pairs,
    roles: Sequence[str],
    mask: np.ndarray,
    values: Callable[[Sequence[np.ndarray]], Iterable[Mapping[str, Array]]],
    batch_size: int | None,
    gathered: Gathered,
) -> Predictions:
    """Runs the clean prompts with patches; `gathered`, which is still empty, takes the answers.

    What prompts begin with alike before the first token that is patched is computed once.

    Args:
      mask: bool [L, R, N], the heads patched at each role.
      values: a function from parts, rows of examples [b], to {site: [L, b, R, N, H]} of each.
    """
    tokens, last = check_prompts(model.config, pairs), pairs.position("last")
    positions, copies = positions_of(pairs.position, roles), row_devices(model.weights)
    if batch_size is None:
        batch_size = memory.fitting_prompts(model.config, model.weights, tokens.shape[1])
    parts = [rows for rows, _ in equal_parts(len(pairs), batch_size, copies)]
    prompts = splitter(tokens, parts, copies, most=int(positions.min()))
    for rows, found in zip(parts, values(parts), strict=True):
        at = positions[rows].reshape(copies, -1, len(roles)), last[rows].reshape(copies, -1)
        here = over_rows(model.weights, (prompts(rows), *at))
        patched = on_devices_of(model.weights, found)
        gathered.add(rows, *_patched_answers(model.config, model.weights, *here, mask, patched))
    return gathered.predictions()


def captured_heads(
    model: Model, source: tuple[np.ndarray, np.ndarray], parts: Sequence[np.ndarray], *, sites: Sequence[str]
) -> Iterator[dict[str, jax.Array]]:
    """Activations [L, b, R, N, H] at `sites` of each of the `parts`, rows [b] of equal number.

    Args:
      source: the prompts, tokens [B, T], and positions [B, R] in them.
    """
    tokens, positions = source
    copies = row_devices(model.weights)
    copies = 1 if len(parts[0]) % copies else copies
    prompts = splitter(tokens, parts, copies)
    for rows in parts:
        here = over_rows(model.weights, (prompts(rows), positions[rows].reshape(copies, -1, positions.shape[1])))
        yield _captured_heads(model.config, model.weights, *here, sites=tuple(sites))


@partial(jax.jit, static_argnames=("config", "sites"))
def _captured_heads(
    config: Config, weights: Params, prompts: SharedPrompts, positions: Array, *, sites: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Of prompts and positions with an axis of pieces in front, the activations of all pieces, [L, b, R, N, H]."""

    def piece(prompts, positions):
        row = jnp.arange(len(positions))[:, None]
        return observe_prompts(
            config,
            weights,
            prompts,
            lambda found: {s: per_query_head(config, found.at(s, row, positions)) for s in sites},
        )

    found = jax.vmap(piece, out_axes=1)(prompts, positions)
    return {site: x.reshape(x.shape[0], -1, *x.shape[3:]) for site, x in found.items()}


@partial(jax.jit, static_argnames="config")
def _patched_answers(
    config: Config,
    weights: Params,
    prompts: SharedPrompts,
    positions: Array,
    last: Array,
    mask: Array,
    values: Mapping[str, Array],
) -> tuple[jax.Array, jax.Array]:
    """Answers [b] and logits [b, V] at `last`, the heads of mask [L, R, N] replaced at every site of values.

    Prompts, positions [pieces, ., R] and last [pieces, .] have an axis of pieces in front; values [L, b, R, N, H] are
    those of all pieces.
    """

    def piece(prompts, positions, last, values):
        weight = at_tokens(positions, mask)
        if mask.shape[1] > 1:
            role = _role_of_heads(positions, mask)[..., None]
            values = {site: jnp.take_along_axis(value, role, axis=2) for site, value in values.items()}
        patches = {site: Patch(weight, value, positions) for site, value in values.items()}
        return patched_prompts(config, weights, prompts, patches, last)

    values = {site: x.reshape(x.shape[0], len(last), -1, *x.shape[2:]) for site, x in values.items()}
    x = jax.vmap(piece, in_axes=(0, 0, 0, 1))(prompts, positions, last, values)
    logits = unembed(config, weights, x.reshape(-1, x.shape[-1]))
    return answers(logits), logits


def at_tokens(positions: Array, mask: Array) -> jax.Array:
    """The heads patched at each of positions [B, R], bool [L, B, R, N].

    Where roles are one token, all their heads are patched for each, so that the order of the roles does not matter.
    """
    return _named_at(positions, mask).any(3)


def _role_of_heads(positions: Array, mask: Array) -> jax.Array:
    """The role whose value each head takes at each of positions [B, R], int [L, B, R, N]: the first that names it."""
    return _named_at(positions, mask).argmax(3)


def _named_at(positions: Array, mask: Array) -> jax.Array:
    """Whether a head is named at a role (fourth axis) that is the token of a role (third): bool [L, B, R, R, N]."""
    same = positions[:, :, None] == positions[:, None, :]  # [B, R, R]
    return same[..., None] & mask[:, None, None]


def _check_one_source(roles: Sequence[str], mask: np.ndarray, clean: np.ndarray, corrupt: np.ndarray) -> None:
    """ValueError if a head is to take two values at one token; mask [L, R, N], positions [B, R]."""
    for i, j, row in clashing_roles(clean, corrupt):
        if (both := np.argwhere(mask[:, i] & mask[:, j])).size:
            raise ValueError(
                f"Head {tuple(both[0].tolist())} is patched at {roles[i]!r} and at {roles[j]!r}. In example {row} both "
                f"are token {clean[row, i]} of the clean prompt, but tokens {corrupt[row, i]} and {corrupt[row, j]} of "
                "the corrupt one, so it would take two values. Name it at one of them, or leave such examples out."
            )


def clashing_roles(clean: np.ndarray, corrupt: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Roles i and j that are one token of a clean prompt and two of its corrupt one, with an example where they are.

    Args:
      clean, corrupt: positions [B, R] of the roles in both prompts.
    """
    for i, j in itertools.combinations(range(clean.shape[1]), 2):
        clash = (clean[:, i] == clean[:, j]) & (corrupt[:, i] != corrupt[:, j])
        if clash.any():
            yield i, j, int(clash.argmax())
