"""The shipped pair: what its model card says of it."""

import re

import pytest

import jaxmech as jm

CARD = jm.demo.path("MODEL_CARD.md").read_text()


@pytest.fixture(scope="module", params=["base", "tuned"])
def shipped(request):
    model = jm.load(jm.demo.path(request.param))
    return request.param, model, jm.boxes.pairs(jm.boxes.make(50, seed=0), model.tokenizer, seed=0)


def test_accuracies_are_those_of_the_model_card(shipped):
    name, model, pairs = shipped
    accuracy = jm.accuracy(model, pairs)
    assert 0.55 <= accuracy <= 0.75 if name == "base" else accuracy >= 0.95
    stated = re.search(r"seeds 0, 1, 2\) \| ([\d.]+) %.*?\| ([\d.]+) %", CARD)
    assert (
        stated and abs(float(stated[1 if name == "base" else 2]) / 100 - accuracy) < 0.01
    )  # rounding of bfloat16 weights


def test_heads_and_effects_are_those_of_the_model_card(shipped):
    name, model, pairs = shipped
    chain = jm.read_chain(jm.demo.path("chain.toml"))
    few = {"value_fetcher": 4, "object_lookup": 2, "object_binder": 2, "label_matcher": 4}
    circuit = jm.discover(model, pairs, few, chain)
    for stage in chain:
        cell = re.search(rf"\| {stage.group} \| `{stage.sender}` \| ([^|]+) \| ([^|]+) \|", CARD)
        assert cell, stage.group
        stated = re.findall(r"(\d)\.(\d) \((-\d+) %\)", cell[1 if name == "base" else 2])
        assert [(int(layer), int(head)) for layer, head, _ in stated] == circuit.groups[stage.group]
        for layer, head, percent in stated:
            assert abs(100 * circuit.scores[stage.group].mean[int(layer), int(head)] - int(percent)) < 1


def test_the_circuit_of_the_demo_is_found_by_the_sweeps_that_the_card_describes():
    base = jm.load(jm.demo.path("base"))
    pairs = jm.boxes.pairs(jm.boxes.make(50, seed=0), base.tokenizer, seed=0)
    with pytest.warns(UserWarning, match="'pos_transmitter'.*found no head"):
        jm.discover(base, pairs, {"value_fetcher": 4}, min_effect=0.01)


def test_an_unknown_demo_file_is_named():
    with pytest.raises(FileNotFoundError, match="no 'large'"):
        jm.demo.path("large")
