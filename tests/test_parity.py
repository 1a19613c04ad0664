"""The plain forward pass against transformers' LlamaForCausalLM (eager attention): logits, sites, padding, bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_llama import FAMILIES, SIZES, hf_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import jaxmech as jm
from jaxmech.attention import attention_pattern
from jaxmech.model import norm

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 11))
HEADS = SIZES["num_attention_heads"]


@pytest.fixture
def both(tmp_path):
    """A function that makes a Hugging Face model, saves it and loads it here: (theirs, ours)."""

    def make(dtype: str = "float32", **changes):
        theirs = hf_model(dtype=getattr(torch, dtype), **changes)
        theirs.save_pretrained(tmp_path)
        return theirs, jm.load(tmp_path, dtype, precision="highest")

    return make


def hf_logits(model, tokens, **options) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), **options).logits.float().numpy()


def hf_sites(model, tokens) -> dict[str, np.ndarray]:
    """Every site's activation [L, B, T, ...], captured with hooks on the modules that make it."""
    kept: dict[str, list[np.ndarray]] = {}

    def keep(site, activation):
        kept.setdefault(site, []).append(activation.detach().numpy())

    handles = []
    for layer in model.model.layers:
        attention = layer.self_attn
        handles += [
            layer.register_forward_pre_hook(lambda _, x: keep("resid_pre", x[0])),
            attention.o_proj.register_forward_pre_hook(lambda _, x: keep("z", x[0])),
            attention.register_forward_hook(lambda _, x, y: keep("attn_out", y[0])),
            attention.register_forward_hook(lambda _, x, y: keep("pattern", y[1].transpose(1, 2))),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: keep("resid_mid", x[0])),
            layer.mlp.register_forward_hook(lambda _, x, y: keep("mlp_out", y)),
            layer.register_forward_hook(lambda _, x, y: keep("resid_post", y)),
        ]
        for site in ("q", "k", "v"):
            projection = getattr(attention, f"{site}_proj")
            handles.append(projection.register_forward_hook(lambda _, x, y, site=site: keep(site, y)))
    hf_logits(model, tokens)
    for handle in handles:
        handle.remove()
    return {site: np.stack(layers) for site, layers in kept.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(both, family):
    theirs, ours = both(**FAMILIES[family])
    logits, _ = ours(TOKENS)
    assert logits.dtype == np.float32
    assert_close(logits, hf_logits(theirs, TOKENS), TOLERANCES.parity)


@pytest.mark.parametrize("family", ["GQA", "attention bias", "head_dim independent of width"])
def test_every_captured_site_equals_the_one_hooked_in_transformers(both, family):
    theirs, ours = both(**FAMILIES[family])
    expected = hf_sites(theirs, TOKENS)
    _, captured = ours(TOKENS, capture=tuple(expected))
    assert set(expected) == set(jm.interventions.SITES)
    for site, activation in expected.items():
        if site in ("q", "k", "v", "z"):
            activation = activation.reshape(*activation.shape[:3], -1, ours.config.head_dim)
        if site in ("k", "v"):  # ours are per query head
            activation = np.repeat(activation, HEADS // ours.config.num_kv_heads, axis=3)
        assert_close(captured[site], activation, TOLERANCES.parity)


def test_right_padding_does_not_change_the_logits_of_real_tokens(both):
    theirs, ours = both()
    padded = np.concatenate([TOKENS, np.full((3, 4), 7)], axis=1)
    logits = ours(padded)[0][:, : TOKENS.shape[1]]
    assert_close(logits, ours(TOKENS)[0], TOLERANCES.recompiled)
    mask = torch.tensor([[1] * TOKENS.shape[1] + [0] * 4] * 3)
    assert_close(logits, hf_logits(theirs, padded, attention_mask=mask)[:, : TOKENS.shape[1]], TOLERANCES.parity)


def test_a_token_does_not_see_later_ones(both):
    _, ours = both()
    other = TOKENS.copy()
    other[:, 6:] = (other[:, 6:] + 1) % SIZES["vocab_size"]
    before, after = ours(TOKENS)[0], ours(other)[0]
    assert_close(after[:, :6], before[:, :6], TOLERANCES.exact)
    assert (np.abs(after - before)[:, 6:].max(axis=(0, 2)) > 0.1).all()


def test_the_norm_rounds_where_that_of_transformers_does(random_model):
    config = random_model().config.replace(dtype="bfloat16")
    x, weight = (torch.randn(size, generator=torch.manual_seed(0)).bfloat16() for size in ((100, 64), (64,)))
    theirs = LlamaRMSNorm(64, config.norm_eps)
    theirs.weight.data = weight
    ours = norm(config, *(jnp.asarray(a.float().numpy(), jnp.bfloat16) for a in (weight, x)))
    same = np.asarray(ours, np.float32) == theirs(x).detach().float().numpy()
    assert same.mean() > 0.99  # not 1: float32 means and roots may differ in the last bit


def test_scores_and_softmax_of_a_bfloat16_model_are_float32(random_model):
    config = random_model().config.replace(dtype="bfloat16")
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(64, config.num_heads, config.head_dim)) * 2, jnp.bfloat16) for _ in range(2))
    (found,) = attention_pattern(config, q, [(k, jnp.ones((64, 64), bool))])
    scores = np.einsum("tnh,snh->nts", *(np.asarray(x, np.float64) for x in (q, k))) * config.head_dim**-0.5
    expected = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    assert (np.asarray(found) == expected.astype(found.dtype)).mean() > 0.99  # one rounding, at the end


@pytest.mark.parametrize("family", ["GQA", "tied embeddings", "llama3 RoPE"])
def test_bfloat16_logits_are_close_to_those_of_transformers_in_bfloat16(both, family):
    theirs, ours = both("bfloat16", **FAMILIES[family])
    logits, captured = ours(TOKENS, capture=("resid_pre", "pattern"))
    assert logits.dtype == np.float32, "logits are float32 whatever the dtype"
    assert {x.dtype.name for x in captured.values()} == {"bfloat16"}
    assert_close(logits, hf_logits(theirs, TOKENS), TOLERANCES.bfloat16)


def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(both, tmp_path):
    theirs, ours = both("bfloat16")
    exact = jm.load(tmp_path, "float32", precision="highest")(TOKENS)[0]
    error, reference = (np.abs(x - exact).mean() for x in (ours(TOKENS)[0], hf_logits(theirs, TOKENS)))
    assert 0 < error < 1.1 * reference
