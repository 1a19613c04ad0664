"""The low-precision matrix products of GPUs and TPUs, on a CPU.

Tensor cores and matrix units round the numbers that they multiply to TF32 (10 bits behind the point) or bfloat16 (7),
multiply them exactly and add in float32; several such products of the parts of a float32 number make one of higher
precision (Henry, Tang and Heinecke 2019, arXiv:1904.06376). Rounded here in the same way, with float32 products of
whatever is left, they differ from the hardware's only in the order and the rounding of the sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

# Bits behind the point, and the parts that a number is split into; products of parts i and j are summed for
# i + j < parts: 1, 3 or 6 of them.
ALGORITHMS = {
    "TF32_TF32_F32": (10, 1),
    "TF32_TF32_F32_X3": (10, 2),
    "BF16_BF16_F32": (7, 1),
    "BF16_BF16_F32_X3": (7, 2),
    "BF16_BF16_F32_X6": (7, 3),
}


@contextmanager
def emulated() -> Iterator[None]:
    """Within, `jnp.einsum` of float32 numbers computes the algorithm that its `precision` names."""
    exact = jnp.einsum

    def einsum(spec, x, w, *, precision=None, **options):
        if precision not in ALGORITHMS:
            return exact(spec, x, w, precision=precision, **options)
        bits, count = ALGORITHMS[precision]
        pairs = [(i, j) for i in range(count) for j in range(count) if i + j < count]
        left, right = parts(x, bits, count), parts(w, bits, count)
        smallest_first = sorted(pairs, key=sum, reverse=True)
        return sum(exact(spec, left[i], right[j], precision="highest", **options) for i, j in smallest_first)

    jax.clear_caches()
    jnp.einsum = einsum
    try:
        yield
    finally:
        jnp.einsum = exact
        jax.clear_caches()


def parts(x: jax.Array, bits: int, count: int) -> list[jax.Array]:
    """x, or nearly, as a sum of `count` numbers with so many bits behind the point, largest first."""
    found = []
    for _ in range(count):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits))
        x = x - found[-1]
    return found
