"""Path patching: the effect of every head, as a sender, on the logits directly or through receiver heads.

Definition (Wang et al. 2022, arXiv:2211.00593; the sweeps of Prakash et al. 2024, section 3.2). For a sender at
position p: in a clean run with all attention outputs held at their clean values, the sender's z at p is replaced by its
value in the corrupt run, and MLPs and norms are recomputed. With no receivers, the effect is read from the logits of
that run. With receivers, their q, k or v (before RoPE) at p is recorded there and put into an otherwise unpatched clean
run, and the effect is read from the logits of that one. A sender at several positions is patched, and read, at all.

R counts the positions of a sender.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.arithmetic import einsum
from jaxmech.batches import Batches, calls_of_equal_size
from jaxmech.cone import (
    Change,
    CleanCache,
    Cone,
    HeadPatch,
    clean_cache,
    frozen_stream,
    live_start,
    live_stream,
    receiver_inputs,
)
from jaxmech.config import Config
from jaxmech.interventions import head_mask
from jaxmech.loading import Model, check_prompts, check_tokens
from jaxmech.metrics import LogitMetric, Metric, Outcome, check_metric, effect, function_of, name_of, outcome
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs, one_or_more, positions_of
from jaxmech.patching import clashing_roles
from jaxmech.scores import PathScores
from jaxmech.sharding import over_rows, row_devices
from jaxmech.shared_prefix import SharedPrompts
from jaxmech.suffixes import Suffixes, suffix_lengths

# A call runs the senders of at least one layer. While that is less work than this, it runs those of more layers, which
# then share the loaded weights; but all of them go through the layers from the lowest one on.
TOKENS_PER_CALL = {"frozen": 512, "live": 4096}
CLEAN = -1  # stands for a sender whose change is zero: the clean outcome by the same arithmetic as all others
Progress = Callable[[int, int], None]
Array = Any  # NumPy on the host, jax.Array inside jit


def path_patch(
    model: Model,
    pairs: Pairs,
    sender: str | Sequence[str] = "last",
    receivers: Iterable[Sequence[int]] | None = None,
    via: str | None = None,
    *,
    metric: Metric = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PathScores:
    """Scores every head of the model as a sender at the role `sender`, or at several roles together.

    Args:
      model: the model whose heads are swept.
      pairs: clean and corrupt prompts.
      sender: role at which the sender's z is patched; its counterpart in the corrupt prompt has the same name. Of
        several, such as the tokens of a name, all are patched at once; some may be the same token.
      receivers: (layer, head) pairs that read the change at the same role or roles, or None for the logits.
      via: which of the receivers' inputs is patched, "q", "k" or "v"; None without receivers. k and v are patched for
        the named query heads alone, also under grouped-query attention.
      metric: what a score is, see `jaxmech.metrics`: "probability" (the paper's), "log_probability" or
        "logit_difference"; or a function (logits [B, V], rows [B]) -> [B] that jit can trace, rows being which of the
        pairs these are, so that it can look up what it needs of them. The score is its change, which `top` and
        `discover` take for important where it is negative; so it must fall where the model is worse. Each new function
        compiles anew.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.
      batch_size: examples in one call; None picks as many as fit a memory budget.
      progress: called with (calls done, calls in all); a call runs the senders of one or more layers.

    Returns:
      Scores of all L x N heads. Heads at or above the last receiver layer have no path and score exactly 0; if no head
      has one, a warning says so.

    Raises:
      ValueError: an unknown role, head or metric, no corrupt prompts, `via` without receivers or the reverse, no
        receivers with a sender that is not at the last token, whose direct effect on the logits is zero, or roles of a
        sender that are one token of a clean prompt and two of its corrupt one.
    """
    sweep = plan(model, pairs, sender, receivers, via, metric=metric, wrong_labels=wrong_labels, batch_size=batch_size)
    config, mask = model.config, sweep.receivers
    heads = np.concatenate([call.senders for call in sweep.calls])
    scores = np.zeros((config.num_layers * config.num_heads, len(pairs)), np.float32)
    probability = np.zeros(len(pairs), np.float32)
    measure, total = function_of(metric), len(sweep.batches.rows) * len(sweep.calls)

    def outcomes(batch: int, rows: np.ndarray) -> Outcome:  # a function, so that its cache goes before the next comes
        inputs = prepare(config, model.weights, sweep.batch(rows), live=mask is not None)
        found: list[Outcome] = []
        for call in sweep.calls:
            call = call._replace(senders=over_rows(model.weights, call.senders))
            found.append(sender_outcomes(config, model.weights, inputs, call, mask, via=via, measure=measure))
            if progress:
                jax.block_until_ready(found[-1])
                progress(batch * len(sweep.calls) + len(found), total)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    for batch, rows in enumerate(sweep.batches.rows):
        found = outcomes(batch, rows)
        clean = jax.tree.map(lambda x: x[_clean_rows(heads)], found)
        # What fills up the last call or batch are rows of the same, so that they are written twice alike.
        scores[heads[heads != CLEAN, None], rows] = effect(metric, found, clean)[heads != CLEAN]
        probability[rows] = np.exp(clean.log_probability[0])
    return PathScores(scores.reshape(config.num_layers, config.num_heads, -1), probability, name_of(metric))


class Call(NamedTuple):
    """The senders of one call and the layers it runs through; traced, so that a sweep's calls share one compilation."""

    senders: Array  # [I] layer * N + head; CLEAN is the row whose change is zero
    first_layer: int  # the lowest sender's
    live_start: int  # where the live stream starts: at the first receiver above, and below the last layer
    last_receiver: int  # its layer


class SweepExamples(NamedTuple):
    """The examples of one batch, as they go to the device."""

    prompts: SharedPrompts  # B clean and B corrupt prompts
    p: Array  # [2B, R]
    suffixes: Suffixes
    labels: Array  # [B]
    wrong_labels: Array  # [B]
    rows: Array  # [B] which of the pairs they are


@dataclass(frozen=True)
class Plan:
    """A sweep, split into batches of examples and, for each, calls that share one compilation.

    Attributes:
      batches: the clean and corrupt prompts.
      corrupt_p: int [B, R], the sender's positions in the corrupt prompts.
      labels, wrong_labels: int [B].
      receivers: bool [L, N], or None for the logits.
      calls: together all senders, layer by layer, behind a clean row; in low precision each call has its own, since
        calls start at different layers, where the rounding of their streams differs.
    """

    batches: Batches
    corrupt_p: np.ndarray  # [B, R]
    labels: np.ndarray  # [B]
    wrong_labels: np.ndarray  # [B]
    receivers: np.ndarray | None  # [L, N]
    calls: list[Call]

    def batch(self, rows: np.ndarray) -> SweepExamples:
        """The examples `rows`, one of `batches.rows`."""
        return SweepExamples(
            prompts=self.batches.prompts(rows),
            p=np.concatenate([self.batches.p[rows], self.corrupt_p[rows]]),
            suffixes=self.batches.suffixes(rows),
            labels=self.labels[rows],
            wrong_labels=self.wrong_labels[rows],
            rows=rows.astype(np.int32),
        )


def plan(
    model: Model,
    pairs: Pairs,
    sender: str | Sequence[str] = "last",
    receivers: Iterable[Sequence[int]] | None = None,
    via: str | None = None,
    *,
    metric: Metric = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
) -> Plan:
    """Checks a sweep and splits it; arguments and errors as for `path_patch`."""
    config, copies = model.config, row_devices(model.weights)
    mask = _receiver_mask(config, receivers, via)
    wrong_labels = check_metric(metric, wrong_labels, pairs, config.vocab_size)
    senders, last = one_or_more(sender, "sender"), pairs.position("last")
    corrupt_p, p = (positions_of(position, senders) for position in (pairs.corrupt_position, pairs.position))
    prompts = check_prompts(config, pairs), check_tokens(config, np.asarray(pairs.corrupt))
    for i, j, row in clashing_roles(p, corrupt_p):
        raise ValueError(
            f"sender={sender!r}: in example {row}, {senders[i]!r} and {senders[j]!r} are one token of the clean prompt "
            f"({p[row, i]}) and two of the corrupt one ({corrupt_p[row, i]} and {corrupt_p[row, j]}), so that heads "
            "would take two values there. Leave such examples out."
        )
    at_last = p == last[:, None]
    if mask is None and not at_last.all():
        raise ValueError(
            f"sender={sender!r} is not the last token alone, so it has no direct path to the logits. Name receivers."
        )
    if mask is not None and not _has_path(mask, str(via), at_last=bool(at_last.any())):
        warnings.warn(
            f"No head has a path through these receivers via {via} at {sender!r}: none is below them, or they are all "
            "in the last layer, where q of a token other than the last changes no logits. All scores are 0.",
            stacklevel=3,
        )
    if (same := _alike(prompts, p, corrupt_p)).any():
        which, what = (
            ("the clean and the corrupt prompts are the same, all of them", "All scores are 0.")
            if same.all()
            else (
                f"{same.sum()} of {len(same)} clean and corrupt prompts are the same, first those of example "
                f"{same.argmax()}",
                "Their scores are 0, which lowers the means; leave them out.",
            )
        )
        warnings.warn(f"Up to {sender!r}, {which}, so that no head differs there. {what}", stacklevel=3)
    if batch_size is None:
        rows = (config.num_heads + 1) / copies
        tokens = [x.shape[1] for x in prompts]
        batch_size = _examples_per_call(model, p, last, tokens, rows, live=mask is not None)
    batches = Batches.plan(prompts, p, last, batch_size)
    sender_layers = config.num_layers if mask is None else int(np.flatnonzero(mask.any(axis=1))[-1])
    heads, work = np.arange(sender_layers * config.num_heads), _work(batches, live=mask is not None)
    calls = _calls(config, mask, heads, work, copies)
    return Plan(batches, corrupt_p, pairs.labels, wrong_labels, mask, calls)


class SweepState(NamedTuple):
    """What a batch of examples brings to every call."""

    clean: CleanCache
    suffixes: Suffixes
    delta_z: jax.Array  # [L, B, R, N, H], corrupt - clean at p
    labels: jax.Array  # [B]
    wrong_labels: jax.Array  # [B]
    rows: jax.Array  # [B]


@partial(jax.jit, static_argnames=("config", "live"))
def prepare(config: Config, weights: Params, batch: SweepExamples, *, live: bool) -> SweepState:
    """Runs the prompts of a batch once; `live` keeps what a live stream needs."""
    clean, delta_z = clean_cache(config, weights, batch.prompts, batch.p, batch.suffixes, live=live)
    return SweepState(clean, batch.suffixes, delta_z, batch.labels, batch.wrong_labels, batch.rows)


@partial(jax.jit, static_argnames=("config", "via", "measure"))
def sender_outcomes(
    config: Config,
    weights: Params,
    inputs: SweepState,
    call: Call,
    receivers: jax.Array | None,
    *,
    via: str | None,
    measure: LogitMetric | None = None,
) -> Outcome:
    """The outcomes, fields [I, B], of the senders of one call; `measure` is the metric, if it is a function."""
    layer, head = jnp.divmod(call.senders, config.num_heads)
    delta = einsum(config, "ibrh,ihd->ibrd", inputs.delta_z[layer, :, :, head], weights["blocks"]["o"][layer, head])
    delta = jnp.where((call.senders == CLEAN)[:, None, None, None], 0, delta)
    kernel = partial(_outcome, config, weights, inputs, call, receivers, via, measure)
    return jax.vmap(kernel)(Change(layer, delta))


def _outcome(
    config: Config,
    weights: Params,
    inputs: SweepState,
    call: Call,
    receivers: jax.Array | None,
    via: str | None,
    measure: LogitMetric | None,
    change: Change,
) -> Outcome:
    """The outcome, fields [B], of one sender's `change`."""
    cone = Cone(config, weights, inputs.clean, inputs.suffixes)
    if receivers is None or via is None:
        x = frozen_stream(cone, change, call.first_layer)[:, 0]  # at `last`, whatever the roles are
    else:
        read = receiver_inputs(cone, change, receivers, via, call.first_layer, call.last_receiver)
        x = live_stream(cone, {via: HeadPatch(receivers, read)}, call.live_start, call.last_receiver)
    return outcome(unembed(config, weights, x), inputs.labels, inputs.wrong_labels, inputs.rows, measure)


def _work(batches: Batches, *, live: bool) -> float:
    """What one sender is of the work that a call should do."""
    frozen = batches.p[batches.rows[0]].size / TOKENS_PER_CALL["frozen"]
    return max(frozen, batches.capacity / TOKENS_PER_CALL["live"]) if live else frozen


def _calls(config: Config, mask: np.ndarray | None, senders: np.ndarray, work: float, copies: int) -> list[Call]:
    """Clean rows and the `senders`, in equal parts, of which each of the model's copies does its own."""
    in_each = config.coarse and len(senders) > 0
    rows = senders if in_each else np.append(CLEAN, senders)
    most = len(senders) // config.num_heads  # at least a layer's in a call
    parts = calls_of_equal_size(rows, work, most, copies=copies, besides=int(in_each))
    parts = [np.append(CLEAN, part) for part in parts] if in_each else parts
    lowest = [int(np.append(part[part != CLEAN], 0)[0]) // config.num_heads for part in parts]
    return [Call(part, *_layers(config, mask, layer)) for part, layer in zip(parts, lowest, strict=True)]


def _clean_rows(senders: np.ndarray) -> np.ndarray:
    """For each row of all calls, the clean one that it is compared with: the last one up to it."""
    return np.maximum.accumulate(np.where(senders == CLEAN, np.arange(len(senders)), 0))


def _layers(config: Config, mask: np.ndarray | None, first_layer: int) -> tuple[int, int, int]:
    """`first_layer`, `live_start` and `last_receiver` of a call whose lowest sender layer is `first_layer`."""
    if mask is None:
        return first_layer, 0, 0
    layers = [int(layer) for layer in np.flatnonzero(mask.any(axis=1))]
    receiver = next((layer for layer in layers if layer > first_layer), layers[-1])
    return first_layer, int(live_start(config, receiver)), layers[-1]


def _alike(prompts: Sequence[np.ndarray], p: np.ndarray, corrupt_p: np.ndarray) -> np.ndarray:
    """Which clean and corrupt prompts [B, T] are the same up to the last of the tokens p [B, R], bool [B]."""
    clean, corrupt = prompts
    width = min(clean.shape[1], corrupt.shape[1])
    end = p.max(axis=1)
    before = np.arange(width) <= end[:, None]
    same = (clean[:, :width] == corrupt[:, :width]) | ~before
    return (p == corrupt_p).all(axis=1) & (end < width) & same.all(axis=1)


def _has_path(receivers: np.ndarray, via: str, *, at_last: bool) -> bool:
    """Whether a head below one of the `receivers` [L, N] can change the logits through it."""
    layers = np.flatnonzero(receivers.any(axis=1))
    heard = layers if via != "q" or at_last else layers[layers < len(receivers) - 1]
    return bool((heard > 0).any())


def _receiver_mask(config: Config, receivers: Iterable[Sequence[int]] | None, via: str | None) -> np.ndarray | None:
    if receivers is None:
        if via is not None:
            raise ValueError(
                f"via={via!r} without receivers; name the receiver heads, or leave via out for the logits."
            )
        return None
    if via not in ("q", "k", "v"):
        raise ValueError(f"via={via!r}; with receivers, expected 'q', 'k' or 'v'.")
    return head_mask(config, receivers)


def _examples_per_call(
    model: Model, p: np.ndarray, last: np.ndarray, tokens: Sequence[int], rows: float, *, live: bool
) -> int:
    """Examples whose clean cache fits the memory budget, beside what runs them or the senders, so many at a time.

    Args:
      p, last: of the clean prompts, see `Batches`.
      tokens: of a clean and of a corrupt prompt.
    """
    config, lengths, roles = model.config, suffix_lengths(p, last), p.shape[1]
    length, width, layers = float(lengths.mean()), int(lengths.max()), config.num_layers
    cache = memory.of_streams(config, length + roles, layers) + memory.of_heads(config, roles, layers)
    sender = memory.of_tokens(config, max(length, roles) if live else roles)
    if live:
        cache += memory.of_keys_and_values(config, tokens[0], layers)
        sender += memory.of_heads(config, roles, layers)  # what the receivers read
        sender += memory.of_heads(config, 4 * width, 1) + memory.of_attention(config, width, tokens[0] + width)
    prompts = len(tokens) * memory.of_forward(config, max(tokens))
    return memory.fitting(model.weights, cache + max(prompts, rows * (sender + memory.of_logits(config))))
