"""Minimality against hand-written loops over plain full forward passes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from criteria_case import CIRCUIT, GROUPS, PROMPTS, ROLES, Case, left, made

import jaxmech as jm


@pytest.fixture
def case(random_model, random_pairs) -> Case:
    return made(random_model, random_pairs)


@dataclass(frozen=True)
class HeadByHand:
    """What minimality says of one head."""

    without: dict[tuple[int, int], Fraction | float]  # accuracy without this head and that
    partners: list[tuple[int, int]]
    before: Fraction | float
    after: Fraction | float


def minimality_by_hand(
    case: Case, circuit: jm.Circuit, fraction: float, accuracy: Callable, together: Callable, elsewhere: bool = True
) -> dict[str, list[HeadByHand]]:
    """Every head of every group; `accuracy` is a function of the number of right answers."""
    found: dict[str, list[HeadByHand]] = {}
    for group, heads in circuit.groups.items():

        def without(*gone, group=group):
            return accuracy(case.count(left(circuit, {group: gone}), elsewhere))

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
@pytest.mark.parametrize(("compat", "elsewhere"), [(None, True), (None, False), ("paper", True)])
def test_minimality_equals_loops_over_full_forwards(case, fraction, threshold, compat, elsewhere):
    options = {"fraction": fraction, "threshold": threshold, "compat": compat, "ablate_elsewhere": elsewhere}
    found = jm.minimality(case.model, case.pairs, CIRCUIT, case.means, **options)
    accuracy = (lambda n: round(n / PROMPTS, 2)) if compat else (lambda n: Fraction(n, PROMPTS))
    together = (lambda one, other: one[1] != other[1]) if compat else (lambda one, other: True)
    expected = minimality_by_hand(case, CIRCUIT, fraction, accuracy, together, elsewhere)
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

    monkeypatch.setattr(jm.criteria.minimal, "evaluate", evaluate)
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
