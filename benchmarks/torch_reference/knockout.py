"""Attention knockout (Geva et al. 2023, arXiv:2304.14767): a role may not attend to another, from a layer upwards."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .hooks import edited, indices, last_logits


@torch.inference_mode()
def knockout(
    model: LlamaForCausalLM, tokens, labels, source, target, last, starts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Accuracy when queries at `source` may not attend to keys at `target`, for every first layer.

    One forward pass for each l: layers below l run as ever, layers >= l get a 4D additive mask. A query that is left
    with no key attends to nothing: its z is zero.

    Args:
      tokens: int [B, T], right-padded.
      labels: int [B], the correct next token.
      source: int [B], position of the query.
      target: int [B], position of the key.
      last: int [B], the last token of each prompt.
      starts: first layers, for timing a sample of a large model; all L by default.

    Returns:
      accuracy float32 [L] and logits float32 [L, B, V] at `last`; entry l forbids attention in layers >= l (or >=
      starts[l]).
    """
    tokens, labels, last = (indices(model, x) for x in (tokens, labels, last))
    allowed = _allowed(tokens, indices(model, source), indices(model, target))
    starts = range(model.config.num_hidden_layers) if starts is None else starts
    logits = torch.stack([_logits(model, tokens, last, allowed, start) for start in starts])
    return (logits.argmax(-1) == labels).float().mean(-1), logits


def _allowed(tokens: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """bool [B, T, T], query by key: causal, and `source` does not see `target`."""
    batch, length = tokens.shape
    allowed = torch.ones(batch, length, length, dtype=torch.bool, device=tokens.device).tril()
    allowed[torch.arange(batch, device=tokens.device), source, target] = False
    return allowed


def _logits(model: LlamaForCausalLM, tokens: Tensor, last: Tensor, allowed: Tensor, start: int) -> Tensor:
    """Logits [B, V] at `last` when layers >= start attend only where allowed."""
    mask = torch.zeros_like(allowed, dtype=model.dtype)
    mask = mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]  # [B, 1, T, T]; -inf could become NaN
    no_key = ~allowed.any(-1)[..., None, None]  # [B, T, 1, 1]

    def use_mask(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask}

    with ExitStack() as stack:
        if no_key.any():
            layers = range(start, model.config.num_hidden_layers)
            stack.enter_context(edited(model, [("z", layer, lambda z: z.masked_fill(no_key, 0)) for layer in layers]))
        for layer in model.model.layers[start:]:
            stack.callback(layer.self_attn.register_forward_pre_hook(use_mask, with_kwargs=True).remove)
        return last_logits(model, tokens, last)
