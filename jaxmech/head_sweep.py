"""Cross-model activation patching of every single head in turn, on the causal cone of its role; see `jaxmech.cmap`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.batches import Batches, calls_of_equal_size
from jaxmech.collected import HeadValues, check_components, values_of
from jaxmech.cone import CleanCache, Cone, HeadPatch, live_cache, live_start, live_stream
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import LogitMetric, Metric, Outcome, check_metric, effect, function_of, name_of, outcome
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs, one_or_more, positions_of
from jaxmech.predictions import answers, is_correct
from jaxmech.scores import PathScores
from jaxmech.sharding import on_devices_of, over_rows, row_devices
from jaxmech.suffixes import Suffixes, suffix_lengths

TOKENS_PER_CALL = 4096  # suffix tokens of all heads that run together
NO_HEAD = -1  # a row of every call: the clean outcome by the same arithmetic as the others; heads are layer * N + head
Array = Any  # NumPy on the host, jax.Array inside jit


@dataclass(frozen=True, eq=False, repr=False)
class HeadSweep:
    """What every single head of the tuned model does in the base model.

    Attributes:
      accuracy: float [L, N], of the base model with that head patched.
      scores: effect on each prompt, [L, N, B]; positive where the tuned model's head helps, so that `scores.top` names
        those that hurt; see `top`.
      clean_accuracy: of the base model without a patch, computed in the same way.
    """

    accuracy: np.ndarray  # [L, N]
    scores: PathScores
    clean_accuracy: float

    def __repr__(self) -> str:
        accuracies = f"accuracies {self.accuracy.min():.3f} to {self.accuracy.max():.3f}"
        return f"HeadSweep({accuracies}, {self.clean_accuracy:.3f} without a patch, {self.scores!r})"

    def top(self, k: int, min_effect: float = 0.0) -> list[tuple[int, int]]:
        """The k heads that help most, those with the largest mean score, best first.

        Args:
          k: how many heads at most.
          min_effect: heads whose mean score is below it, or 0, are left out.

        Raises:
          ValueError: as `PathScores.top`.
        """
        return self.scores.top(k, min_effect, largest=True)


def cmap_heads(
    base: Model,
    tuned: Model | HeadValues,
    pairs: Pairs,
    role: str | Sequence[str] = "last",
    components: Sequence[str] = ("z",),
    *,
    metric: Metric = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
) -> HeadSweep:
    """Patches each head of `tuned` alone into `base`, at a role or several: a sweep over all L x N heads.

    The base model is run once; each head then costs a forward pass of the tokens from its role and the layers from its
    own on (`jaxmech.cone`).

    Args:
      base: the model that is patched.
      tuned: a model of the same shape, or what `collect` kept of it for these pairs.
      pairs: prompts and labels; only the clean prompts are run.
      role: the role at which each head is patched, or several, at all of which it is.
      components: what is patched: any of "z", "q", "k" and "v"; see `cmap`.
      metric: what a score is, see `jaxmech.metrics`: "probability", "log_probability", "logit_difference" or a function
        of the logits, as for `path_patch`.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.
      batch_size: examples in one call; None picks as many as fit the memory budget.

    Raises:
      ValueError: as `cmap`, or an unknown metric.
    """
    components, config = check_components(components), base.config
    wrong_labels = check_metric(metric, wrong_labels, pairs, config.vocab_size)
    roles = one_or_more(role, "role")
    values_of_batches = values_of(base, tuned, pairs, roles, components)
    tokens, p, last = check_prompts(config, pairs), positions_of(pairs.position, roles), pairs.position("last")
    copies = row_devices(base.weights)
    if batch_size is None:
        length, at_a_time = float(suffix_lengths(p, last).mean()), (config.num_heads + 1) / copies
        sweep = memory.of_live_sweep(config, length, tokens.shape[1], at_a_time)
        batch_size = memory.fitting(
            base.weights, sweep + memory.of_heads(config, len(components) * len(roles), config.num_layers)
        )
    batches = Batches.plan([tokens], p, last, batch_size)
    heads = np.arange(config.num_layers * config.num_heads)
    work = batches.capacity / TOKENS_PER_CALL
    calls = calls_of_equal_size(heads, work, most=config.num_layers, copies=copies, besides=1)
    effects = np.zeros((len(heads), len(pairs)), np.float32)
    answered = np.zeros((1 + len(heads), len(pairs)), np.int32)  # without a patch, and with each head's
    probability = np.zeros(len(pairs), np.float32)

    def run_batch(rows: np.ndarray, values: dict[str, Array]) -> None:  # so that its cache goes before the next comes
        prompts, suffixes = batches.prompts(rows), batches.suffixes(rows)
        values = on_devices_of(base.weights, values)
        answers_of = pairs.labels[rows], wrong_labels[rows], rows.astype(np.int32)
        inputs = _prepare(config, base.weights, prompts, suffixes, values, answers_of)
        for call in calls:
            run = over_rows(base.weights, np.append(NO_HEAD, call))
            outcomes = _run_heads(config, base.weights, inputs, run, measure=function_of(metric))
            found, said = jax.device_get(outcomes)
            clean, patched = (jax.tree.map(lambda x, kept=kept: x[kept], found) for kept in (0, slice(1, None)))
            effects[np.ix_(call, rows)] = effect(metric, patched, clean)
            answered[np.ix_(np.append(0, 1 + call), rows)] = said
            probability[rows] = np.exp(clean.log_probability)

    for rows, values in zip(batches.rows, values_of_batches(batches.rows), strict=True):
        run_batch(rows, values)
    shape = config.num_layers, config.num_heads
    accuracy = is_correct(answered, pairs.labels).mean(-1)
    scores = PathScores(effects.reshape(*shape, -1), probability, name_of(metric))
    return HeadSweep(accuracy[1:].reshape(shape), scores, float(accuracy[0]))


class _State(NamedTuple):
    """What a batch of examples brings to every call."""

    clean: CleanCache
    suffixes: Suffixes
    values: dict[str, Array]  # component -> [L, B, R, N, H]
    labels: Array  # [B]
    wrong_labels: Array  # [B]
    rows: Array  # [B] which of the pairs they are


@partial(jax.jit, static_argnames="config")
def _prepare(
    config: Config,
    weights: Params,
    prompts,
    suffixes: Suffixes,
    values: dict[str, Array],
    answers_of: tuple[Array, ...],
) -> _State:
    return _State(live_cache(config, weights, prompts, suffixes), suffixes, values, *answers_of)


@partial(jax.jit, static_argnames=("config", "measure"))
def _run_heads(
    config: Config, weights: Params, inputs: _State, heads: Array, *, measure: LogitMetric | None = None
) -> tuple[Outcome, jax.Array]:
    """Outcomes and answers, [I, B], of the heads [I]: NO_HEAD, and others in increasing order."""
    cone = Cone(config, weights, inputs.clean, inputs.suffixes)
    start = live_start(config, heads[1] // config.num_heads)

    def one(head):
        weight = (jnp.arange(config.num_layers * config.num_heads) == head).reshape(config.num_layers, -1)
        patches = {site: HeadPatch(weight, x) for site, x in inputs.values.items()}
        x = live_stream(cone, patches, start)
        logits = unembed(config, weights, x)
        return outcome(logits, inputs.labels, inputs.wrong_labels, inputs.rows, measure), answers(logits)

    return jax.vmap(one)(heads)
