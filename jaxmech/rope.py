"""Rotary position embeddings: frequencies, angles and the rotation of queries and keys.

Follows Hugging Face's convention, in which dimension i is paired with dimension i + H/2
(`transformers.models.llama.modeling_llama.rotate_half`, `transformers.modeling_rope_utils`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.config import Config, Rope


def inverse_frequencies(rope: Rope, head_dim: int, length: int | None = None) -> np.ndarray:
    """Angle per token of each rotated pair of dimensions, float32 [H/2], radians.

    Args:
      length: tokens of the prompt, on which "dynamic" and "longrope" depend; None: within the original context.

    Source: `ROPE_INIT_FUNCTIONS` of `transformers.modeling_rope_utils`, with its operations in its order: the last bit
    of a frequency is an angle of 0.001 at position 16000.
    """
    size = rope.rotated(head_dim)
    if rope.kind == "none":
        return np.zeros(size // 2, np.float32)
    if rope.kind == "longrope":
        long = length is not None and length > rope.original_max_positions
        factors = np.array(rope.long_factors if long else rope.short_factors, np.float32)
        return 1 / (factors * _powers(rope.theta, size))
    if rope.kind == "dynamic":
        return 1 / _powers(_dynamic_theta(rope, size, length), size)
    powers = _powers(rope.theta, size)
    if rope.kind == "yarn":
        return _yarn(rope, powers)
    if rope.kind == "llama3":
        return _llama3(rope, 1 / powers)
    return 1 / powers / np.float32(rope.factor if rope.kind == "linear" else 1)


def _powers(theta: float, size: int) -> np.ndarray:
    """theta to the power of 0, 2 / size, 4 / size, ..."""
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    # PyTorch's float32 power is correctly rounded here, NumPy's is not; the float64 power, rounded, is.
    return (float(theta) ** exponent.astype(np.float64)).astype(np.float32)


def _dynamic_theta(rope: Rope, size: int, length: int | None) -> float:
    """The base for a prompt of that length: the larger, the longer it is than the original context."""
    longer = max(length or 0, rope.original_max_positions) / rope.original_max_positions
    return rope.theta * (rope.factor * longer - (rope.factor - 1)) ** (size / (size - 2))


def _llama3(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, a band between them interpolated."""
    turns = rope.original_max_positions / (2 * np.pi / frequency)  # full turns within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * frequency / rope.factor + keep * frequency


def _yarn(rope: Rope, powers: np.ndarray) -> np.ndarray:
    """As `_llama3`, with a band in dimensions instead of turns (`_compute_yarn_parameters`)."""
    size = 2 * len(powers)

    def dimension(turns: float) -> float:
        """The dimension whose frequency turns so often within the original context."""
        return size * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    stretch = np.clip((np.arange(len(powers), dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = 1 - stretch
    return (1 / (np.float32(rope.factor) * powers)) * (1 - keep) + (1 / powers) * keep


class Rotation(NamedTuple):
    """cos and sin of the angles of R rotated dimensions."""

    cos: jax.Array  # [..., T, R/2]
    sin: jax.Array  # [..., T, R/2]


def rotations(config: Config, positions: jax.Array, length: int | None = None) -> tuple[Rotation, ...]:
    """The rotation at `positions` [..., T] by each of the model's embeddings, in the compute dtype.

    Angles are float32: in bfloat16, positions over 256 could not be told apart. `length` as in `inverse_frequencies`.
    """
    return tuple(_rotation(config, rope, positions, length) for rope in config.ropes)


def _rotation(config: Config, rope: Rope, positions: jax.Array, length: int | None) -> Rotation:
    frequency, factor = inverse_frequencies(rope, config.head_dim, length), rope.attention_factor
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    return Rotation(cos.astype(config.compute_dtype), sin.astype(config.compute_dtype))


def of_layer(config: Config, layer: jax.Array | int, rotations: Sequence[Rotation]) -> Rotation:
    """The one of `rotations`, in the order of `config.ropes`, by which a layer rotates."""
    if config.other_rope is None:
        return rotations[0]
    is_other = jnp.isin(jnp.asarray(layer), jnp.asarray(config.other_rope_layers, jnp.int32))
    rope, other = rotations
    return Rotation(*(jnp.where(is_other, y, x) for x, y in zip(rope, other, strict=True)))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates queries or keys x [..., T, N, H]; of each head, the dimensions from R on stay as they are."""
    half = rotation.cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]  # one rotation for all heads
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
