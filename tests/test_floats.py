"""Every number of a checkpoint passes `convert.floats`: it misses none that is not finite, and changes none."""

import ml_dtypes
import numpy as np
import pytest

from convert import floats

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_are_the_numbers_that_numpy_calls_finite(dtype):
    size = np.dtype(DTYPES[dtype]).itemsize
    bits = np.left_shift(BITS.astype(f"u{size}"), 8 * (size - 2))  # all signs and exponents
    numbers = np.concatenate([bits, bits + 1 if size > 2 else bits]).view(DTYPES[dtype])  # a NaN by its last bit alone
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(numbers)
    assert 0 < (~expected).sum() < len(expected)
    assert [floats.is_finite(numbers[i : i + 1]) for i in range(len(numbers))] == expected.tolist()
    assert floats.is_finite(numbers[expected]) and floats.is_finite(numbers[:0])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_in_many_that_is_not_finite_is_found(dtype, value):
    numbers = np.random.default_rng(0).normal(size=(50, 70)).astype(DTYPES[dtype])
    assert floats.is_finite(numbers) and floats.is_finite(numbers.T)
    numbers[31, 64] = value
    assert not floats.is_finite(numbers) and not floats.is_finite(numbers.T) and not floats.is_finite(numbers[:, 60:])


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_put_in_place_as_numpy_would_with_axes_turned_or_not(dtype, target):
    values = np.random.default_rng(0).normal(size=(6, 2, 64)).astype(DTYPES[dtype])
    expected = values.astype(DTYPES[target])
    straight, turned = np.zeros((9, 2, 64), DTYPES[target]), np.zeros((64, 9, 2), DTYPES[target])
    for whole in (straight, turned.transpose(1, 2, 0)):
        assert np.array_equal(floats.put(values, whole[1:7]), expected)
        assert np.array_equal(whole[1:7], expected)
        assert not whole[0].any() and not whole[7:].any()


def test_numbers_that_become_infinite_show_in_what_was_put():
    for dtype in ("float16", "bfloat16"):
        assert floats.is_narrower(np.dtype(DTYPES[dtype]), than=np.dtype(np.float32))
        assert not floats.is_narrower(np.dtype(np.float32), than=np.dtype(DTYPES[dtype]))
        out = np.zeros((3, 2), DTYPES[dtype]).T
        assert not floats.is_finite(floats.put(np.full((2, 3), 3.4e38, np.float32), out))
