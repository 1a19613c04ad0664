"""What families other than Llama compute otherwise, in every method: fast paths against plain full forward passes.

The plain forward pass itself is compared with transformers in test_parity.py.
"""

import full_forward
import numpy as np
import optax
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech.attention import visible

FEATURES = {
    "Gemma 2: windows in some layers, caps, norms before and after": {
        "norm_style": "gemma",
        "post_norm": True,
        "window": 4,
        "full_layers": (1, 2),
        "score_cap": 3.0,
        "logit_cap": 6.0,
        "score_scale": 0.3,
        "embed_scale": 1.7,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "num_kv_heads": 2,
    },
    "Qwen: norm of each head's q and k, biases of q, k and v, windows": {
        "qk_norm": "head",
        "attention_bias": True,
        "window": 5,
        "num_kv_heads": 2,
    },
    "OLMo 2: norms after, norm of all heads' q and k": {
        "norm_style": "float32",
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": "all",
        "num_kv_heads": 2,
    },
    "Gemma 3: another RoPE in the layers that have a window": {
        "norm_style": "gemma",
        "post_norm": True,
        "qk_norm": "head",
        "window": 4,
        "full_layers": (1, 3),
        "rope": jm.Rope(theta=1e6, kind="linear", factor=8.0),
        "other_rope": jm.Rope(),
        "other_rope_layers": (0, 2),
        "num_kv_heads": 2,
    },
    "SmolLM3: layers without RoPE": {
        "other_rope": jm.Rope(kind="none"),
        "other_rope_layers": (1, 3),
        "num_kv_heads": 2,
    },
    "Granite: multipliers; Phi-3: a part of each head rotated": {
        "embed_scale": 2.0,
        "residual_scale": 0.4,
        "score_scale": 0.5,
        "logit_divisor": 1.5,
        "rope": jm.Rope(fraction=0.5),
        "output_bias": True,
    },
}
RECEIVERS = [(1, 2), (3, 0), (3, 1)]
CIRCUIT = {"last": [(0, 1), (2, 3), (2, 0)], "query_box": [(1, 2), (2, 3)], "early": [(0, 0), (3, 1)]}


@pytest.fixture(params=FEATURES.values(), ids=[name.split(":")[0] for name in FEATURES])
def models(request, random_model) -> tuple[jm.Model, jm.Model]:
    return tuple(random_model(seed, **request.param) for seed in (4, 5))


@pytest.fixture
def pairs(models, random_pairs) -> jm.Pairs:
    return random_pairs(models[0])


@pytest.mark.parametrize(
    ("sender", "receivers", "via"),
    [
        ("last", None, None),
        ("last", RECEIVERS, "q"),
        ("query_box", RECEIVERS, "v"),
        ("early", RECEIVERS, "k"),
        (["early", "query_box"], RECEIVERS, "v"),
    ],
)
def test_path_patching_equals_full_forwards(models, pairs, sender, receivers, via):
    expected = full_forward.path_patch(models[0], pairs, sender, receivers, via)
    assert np.abs(expected).max() > 0.02, "scores too small to compare"
    assert_close(jm.path_patch(models[0], pairs, sender, receivers, via).per_example, expected, TOLERANCES.cone)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
def test_circuits_equal_full_forwards(models, pairs, random_pairs, elsewhere):
    means = jm.mean_activations(models[0], random_pairs(models[0], count=9, seed=5).clean)
    found = jm.evaluate(models[0], pairs, [CIRCUIT], means, elsewhere).logits
    assert_close(found[0], full_forward.evaluate(models[0], pairs, CIRCUIT, means, elsewhere), TOLERANCES.cone)


def test_activation_patching_equals_full_forwards(models, pairs):
    found = jm.patch_activations(models[0], pairs, CIRCUIT).logits
    assert_close(found, full_forward.from_corrupt(models[0], pairs, CIRCUIT), TOLERANCES.cone)


@pytest.mark.parametrize("components", [("z",), ("q", "k", "v")])
def test_cross_model_patching_equals_full_forwards(models, pairs, components):
    base, tuned = models
    found = jm.cmap(base, tuned, pairs, CIRCUIT, components).logits
    assert_close(found, full_forward.from_model(base, tuned, pairs, CIRCUIT, components), TOLERANCES.cone)
    sweep = jm.cmap_heads(base, tuned, pairs, "early", components)
    one = jm.cmap(base, tuned, pairs, {"early": [(1, 2)]}, components)
    rows, clean = np.arange(len(pairs)), full_forward.last_logits(base, pairs)
    before, after = (
        np.asarray(optax.losses.softmax_cross_entropy_with_integer_labels(x, pairs.labels)) for x in (clean, one.logits)
    )
    assert np.abs(after - before).max() > 1e-3, "an effect too small to compare"
    assert_close(sweep.scores.per_example[1, 2, rows], np.exp(before - after) - 1, 1e-3)


@pytest.mark.parametrize("sources", [["last"], ["query_box", "last"]], ids=str)
def test_knockouts_equal_full_forwards(models, pairs, sources):
    p = [pairs.position(role) for role in sources]
    target = p[0] - np.array([1, 2, 3, 5, 6])[: len(pairs)]  # within and beyond the windows
    keys = np.arange(pairs.clean.shape[1]) == target[:, None]
    if len(sources) > 1:
        keys |= np.arange(pairs.clean.shape[1]) == p[0][:, None] + 1  # between the sources
    found = jm.knockout(models[0], pairs, sources, keys).logits
    expected = [full_forward.knocked_out(models[0], pairs, p, keys, slice(start, None)) for start in range(4)]
    assert_close(found, expected, TOLERANCES.cone)


def test_dcm_learns_as_on_full_forwards(models, pairs):
    """The first loss is that of the model itself, the next that of the patched one; lambda rewards patching here."""
    heads = [(0, 1), (2, 3), (3, 0)]
    run = jm.dcm.train(models[0], pairs, heads, "early", lam=-1.0, epochs=2, batch_size=len(pairs))
    z = np.asarray(models[0](pairs.corrupt, capture=("z",))[1]["z"])
    rows, p = np.arange(len(pairs)), pairs.position("early")
    value = z[:, rows, pairs.corrupt_position("early")][:, :, None]  # [L, B, 1, N, H]
    for mask, loss in zip(([1, 1, 1], run.history.mask[0]), run.history.loss, strict=True):
        weight = np.zeros((4, 1, 1, 4), np.float32)
        weight[tuple(np.array(heads).T[[0]]), 0, 0, np.array(heads).T[1]] = 1 - np.array(mask)
        patch = jm.Interventions(z=jm.Patch(weight, value, p[:, None])) if weight.any() else None
        logits = full_forward.last_logits(models[0], pairs, patch)
        assert_close([loss], [-logits[rows, pairs.labels].mean() - weight.sum()], TOLERANCES.cone)
    assert (run.history.mask[0] < 1).any(), "no head was patched"


def test_a_window_hides_what_is_further_back_in_the_layers_that_have_one(random_model):
    config = random_model(window=3, full_layers=(1,)).config
    position = np.arange(5)
    windowed, full = (np.asarray(visible(config, layer, position, position))[0] for layer in (0, 1))
    distance = position[:, None] - position
    np.testing.assert_array_equal(full, distance >= 0)
    np.testing.assert_array_equal(windowed, (distance >= 0) & (distance < 3))
