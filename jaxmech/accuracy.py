"""How well a model does the task: its logits at the last token of every clean prompt, and its answers."""

from functools import partial

import jax
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.gathered import Gathered
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Metric
from jaxmech.model import Params, forward
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions, answers
from jaxmech.sharding import over_rows, row_devices


def accuracy(model: Model, pairs: Pairs, *, batch_size: int | None = None) -> float:
    """Fraction of the clean prompts whose most probable next token, out of the whole vocabulary, is the label.

    Args:
      model: the model that is asked.
      pairs: prompts and labels.
      batch_size: prompts in one call; None picks as many as fit the memory budget.
    """
    return float(predict(model, pairs, batch_size=batch_size, keep_logits=False).accuracy)


def predict(
    model: Model,
    pairs: Pairs,
    *,
    batch_size: int | None = None,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
    keep_logits: bool = True,
) -> Predictions:
    """The model's own answers to the clean prompts.

    `pairs[predict(model, pairs).correct]` are the pairs that it answers right.

    Args:
      model: the model that is asked.
      pairs: prompts and labels.
      batch_size: prompts in one call; None picks as many as fit the memory budget.
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function
        (logits [B, V], rows [B]) -> [B] that jit can trace, rows being which of the pairs these are.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.
      keep_logits: return the logits, float32 [B, V]; without, they stay on the device.

    Returns:
      Predictions with `accuracy` [], `correct` [B], `logits` [B, V] and, of another metric, `measured` [B].

    Raises:
      ValueError: ids or labels outside the vocabulary, an unknown metric, or logits that are not finite.
    """
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(model.config, pairs, **options)
    tokens, last = check_prompts(model.config, pairs), pairs.position("last")
    if batch_size is None:
        batch_size = memory.fitting_prompts(model.config, model.weights, tokens.shape[1])
    for rows, _ in equal_parts(len(pairs), batch_size, row_devices(model.weights)):
        prompts = over_rows(model.weights, (tokens[rows], last[rows]))
        gathered.add(rows, *_answers(model.config, model.weights, *prompts))
    return gathered.predictions()


@partial(jax.jit, static_argnames="config")
def _answers(config: Config, weights: Params, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Answers [B] and logits [B, V] at `last`."""
    logits = forward(config, weights, tokens, logits_at=last)[0]
    return answers(logits), logits
