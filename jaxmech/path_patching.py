"""Path patching: the effect of every head, as a sender, on the logits directly or through receiver heads.

Definition (Wang et al. 2022, arXiv:2211.00593; DESIGN of the sweeps after Prakash et al. 2024, section 3.2). For a
sender at position p: in a clean run with all attention outputs held at their clean values, the sender's z at p is
replaced by its value in the corrupt run, and MLPs and norms are recomputed. With no receivers, the effect is read from
the logits of that run. With receivers, their q, k or v (before RoPE) at p is recorded there and put into an otherwise
unpatched clean run, and the effect is read from the logits of that one.

The score is (p_patched - p_clean) / p_clean, p the probability of the correct token at the last position.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import cone
from jaxmech.config import Config
from jaxmech.interventions import head_mask
from jaxmech.loading import Model, check_tokens
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs

MEMORY_BUDGET = 2**30  # bytes of activations that one call may hold
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PathScores:
    """Relative change of the correct token's probability when a head's path is patched.

    Attributes:
      per_example: float32 [L, N, B], (p_patched - p_clean) / p_clean; -1 means that all probability is lost.
      probability: float32 [B], p_clean.
    """

    per_example: np.ndarray  # [L, N, B]
    probability: np.ndarray  # [B]

    @property
    def mean(self) -> np.ndarray:
        """Mean over examples, float32 [L, N]."""
        return self.per_example.mean(-1)

    def top(self, k: int, min_effect: float = 0.0) -> list[tuple[int, int]]:
        """The k heads with the most negative mean, strongest first, as (layer, head).

        Heads whose mean is above -min_effect are left out, so there may be fewer; ties go to the lower head.

        Raises:
          ValueError: k is negative or exceeds the number of heads.
        """
        mean = self.mean
        if not 0 <= k <= mean.size:
            raise ValueError(f"k={k}, but the model has {mean.size} heads ({mean.shape[0]} x {mean.shape[1]}).")
        order = np.argsort(mean, axis=None, kind="stable")[:k]
        heads = [(int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order]
        return [head for head in heads if mean[head] <= -min_effect]


class Span(NamedTuple):
    """Layers of the streams of one sender layer; dynamic, so that all sender layers share one compilation."""

    sender: int
    first_receiver: int  # the first receiver layer above the sender
    last_receiver: int


def path_patch(
    model: Model,
    pairs: Pairs,
    sender: str = "last",
    receivers: Iterable[Sequence[int]] | None = None,
    via: str | None = None,
    *,
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
      batch_size: examples in one call; None picks as many as fit a memory budget.
      progress: called with (sender layers done, sender layers in all).

    Returns:
      Scores of all L x N heads. Heads at or above the last receiver layer have no path and score exactly 0.

    Raises:
      ValueError: an unknown role or head, no corrupt prompts, `via` without receivers or the reverse, or no receivers
        with a sender that is not at the last token, whose direct effect on the logits is zero.
    """
    clean, corrupt = check_tokens(model.config, pairs.clean), pairs.corrupt
    p, corrupt_p = pairs.position(sender), pairs.corrupt_position(sender)
    corrupt = check_tokens(model.config, corrupt)
    last = pairs.position("last")
    mask = _receiver_mask(model.config, receivers, via)
    if mask is None and (p != last).any():
        raise ValueError(
            f"sender={sender!r} is not the last token, so it has no direct path to the logits. Name receivers."
        )
    width = None if mask is None else int((last - p).max()) + 1
    spans = _spans(model.config, mask)
    size = batch_size or _examples_per_call(model.config, clean.shape[1], width)
    size = min(size, len(pairs))
    scores = np.zeros((model.config.num_layers, model.config.num_heads, len(pairs)), np.float32)
    probability = np.zeros(len(pairs), np.float32)
    starts = range(0, len(pairs), size)
    for batch, start in enumerate(starts):
        rows = np.arange(start, start + size) % len(pairs)  # the last batch wraps around: one shape, one compilation
        batch_inputs = (clean[rows], corrupt[rows], p[rows], corrupt_p[rows], last[rows], pairs.labels[rows])
        inputs = _prepare(model.config, model.weights, *batch_inputs, width=width)
        for step, span in enumerate(spans):
            effect, p_clean = _sender_layer(model.config, model.weights, inputs, span, mask, via=via)
            kept = min(size, len(pairs) - start)
            scores[span.sender, :, start : start + kept] = np.asarray(effect)[:kept].T
            probability[start : start + kept] = np.asarray(p_clean)[:kept]
            if progress:
                progress(batch * len(spans) + step + 1, len(starts) * len(spans))
    return PathScores(scores, probability)


class _Inputs(NamedTuple):
    """What a batch of examples brings to every sender layer."""

    cache: cone.CleanCache
    suffix: cone.Suffix | None
    delta_z: jax.Array  # [L, B, N, H], corrupt - clean at p
    labels: jax.Array  # [B]


@partial(jax.jit, static_argnames=("config", "width"))
def _prepare(
    config: Config, weights: Params, clean, corrupt, p, corrupt_p, last, labels, *, width: int | None
) -> _Inputs:
    cache = cone.clean_cache(config, weights, clean, p, width)
    delta_z = cone.z_at(config, weights, corrupt, corrupt_p) - cache.z
    suffix = None if width is None else cone.suffixes(config, p, last, clean.shape[1], width)
    return _Inputs(cache, suffix, delta_z, labels)


@partial(jax.jit, static_argnames=("config", "via"))
def _sender_layer(
    config: Config,
    weights: Params,
    inputs: _Inputs,
    span: Span,
    receivers: jax.Array | None,
    *,
    via: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Scores [B, N] of all heads of layer `span.sender`, and the clean probability [B]."""
    kernel = partial(_log_probability, config, weights, via=via)
    senders = jax.vmap(kernel, in_axes=(None, None, 0, None, None, None))
    examples = jax.vmap(senders, in_axes=(1, 0, 0, 0, None, None))
    o = _layer(weights, span.sender)["o"]
    delta = jnp.einsum(
        "bnh,nhd->bnd",
        inputs.delta_z[span.sender],
        o.astype(inputs.delta_z.dtype),
        precision=config.precision,
    )
    # A row whose delta is zero: p_clean by the same arithmetic, so that rounding does not pass for an effect.
    delta = jnp.pad(delta, ((0, 0), (1, 0), (0, 0)))  # [B, 1 + N, D]
    logp = examples(inputs.cache, inputs.suffix, delta, inputs.labels, span, receivers)
    return jnp.expm1(logp[:, 1:] - logp[:, :1]), jnp.exp(logp[:, 0])


def _log_probability(
    config: Config,
    weights: Params,
    clean: cone.CleanCache,
    suffix: cone.Suffix | None,
    delta: jax.Array,
    label: jax.Array,
    span: Span,
    receivers: jax.Array | None,
    *,
    via: str | None,
) -> jax.Array:
    """Log probability of `label` when the sender layer's output at p changes by `delta` [D]; one example, one sender."""
    x = cone.mlp_half(config, _layer(weights, span.sender), clean.resid_mid[span.sender] + delta)

    def frozen(i, x):
        return cone.frozen_layer(config, _layer(weights, i), x, clean.attn_out[i])

    if via is None:
        x = jax.lax.fori_loop(span.sender + 1, config.num_layers, frozen, x)
        return jax.nn.log_softmax(unembed(config, weights, x))[label]

    def twin(i, x):
        return cone.twin_layer(
            config,
            _layer(weights, i),
            x,
            clean.attn_out[i],
            (clean.k[i], clean.v[i]),
            suffix,
            receivers[i],
            via,
        )

    def live(i, x):
        return cone.live_layer(config, _layer(weights, i), x, (clean.k[i], clean.v[i]), suffix)

    x = jax.lax.fori_loop(span.sender + 1, span.first_receiver, frozen, x)
    x = jnp.concatenate([x[None], clean.resid_pre[span.first_receiver]])  # [1 + W, D]
    x = jax.lax.fori_loop(span.first_receiver, span.last_receiver + 1, twin, x)
    x = jax.lax.fori_loop(span.last_receiver + 1, config.num_layers, live, x[1:])
    return jax.nn.log_softmax(unembed(config, weights, x[suffix.last]))[label]


def _layer(weights: Params, i: jax.Array) -> Params:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), weights["blocks"])


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


def _spans(config: Config, mask: np.ndarray | None) -> list[Span]:
    """One span for each sender layer that has a path; with no receivers all have one."""
    if mask is None:
        return [Span(layer, config.num_layers, config.num_layers) for layer in range(config.num_layers)]
    layers = np.flatnonzero(mask.any(axis=1))
    return [Span(l, int(layers[layers > l][0]), int(layers[-1])) for l in range(int(layers[-1]))]  # noqa: E741


def _examples_per_call(config: Config, length: int, width: int | None) -> int:
    """Examples whose streams fit MEMORY_BUDGET: per sender and token, the widest layer's activations; and the logits."""
    tokens = 1 if width is None else 1 + width
    per_token = 4 * config.width + 3 * config.mlp_width + 4 * config.num_heads * config.head_dim
    scores = 0 if width is None else 2 * width * config.num_heads * (length + width)
    item = config.compute_dtype.itemsize
    per_sender = (tokens * per_token + scores) * item + 4 * config.vocab_size
    return max(1, MEMORY_BUDGET // ((config.num_heads + 1) * per_sender))
