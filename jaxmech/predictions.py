"""`Predictions`: what a model answers under an intervention, and how often it is right."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.bootstrap import interval

NO_ANSWER = -1  # where logits are not finite; no token has this id


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
        """Lower and upper bound of the accuracy, float [...] each: percentile bootstrap over examples.

        Args:
          level: coverage, a fraction.
          resamples: bootstrap samples of the examples, drawn with replacement.
          seed: of these draws.

        Raises:
          ValueError: level outside (0, 1) or resamples < 1.
        """
        return interval(self.correct, level, resamples=resamples, seed=seed)


def answers(logits: jax.Array) -> jax.Array:
    """The most probable next token, int32 [...], by logits [..., V]; NO_ANSWER where one of them is not finite."""
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), NO_ANSWER)


def is_correct(answered: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the answers [..., B] are the labels [B].

    Raises:
      ValueError: a prompt has no answer, as its logits are not finite; an argmax of them would be some token.
    """
    if missing := int((answered == NO_ANSWER).sum()):
        raise ValueError(
            f"The model's logits are not finite for {missing} of {answered.size} prompts; look at its parameters and "
            "at the values that are patched in, or try dtype float32 or bfloat16."
        )
    return answered == labels
