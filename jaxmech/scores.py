"""`PathScores`: the scores of a sweep per example, and what is read off them."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.bootstrap import interval
from jaxmech.files import replacing
from jaxmech.metrics import METRICS


@dataclass(frozen=True, eq=False, repr=False)
class PathScores:
    """Effect of patching each head's path, most negative where the head matters most.

    Attributes:
      per_example: float32 [L, N, B], in the units of `metric`.
      probability: float32 [B], the correct token's probability without a patch.
      metric: see `jaxmech.metrics`; "probability" scores are (p_patched - p_clean) / p_clean. "NAME()" is a function.
    """

    per_example: np.ndarray  # [L, N, B]
    probability: np.ndarray  # [B]
    metric: str = "probability"

    def __repr__(self) -> str:
        mean = self.mean
        means = f", means {mean.min():.3g} to {mean.max():.3g}" if mean.size else ""
        return f"PathScores([L, N, B] = {list(self.per_example.shape)}, {self.metric}{means})"

    @property
    def mean(self) -> np.ndarray:
        """Mean over examples, float32 [L, N]."""
        return self.per_example.mean(-1)

    def top(self, k: int, min_effect: float = 0.0, *, largest: bool = False) -> list[tuple[int, int]]:
        """The k heads with the most negative mean, strongest first, as (layer, head).

        Ties go to the lower head.

        Args:
          k: how many heads at most.
          min_effect: heads whose mean is above -min_effect, or 0, as it is without a path to the receivers, are left
            out.
          largest: the k heads with the most positive mean instead, those that work against the answer; heads whose mean
            is below min_effect, or 0, are left out.

        Raises:
          ValueError: k is negative or exceeds the number of heads, min_effect is negative, or a mean is not finite.
        """
        mean = -self.mean if largest else self.mean
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
        return [head for head in heads if mean[head] < 0 and mean[head] <= -min_effect]

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

    def table(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> list[dict[str, int | float]]:
        """One row for each head, layer by layer: {"layer", "head", "mean", "low", "high"}, for `pandas.DataFrame`, say.

        `low` and `high` are those of `confidence_interval`, whose arguments `level`, `resamples` and `seed` are.
        """
        low, high = self.confidence_interval(level, resamples=resamples, seed=seed)
        columns = {"mean": self.mean, "low": low, "high": high}
        return [
            {"layer": layer, "head": head, **{name: float(x[layer, head]) for name, x in columns.items()}}
            for layer, head in np.ndindex(low.shape)
        ]

    def save(self, path: str | Path) -> None:
        """Writes a compressed npz to `path`, which is replaced only when it is whole."""
        save_arrays(path, {"per_example": self.per_example, "probability": self.probability, "metric": self.metric})

    @classmethod
    def load(cls, path: str | Path) -> "PathScores":
        """Reads what `save` wrote to `path`.

        Raises:
          FileNotFoundError: no such file.
          ValueError: it is damaged, or holds something else.
        """
        arrays = load_arrays(path)
        if set(arrays) != {"per_example", "probability", "metric"}:
            raise ValueError(
                f"{path} holds {sorted(arrays)}; expected per_example, probability and metric, the scores of one "
                "sweep. Those of a whole run are read by jm.read_scores."
            )
        return _checked(path, arrays["per_example"], arrays["probability"], arrays["metric"])


def save_groups(path: str | Path, scores: Mapping[str, PathScores]) -> None:
    """Writes the scores of several sweeps as one npz: GROUP, GROUP.probability and, if it is another, GROUP.metric."""
    arrays: dict[str, Any] = {group: found.per_example for group, found in scores.items()}
    arrays |= {f"{group}.probability": found.probability for group, found in scores.items()}
    arrays |= {f"{group}.metric": found.metric for group, found in scores.items() if found.metric != "probability"}
    save_arrays(path, arrays)


def load_groups(path: str | Path) -> dict[str, PathScores]:
    """Reads what `save_groups` wrote, in its order. Raises as `PathScores.load`."""
    arrays = load_arrays(path)
    groups = [name for name in arrays if "." not in name]  # groups are named without dots, see `Stage`
    if missing := [group for group in groups if f"{group}.probability" not in arrays]:
        raise ValueError(f"{path} holds no probabilities of {missing}; it is not the scores.npz of a run.")
    named = {group: (f"{group}.probability", f"{group}.metric") for group in groups}
    return {
        group: _checked(path, arrays[group], arrays[probability], arrays.get(metric, "probability"))
        for group, (probability, metric) in named.items()
    }


def save_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Writes an npz under exactly that name, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an npz; none is unpickled. ValueError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def _is_metric(name: str) -> bool:
    return name in METRICS or name.endswith("()")


def _checked(path: str | Path, per_example: np.ndarray, probability: np.ndarray, metric: Any) -> PathScores:
    """Scores whose arrays fit together."""
    if per_example.ndim != 3 or probability.shape != per_example.shape[2:] or not _is_metric(str(metric)):
        raise ValueError(
            f"{path} is damaged: it holds scores {per_example.shape}, probabilities {probability.shape} and metric "
            f"{str(metric)!r}; expected [L, N, B], [B] and one of {', '.join(METRICS)}."
        )
    return PathScores(per_example, probability, str(metric))
