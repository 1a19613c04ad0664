"""What ablated heads put out: the z of other prompts, averaged position by position or of single ones.

Axes as in `jaxmech.model`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.loading import Model, check_tokens
from jaxmech.model import Params
from jaxmech.pairs import Pairs
from jaxmech.patching import captured_heads
from jaxmech.sharding import over_rows, row_devices
from jaxmech.shared_prefix import SharedPrompts, observe_prompts

Array = Any  # NumPy on the host, jax.Array inside jit


@dataclass(frozen=True, eq=False, repr=False)
class RoleMeans:
    """Means of z for prompts in which a role is not always at the same position.

    Attributes:
      by_position: float32 [T, L, N, H], for tokens without one of the roles.
      by_role: {role: float32 [L, N, H]}, for those with one; with several, the first counts.
    """

    by_position: np.ndarray  # [T, L, N, H]
    by_role: Mapping[str, np.ndarray]  # of [L, N, H]

    def __repr__(self) -> str:
        return f"RoleMeans({', '.join(self.by_role)}; [T, L, N, H] = {list(self.by_position.shape)})"


AblatedValues = np.ndarray | RoleMeans  # what `evaluate` takes


def mean_activations(
    model: Model, tokens: np.ndarray | Pairs, last: np.ndarray | None = None, *, batch_size: int | None = None
) -> np.ndarray:
    """z of every head averaged over prompts, position by position: float32 [T, L, N, H].

    Where roles are at other positions from prompt to prompt, take `role_means`.

    Args:
      model: the model that is run.
      tokens: int [B, T], prompts in which a position means the same, as far as that can be; or `Pairs`, whose clean
        prompts and last tokens are taken.
      last: int [B], the last token of each prompt (`pairs.position("last")`); a position is averaged over the prompts
        that reach it, and is NaN where none does. None: all prompts have T tokens; what pads shorter ones would count.
      batch_size: prompts in one call; None picks as many as fit the memory budget.

    Raises:
      ValueError: no prompts, ids outside the vocabulary, or `last` is not [B] positions.
    """
    prompts, last = _prompts_to_ablate_by(model.config, tokens, last)
    reached = np.arange(prompts.shape[1]) <= last[:, None]
    return _averaged(_sums(model, prompts, reached[None], batch_size)[0], reached)


def role_means(
    model: Model, pairs: Pairs, roles: str | Sequence[str] | None = None, *, batch_size: int | None = None
) -> RoleMeans:
    """z of every head averaged over the tokens that have a role, and over the other tokens position by position.

    For prompts of unequal length: `last`, say, stands at many positions, so that a mean over what stands at one of them
    mixes it with tokens of other kinds. A position that only tokens with roles have is averaged over these.

    Args:
      model: the model that is run.
      pairs: whose clean prompts are taken.
      roles: the roles, or one; None: all that the pairs have.
      batch_size: prompts in one call; None picks as many as fit the memory budget.

    Raises:
      ValueError: ids outside the vocabulary, an unknown role, or none.
    """
    prompts, last = _prompts_to_ablate_by(model.config, pairs, None)
    roles = list(pairs.positions if roles is None else [roles] if isinstance(roles, str) else roles)
    if not roles:
        raise ValueError("No roles given: without any, the means are those of `mean_activations`.")
    token = np.arange(prompts.shape[1])
    at = np.stack([token == pairs.position(role)[:, None] for role in roles])  # [R, B, T]
    reached = token <= last[:, None]
    others = reached & ~at.any(0)
    others = np.where(others.any(0), others, reached)
    by_position, *by_role = _sums(model, prompts, np.stack([others, *at]), batch_size)
    means = {role: x.sum(0) / np.float32(len(pairs)) for role, x in zip(roles, by_role, strict=True)}
    return RoleMeans(_averaged(by_position, others), means)


def _sums(model: Model, prompts: np.ndarray, counted: np.ndarray, batch_size: int | None) -> np.ndarray:
    """Sums of z over the tokens of all prompts that are `counted`, bool [M, B, T]: float32 [M, T, L, N, H]."""
    count, length = prompts.shape
    if batch_size is None:
        z = memory.of_heads(model.config, 2 * length, 1)  # of a layer, in float32
        batch_size = memory.fitting(model.weights, z + memory.of_forward(model.config, length))
    total = np.zeros((), np.float32)
    for rows, new in equal_parts(count, batch_size, row_devices(model.weights)):
        weight = np.moveaxis(counted[:, rows] * new[:, None], 0, 1).astype(np.float32)  # [b, M, T]
        here = over_rows(model.weights, (prompts[rows], weight))
        total = total + np.asarray(_sum_of_z(model.config, model.weights, *here))
    return np.moveaxis(total, 0, 2)


def _averaged(sums: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Sums [T, L, N, H] over as many tokens as are `counted` [B, T] at each position; NaN where none is."""
    counts = np.where(counted.any(0), counted.sum(0), np.nan).astype(np.float32)
    return sums / counts[:, None, None, None]


def resampled_activations(
    model: Model,
    tokens: np.ndarray | Pairs,
    examples: Pairs | int,
    seed: int = 0,
    *,
    last: np.ndarray | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """z of every head on prompts drawn with replacement, one for each example: float32 [B, T, L, N, H].

    Ablated values of `evaluate` for resample ablation.

    Args:
      model: the model that is run.
      tokens: int [P, T], prompts to draw from; or `Pairs`, whose clean prompts and last tokens are taken.
      examples: the B pairs that are to be ablated: each draws from the prompts that are at least as long as its own
        clean prompt and not the same. Or B alone: then from all.
      seed: of the draws.
      last: int [P], the last token of each prompt; values behind it are NaN. None: all prompts have T tokens.
      batch_size: prompts in one call; None picks as many as fit the memory budget.

    Raises:
      ValueError: no prompts, ids outside the vocabulary, no examples, or one that has no prompt to draw.
    """
    prompts, last = _prompts_to_ablate_by(model.config, tokens, last)
    length = prompts.shape[1]
    allowed = _drawable(prompts, last, examples)  # [B, P]
    chosen = np.where(allowed, np.random.default_rng(seed).random(allowed.shape), -1).argmax(1)
    once, back = np.unique(chosen, return_inverse=True)
    if batch_size is None:
        z = 2 * memory.of_heads(model.config, length, model.config.num_layers)  # and in float32
        batch_size = memory.fitting(model.weights, z + memory.of_forward(model.config, length))
    everywhere = np.broadcast_to(np.arange(length), prompts.shape)
    parts = []
    chosen = list(equal_parts(len(once), batch_size, row_devices(model.weights)))
    captured = captured_heads(model, (prompts, everywhere), [once[rows] for rows, _ in chosen], sites=("z",))
    for found, (_, new) in zip(captured, chosen, strict=True):
        parts.append(np.moveaxis(np.asarray(found["z"], np.float32), 0, 2)[new])  # of [L, b, T, N, H]
    values = np.concatenate(parts)
    values[np.arange(length) > last[once, None]] = np.nan
    return values[back]


def _drawable(tokens: np.ndarray, last: np.ndarray, examples: Pairs | int) -> np.ndarray:
    """Which of the P prompts each of the B examples may be ablated by, bool [B, P]."""
    if not isinstance(examples, Pairs):
        if examples < 1:
            raise ValueError(f"examples={examples}; expected pairs, or a number of at least 1.")
        return np.ones((examples, len(tokens)), bool)

    def texts(tokens: np.ndarray, last: np.ndarray) -> list[bytes]:
        return [row[: end + 1].astype(np.int32).tobytes() for row, end in zip(tokens, last, strict=True)]

    own, others = texts(examples.clean, examples.position("last")), texts(tokens, last)
    allowed = last >= examples.position("last")[:, None]
    allowed &= np.array([[text != other for other in others] for text in own])
    if (none := ~allowed.any(1)).any():
        raise ValueError(
            f"Example {int(none.argmax())} has no prompt to draw that is at least as long as its own and another one; "
            "give more prompts, or longer ones."
        )
    return allowed


def _prompts_to_ablate_by(
    config: Config, tokens: np.ndarray | Pairs, last: np.ndarray | None
) -> tuple[Any, np.ndarray]:
    """Prompts [B, T] and their last tokens [B]."""
    if isinstance(tokens, Pairs):
        last = tokens.position("last") if last is None else last
    prompts = check_tokens(config, tokens.clean if isinstance(tokens, Pairs) else tokens)
    count, length = prompts.shape
    last = np.full(count, length - 1) if last is None else np.asarray(last)
    if not count:
        raise ValueError("No prompts given, so there is nothing to ablate by.")
    if last.shape != (count,) or last.min() < 0 or last.max() >= length:
        raise ValueError(f"last is {last}; expected a position 0..{length - 1} for each of the {count} prompts.")
    return prompts, last


@partial(jax.jit, static_argnames="config")
def _sum_of_z(config: Config, weights: Params, tokens: Array, weight: Array) -> jax.Array:
    """Sums over prompts of z, each token with its weights [B, M, T]: float32 [L, M, T, N, H]."""
    whole = SharedPrompts(jnp.zeros((1, 0), jnp.int32), jnp.zeros(len(tokens), jnp.int32), tokens)

    def observe(sites):
        return jnp.einsum("bmt,btnh->mtnh", weight, sites.whole("z").astype(jnp.float32), precision="highest")

    return observe_prompts(config, weights, whole, observe)
