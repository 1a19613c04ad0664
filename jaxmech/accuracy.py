"""How well a model does the task: its logits at the last token of every clean prompt, and its answers."""

from functools import partial

import jax
import numpy as np

from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Function, check_measure, measure
from jaxmech.model import Params, forward
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions, answers, is_correct
from jaxmech.sharding import over_rows, row_devices


def accuracy(model: Model, pairs: Pairs, *, batch_size: int = 64) -> float:
    """Fraction of the clean prompts whose most probable next token, out of the whole vocabulary, is the label.

    Args:
      model: the model that is asked.
      pairs: prompts and labels.
      batch_size: prompts in one call.
    """
    return float(predict(model, pairs, batch_size=batch_size).accuracy)


def predict(
    model: Model,
    pairs: Pairs,
    *,
    batch_size: int = 64,
    metric: str | Function = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Predictions:
    """The model's own answers to the clean prompts, `batch_size` at a time.

    `pairs[predict(model, pairs).correct]` are the pairs that it answers right.

    Args:
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function
        (logits [B, V], rows [B]) -> [B] that jit can trace, rows being which of the pairs these are.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference".

    Returns:
      Predictions with `accuracy` [], `correct` [B], `logits` [B, V] and, of another metric, `measured` [B].

    Raises:
      ValueError: ids or labels outside the vocabulary, an unknown metric, or logits that are not finite.
    """
    wrong_labels = check_measure(metric, wrong_labels, pairs.labels, model.config.vocab_size)
    tokens, last = check_prompts(model.config, pairs), pairs.position("last")
    answered = np.empty(len(pairs), np.int32)
    logits = np.empty((len(pairs), model.config.vocab_size), np.float32)
    measured = None if metric == ACCURACY else np.empty(len(pairs), np.float32)
    for rows, _ in equal_parts(len(pairs), batch_size, row_devices(model.weights)):
        prompts = over_rows(model.weights, (tokens[rows], last[rows]))
        found = _answers(model.config, model.weights, *prompts)
        answered[rows], logits[rows] = jax.device_get(found)
        if measured is not None:
            measured[rows] = measure(metric, found[1], pairs.labels[rows], wrong_labels[rows], rows)
    return Predictions(is_correct(answered, pairs.labels), logits, measured)


@partial(jax.jit, static_argnames="config")
def _answers(config: Config, weights: Params, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Answers [B] and logits [B, V] at `last`."""
    logits = forward(config, weights, tokens, logits_at=last)[0]
    return answers(logits), logits
