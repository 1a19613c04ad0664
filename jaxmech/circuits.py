"""Circuit evaluation: how well a model does when all heads but a circuit's are ablated.

As in Prakash et al. 2024, section 3, a circuit's heads act at *vital* positions, the tokens of its roles. Everywhere
else every head is ablated, and at the vital positions every head that is not in the circuit at that role: its z is
replaced, by its mean over other prompts at the same position as a rule, or by zero, or by its value on another prompt.

Where all heads are ablated, the residual stream depends on the token and its position alone: there is no attention left
that could bring in anything else. So it is computed once for every distinct pair of them, whatever the number of
prompts and circuits, and each circuit costs a forward pass of its vital tokens, which attend to the ablated ones.

Axes as in `jaxmech.model`; R vital tokens of a prompt, C circuits, U distinct tokens, and S sources of ablated values:
1, or one for each example.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory, rope
from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.interventions import Interventions, Patch, head_mask
from jaxmech.loading import Model, check_prompts, check_tokens
from jaxmech.model import (
    Params,
    attention_input,
    attention_output,
    attention_pattern,
    embed,
    forward,
    mix_values,
    mlp_half,
    project,
    unembed,
    visible,
)
from jaxmech.pairs import Pairs
from jaxmech.patching import as_heads_by_role, at_tokens
from jaxmech.predictions import Predictions
from jaxmech.sharding import over_rows, row_devices
from jaxmech.shared_prefix import SharedPrompts, observe_prompts

Array = Any  # NumPy on the host, jax.Array inside jit


def mean_activations(
    model: Model, tokens: np.ndarray, last: np.ndarray | None = None, *, batch_size: int = 64
) -> np.ndarray:
    """z of every head averaged over prompts, position by position: float32 [T, L, N, H].

    Args:
      tokens: int [B, T], prompts in which a position means the same, as far as that can be.
      last: int [B], the last token of each prompt (`pairs.position("last")`); a position is averaged over the prompts
        that reach it, and is zero where none does. None: all prompts have T tokens.
      batch_size: prompts in one call.

    Raises:
      ValueError: ids outside the vocabulary, or `last` is not [B] positions.
    """
    tokens = check_tokens(model.config, tokens)
    count, length = tokens.shape
    last = np.full(count, length - 1) if last is None else np.asarray(last)
    if last.shape != (count,) or last.min() < 0 or last.max() >= length:
        raise ValueError(f"last is {last}; expected a position 0..{length - 1} for each of the {count} prompts.")
    reached = (np.arange(length) <= last[:, None]).astype(np.float32)  # [B, T]
    total = np.zeros((), np.float32)
    for rows, new in equal_parts(count, batch_size, row_devices(model.weights)):
        prompts = over_rows(model.weights, (tokens[rows], reached[rows] * new[:, None]))
        total = total + np.asarray(_sum_of_z(model.config, model.weights, *prompts))
    return np.moveaxis(total, 0, 1) / np.maximum(reached.sum(0), 1)[:, None, None, None]


def resampled_activations(model: Model, tokens: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """z of every head on `count` prompts drawn from `tokens` [B, T] with replacement, [count, T, L, N, H].

    Ablated values of `evaluate` for resample ablation: one other prompt for each example.

    Raises:
      ValueError: ids outside the vocabulary, or count < 1.
    """
    if count < 1:
        raise ValueError(f"count={count}; expected at least 1.")
    tokens = check_tokens(model.config, tokens)
    chosen = np.random.default_rng(seed).integers(len(tokens), size=count)
    rows, back = np.unique(chosen, return_inverse=True)
    _, captured = model(tokens[rows], capture=("z",))
    return np.moveaxis(np.asarray(captured["z"], np.float32), 0, 2)[back]


def evaluate(
    model: Model,
    pairs: Pairs,
    circuits: Sequence[Any],
    means: np.ndarray,
    ablate_elsewhere: bool = True,
    *,
    batch_size: int | None = None,
    keep_logits: bool = True,
) -> Predictions:
    """Runs many circuits at once on the clean prompts.

    Args:
      circuits: C of them: a `Circuit`, or {role: [(layer, head)]}; a role may have no heads.
      means: float [T or more, L, N, H], what ablated heads put out, see `mean_activations` (zeros for zero ablation);
        or [B, T or more, L, N, H], values for each example, see `resampled_activations`.
      ablate_elsewhere: ablate all heads at the tokens that are not in a circuit's roles; False leaves these tokens as
        they are, and runs every circuit in a full forward pass.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      keep_logits: return the logits, float32 [C, B, V]; many circuits of a large vocabulary need much memory.

    Returns:
      Predictions with `accuracy` [C], `correct` [C, B] and `logits` [C, B, V].

    Raises:
      ValueError: no circuits, an unknown role or head, or means that do not fit the model and the prompts.
    """
    config = model.config
    roles, keep, named = _circuit_masks(config, circuits)
    tokens, last = check_prompts(config, pairs), pairs.position("last")
    vital = np.stack([pairs.position(role) for role in roles], axis=1)  # [B, R]
    values = _ablated_values(config, means, pairs)
    run = _evaluate_vital if ablate_elsewhere else _evaluate_full
    copies = row_devices(model.weights) if ablate_elsewhere else 1  # full forward passes run one after another
    size, per_call = _call_sizes(config, len(keep), pairs, len(roles), batch_size, full=not ablate_elsewhere)
    correct = np.zeros((len(keep), len(pairs)), bool)
    logits = np.zeros((*correct.shape, config.vocab_size), np.float32) if keep_logits else None
    parts = [rows for rows, _ in equal_parts(len(pairs), size)]
    distinct = _distinct_tokens([tokens[rows] for rows in parts], per_example=len(values) > 1)
    for rows, (index, tokens_once) in zip(parts, distinct, strict=True):
        batch = _Batch(tokens[rows], vital[rows], last[rows], index)
        values_here = values[rows] if len(values) > 1 else values
        inputs = run.prepare(config, model.weights, batch, np.moveaxis(values_here, 2, 0), tokens_once)
        for circuits_here, _ in equal_parts(len(keep), per_call, copies):
            masks = keep[circuits_here], named[circuits_here]
            masks = over_rows(model.weights, masks) if ablate_elsewhere else masks
            found = run.circuits(config, model.weights, batch, inputs, *masks)
            correct[np.ix_(circuits_here, rows)] = np.asarray(found.argmax(-1)) == pairs.labels[rows]
            if logits is not None:
                logits[np.ix_(circuits_here, rows)] = np.asarray(found)
    return Predictions(correct, logits)


class _Batch(NamedTuple):
    """Prompts of one call."""

    tokens: Array  # [B, T]
    vital: Array  # [B, R] vital positions
    last: Array  # [B]
    index: Array  # [B, T] which distinct token each is


class _Distinct(NamedTuple):
    """The distinct combinations of a token, its position and the source of its ablated values."""

    token: Array  # [U]
    position: Array  # [U]
    source: Array  # [U]


class _Ablated(NamedTuple):
    """What does not depend on the circuit when all heads are ablated outside the vital positions."""

    k: Array  # [L, U, K, H], rotated
    v: Array  # [L, U, K, H]
    z: Array  # [L, B, R, N, H], the ablated values at the vital positions


@partial(jax.jit, static_argnames="config")
def _sum_of_z(config: Config, weights: Params, tokens: Array, weight: Array) -> jax.Array:
    """Sum over prompts of z, each token with its weight [B, T]: float32 [L, T, N, H]."""
    whole = SharedPrompts(jnp.zeros((1, 0), jnp.int32), jnp.zeros(len(tokens), jnp.int32), tokens)

    def observe(sites):
        return jnp.einsum("bt,btnh->tnh", weight, sites["z"].astype(jnp.float32), precision="highest")

    return observe_prompts(config, weights, whole, observe)


@partial(jax.jit, static_argnames="config")
def _ablated_everywhere(config: Config, weights: Params, batch: _Batch, values: Array, distinct: _Distinct) -> _Ablated:
    """Runs the distinct tokens with every head ablated; values [L, S, T, N, H]."""
    rotation = rope.angles(config, distinct.position)

    def layer(x, weights_and_values):
        layer_weights, z = weights_and_values
        normed = attention_input(config, layer_weights, x)
        k, v = (project(config, layer_weights, site, normed) for site in ("k", "v"))
        attn_out = attention_output(config, layer_weights, z.astype(x.dtype))  # [S, T, D]
        x = mlp_half(config, layer_weights, x + attn_out[distinct.source, distinct.position])
        return x, _Ablated(rope.rotate(k, *rotation), v, _at_vital(batch, z))

    x = embed(config, weights, distinct.token)
    return jax.lax.scan(layer, x, (weights["blocks"], values))[1]


@partial(jax.jit, static_argnames="config")
def _vital_logits(
    config: Config, weights: Params, batch: _Batch, ablated: _Ablated, keep: Array, named: Array
) -> jax.Array:
    """Logits [C, B, V] of circuits keep [C, L, R, N] by forward passes of the vital tokens."""
    del named  # at a role that a circuit does not name, it has no heads
    return jax.vmap(partial(_circuit_logits, config, weights, batch, ablated))(keep)


def _circuit_logits(config: Config, weights: Params, batch: _Batch, ablated: _Ablated, keep: jax.Array) -> jax.Array:
    """Logits [B, V] of one circuit, keep bool [L, R, N]."""
    vital = batch.vital  # [B, R]
    same = vital[:, :, None] == vital[:, None, :]  # [B, R, R]: roles that are one token
    again = (same & jnp.tri(vital.shape[1], k=-1, dtype=bool)).any(-1)  # [B, R]: a token that an earlier role names
    token = jnp.arange(batch.tokens.shape[1])
    is_vital = (vital[:, :, None] == token).any(1)  # [B, T]
    rotation = rope.angles(config, vital)

    def layer(x, inputs):
        index, layer_weights, constant, kept = inputs
        normed = attention_input(config, layer_weights, x)
        q, k, v = (project(config, layer_weights, site, normed) for site in ("q", "k", "v"))
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        before = visible(config, index, vital, token) & ~is_vital[:, None, None]  # [B, 1, R, T]
        own = visible(config, index, vital, vital) & ~again[:, None, None]  # [B, 1, R, R]
        keys = [(constant.k[batch.index], before), (k, own)]
        patterns = attention_pattern(config, q, keys)
        z = mix_values(config, list(zip(patterns, (constant.v[batch.index], v), strict=True)))
        kept = (same[..., None] & kept).any(2)  # [B, R, N]
        z = jnp.where(kept[..., None], z, constant.z.astype(z.dtype))
        return mlp_half(config, layer_weights, x + attention_output(config, layer_weights, z)), None

    example = jnp.arange(len(vital))
    x = embed(config, weights, batch.tokens[example[:, None], vital])  # [B, R, D]
    x, _ = jax.lax.scan(layer, x, (jnp.arange(config.num_layers), weights["blocks"], ablated, keep))
    at_last = (vital == batch.last[:, None]).argmax(1)
    return unembed(config, weights, x[example, at_last])


@partial(jax.jit, static_argnames="config")
def _values_at_vital(config: Config, weights: Params, batch: _Batch, values: Array, distinct: _Distinct) -> jax.Array:
    """The ablated values [L, B, R, N, H] at the vital positions."""
    del config, weights, distinct
    return jax.vmap(partial(_at_vital, batch))(values)


def _at_vital(batch: _Batch, values: jax.Array) -> jax.Array:
    """One layer's values [S, T, N, H] at the vital positions, [B, R, N, H]."""
    source = jnp.arange(len(batch.vital)) if len(values) > 1 else jnp.zeros(len(batch.vital), jnp.int32)
    return values[source[:, None], batch.vital]


@partial(jax.jit, static_argnames="config")
def _full_logits(config: Config, weights: Params, batch: _Batch, values: Array, keep: Array, named: Array) -> jax.Array:
    """Logits [C, B, V] of circuits keep [C, L, R, N] by full forward passes, one after another."""
    same = batch.vital[:, :, None] == batch.vital[:, None, :]  # [B, R, R]

    def one(circuit):
        kept, roles = circuit
        named = (same & roles).any(-1)[..., None]  # [B, R, 1]; tokens that no role of the circuit names are left alone
        ablated = named & ~at_tokens(batch.vital, kept)  # [L, B, R, N]
        patch = Patch(ablated.astype(config.compute_dtype), values, batch.vital)
        return forward(config, weights, batch.tokens, Interventions(z=patch), logits_at=batch.last)[0]

    return jax.lax.map(one, (keep, named))


class _Way(NamedTuple):
    """How circuits are run: what is computed once for all of them, and then their logits."""

    prepare: Any
    circuits: Any


_evaluate_vital = _Way(_ablated_everywhere, _vital_logits)
_evaluate_full = _Way(_values_at_vital, _full_logits)


def _circuit_masks(config: Config, circuits: Sequence[Any]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All roles, `last` the first; the heads of each circuit, bool [C, L, R, N]; the roles it names, bool [C, R]."""
    if isinstance(circuits, Mapping) or hasattr(circuits, "heads_by_role"):
        raise TypeError("One circuit given; expected a list of them: evaluate(model, pairs, [circuit], means).")
    if not len(circuits):
        raise ValueError("No circuits given; expected a list of circuits or of {role: [(layer, head)]}.")
    by_role = [{role: list(heads) for role, heads in as_heads_by_role(circuit).items()} for circuit in circuits]
    roles = list(dict.fromkeys(["last", *(role for heads in by_role for role in heads)]))
    keep = np.zeros((len(circuits), config.num_layers, len(roles), config.num_heads), bool)
    for circuit, heads in zip(keep, by_role, strict=True):
        for role, chosen in heads.items():
            if chosen:
                circuit[:, roles.index(role)] = head_mask(config, chosen)
    return roles, keep, np.array([[role in heads for role in roles] for heads in by_role])


def _ablated_values(config: Config, means: np.ndarray, pairs: Pairs) -> np.ndarray:
    """The ablated values as [S, T, L, N, H]."""
    means = np.asarray(means)
    values = means[None] if means.ndim == 4 else means
    length = pairs.clean.shape[1]
    heads = (config.num_layers, config.num_heads, config.head_dim)
    if values.ndim != 5 or values.shape[2:] != heads or values.shape[1] < length or len(values) not in (1, len(pairs)):
        raise ValueError(
            f"means has shape {means.shape}; this model and these prompts need [{length} or more, L, N, H] with "
            f"L, N, H = {heads}, or [{len(pairs)}, {length} or more, L, N, H]. Means must come from prompts at least "
            "as long."
        )
    values = values[:, :length]
    if not np.isfinite(values.sum(dtype=np.float64)):
        raise ValueError(
            "means holds numbers that are not finite; look at the model and the dtype that they come from."
        )
    return values


def _distinct_tokens(batches: Sequence[np.ndarray], *, per_example: bool) -> list[tuple[np.ndarray, _Distinct]]:
    """For each batch of tokens [B, T]: which distinct token each is, int [B, T], and these, equally many in each batch.

    Args:
      per_example: the ablated values are those of each example, so that no two examples share a token.
    """
    found = []
    for tokens in batches:
        count, length = tokens.shape
        source = np.broadcast_to(np.arange(count)[:, None] * per_example, tokens.shape)
        position = np.broadcast_to(np.arange(length), tokens.shape)
        rows = np.stack([tokens, position, source], axis=-1).reshape(-1, 3)
        distinct, index = np.unique(rows, axis=0, return_inverse=True)
        found.append((index.reshape(tokens.shape), distinct))
    most = max(len(distinct) for _, distinct in found)
    padded = [(index, np.pad(distinct, ((0, most - len(distinct)), (0, 0)))) for index, distinct in found]
    return [(index, _Distinct(*distinct.T)) for index, distinct in padded]


def _call_sizes(
    config: Config, circuits: int, pairs: Pairs, roles: int, batch_size: int | None, *, full: bool
) -> tuple[int, int]:
    """Examples and circuits in one call that fit the memory budget."""
    T = pairs.clean.shape[1]
    tokens, logits = T if full else roles, memory.of_logits(config)
    activations = memory.of_tokens(config, tokens) + memory.of_attention(config, tokens, T + tokens)
    shared = memory.of_keys_and_values(config, T, 1) + memory.of_heads(config, roles, config.num_layers)
    if batch_size is None:
        batch_size = memory.fitting(shared + activations + logits)
    examples = min(len(pairs), batch_size)
    per_circuit = examples * (logits + (0 if full else activations))
    return examples, min(circuits, memory.fitting(per_circuit))
