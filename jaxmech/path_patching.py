"""Path patching: the effect of every head, as a sender, on the logits directly or through receiver heads.

Definition (Wang et al. 2022, arXiv:2211.00593; the sweeps of Prakash et al. 2024, section 3.2). For a sender at
position p: in a clean run with all attention outputs held at their clean values, the sender's z at p is replaced by its
value in the corrupt run, and MLPs and norms are recomputed. With no receivers, the effect is read from the logits of
that run. With receivers, their q, k or v (before RoPE) at p is recorded there and put into an otherwise unpatched clean
run, and the effect is read from the logits of that one.
"""

import math
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

# A call runs the senders of at least one layer. While that is less work than this, it runs those of more layers, which
# then share the loaded weights; but all of them go through the layers from the lowest one on.
TOKENS_PER_CALL = {"frozen": 512, "live": 4096}
BUCKETS = 4  # parts of a batch that attend together, padded to the longest suffix and prefix in it
CLEAN = -1  # stands for a sender whose change is zero: the clean outcome by the same arithmetic as all others
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
      progress: called with (calls done, calls in all); a call runs the senders of one or more layers.

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
    scores = np.zeros((config.num_layers * config.num_heads, len(pairs)), np.float32)
    probability = np.zeros(len(pairs), np.float32)
    for batch, rows in enumerate(plan.batches):
        inputs = _prepare(config, model.weights, _batch(examples, rows, plan), live=mask is not None)
        outcomes = []
        for call in plan.calls:
            outcomes.append(_senders(config, model.weights, inputs, call, mask, via=via))
            if progress:
                jax.block_until_ready(outcomes[-1])
                progress(batch * len(plan.calls) + len(outcomes), len(plan.batches) * len(plan.calls))
        found = jax.tree.map(lambda *parts: np.concatenate(parts), *outcomes)
        clean, patched = (jax.tree.map(lambda x, kept=kept: x[kept], found) for kept in (0, slice(1, plan.rows)))
        # Rows that fill up the last batch are examples of the same batch, so that they are written twice alike.
        scores[: plan.rows - 1, rows] = effect(metric, patched, clean)
        probability[rows] = np.exp(clean.log_probability)
    return PathScores(scores.reshape(config.num_layers, config.num_heads, -1), probability, metric)


class _Examples(NamedTuple):
    """The prompts of a sweep; rows are examples."""

    clean: np.ndarray  # [B, T]
    corrupt: np.ndarray  # [B, T']
    p: np.ndarray  # [B]
    corrupt_p: np.ndarray  # [B]
    last: np.ndarray  # [B]
    labels: np.ndarray  # [B]
    wrong_labels: np.ndarray  # [B]


class _Call(NamedTuple):
    """The senders of one call and the layers it runs through; traced, so that a sweep's calls share one compilation."""

    senders: Array  # [R] layer * N + head; CLEAN is the row whose change is zero
    first: int  # the lowest sender layer
    live: int  # where the live stream starts: at the first receiver above, and below the last layer
    stop: int  # the last receiver layer


class _Plan(NamedTuple):
    """How a sweep is split into calls of equal shape."""

    batches: list[np.ndarray]  # rows of each batch, all equally many
    capacity: int  # packed suffix tokens of a batch
    buckets: list[cone.Span]  # of the examples of a batch
    shared_tokens: int  # tokens at the start of every prompt that are computed once for those that share them
    shared_prefixes: int  # distinct ones in a batch, at most
    calls: list[_Call]  # for each batch; together the clean row and then all senders, layer by layer
    rows: int  # the clean row and all senders; the last call repeats some of its own


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


@partial(jax.jit, static_argnames=("config", "via"))
def _senders(
    config: Config,
    weights: Params,
    inputs: _Inputs,
    call: _Call,
    receivers: jax.Array | None,
    *,
    via: str | None,
) -> Outcome:
    """The outcomes, fields [R, B], of the senders of one call."""
    layer, head = jnp.divmod(call.senders, config.num_heads)
    delta = einsum(config, "rbh,rhd->rbd", inputs.delta_z[layer, :, head], weights["blocks"]["o"][layer, head])
    delta = jnp.where((call.senders == CLEAN)[:, None, None], 0, delta)
    kernel = partial(_outcome, config, weights, inputs, call, receivers, via)
    return jax.vmap(kernel)(cone.Change(layer, delta))


def _outcome(
    config: Config,
    weights: Params,
    inputs: _Inputs,
    call: _Call,
    receivers: jax.Array | None,
    via: str | None,
    change: cone.Change,
) -> Outcome:
    """The outcome, fields [B], of one sender's `change`."""
    clean, suffixes = inputs.clean, inputs.suffixes
    if receivers is None or via is None:
        x = cone.frozen_stream(config, weights, clean, suffixes, change, call.first)
    else:
        read = cone.receiver_inputs(config, weights, clean, suffixes, change, receivers, via, call.first, call.stop)
        patch = cone.Receivers(receivers, read)
        x = cone.live_stream(config, weights, clean, suffixes, patch, via, call.live, call.stop)
    return outcome(config, weights, x, inputs.labels, inputs.wrong_labels)


def _batch(examples: _Examples, rows: np.ndarray, plan: _Plan) -> _Batch:
    p, last = examples.p[rows], examples.last[rows]
    return _Batch(
        prompts=SharedPrompts.split(_prompts(examples, rows), plan.shared_tokens, plan.shared_prefixes),
        p=np.concatenate([p, examples.corrupt_p[rows]]),
        suffixes=cone.Suffixes.pack(p, last, capacity=plan.capacity, spans=plan.buckets),
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
    shared_tokens, shared_prefixes = shared_length([_prompts(examples, rows) for rows in batches])
    capacity = max(int(length[rows].sum()) for rows in batches)
    sender_layers = config.num_layers if mask is None else int(np.flatnonzero(mask.any(axis=1))[-1])
    senders = np.append(CLEAN, np.arange(sender_layers * config.num_heads))
    return _Plan(
        batches=batches,
        capacity=capacity,
        buckets=_buckets(batches, examples.p, length),
        shared_tokens=shared_tokens,
        shared_prefixes=shared_prefixes,
        calls=_calls(config, mask, senders, len(batches[0]), capacity),
        rows=len(senders),
    )


def _calls(config: Config, mask: np.ndarray | None, senders: np.ndarray, examples: int, capacity: int) -> list[_Call]:
    """The `senders`, in equal parts, for batches of so many examples and packed suffix tokens."""
    work = max(examples / TOKENS_PER_CALL["frozen"], 0 if mask is None else capacity / TOKENS_PER_CALL["live"])
    layers = len(senders) // config.num_heads
    count = max(1, min(layers, math.ceil(len(senders) * work)))
    size = math.ceil(len(senders) / count)
    parts = [np.resize(senders[first : first + size], size) for first in range(0, len(senders), size)]
    return [_Call(part, *_span(config, mask, max(0, int(part[0])) // config.num_heads)) for part in parts]


def _batches(length: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows of batches of at most `size` examples, longest suffixes first, with similar sums of lengths.

    All have equally many rows; a shorter batch repeats its last one.
    """
    if size < 1:
        raise ValueError(f"batch_size={size}; expected at least 1.")
    count = -(-len(length) // size)
    order = np.argsort(-length, kind="stable")
    batches = [order[first::count] for first in range(count)]
    return [np.pad(rows, (0, len(batches[0]) - len(rows)), "edge") for rows in batches]


def _buckets(batches: list[np.ndarray], p: np.ndarray, length: np.ndarray) -> list[cone.Span]:
    """The examples of a batch in buckets of similar lengths, the same for all batches: equal parts of the order."""
    count = min(BUCKETS, len(np.unique(length)))
    bounds = [len(batches[0]) * i // count for i in range(count + 1)]
    spans = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if start < stop:
            rows = np.concatenate([batch[start:stop] for batch in batches])
            spans.append(cone.Span(start, stop, int(length[rows].max()), max(1, int(p[rows].max()))))
    return spans


def _span(config: Config, mask: np.ndarray | None, first: int) -> tuple[int, int, int]:
    """`first`, `live` and `stop` of a call whose lowest sender layer is `first`."""
    if mask is None:
        return first, 0, 0
    layers = np.flatnonzero(mask.any(axis=1))
    above = layers[layers > first]
    receiver = int(above[0]) if len(above) else int(layers[-1])
    return first, max(0, min(receiver, config.num_layers - 2)), int(layers[-1])


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
