"""RoPE against transformers: frequencies, angles far out, and the rotation. Short prompts hide scaling bugs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_llama import LLAMA3, SIZES
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import convert
from jaxmech import Rope, rope

KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "Llama 3, default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
}
POSITIONS = np.array([0, 1, 57, 4095, 4096, 5000, 8191, 16383])


@pytest.fixture(params=KINDS)
def both(request):
    """(transformers' rotary embedding, our config), head dim 128 as in the real models."""
    fields = {**SIZES, "head_dim": 128, "max_position_embeddings": 131072}
    hf = LlamaConfig(**fields, rope_parameters=dict(KINDS[request.param]))
    return LlamaRotaryEmbedding(hf), convert.config_from_hf(hf.to_dict())


def test_inverse_frequencies_equal_those_of_transformers(both):
    theirs, config = both
    found = rope.inverse_frequencies(config.rope, config.head_dim)
    assert found.dtype == np.float32
    expected = theirs.inv_freq.numpy()
    np.testing.assert_allclose(found, expected, rtol=TOLERANCES.rope, atol=0)  # each: they span many magnitudes


def test_llama3_keeps_divides_and_interpolates():
    plain = Rope(theta=500000.0)
    scaled = dataclasses.replace(plain, kind="llama3", factor=8.0, original_max_positions=8192)
    ratio = rope.inverse_frequencies(plain, 128) / rope.inverse_frequencies(scaled, 128)
    kept, divided = np.isclose(ratio, 1), np.isclose(ratio, 8)
    assert kept[0] and divided[-1]
    assert 0 < (~kept & ~divided).sum() < 10
    assert (np.diff(ratio) >= -1e-5).all()


def test_angles_beyond_4096_equal_those_of_transformers(both):
    theirs, config = both
    expected = theirs(torch.zeros(1), torch.tensor(POSITIONS)[None])
    for found, reference in zip(rope.angles(config, jnp.asarray(POSITIONS)), expected, strict=True):
        assert_close(found, reference[0, :, :64].numpy(), TOLERANCES.angle)


def test_a_query_rotated_beyond_4096_equals_that_of_transformers(both):
    theirs, config = both
    x = np.random.default_rng(0).normal(size=(len(POSITIONS), 2, 128)).astype(np.float32)
    cos, sin = theirs(torch.zeros(1), torch.tensor(POSITIONS)[None])
    q = torch.tensor(x).transpose(0, 1)[None]  # [1, N, T, H]
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    found = rope.rotate(jnp.asarray(x), *rope.angles(config, jnp.asarray(POSITIONS)))
    assert_close(found, expected[0].transpose(0, 1).numpy(), TOLERANCES.angle)


def test_angles_are_computed_in_float32_for_a_bfloat16_model(both):
    _, config = both
    cos, _ = rope.angles(config.replace(dtype="bfloat16"), jnp.arange(257, 261))
    assert cos.dtype == jnp.bfloat16
    assert len(set(np.asarray(cos[:, 0], np.float32))) == 4, "positions over 256 must not fall together"


def test_only_the_difference_of_positions_matters(both):
    _, config = both
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 128)).astype(np.float32)) for _ in range(2))

    def score(at_q, at_k):
        rotated = (rope.rotate(x, *rope.angles(config, jnp.array([at]))) for x, at in ((q, at_q), (k, at_k)))
        return float(jnp.sum(next(rotated) * next(rotated)))

    assert abs(score(9, 4) - score(109, 104)) < 1e-3
    assert abs(score(9, 4) - score(109, 4)) > 0.1
