"""Interventions: what to change in a forward pass, as a pytree that goes in with the tokens.

Owns the containers `Patch` and `Interventions`, their checks and their arithmetic. `model.py` says where in a block
each site is. Axes as in `model.py`; P counts the patched positions of one prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmech.config import Config

HEAD_SITES = ("q", "k", "v", "pattern", "z")
SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Patch:
    """x <- (1 - weight) * x + weight * value, or x <- x + weight * value with `add`, at `positions`.

    Weight 1 replaces the activation exactly, 0 leaves it exactly as it is, a fraction mixes (a DCM mask). Weights of
    dtype bool select: where one is False, the value is not read, so that it may be nan; where a number is 0, nan stays
    nan. `weight` and `value` broadcast to the shapes below by NumPy's rule; at residual sites they have no axis N.
    P = T when `positions` is None. The last axis of `value` is H for q, k, v and z, S for `pattern`, D for residual
    sites. Inside jit, where positions are not checked, one outside the prompt makes activations nan.

    Attributes:
      weight: float or bool [L, B, P, N].
      value: float [L, B, P, N, H].
      positions: int32 [B, P], distinct within an example, or None for every position.
      add: add to the activation instead of replacing it: a steering vector, say.
    """

    weight: jax.Array  # [L, B, P, N]
    value: jax.Array  # [L, B, P, N, H]
    positions: jax.Array | None = None  # [B, P]
    add: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Interventions:
    """One optional `Patch` per site and an attention knockout. A site that is None costs nothing.

    q and k are taken before RoPE, and after their norm in families that norm them (Qwen3, Gemma 3, OLMo). k and v are
    patched per *query* head, after the grouped-query repeat, so that one head of a group can be patched alone.
    `pattern` is the attention probability, patched after the softmax. attn_out and mlp_out are what is added to the
    residual stream: after the norms that follow them (Gemma 2 and 3, OLMo) and the multiplier (Granite).

    Attributes:
      knockout: bool [L, B, T, N, S], broadcastable; True forbids query T of head N in layer L to attend to key S.
        A query with no key left attends to nothing: its pattern and z are zero.
    """

    resid_pre: Patch | None = None
    q: Patch | None = None
    k: Patch | None = None
    v: Patch | None = None
    pattern: Patch | None = None
    z: Patch | None = None
    attn_out: Patch | None = None
    resid_mid: Patch | None = None
    mlp_out: Patch | None = None
    resid_post: Patch | None = None
    knockout: jax.Array | None = None  # [L, B, T, N, S]

    def check(self, config: Config, tokens_shape: tuple[int, ...]) -> None:
        """Refuses what cannot be meant. Shapes are checked always, values only where they are concrete.

        Args:
          config: that of the model.
          tokens_shape: shape of the tokens that the interventions go with, (B, T).

        Raises:
          ValueError: a shape does not broadcast, a position lies outside the prompt or repeats, or a patch or the
            knockout selects nothing.
        """
        if len(tokens_shape) != 2:
            raise ValueError(f"tokens has shape {tokens_shape}; expected [B, T].")
        for site in SITES:
            patch = getattr(self, site)
            if patch is not None:
                _check_patch(config, site, patch, tokens_shape)
        if self.knockout is not None:
            _check_knockout(config, self.knockout, tokens_shape)


def head_weights(config: Config, heads: Iterable[Sequence[int]]) -> np.ndarray:
    """Weight 1 at each (layer, head) of `heads`, 0 elsewhere: float32 [L, 1, 1, N], a `Patch.weight` for z, q, k or v.

    Args:
      config: that of the model, for L and N.
      heads: (layer, head) pairs.

    Raises:
      ValueError: a head does not exist in this model, or `heads` is empty.
    """
    return head_mask(config, heads)[:, None, None, :].astype(np.float32)


def head_mask(config: Config, heads: Iterable[Sequence[int]]) -> np.ndarray:
    """True at each (layer, head) of `heads`: bool [L, N]. ValueError for an unknown head or none at all."""
    mask = np.zeros((config.num_layers, config.num_heads), bool)
    if not isinstance(heads, Iterable):
        raise TypeError(f"Heads are {heads!r}; expected a list of (layer, head), such as those of a circuit's group.")
    heads = list(heads)
    if any(np.ndim(head) != 1 for head in heads):
        raise ValueError(f"Heads are {heads}; expected a list of (layer, head), of one head [(3, 6)].")
    heads = [tuple(head) for head in heads]
    if not heads:
        raise ValueError("No heads given: a patch that selects nothing is an error. Name (layer, head) pairs.")
    for head in heads:
        whole = all(isinstance(x, Integral) for x in head)
        if len(head) != 2 or not (whole and 0 <= head[0] < config.num_layers and 0 <= head[1] < config.num_heads):
            raise ValueError(
                f"Head {head} does not exist; this model has layers 0..{config.num_layers - 1} "
                f"and heads 0..{config.num_heads - 1}, written (layer, head)."
            )
        mask[head] = True
    return mask


def apply_patch(x: jax.Array, patch: Patch, layer: jax.Array) -> jax.Array:
    """Patches one layer's activation x [B, T, ...] with `patch` at that (traced) layer index."""
    weight = _at_layer(patch.weight, layer, rank=x.ndim)[..., None]
    value = _at_layer(patch.value, layer, rank=x.ndim + 1)
    if patch.positions is None:
        return mixed(x, weight, value, add=patch.add)
    example, position = jnp.arange(x.shape[0])[:, None], jnp.clip(patch.positions, 0, x.shape[1] - 1)
    exists = (position == patch.positions).reshape(*position.shape, *(1,) * (x.ndim - 2))
    new = mixed(x[example, position], weight, value, add=patch.add)  # [B, P, ...]
    return x.at[example, position].set(jnp.where(exists, new, jnp.nan))


def mixed(x: jax.Array, weight: jax.Array, value: jax.Array, *, add: bool = False) -> jax.Array:
    """What a `Patch` makes of x, in float32 where weights are numbers; shapes broadcast."""
    if weight.dtype == jnp.bool_:
        value = value.astype(x.dtype)
        return jnp.where(weight, x + value if add else value, x)
    x32, weight, value = (y.astype(jnp.float32) for y in (x, weight, value))
    return (x32 + weight * value if add else (1 - weight) * x32 + weight * value).astype(x.dtype)


def knocked_out(interventions: Interventions, layer: jax.Array) -> jax.Array | None:
    """The knockout mask of one layer, bool [B, T, N, S] or broadcastable to it."""
    return None if interventions.knockout is None else _at_layer(interventions.knockout, layer, rank=5)


def _at_layer(x: jax.Array, layer: jax.Array, rank: int) -> jax.Array:
    """Layer `layer` of x after padding its shape with leading ones to `rank` axes; axis L may have size 1."""
    x = jnp.asarray(x)
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    return jax.lax.dynamic_index_in_dim(x, 0 if x.shape[0] == 1 else layer, keepdims=False)


def _check_patch(config: Config, site: str, patch: Patch, tokens_shape: tuple[int, ...]) -> None:
    batch, length = tokens_shape
    for name in ("weight", "value", "positions"):
        if isinstance(getattr(patch, name), list | tuple):
            raise ValueError(f"Interventions.{site}.{name} is a list; expected an array, NumPy's or JAX's.")
    if patch.positions is not None:
        _check_positions(site, patch.positions, tokens_shape)
    count = length if patch.positions is None else np.shape(patch.positions)[-1]
    last = {"pattern": length}.get(site, config.head_dim if site in HEAD_SITES else config.width)
    full = (config.num_layers, batch, count) + ((config.num_heads,) if site in HEAD_SITES else ())
    _check_broadcast(f"{site}.weight", np.shape(patch.weight), full)
    _check_broadcast(f"{site}.value", np.shape(patch.value), (*full, last))
    by_layer = (config.num_layers, config.num_heads)
    if site in HEAD_SITES and count == config.num_layers > 1:
        for name, shape in (("weight", np.shape(patch.weight)), ("value", np.shape(patch.value)[:-1])):
            if shape == by_layer:
                raise ValueError(
                    f"Interventions.{site}.{name} begins with the axes {shape}, and there are as many positions as "
                    "layers. Write [L, 1, 1, N] for a number of each head, or [1, 1, P, N] for one of each position."
                )
    # NumPy's: an operator of JAX's would be traced where an array is closed over inside jit.
    if _concrete(patch.weight) and not np.asarray(patch.weight).any():
        raise ValueError(
            f"Interventions.{site}: every weight is 0, so nothing is patched. Leave the site out. (Of a function under "
            "jax.jit, weights that are arguments may be 0.)"
        )


def _check_positions(site: str, positions: jax.Array, tokens_shape: tuple[int, ...]) -> None:
    batch, length = tokens_shape
    shape, dtype = np.shape(positions), jnp.result_type(positions)
    if len(shape) != 2 or shape[0] != batch or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"Interventions.{site}.positions has shape {shape} and dtype {dtype}; "
            f"expected integers [B, P] with B={batch}, P >= 1."
        )
    if not _concrete(positions):
        return
    found = np.sort(np.asarray(positions), axis=1)
    if found.min() < 0 or found.max() >= length:
        raise ValueError(
            f"Interventions.{site}.positions reach from {found.min()} to {found.max()}; "
            f"the prompts have positions 0..{length - 1}."
        )
    if (found[:, 1:] == found[:, :-1]).any():
        example = int((found[:, 1:] == found[:, :-1]).any(axis=1).argmax())
        raise ValueError(
            f"Interventions.{site}.positions name a position twice in example {example}: {found[example].tolist()}."
        )


def _check_knockout(config: Config, knockout: jax.Array, tokens_shape: tuple[int, ...]) -> None:
    batch, length = tokens_shape
    _check_broadcast("knockout", np.shape(knockout), (config.num_layers, batch, length, config.num_heads, length))
    if (dtype := jnp.result_type(knockout)) != jnp.bool_:
        raise ValueError(f"Interventions.knockout has dtype {dtype}; expected bool, True where attention is forbidden.")
    if not _concrete(knockout):
        return
    mask = np.asarray(knockout).reshape((1,) * (5 - np.ndim(knockout)) + np.shape(knockout))
    if not (mask.any(axis=(0, 1, 3)) & np.tri(length, dtype=bool)).any():  # [T, S]
        raise ValueError(
            "Interventions.knockout forbids nothing: no key at or before its query is True. Leave it out, or check "
            "the order of the axes [L, B, T query, N, S key]."
        )


def _check_broadcast(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    if len(padded) != len(full) or any(a not in (1, b) for a, b in zip(padded, full, strict=True)):
        raise ValueError(f"Interventions.{name} has shape {tuple(shape)}; expected one that broadcasts to {full}.")


def _concrete(x: object) -> bool:
    return not isinstance(x, Tracer)
