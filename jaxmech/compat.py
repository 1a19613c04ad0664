"""What the published code of Prakash et al. (2024) does where it deviates from what it means to compute.

Methods that offer `compat="paper"` use these. docs/paper_compat.md lists every deviation by its letter.
"""

import dataclasses

import numpy as np

from jaxmech.loading import Model
from jaxmech.pairs import Pairs


def check_compat(compat: str | None) -> bool:
    """Whether to do as the published code does. ValueError for anything but None and "paper"."""
    if compat not in (None, "paper"):
        raise ValueError(f"compat={compat!r}; expected None, or 'paper' for the defects of the published code.")
    return compat == "paper"


def last_column(pairs: Pairs) -> Pairs:
    """Takes the last column of padded prompts for their last token, and counts `query_box` from there (f)."""

    def moved(positions, tokens):
        end = np.full(len(tokens), tokens.shape[1] - 1)
        behind = {
            role: end - (positions["last"] - positions[role]) for role in ("last", "query_box") if role in positions
        }
        return {**positions, **behind}

    return dataclasses.replace(
        pairs,
        positions=moved(pairs.positions, pairs.clean),
        corrupt_positions={} if pairs.corrupt is None else moved(pairs.corrupt_positions, pairs.corrupt),
    )


def same_positions(pairs: Pairs, role: str) -> Pairs:
    """Reads `role` in corrupt prompts where the clean ones have it (e), or at their last token if that is before."""
    if role not in pairs.positions or pairs.corrupt is None:
        return pairs
    position = np.minimum(pairs.positions[role], pairs.corrupt_positions["last"])
    return dataclasses.replace(pairs, corrupt_positions={**pairs.corrupt_positions, role: position})


def base_output_projection(tuned: Model, base: Model) -> Model:
    """`tuned` with the output projections of `base` (a).

    The published code computes the output projection of every attention layer that it edits from the weight that PEFT
    keeps as the base's, so that a LoRA fine-tune loses what it changed there. Edited runs of such a model are those of
    the model returned here; clean runs are those of `tuned`.
    """
    blocks = {**tuned.weights["blocks"], "o": base.weights["blocks"]["o"]}
    return Model(tuned.config, {"params": {**tuned.weights, "blocks": blocks}}, tuned.tokenizer)
