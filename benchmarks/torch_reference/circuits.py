"""Circuit evaluation by mean ablation (Prakash et al. 2024, arXiv:2402.14811): what a circuit does alone."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .hooks import Edit, by_layer, capture, edited, indices, last_logits

Head = tuple[int, int]


@torch.inference_mode()
def mean_activations(model: LlamaForCausalLM, tokens, *, chunk: int | None = None) -> Tensor:
    """z of every head averaged over prompts, position by position: float32 [T, L, N, H].

    Args:
      tokens: int [B, T], prompts of equal length; padding would be averaged like any token.
      chunk: prompts in one forward pass; all at once by default.
    """
    tokens = indices(model, tokens)
    sums = [capture(model, part, {"z": None})["z"].float().sum(1) for part in tokens.split(chunk or len(tokens))]
    return (sum(sums) / len(tokens)).transpose(0, 1)


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM,
    tokens,
    positions: Mapping[str, Tensor],
    heads_by_role: Mapping[str, Iterable[Head]],
    means: Tensor,
    *,
    ablate_elsewhere: bool = True,
) -> Tensor:
    """Logits when only a circuit's heads, each at its role, are left and every other z is its mean.

    Args:
      tokens: int [B, T], right-padded.
      positions: role -> int [B]; "last" and the roles of `heads_by_role`.
      heads_by_role: the circuit; its roles, also those with no heads, are the vital positions.
      means: float [T or more, L, N, H], see `mean_activations`.
      ablate_elsewhere: ablate all heads at the other positions; False leaves these as they are.

    Returns:
      float32 [B, V], at `last`.
    """
    tokens = indices(model, tokens)
    keep = _kept(model, tokens, positions, heads_by_role, ablate_elsewhere)
    means = means[: tokens.shape[1]].to(model.device, model.dtype)
    with edited(model, [("z", layer, _ablate(keep[layer], means[:, layer])) for layer in range(len(keep))]):
        return last_logits(model, tokens, indices(model, positions["last"]))


def _kept(model, tokens: Tensor, positions, heads_by_role, ablate_elsewhere: bool) -> Tensor:
    """bool [L, B, T, N], True where z is left alone."""
    config, rows = model.config, torch.arange(len(tokens), device=model.device)
    shape = (config.num_hidden_layers, *tokens.shape, config.num_attention_heads)
    keep = torch.full(shape, not ablate_elsewhere, device=model.device)
    for role in heads_by_role:
        keep[:, rows, indices(model, positions[role])] = False
    for role, heads in heads_by_role.items():  # after the loop above: two roles may be one token
        for layer, chosen in by_layer(model, heads).items():
            keep[layer, rows[:, None], indices(model, positions[role])[:, None], chosen] = True
    return keep


def _ablate(keep: Tensor, means: Tensor) -> Edit:
    return lambda z: torch.where(keep[..., None], z, means)
