"""Arrays in the host's memory, filled by whoever reads parameters and then given to JAX, on the CPU without a copy."""

import math

import numpy as np

ALIGNMENT = 64  # bytes; JAX on the CPU takes an array over as it is, if it starts at a multiple of it


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of any content, aligned for JAX."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
