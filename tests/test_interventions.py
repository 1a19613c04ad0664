"""What patches and the attention knockout do to the plain forward pass, at every site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import Interventions, Patch
from jaxmech.attention import FEW_KEYS, attention_pattern, mix_values
from jaxmech.interventions import HEAD_SITES, SITES

B, T = 3, 9
LAYERS, HEADS = 4, 4
EVERYWHERE = np.float32(1)


def one_layer(layer: int, site: str, weight: float = 1.0) -> np.ndarray:
    """A Patch.weight that is `weight` at one layer and 0 elsewhere."""
    chosen = np.zeros(LAYERS, np.float32)
    chosen[layer] = weight
    return chosen.reshape(LAYERS, 1, 1, 1) if site in HEAD_SITES else chosen.reshape(LAYERS, 1, 1)


def patched(site: str, *args) -> Interventions:
    return Interventions(**{site: Patch(*args)})


@pytest.fixture
def model(random_model) -> jm.Model:
    return random_model(num_kv_heads=2)  # grouped queries: heads 0, 1 and heads 2, 3 share keys and values


@pytest.fixture
def runs(model):
    """(tokens, every site's activation, logits) of two batches of prompts."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, model.config.vocab_size, (B, T)) for _ in range(2)]
    found = [(tokens, *model(tokens, capture=SITES)) for tokens in batches]
    return [(tokens, {site: np.asarray(x) for site, x in sites.items()}, logits) for tokens, logits, sites in found]


@pytest.mark.parametrize("site", SITES)
def test_patching_a_site_with_its_own_activation_changes_nothing(model, runs, site):
    (tokens, sites, logits), (_, other, _) = runs
    after, _ = model(tokens, patched(site, EVERYWHERE, sites[site]))
    assert_close(after, logits, TOLERANCES.recompiled)
    changed, _ = model(tokens, patched(site, EVERYWHERE, other[site]))
    assert np.abs(changed - logits).max() > 0.1, "the site must matter, or the test proves nothing"


@pytest.mark.parametrize("site", SITES)
def test_a_fractional_weight_mixes_at_its_layer_and_leaves_the_layers_below_alone(model, runs, site):
    (tokens, sites, _), (_, other, _) = runs
    _, found = model(tokens, patched(site, one_layer(2, site, 0.25), other[site]), capture=SITES)
    assert_close(found[site][2], 0.75 * sites[site][2] + 0.25 * other[site][2], TOLERANCES.recompiled)
    for name in SITES:
        assert_close(found[name][:2], sites[name][:2], TOLERANCES.recompiled)


@pytest.mark.parametrize(
    ("replaced", "follows"),
    [
        (("q", "k"), "pattern"),
        (("q", "k", "v"), "z"),
        (("pattern", "v"), "z"),
        (("z",), "attn_out"),
        (("resid_pre", "attn_out"), "resid_mid"),
        (("resid_mid",), "mlp_out"),
        (("resid_mid", "mlp_out"), "resid_post"),
    ],
)
def test_what_follows_from_replaced_sites_is_the_other_run(model, runs, replaced, follows):
    (tokens, _, _), (_, other, _) = runs
    interventions = Interventions(**{site: Patch(EVERYWHERE, other[site]) for site in replaced})
    _, found = model(tokens, interventions, capture=(follows,))
    assert_close(found[follows], other[follows], TOLERANCES.recompiled)


@pytest.mark.parametrize("replaced", [("resid_pre",), ("resid_mid",), ("resid_post",), SITES], ids="+".join)
def test_patching_the_whole_stream_with_another_run_gives_that_run(model, runs, replaced):
    (tokens, _, _), (_, other, expected) = runs
    logits, _ = model(tokens, Interventions(**{site: Patch(EVERYWHERE, other[site]) for site in replaced}))
    assert_close(logits, expected, TOLERANCES.recompiled)


@pytest.mark.parametrize("site", SITES)
def test_positions_are_patched_and_no_others(model, runs, site):
    (tokens, sites, _), (_, other, _) = runs
    positions = np.array([[2, 7], [5, 0], [8, 3]])
    rows = np.arange(B)[:, None]
    value = other[site][:, rows, positions]  # [L, B, P, ...]
    _, found = model(tokens, patched(site, one_layer(1, site), value, positions), capture=(site,))
    expected = sites[site][1].copy()
    expected[rows, positions] = value[1]
    assert_close(found[site][1], expected, TOLERANCES.recompiled)
    assert_close(np.asarray(found[site][1])[rows, positions], value[1], TOLERANCES.exact)


@pytest.mark.parametrize("site", HEAD_SITES)
def test_one_head_is_patched_alone(model, runs, site):
    """Under GQA, too: k and v are patched per query head, after the repeat."""
    (tokens, sites, _), (_, other, _) = runs
    weight = jm.head_weights(model.config, [(0, 1)])
    _, found = model(tokens, patched(site, weight, other[site]), capture=("z",))
    change = np.abs(np.asarray(found["z"][0]) - sites["z"][0]).max(axis=(0, 1, 3))
    assert change[1] > 0.1
    assert (change[[0, 2, 3]] <= TOLERANCES.recompiled).all(), "head 0 is of the same group as head 1"


@pytest.mark.parametrize("site", ["k", "v"])
def test_a_patched_query_head_of_a_group_acts_as_in_the_model_without_groups(model, runs, site):
    (tokens, _, _), (_, other, _) = runs
    blocks = dict(model.weights["blocks"])
    blocks |= {name: jnp.repeat(blocks[name], 2, axis=2) for name in ("k", "v")}
    ungrouped = jm.Model(model.config.replace(num_kv_heads=HEADS), {"params": {**model.weights, "blocks": blocks}})
    patch = patched(site, jm.head_weights(model.config, [(1, 2), (3, 1)]), other[site])
    assert_close(model(tokens, patch)[0], ungrouped(tokens, patch)[0], TOLERANCES.recompiled)


def block_key(query: int, key: int, from_layer: int = 0, heads=slice(None)) -> np.ndarray:
    knockout = np.zeros((LAYERS, 1, T, HEADS, T), bool)
    knockout[from_layer:, :, query, heads, key] = True
    return knockout


def test_knocked_out_attention_is_renormalised_over_the_other_keys(model, runs):
    (tokens, sites, _), _ = runs
    _, found = model(tokens, Interventions(knockout=block_key(6, 2)), capture=("pattern", "z"))
    expected = sites["pattern"][0].copy()  # [B, T, N, S]; layer 0: nothing has changed before it
    expected[:, 6, :, 2] = 0
    expected[:, 6] /= expected[:, 6].sum(axis=-1, keepdims=True)
    assert_close(found["pattern"][0], expected, TOLERANCES.recompiled)
    values = sites["v"][0]  # [B, S, N, H]
    assert_close(found["z"][0], np.einsum("btns,bsnh->btnh", expected, values), TOLERANCES.recompiled)


def test_knockout_acts_from_its_layer_on_and_on_its_heads_only(model, runs):
    (tokens, sites, _), _ = runs
    _, found = model(tokens, Interventions(knockout=block_key(6, 2, from_layer=2, heads=[1, 3])), capture=("pattern",))
    pattern = np.asarray(found["pattern"])
    assert_close(pattern[:2], sites["pattern"][:2], TOLERANCES.recompiled)
    assert (pattern[2:, :, 6, [1, 3], 2] == 0).all()
    assert (pattern[2:, :, 6, [0, 2], 2] > 0).all()
    assert_close(pattern[2, :, :, [0, 2]], sites["pattern"][2, :, :, [0, 2]], TOLERANCES.recompiled)


def test_a_query_with_no_key_left_attends_to_nothing(model, runs):
    (tokens, _, _), (other_tokens, _, _) = runs
    interventions = Interventions(knockout=block_key(0, 0))
    logits, found = model(tokens, interventions, capture=("pattern", "z"))
    assert (np.asarray(found["pattern"])[:, :, 0] == 0).all()
    assert (np.asarray(found["z"])[:, :, 0] == 0).all()
    other = np.concatenate([tokens[:, :1], other_tokens[:, 1:]], axis=1)
    assert_close(model(other, interventions)[0][:, 0], logits[:, 0], TOLERANCES.exact)  # it sees no later token


@pytest.mark.parametrize("full", [False, True])
def test_a_knockout_broadcasts(model, runs, full):
    (tokens, _, _), _ = runs
    small = np.zeros((T, 1, T), bool)
    small[4, 0, 1] = True
    wide = np.broadcast_to(small, (LAYERS, B, T, HEADS, T)) if full else small[None, None]
    expected, _ = model(tokens, Interventions(knockout=block_key(4, 1)))
    assert_close(model(tokens, Interventions(knockout=wide))[0], expected, TOLERANCES.recompiled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_prompts_of_few_tokens_are_the_start_of_longer_ones(random_model, dtype, kv_heads):
    """Attention to few keys is a sum, to more a matrix product."""
    model = random_model(num_kv_heads=kv_heads, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 50, (3, FEW_KEYS + 2))
    whole, _ = model(tokens)
    tolerance = TOLERANCES.recompiled if dtype == "float32" else TOLERANCES.bfloat16
    for length in (1, 3, FEW_KEYS - 1, FEW_KEYS):
        assert_close(model(tokens[:, :length])[0], whole[:, :length], tolerance)


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Attention as GPUs compute it, on whatever device there is."""

    def on_gpu(*x, default, cuda=None, **others):
        return (cuda or default)(*x)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpu)


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("tokens", [3, FEW_KEYS - 1, FEW_KEYS, 12])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_as_gpus_compute_it_is_that_of_einsum(random_model, kv_heads, tokens):
    config = random_model(num_kv_heads=kv_heads).config
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(5, tokens, heads, 8)).astype(np.float32) for heads in (4, kv_heads, kv_heads))
    allowed = np.tri(tokens, dtype=bool)
    (pattern,) = attention_pattern(config, q, [(k, allowed)])
    k, v_of_all = (np.repeat(x, 4 // kv_heads, axis=2) for x in (k, v))
    scores = np.where(allowed, np.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5, -np.inf)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert_close(pattern, expected, TOLERANCES.recompiled)
    z = mix_values(config, [(pattern, v)])
    assert_close(z, np.einsum("bnts,bsnh->btnh", expected, v_of_all), TOLERANCES.recompiled)


@pytest.mark.parametrize("tokens", [3, 12])
def test_gradients_of_attention_as_gpus_compute_it_are_those_of_others(random_model, request, tokens):
    config = random_model(num_kv_heads=2).config
    rng = np.random.default_rng(0)
    q, k, v, c = (rng.normal(size=(5, tokens, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4))

    def value(q, k, v):
        return (mix_values(config, [(attention_pattern(config, q, [(k, np.tri(tokens, dtype=bool))])[0], v)]) * c).sum()

    expected = jax.grad(value, (0, 1, 2))(q, k, v)
    request.getfixturevalue("as_on_gpus")
    for found, other in zip(jax.grad(value, (0, 1, 2))(q, k, v), expected, strict=True):
        assert np.abs(other).max() > 0.1
        assert_close(found, other, TOLERANCES.recompiled)


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sweeps_as_gpus_compute_attention_are_full_forwards(random_model, random_pairs, kv_heads):
    from full_forward import path_patch

    model = random_model(num_layers=5, num_kv_heads=kv_heads, norm_eps=2e-5)  # for which nothing is compiled yet
    pairs = random_pairs(model)
    for arguments in (("last", [(2, 1), (4, 0)], "q"), ("early", [(2, 1), (4, 0)], "v")):
        expected = path_patch(model, pairs, *arguments)
        assert_close(jm.path_patch(model, pairs, *arguments).per_example, expected, TOLERANCES.cone)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("cuda", 0), ("tpu", 2)])
def test_attention_to_few_keys_is_a_product_on_tpus(random_model, platform, products):
    """Whose compiler breaks off at some sums. On GPUs all are sums, on CPUs the scores are products."""
    config = random_model().config
    q = k = v = np.ones((2, 3, 4, 8), np.float32)

    def attend(q, k, v):
        return mix_values(config, list(zip(attention_pattern(config, q, [(k, True)]), [v], strict=True)))

    lowered = jax.jit(attend).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("dot_general") == products


def test_a_residual_stream_is_unembedded_as_the_model_does_it(model, runs):
    (tokens, _, _), _ = runs
    logits, captured = model(tokens, capture=("resid_post",))
    lens = model.unembed(captured["resid_post"])
    assert lens.shape == (LAYERS, *logits.shape) and lens.dtype == np.float32
    assert_close(lens[-1], logits, TOLERANCES.recompiled)
    assert np.abs(lens[0] - logits).max() > 0.1
    with pytest.raises(ValueError, match=r"resid has shape \(3, 7\); expected \[\.\.\., D\] with D = \d+"):
        model.unembed(np.zeros((3, 7)))


def test_numpy_parameters_are_put_on_the_device_once(model, runs):
    (tokens, expected, _), _ = runs
    host = jax.tree.map(np.asarray, model.params)
    found = jm.Model(model.config, host)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found.params))
    assert jm.Model(model.config, model.params).params["params"]["embed"] is model.params["params"]["embed"]
    assert_close(found(tokens)[0], model(tokens)[0], TOLERANCES.recompiled)


def test_the_linen_module_applied_to_params_is_the_model(model, runs):
    (tokens, _, _), (_, other, _) = runs
    interventions = patched("z", jm.head_weights(model.config, [(1, 0)]), other["z"])
    expected, sites = model(tokens, interventions, ("v", "resid_post"))
    logits, captured = model.module.apply(model.params, tokens, interventions, ("v", "resid_post"))
    assert_close(logits, expected, TOLERANCES.recompiled)
    assert set(captured) == set(sites)
    for site in sites:
        assert_close(captured[site], sites[site], TOLERANCES.recompiled)


def test_vmap_over_interventions_equals_a_loop(model, runs):
    (tokens, _, _), (_, other, _) = runs
    heads = [(0, 1), (1, 3), (2, 0), (3, 2)]
    weights = np.stack([jm.head_weights(model.config, [head]) for head in heads])

    def run(weight):
        patch = patched("z", weight, other["z"][:, :, -1:], np.full((B, 1), T - 1))
        return model.module.apply(model.params, tokens, patch)[0]

    together = jax.jit(jax.vmap(run))(weights)
    assert_close(together, np.stack([run(weight) for weight in weights]), TOLERANCES.recompiled)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_the_gradient_through_a_mask_over_heads_matches_finite_differences(model, runs):
    (tokens, _, _), (_, other, _) = runs

    @jax.jit
    def loss(mask):  # [L, N]
        patch = patched("z", mask[:, None, None, :], other["z"])
        logits, _ = model.module.apply(model.params, tokens, patch)
        return -jax.nn.log_softmax(logits[:, -1])[:, 7].mean()

    mask = jax.random.uniform(jax.random.key(0), (LAYERS, HEADS))
    gradient = jax.grad(loss)(mask)
    step = 0.003 * jnp.eye(LAYERS * HEADS).reshape(-1, LAYERS, HEADS)
    differences = jnp.array([loss(mask + s) - loss(mask - s) for s in step]) / 0.006
    assert_close(gradient.ravel(), differences, TOLERANCES.gradient)


@pytest.mark.parametrize("site", ["z", "resid_pre"])
def test_true_selects_and_false_leaves_alone_whatever_the_value_is(model, runs, site):
    (tokens, _, _), (_, other, _) = runs
    chosen = one_layer(1, site).astype(bool)
    value = np.where(np.arange(LAYERS).reshape(-1, *(1,) * (other[site].ndim - 1)) == 1, other[site], np.nan)
    found, expected = (model(tokens, patched(site, w, v))[0] for w, v in ((chosen, value), (1.0 * chosen, other[site])))
    assert_close(found, expected, TOLERANCES.recompiled)


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_added_vectors_act_on_what_earlier_ones_changed(model, runs, dtype):
    """Steering at two layers, step by step: the second adds to the stream that the first has changed."""
    (tokens, sites, _), _ = runs
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(LAYERS, 1, 1, model.config.width)).astype(np.float32)
    layers, positions = (1, 2), np.array([[3], [0], [8]])
    weight = sum(one_layer(layer, "resid_pre") for layer in layers).astype(dtype)
    steered = Interventions(resid_pre=Patch(weight, vectors, positions, add=True))
    rows = np.arange(B)[:, None]
    stream = sites["resid_pre"].copy()
    for layer in layers:
        stream[layer, rows, positions] += vectors[layer]
        replaced = patched("resid_pre", one_layer(layer, "resid_pre"), stream)
        logits, sites_now = model(tokens, replaced, capture=("resid_pre",))
        stream = np.array(sites_now["resid_pre"])
    assert_close(model(tokens, steered)[0], logits, TOLERANCES.recompiled)


def test_small_weights_are_not_rounded_away_in_low_precision(random_model):
    model = random_model(dtype="bfloat16")
    tokens = np.arange(B * T).reshape(B, T)
    z = np.asarray(model(tokens, capture=("z",))[1]["z"], np.float32)
    _, found = model(tokens, Interventions(z=Patch(np.float32(0.001), 100 * np.ones(1, np.float32))), capture=("z",))
    change = np.asarray(found["z"], np.float32)[0] - z[0]  # the first layer, which no other patch has changed
    assert abs(change.mean() - 0.1) < 0.005


def test_traced_positions_and_ids_that_do_not_exist_give_nan(model, runs):
    """Inside jit nothing can be refused; JAX would take the nearest position or token that there is."""
    (tokens, _, logits), (_, other, _) = runs

    @jax.jit
    def run(tokens, positions):
        patch = Patch(EVERYWHERE, other["z"][:, :, :1], positions)
        return model(tokens, Interventions(z=patch))[0]

    for wrong in (T, -1):
        found = np.asarray(run(tokens, np.array([[2], [wrong], [3]])))
        assert np.isfinite(found[[0, 2]]).all() and np.isnan(found[1, -1]).all()
    for wrong in (model.config.vocab_size, -1):
        changed = tokens.copy()
        changed[1, 4] = wrong
        found = np.asarray(jax.jit(lambda x: model(x)[0])(changed))
        assert np.isnan(found[1]).all()
        assert_close(np.delete(found, 1, 0), np.delete(np.asarray(logits), 1, 0), TOLERANCES.recompiled)


def test_activations_and_logits_at_some_positions_are_those_of_all(model, runs):
    (tokens, sites, logits), _ = runs
    at, last, rows = np.array([[1, 7], [0, 3], [8, 2]]), np.array([8, 3, 5]), np.arange(B)
    found, kept = model(tokens, capture=("k", "resid_post"), capture_at=at, logits_at=last)
    assert_close(found, np.asarray(logits)[rows, last], TOLERANCES.recompiled)
    same, _ = model.module.apply(model.params, tokens, logits_at=last)
    assert_close(same, found, TOLERANCES.recompiled)
    for site, x in kept.items():
        assert_close(x, sites[site][:, rows[:, None], at], TOLERANCES.recompiled)
    for options, message in (
        ({"logits_at": np.full(B, T)}, "logits_at reaches from 9 to 9; the prompts have positions 0..8"),
        ({"logits_at": at}, r"logits_at has shape \(3, 2\) .*expected integers \[3\]"),
        ({"capture_at": at - 1}, "capture_at reaches from -1 to 7"),
        ({"capture_at": 1.0 * at}, r"capture_at .*float32; expected integers \[3, P\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, capture=("z",), **options)


def test_a_model_has_the_parameters_of_its_config(model):
    for change, message in (
        ({"num_layers": 3}, r"blocks.attn_norm is \[4, .*calls for \[3, "),
        ({"qk_norm": "head"}, "blocks.k_norm is missing"),
        ({"tie_embeddings": True}, "unembed is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            jm.Model(model.config.replace(**change), model.params)
    with pytest.raises(ValueError, match=r"params is \['blocks', .*expected \{'params': tree\}"):
        jm.Model(model.config, model.weights)
    assert repr(model) == "Model(llama, 4 layers, 4 heads, width 24, vocabulary 50, float32)"


def test_a_fine_tune_that_states_another_context_shares_what_is_compiled(model):
    from jaxmech.accuracy import _answers

    pairs = jm.Pairs(np.zeros((7, 5), int), None, np.zeros(7, int), {"last": np.full(7, 4)})
    jm.predict(model, pairs)
    before = _answers._cache_size()
    jm.predict(jm.Model(model.config.replace(max_positions=4096, family="mistral"), model.params), pairs)
    assert _answers._cache_size() == before
    jm.predict(jm.Model(model.config.replace(norm_eps=1e-5), model.params), pairs)
    assert _answers._cache_size() == before + 1
