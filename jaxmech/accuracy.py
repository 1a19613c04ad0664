"""How well a model does the task: its logits at the last token of every clean prompt, and its answers.

Owns as well how the methods gather the answers of one call after another.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Function, check_measure, measure
from jaxmech.model import Params, forward
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions, answers, is_correct
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
    metric: str | Function = ACCURACY,
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
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference".
      keep_logits: return the logits, float32 [B, V]; without, they stay on the device.

    Returns:
      Predictions with `accuracy` [], `correct` [B], `logits` [B, V] and, of another metric, `measured` [B].

    Raises:
      ValueError: ids or labels outside the vocabulary, an unknown metric, or logits that are not finite.
    """
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(model.config, pairs, **options)
    tokens, last = check_prompts(model.config, pairs), pairs.position("last")
    size = examples_per_call(model, pairs) if batch_size is None else batch_size
    for rows, _ in equal_parts(len(pairs), size, row_devices(model.weights)):
        prompts = over_rows(model.weights, (tokens[rows], last[rows]))
        gathered.add(rows, *_answers(model.config, model.weights, *prompts))
    return gathered.predictions()


def examples_per_call(model: Model, pairs: Pairs) -> int:
    """Examples whose activations in one layer and logits fit the memory budget."""
    forward = memory.of_forward(model.config, pairs.clean.shape[1])
    return memory.fitting(model.weights, forward + memory.of_logits(model.config))


@dataclass(frozen=True, eq=False, repr=False)
class Gathered:
    """Answers of one call after another, under one or many interventions, on the leading axes, to B prompts.

    Attributes:
      metric: what is measured beside whether answers are right, on the device where their logits are.
      labels: int [B].
      wrong_labels: int [B], any where the metric does not need them.
      answered: int32 [..., B].
      logits: float32 [..., B, V], or None where they stay on the device.
      measured: float32 [..., B], or None if the metric is "accuracy".
    """

    metric: str | Function
    labels: np.ndarray  # [B]
    wrong_labels: np.ndarray  # [B]
    answered: np.ndarray  # [..., B]
    logits: np.ndarray | None  # [..., B, V]
    measured: np.ndarray | None  # [..., B]

    @classmethod
    def of(
        cls,
        config: Config,
        pairs: Pairs,
        *axes: int,
        metric: str | Function,
        wrong_labels: np.ndarray | None,
        keep_logits: bool,
    ) -> "Gathered":
        """Nothing yet; `axes` are the sizes of the leading axes. ValueError as `predict`."""
        shape = *axes, len(pairs)
        return cls(
            metric=metric,
            labels=pairs.labels,
            wrong_labels=check_measure(metric, wrong_labels, pairs.labels, config.vocab_size),
            answered=np.empty(shape, np.int32),
            logits=np.empty((*shape, config.vocab_size), np.float32) if keep_logits else None,
            measured=None if metric == ACCURACY else np.empty(shape, np.float32),
        )

    @property
    def needs_logits(self) -> bool:
        """Whether `add` makes use of logits."""
        return self.logits is not None or self.measured is not None

    def add(
        self, rows: np.ndarray, answered: jax.Array, logits: jax.Array | None, *, at: np.ndarray | None = None
    ) -> None:
        """Adds what a call found of the prompts `rows`, int [b].

        Args:
          rows: which of the pairs they are.
          answered: [b], or [R, b] with `at`.
          logits: [b, V], or [R, b, V]; may be None where none are needed.
          at: int [R], which interventions these are.
        """
        place: Any = rows if at is None else np.ix_(at, rows)
        measured = None
        if self.measured is not None:
            measured = measure(self.metric, logits, self.labels[rows], self.wrong_labels[rows], rows)
        answered, measured, logits = jax.device_get((answered, measured, logits if self.logits is not None else None))
        for kept, found in ((self.answered, answered), (self.measured, measured), (self.logits, logits)):
            if kept is not None:
                kept[place] = found

    def predictions(self) -> Predictions:
        """What was gathered, once all prompts were added. ValueError where logits are not finite."""
        return Predictions(is_correct(self.answered, self.labels), self.logits, self.measured)


@partial(jax.jit, static_argnames="config")
def _answers(config: Config, weights: Params, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Answers [B] and logits [B, V] at `last`."""
    logits = forward(config, weights, tokens, logits_at=last)[0]
    return answers(logits), logits
