"""Path patching, one forward pass per sender head and stream.

Definition (Wang et al. 2022, arXiv:2211.00593, as the sweeps of Prakash et al. 2024, section 3.2, use it). Frozen pass:
the clean prompt with every attention output held at its clean value, except that the sender's z at its position comes
from the corrupt run; MLPs and norms are recomputed. Without receivers the logits of this pass are read. With receivers,
their q, k or v (before RoPE) at the sender's position is recorded here, and the live pass, an otherwise unpatched
forward pass of the clean prompt, is run with these values in place.

There are two frozen passes. "hooks" is the whole model with hooks that replace the output of every self_attn, as hook
libraries do it; the attention is computed and thrown away. "lean" runs Hugging Face's own norms and MLPs, computes no
attention and stops at the last receiver. With either, logits are computed at the last token alone, and senders without
a path to a receiver are skipped unless `every_head` asks for them, as the published code sweeps them. Both passes run
the whole prompt from the first layer; to start later and run fewer tokens is the algorithm of `incremental`.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .hooks import (
    at,
    by_layer,
    capture,
    edited,
    indices,
    last_logits,
    maker,
    per_query_head,
    project,
    replace,
    unembed,
)

Head = tuple[int, int]


class Prompts(NamedTuple):
    """Clean and corrupt prompts and the positions read and patched; int64 on the model's device."""

    clean: Tensor  # [B, T]
    corrupt: Tensor  # [B, T']
    labels: Tensor  # [B]
    position: Tensor  # [B]
    corrupt_position: Tensor  # [B]
    last: Tensor  # [B]


@torch.inference_mode()
def path_patch(
    model: LlamaForCausalLM,
    clean,
    corrupt,
    labels,
    position,
    corrupt_position,
    last,
    receivers: Iterable[Head] | None = None,
    via: str | None = None,
    *,
    senders: Iterable[Head] | None = None,
    chunk: int | None = None,
    frozen: str = "lean",
    every_head: bool = False,
) -> Tensor:
    """Scores heads as senders: (p_patched - p_clean) / p_clean, p the softmax probability of the label at `last`.

    p_clean comes from the same passes with no sender patched, so that rounding does not pass for an effect.

    Args:
      clean: int [B, T], right-padded token ids; this and the next five may be tensors, arrays or lists.
      corrupt: int [B, T'], right-padded token ids.
      labels: int [B], the correct next token of each clean prompt.
      position: int [B], the sender's position in the clean prompt.
      corrupt_position: int [B], its counterpart in the corrupt prompt.
      last: int [B], the last token of each clean prompt.
      receivers: (layer, head) pairs that read the change at `position`; None: the logits.
      via: "q", "k" or "v", the receivers' input that is patched, k and v for the named query heads alone (see
        `hooks.edited`); None without receivers.
      senders: the heads to score, for timing a sample of a large model; all by default.
      chunk: examples in one forward pass; all at once by default.
      frozen: how the frozen pass is run, "hooks" or "lean".
      every_head: also run the passes of heads at or above the last receiver layer, whose score is 0.

    Returns:
      float32 [L, N, B] on the model's device. Heads at or above the last receiver layer score exactly 0; heads not in
      `senders` are NaN.

    Raises:
      ValueError: an unknown head, `via` without receivers or the reverse, or no receivers with a sender that is not at
        the last token, where it has no direct path to the logits.
    """
    prompts = Prompts(*(indices(model, x) for x in (clean, corrupt, labels, position, corrupt_position, last)))
    reads = check_receivers(model, prompts, receivers, via)
    sends = None if senders is None else {(layer, int(h)) for layer, hs in by_layer(model, senders).items() for h in hs}
    size = chunk or len(prompts.clean)
    parts = zip(*(x.split(size) for x in prompts), strict=True)
    passes = {"hooks": _hooked_frozen_pass, "lean": _frozen_pass}[frozen]
    layers = model.config.num_hidden_layers if every_head or not reads else max(reads)
    return torch.cat([_scores(model, Prompts(*part), reads, via, sends, passes, layers) for part in parts], dim=-1)


def check_receivers(
    model: LlamaForCausalLM, prompts: Prompts, receivers: Iterable[Head] | None, via: str | None
) -> dict[int, Tensor]:
    """The receivers as {layer: heads}, empty for the logits; ValueError as for `path_patch`."""
    if receivers is None:
        if via is not None:
            raise ValueError(f"via={via!r} without receivers.")
        if (prompts.position != prompts.last).any():
            raise ValueError("A sender that is not at the last token has no direct path to the logits; name receivers.")
        return {}
    reads = by_layer(model, receivers)
    if via not in ("q", "k", "v") or not reads:
        raise ValueError(f"{len(reads)} receiver layers with via={via!r}; expected some, with 'q', 'k' or 'v'.")
    return reads


def unembed_probability(model: LlamaForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Probability of `labels` [B], float32 [B, ...], from the residual stream after the last layer [B, ..., D]."""
    probability = unembed(model, model.model.norm(hidden)).softmax(-1)
    index = labels.view(-1, *[1] * (hidden.ndim - 1)).expand(*hidden.shape[:-1], 1)
    return probability.gather(-1, index).squeeze(-1)


def _scores(
    model: LlamaForCausalLM,
    prompts: Prompts,
    reads: dict[int, Tensor],
    via: str | None,
    sends: set[Head] | None,
    frozen_pass: Callable,
    layers: int,
) -> Tensor:
    """Scores [L, N, B] of one chunk of examples; senders in `layers` layers are run."""
    config = model.config
    cache = capture(model, prompts.clean, {"attn_out": None, "z": prompts.position})
    delta_z = capture(model, prompts.corrupt, {"z": prompts.corrupt_position})["z"] - cache["z"]  # [L, B, N, H]
    scores = delta_z.new_zeros(config.num_hidden_layers, config.num_attention_heads, len(prompts.clean)).float()
    p_clean = _probability(model, prompts, cache["attn_out"], None, reads, via, frozen_pass)
    for layer in range(layers):
        weight = model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (config.num_attention_heads, -1))
        for head in range(config.num_attention_heads):
            if sends is not None and (layer, head) not in sends:
                scores[layer, head] = torch.nan
                continue
            delta = delta_z[layer, :, head] @ weight[:, head].T  # [B, D]
            p_patched = _probability(model, prompts, cache["attn_out"], (layer, delta), reads, via, frozen_pass)
            scores[layer, head] = (p_patched - p_clean) / p_clean
    return scores


def _probability(
    model: LlamaForCausalLM,
    prompts: Prompts,
    attn_out: Tensor,
    change: tuple[int, Tensor] | None,
    reads: dict[int, Tensor],
    via: str | None,
    frozen_pass: Callable,
) -> Tensor:
    """Probability of the label [B] when the attention output of a layer changes by [B, D] at the sender's position."""
    hidden, recorded = frozen_pass(model, prompts, attn_out, change, reads, via)
    if not reads:
        return unembed_probability(model, at(hidden, prompts.last), prompts.labels)
    edits = [(via, layer, replace(prompts.position, reads[layer], recorded[layer])) for layer in reads]
    with edited(model, edits):
        logits = last_logits(model, prompts.clean, prompts.last)
    return logits.softmax(-1).gather(-1, prompts.labels[:, None])[:, 0]


def _frozen_pass(
    model: LlamaForCausalLM,
    prompts: Prompts,
    attn_out: Tensor,
    change: tuple[int, Tensor] | None,
    reads: dict[int, Tensor],
    via: str | None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The residual stream [B, T, D] where the pass ends, and the receivers' inputs {layer: [B, n, H]}."""
    recorded: dict[int, Tensor] = {}
    rows = torch.arange(len(prompts.clean), device=model.device)
    hidden = model.model.embed_tokens(prompts.clean)
    for index, layer in enumerate(model.model.layers):
        if index in reads:
            normed = layer.input_layernorm(at(hidden, prompts.position))
            value = project(layer.self_attn, via, normed[:, None])[:, 0]
            recorded[index] = per_query_head(model, value)[:, reads[index]]
            if len(recorded) == len(reads):
                break
        hidden = hidden + attn_out[index]
        if change is not None and index == change[0]:
            hidden[rows, prompts.position] += change[1]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden, recorded


def _hooked_frozen_pass(
    model: LlamaForCausalLM,
    prompts: Prompts,
    attn_out: Tensor,
    change: tuple[int, Tensor] | None,
    reads: dict[int, Tensor],
    via: str | None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """As `_frozen_pass`, by hooks on a forward pass of the whole model."""
    rows = torch.arange(len(prompts.clean), device=model.device)
    seen: dict[str, Tensor] = {}
    recorded: dict[int, Tensor] = {}

    def freeze(index: int):
        def hook(module, args, output):
            frozen = attn_out[index]
            if change is not None and index == change[0]:
                frozen = frozen.index_put((rows, prompts.position), change[1], accumulate=True)
            return (frozen, *output[1:])

        return hook

    def record(index: int):
        def hook(module, args, output):
            value = at(output, prompts.position).reshape(len(rows), -1, model.model.layers[index].self_attn.head_dim)
            recorded[index] = per_query_head(model, value)[:, reads[index]]

        return hook

    def keep(module, args, output):
        seen["hidden"] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            stack.callback(layer.self_attn.register_forward_hook(freeze(index)).remove)
            if index in reads:
                stack.callback(maker(layer.self_attn, via).register_forward_hook(record(index)).remove)
        stack.callback(model.model.layers[-1].register_forward_hook(keep).remove)
        model.model(prompts.clean, use_cache=False)
    return seen["hidden"], recorded
