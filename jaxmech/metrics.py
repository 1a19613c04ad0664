"""Metrics: what the effect of a patch on the next-token distribution is measured by.

  probability        (p_patched - p_clean) / p_clean of the correct token, the paper's; -1 means that all is lost
  log_probability    log p_patched - log p_clean of the correct token, in nats
  logit_difference   change of logit(correct) - logit(wrong), the wrong answer being named by the caller

All are negative where the patch hurts. Where the answer is not one token, a metric can be a function of the logits
(`LogitMetric`), and the score is its change. Of answers, as opposed to effects, what is measured is the accuracy, the
probability, log-probability or logit difference itself, or what the function says.

A function looks up what it needs of each prompt by `rows`, which count within the pairs that a method was given: for
`pairs[some]` they start from 0 again, and a function of values for `pairs` needs those of `pairs[some]`. Wrong labels
that are part of the pairs (`Pairs.wrong_labels`) are selected with them.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.pairs import Pairs

# From float32 logits [B, V] and rows [B], which of the pairs they are, to what is measured of each, [B]; for jit.
LogitMetric = Callable[[jax.Array, jax.Array], jax.Array]
Metric = str | LogitMetric  # a name, or a function
METRICS = ("probability", "log_probability", "logit_difference")
ACCURACY = "accuracy"  # whether the label is the most probable token; no effect is measured by it
_NO_USE = "wrong_labels given, but metric={!r} has no use for them."


class Outcome(NamedTuple):
    """What the metrics need of a next-token distribution; float32, any leading axes."""

    log_probability: jax.Array  # of the correct token
    measured: jax.Array  # its logit minus that of the wrong one, or what a function says


def outcome(
    logits: jax.Array, labels: jax.Array, wrong_labels: jax.Array, rows: jax.Array, function: LogitMetric | None
) -> Outcome:
    """The outcome, fields [B], of float32 logits [B, V] and the rest [B]; `function` is the metric, if it is one."""
    correct, wrong = (jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0] for index in (labels, wrong_labels))
    measured = correct - wrong if function is None else _said(function, logits, rows)
    return Outcome(correct - jax.nn.logsumexp(logits, axis=-1), measured)


def function_of(metric: Metric) -> LogitMetric | None:
    """The function that a metric is, if it is no name."""
    return metric if callable(metric) else None


def name_of(metric: Metric) -> str:
    """How scores name their metric: a function by its name and "()"."""
    return f"{getattr(metric, '__name__', type(metric).__name__)}()" if callable(metric) else metric


@partial(jax.jit, static_argnames="metric")
def measure(
    metric: Metric, logits: jax.Array, labels: jax.Array, wrong_labels: jax.Array, rows: jax.Array
) -> jax.Array:
    """What an effect by `metric`, one of METRICS or a function, is a change of: float32 [..., B].

    Args:
      logits: float32 [..., B, V].
      labels, wrong_labels, rows: [B]; rows, which of the pairs they are, is for functions.
    """
    if callable(metric):
        of = partial(_said, metric)
        for _ in logits.shape[:-2]:
            of = jax.vmap(of, in_axes=(0, None))
        return of(logits, rows)
    correct, wrong = (
        jnp.take_along_axis(logits, jnp.broadcast_to(index[:, None], (*logits.shape[:-1], 1)), axis=-1)[..., 0]
        for index in (labels, wrong_labels)
    )
    if metric == "logit_difference":
        return correct - wrong
    log_probability = correct - jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(log_probability) if metric == "probability" else log_probability


def _said(function: LogitMetric, logits: jax.Array, rows: jax.Array) -> jax.Array:
    """What a function says of logits [B, V], float32 [B]; ValueError if that is something else."""
    try:
        found = jnp.asarray(function(logits, rows))
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"metric {name_of(function)}: it hands logits or rows to NumPy, which cannot be compiled; take jax.numpy, "
            "also for an array that rows look up (jnp.asarray(values)[rows])."
        ) from error
    if found.shape != rows.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"metric {name_of(function)}: found {found.dtype} {list(found.shape)} of logits {list(logits.shape)}; "
            f"expected a float for each prompt, {list(rows.shape)}."
        )
    return found.astype(jnp.float32)


def effect(metric: Metric, patched: Outcome, clean: Outcome) -> np.ndarray:
    """The score of a patch by `metric`, one of METRICS or a function."""
    if metric == "logit_difference" or callable(metric):
        return np.asarray(patched.measured) - np.asarray(clean.measured)
    change = np.asarray(patched.log_probability) - np.asarray(clean.log_probability)
    with np.errstate(over="ignore"):  # an infinite score is refused where heads are chosen by it
        return np.expm1(change) if metric == "probability" else change


def check_metric(metric: Metric, wrong_labels: np.ndarray | None, pairs: Pairs, vocab_size: int) -> np.ndarray:
    """The wrong labels [B], those given or else those of the pairs, or any where `metric` does not need them.

    Raises:
      ValueError: an unknown metric, or a function of other arguments; "logit_difference" without wrong labels or with
        ones that are not [B] token ids other than the labels; wrong labels given for another metric.
    """
    labels = pairs.labels
    if callable(metric):
        _check_arguments(metric)
    elif metric not in METRICS:
        raise ValueError(f"metric={metric!r}; expected one of {', '.join(METRICS)}.")
    if metric != "logit_difference":
        if wrong_labels is not None:
            raise ValueError(_NO_USE.format(name_of(metric)))
        return labels
    wrong_labels = pairs.wrong_labels if wrong_labels is None else wrong_labels
    if wrong_labels is None:
        raise ValueError(
            "metric='logit_difference' needs wrong_labels, a wrong answer for each prompt; the pairs have none, either."
        )
    wrong = np.asarray(wrong_labels)
    if wrong.shape != labels.shape or not np.issubdtype(wrong.dtype, np.integer):
        raise ValueError(f"wrong_labels has shape {wrong.shape} and dtype {wrong.dtype}; expected ids {labels.shape}.")
    if wrong.min() < 0 or wrong.max() >= vocab_size:
        raise ValueError(f"wrong_labels reach from {wrong.min()} to {wrong.max()}; expected ids 0..{vocab_size - 1}.")
    if (wrong == labels).any():
        raise ValueError(f"wrong_labels of example {int((wrong == labels).argmax())} is its correct label.")
    return wrong.astype(np.int32)


def check_measure(metric: Metric, wrong_labels: np.ndarray | None, pairs: Pairs, vocab_size: int) -> np.ndarray:
    """As `check_metric`, for what is measured of answers: "accuracy" is among the metrics."""
    if not callable(metric) and metric not in (ACCURACY, *METRICS):
        raise ValueError(f"metric={metric!r}; expected one of {', '.join((ACCURACY, *METRICS))}.")
    if metric != ACCURACY:
        return check_metric(metric, wrong_labels, pairs, vocab_size)
    if wrong_labels is not None:
        raise ValueError(_NO_USE.format(metric))
    return pairs.labels


def _check_arguments(function: LogitMetric) -> None:
    """ValueError if the function does not take logits and rows, or cannot be known again by its hash."""
    if function.__hash__ is None:
        raise ValueError(
            f"metric {name_of(function)} has no hash, by which compiled programs are found; define __hash__."
        )
    try:
        inspect.signature(function).bind("logits", "rows")
    except TypeError as error:
        raise ValueError(
            f"metric {name_of(function)}: {error}; expected a function (logits [B, V], rows [B]) -> [B], rows being "
            "which of the pairs these are."
        ) from error
    except ValueError:  # it has no signature to look at
        return
