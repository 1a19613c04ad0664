"""Percentile bootstrap over examples (Efron 1979): how far a mean would move with other prompts of the same kind."""

import numpy as np


def resampled_means(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of `values` [..., B] over B examples drawn with replacement, `resamples` times: float [..., resamples].

    Two calls with the same B, number and seed draw the same examples, so that ratios and differences of their results
    are those of paired samples.

    Raises:
      ValueError: resamples < 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}; expected at least 1.")
    count = values.shape[-1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return values @ (drawn.T / count)


def interval(
    values: np.ndarray, level: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the mean of `values` [..., B] over examples, float [...] each.

    Args:
      level: coverage, a fraction.

    Raises:
      ValueError: level outside (0, 1) or resamples < 1.
    """
    return bounds(resampled_means(values, resamples=resamples, seed=seed), level)


def bounds(samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The central `level` of bootstrap samples [..., R]: lower and upper bound, float [...] each."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a fraction between 0 and 1.")
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high
