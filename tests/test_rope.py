"""RoPE against transformers: frequencies, angles far out, and the rotation. Short prompts hide scaling bugs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_llama import LLAMA3, SIZES
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

import convert
import jaxmech as jm
from jaxmech import Rope, rope

KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "Llama 3, default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.4,
        "truncate": False,
    },
    "yarn without a band": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 700,
        "beta_slow": 660,  # even the first dimension turns less often, so that the band begins and ends there
    },
    "yarn with a band beyond both ends": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 5000,
        "beta_slow": 0.1,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": np.linspace(1, 2, 64).tolist(),
        "long_factor": np.linspace(1, 40, 64).tolist(),
        "original_max_position_embeddings": 4096,
    },
}
LIMITS = {"dynamic": 2048}  # of the context, where not 131072
POSITIONS = np.array([0, 1, 57, 4095, 4096, 5000, 8191, 16383])


@pytest.fixture(params=KINDS)
def both(request):
    """(transformers' rotary embedding, our config), head dim 128 as in the real models."""
    fields = {**SIZES, "head_dim": 128, "max_position_embeddings": LIMITS.get(request.param, 131072)}
    hf = LlamaConfig(**fields, rope_parameters=dict(KINDS[request.param]))
    return LlamaRotaryEmbedding(hf), convert.config_from_hf(hf.to_dict())


@pytest.mark.parametrize("length", [None, 100, 4096, 5000, 16384])
def test_inverse_frequencies_equal_those_of_transformers(both, length):
    theirs, config = both
    found = rope.inverse_frequencies(config.rope, config.head_dim, length)
    assert found.dtype == np.float32
    if length:
        theirs(torch.zeros(1), torch.arange(length)[None])  # some types change with the prompt's length
    expected = theirs.inv_freq.numpy()
    # Each: they span many magnitudes. The base of "dynamic" is a float32 in PyTorch, a float64 here and in the paper.
    tolerance = TOLERANCES.rope * (8 if config.rope.kind == "dynamic" else 1)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)


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
    for found, reference in zip(rope.rotations(config, jnp.asarray(POSITIONS), 16384)[0], expected, strict=True):
        assert_close(found, reference[0, :, :64].numpy(), TOLERANCES.angle)


def test_a_query_rotated_beyond_4096_equals_that_of_transformers(both):
    theirs, config = both
    x = np.random.default_rng(0).normal(size=(len(POSITIONS), 2, 128)).astype(np.float32)
    cos, sin = theirs(torch.zeros(1), torch.tensor(POSITIONS)[None])
    q = torch.tensor(x).transpose(0, 1)[None]  # [1, N, T, H]
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    found = rope.rotate(jnp.asarray(x), rope.rotations(config, jnp.asarray(POSITIONS), 16384)[0])
    assert_close(found, expected[0].transpose(0, 1).numpy(), TOLERANCES.angle)


def test_angles_are_computed_in_float32_for_a_bfloat16_model(both):
    _, config = both
    cos = rope.rotations(config.replace(dtype="bfloat16"), jnp.arange(257, 261))[0].cos
    assert cos.dtype == jnp.bfloat16
    assert len(set(np.asarray(cos[:, 0], np.float32))) == 4, "positions over 256 must not fall together"


def test_only_the_difference_of_positions_matters(both):
    _, config = both
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 128)).astype(np.float32)) for _ in range(2))

    def score(at_q, at_k):
        rotated = (rope.rotate(x, rope.rotations(config, jnp.array([at]))[0]) for x, at in ((q, at_q), (k, at_k)))
        return float(jnp.sum(next(rotated) * next(rotated)))

    assert abs(score(9, 4) - score(109, 104)) < 1e-3
    assert abs(score(9, 4) - score(109, 4)) > 0.1


def test_a_part_of_each_head_is_rotated_as_in_phi3():
    config = Phi3Config(
        **SIZES | {"hidden_size": 64},
        pad_token_id=0,
        rope_parameters=KINDS["default"] | {"partial_rotary_factor": 0.75},
    )
    theirs, ours = Phi3RotaryEmbedding(config), convert.config_from_hf(config.to_dict())
    x = np.random.default_rng(0).normal(size=(len(POSITIONS), 2, 16)).astype(np.float32)
    q = torch.tensor(x).transpose(0, 1)[None]
    expected, _ = modeling_phi3.apply_rotary_pos_emb(q, q, *theirs(torch.zeros(1), torch.tensor(POSITIONS)[None]))
    found = rope.rotate(jnp.asarray(x), rope.rotations(ours, jnp.asarray(POSITIONS))[0])
    assert_close(found, expected[0].transpose(0, 1).numpy(), TOLERANCES.angle)
    np.testing.assert_array_equal(found[..., 12:], x[..., 12:])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_methods_refuse_prompts_whose_frequencies_depend_on_their_length(random_model, random_pairs, kind):
    factors = {"short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4} if kind == "longrope" else {}
    model = random_model(rope=Rope(kind=kind, factor=2.0, original_max_positions=11, **factors))
    pairs = random_pairs(model)
    model(pairs.clean)
    with pytest.raises(ValueError, match=rf"12 tokens.*{kind}.*over 11 tokens.*shorten"):
        jm.path_patch(model, pairs)


def test_layers_rotate_by_the_embedding_that_they_have(random_model):
    """The other embedding only in its layers; none at all is the identity, in every bit."""
    config = random_model(other_rope=Rope(kind="none"), other_rope_layers=(1, 3)).config
    positions, x = (
        jnp.arange(5),
        jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, config.head_dim)), jnp.float32),
    )
    both = rope.rotations(config, positions)
    rotated = rope.rotate(x, both[0])
    assert np.abs(rotated - x).max() > 0.1
    for layer in range(4):
        found = rope.rotate(x, rope.of_layer(config, jnp.asarray(layer), both))
        np.testing.assert_array_equal(found, x if layer in (1, 3) else rotated)
        assert config.rope_of(layer) == (config.other_rope if layer in (1, 3) else config.rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"other_rope": Rope()}, "other_rope_layers=.*expected both or neither"),
        ({"other_rope_layers": (1,)}, "other_rope=None.*expected both or neither"),
        ({"other_rope": Rope(), "other_rope_layers": (4,)}, r"other_rope_layers=\(4,\); the layers are 0..3"),
        ({"other_rope": Rope(fraction=0.5), "other_rope_layers": (1,)}, "parts of different sizes"),
    ],
)
def test_another_rope_that_fits_no_layer_is_refused(random_model, changes, message):
    with pytest.raises(ValueError, match=message):
        random_model(**changes)


def test_a_rotated_part_is_at_most_a_head(random_model):
    with pytest.raises(ValueError, match="fraction is 1.5; expected at most 1"):
        Rope(fraction=1.5)
    with pytest.raises(ValueError, match="dynamic RoPE of one pair of dimensions is not defined"):
        random_model(head_dim=2, rope=Rope(kind="dynamic", factor=2.0))
    assert random_model(head_dim=4, rope=Rope(kind="dynamic", factor=2.0)).config.rope.kind == "dynamic"
