"""Path patching: the effect of every head, as a sender, on the logits directly or through receiver heads.

Definition (Wang et al. 2022, arXiv:2211.00593; the sweeps of Prakash et al. 2024, section 3.2). For a sender at
position p: in a clean run with all attention outputs held at their clean values, the sender's z at p is replaced by its
value in the corrupt run, and MLPs and norms are recomputed. With no receivers, the effect is read from the logits of
that run. With receivers, their q, k or v (before RoPE) at p is recorded there and put into an otherwise unpatched clean
run, and the effect is read from the logits of that one.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import cone, memory
from jaxmech.config import Config
from jaxmech.interventions import head_mask
from jaxmech.loading import Model, check_tokens
from jaxmech.metrics import Outcome, check_metric, effect, outcome
from jaxmech.model import Params, einsum
from jaxmech.pairs import Pairs
from jaxmech.scores import PathScores
from jaxmech.shared_prefix import SharedPrompts, shared_length

ROWS_PER_CALL = 256  # senders x examples; with fewer, several sender layers share a call, and so the loaded weights
Progress = Callable[[int, int], None]
Array = Any  # NumPy on the host, jax.Array inside jit


def path_patch(
    model: Model,
    pairs: Pairs,
    sender: str = "last",
    receivers: Iterable[Sequence[int]] | None = None,
    via: str | None = None,
    *,
    metric: str = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PathScores:
    """Scores every head of the model as a sender at the role `sender`.

    Args:
      pairs: clean and corrupt prompts.
      sender: role at which the sender's z is patched; its counterpart in the corrupt prompt has the same name.
      receivers: (layer, head) pairs that read the change at the same role, or None for the logits.
      via: which of the receivers' inputs is patched, "q", "k" or "v"; None without receivers. k and v are patched for
        the named query heads alone, also under grouped-query attention.
      metric: what a score is, see `jaxmech.metrics`: "probability" (the paper's), "log_probability" or
        "logit_difference".
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference".
      batch_size: examples in one call; None picks as many as fit a memory budget.
      progress: called with (sender layers done, sender layers in all).

    Returns:
      Scores of all L x N heads. Heads at or above the last receiver layer have no path and score exactly 0.

    Raises:
      ValueError: an unknown role, head or metric, no corrupt prompts, `via` without receivers or the reverse, or no
        receivers with a sender that is not at the last token, whose direct effect on the logits is zero.
    """
    config = model.config
    mask = _receiver_mask(config, receivers, via)
    wrong_labels = check_metric(metric, wrong_labels, pairs.labels, config.vocab_size)
    examples = _Examples(
        clean=check_tokens(config, pairs.clean),
        corrupt_p=pairs.corrupt_position(sender),
        corrupt=check_tokens(config, np.asarray(pairs.corrupt)),
        p=pairs.position(sender),
        last=pairs.position("last"),
        labels=pairs.labels,
        wrong_labels=wrong_labels,
    )
    if mask is None and (examples.p != examples.last).any():
        raise ValueError(
            f"sender={sender!r} is not the last token, so it has no direct path to the logits. Name receivers."
        )
    plan = _plan(config, examples, mask, batch_size)
    scores = np.zeros((config.num_layers, config.num_heads, len(pairs)), np.float32)
    probability = np.zeros(len(pairs), np.float32)
    for batch, rows in enumerate(plan.batches):
        inputs = _prepare(config, model.weights, _batch(examples, rows, plan), live=mask is not None)
        for step, span in enumerate(plan.spans):
            found, p_clean = _sender_layers(
                config, model.weights, inputs, span, mask, via=via, metric=metric, count=plan.layers_per_call
            )
            kept = slice(span.first, min(span.first + plan.layers_per_call, plan.sender_layers))
            # Rows that fill up the last batch are examples of the same batch, so that they are written twice alike.
            scores[kept, :, rows] = np.asarray(found)[: kept.stop - kept.start]
            probability[rows] = np.asarray(p_clean)
            if progress:
                done = batch * len(plan.spans) + step + 1
                progress(done, len(plan.batches) * len(plan.spans))
    return PathScores(scores, probability, metric)


class _Examples(NamedTuple):
    """The prompts of a sweep; rows are examples."""

    clean: np.ndarray  # [B, T]
    corrupt: np.ndarray  # [B, T']
    p: np.ndarray  # [B]
    corrupt_p: np.ndarray  # [B]
    last: np.ndarray  # [B]
    labels: np.ndarray  # [B]
    wrong_labels: np.ndarray  # [B]


class _Span(NamedTuple):
    """Layers that one call runs through; traced, so that all calls of a sweep share one compilation."""

    first: int  # first sender layer
    live: int  # where the live stream starts: at the first receiver above, and below the last layer
    stop: int  # the last receiver layer


class _Plan(NamedTuple):
    """How a sweep is split into calls of equal shape."""

    batches: list[np.ndarray]  # rows of each batch, all equally many
    capacity: int  # packed suffix tokens of a batch
    width: int  # tokens of the longest suffix
    shared_tokens: int  # tokens at the start of every prompt that are computed once for those that share them
    shared_prefixes: int  # distinct ones in a batch, at most
    spans: list[_Span]
    sender_layers: int  # layers below the last receiver
    layers_per_call: int


class _Batch(NamedTuple):
    """The examples of one batch, as they go to the device."""

    prompts: SharedPrompts  # B clean and B corrupt prompts
    p: Array  # [2B]
    suffixes: cone.Suffixes
    labels: Array  # [B]
    wrong_labels: Array  # [B]


class _Inputs(NamedTuple):
    """What a batch of examples brings to every call."""

    clean: cone.CleanCache
    suffixes: cone.Suffixes
    delta_z: jax.Array  # [L, B, N, H], corrupt - clean at p
    labels: jax.Array  # [B]
    wrong_labels: jax.Array  # [B]


@partial(jax.jit, static_argnames=("config", "live"))
def _prepare(config: Config, weights: Params, batch: "_Batch", *, live: bool) -> _Inputs:
    clean, delta_z = cone.clean_cache(config, weights, batch.prompts, batch.p, batch.suffixes, live=live)
    return _Inputs(clean, batch.suffixes, delta_z, batch.labels, batch.wrong_labels)


@partial(jax.jit, static_argnames=("config", "via", "metric", "count"))
def _sender_layers(
    config: Config,
    weights: Params,
    inputs: _Inputs,
    span: _Span,
    receivers: jax.Array | None,
    *,
    via: str | None,
    metric: str,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Scores [count, N, B] of all heads of the layers from `span.first` on, and the clean probability [B]."""
    layers = span.first + jnp.arange(count)
    o = weights["blocks"]["o"][layers]
    delta = einsum(config, "sbnh,snhd->snbd", inputs.delta_z[layers], o)
    # A row whose delta is zero: the clean outcome by the same arithmetic, so that rounding does not pass for an effect.
    delta = jnp.pad(delta.reshape(-1, *delta.shape[2:]), ((1, 0), (0, 0), (0, 0)))  # [1 + count * N, B, D]
    change = cone.Change(jnp.pad(jnp.repeat(layers, config.num_heads), (1, 0)), delta)
    kernel = partial(_outcome, config, weights, inputs, span, receivers, via)
    outcomes = jax.vmap(kernel)(change)
    clean, patched = (jax.tree.map(lambda x, rows=rows: x[rows], outcomes) for rows in (slice(1), slice(1, None)))
    scores = effect(metric, patched, clean).reshape(count, config.num_heads, -1)
    return scores, jnp.exp(clean.log_probability[0])


def _outcome(
    config: Config,
    weights: Params,
    inputs: _Inputs,
    span: _Span,
    receivers: jax.Array | None,
    via: str | None,
    change: cone.Change,
) -> Outcome:
    """The outcome, fields [B], of one sender's `change`."""
    clean, suffixes = inputs.clean, inputs.suffixes
    if receivers is None or via is None:
        x = cone.frozen_stream(config, weights, clean, suffixes, change, span.first)
    else:
        read = cone.receiver_inputs(config, weights, clean, suffixes, change, receivers, via, span.first, span.stop)
        patch = cone.Receivers(receivers, read)
        x = cone.live_stream(config, weights, clean, suffixes, patch, via, span.live, span.stop)
    return outcome(config, weights, x, inputs.labels, inputs.wrong_labels)


def _batch(examples: _Examples, rows: np.ndarray, plan: _Plan) -> _Batch:
    p, last = examples.p[rows], examples.last[rows]
    return _Batch(
        prompts=SharedPrompts.split(_prompts(examples, rows), plan.shared_tokens, plan.shared_prefixes),
        p=np.concatenate([p, examples.corrupt_p[rows]]),
        suffixes=cone.Suffixes.pack(p, last, capacity=plan.capacity, width=plan.width),
        labels=examples.labels[rows],
        wrong_labels=examples.wrong_labels[rows],
    )


def _prompts(examples: _Examples, rows: np.ndarray) -> np.ndarray:
    """Clean prompts and, behind them, corrupt ones, padded to one length: [2B, T]."""
    both = examples.clean[rows], examples.corrupt[rows]
    length = max(tokens.shape[1] for tokens in both)
    return np.concatenate([np.pad(tokens, ((0, 0), (0, length - tokens.shape[1]))) for tokens in both])


def _plan(config: Config, examples: _Examples, mask: np.ndarray | None, batch_size: int | None) -> _Plan:
    length = examples.last - examples.p + 1
    if batch_size is None:
        batch_size = _examples_per_call(config, examples, live=mask is not None)
    batches = _batches(length, batch_size)
    layers = config.num_layers if mask is None else int(np.flatnonzero(mask.any(axis=1))[-1])
    rows = len(batches[0]) * config.num_heads
    shared_tokens, shared_prefixes = shared_length([_prompts(examples, rows) for rows in batches])
    per_call = max(1, min(-(-ROWS_PER_CALL // rows), layers // 4))
    return _Plan(
        batches=batches,
        capacity=max(int(length[rows].sum()) for rows in batches),
        width=int(length.max()),
        shared_tokens=shared_tokens,
        shared_prefixes=shared_prefixes,
        spans=[_span(config, mask, first) for first in range(0, max(layers, 1), per_call)],
        sender_layers=layers,
        layers_per_call=per_call,
    )


def _batches(length: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows of batches of at most `size` examples, equally many in each and with similar sums of lengths."""
    if size < 1:
        raise ValueError(f"batch_size={size}; expected at least 1.")
    count = -(-len(length) // size)
    order = np.argsort(-length, kind="stable")
    batches = [order[first::count] for first in range(count)]
    return [np.resize(rows, len(batches[0])) for rows in batches]  # a shorter batch repeats some of its rows


def _span(config: Config, mask: np.ndarray | None, first: int) -> _Span:
    if mask is None:
        return _Span(first, 0, 0)
    layers = np.flatnonzero(mask.any(axis=1))
    above = layers[layers > first]
    receiver = int(above[0]) if len(above) else int(layers[-1])
    return _Span(first, max(0, min(receiver, config.num_layers - 2)), int(layers[-1]))


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


def _examples_per_call(config: Config, examples: _Examples, *, live: bool) -> int:
    """Examples that fit the memory budget: their clean cache, and the widest activations of all senders of a layer."""
    N, H, D, F = config.num_heads, config.head_dim, config.width, config.mlp_width
    length, width = float((examples.last - examples.p + 1).mean()), int((examples.last - examples.p).max()) + 1
    T = examples.clean.shape[1]
    per_token = 4 * D + 3 * F + 4 * N * H
    cache = config.num_layers * ((length + 1) * D + N * H)
    sender = per_token
    if live:
        cache += 2 * config.num_layers * T * config.num_kv_heads * H
        sender = length * per_token + config.num_layers * N * H + 4 * width * N * H + 3 * width * N * (T + width)
    item = config.compute_dtype.itemsize
    per_example = item * cache + (N + 1) * (item * sender + 8 * config.vocab_size)
    return max(1, int(memory.budget() / per_example))
