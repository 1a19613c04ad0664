"""The criteria of a circuit against hand-written loops over plain full forward passes, and the paired bootstrap."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace

import full_forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import bootstrap

PROMPTS = 36  # accuracies that differ from their rounding to 0.01
GROUPS = {
    "readers": [(2, 3), (1, 3), (3, 0), (2, 1), (0, 2), (1, 1)],
    "movers": [(3, 2), (2, 2)],
    "binders": [(0, 0), (1, 2), (1, 0), (0, 3)],
    "nobody": [],
}
ROLES = {"readers": "last", "movers": "last", "binders": "query_box", "nobody": "early"}
CIRCUIT = jm.Circuit(GROUPS, ROLES)
EMPTY = jm.Circuit({"nobody": []}, {"nobody": "early"})
EVERY_HEAD = [(layer, head) for layer in range(4) for head in range(4)]

Heads = Mapping[str, Sequence[tuple[int, int]]]  # by role


@dataclass(frozen=True)
class Case:
    """A model, prompts with labels, and means; answers are those of full forward passes."""

    model: jm.Model
    pairs: jm.Pairs
    means: np.ndarray
    known: dict = field(default_factory=dict)

    def answers(self, heads: Heads, elsewhere: bool = True) -> np.ndarray:
        """The next token [B] with all heads ablated but those of each role."""
        key = elsewhere, *((role, frozenset(chosen)) for role, chosen in heads.items())
        if key not in self.known:
            whole = not elsewhere and all(len(chosen) == len(EVERY_HEAD) for chosen in heads.values())
            evaluated = lambda: full_forward.evaluate(self.model, self.pairs, heads, self.means, elsewhere)  # noqa: E731
            self.known[key] = self.own_answers() if whole else evaluated().argmax(-1)
        return self.known[key]

    def correct(self, heads: Heads, elsewhere: bool = True) -> np.ndarray:
        return self.answers(heads, elsewhere) == self.pairs.labels

    def count(self, heads: Heads) -> int:
        return int(self.correct(heads).sum())

    def own_answers(self) -> np.ndarray:
        return full_forward.last_logits(self.model, self.pairs).argmax(-1)

    def with_labels(self, labels: np.ndarray) -> "Case":
        return replace(self, pairs=replace(self.pairs, labels=labels))


def left(circuit: jm.Circuit, gone: Heads) -> dict[str, list[tuple[int, int]]]:
    """The heads of each role without those of `gone`, by group."""
    heads = {role: [] for role in circuit.roles.values()}
    for group, members in circuit.groups.items():
        heads[circuit.roles[group]] += [head for head in members if head not in gone.get(group, ())]
    return heads


@pytest.fixture
def case(random_model, random_pairs) -> Case:
    """Labels are what the model says, or the circuit, or the circuit without some heads: accuracies between 0 and 1."""
    model = random_model(num_kv_heads=2)
    pairs = random_pairs(model, count=PROMPTS)
    case = Case(model, pairs, jm.mean_activations(model, random_pairs(model, count=50, seed=5).clean))
    weaker = [{"readers": [(3, 0), (1, 1)]}, {"readers": [(2, 3)], "binders": [(1, 0)]}, {"binders": [(0, 3)]}]
    said = [case.answers(left(CIRCUIT, gone)) for gone in ({}, *weaker)]
    said += [case.own_answers()] * 3 + [pairs.labels]
    return case.with_labels(np.choose(np.arange(PROMPTS) % len(said), said))


# Faithfulness.


@pytest.mark.parametrize("compat", [None, "paper"])
def test_faithfulness_is_the_ratio_of_accuracies_of_full_forwards(case, compat):
    found = jm.faithfulness(case.model, case.pairs, CIRCUIT, case.means, random=3, compat=compat)
    circuit, model = case.correct(left(CIRCUIT, {})), case.own_answers() == case.pairs.labels
    others = [case.correct(left(other, {})) for other in found.random_circuits]
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


@pytest.mark.parametrize("compat", [None, "paper"])
def test_completeness_takes_the_same_heads_from_circuit_and_model(case, compat):
    found = jm.completeness(case.model, case.pairs, CIRCUIT, case.means, random=4, compat=compat)
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
        circuit, whole = case.correct(left(CIRCUIT, gone)), case.correct(model, compat is None)
        np.testing.assert_array_equal(found.circuit.correct[i], circuit)
        np.testing.assert_array_equal(found.model.correct[i], whole)
        assert found.gap[i] == pytest.approx(abs(int(circuit.sum()) - int(whole.sum())) / PROMPTS)
        differ |= bool((case.correct(model, compat is not None) != whole).any())
    assert differ, "what happens to other tokens makes no difference here"
    assert len(set(found.circuit.accuracy)) > 2 and len(set(found.model.accuracy)) > 2


def test_random_subsets_have_each_head_half_of_the_time(case, monkeypatch):
    monkeypatch.setattr(jm.criteria, "evaluate", lambda *arguments, **options: None)
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


# Minimality.


@dataclass(frozen=True)
class HeadByHand:
    """What minimality says of one head."""

    without: dict[tuple[int, int], Fraction | float]  # accuracy without this head and that
    partners: list[tuple[int, int]]
    before: Fraction | float
    after: Fraction | float


def minimality_by_hand(
    case: Case, circuit: jm.Circuit, fraction: float, accuracy: Callable, together: Callable
) -> dict[str, list[HeadByHand]]:
    """Every head of every group; `accuracy` is a function of the number of right answers."""
    found: dict[str, list[HeadByHand]] = {}
    for group, heads in circuit.groups.items():

        def without(*gone, group=group):
            return accuracy(case.count(left(circuit, {group: gone})))

        found[group] = []
        for i, head in enumerate(heads):
            pair, drop = {}, {}
            for j, other in enumerate(heads):
                earlier = heads[min(i, j)]
                pair[other] = without(head, other) if together(head, other) else without(earlier)
                drop[other] = without(other) - pair[other]
            strongest = sorted((x for x in heads if x != head), key=lambda x: -drop[x])  # equal ones in their order
            partners = [x for x in strongest[: math.ceil(fraction * len(heads))] if drop[x] > 0]
            found[group].append(HeadByHand(pair, partners, without(*partners), without(*partners, head)))
    return found


def significance(head: HeadByHand) -> float:
    if head.after == 0:
        return 0.0 if head.before == 0 else math.inf
    return float(head.before / head.after - 1)


@pytest.mark.parametrize(("fraction", "threshold"), [(0.3, 0.01), (1.0, 0.08), (0.0, 0.0)])
@pytest.mark.parametrize("compat", [None, "paper"])
def test_minimality_equals_loops_over_full_forwards(case, fraction, threshold, compat):
    options = {"fraction": fraction, "threshold": threshold, "compat": compat}
    found = jm.minimality(case.model, case.pairs, CIRCUIT, case.means, **options)
    accuracy = (lambda n: round(n / PROMPTS, 2)) if compat else (lambda n: Fraction(n, PROMPTS))
    together = (lambda one, other: one[1] != other[1]) if compat else (lambda one, other: True)
    expected = minimality_by_hand(case, CIRCUIT, fraction, accuracy, together)
    named = [group for group in GROUPS if GROUPS[group]]
    assert list(found.scores) == list(found.pairs) == list(found.partners) == named
    for group in named:
        heads = GROUPS[group]
        matrix = [[float(by_hand.without[other]) for other in heads] for by_hand in expected[group]]
        np.testing.assert_allclose(found.pairs[group], matrix, rtol=1e-12)
        assert found.partners[group] == [by_hand.partners for by_hand in expected[group]]
        np.testing.assert_allclose(found.before[group], [float(x.before) for x in expected[group]], rtol=1e-12)
        np.testing.assert_allclose(found.after[group], [float(x.after) for x in expected[group]], rtol=1e-12)
        scores = [significance(by_hand) for by_hand in expected[group]]
        np.testing.assert_allclose(found.scores[group], scores, rtol=1e-9, atol=1e-12)
        assert found.circuit.groups[group] == [x for x, s in zip(heads, scores, strict=True) if s >= threshold]
    assert (found.circuit.groups["nobody"], found.circuit.roles, found.threshold) == ([], ROLES, threshold)
    kept = sum(len(heads) for heads in found.circuit.groups.values())
    assert 0 < kept < sum(len(heads) for heads in GROUPS.values()), "heads stay, and heads leave"
    assert any(partners for partners in found.partners["readers"]) == (fraction > 0)


def test_by_default_three_of_ten_heads_are_partners_and_one_percent_is_the_threshold(random_model, monkeypatch):
    """Of heads that each add something to the accuracy, which is the sum of what they add."""
    worth = {(layer, head): 0.04 for layer in range(3) for head in range(4)}
    worth |= {(3, 0): 0.0098, (3, 1): 0.0101}
    groups = {"ten": list(worth)[:10], "eleven": list(worth)[:11], "less": [(3, 0)], "more": [(3, 1)]}
    circuit = jm.Circuit(groups, {"ten": "last", "eleven": "early", "less": "query_box", "more": "query_box"})

    def evaluate(model, pairs, circuits, means, **options):
        other = 1 - sum(worth[head] for heads in circuit.heads_by_role.values() for head in heads)
        left = [sum(worth[head] for heads in one.values() for head in heads) for one in circuits]
        return SimpleNamespace(mean=other + np.array(left))

    monkeypatch.setattr(jm.criteria, "evaluate", evaluate)
    found = jm.minimality(random_model(), None, circuit, None)
    assert {len(partners) for partners in found.partners["ten"]} == {3}  # ceil(0.3 * 10)
    assert {len(partners) for partners in found.partners["eleven"]} == {4}  # ceil(0.3 * 11)
    assert (found.circuit.groups["less"], found.circuit.groups["more"]) == ([], [(3, 1)])


def test_the_paper_takes_heads_of_one_number_away_one_at_a_time(case):
    """(2, 3) and (1, 3) of the readers: without both it is not the same as without the first."""
    found, paper = (
        jm.minimality(case.model, case.pairs, CIRCUIT, case.means, compat=compat) for compat in (None, "paper")
    )
    both, first = (left(CIRCUIT, {"readers": gone}) for gone in ([(2, 3), (1, 3)], [(2, 3)]))
    assert found.pairs["readers"][0, 1] == pytest.approx(case.count(both) / PROMPTS)
    assert paper.pairs["readers"][0, 1] == paper.pairs["readers"][1, 0] == round(case.count(first) / PROMPTS, 2)
    assert case.count(both) != case.count(first)


def test_heads_without_which_nothing_is_right_score_infinity_and_stay(case):
    """Right is what the circuit says where a head of its own group changes that; elsewhere, what neither says."""
    one = jm.Circuit({"a": [(3, 0)], "b": [(1, 2)], "c": [(2, 2)]}, {"a": "last", "b": "query_box", "c": "last"})
    said, without = (case.answers(left(one, gone)) for gone in ({}, {"a": [(3, 0)]}))
    assert 3 < (said != without).sum() < PROMPTS
    neither = np.array([min({0, 1, 2} - {x, y}) for x, y in zip(said, without, strict=True)])
    labelled = case.with_labels(np.where(said != without, said, neither))
    found = jm.minimality(labelled.model, labelled.pairs, one, labelled.means, threshold=1e6)
    assert found.scores["a"][0] == np.inf
    assert found.before["a"][0] == (said != without).mean() and found.after["a"][0] == 0
    assert found.circuit.groups["a"] == [(3, 0)]
    assert np.isfinite(found.scores["b"][0]) and found.circuit.groups["b"] == []


def test_nothing_stays_where_nothing_is_ever_right(case):
    small = jm.Circuit({"readers": [(2, 3), (3, 0)]}, {"readers": "last"})
    said = [case.answers({"last": heads}) for heads in ([], [(2, 3)], [(3, 0)], [(2, 3), (3, 0)])]
    never = case.with_labels(np.array([min({0, 1, 2, 3, 4} - set(answers)) for answers in zip(*said, strict=True)]))
    found = jm.minimality(never.model, never.pairs, small, never.means)
    np.testing.assert_array_equal(found.scores["readers"], 0)
    assert found.circuit.groups == {"readers": []}


def test_a_head_in_two_groups_of_one_role_is_taken_away_from_both(case):
    """It is one head: the circuit without it does not have it, whichever group names it."""
    twice = jm.Circuit({**GROUPS, "movers": [*GROUPS["movers"], (0, 2)]}, ROLES)
    found = jm.minimality(case.model, case.pairs, twice, case.means, fraction=0.0)
    after = case.count(left(CIRCUIT, {"readers": [(0, 2)]})) / PROMPTS
    assert found.after["readers"][4] == found.after["movers"][2] == pytest.approx(after)
    assert abs(found.before["movers"][2] - after) > 0.1
    complete = jm.completeness(case.model, case.pairs, twice, case.means, random=0)
    without_movers = left(CIRCUIT, {"movers": GROUPS["movers"], "readers": [(0, 2)]})
    np.testing.assert_array_equal(complete.circuit.correct[2], case.correct(without_movers))


# Other metrics than accuracy.


@pytest.fixture
def measured(case) -> Callable:
    """A function from a metric to its keywords, and one from heads by role (None: the model) to its values [B]."""
    wrong = (case.pairs.labels + 7) % case.model.config.vocab_size
    rows = np.arange(PROMPTS)

    def by(metric: str):
        def values(heads: Heads | None, elsewhere: bool = True) -> np.ndarray:
            if heads is None:
                logits = full_forward.last_logits(case.model, case.pairs)
            else:
                logits = full_forward.evaluate(case.model, case.pairs, heads, case.means, elsewhere)
            logits = logits.astype(np.float64)
            right = logits[rows, case.pairs.labels]
            if metric == "logit_difference":
                return right - logits[rows, wrong]
            if metric == "function":
                return logits[rows, case.pairs.labels] ** 2
            log_probability = right - np.log(np.exp(logits).sum(-1))
            return np.exp(log_probability) if metric == "probability" else log_probability

        if metric == "function":
            return {"metric": squared_logit}, values
        return {"metric": metric, "wrong_labels": wrong if metric == "logit_difference" else None}, values

    def squared_logit(logits, rows):
        """Of the label, which is looked up by row."""
        assert logits.shape == (len(rows), case.model.config.vocab_size)
        return logits[jnp.arange(len(rows)), jnp.asarray(case.pairs.labels)[rows]] ** 2

    return by


def f(metric: str, values: np.ndarray) -> np.ndarray:
    return np.exp(values.mean(-1)) if metric == "log_probability" else values.mean(-1)


METRICS = ["probability", "log_probability", "logit_difference", "function"]


@pytest.mark.parametrize("metric", METRICS)
def test_faithfulness_in_other_metrics_is_that_of_full_forwards(case, measured, metric):
    options, values = measured(metric)
    found = jm.faithfulness(case.model, case.pairs, CIRCUIT, case.means, random=2, **options)
    model, circuit = values(None), values(left(CIRCUIT, {}))
    others = np.stack([values(left(other, {})) for other in found.random_circuits])
    for ours, theirs in ((found.model, model), (found.circuit, circuit), (found.random, others)):
        assert_close(ours.per_example, theirs, TOLERANCES.cone)
    assert found.ratio == pytest.approx(f(metric, circuit) / f(metric, model), rel=1e-4)
    np.testing.assert_allclose(found.random_ratios, f(metric, others) / f(metric, model), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.circuit.correct, case.correct(left(CIRCUIT, {})))
    nothing = values(dict.fromkeys(ROLES.values(), ()))
    assert_close(found.empty.per_example, nothing, TOLERANCES.cone)
    model, circuit, nothing = (f(metric, x) for x in (model, circuit, nothing))
    assert found.recovered == pytest.approx((circuit - nothing) / (model - nothing), rel=1e-3)
    low, high = found.confidence_interval()
    assert low < found.ratio < high and found.circuit.logits is None
    assert found.metric == ("squared_logit()" if metric == "function" else metric)
    mean_low, mean_high = found.circuit.confidence_interval()
    assert mean_low < found.circuit.mean < mean_high


@pytest.mark.parametrize("metric", METRICS)
def test_completeness_in_other_metrics_is_that_of_full_forwards(case, measured, metric):
    options, values = measured(metric)
    found = jm.completeness(case.model, case.pairs, CIRCUIT, case.means, random=1, **options)
    for i, gone in enumerate(found.subsets):
        every = dict.fromkeys(ROLES.values(), EVERY_HEAD)
        taken = {role: [h for g in gone if ROLES[g] == role for h in gone[g]] for role in every}
        model = values({role: [head for head in heads if head not in taken[role]] for role, heads in every.items()})
        circuit = values(left(CIRCUIT, gone))
        assert_close(found.circuit.per_example[i], circuit, TOLERANCES.cone)
        assert_close(found.model.per_example[i], model, TOLERANCES.cone)
        assert found.gap[i] == pytest.approx(abs(f(metric, circuit) - f(metric, model)), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_minimality_in_other_metrics_equals_loops_over_full_forwards(case, measured, metric):
    options, values = measured(metric)
    small = jm.Circuit(
        {g: GROUPS[g][:3] for g in ("readers", "binders")}, {g: ROLES[g] for g in ("readers", "binders")}
    )
    whole = lambda group, gone: f(metric, values(left(small, {group: gone})))  # noqa: E731
    found = jm.minimality(case.model, case.pairs, small, case.means, fraction=0.3, **options)
    assert found.whole == pytest.approx(whole("readers", []), rel=1e-4)
    for group, heads in small.groups.items():
        without = np.array([[whole(group, [i, j]) for j in heads] for i in heads])
        assert_close(found.pairs[group], without, TOLERANCES.cone)
        for i, head in enumerate(heads):
            drop = np.diag(without) - without[i]
            best = max((x for x in range(len(heads)) if x != i), key=lambda j, drop=drop: drop[j])
            partners = [heads[best]] if drop[best] > 0 else []  # ceil(0.3 * 3) = 1
            assert found.partners[group][i] == partners
            before, after = whole(group, partners), whole(group, [*partners, head])
            assert found.before[group][i] == pytest.approx(before, rel=1e-4)
            assert found.after[group][i] == pytest.approx(after, rel=1e-4)
            signed = metric in ("logit_difference", "function")
            score = (before - after) / abs(found.whole) if signed else before / after - 1
            assert found.scores[group][i] == pytest.approx(score, abs=1e-3)
        kept = [head for head, score in zip(heads, found.scores[group], strict=True) if score >= 0.01]
        assert found.circuit.groups[group] == kept


@pytest.mark.parametrize("metric", ["logit_difference", "anything()"])
def test_a_head_without_which_a_negative_value_is_more_negative_scores_high(metric):
    """Its ratio would say that the head is good for nothing."""
    before, after = {"g": np.array([-0.14])}, {"g": np.array([-0.76])}
    found = jm.Minimality({}, {}, before, after, -0.1, 0.01, CIRCUIT, metric)
    assert found.scores["g"] == pytest.approx([6.2])
    assert jm.Minimality({}, {}, before, after, -0.1, 0.01, CIRCUIT, "probability").scores["g"] == [0]


def test_where_the_label_is_never_the_most_probable_token_another_metric_tells_circuits_apart(case):
    """As in indirect object identification: accuracy knows nothing, the logit difference does."""
    never = case.with_labels((case.own_answers() + 1) % case.model.config.vocab_size)
    args = never.model, never.pairs, CIRCUIT, never.means
    assert math.isnan(jm.faithfulness(*args, random=1).ratio)
    found = jm.faithfulness(*args, random=1, metric="probability")
    assert found.model.accuracy == 0 and found.ratio > 0 and found.random_ratios[0] > 0
    assert abs(found.ratio - found.random_ratios[0]) > 0.01


def test_what_is_measured_does_not_depend_on_parts_or_kept_logits(case, measured):
    args = case.model, case.pairs, [CIRCUIT, {"last": []}, {"last": EVERY_HEAD}], case.means
    options, function = {"metric": "probability"}, measured("function")[0]
    for elsewhere in (True, False):
        squared = [jm.evaluate(*args, elsewhere, batch_size=size, **function).measured for size in (None, 5)]
        assert_close(squared[1], squared[0], TOLERANCES.recompiled)
        whole = jm.evaluate(*args, elsewhere, **options)
        parts = jm.evaluate(*args, elsewhere, batch_size=5, keep_logits=False, **options)
        assert whole.logits is not None and parts.logits is None and whole.measured is not None
        assert_close(parts.measured, whole.measured, TOLERANCES.recompiled)
        right = jax.nn.softmax(whole.logits)[:, np.arange(PROMPTS), case.pairs.labels]
        assert_close(whole.measured, right, TOLERANCES.recompiled)
    assert jm.evaluate(*args).measured is None
    own = jm.predict(case.model, case.pairs, batch_size=7, **options)
    assert_close(own.measured, jm.path_patch(case.model, case.pairs).probability, TOLERANCES.cone)


# Overlap.


def test_overlap_is_precision_and_recall_by_group():
    ours = jm.Circuit(
        {"a": [(0, 1), (2, 3), (1, 1)], "b": [], "c": [(0, 0)], "d": [(1, 2)], "e": []}, dict.fromkeys("abcde", "last")
    )
    theirs = {"d": [(2, 1)], "b": [(0, 0)], "a": [(2, 3), (0, 2), (0, 1), (3, 3)], "c": [], "f": []}
    theirs = jm.Circuit(theirs, dict.fromkeys("abcdf", "last"))
    found = jm.overlap(ours, theirs)
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"] == (2 / 3, 2 / 4)
    assert found["d"] == (0.0, 0.0)
    np.testing.assert_array_equal(found["b"], [np.nan, 0])
    np.testing.assert_array_equal(found["c"], [0, np.nan])
    assert jm.overlap(ours, ours)["a"] == (1.0, 1.0)


# Bootstrap.


def test_resampled_means_are_means_of_drawn_examples():
    values = np.random.default_rng(0).normal(size=(2, 3, 7))
    found = bootstrap.resampled_means(values, resamples=5, seed=4)
    drawn = np.random.default_rng(4).multinomial(7, np.full(7, 1 / 7), size=5)
    assert found.shape == (2, 3, 5) and (drawn.sum(1) == 7).all()
    for (i, j), r in [((i, j), r) for i, j in np.ndindex(2, 3) for r in range(5)]:
        assert found[i, j, r] == pytest.approx(np.repeat(values[i, j], drawn[r]).mean())
    assert_close(bootstrap.resampled_means(values[1], resamples=5, seed=4), found[1], TOLERANCES.recompiled)


def test_bounds_are_the_central_quantiles():
    samples = np.random.default_rng(0).permutation(101) / 100
    np.testing.assert_allclose(bootstrap.bounds(samples, 0.9), (0.05, 0.95))
    np.testing.assert_allclose(bootstrap.bounds(np.stack([samples, samples + 1]), 0.5), [[0.25, 1.25], [0.75, 1.75]])


def test_the_interval_of_a_mean_widens_with_the_level_and_narrows_with_examples():
    values = np.random.default_rng(1).normal(size=400)
    few, many = bootstrap.interval(values[:100]), bootstrap.interval(values)
    wide = bootstrap.interval(values, 0.99)
    assert wide[0] < many[0] < values.mean() < many[1] < wide[1]
    assert_close((few[1] - few[0]) / (many[1] - many[0]), 2, 0.2)


# Predictions.


@pytest.mark.parametrize(("right", "count", "level"), [(8, 10, 0.95), (0, 10, 0.95), (10, 10, 0.95), (1, 40, 0.9)])
def test_intervals_of_accuracies_are_score_intervals(right, count, level):
    """The bounds are the proportions from which the accuracy is z standard errors away."""
    low, high = jm.Predictions(np.arange(count) < right).confidence_interval(level)
    z, p = {0.95: 1.959964, 0.9: 1.644854}[level], right / count
    for bound in {float(low), float(high)} - {0.0, 1.0}:
        assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / count), abs=1e-6)
    assert (low == 0) == (right == 0) and (high == 1) == (right == count) and low < high
    if (right, count) == (8, 10):
        np.testing.assert_allclose([low, high], [0.4902, 0.9433], atol=5e-5)


def test_intervals_of_accuracies_stay_between_nothing_and_all_and_have_a_width():
    for count in (*range(1, 60), 350, 1000):
        correct = np.arange(count) < np.arange(count + 1)[:, None]
        low, high = jm.Predictions(correct).confidence_interval()
        accuracy = correct.mean(-1)
        assert (low[0], high[-1]) == (0, 1) and (low >= 0).all() and (high <= 1).all()
        assert (low <= accuracy).all() and (accuracy <= high).all() and (high - low > 0.003).all()
    with pytest.raises(ValueError, match="level=1.0; expected a fraction between 0 and 1"):
        jm.Predictions(correct).confidence_interval(1.0)


def test_resamples_of_prompts_that_are_all_right_are_all_right():
    for count in (7, 49, 350):
        assert (bootstrap.resampled_means(np.ones(count, bool)) == 1).all()


def test_predictions_are_shown_in_one_line():
    assert repr(jm.Predictions(np.array([True, False, True, True]))) == "Predictions(4 prompts, accuracy 0.750)"
    many = jm.Predictions(np.eye(2, 4, dtype=bool), np.zeros((2, 4, 9)), np.zeros((2, 4)))
    assert repr(many) == "Predictions(2 x 4 prompts, accuracies 0.250 to 0.250, logits, measured)"
    assert many == many and many != jm.Predictions(many.correct), "compared as objects, not array by array"


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
