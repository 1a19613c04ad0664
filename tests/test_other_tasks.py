"""A task that is not boxes, from plain arrays and without a tokenizer, through every method: shapes and dtypes.

Induction: ... A B ... A -> B. The corrupt prompt has another token in place of the earlier A. Prompts differ in length,
and the clean ones from their corrupt ones.
"""

import dataclasses

import numpy as np
import pytest

import jaxmech as jm

LAYERS, HEADS, HEAD_DIM, VOCAB, COUNT, LENGTH = 3, 4, 8, 40, 9, 12
CHAIN = (jm.Stage("inducers", "last", k=3), jm.Stage("previous_token", "second", "inducers", "v", k=2))
CIRCUIT = {"last": [(2, 0), (1, 3)], "second": [(0, 1), (1, 1)]}
GROUPS = jm.Circuit({"a": CIRCUIT["last"], "b": CIRCUIT["second"]}, {"a": "last", "b": "second"})


@pytest.fixture
def model(random_model) -> jm.Model:
    model = random_model(num_layers=LAYERS, num_kv_heads=2, vocab_size=VOCAB)
    assert model.tokenizer is None
    return model


@pytest.fixture
def tuned(random_model) -> jm.Model:
    return random_model(7, num_layers=LAYERS, num_kv_heads=2, vocab_size=VOCAB)


@pytest.fixture
def pairs() -> jm.Pairs:
    """Lists and arrays of whatever integer dtype."""
    rng = np.random.default_rng(0)
    clean = np.array([rng.permutation(VOCAB)[:LENGTH] for _ in range(COUNT)], np.int64)
    rows, first = np.arange(COUNT), rng.integers(1, 4, COUNT)
    last = rng.integers(LENGTH - 3, LENGTH, COUNT)
    clean[rows, last] = clean[rows, first]
    corrupt = np.concatenate([rng.integers(0, VOCAB, (COUNT, 2)), clean], axis=1)  # two tokens longer
    corrupt[rows, first + 2] = (clean[rows, first] + 1) % VOCAB
    positions = {"last": list(last), "second": first + 1}
    corrupt_positions = {"last": last + 2, "second": np.uint8(first + 3)}
    return jm.Pairs(clean.tolist(), corrupt, clean[rows, first + 1], positions, corrupt_positions)


@pytest.fixture
def means(model, pairs) -> np.ndarray:
    whole = np.full(COUNT, LENGTH - 1)  # what pads is as good as any token here
    return jm.mean_activations(model, pairs.clean, whole)


def has(array, shape: tuple[int, ...], dtype) -> bool:
    """Whether it is such an array, of finite numbers."""
    return array.shape == shape and array.dtype == dtype and bool(np.isfinite(array).all())


def check_predictions(found: jm.Predictions, *shape: int) -> None:
    """Predictions over `shape` interventions."""
    assert has(found.correct, (*shape, COUNT), bool)
    assert found.logits is not None and has(found.logits, (*shape, COUNT, VOCAB), np.float32)
    assert np.shape(found.accuracy) == shape
    low, high = found.confidence_interval(resamples=20)
    assert np.shape(low) == np.shape(high) == shape and np.all(low <= high)


def test_answers_and_their_accuracy(model, pairs):
    answers = np.asarray(model(pairs.clean)[0])[np.arange(COUNT), pairs.position("last")].argmax(-1)
    pairs.labels[::2] = answers[::2]
    found = jm.predict(model, pairs, batch_size=4)
    check_predictions(found)
    assert 0 < found.accuracy < 1
    np.testing.assert_array_equal(found.correct, pairs.labels == answers)
    assert isinstance(jm.accuracy(model, pairs), float) and jm.accuracy(model, pairs) == found.accuracy
    assert jm.accuracy(model, pairs[found.correct]) == 1


@pytest.mark.parametrize(
    ("sender", "receivers", "via"), [("last", None, None), ("last", [(2, 1)], "q"), ("second", [(1, 0), (2, 3)], "v")]
)
def test_path_patching(model, pairs, sender, receivers, via):
    found = jm.path_patch(model, pairs, sender, receivers, via)
    assert has(found.per_example, (LAYERS, HEADS, COUNT), np.float32) and found.per_example.any()
    assert has(found.mean, (LAYERS, HEADS), np.float32) and has(found.probability, (COUNT,), np.float32)
    assert all(isinstance(number, int) for head in found.top(3) for number in head)


def test_discovery_by_a_chain_of_two_stages(model, pairs, tmp_path):
    """With the model's own answers for labels, so that patches can take away from their probability."""
    answers = np.asarray(model(pairs.clean)[0])[np.arange(COUNT), pairs.position("last")].argmax(-1)
    pairs = dataclasses.replace(pairs, labels=answers)
    found = jm.discover(model, pairs, chain=CHAIN)
    assert not found.stopped and found.roles == {"inducers": "last", "previous_token": "second"}
    assert 1 <= len(found.groups["inducers"]) <= 3 and 1 <= len(found.groups["previous_token"]) <= 2
    assert set(found.heads_by_role) == {"last", "second"}
    found.save(tmp_path / "circuit.json", roles=False)
    assert jm.Circuit.load(tmp_path / "circuit.json", CHAIN).groups == found.groups


def test_mean_and_resampled_activations(model, pairs, means):
    assert has(means, (LENGTH, LAYERS, HEADS, HEAD_DIM), np.float32)
    drawn = jm.resampled_activations(model, pairs.clean, COUNT)
    assert has(drawn, (COUNT, LENGTH, LAYERS, HEADS, HEAD_DIM), np.float32)
    check_predictions(jm.evaluate(model, pairs, [CIRCUIT], drawn), 1)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_circuit_evaluation(model, pairs, means, elsewhere):
    check_predictions(jm.evaluate(model, pairs, [CIRCUIT, {"last": []}, GROUPS], means, elsewhere), 3)


def test_faithfulness(model, pairs, means):
    found = jm.faithfulness(model, pairs, GROUPS, means, random=3)
    assert isinstance(found.ratio, float) and has(found.random.correct, (3, COUNT), bool)
    assert found.random_ratios.shape == (3,) and len(found.random_circuits) == 3
    assert found.model.correct.shape == found.circuit.correct.shape == (COUNT,)


def test_completeness(model, pairs, means):
    found = jm.completeness(model, pairs, GROUPS, means, random=2)
    assert found.names == ["nothing", "a", "b", "random 1", "random 2"] and len(found.subsets) == 5
    assert has(found.gap, (5,), np.float64) and (found.gap <= 1).all()
    assert has(found.circuit.correct, (5, COUNT), bool) and has(found.model.correct, (5, COUNT), bool)


def test_minimality_and_overlap(model, pairs, means):
    found = jm.minimality(model, pairs, GROUPS, means)
    for group in ("a", "b"):
        assert has(found.pairs[group], (2, 2), np.float64)
        assert {x.shape for x in (found.before[group], found.after[group], found.scores[group])} == {(2,)}
        assert len(found.partners[group]) == 2 and set(found.circuit.groups[group]) <= set(GROUPS.groups[group])
    assert set(jm.overlap(found.circuit, GROUPS)) == {"a", "b"}


def test_masks(model, pairs):
    heads = [(1, 0), (2, 3), (1, 2)]
    run = jm.dcm.train(model, pairs, heads, "second", batch_size=4)
    assert has(run.mask, (3,), np.float32) and (run.mask >= 0).all() and (run.mask <= 1).all()
    assert has(run.history.loss, (6,), np.float32) and has(run.history.mask, (6, 3), np.float32)
    assert has(run.history.rows, (6, 4), int) and run.step == 6
    best = jm.dcm.select(model, run, pairs, "second", every=2)
    assert best.step in (2, 4, 6) and set(best.selected) <= set(heads)
    assert best.validation_accuracy is not None and 0 <= best.validation_accuracy <= 1
    found = jm.dcm.accuracy(model, pairs, heads, np.array([[1, 1, 1], [0, 1, 0]]), "second")
    assert has(found, (2,), np.float64)


def test_activation_patching(model, pairs):
    check_predictions(jm.patch_activations(model, pairs, CIRCUIT))


@pytest.mark.parametrize("components", [("z",), ("q", "k", "v")], ids="+".join)
def test_cross_model_patching(model, tuned, pairs, components):
    kept = jm.collect(tuned, pairs, ["second", "last"], components)
    assert list(kept.values) == list(components) and kept.roles == ("second", "last")
    assert all(has(x, (LAYERS, COUNT, 2, HEADS, HEAD_DIM), np.float32) for x in kept.values.values())
    found = jm.cmap(model, kept, pairs, CIRCUIT, components)
    check_predictions(found)
    check_predictions(jm.cmap(model, tuned, pairs, CIRCUIT, components))


def test_the_cross_model_sweep_over_heads(model, tuned, pairs):
    found = jm.cmap_heads(model, tuned, pairs, "second")
    assert has(found.accuracy, (LAYERS, HEADS), np.float64) and isinstance(found.clean_accuracy, float)
    assert has(found.scores.per_example, (LAYERS, HEADS, COUNT), np.float32)
    helpers = [found.scores.mean[head] for head in found.top(LAYERS * HEADS)]
    assert helpers == sorted(helpers, reverse=True) and (found.scores.mean > 0).sum() <= len(helpers)
    assert found.top(1) == [tuple(np.argwhere(found.scores.mean == found.scores.mean.max())[0].tolist())]


@pytest.mark.parametrize("control", [False, True])
def test_knockouts(model, pairs, control):
    random = jm.random_target(pairs, "last")
    assert has(random, (COUNT,), int) and (random < pairs.position("last")).all()
    check_predictions(jm.knockout(model, pairs, "last", random if control else "second"), LAYERS)


METHODS = {
    "accuracy": lambda model, tuned, pairs, means: jm.accuracy(model, pairs),
    "path_patch": lambda model, tuned, pairs, means: jm.path_patch(model, pairs).top(1),
    "evaluate": lambda model, tuned, pairs, means: jm.evaluate(model, pairs, [CIRCUIT], means),
    "evaluate, left elsewhere": lambda model, tuned, pairs, means: jm.evaluate(model, pairs, [CIRCUIT], means, False),
    "patch_activations": lambda model, tuned, pairs, means: jm.patch_activations(model, pairs, CIRCUIT),
    "cmap": lambda model, tuned, pairs, means: jm.cmap(model, tuned, pairs, CIRCUIT),
    "cmap, paper": lambda model, tuned, pairs, means: jm.cmap(model, tuned, pairs, CIRCUIT, compat="paper"),
    "cmap_heads": lambda model, tuned, pairs, means: jm.cmap_heads(model, tuned, pairs),
    "knockout": lambda model, tuned, pairs, means: jm.knockout(model, pairs, "last", "second", keep_logits=False),
    "dcm.train": lambda model, tuned, pairs, means: jm.dcm.train(model, pairs, [(0, 1)], batch_size=4),
    "dcm.accuracy": lambda model, tuned, pairs, means: jm.dcm.accuracy(model, pairs, [(0, 1)], np.ones((1, 1))),
}


@pytest.mark.parametrize("method", METHODS)
def test_labels_outside_the_vocabulary_are_refused(model, tuned, pairs, means, method):
    other = dataclasses.replace(pairs, labels=pairs.labels + VOCAB)
    with pytest.raises(ValueError, match="labels reach from .* made with another tokenizer"):
        METHODS[method](model, tuned, other, means)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_no_answers(model, tuned, pairs, means, method):
    """An argmax of nan is token 0, which here is every label."""
    broken = jm.Model(model.config, {"params": {**model.weights, "embed": model.weights["embed"] * np.nan}})
    other = dataclasses.replace(pairs, labels=0 * pairs.labels)
    with pytest.raises(ValueError, match="not finite"):
        METHODS[method](broken, tuned, other, means)
