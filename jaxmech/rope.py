"""Rotary position embeddings: frequencies, angles and the rotation of queries and keys.

Follows Hugging Face's convention, in which dimension i is paired with dimension i + H/2
(`transformers.models.llama.modeling_llama.rotate_half`, `transformers.modeling_rope_utils`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.config import Config, Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per token of each rotated pair of dimensions, float32 [H/2], radians.

    Source: `ROPE_INIT_FUNCTIONS` of `transformers.modeling_rope_utils`, with its operations in its order: the last bit
    of a frequency is an angle of 0.001 at position 16000.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # PyTorch's float32 power is correctly rounded here, NumPy's is not; the float64 power, rounded, is.
    power = (float(rope.theta) ** exponent.astype(np.float64)).astype(np.float32)
    frequency = 1 / power
    if rope.kind == "linear":
        frequency = frequency / np.float32(rope.factor)
    if rope.kind == "llama3":
        frequency = _llama3(rope, frequency)
    return frequency


def _llama3(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, a band between them interpolated."""
    turns = rope.original_max_positions / (2 * np.pi / frequency)  # full turns within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * frequency / rope.factor + keep * frequency


def angles(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotation at `positions` [..., T], each in the compute dtype, [..., T, H/2].

    Angles are float32: in bfloat16, positions over 256 could not be told apart.
    """
    frequency = inverse_frequencies(config.rope, config.head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(config.compute_dtype), jnp.sin(angle).astype(config.compute_dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates queries or keys x [..., T, N, H] by the angles cos, sin [..., T, H/2]."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]  # one rotation for all heads
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
