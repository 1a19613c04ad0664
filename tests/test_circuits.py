"""Circuit evaluation: equal to full forward passes with patched z, for any ablation, and its identities."""

import full_forward
import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import circuits

CIRCUITS = (
    {"last": [(0, 1), (2, 3), (2, 0)], "query_box": [(1, 2), (2, 3)], "early": [(0, 0)]},
    {"last": [(3, 2)], "early": []},
    {"query_box": [(0, 0), (1, 1), (3, 3)]},
    {"last": [], "query_box": [], "early": []},
)


def every_head(model: jm.Model) -> list[tuple[int, int]]:
    return list(np.ndindex(model.config.num_layers, model.config.num_heads))


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def model(request, random_model) -> jm.Model:
    return random_model(num_kv_heads=request.param)


@pytest.fixture
def means(model, random_pairs) -> np.ndarray:
    return jm.mean_activations(model, random_pairs(model, count=9, seed=5).clean)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_mean_activations_are_means_at_each_position(model, random_pairs, batch_size):
    tokens = random_pairs(model, count=5).clean
    z = np.asarray(model(tokens, capture=("z",))[1]["z"])  # [L, B, T, N, H]
    found = jm.mean_activations(model, tokens, batch_size=batch_size)
    assert_close(found, np.moveaxis(z.mean(1), 1, 0), TOLERANCES.recompiled)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_means_of_prompts_of_unequal_length_leave_out_the_padding(model, random_pairs, batch_size):
    pairs = random_pairs(model, count=5)
    last = np.minimum(pairs.position("last"), pairs.clean.shape[1] - 2)  # which no prompt reaches
    z = np.moveaxis(np.asarray(model(pairs.clean, capture=("z",))[1]["z"]), 0, 2)  # [B, T, L, N, H]
    found = jm.mean_activations(model, pairs.clean, last, batch_size=batch_size)
    expected = [z[last >= t, t].mean(0) for t in range(pairs.clean.shape[1] - 1)]
    assert len(set(last)) > 1
    assert_close(found[:-1], expected, TOLERANCES.recompiled)
    assert not found[-1].any()
    with pytest.raises(ValueError, match="last is .*expected a position 0..11 for each of the 5 prompts"):
        jm.mean_activations(model, pairs.clean, last + 3)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
def test_circuits_equal_full_forwards_with_ablated_heads(model, means, random_pairs, elsewhere, batch_size):
    pairs = random_pairs(model)
    found = jm.evaluate(model, pairs, CIRCUITS, means, elsewhere, batch_size=batch_size)
    expected = [full_forward.evaluate(model, pairs, circuit, means, elsewhere) for circuit in CIRCUITS]
    assert_close(found.logits, expected, TOLERANCES.cone)
    np.testing.assert_array_equal(found.correct, np.argmax(expected, -1) == pairs.labels)
    np.testing.assert_allclose(found.accuracy, found.correct.mean(-1))


@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
def test_roles_may_share_a_token(model, means, random_pairs, elsewhere):
    pairs = random_pairs(model)
    shared = np.where(np.arange(len(pairs)) % 2, pairs.positions["query_box"], pairs.positions["early"])
    pairs = jm.Pairs(
        pairs.clean, None, pairs.labels, {**pairs.positions, "also": shared, "end": pairs.positions["last"]}
    )
    heads = {"last": [(2, 0)], "query_box": [(1, 2)], "also": [(0, 1), (1, 3)], "end": [(3, 3)], "early": [(0, 3)]}
    found = jm.evaluate(model, pairs, [heads], means, elsewhere).logits
    assert_close(found[0], full_forward.evaluate(model, pairs, heads, means, elsewhere), TOLERANCES.cone)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_every_prompt_can_have_ablated_values_of_its_own(model, random_pairs, elsewhere, batch_size):
    pairs = random_pairs(model)
    values = jm.resampled_activations(model, random_pairs(model, count=4, seed=3).clean, len(pairs))
    assert len(np.unique(values, axis=0)) > 1
    found = jm.evaluate(model, pairs, CIRCUITS[:2], values, elsewhere, batch_size=batch_size).logits
    for logits, circuit in zip(found, CIRCUITS, strict=False):
        assert_close(logits, full_forward.evaluate(model, pairs, circuit, values, elsewhere), TOLERANCES.cone)


def test_zero_ablation_is_means_of_zero(model, means, random_pairs):
    pairs = random_pairs(model)
    found = jm.evaluate(model, pairs, CIRCUITS[:1], np.zeros_like(means)).logits
    expected = full_forward.evaluate(model, pairs, CIRCUITS[0], np.zeros_like(means), True)
    assert_close(found[0], expected, TOLERANCES.cone)


def test_a_circuit_of_all_heads_is_the_model(model, means, random_pairs):
    pairs = random_pairs(model)
    whole = {"last": every_head(model), "early": every_head(model)}
    found = jm.evaluate(model, pairs, [whole], means, ablate_elsewhere=False).logits
    assert_close(found[0], full_forward.last_logits(model, pairs), TOLERANCES.cone)


def test_an_empty_circuit_is_everything_ablated(model, means, random_pairs):
    pairs = random_pairs(model)
    value = np.swapaxes(means, 0, 1)[:, None]  # [L, 1, T, N, H]
    expected = full_forward.last_logits(model, pairs, jm.Interventions(z=jm.Patch(np.ones(1), value)))
    assert_close(jm.evaluate(model, pairs, [{"last": []}], means).logits[0], expected, TOLERANCES.cone)


def test_circuits_are_split_to_fit_the_memory_budget(model, means, random_pairs, monkeypatch):
    pairs = random_pairs(model)
    whole = jm.evaluate(model, pairs, CIRCUITS, means).logits
    monkeypatch.setattr(circuits.memory, "budget", lambda: 2**16)
    sizes = circuits._call_sizes(model.config, len(CIRCUITS), pairs, 3, None, full=False)
    assert sizes < (len(pairs), len(CIRCUITS))
    assert_close(jm.evaluate(model, pairs, CIRCUITS, means).logits, whole, TOLERANCES.recompiled)


def test_logits_need_not_be_kept(model, means, random_pairs):
    pairs = random_pairs(model)
    found, kept = (jm.evaluate(model, pairs, CIRCUITS, means, keep_logits=keep) for keep in (False, True))
    assert found.logits is None
    np.testing.assert_array_equal(found.correct, kept.correct)


def test_the_number_of_circuits_is_no_reason_to_compile_again(random_model, random_pairs):
    model = random_model(vocab_size=57)
    pairs = random_pairs(model)
    means = jm.mean_activations(model, pairs.clean)
    before = circuits._vital_logits._cache_size()
    jm.evaluate(model, pairs, list(CIRCUITS), means)
    jm.evaluate(model, pairs, [dict(reversed(circuit.items())) for circuit in CIRCUITS], means)
    assert circuits._vital_logits._cache_size() == before + 1


@pytest.mark.parametrize("elsewhere", [True, False])
def test_evaluation_lowers_for_every_platform(random_model, random_pairs, elsewhere):
    model = random_model(num_kv_heads=2, dtype="bfloat16")
    pairs = random_pairs(model)
    means = np.zeros((pairs.clean.shape[1], 4, 4, 8), np.float32)
    roles, keep, named = circuits._circuit_masks(model.config, CIRCUITS)
    ((index, distinct),) = circuits._distinct_tokens([pairs.clean], per_example=False)
    vital = np.stack([pairs.position(role) for role in roles], axis=1)
    batch = circuits._Batch(pairs.clean, vital, pairs.position("last"), index)
    run = circuits._evaluate_vital if elsewhere else circuits._evaluate_full
    values = circuits._ablated_values(model.config, means, pairs)
    arguments = model.config, model.weights, batch, np.moveaxis(values, 2, 0), distinct
    inputs = jax.eval_shape(lambda *rest: run.prepare(model.config, *rest), *arguments[1:])
    for traced in (run.prepare.trace(*arguments), run.circuits.trace(*arguments[:3], inputs, keep, named)):
        assert "stablehlo" in traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()


@pytest.mark.parametrize(
    ("circuits", "shape", "message"),
    [
        ([], (12, 4, 4, 8), "No circuits given"),
        ([{"first": [(0, 0)]}], (12, 4, 4, 8), "Unknown role 'first'"),
        ([{"last": [(4, 0)]}], (12, 4, 4, 8), r"Head \(4, 0\) does not exist"),
        ([{"last": [(0, 0)]}], (11, 4, 4, 8), r"means has shape \(11, 4, 4, 8\).*\[12 or more"),
        ([{"last": [(0, 0)]}], (4, 12, 4, 4, 8), r"means has shape \(4, 12, 4, 4, 8\)"),
        ([{"last": [(0, 0)]}], (12, 4, 8, 4), r"means has shape"),
    ],
)
def test_bad_arguments_are_named(random_model, random_pairs, circuits, shape, message):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        jm.evaluate(model, random_pairs(model), circuits, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "circuit", [{"last": [(0, 0)]}, jm.Circuit({"a": [(0, 0)]}, {"a": "last"})], ids=["dict", "circuit"]
)
def test_one_circuit_is_not_a_list_of_them(random_model, random_pairs, circuit):
    model, means = random_model(), np.zeros((12, 4, 4, 8), np.float32)
    with pytest.raises(TypeError, match=r"expected a list of them: evaluate\(model, pairs, \[circuit\], means\)"):
        jm.evaluate(model, random_pairs(model), circuit, means)
    with pytest.raises(TypeError, match="expected a Circuit, or its heads"):
        jm.evaluate(model, random_pairs(model), [[(0, 0)]], means)
