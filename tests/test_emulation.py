"""Low-precision products emulated on a CPU have the errors that their formats allow, and nothing else changes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from emulation import ALGORITHMS, emulated  # noqa: E402

from jaxmech import config as configs  # noqa: E402
from jaxmech.arithmetic import einsum  # noqa: E402


def product(random_model, precision: str, x, w):
    config = random_model().config.replace(precision=precision)
    return np.asarray(jax.jit(lambda x, w: einsum(config, "ij,jk->ik", x, w))(x, w), np.float64)


@pytest.fixture
def factors():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((32, 256), (256, 32)))


def test_every_algorithm_of_the_config_is_emulated():
    assert set(ALGORITHMS) == {name for name in configs.PRECISIONS if name.isupper()}


@pytest.mark.parametrize(
    ("precision", "bits"),
    [
        ("TF32_TF32_F32", 11),
        ("BF16_BF16_F32", 8),
        ("BF16_BF16_F32_X3", 16),
        ("TF32_TF32_F32_X3", 20),
        ("BF16_BF16_F32_X6", 20),
    ],
)
def test_errors_are_those_of_so_many_bits(random_model, factors, precision, bits):
    """A sum of n products that are each off by up to 2^-bits is off by about that of its terms' root mean square.

    Above 20 bits, the rounding of float32 sums is larger.
    """
    x, w = factors
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    with emulated():
        found = product(random_model, precision, x, w)
    error = np.sqrt(np.mean((found - exact) ** 2)) / np.sqrt(np.mean(exact**2))
    assert error < 2.0**-bits
    assert error > 2.0 ** -(bits + 3) or bits == 20


def test_bfloat16_products_are_those_of_rounded_factors(random_model, factors):
    x, w = factors
    rounded = [y.astype(jnp.bfloat16).astype(jnp.float32) for y in factors]
    with emulated():
        found = product(random_model, "BF16_BF16_F32", x, w)
    np.testing.assert_array_equal(found, product(random_model, "highest", *rounded))


def test_other_products_stay_as_they_are(random_model, factors):
    """Also those of bfloat16 numbers, whatever the precision is called; and so do all when it is over."""
    x, w = factors
    exact, low = product(random_model, "highest", x, w), [y.astype(jnp.bfloat16) for y in factors]
    plain = product(random_model, "default", *low)
    with emulated():
        np.testing.assert_array_equal(product(random_model, "highest", x, w), exact)
        np.testing.assert_array_equal(product(random_model, "BF16_BF16_F32_X3", *low), plain)
    np.testing.assert_array_equal(product(random_model, "BF16_BF16_F32_X3", x, w), exact)
