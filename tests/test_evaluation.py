"""Circuit evaluation: equal to full forward passes with patched z, for any ablation, and its identities."""

import dataclasses

import full_forward
import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close, assert_correct, right_in_turn

import jaxmech as jm
from jaxmech import circuit_passes, evaluation
from jaxmech.batches import Batches
from jaxmech.compiled_sizes import few_counts

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
    assert np.isnan(found[-1]).all()
    with pytest.raises(ValueError, match="last is .*expected a position 0..11 for each of the 5 prompts"):
        jm.mean_activations(model, pairs.clean, last + 3)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
def test_circuits_equal_full_forwards_with_ablated_heads(model, means, random_pairs, elsewhere, batch_size):
    pairs = random_pairs(model)
    expected = [full_forward.evaluate(model, pairs, circuit, means, elsewhere) for circuit in CIRCUITS]
    pairs = right_in_turn(pairs, *np.argmax(expected, -1))
    found = jm.evaluate(model, pairs, CIRCUITS, means, elsewhere, batch_size=batch_size)
    assert_close(found.logits, expected, TOLERANCES.cone)
    assert_correct(found, expected, pairs)


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


@pytest.mark.parametrize("roles", [None, ("last",), ("query_box", "also")], ids=["all roles", "last", "shared token"])
def test_means_by_role_are_those_of_the_tokens_that_have_it(model, random_pairs, roles):
    pairs, position = random_pairs(model, count=30), np.arange(12)
    also = np.where(np.arange(30) % 2, pairs.positions["query_box"], pairs.positions["early"])
    pairs = dataclasses.replace(pairs, positions={**pairs.positions, "also": also})
    found = jm.role_means(model, pairs, roles, batch_size=7)
    roles = tuple(pairs.positions) if roles is None else roles
    z = np.asarray(model(pairs.clean, capture=("z",))[1]["z"])  # [L, B, T, N, H]
    named = np.zeros(pairs.clean.shape, bool)
    assert tuple(found.by_role) == roles
    for role in roles:
        assert_close(found.by_role[role], z[:, np.arange(30), pairs.position(role)].mean(1), TOLERANCES.recompiled)
        named[np.arange(30), pairs.position(role)] = True
    reached = position <= pairs.position("last")[:, None]
    for t in position:
        rows = reached[:, t] & ~named[:, t]
        rows = rows if rows.any() else reached[:, t]
        assert_close(found.by_position[t], z[:, rows, t].mean(1), TOLERANCES.recompiled)
    assert (reached & named).any(0).sum() >= 3, "one role, many positions"
    for none, message in (([], "No roles given"), (["first"], "Unknown role 'first'")):
        with pytest.raises(ValueError, match=message):
            jm.role_means(model, pairs, none)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_heads_can_be_ablated_by_means_of_their_role(model, random_pairs, elsewhere, batch_size):
    """As values for each example that are put together by hand; the first of two roles counts."""
    pairs = random_pairs(model)
    shared = np.where(np.arange(len(pairs)) % 2, pairs.positions["query_box"], pairs.positions["early"])
    pairs = dataclasses.replace(pairs, positions={**pairs.positions, "also": shared})
    means = jm.role_means(model, random_pairs(model, count=20, seed=3), ["last", "query_box"])
    means = jm.RoleMeans(means.by_position, {**means.by_role, "also": means.by_position[0]})
    values = np.repeat(means.by_position[None], len(pairs), axis=0)  # [B, T, L, N, H]
    for role in ("also", "query_box", "last"):
        values[np.arange(len(pairs)), pairs.position(role)] = means.by_role[role]
    found = jm.evaluate(model, pairs, CIRCUITS, means, elsewhere, batch_size=batch_size).logits
    expected = [full_forward.evaluate(model, pairs, circuit, values, elsewhere) for circuit in CIRCUITS]
    assert_close(found, expected, TOLERANCES.cone)
    by_position = jm.evaluate(model, pairs, CIRCUITS, means.by_position, elsewhere).logits
    assert np.abs(found - by_position).max() > 1e-2
    with pytest.raises(ValueError, match="Unknown role 'first'"):
        jm.evaluate(model, pairs, CIRCUITS, jm.RoleMeans(means.by_position, {"first": means.by_position[0]}))


@pytest.mark.parametrize("elsewhere", [True, False], ids=["ablated elsewhere", "left elsewhere"])
def test_resampling_takes_other_prompts_that_are_as_long_and_nothing_of_their_padding(model, random_pairs, elsewhere):
    pairs = random_pairs(model)
    others = random_pairs(model, count=9, seed=3)
    last = others.position("last").copy()
    last[:2] = others.clean.shape[1] - 1
    both = np.concatenate([others.clean, pairs.clean]), np.concatenate([last, pairs.position("last")])
    values = jm.resampled_activations(model, both[0], pairs, last=both[1], batch_size=2)
    assert np.isnan(values).any() and len(np.unique(last)) > 1
    padding = both[0].copy()
    padding[np.arange(padding.shape[1]) > both[1][:, None]] += 1
    again = jm.resampled_activations(model, padding % 50, pairs, last=both[1])
    found = [jm.evaluate(model, pairs, CIRCUITS, x, elsewhere).logits for x in (values, again)]
    assert_close(found[1], found[0], TOLERANCES.recompiled)
    z = np.asarray(model(pairs.clean, capture=("z",))[1]["z"])  # [L, B, T, N, H]
    for i, position in enumerate(pairs.position("last")):
        assert np.isfinite(values[i, : position + 1]).all()
        assert np.abs(values[i, position] - z[:, i, position]).max() > 0.01, "not its own"
    shortest = pairs[[int(pairs.position("last").argmin())]]
    drawn = [jm.resampled_activations(model, pairs, shortest, seed=seed)[0, 0] for seed in range(9)]
    assert len(np.unique(drawn, axis=0)) > 1, "seeds differ"
    with pytest.raises(ValueError, match="Example 0 has no prompt to draw"):
        jm.resampled_activations(model, pairs[:1], pairs[:1])


def test_means_of_shorter_prompts_are_refused(model, random_pairs):
    """Positions that no prompt reached have no mean; to take zero there would be another ablation."""
    pairs = random_pairs(model)
    short = pairs.position("last") - 1
    means = jm.mean_activations(model, pairs.clean, short)
    with pytest.raises(ValueError, match=f"not finite at position {short.max() + 1}, where heads are ablated"):
        jm.evaluate(model, pairs, CIRCUITS, means)
    early = [{"query_box": [(0, 0)]}]
    assert np.isfinite(means[pairs.position("query_box").max()]).all()
    found = jm.evaluate(model, pairs, early, means, ablate_elsewhere=False).logits[0]
    assert_close(found, full_forward.evaluate(model, pairs, early[0], np.nan_to_num(means), False), TOLERANCES.cone)
    np.testing.assert_array_equal(
        jm.mean_activations(model, pairs), jm.mean_activations(model, pairs.clean, pairs.position("last"))
    )
    within = pairs.position("last") <= short.max()
    assert jm.evaluate(model, pairs[within], CIRCUITS, means).accuracy.shape == (len(CIRCUITS),)


def test_zero_ablation_is_means_of_zero(model, means, random_pairs):
    pairs = random_pairs(model)
    expected = full_forward.evaluate(model, pairs, CIRCUITS[0], np.zeros_like(means), True)
    for zero in (np.zeros_like(means), 0):
        assert_close(jm.evaluate(model, pairs, CIRCUITS[:1], zero).logits[0], expected, TOLERANCES.cone)


def test_a_circuit_of_all_heads_is_the_model(model, means, random_pairs):
    pairs = random_pairs(model)
    whole = {"last": every_head(model), "early": every_head(model)}
    found = jm.evaluate(model, pairs, [whole], means, ablate_elsewhere=False).logits
    assert_close(found[0], full_forward.last_logits(model, pairs), TOLERANCES.cone)


@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_single_heads_can_be_taken_from_the_model(random_model, random_pairs, monkeypatch, tokens):
    """Each call starts in the first layer in which one of its circuits lacks a head, of the first role of any."""
    model = random_model(num_kv_heads=2, window=7, full_layers=(2,))
    pairs = random_pairs(model)
    means = jm.mean_activations(model, pairs)
    monkeypatch.setattr(circuit_passes, "TOKENS_PER_CALL", tokens)
    calls = []
    answered = circuit_passes._suffix_answers
    monkeypatch.setattr(
        circuit_passes,
        "_suffix_answers",
        lambda *args, **options: calls.append(len(args[-1])) or answered(*args, **options),
    )
    gone = [("last", (3, 1)), ("query_box", (1, 2)), ("last", (0, 0)), ("query_box", (2, 3)), ("last", (2, 2))]
    circuits = [{role: [head for head in every_head(model) if head != one]} for role, one in gone] + [{}]
    found = jm.evaluate(model, pairs, circuits, means, ablate_elsewhere=False)
    plain = full_forward.last_logits(model, pairs)
    for circuit, logits in zip(circuits, found.logits, strict=True):
        expected = full_forward.evaluate(model, pairs, circuit, means, False) if circuit else plain
        assert_close(logits, expected, TOLERANCES.cone)
        assert (np.abs(logits - plain).max() > 0.01) == bool(circuit)
    assert (max(calls) == 1) == (tokens == 1) and (len(calls) == 1) == (tokens == 10**6)


def test_an_empty_circuit_is_everything_ablated(model, means, random_pairs):
    pairs = random_pairs(model)
    value = np.swapaxes(means, 0, 1)[:, None]  # [L, 1, T, N, H]
    expected = full_forward.last_logits(model, pairs, jm.Interventions(z=jm.Patch(np.ones(1), value)))
    assert_close(jm.evaluate(model, pairs, [{"last": []}], means).logits[0], expected, TOLERANCES.cone)


def test_circuits_are_split_to_fit_the_memory_budget(model, means, random_pairs, monkeypatch):
    pairs = random_pairs(model)
    whole = jm.evaluate(model, pairs, CIRCUITS, means).logits
    calls = []
    monkeypatch.setattr(circuit_passes, "_vital_answers", recorded(circuit_passes._vital_answers, calls))
    monkeypatch.setattr(circuit_passes.memory, "budget", lambda weights: 2**13)
    assert_close(jm.evaluate(model, pairs, CIRCUITS, means).logits, whole, TOLERANCES.recompiled)
    examples, together = ({shape[i] for shape in calls} for i in (0, 1))
    assert max(examples) < len(pairs) and max(together) < len(CIRCUITS)


@pytest.mark.parametrize(("budget", "together"), [(2**26, 8), (2**18, 4), (2**10, 1)])
def test_circuits_left_alone_elsewhere_are_split_to_fit_the_memory_budget(
    model, means, random_pairs, monkeypatch, budget, together
):
    pairs, circuits = random_pairs(model), [*CIRCUITS, *CIRCUITS][:8]
    whole = jm.evaluate(model, pairs, circuits, means, ablate_elsewhere=False).logits
    calls, run = [], circuit_passes._suffix_answers

    def answered(*arguments, **options):
        calls.append(len(arguments[-1]))
        return run(*arguments, **options)

    monkeypatch.setattr(circuit_passes, "_suffix_answers", answered)
    monkeypatch.setattr(circuit_passes.memory, "budget", lambda weights: budget)
    found = jm.evaluate(model, pairs, circuits, means, ablate_elsewhere=False, batch_size=len(pairs)).logits
    assert_close(found, whole, TOLERANCES.recompiled)
    assert max(calls) <= together and (together == 1 or max(calls) > 1)


def recorded(run, calls: list[tuple[int, int]]):
    """`run`, which also writes down how many examples and circuits it is called with."""

    def wrapped(config, weights, batch, ablated, keep, **options):
        calls.append((len(batch.tokens), len(keep)))
        return run(config, weights, batch, ablated, keep, **options)

    return wrapped


def ablation_of(pairs: jm.Pairs, own: bool) -> circuit_passes.Ablation:
    """Of one source, or of one for each example."""
    values = np.zeros((len(pairs) if own else 1, pairs.clean.shape[1], 4, 4, 8), np.float32)
    return evaluation._ablation(jm.Config(50, 24, 4, 4, 4, 8, 8), values, pairs, np.ones(pairs.clean.shape, bool))


def test_prompts_that_share_no_tokens_are_split_more(model, random_pairs, monkeypatch):
    """Keys and values of all layers are kept for each distinct token: the budget counts these, not the prompts."""
    pairs = random_pairs(model, count=12)
    vital, last = pairs.position("query_box")[:, None], pairs.position("last")
    alike = np.broadcast_to(pairs.clean[:1], pairs.clean.shape)
    sizes = {}
    monkeypatch.setattr(circuit_passes.memory, "budget", lambda weights: 150_000)
    for name, tokens in (("alike", alike), ("different", pairs.clean)):
        prompts = circuit_passes.Prompts(tokens, vital, last)
        sizes[name], parts = circuit_passes._parts(model, prompts, ablation_of(pairs, own=False), None)
        assert sorted(set(np.concatenate([rows for rows, *_ in parts]))) == list(range(12))
    assert 1 <= sizes["different"] < sizes["alike"] == 12
    fewer, _ = circuit_passes._parts(
        model, circuit_passes.Prompts(alike, vital, last), ablation_of(pairs, own=True), None
    )
    assert fewer <= sizes["different"], "examples with ablated values of their own share nothing"


def test_logits_need_not_be_kept(model, means, random_pairs):
    pairs = random_pairs(model)
    found, kept = (jm.evaluate(model, pairs, CIRCUITS, means, keep_logits=keep) for keep in (False, True))
    assert found.logits is None
    np.testing.assert_array_equal(found.correct, kept.correct)


def test_the_number_of_circuits_is_no_reason_to_compile_again(random_model, random_pairs):
    model = random_model(vocab_size=57)
    pairs = random_pairs(model)
    means = jm.mean_activations(model, pairs.clean)
    before = circuit_passes._vital_answers._cache_size()
    jm.evaluate(model, pairs, list(CIRCUITS), means)
    jm.evaluate(model, pairs, [dict(reversed(circuit.items())) for circuit in CIRCUITS], means)
    jm.evaluate(model, pairs, list(CIRCUITS)[:-1], means)
    assert circuit_passes._vital_answers._cache_size() == before + 1
    assert [few_counts(count) for count in (1, 2, 3, 5, 8, 9, 100, 104)] == [1, 2, 4, 8, 8, 16, 104, 104]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_evaluation_lowers_for_every_platform(random_model, random_pairs, elsewhere):
    model = random_model(num_kv_heads=2, dtype="bfloat16")
    pairs = random_pairs(model)
    means = np.zeros((pairs.clean.shape[1], 4, 4, 8), np.float32)
    roles, keep, named = evaluation._circuit_masks(model.config, CIRCUITS)
    values, source = evaluation._ablation(model.config, means, pairs, np.ones(pairs.clean.shape, bool)).of(
        model.config, np.arange(len(pairs))
    )
    ((index, distinct),) = circuit_passes._distinct_tokens([(pairs.clean, source)])
    vital = np.stack([pairs.position(role) for role in roles], axis=1)
    prompts = circuit_passes.Prompts(pairs.clean, vital, pairs.position("last"))
    batch, model_arguments = circuit_passes._Vital(*prompts, index, source), (model.config, model.weights)
    if elsewhere:
        prepare, arguments = circuit_passes._ablated_everywhere, (*model_arguments, batch, values, distinct)
        inputs = jax.eval_shape(lambda *rest: prepare(model.config, *rest), *arguments[1:])
        run = circuit_passes._vital_answers.trace(*model_arguments, batch, inputs, keep, keep_logits=True)
    else:
        batches = Batches.plan([pairs.clean], vital, prompts.last, 64)
        of = batches.prompts(batches.rows[0]), batches.suffixes(batches.rows[0])
        prepare, arguments = circuit_passes._prepare, (*model_arguments, *of, vital, source, values)
        inputs = jax.eval_shape(lambda *rest: prepare(model.config, *rest), *arguments[1:])
        run = circuit_passes._suffix_answers.trace(*model_arguments, inputs, keep, named, keep_logits=True)
    for traced in (prepare.trace(*arguments), run):
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


def test_means_of_roles_must_be_those_of_all_layers(model, random_pairs):
    pairs = random_pairs(model)
    means = jm.role_means(model, pairs, "last")
    wrong = jm.RoleMeans(means.by_position, {"last": means.by_role["last"][0]})
    with pytest.raises(ValueError, match=r"means of role 'last' have shape \(4, 8\); this model needs \[L, N, H\]"):
        jm.evaluate(model, pairs, CIRCUITS, wrong)


def test_no_number_but_zero_stands_for_all_ablated_values(random_model, random_pairs):
    with pytest.raises(ValueError, match=r"means has shape \(\); this model and these prompts need"):
        jm.evaluate(random_model(), random_pairs(random_model()), [{"last": [(0, 0)]}], np.float32(1))


@pytest.mark.parametrize(
    "circuit", [{"last": [(0, 0)]}, jm.Circuit({"a": [(0, 0)]}, {"a": "last"})], ids=["dict", "circuit"]
)
def test_one_circuit_is_not_a_list_of_them(random_model, random_pairs, circuit):
    model, means = random_model(), np.zeros((12, 4, 4, 8), np.float32)
    with pytest.raises(TypeError, match=r"expected a list of them: evaluate\(model, pairs, \[circuit\], means\)"):
        jm.evaluate(model, random_pairs(model), circuit, means)
    with pytest.raises(TypeError, match="expected a Circuit, or its heads"):
        jm.evaluate(model, random_pairs(model), [[(0, 0)]], means)
