"""`Predictions`: what a model answers under an intervention, and how often it is right."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.bootstrap import interval, wilson

NO_ANSWER = -1  # where logits are not finite; no token has this id


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """Answers of one or many interventions, on the leading axes, to B prompts.

    Attributes:
      correct: bool [..., B], whether the most probable next token is the label.
      logits: float32 [..., B, V] at `last`, or None where they were not asked for.
      measured: float32 [..., B], another metric that was asked for (see `jaxmech.metrics`), or None.
    """

    correct: np.ndarray  # [..., B]
    logits: np.ndarray | None = None  # [..., B, V]
    measured: np.ndarray | None = None  # [..., B]

    def __repr__(self) -> str:
        *axes, prompts = np.shape(self.correct)
        many = "".join(f"{size} x " for size in axes)
        accuracy = f"accuracy {self.accuracy:.3f}" if not axes else f"accuracies {_range(self.accuracy)}"
        found = [accuracy, *(name for name in ("logits", "measured") if getattr(self, name) is not None)]
        return f"Predictions({many}{prompts} prompts, {', '.join(found)})"

    @property
    def accuracy(self) -> np.ndarray:
        """Fraction of the prompts that are answered right, float [...]."""
        return self.correct.mean(-1)

    @property
    def per_example(self) -> np.ndarray:
        """What was measured of each prompt, [..., B]: `measured`, or else `correct`."""
        return self.correct if self.measured is None else self.measured

    @property
    def mean(self) -> np.ndarray:
        """Mean of `per_example` over prompts, float [...]: the accuracy, unless another metric was measured."""
        return self.per_example.mean(-1, dtype=np.float64)

    def confidence_interval(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0):
        """Lower and upper bound of `mean`, float [...] each; see `jaxmech.bootstrap`.

        Of the accuracy, the score interval (Wilson 1927), for which nothing is drawn; of another metric, a percentile
        bootstrap over prompts.

        Args:
          level: coverage, a fraction.
          resamples, seed: of the bootstrap.

        Raises:
          ValueError: level outside (0, 1), or resamples < 1 where they are drawn.
        """
        if self.measured is None:
            return wilson(self.correct, level)
        return interval(self.measured, level, resamples=resamples, seed=seed)


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}" if values.size else "of nothing"


def answers(logits: jax.Array) -> jax.Array:
    """The most probable next token, int32 [...], by logits [..., V], of equal ones the first.

    NO_ANSWER where any logit is nan, or the largest is not finite.
    """
    return jax.lax.platform_dependent(logits, cpu=_by_two_reductions, default=_by_argmax)


def _by_argmax(logits: jax.Array) -> jax.Array:
    """`answers`; the logits, which take the memory of accelerators some time, are read once."""
    best = jnp.argmax(logits, -1)  # of nan, if there is any
    largest = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.isfinite(largest), best, NO_ANSWER).astype(jnp.int32)


def _by_two_reductions(logits: jax.Array) -> jax.Array:
    """`answers`, on CPUs in a fraction of the time of an argmax."""
    largest = logits.max(-1, keepdims=True)
    token = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    best = jnp.where(logits == largest, token, logits.shape[-1]).min(-1)
    return jnp.where(jnp.isfinite(largest[..., 0]), best, NO_ANSWER)


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
