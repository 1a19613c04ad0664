"""Cross-model activation patching (CMAP; Prakash et al. 2024): the tuned model's heads at work in the base model."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .hooks import by_layer, capture, edited, indices, last_logits, per_query_head, replace

Head = tuple[int, int]


@torch.inference_mode()
def cmap(
    base: LlamaForCausalLM,
    tuned: LlamaForCausalLM,
    tokens,
    positions: Mapping[str, Tensor],
    heads_by_role: Mapping[str, Iterable[Head]],
    components: Sequence[str] = ("z",),
) -> Tensor:
    """Logits of `base` when heads' activations are those that `tuned` has on the same prompts.

    Args:
      tokens: int [B, T], right-padded.
      positions: role -> int [B]; "last" and the roles of `heads_by_role`.
      heads_by_role: the heads patched at each role.
      components: sites to patch, of "z", "q", "k" and "v"; q and k before RoPE, k and v for the named query heads
        alone (see `hooks.edited`).

    Returns:
      float32 [B, V], at `last`.
    """
    tokens = indices(base, tokens)
    edits = []
    for role, heads in heads_by_role.items():
        position = indices(base, positions[role])
        values = capture(tuned, tokens, dict.fromkeys(components, position))  # site -> [L, B, N or K, H]
        for layer, chosen in by_layer(base, heads).items():
            for site in components:
                value = per_query_head(tuned, values[site][layer])[:, chosen]
                edits.append((site, layer, replace(position, chosen, value)))
    with edited(base, edits):
        return last_logits(base, tokens, indices(base, positions["last"]))
