"""Products in the dtype and precision that a config asks for. Axes as in `jaxmech.model`."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmech.config import Config


def einsum(config: Config, spec: str, x: jax.Array, w: jax.Array, out: Any = None) -> jax.Array:
    """einsum in the compute dtype and, if that is float32, the config's precision; `out` is the result's dtype."""
    precision = config.precision if x.dtype == jnp.float32 and config.precision != "default" else None
    return jnp.einsum(spec, x, w.astype(x.dtype), precision=precision, preferred_element_type=out or x.dtype)


def affine(config: Config, spec: str, x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
    """einsum and, if there is one, the bias, which is added before the sum is rounded to the compute dtype."""
    if bias is None:
        return einsum(config, spec, x, w)
    return (einsum(config, spec, x, w, out=jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def capped(cap: float, x: jax.Array) -> jax.Array:
    """x, kept between -cap and cap by a tanh (Gemma 2's soft-capping); a cap of 0 is none."""
    return cap * jnp.tanh(x / cap) if cap else x
