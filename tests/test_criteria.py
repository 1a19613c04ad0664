"""Faithfulness and completeness against hand-written loops over plain full forward passes; errors of all criteria."""

import math

import numpy as np
import pytest
from conftest import assert_close
from criteria_case import CIRCUIT, EMPTY, EVERY_HEAD, GROUPS, PROMPTS, ROLES, Case, left, made

import jaxmech as jm
from jaxmech import bootstrap


@pytest.fixture
def case(random_model, random_pairs) -> Case:
    return made(random_model, random_pairs)


# Faithfulness.


@pytest.mark.parametrize(("compat", "elsewhere"), [(None, True), (None, False), ("paper", True)])
def test_faithfulness_is_the_ratio_of_accuracies_of_full_forwards(case, compat, elsewhere):
    options = {"random": 3, "compat": compat, "ablate_elsewhere": elsewhere}
    found = jm.faithfulness(case.model, case.pairs, CIRCUIT, case.means, **options)
    circuit, model = case.correct(left(CIRCUIT, {}), elsewhere), case.own_answers() == case.pairs.labels
    others = [case.correct(left(other, {}), elsewhere) for other in found.random_circuits]
    assert (circuit != case.correct(left(CIRCUIT, {}), not elsewhere)).any()
    np.testing.assert_array_equal(found.circuit.correct, circuit)
    np.testing.assert_array_equal(found.model.correct, model)
    np.testing.assert_array_equal(found.random.correct, others)
    assert 0.2 < circuit.mean() < 0.9 and 0.2 < model.mean() < 0.9 and circuit.mean() != model.mean()
    rounded = (lambda x: round(x, 2)) if compat else (lambda x: x)
    part, whole, *rest = (rounded(sum(x) / PROMPTS) for x in (circuit, model, *others))
    assert found.ratio == pytest.approx(part / whole, rel=1e-12)
    np.testing.assert_allclose(found.random_ratios, [x / whole for x in rest], rtol=1e-12)
    assert (abs(found.ratio - circuit.sum() / model.sum()) > 1e-4) == (compat == "paper")


def test_the_interval_of_faithfulness_is_that_of_a_paired_bootstrap(case):
    found = jm.faithfulness(case.model, case.pairs, CIRCUIT, case.means, random=1)
    low, high = found.confidence_interval(0.9, resamples=200, seed=3)
    rng, ratios = np.random.default_rng(3), []
    for times in rng.multinomial(PROMPTS, [1 / PROMPTS] * PROMPTS, size=200):  # how often each prompt is drawn
        part = sum(n * right for n, right in zip(times, found.circuit.correct, strict=True))
        whole = sum(n * right for n, right in zip(times, found.model.correct, strict=True))
        ratios.append(part / whole)
    ratios.sort()
    assert low == pytest.approx(ratios[9] + 0.95 * (ratios[10] - ratios[9]), rel=1e-9)  # 5 % of 199 gaps is 9.95
    assert high == pytest.approx(ratios[189] + 0.05 * (ratios[190] - ratios[189]), rel=1e-9)
    assert low < found.ratio < high
    # Other draws of the same kind, prompts of both sides drawn together, or apart.
    rows = rng.integers(PROMPTS, size=(2, 4000, PROMPTS))
    part, whole, apart = found.circuit.correct[rows[0]], found.model.correct[rows[0]], found.model.correct[rows[1]]
    paired, unpaired = (np.quantile(part.sum(-1) / x.sum(-1), [0.05, 0.95]) for x in (whole, apart))
    assert_close(found.confidence_interval(0.9, resamples=4000), paired, 0.05)
    assert np.abs(unpaired - paired).max() > 0.1
    assert found.confidence_interval() == found.confidence_interval()


def test_a_model_that_is_always_wrong_has_no_faithfulness(case):
    wrong = case.with_labels((case.own_answers() + 1) % case.model.config.vocab_size)
    assert math.isnan(jm.faithfulness(wrong.model, wrong.pairs, CIRCUIT, wrong.means, random=1).ratio)


def test_random_circuits_have_the_sizes_of_the_groups_and_share_no_head_at_a_role(random_model):
    config = random_model(num_layers=3, num_heads=6, num_kv_heads=6).config
    rng, seen = np.random.default_rng(0), set()
    for _ in range(50):
        found = jm.random_circuit(config, CIRCUIT, rng)
        assert {group: len(heads) for group, heads in found.groups.items()} == {g: len(h) for g, h in GROUPS.items()}
        assert (list(found.groups), found.roles) == (list(GROUPS), ROLES)
        for role in set(ROLES.values()):
            heads = [head for group, heads in found.groups.items() if ROLES[group] == role for head in heads]
            assert len(set(heads)) == len(heads)
            seen |= set(heads)
    assert seen == {(layer, head) for layer in range(3) for head in range(6)}


@pytest.mark.parametrize("groups", [{}, {"readers": []}])
def test_a_circuit_without_heads_has_nothing_to_lose(case, groups):
    model, pairs, means = case.model, case.pairs, case.means
    circuit = jm.Circuit(groups, dict.fromkeys(groups, "last"))
    assert jm.minimality(model, pairs, circuit, means).circuit.groups == groups
    assert jm.faithfulness(model, pairs, circuit, means, random=1).circuit.accuracy <= 1
    assert jm.completeness(model, pairs, circuit, means, random=1).gap.shape == (2,)


def test_samples_in_which_the_model_is_always_wrong_say_nothing_of_the_ratio():
    few = jm.Predictions(np.arange(10) < 1)
    found = jm.Faithfulness(few, few, few, few, [])
    assert (np.random.default_rng(0).multinomial(10, np.full(10, 0.1), size=1000)[:, 0] == 0).any()
    assert found.confidence_interval() == (1.0, 1.0)
    never = jm.Predictions(np.zeros(10, bool))
    assert np.isnan(jm.Faithfulness(never, few, few, few, []).confidence_interval()).all()


def test_random_circuits_depend_on_the_seed_alone(case):
    first, again, other = (
        jm.faithfulness(case.model, case.pairs, CIRCUIT, case.means, random=3, seed=seed).random_circuits
        for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert len({str(circuit.groups) for circuit in first}) == 3


def test_random_circuits_need_as_many_heads_as_their_groups_have(random_model):
    config = random_model(num_layers=1, num_heads=4, num_kv_heads=4).config
    circuit = jm.Circuit({"a": [(0, i) for i in range(4)], "b": [(0, 0)]}, {"a": "last", "b": "last"})
    with pytest.raises(ValueError, match="groups at 'last' have 5 heads together, the model 4"):
        jm.random_circuit(config, circuit, 0)
    apart = jm.Circuit(circuit.groups, {"a": "last", "b": "query_box"})
    assert {group: len(heads) for group, heads in jm.random_circuit(config, apart, 0).groups.items()} == {
        "a": 4,
        "b": 1,
    }


def test_seeds_of_random_circuits_may_be_numbers_of_numpy(case):
    drawn = [jm.random_circuit(case.model.config, CIRCUIT, seed) for seed in (3, np.int64(3), np.random.default_rng(3))]
    assert drawn[0] == drawn[1] == drawn[2]


def test_random_circuits_of_the_paper_are_drawn_with_replacement_and_divided_by_the_layers(random_model):
    config = random_model(num_layers=3, num_heads=6, num_kv_heads=6).config
    numbers = iter([[0, 17, 5, 5, 8, 9, 10, 2], [7, 1, 16, 3], []])  # readers and movers, binders, nobody

    class Drawn(np.random.Generator):
        def integers(self, high: int, size: int) -> np.ndarray:
            assert high == 18
            drawn = next(numbers)
            assert len(drawn) == size
            return np.array(drawn, int)

    found = jm.random_circuit(config, CIRCUIT, Drawn(np.random.PCG64()), compat="paper")
    # 17 is head 5 of the layer 17 // 3 = 5, which does not exist; so it is with 9, 10 and 16.
    assert found.groups["readers"] == [(0, 0), (1, 5), (2, 2)]  # (1, 5) was drawn twice
    assert found.groups["movers"] == [(0, 2)]
    assert found.groups["binders"] == [(2, 1), (0, 1), (1, 3)]
    assert found.groups["nobody"] == []


# Completeness.


@pytest.mark.parametrize(("compat", "elsewhere"), [(None, True), (None, False), ("paper", True)])
def test_completeness_takes_the_same_heads_from_circuit_and_model(case, compat, elsewhere):
    options = {"random": 4, "compat": compat, "ablate_elsewhere": elsewhere}
    found = jm.completeness(case.model, case.pairs, CIRCUIT, case.means, **options)
    of_model = elsewhere and compat is None
    named = ["nothing", "readers", "movers", "binders"]
    assert found.names == [*named, "random 1", "random 2", "random 3", "random 4"]
    assert found.kinds == ["nothing", *["group"] * 3, *["random"] * 4]
    assert found.subsets[:4] == [{}, *({group: GROUPS[group]} for group in named[1:])]
    differ = False
    for i, gone in enumerate(found.subsets):
        model = {}
        for role in ROLES.values():
            taken = [head for group, heads in gone.items() if ROLES[group] == role for head in heads]
            model[role] = [head for head in EVERY_HEAD if head not in taken]
        circuit, whole = case.correct(left(CIRCUIT, gone), elsewhere), case.correct(model, of_model)
        np.testing.assert_array_equal(found.circuit.correct[i], circuit)
        np.testing.assert_array_equal(found.model.correct[i], whole)
        assert found.gap[i] == pytest.approx(abs(int(circuit.sum()) - int(whole.sum())) / PROMPTS)
        differ |= bool((case.correct(model, not of_model) != whole).any())
    assert differ, "what happens to other tokens makes no difference here"
    assert len(set(found.circuit.accuracy)) > 2 and len(set(found.model.accuracy)) > 2


def test_random_subsets_have_each_head_half_of_the_time(case, monkeypatch):
    monkeypatch.setattr(jm.criteria.complete, "evaluate", lambda *arguments, **options: None)
    found = jm.completeness(case.model, case.pairs, CIRCUIT, case.means, random=400, seed=2)
    drawn = [subset for kind, subset in zip(found.kinds, found.subsets, strict=True) if kind == "random"]
    for group, heads in GROUPS.items():
        assert all(set(subset[group]) <= set(heads) for subset in drawn)
        for head in heads:
            assert abs(sum(head in subset[group] for subset in drawn) / 400 - 0.5) < 0.1  # 4 standard deviations
    assert jm.completeness(case.model, case.pairs, CIRCUIT, case.means, random=400, seed=2).subsets == found.subsets
    assert jm.completeness(case.model, case.pairs, CIRCUIT, case.means, random=400, seed=3).subsets != found.subsets


def test_a_circuit_of_all_heads_at_its_roles_is_complete(case):
    whole = jm.Circuit({"all": EVERY_HEAD, "query": EVERY_HEAD}, {"all": "last", "query": "query_box"})
    found = jm.completeness(case.model, case.pairs, whole, case.means, random=2)
    np.testing.assert_array_equal(found.gap, 0)


def test_groups_may_be_named_as_other_sets_are(case):
    named = jm.Circuit({"nothing": [(0, 0)], "random 1": [(0, 1)]}, {"nothing": "last", "random 1": "last"})
    found = jm.completeness(case.model, case.pairs, named, case.means, random=1)
    assert found.names == ["nothing", "nothing", "random 1", "random 1"]
    assert found.kinds == ["nothing", "group", "group", "random"]
    assert found.subsets[:3] == [{}, {"nothing": [(0, 0)]}, {"random 1": [(0, 1)]}] and len(found.gap) == 4


def test_results_are_shown_in_one_line(case):
    arguments = case.model, case.pairs, CIRCUIT, case.means
    faith, complete = jm.faithfulness(*arguments, random=2), jm.completeness(*arguments, random=1)
    minimal, nothing = jm.minimality(*arguments), jm.minimality(*arguments[:2], EMPTY, case.means)

    def span(values: np.ndarray) -> str:
        return f"{values.min():.3f} to {values.max():.3f}"

    shown = f"Faithfulness(accuracy: ratio {faith.ratio:.3f}, random circuits {span(faith.random_ratios)})"
    assert repr(faith) == shown
    assert repr(complete) == f"Completeness(accuracy: gap {span(complete.gap)}, 5 subsets)"
    scores, left = np.concatenate(list(minimal.scores.values())), sum(map(len, minimal.circuit.groups.values()))
    assert repr(minimal) == f"Minimality(accuracy: {left} of 12 heads stay, scores {span(scores)})"
    assert repr(nothing) == "Minimality(accuracy: 0 of 0 heads stay, scores none)"


# Errors.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *x: jm.faithfulness(*x, random=0), "random=0; expected at least 1"),
        (lambda *x: jm.faithfulness(*x, compat="published"), "compat='published'"),
        (lambda *x: jm.completeness(*x, compat="published"), "compat='published'"),
        (lambda *x: jm.minimality(*x, compat="published"), "compat='published'"),
        (lambda *x: jm.minimality(*x, threshold=-0.1), "threshold=-0.1, fraction=0.3"),
        (lambda *x: jm.minimality(*x, fraction=1.1), r"fraction=1.1; expected .* \[0, 1\]"),
        (lambda m, p, c, z: jm.faithfulness(m, p, c, z[:5]), r"means has shape \(5, 4, 4, 8\)"),
        (lambda m, p, c, z: jm.completeness(m, p, jm.Circuit({"a": [(4, 0)]}, {"a": "last"}), z), "does not exist"),
        (lambda m, p, c, z: jm.minimality(m, p, jm.Circuit({"a": [(0, 0)]}, {"a": "first"}), z), "Unknown role"),
        (lambda m, p, c, z: jm.random_circuit(m.config, c, np.random.default_rng(0), compat="x"), "compat='x'"),
        (lambda *x: jm.minimality(*x, threshold=np.nan), "threshold=nan"),
        (
            lambda *x: jm.minimality(*x, metric="logit"),
            "expected one of accuracy, probability, log_prob",
        ),
        (lambda *x: jm.completeness(*x, metric="logit_difference"), "needs wrong_labels"),
        (lambda *x: jm.faithfulness(*x, wrong_labels=x[1].labels), "metric='accuracy' has no use for them"),
        (
            lambda *x: jm.faithfulness(*x, metric="probability", compat="paper"),
            "code measures accuracy alone",
        ),
        *(
            (lambda *x, of=of: of(*x, ablate_elsewhere=False, compat="paper"), "published code ablates circuits every")
            for of in (jm.faithfulness, jm.completeness, jm.minimality)
        ),
        (lambda m, p, c, z: jm.predict(m, p, metric="logit"), "metric='logit'; expected one of accuracy"),
        (lambda m, p, c, z: jm.faithfulness(m, p, c, z * np.nan), "means holds numbers that are not finite"),
        (lambda *x: bootstrap.interval(np.ones(3), 1.0), "level=1.0; expected a fraction between 0 and 1"),
        (lambda *x: bootstrap.interval(np.ones(3), resamples=0), "resamples=0; expected at least 1"),
    ],
)
def test_bad_arguments_are_named(random_model, random_pairs, call, message):
    model = random_model(num_kv_heads=2)
    with pytest.raises(ValueError, match=message):
        call(model, random_pairs(model, count=PROMPTS), CIRCUIT, np.zeros((12, 4, 4, 8), np.float32))


@pytest.mark.parametrize("criterion", [jm.faithfulness, jm.completeness, jm.minimality])
def test_criteria_need_heads_in_groups(random_model, random_pairs, criterion):
    model = random_model()
    with pytest.raises(TypeError, match="Found a dict; expected a Circuit, whose heads are in groups"):
        criterion(model, random_pairs(model), {"last": [(0, 0)]}, np.zeros((12, 4, 4, 8), np.float32))
