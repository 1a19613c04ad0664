"""Confidence intervals: how far a mean would move with other prompts of the same kind.

Those of means of scores, and of ratios, are percentile bootstraps over examples (Efron 1979); those of accuracies are
Wilson's, as all resamples of prompts that are all answered right are the same.
"""

from statistics import NormalDist

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
    return values @ drawn.T.astype(float) / count  # sums of right answers are exact, so that all of them are 1


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
    _check_level(level)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high


def wilson(correct: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of a proportion by the score interval (Wilson 1927), float [...] each, within [0, 1].

    It has a width also where all or none of the prompts are answered right: of all of 10, it is 0.72 to 1.

    Args:
      correct: bool [..., B].
      level: coverage, a fraction.

    Raises:
      ValueError: level outside (0, 1).
    """
    _check_level(level)
    p, count, z = correct.mean(-1), correct.shape[-1], NormalDist().inv_cdf((1 + level) / 2)
    center = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return np.where(p == 0, 0.0, center - half), np.where(p == 1, 1.0, center + half)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a fraction between 0 and 1.")
