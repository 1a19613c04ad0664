"""Floating-point arrays while they are read: are all numbers finite, and into place, cast, with their axes turned.

Owns what NumPy does slowly or with large temporary arrays, and must not, as every byte of a checkpoint passes here.
"""

import jax.numpy as jnp
import numpy as np

PAD = 64  # bytes


def is_finite(values: np.ndarray) -> bool:
    """Whether no number is infinite or NaN. Exact, and without a temporary array.

    Read as integers, the positive numbers that are not finite are those from infinity upwards, and so are the negative
    ones among the unsigned integers (IEEE 754; bfloat16 too). `np.isfinite` takes 20 times as long for bfloat16.
    """
    bits, sign = bits_of(values), 1 << (8 * values.itemsize - 1)
    infinity = int(bits_of(np.array(np.inf, values.dtype)))
    signed = bits.view(f"i{bits.itemsize}")
    return not values.size or bool(signed.max() < infinity and bits.max() < sign + infinity)


def bits_of(values: np.ndarray) -> np.ndarray:
    """The numbers' bits as unsigned integers, in the same memory."""
    return values.view(f"u{values.itemsize}")


def is_narrower(dtype: np.dtype, than: np.dtype) -> bool:
    """Whether finite numbers of the other dtype may be infinite in this one."""
    return bool(jnp.finfo(dtype).max < jnp.finfo(than).max)


def put(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Casts `values` to the dtype of `out`, an array of the same shape with any strides, and writes them to it.

    Returns:
      What was written, in the order of `values`.
    """
    rows = out
    if not out.flags.c_contiguous:
        # To turn axes is to read down columns. Where the length of rows is a power of two, as it often is, all numbers
        # of a column would have to share a few places of the cache, so the rows are first copied a little apart.
        pad = PAD // out.itemsize
        rows = np.empty((*out.shape[:-1], out.shape[-1] + pad), out.dtype)[..., :-pad]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result
        rows[...] = values
    if rows is not out:
        bits_of(out)[...] = bits_of(rows)  # NumPy is slow with dtypes that are not its own, such as bfloat16
    return rows
