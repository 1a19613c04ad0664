"""Desiderata-based component masking (Davies et al. 2023, arXiv:2307.03637): one training step of a mask over heads."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .hooks import Edit, at, by_layer, capture, edited, indices, last_logits

Head = tuple[int, int]


def new_mask(model: LlamaForCausalLM, heads: Sequence[Head]) -> Tensor:
    """A mask that patches nothing yet: ones, float32 [n_heads], a leaf that takes gradients."""
    return torch.ones(len(heads), device=model.device, requires_grad=True)


def step(
    model: LlamaForCausalLM,
    base,
    counterfactual,
    targets,
    position,
    counterfactual_position,
    last,
    heads: Sequence[Head],
    mask: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    lam: float = 0.01,
) -> float:
    """One step: z <- m z_base + (1 - m) z_counterfactual; loss = -mean target logit + lam sum(1 - m); clip m to [0, 1].

    Args:
      base: int [B, T], right-padded prompts that are patched.
      counterfactual: int [B, T'], right-padded prompts that z is taken from.
      targets: int [B], the token that the desideratum predicts for the patched prompt.
      position: int [B], where the heads are patched in `base`.
      counterfactual_position: int [B], where their z is taken.
      last: int [B], the last token of each base prompt.
      heads: distinct (layer, head) pairs, as many as the mask has entries.
      mask: float32 [n_heads], updated in place; see `new_mask`.
      optimizer: over [mask]; the paper's is torch.optim.Adam([mask], lr=0.1).
      lam: weight of the number of patched heads.

    Returns:
      The loss before the update.

    Raises:
      ValueError: the model's parameters take gradients, which costs memory and time (call model.requires_grad_(False));
        or `heads` repeats one or is not as long as the mask.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model's parameters require gradients; call model.requires_grad_(False) first.")
    if not len(mask) == len(heads) == len({tuple(head) for head in heads}):
        raise ValueError(f"mask has {len(mask)} entries for {len(heads)} heads; expected one for each, none repeated.")
    position, counterfactual_position = indices(model, position), indices(model, counterfactual_position)
    with torch.no_grad():  # not inference_mode: the gradient needs these values
        values = capture(model, indices(model, counterfactual), {"z": counterfactual_position})["z"]
    optimizer.zero_grad()
    with edited(model, _mix(model, heads, mask, position, values)):
        logits = last_logits(model, indices(model, base), indices(model, last))
    loss = -at(logits, indices(model, targets)).mean() + lam * (1 - mask).sum()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        mask.clamp_(0, 1)
    return loss.item()


def _mix(model, heads: Sequence[Head], mask: Tensor, position: Tensor, values: Tensor) -> list[tuple[str, int, Edit]]:
    """Edits of z at `position` [B] with the counterfactual values [L, B, N, H]."""
    rows = torch.arange(len(position), device=model.device)[:, None]
    number = {tuple(head): i for i, head in enumerate(heads)}

    def edit(layer: int, chosen: Tensor) -> Edit:
        entries = indices(model, [number[layer, head] for head in chosen.tolist()])

        def mix(z: Tensor) -> Tensor:
            m = mask[entries][:, None].to(z.dtype)
            where = (rows, position[:, None], chosen)
            return z.index_put(where, m * z[where] + (1 - m) * values[layer][:, chosen])

        return mix

    return [("z", layer, edit(layer, chosen)) for layer, chosen in by_layer(model, heads).items()]
