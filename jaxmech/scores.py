"""`PathScores`: the scores of a sweep per example, and what is read off them."""

from dataclasses import dataclass

import numpy as np

from jaxmech.bootstrap import interval


@dataclass(frozen=True)
class PathScores:
    """Effect of patching each head's path, most negative where the head matters most.

    Attributes:
      per_example: float32 [L, N, B], in the units of `metric`.
      probability: float32 [B], the correct token's probability without a patch.
      metric: see `jaxmech.metrics`; "probability" scores are (p_patched - p_clean) / p_clean.
    """

    per_example: np.ndarray  # [L, N, B]
    probability: np.ndarray  # [B]
    metric: str = "probability"

    @property
    def mean(self) -> np.ndarray:
        """Mean over examples, float32 [L, N]."""
        return self.per_example.mean(-1)

    def top(self, k: int, min_effect: float = 0.0) -> list[tuple[int, int]]:
        """The k heads with the most negative mean, strongest first, as (layer, head).

        Heads whose mean is above -min_effect are left out, so there may be fewer; ties go to the lower head.

        Raises:
          ValueError: k is negative or exceeds the number of heads, min_effect is negative, or a mean is not finite.
        """
        mean = self.mean
        if not (np.isfinite(min_effect) and min_effect >= 0):
            raise ValueError(f"min_effect={min_effect}; expected a number of at least 0, in the units of the scores.")
        if count := int((~np.isfinite(mean)).sum()):
            raise ValueError(
                f"The mean scores of {count} of {mean.size} heads are not finite. The least probability of a correct "
                f"token is {self.probability.min():.2g}: if that is nan, the model computes nan; if it is tiny, "
                'relative changes overflow, and metric="log_probability" does not.'
            )
        if not 0 <= k <= mean.size:
            raise ValueError(f"k={k}, but the model has {mean.size} heads ({mean.shape[0]} x {mean.shape[1]}).")
        order = np.argsort(mean, axis=None, kind="stable")[:k]
        heads = [(int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order]
        return [head for head in heads if mean[head] <= -min_effect]

    def confidence_interval(
        self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of the mean, float [L, N] each: percentile bootstrap over examples (Efron 1979).

        Args:
          level: coverage, a fraction.
          resamples: bootstrap samples of the B examples, drawn with replacement.
          seed: of these draws.

        Raises:
          ValueError: level outside (0, 1) or resamples < 1.
        """
        return interval(self.per_example, level, resamples=resamples, seed=seed)
