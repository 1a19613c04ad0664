"""`Predictions`: what a model answers under an intervention, and how often it is right."""

from dataclasses import dataclass

import numpy as np

from jaxmech.bootstrap import interval


@dataclass(frozen=True)
class Predictions:
    """Answers of one or many interventions, on the leading axes, to B prompts.

    Attributes:
      correct: bool [..., B], whether the most probable next token is the label.
      logits: float32 [..., B, V] at `last`, or None where they were not asked for.
    """

    correct: np.ndarray  # [..., B]
    logits: np.ndarray | None = None  # [..., B, V]

    @property
    def accuracy(self) -> np.ndarray:
        """Fraction of the prompts that are answered right, float [...]."""
        return self.correct.mean(-1)

    def confidence_interval(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0):
        """Lower and upper bound of the accuracy, float [...] each; see `jaxmech.bootstrap`."""
        return interval(self.correct, level, resamples=resamples, seed=seed)
