"""Metrics of an effect, and what is read off scores: intervals, the strongest heads, tables and files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from full_forward import path_patch as full_path_patch

import jaxmech as jm

RECEIVERS = [(2, 1), (3, 0)]


@pytest.fixture
def sweep(random_model, random_pairs):
    model = random_model()
    pairs = random_pairs(model)
    return model, pairs, (pairs.labels + 7) % model.config.vocab_size


def test_log_probability_is_the_logarithm_of_the_probability_ratio(sweep):
    model, pairs, _ = sweep
    ratio = jm.path_patch(model, pairs, "query_box", RECEIVERS, "v")
    log = jm.path_patch(model, pairs, "query_box", RECEIVERS, "v", metric="log_probability")
    assert (ratio.metric, log.metric) == ("probability", "log_probability")
    assert_close(log.per_example, np.log1p(ratio.per_example), TOLERANCES.cone)


@pytest.mark.parametrize(("receivers", "via"), [(None, None), (RECEIVERS, "q")])
def test_logit_difference_equals_that_of_full_forwards(sweep, receivers, via):
    model, pairs, wrong = sweep
    rows = np.arange(len(pairs))

    def difference(logits):
        at_last = logits[rows, pairs.positions["last"]]
        return at_last[rows, pairs.labels] - at_last[rows, wrong]

    found = jm.path_patch(model, pairs, "last", receivers, via, metric="logit_difference", wrong_labels=wrong)
    expected = full_path_patch(model, pairs, "last", receivers, via, outcome=difference)
    assert_close(found.per_example, expected, TOLERANCES.cone)


def test_wrong_labels_may_be_part_of_the_pairs_and_are_selected_with_them(sweep):
    model, pairs, wrong = sweep
    with_wrong, some = dataclasses.replace(pairs, wrong_labels=wrong), np.array([3, 0])
    tuned = jm.Model(model.config, jax.tree.map(lambda x: x * 1.3, model.params))
    for method in (
        lambda pairs, **options: jm.path_patch(model, pairs, **options).per_example,
        lambda pairs, **options: jm.predict(model, pairs, **options).per_example,
        lambda pairs, **options: jm.cmap_heads(model, tuned, pairs, **options).scores.per_example,
    ):
        expected = method(pairs, metric="logit_difference", wrong_labels=wrong)
        assert np.abs(expected).max() > 0.01
        np.testing.assert_array_equal(method(with_wrong, metric="logit_difference"), expected)
        found = method(with_wrong[some], metric="logit_difference")
        np.testing.assert_allclose(found, expected[..., some], atol=1e-4)
    given = jm.predict(model, with_wrong, metric="logit_difference", wrong_labels=(wrong + 1) % 50).per_example
    own = jm.predict(model, with_wrong, metric="logit_difference").per_example
    assert np.abs(given - own).max() > 0.1, "those given count"
    jm.predict(model, with_wrong)  # no metric needs them


@pytest.mark.parametrize(
    ("metric", "change", "message"),
    [
        ("accuracy", None, "metric='accuracy'; expected one of probability, log_probability, logit_difference"),
        ("probability", lambda wrong: wrong, "has no use for them"),
        ("logit_difference", None, "needs wrong_labels"),
        ("logit_difference", lambda wrong: wrong[:2], r"shape \(2,\)"),
        ("logit_difference", lambda wrong: wrong + 0.5, "dtype float64"),
        ("logit_difference", lambda wrong: wrong + 50, "expected ids 0..49"),
        ("logit_difference", lambda wrong: (wrong - 7) % 50, "example 0 is its correct label"),
        ("logit_difference", lambda wrong: (wrong - 7 * (np.arange(5) == 3)) % 50, "example 3 is its correct label"),
    ],
)
def test_metrics_that_cannot_be_meant_are_named(sweep, metric, change, message):
    model, pairs, wrong = sweep
    with pytest.raises(ValueError, match=message):
        jm.path_patch(model, pairs, metric=metric, wrong_labels=change and change(wrong))


def test_a_metric_without_a_hash_is_named(sweep):
    class Metric:
        __hash__ = None

        def __call__(self, logits, rows):
            return logits[:, 0]

    model, pairs, _ = sweep
    with pytest.raises(ValueError, match=r"metric Metric\(\) has no hash"):
        jm.predict(model, pairs, metric=Metric())


def test_confidence_intervals_are_those_of_normal_scores():
    rng = np.random.default_rng(1)
    scores = jm.PathScores(rng.normal(-0.3, 0.2, (2, 3, 400)).astype(np.float32), np.ones(400, np.float32))
    low, high = scores.confidence_interval(0.95, resamples=4000)
    half = 1.96 * scores.per_example.std(-1) / 20  # the normal approximation, sqrt(400) = 20
    assert_close(low, scores.mean - half, 0.01)
    assert_close(high, scores.mean + half, 0.01)
    narrow_low, narrow_high = scores.confidence_interval(0.5)
    assert (low < narrow_low).all() and (narrow_high < high).all()


def test_confidence_intervals_of_equal_examples_have_no_width():
    scores = jm.PathScores(np.full((1, 1, 8), -0.25, np.float32), np.ones(8, np.float32))
    low, high = scores.confidence_interval()
    np.testing.assert_allclose([low[0, 0], high[0, 0]], -0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 0.0}, "level=0.0; expected a fraction between 0 and 1"),
        ({"level": 1.5}, "level=1.5; expected a fraction between 0 and 1"),
        ({"resamples": 0}, "resamples=0; expected at least 1"),
    ],
)
def test_impossible_intervals_are_refused(arguments, message):
    scores = jm.PathScores(np.zeros((1, 1, 2), np.float32), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=message):
        scores.confidence_interval(**arguments)


def test_probability_scores_are_relative_losses(sweep):
    """The paper's score from probabilities that are computed here, of one head by hand."""
    model, pairs, _ = sweep
    rows, last = np.arange(len(pairs)), pairs.positions["last"]
    logits, clean = model(pairs.clean, capture=("attn_out", "z"))
    _, corrupt = model(pairs.corrupt, capture=("z",))
    delta = corrupt["z"][3, rows, pairs.corrupt_positions["last"], 1] - clean["z"][3, rows, last, 1]
    changed = clean["attn_out"].at[3, rows, last].add(delta @ model.weights["blocks"]["o"][3, 1])
    patched, _ = model(pairs.clean, jm.Interventions(attn_out=jm.Patch(1.0, changed)))
    before, after = (jax.nn.softmax(x[rows, last])[rows, pairs.labels] for x in (logits, patched))
    assert_close(jm.path_patch(model, pairs).per_example[3, 1], (after - before) / before, TOLERANCES.cone)


# What is read off scores.


@pytest.fixture
def scores() -> jm.PathScores:
    """Means -0.5, 0.25, 0, -0.125, 0.75, 0 of 3 layers x 2 heads."""
    mean = np.array([[-0.5, 0.25], [0, -0.125], [0.75, 0]], np.float32)
    noise = np.array([-0.25, 0.25, 0, 0], np.float32)
    return jm.PathScores(mean[..., None] + noise, np.array([0.5, 0.25, 0.125, 1], np.float32), "log_probability")


def test_the_strongest_heads_of_either_sign(scores):
    assert scores.top(2) == [(0, 0), (1, 1)]
    assert scores.top(2, largest=True) == [(2, 0), (0, 1)]
    assert scores.top(6, 0.2) == [(0, 0)] and scores.top(6, 0.2, largest=True) == [(2, 0), (0, 1)]
    assert scores.top(6, largest=True) == [(2, 0), (0, 1)], "heads without effect, whose mean is 0"
    tied = jm.PathScores(np.full((2, 2, 3), -0.5, np.float32), np.ones(3, np.float32))
    assert tied.top(3) == [(0, 0), (0, 1), (1, 0)], "ties go to the lower head"


def test_a_table_has_a_row_for_each_head(scores):
    rows = scores.table(0.9, resamples=50, seed=2)
    low, high = scores.confidence_interval(0.9, resamples=50, seed=2)
    assert [(row["layer"], row["head"]) for row in rows] == [(i, j) for i in range(3) for j in range(2)]
    for row in rows:
        place = row["layer"], row["head"]
        assert row == dict(zip(row, [*place, scores.mean[place], low[place], high[place]], strict=True))
        assert [type(x) for x in row.values()] == [int, int, float, float, float]
    assert list(rows[0]) == ["layer", "head", "mean", "low", "high"]


def test_scores_are_shown_in_one_line(scores):
    assert repr(scores) == "PathScores([L, N, B] = [3, 2, 4], log_probability, means -0.5 to 0.75)"


def test_scores_are_saved_and_read_back(scores, tmp_path):
    scores.save(tmp_path / "new" / "scores")  # under exactly this name
    found = jm.PathScores.load(tmp_path / "new" / "scores")
    np.testing.assert_array_equal(found.per_example, scores.per_example)
    np.testing.assert_array_equal(found.probability, scores.probability)
    assert (found.metric, type(found.metric), found.per_example.dtype) == ("log_probability", str, np.float32)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["scores"]


GOOD = {"per_example": np.zeros((2, 2, 3)), "probability": np.ones(3), "metric": "probability"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"per_example": np.zeros((2, 2, 3))}, r"holds \['per_example'\]; expected per_example, .* jm.read_scores"),
        (
            {"per_example": np.zeros((2, 2, 3)), "probability": np.ones(2), "metric": "probability"},
            "is damaged: it holds",
        ),
        (
            {"per_example": np.zeros((2, 2, 3)), "probability": np.ones(3), "metric": "loss"},
            "and metric 'loss'; expected",
        ),
        ({**GOOD, "per_example": np.array([{}])}, "allow_pickle"),
        (None, "is damaged"),
    ],
)
def test_files_that_hold_no_scores_are_named(tmp_path, arrays, message):
    file = tmp_path / "scores.npz"
    file.write_bytes(b"scores") if arrays is None else np.savez(file, **arrays)
    with pytest.raises(ValueError, match=f"scores.npz .*{message}|scores.npz {message}"):
        jm.PathScores.load(file)
    with pytest.raises(FileNotFoundError):
        jm.PathScores.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("sender", "receivers", "via", "batch_size"),
    [("last", None, None, 2), ("last", [(2, 1), (3, 0)], "q", None), ("early", [(1, 2), (2, 1)], "v", 2)],
)
def test_a_function_of_the_logits_is_a_metric(sweep, tmp_path, sender, receivers, via, batch_size):
    """The logit difference, written out, of tables that are looked up by row."""
    model, pairs, wrong = sweep
    labels, others = jnp.asarray(pairs.labels), jnp.asarray(wrong)

    def difference(logits, rows):
        assert logits.shape[-1] == model.config.vocab_size and logits.shape[:-1] == rows.shape
        index = jnp.arange(len(rows))
        return logits[index, labels[rows]] - logits[index, others[rows]]

    options = {"batch_size": batch_size}
    found = jm.path_patch(model, pairs, sender, receivers, via, metric=difference, **options)
    expected = jm.path_patch(
        model, pairs, sender, receivers, via, metric="logit_difference", wrong_labels=wrong, **options
    )
    assert_close(found.per_example, expected.per_example, TOLERANCES.recompiled)
    assert found.per_example.any() and found.metric == "difference()"
    found.save(tmp_path / "scores.npz")
    assert jm.PathScores.load(tmp_path / "scores.npz").metric == "difference()"
    with pytest.raises(ValueError, match=r"wrong_labels given, but metric='difference\(\)' has no use"):
        jm.path_patch(model, pairs, metric=difference, wrong_labels=wrong)


def test_a_circuit_is_found_by_a_function_of_the_logits(sweep):
    model, pairs, _ = sweep
    several = jnp.asarray([3, 7, 11])  # any of which is a right answer

    def chance_of_any(logits, rows):
        return jax.nn.log_softmax(logits)[:, several].sum(-1)

    chain = [jm.Stage("movers", "last", k=3), jm.Stage("readers", "last", "movers", "q", k=2)]
    circuit = jm.discover(model, pairs, chain=chain, metric=chance_of_any)
    again = jm.discover(model, pairs, chain=chain, metric=chance_of_any, done=circuit.scores)
    assert circuit.groups == again.groups and circuit.groups["movers"]
    expected = jm.path_patch(model, pairs, metric="log_probability").mean
    assert np.abs(circuit.scores["movers"].mean - expected).max() > 0.01, "other than that of the label alone"
    with pytest.raises(ValueError, match=r"has scores of metric='chance_of_any\(\)'; expected 'probability'"):
        jm.discover(model, pairs, chain=chain, done=circuit.scores)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda logits, rows: logits.mean(), r"found float32 \[\] of logits"),
        (lambda logits, rows: logits[:, :2], r"found float32 \[\d+, 2\] of logits"),
        (lambda logits, rows: logits.argmax(-1), r"found int32 \[\d+\] of logits"),
    ],
)
def test_functions_that_say_something_else_than_a_number_of_each_prompt_are_refused(sweep, function, found):
    model, pairs, _ = sweep
    heads = {"last": [(0, 1)]}
    for method in (
        lambda: jm.path_patch(model, pairs, metric=function),
        lambda: jm.predict(model, pairs, metric=function),
        lambda: jm.evaluate(model, pairs, [heads], 0, metric=function),
        lambda: jm.cmap_heads(model, model, pairs, metric=function),
    ):
        with pytest.raises(ValueError, match=rf"metric <lambda>\(\): {found} .*; expected a float for each prompt"):
            method()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda logits: logits[:, 0],
            r"metric <lambda>\(\): too many positional arguments; expected a function \(logits",
        ),
        (lambda logits, rows, more: logits[:, 0], r"missing a required argument: 'more'; expected a function"),
        (lambda logits, rows: np.asarray(logits)[:, 0], r"metric <lambda>\(\): it hands logits or rows to NumPy"),
        (lambda logits, rows: np.arange(9.0)[rows], r"it hands logits or rows to NumPy.*jnp.asarray\(values\)\[rows\]"),
    ],
)
def test_functions_that_cannot_be_called_or_compiled_are_named(sweep, function, message):
    model, pairs, _ = sweep
    for method in (jm.path_patch, jm.predict):
        with pytest.raises(ValueError, match=message):
            method(model, pairs, metric=function)
