"""Intervals: the bootstrap over prompts, and score intervals of accuracies."""

import math

import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import jaxmech as jm
from jaxmech import bootstrap


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
