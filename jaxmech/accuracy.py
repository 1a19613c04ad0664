"""How well a model does the task: its logits at the last token of every clean prompt, and its answers."""

from functools import partial

import jax
import numpy as np

from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts
from jaxmech.model import Params, forward
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions
from jaxmech.sharding import over_rows, row_devices


def accuracy(model: Model, pairs: Pairs, *, batch_size: int = 64) -> float:
    """Fraction of the clean prompts whose most probable next token, out of the whole vocabulary, is the label."""
    return float(predict(model, pairs, batch_size=batch_size).accuracy)


def predict(model: Model, pairs: Pairs, *, batch_size: int = 64) -> Predictions:
    """The model's own answers to the clean prompts, `batch_size` at a time.

    `pairs[predict(model, pairs).correct]` are the pairs that it answers right.

    Returns:
      Predictions with `accuracy` [], `correct` [B] and `logits` [B, V].

    Raises:
      ValueError: ids or labels outside the vocabulary, or logits that are not finite.
    """
    logits = clean_logits(model, pairs, batch_size=batch_size)
    if not np.isfinite(logits.sum(axis=-1, dtype=np.float64)).all():
        raise ValueError("The model's logits are not finite; look at its parameters, or try dtype float32 or bfloat16.")
    return Predictions(logits.argmax(-1) == pairs.labels, logits)


def clean_logits(model: Model, pairs: Pairs, *, batch_size: int = 64) -> np.ndarray:
    """Logits at `last` of every clean prompt, float32 [B, V], computed `batch_size` prompts at a time."""
    tokens, last = check_prompts(model.config, pairs), pairs.position("last")
    logits = np.empty((len(pairs), model.config.vocab_size), np.float32)
    for rows, _ in equal_parts(len(pairs), batch_size, row_devices(model.weights)):
        prompts = over_rows(model.weights, (tokens[rows], last[rows]))
        logits[rows] = np.asarray(_logits_at(model.config, model.weights, *prompts))
    return logits


@partial(jax.jit, static_argnames="config")
def _logits_at(config: Config, weights: Params, tokens: jax.Array, last: jax.Array) -> jax.Array:
    return forward(config, weights, tokens, logits_at=last)[0]
