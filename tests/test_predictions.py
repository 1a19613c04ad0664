"""Answers by logits: the first of the most probable tokens, by either way to find it, and none where logits are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from jaxmech import predictions
from jaxmech.predictions import NO_ANSWER

WAYS = [predictions.answers, predictions._by_argmax, predictions._by_two_reductions]
NAN, INF = np.nan, np.inf
CASES = {
    (1, 3, 2, 0): 1,
    (5, 3, 5, 5): 0,
    (-INF, -1, -INF, -1): 1,
    (-INF, -INF, -INF, -INF): NO_ANSWER,
    (0, INF, 1, 2): NO_ANSWER,
    (0, 1, 2, NAN): NO_ANSWER,
    (NAN, 1, 2, 3): NO_ANSWER,
    (INF, NAN, 0, 0): NO_ANSWER,
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_answers_are_the_first_of_the_most_probable_tokens(way):
    logits, expected = jnp.array(list(CASES), jnp.float32), np.array(list(CASES.values()))
    for found in (way(logits), jax.jit(jax.vmap(way))(logits), way(logits.reshape(2, 4, 4)).reshape(-1)):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_answers_lower_for_every_platform():
    text = jax.jit(predictions.answers).trace(jnp.zeros((3, 5))).lower(lowering_platforms=("cpu", "cuda", "tpu"))
    assert "stablehlo.reduce" in text.as_text()


def test_predictions_are_shown_in_one_line():
    assert repr(jm.Predictions(np.array([True, False, True, True]))) == "Predictions(4 prompts, accuracy 0.750)"
    many = jm.Predictions(np.eye(2, 4, dtype=bool), np.zeros((2, 4, 9)), np.zeros((2, 4)))
    assert repr(many) == "Predictions(2 x 4 prompts, accuracies 0.250 to 0.250, logits, measured)"
    assert many == many and many != jm.Predictions(many.correct), "compared as objects, not array by array"
