"""Activation patching: heads' activations at the roles of a prompt, replaced by those of another prompt or model.

Owns the patched forward pass that activation patching and cross-model activation patching (`jaxmech.cmap`) share. Axes
as in `jaxmech.model`; R counts the roles.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.compat import check_compat, last_column, same_positions
from jaxmech.config import Config
from jaxmech.interventions import Interventions, Patch, head_mask
from jaxmech.loading import Model, check_tokens
from jaxmech.model import Params, forward
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions
from jaxmech.sharding import over_rows, row_devices

HeadsByRole = Mapping[str, Iterable[Sequence[int]]]
Array = Any  # NumPy on the host, jax.Array inside jit


def patch_activations(
    model: Model,
    pairs: Pairs,
    heads_by_role: HeadsByRole,
    *,
    batch_size: int | None = None,
    compat: str | None = None,
) -> Predictions:
    """Answers to the clean prompts when heads' z are those of the corrupt (counterfactual) prompts, role by role.

    Args:
      pairs: clean and corrupt prompts; labels are the answers that count as right, a desideratum's targets, say.
      heads_by_role: the heads patched at each role, {role: [(layer, head)]}.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" reads z of `prev_query_box` at the clean prompt's position also in the corrupt one, and takes the
        last column of the padded prompts for their last token (docs/paper_compat.md, e and f).

    Returns:
      Predictions with `accuracy` [], `correct` [B] and `logits` [B, V].

    Raises:
      ValueError: no corrupt prompts, an unknown role or head, or no heads at all.
    """
    if check_compat(compat):
        pairs = same_positions(last_column(pairs), "prev_query_box")
    roles, mask = role_masks(model.config, heads_by_role)
    positions = positions_of(pairs.corrupt_position, roles)
    source = check_tokens(model.config, np.asarray(pairs.corrupt)), positions
    values = partial(head_values, model, source, sites=("z",))
    return patched_predictions(model, pairs, roles, mask, values, batch_size)


def patched_predictions(
    model: Model, pairs: Pairs, roles: Sequence[str], mask: np.ndarray, values: Any, batch_size: int | None
) -> Predictions:
    """Runs the clean prompts with patches.

    Args:
      mask: bool [L, R, N], the heads patched at each role.
      values: a function from rows of examples [b] to {site: [L, b, R, N, H]}.
    """
    tokens, last = check_tokens(model.config, pairs.clean), pairs.position("last")
    positions = positions_of(pairs.position, roles)
    logits = np.empty((len(pairs), model.config.vocab_size), np.float32)
    size = examples_per_call(model.config, pairs) if batch_size is None else batch_size
    for rows, _ in equal_parts(len(pairs), size, row_devices(model.weights)):
        prompts = over_rows(model.weights, (tokens[rows], positions[rows], last[rows]))
        logits[rows] = np.asarray(_patched_logits(model.config, model.weights, *prompts, mask, values(rows)))
    return Predictions(logits.argmax(-1) == pairs.labels, logits)


def head_values(
    model: Model, source: tuple[np.ndarray, np.ndarray], rows: np.ndarray, *, sites: Sequence[str]
) -> dict[str, jax.Array]:
    """Activations [L, b, R, N, H] at `sites` of the prompts `rows` of source = (tokens [B, T], positions [B, R])."""
    prompts = over_rows(model.weights, tuple(x[rows] for x in source))
    return _head_values(model.config, model.weights, *prompts, sites=tuple(sites))


@partial(jax.jit, static_argnames=("config", "sites"))
def _head_values(config: Config, weights: Params, tokens: Array, positions: Array, *, sites) -> dict[str, jax.Array]:
    zero = jnp.zeros(len(tokens), jnp.int32)  # of the logits nothing is used; XLA leaves them out
    return forward(config, weights, tokens, capture=sites, capture_at=positions, logits_at=zero)[1]


@partial(jax.jit, static_argnames="config")
def _patched_logits(
    config: Config, weights: Params, tokens: Array, positions: Array, last: Array, mask: Array, values: dict[str, Array]
) -> jax.Array:
    """Logits [B, V] at `last`, the heads of mask [L, R, N] replaced at positions [B, R] at every site of values."""
    weight = at_tokens(positions, mask).astype(config.compute_dtype)
    patches: dict[str, Any] = {site: Patch(weight, value, positions) for site, value in values.items()}
    return forward(config, weights, tokens, Interventions(**patches), logits_at=last)[0]


def at_tokens(positions: Array, mask: Array) -> jax.Array:
    """The heads patched at each of positions [B, R], bool [L, B, R, N].

    Where roles are one token, all their heads are patched for each, so that the order of the roles does not matter.
    """
    same = positions[:, :, None] == positions[:, None, :]  # [B, R, R]
    return (same[..., None] & mask[:, None, None]).any(3)


def role_masks(config: Config, heads_by_role: HeadsByRole) -> tuple[list[str], np.ndarray]:
    """The roles and their heads, bool [L, R, N].

    Raises:
      ValueError: a head does not exist, or there is none.
    """
    heads = {role: list(chosen) for role, chosen in heads_by_role.items()}
    if not any(heads.values()):
        raise ValueError("heads_by_role names no heads: a patch that selects nothing is an error.")
    roles = [role for role, chosen in heads.items() if chosen]
    return roles, np.stack([head_mask(config, heads[role]) for role in roles], axis=1)


def positions_of(position: Any, roles: Sequence[str]) -> np.ndarray:
    """Positions [B, R] of the roles; `position` is a function from a role to [B]."""
    return np.stack([position(role) for role in roles], axis=1)


def examples_per_call(config: Config, pairs: Pairs) -> int:
    """Examples whose activations in one layer and logits fit the memory budget."""
    T = pairs.clean.shape[1]
    return max(1, int(memory.budget() / (T * bytes_per_token(config, T) + 8 * config.vocab_size)))


def bytes_per_token(config: Config, keys: int) -> int:
    """Bytes of the activations of one token that attends to `keys`, in one layer."""
    N, H, D, F = config.num_heads, config.head_dim, config.width, config.mlp_width
    return config.compute_dtype.itemsize * (4 * D + 3 * F + 4 * N * H) + 12 * N * keys
