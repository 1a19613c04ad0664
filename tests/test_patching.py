"""Patching across prompts and models, and knockouts: equal to full forward passes, with their identities."""

import weakref
from importlib import import_module

import full_forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close, assert_correct, right_in_turn
from safetensors.numpy import save, save_file

import jaxmech as jm
from jaxmech import compat, compiled_sizes
from jaxmech.metrics import METRICS

# The functions jm.cmap and jm.knockout have the names of their modules.
HEAD_SWEEP, KNOCKOUT = (import_module(f"jaxmech.{name}") for name in ("head_sweep", "knockout"))

HEADS = {"last": [(0, 1), (2, 3), (2, 0)], "query_box": [(1, 2), (2, 3)], "early": [(0, 0), (1, 3)]}
COMPONENTS = [("z",), ("q",), ("k",), ("k", "v"), ("q", "k", "v")]


def every_head(model: jm.Model) -> list[tuple[int, int]]:
    return list(np.ndindex(model.config.num_layers, model.config.num_heads))


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def models(request, random_model) -> tuple[jm.Model, jm.Model]:
    return tuple(random_model(seed, num_kv_heads=request.param) for seed in (4, 5))


@pytest.fixture
def pairs(models, random_pairs) -> jm.Pairs:
    return random_pairs(models[0])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_activation_patching_equals_a_full_forward_with_corrupt_z(models, pairs, batch_size):
    expected = full_forward.from_corrupt(models[0], pairs, HEADS)
    pairs = right_in_turn(pairs, expected.argmax(-1))
    found = jm.patch_activations(models[0], pairs, HEADS, batch_size=batch_size)
    assert np.abs(expected - full_forward.last_logits(models[0], pairs)).max() > 0.1
    assert_close(found.logits, expected, TOLERANCES.cone)
    assert_correct(found, expected, pairs)


def test_patching_prompts_from_themselves_changes_nothing(models, pairs):
    same = jm.Pairs(pairs.clean, pairs.clean, pairs.labels, pairs.positions, pairs.positions)
    found = jm.patch_activations(models[0], same, {role: every_head(models[0]) for role in HEADS}).logits
    assert_close(found, full_forward.last_logits(models[0], pairs), TOLERANCES.recompiled)


def test_roles_that_are_one_token_patch_the_heads_of_both(models, pairs):
    model = models[0]
    both = jm.Pairs(
        pairs.clean,
        pairs.corrupt,
        pairs.labels,
        {**pairs.positions, "end": pairs.positions["last"]},
        {**pairs.corrupt_positions, "end": pairs.corrupt_positions["last"]},
    )
    found = jm.patch_activations(model, both, {"end": [(1, 1)], "last": [(3, 2)]}).logits
    expected = full_forward.from_corrupt(model, pairs, {"last": [(1, 1), (3, 2)]})
    assert_close(found, expected, TOLERANCES.recompiled)


@pytest.mark.parametrize("empty", ["early", "end"])
def test_a_role_without_heads_patches_nothing(models, pairs, empty):
    """Whether its token is its own, or that of a role with heads."""
    base, tuned = models
    positions, corrupt_positions = ({**x, "end": x["last"]} for x in (pairs.positions, pairs.corrupt_positions))
    pairs = jm.Pairs(pairs.clean, pairs.corrupt, pairs.labels, positions, corrupt_positions)
    heads = {empty: [], "last": [(0, 1), (2, 3)]}
    expected = full_forward.from_corrupt(base, pairs, {"last": heads["last"]})
    assert np.abs(expected - full_forward.last_logits(base, pairs)).max() > 0.1
    assert_close(jm.patch_activations(base, pairs, heads).logits, expected, TOLERANCES.cone)
    for components in COMPONENTS:
        expected = full_forward.from_model(base, tuned, pairs, {"last": heads["last"]}, components)
        assert_close(jm.cmap(base, tuned, pairs, heads, components).logits, expected, TOLERANCES.cone)
    with pytest.raises(ValueError, match="names no heads"):
        jm.cmap(base, tuned, pairs, {empty: [], "last": []})


def test_heads_of_roles_that_are_one_token_take_the_values_of_their_own_role(models, pairs):
    model = models[0]
    one = {"last": pairs.positions["last"], "a": pairs.positions["early"], "b": pairs.positions["early"]}
    two = {"last": pairs.corrupt_positions["last"], "a": pairs.corrupt_positions["early"]}
    two["b"] = two["a"] + 1
    clash = jm.Pairs(pairs.clean, pairs.corrupt, pairs.labels, one, two)
    heads = {"a": [(0, 0), (1, 1)], "b": [(0, 2), (1, 3)]}
    rows, z = np.arange(len(pairs)), model(pairs.corrupt, capture=("z",))[1]["z"]
    weight, value = np.zeros((4, 1, 1, 4), np.float32), np.zeros((4, len(pairs), 1, 4, 8), np.float32)
    for role, chosen in heads.items():
        for layer, head in chosen:
            weight[layer, :, :, head], value[layer, :, 0, head] = 1, z[layer, rows, two[role], head]
    expected = full_forward.last_logits(model, clash, jm.Interventions(z=jm.Patch(weight, value, one["a"][:, None])))
    for order in (heads, dict(reversed(heads.items()))):
        assert_close(jm.patch_activations(model, clash, order).logits, expected, TOLERANCES.cone)
    with pytest.raises(ValueError, match=r"Head \(1, 1\) is patched at 'a' and at 'b'. In example 0 both are token"):
        jm.patch_activations(model, clash, {"a": [(0, 0), (1, 1)], "b": [(1, 1)]})


def test_a_circuit_is_patched_as_its_heads_by_role_are(models, pairs):
    circuit = jm.Circuit({"one": HEADS["last"], "two": HEADS["early"]}, {"one": "last", "two": "early"})
    by_role = {"last": HEADS["last"], "early": HEADS["early"]}
    found, expected = (jm.patch_activations(models[0], pairs, x).logits for x in (circuit, by_role))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(TypeError, match="expected a Circuit, or its heads"):
        jm.cmap(*models, pairs, HEADS["last"])


def test_one_role_can_be_collected_by_its_name(models, pairs):
    one, several = jm.collect(models[1], pairs, "last"), jm.collect(models[1], pairs, ["last"])
    assert one.roles == several.roles == ("last",)
    np.testing.assert_array_equal(one.values["z"], several.values["z"])
    with pytest.raises(ValueError, match=r"roles is \[\]; expected the name of a role, or of several"):
        jm.collect(models[1], pairs, ())


def test_collected_values_are_of_the_pairs_that_they_were_collected_of(models, pairs, random_pairs):
    kept = jm.collect(models[1], pairs, HEADS)
    for role in HEADS:
        found, expected = (jm.cmap_heads(models[0], tuned, pairs, role) for tuned in (kept, models[1]))
        np.testing.assert_array_equal(found.scores.per_example, expected.scores.per_example)
    with pytest.raises(ValueError, match="collected of z have shape .*; these pairs need"):
        jm.cmap(models[0], kept, pairs[:3], HEADS)
    with pytest.raises(ValueError, match="collected of other prompts or positions"):
        jm.cmap(models[0], kept, random_pairs(models[0], seed=1), HEADS)
    for role in HEADS:  # the same prompts, and one of them with the role at another token
        moved = {**pairs.positions, role: pairs.position(role) - (np.arange(len(pairs)) == 2)}
        with pytest.raises(ValueError, match="collected of other prompts or positions"):
            jm.cmap(models[0], kept, jm.Pairs(pairs.clean, None, pairs.labels, moved), HEADS)


@pytest.mark.parametrize("components", COMPONENTS, ids="+".join)
def test_cross_model_patching_equals_full_forwards_with_the_tuned_models_activations(models, pairs, components):
    base, tuned = models
    expected = full_forward.from_model(base, tuned, pairs, HEADS, components)
    assert np.abs(expected - full_forward.last_logits(base, pairs)).max() > 0.01
    pairs = right_in_turn(pairs, expected.argmax(-1))
    kept = jm.collect(tuned, pairs, reversed(HEADS), components, batch_size=2)
    for values, batch_size in ((tuned, None), (kept, 2)):
        found = jm.cmap(base, values, pairs, HEADS, components, batch_size=batch_size)
        assert_close(found.logits, expected, TOLERANCES.cone)
        assert_correct(found, expected, pairs)


@pytest.mark.parametrize("components", COMPONENTS, ids="+".join)
def test_cross_model_patching_from_a_model_to_itself_changes_nothing(models, pairs, components):
    found = jm.cmap(models[0], models[0], pairs, HEADS, components).logits
    assert_close(found, full_forward.last_logits(models[0], pairs), TOLERANCES.recompiled)


def test_cross_model_patching_of_all_heads_everywhere_with_equal_other_weights_changes_nothing(models, pairs):
    """Two models that differ in their queries, keys and values alone: with all z of one, the other is that one."""
    base, tuned = models
    blocks = {**base.weights["blocks"], **{site: tuned.weights["blocks"][site] for site in ("q", "k", "v")}}
    other = jm.Model(base.config, {"params": {**base.weights, "blocks": blocks}})
    everywhere = {str(i): np.full(len(pairs), i) for i in range(pairs.positions["last"].min())}
    # Behind the last token nothing matters; padding after the shortest prompt is patched through `last` alone.
    short = jm.Pairs(
        pairs.clean[:, : len(everywhere) + 1],
        None,
        pairs.labels,
        {**everywhere, "last": np.full(len(pairs), len(everywhere))},
    )
    found = jm.cmap(base, other, short, {role: every_head(base) for role in short.positions}).logits
    expected = full_forward.last_logits(other, short)
    assert np.abs(expected - full_forward.last_logits(base, short)).max() > 0.1
    assert_close(found, expected, TOLERANCES.cone)


@pytest.mark.parametrize(
    ("role", "components", "multiple"),
    [
        ("last", ("z",), 1),
        ("last", ("q",), 1),
        ("query_box", ("k", "v"), 1),
        ("early", ("z",), 3),
        ("early", ("q", "k", "v"), 1),
        (("early", "last"), ("z",), 1),
        (["query_box", "early"], ("q", "k", "v"), 3),
    ],
)
def test_the_sweep_over_heads_equals_one_patch_per_head(models, pairs, role, components, multiple, monkeypatch):
    base, tuned = models
    monkeypatch.setitem(compiled_sizes.ALIGNMENT, jax.default_backend(), multiple)
    monkeypatch.setattr(HEAD_SWEEP, "TOKENS_PER_CALL", 40)  # several calls
    heads, clean = [(0, 0), (0, 3), (1, 2), (2, 1), (3, 0), (3, 3)], full_forward.last_logits(base, pairs)
    roles = [role] if isinstance(role, str) else role
    patched = {h: full_forward.from_model(base, tuned, pairs, {r: [h] for r in roles}, components) for h in heads}
    answers = clean.argmax(-1), *(patched[head].argmax(-1) for head in heads[:3])
    pairs = right_in_turn(pairs, *answers)
    found = jm.cmap_heads(base, tuned, pairs, role, components, batch_size=3)
    rows = np.arange(len(pairs))

    def probability(logits):
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        return (exponents / exponents.sum(-1, keepdims=True))[rows, pairs.labels]

    assert 0 < found.clean_accuracy < 1
    assert found.clean_accuracy == pytest.approx((clean.argmax(-1) == pairs.labels).mean())
    for head, logits in patched.items():
        effect = probability(logits) / probability(clean) - 1
        np.testing.assert_allclose(found.scores.per_example[head], effect, atol=1e-4 * max(1, np.abs(effect).max()))
        assert found.accuracy[head] == pytest.approx((logits.argmax(-1) == pairs.labels).mean())
    assert len(np.unique(found.accuracy)) > 1, "accuracies of 0, or of 1, would all be alike"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_collected_values_are_loaded_as_they_were_saved(random_model, random_pairs, tmp_path, dtype):
    base, tuned = random_model(dtype=dtype), random_model(dtype=dtype, seed=1)
    pairs, components = random_pairs(base), ("k", "v")
    kept = jm.collect(tuned, pairs, HEADS, components)
    kept.save(tmp_path / "new" / "kept.safetensors")
    found = jm.HeadValues.load(tmp_path / "new" / "kept.safetensors")
    assert (found.roles, found.prompts, set(found.values)) == (kept.roles, kept.prompts, set(components))
    for site in components:
        assert found.values[site].dtype == kept.values[site].dtype
        np.testing.assert_array_equal(found.values[site], kept.values[site])
    expected = jm.cmap(base, tuned, pairs, HEADS, components)
    np.testing.assert_array_equal(jm.cmap(base, found, pairs, HEADS, components).logits, expected.logits)


def test_files_that_hold_no_collected_values_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        jm.HeadValues.load(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text is damaged, or no safetensors file"):
        jm.HeadValues.load(tmp_path / "text")
    (tmp_path / "whole").write_bytes(save({"z": np.zeros(100)}, {"roles": "[]", "prompts": ""}))
    (tmp_path / "cut off").write_bytes((tmp_path / "whole").read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off is damaged"):
        jm.HeadValues.load(tmp_path / "cut off")
    save_file({"z": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds \['z'\]; expected what HeadValues.save wrote"):
        jm.HeadValues.load(tmp_path / "other")


def test_sweeps_and_collected_values_are_shown_in_one_line(random_model, random_pairs):
    scores = jm.PathScores(np.zeros((2, 3, 4), np.float32), np.ones(4, np.float32))
    sweep = jm.HeadSweep(np.arange(6).reshape(2, 3) / 8, scores, 0.5)
    shown = "HeadSweep(accuracies 0.000 to 0.625, 0.500 without a patch, PathScores([L, N, B] = [2, 3, 4], probability"
    assert repr(sweep) == f"{shown}, means 0 to 0))"
    model = random_model()
    kept = jm.collect(model, random_pairs(model), ["last", "early"], ("k", "v"))
    assert repr(kept) == "HeadValues(k, v at last, early, [L, B, R, N, H] = [4, 5, 2, 4, 8])"
    assert sweep != jm.HeadSweep(sweep.accuracy, scores, 0.5), "compared as objects, not array by array"
    assert kept != jm.HeadValues(dict(kept.values), kept.roles, kept.prompts)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_sweeps_over_heads_in_other_metrics_equal_full_forwards(models, pairs, batch_size):
    base, tuned = models
    rows, labels, wrong = np.arange(len(pairs)), pairs.labels, (pairs.labels + 1) % base.config.vocab_size

    def squared_logit(logits, rows):
        """Of the label, which is looked up by row."""
        assert logits.shape == (len(rows), base.config.vocab_size)
        return logits[jnp.arange(len(rows)), jnp.asarray(labels)[rows]] ** 2

    by_name = jm.cmap_heads(base, tuned, pairs, metric="logit_difference", wrong_labels=wrong, batch_size=batch_size)
    by_function = jm.cmap_heads(base, tuned, pairs, metric=squared_logit, batch_size=batch_size)
    assert (by_name.scores.metric, by_function.scores.metric) == ("logit_difference", "squared_logit()")
    clean = full_forward.last_logits(base, pairs)
    for head in [(0, 1), (2, 2), (3, 3)]:
        patched = full_forward.from_model(base, tuned, pairs, {"last": [head]}, ("z",))
        difference = (patched - clean)[rows, labels] - (patched - clean)[rows, wrong]
        assert_close(by_name.scores.per_example[head], difference, TOLERANCES.cone)
        squares = patched[rows, labels] ** 2 - clean[rows, labels] ** 2
        assert_close(by_function.scores.per_example[head], squares, TOLERANCES.cone)
    helps = by_function.scores.mean
    assert by_function.top(3) == by_function.scores.top(3, largest=True)
    assert by_function.top(1) == [tuple(map(int, np.unravel_index(helps.argmax(), helps.shape)))]


def run_methods(models, pairs, **options) -> dict[str, jm.Predictions]:
    """The methods that return `Predictions` of patches."""
    base, tuned = models
    return {
        "patch_activations": jm.patch_activations(base, pairs, HEADS, **options),
        "cmap": jm.cmap(base, tuned, pairs, HEADS, **options),
        "paper cmap": jm.cmap(base, tuned, pairs, HEADS, compat="paper", **options),
        "knockout": jm.knockout(base, pairs, "last", "early", **options),
    }


@pytest.mark.parametrize("batch_size", [None, 2])
def test_metrics_of_patches_are_those_of_their_logits(random_model, random_pairs, batch_size, monkeypatch):
    monkeypatch.setattr(KNOCKOUT, "TOKENS_PER_CALL", 10)  # several calls
    models = random_model(4), random_model(5)
    pairs = random_pairs(models[0], unequal=False)
    rows, labels, wrong = np.arange(len(pairs)), pairs.labels, (pairs.labels + 1) % models[0].config.vocab_size

    def squared_logit(logits, rows):
        """Of the label, which is looked up by row."""
        assert logits.shape == (len(rows), models[0].config.vocab_size)
        return logits[jnp.arange(len(rows)), jnp.asarray(labels)[rows]] ** 2

    def expected(metric, logits):
        if metric == "logit_difference":
            return logits[..., rows, labels] - logits[..., rows, wrong]
        if metric is squared_logit:
            return logits[..., rows, labels] ** 2
        probability = jax.nn.softmax(logits)[..., rows, labels]
        return probability if metric == "probability" else np.log(probability)

    plain = run_methods(models, pairs, batch_size=batch_size)
    for metric in (*METRICS, squared_logit):
        options = {"wrong_labels": wrong} if metric == "logit_difference" else {}
        found = run_methods(models, pairs, metric=metric, batch_size=batch_size, keep_logits=False, **options)
        for method, predictions in found.items():
            by_hand = expected(metric, plain[method].logits)
            assert_close(predictions.per_example, by_hand, TOLERANCES.recompiled)
            assert_close(predictions.mean, by_hand.mean(-1), TOLERANCES.recompiled)
            np.testing.assert_array_equal(predictions.correct, plain[method].correct)
            assert predictions.logits is None and plain[method].measured is None


def test_logits_that_are_not_kept_stay_on_the_device(random_model, random_pairs, monkeypatch):
    models = random_model(4), random_model(5)
    pairs = random_pairs(models[0], unequal=False)
    fetched, device_get = [], jax.device_get

    def recorded(x):
        fetched.extend(np.shape(leaf)[-1:] for leaf in jax.tree.leaves(x))
        return device_get(x)

    monkeypatch.setattr(jax, "device_get", recorded)
    vocabulary = (models[0].config.vocab_size,)
    for options in ({}, {"metric": "probability"}):
        found = [*run_methods(models, pairs, keep_logits=False, **options).values()]
        found.append(jm.predict(models[0], pairs, keep_logits=False, **options))
        assert all(x.logits is None for x in found)
    jm.accuracy(models[0], pairs)
    assert fetched and vocabulary not in fetched
    assert jm.predict(models[0], pairs).logits is not None and vocabulary in fetched


@pytest.mark.parametrize(
    ("method", "module", "compiled"),
    [
        (lambda base, tuned, pairs: jm.cmap_heads(base, tuned, pairs, batch_size=2), HEAD_SWEEP, "_prepare"),
        (lambda base, tuned, pairs: jm.knockout(base, pairs, target="early", batch_size=2), KNOCKOUT, "_clean_cache"),
    ],
    ids=["cmap_heads", "knockout"],
)
def test_the_cache_of_a_batch_goes_before_the_next_one_comes(
    random_model, random_pairs, monkeypatch, method, module, compiled
):
    base, tuned = random_model(4), random_model(5)
    made, alive, prepare = [], [], getattr(module, compiled)

    def watched(*arguments):
        alive.append(sum(array() is not None for array in made))
        found = prepare(*arguments)
        made.extend(weakref.ref(array) for array in jax.tree.leaves(getattr(found, "clean", found)))
        return found

    monkeypatch.setattr(module, compiled, watched)
    method(base, tuned, random_pairs(base, count=6))
    assert made and alive == [0, 0, 0]


def test_heads_whose_change_cannot_reach_the_last_token_have_no_effect(models, pairs):
    found = jm.cmap_heads(*models, pairs, "early").scores.per_example
    np.testing.assert_allclose(found[-1], 0, atol=1e-6)
    assert np.abs(found[0]).min() > 1e-5


def test_models_of_one_layer_have_a_cone_too(random_model, random_pairs):
    base, tuned = (random_model(seed, num_layers=1) for seed in (4, 5))
    pairs = random_pairs(base)
    swept = jm.cmap_heads(base, tuned, pairs, "last").accuracy
    logits = full_forward.from_model(base, tuned, pairs, {"last": [(0, 1)]}, ("z",))
    assert swept[0, 1] == pytest.approx((logits.argmax(-1) == pairs.labels).mean())


# The published code's defects.


def test_paper_patching_reads_the_clean_prompts_position_and_the_last_column(models, pairs):
    model = models[0]
    roles = {**pairs.positions, "prev_query_box": pairs.positions["early"]}
    corrupt_roles = {**pairs.corrupt_positions, "prev_query_box": pairs.corrupt_positions["early"]}
    pairs = jm.Pairs(pairs.clean, pairs.corrupt, pairs.labels, roles, corrupt_roles)
    heads = {"prev_query_box": [(0, 0), (1, 3)], "last": [(2, 3)], "query_box": [(1, 1)]}
    found = jm.patch_activations(model, pairs, heads, compat="paper")
    end, corrupt_end = pairs.clean.shape[1] - 1, pairs.corrupt.shape[1] - 1
    count = np.ones(len(pairs), int)
    ends = {"last": end * count, "query_box": (end - 2) * count}
    corrupt_ends = {"last": corrupt_end * count, "query_box": (corrupt_end - 2) * count}
    wrong = jm.Pairs(
        pairs.clean,
        pairs.corrupt,
        pairs.labels,
        {**roles, **ends},
        {**corrupt_roles, **corrupt_ends, "prev_query_box": roles["prev_query_box"]},
    )
    assert_close(found.logits, full_forward.from_corrupt(model, wrong, heads), TOLERANCES.cone)
    assert np.abs(found.logits - jm.patch_activations(model, pairs, heads).logits).max() > 0.01


@pytest.mark.parametrize("components", [("q",), ("k", "v")], ids="+".join)
def test_paper_cmap_patches_keys_before_the_role_and_freezes_earlier_outputs(models, random_pairs, components):
    base, tuned = models
    pairs = random_pairs(base, unequal=False)
    found = jm.cmap(base, tuned, pairs, HEADS, components, compat="paper").logits
    _, theirs = tuned(pairs.clean, capture=components)
    own = base(pairs.clean, capture=("z",))[1]["z"]
    here = full_forward.weights(base, pairs, HEADS)
    before = np.minimum(np.flip(np.cumsum(np.flip(here, 2), 2), 2) - here, 1)  # [L, B, T, N]: tokens before a role
    patches = {site: jm.Patch(here if site == "q" else before, theirs[site]) for site in components}
    frozen = np.ones((pairs.clean.shape[1], 1))
    frozen[-1] = 0
    expected = full_forward.last_logits(base, pairs, jm.Interventions(**patches, z=jm.Patch(frozen[None, None], own)))
    assert_close(found, expected, TOLERANCES.cone)
    assert np.abs(found - jm.cmap(base, tuned, pairs, HEADS, components).logits).max() > 0.01


def test_paper_cmap_patches_z_at_the_last_column(models, random_pairs):
    base, tuned = models
    pairs = random_pairs(base, unequal=False)
    found = jm.cmap(base, tuned, pairs, {"query_box": [(1, 2), (2, 3)]}, compat="paper").logits
    expected = full_forward.from_model(base, tuned, pairs, {"last": [(1, 2), (2, 3)]}, ("z",))
    assert_close(found, expected, TOLERANCES.cone)


def test_a_fine_tune_can_be_given_the_output_projections_of_its_base(models):
    base, tuned = models
    mixed = compat.base_output_projection(tuned, base)
    for name, weight in mixed.weights["blocks"].items():
        np.testing.assert_array_equal(weight, (base if name == "o" else tuned).weights["blocks"][name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: jm.patch_activations(m, p, {"last": []}), "names no heads"),
        (lambda m, p: jm.patch_activations(m, p, {"first": [(0, 0)]}), "Unknown role 'first'"),
        (lambda m, p: jm.patch_activations(m, p, {"last": [(9, 0)]}), r"Head \(9, 0\) does not exist"),
        (lambda m, p: jm.patch_activations(m, p, HEADS, compat="published"), "compat='published'"),
        (lambda m, p: jm.patch_activations(m, jm.Pairs(p.clean, None, p.labels, p.positions), HEADS), "no corrupt"),
        (lambda m, p: jm.cmap(m, m, p, HEADS, "z"), "components='z'"),
        (lambda m, p: jm.cmap(m, m, p, HEADS, ("mlp",)), "components="),
        (lambda m, p: jm.cmap(m, jm.collect(m, p, ["last"]), p, HEADS), "Role 'query_box' was not collected"),
        (lambda m, p: jm.cmap(m, jm.collect(m, p, HEADS), p, HEADS, ("q",)), r"Components \['q'\] were not"),
        (lambda m, p: jm.cmap(m, jm.collect(m, p, HEADS), p, HEADS, compat="paper"), "give the tuned model itself"),
        (lambda m, p: jm.cmap_heads(m, m, p, metric="logit_difference"), "needs wrong_labels"),
        (lambda m, p: jm.cmap_heads(m, m, p, metric="accuracy"), "metric='accuracy'; expected one of probability"),
        (lambda m, p: jm.patch_activations(m, p, HEADS, metric="logit_difference"), "needs wrong_labels"),
        (lambda m, p: jm.cmap(m, m, p, HEADS, wrong_labels=p.labels), "metric='accuracy' has no use for them"),
    ],
)
def test_bad_arguments_are_named(random_model, random_pairs, call, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        call(model, random_pairs(model))


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_heads": 8}, {"head_dim": 6}, {"vocab_size": 51}], ids=str)
@pytest.mark.parametrize("method", [jm.cmap, jm.cmap_heads], ids=["cmap", "cmap_heads"])
def test_models_of_different_shapes_are_refused(random_model, random_pairs, method, change):
    base, other = random_model(), random_model(**change)
    heads = HEADS if method is jm.cmap else "last"
    with pytest.raises(ValueError, match="fine-tune of the same shape"):
        method(base, other, random_pairs(base), heads)
