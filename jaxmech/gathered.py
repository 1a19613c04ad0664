"""How the methods gather the answers of one call after another, and what is measured of them, as `Predictions`."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmech.config import Config
from jaxmech.metrics import ACCURACY, Metric, check_measure, measure
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions, is_correct


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

    metric: Metric
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
        metric: Metric,
        wrong_labels: np.ndarray | None,
        keep_logits: bool,
    ) -> "Gathered":
        """Nothing yet; `axes` are the sizes of the leading axes. ValueError as `predict`."""
        shape = *axes, len(pairs)
        return cls(
            metric=metric,
            labels=pairs.labels,
            wrong_labels=check_measure(metric, wrong_labels, pairs, config.vocab_size),
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
          answered: [b], or [I, b] with `at`.
          logits: [b, V], or [I, b, V]; may be None where none are needed.
          at: int [I], which interventions these are.
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
