"""Path patching through other interpretability libraries, as an ordinary careful user of each would write it.

Two of the sweeps of `benchmarks.torch_reference.path_patching`, by its definition and with its result: senders to the
logits, and senders to receivers' q. Each peer's module owns how its library runs one sender's passes; the checks, the
chunks and the loop over senders are here, the same for all.

  transformer_lens_sweep.py   TransformerLens, hooks on a TransformerBridge
  nnsight_sweep.py            nnsight, interventions in `trace` blocks

Both have `load(hf_model)`, which wraps a Hugging Face model, leaving it as it is and sharing its weights, and
`path_patch`, which takes what `load` returns. They are batched over examples, run in inference mode, and let the norm
and the unembedding see one token per prompt, like the reference. Prompts are right-padded, without an attention mask.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ..torch_reference.hooks import by_layer, indices
from ..torch_reference.path_patching import Head, Prompts, check_receivers

Run = Callable[[Head | None], Tensor]


def shell(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Modules of its own on the same weights, for libraries that replace or wrap the modules they are given."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def sweep(
    model: LlamaForCausalLM,
    prepare: Callable[[Prompts, dict[int, Tensor]], Run],
    inputs: Iterable,
    receivers: Iterable[Head] | None,
    via: str | None,
    senders: Iterable[Head] | None,
    chunk: int | None,
) -> Tensor:
    """Scores heads as senders; arguments and result as for `torch_reference.path_patching.path_patch`.

    Args:
      model: the Hugging Face model that the peer wraps, for its config and device.
      prepare: takes one chunk of prompts and the receivers {layer: heads}, runs what is shared by all senders, and
        returns the peer's passes: a sender, or None for no sender, -> the logits [B, V] at the last token.
      inputs: clean, corrupt, labels, position, corrupt_position and last.

    Raises:
      ValueError: as the reference, and for `via` "k" or "v".
    """
    prompts = Prompts(*(indices(model, x) for x in inputs))
    if via not in (None, "q"):
        raise ValueError(f"via={via!r}; the sweeps through peers go to the logits (None) or through 'q'.")
    reads = check_receivers(model, prompts, receivers, via)
    sends = None if senders is None else {(layer, int(h)) for layer, hs in by_layer(model, senders).items() for h in hs}
    parts = [Prompts(*part) for part in zip(*(x.split(chunk or len(prompts.clean)) for x in prompts), strict=True)]
    return torch.cat([_scores(model, prepare(part, reads), part.labels, reads, sends) for part in parts], dim=-1)


def _scores(
    model: LlamaForCausalLM, run: Run, labels: Tensor, reads: dict[int, Tensor], sends: set[Head] | None
) -> Tensor:
    """Scores [L, N, B] of one chunk of examples."""

    def probability(sender: Head | None) -> Tensor:
        return run(sender).float().softmax(-1).gather(-1, labels[:, None])[:, 0]

    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    scores = torch.zeros(layers, heads, len(labels), device=labels.device)
    p_clean = probability(None)
    for layer in range(max(reads, default=layers)):
        for head in range(heads):
            if sends is None or (layer, head) in sends:
                scores[layer, head] = (probability((layer, head)) - p_clean) / p_clean
            else:
                scores[layer, head] = torch.nan
    return scores
