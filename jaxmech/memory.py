"""How much memory a call may fill, and what its parts take: sweeps split themselves into chunks that fit the budget.

Sizes are in bytes, of activations in the compute dtype; what is counted is what XLA would hold at most, in a layer.
"""

import warnings
from functools import cache
from typing import Any

import jax

from jaxmech.config import Config
from jaxmech.sharding import devices_of

CPU_BUDGET = 2**30  # bytes; a CPU reports no limit, and larger chunks are not faster there
DEVICE_FRACTION = 0.5  # of what is free; the rest is for what XLA needs besides the arrays that are counted


def budget(weights: Any) -> int:
    """Bytes of activations that one call may hold on each device that has the parameters `weights`.

    That with the least free memory counts; of parameters that are on none, the first device. Accelerators that do not
    report their memory have the budget of a CPU, which is warned of once.
    """
    devices = devices_of(weights) or jax.local_devices()[:1]
    stats = [device.memory_stats() or {} for device in devices]
    free = [x["bytes_limit"] - x.get("bytes_in_use", 0) for x in stats if "bytes_limit" in x]
    if free:
        return int(DEVICE_FRACTION * min(free))
    if devices[0].platform != "cpu":
        _warn_of_no_limit(devices[0].platform)
    return CPU_BUDGET


@cache  # once for each platform
def _warn_of_no_limit(platform: str) -> None:
    warnings.warn(
        f"The {platform} does not report how much memory it has, so calls hold {CPU_BUDGET / 2**30:g} GiB of "
        "activations at most, as on a CPU, and there may be many small ones. Give batch_size, or let JAX allocate "
        "memory as it does by default: unset XLA_PYTHON_CLIENT_ALLOCATOR.",
        stacklevel=3,
    )


def of_tokens(config: Config, count: float) -> float:
    """Tokens in one layer: their stream, heads and MLP, without attention."""
    heads = config.num_heads * config.head_dim
    return config.compute_dtype.itemsize * count * (4 * config.width + 3 * config.mlp_width + 4 * heads)


def of_forward(config: Config, tokens: float) -> float:
    """A layer of a forward pass of a prompt of so many tokens."""
    return of_tokens(config, tokens) + of_attention(config, tokens, tokens)


def of_attention(config: Config, queries: float, keys: float) -> float:
    """Attention of one prompt in one layer: scores and their exponentials in float32, and the pattern."""
    return (8 + config.compute_dtype.itemsize) * config.num_heads * queries * keys


def of_streams(config: Config, tokens: float, layers: int) -> float:
    """The residual stream at so many tokens, kept for `layers` layers."""
    return config.compute_dtype.itemsize * layers * tokens * config.width


def of_heads(config: Config, tokens: float, layers: int) -> float:
    """z, or q, of all heads at so many tokens, kept for `layers` layers."""
    return config.compute_dtype.itemsize * layers * tokens * config.num_heads * config.head_dim


def of_keys_and_values(config: Config, tokens: float, layers: int) -> float:
    """Keys and values of so many tokens, kept for `layers` layers."""
    return 2 * config.compute_dtype.itemsize * layers * tokens * config.num_kv_heads * config.head_dim


def of_live_sweep(config: Config, length: float, tokens: int, rows: float) -> float:
    """One example of a sweep on the causal cone: its clean cache, and what runs it or its live streams.

    Args:
      length: tokens of its suffix.
      tokens: of its prompt.
      rows: streams that run at a time.
    """
    layers = config.num_layers
    cache = of_keys_and_values(config, tokens, layers) + of_streams(config, length, layers)
    stream = of_tokens(config, length) + of_attention(config, length, tokens) + of_logits(config)
    return cache + max(of_forward(config, tokens), rows * stream)


def of_logits(config: Config) -> float:
    """The logits of one token and their exponentials, in float32."""
    return 8 * config.vocab_size


def fitting_prompts(config: Config, weights: Any, tokens: int) -> int:
    """Prompts of so many tokens whose full forward pass, activations of a layer and logits of one token each, fits."""
    return fitting(weights, of_forward(config, tokens) + of_logits(config))


def fitting(weights: Any, bytes_each: float) -> int:
    """How many items of `bytes_each` fit the budget beside the parameters `weights`; at least 1."""
    return max(1, int(budget(weights) / bytes_each))
