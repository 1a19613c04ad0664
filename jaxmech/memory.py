"""How much memory a call may fill: sweeps split themselves into chunks that fit this budget."""

from typing import Any

import jax

CPU_BUDGET = 2**30  # bytes; a CPU reports no limit, and larger chunks are not faster there
DEVICE_FRACTION = 0.5  # of what is free; the rest is for what XLA needs besides the arrays that are counted


def budget(device: Any = None) -> int:
    """Bytes of activations that one call may hold on the jax device `device`, the first one by default."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_BUDGET
    return int(DEVICE_FRACTION * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
