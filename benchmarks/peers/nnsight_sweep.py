"""Path patching through nnsight: interventions written inside `trace` blocks around the Hugging Face model.

Every module keeps Hugging Face's own forward pass and attention kernel. The frozen pass skips the attention modules and
stops at the last receiver.
"""

from collections.abc import Iterable

import torch
from nnsight import NNsight, save
from torch import Tensor
from transformers import LlamaForCausalLM

from ..torch_reference.hooks import at
from ..torch_reference.path_patching import Head, Prompts
from . import Run, shell, sweep


def load(model: LlamaForCausalLM) -> NNsight:
    """The weights of `model`, in modules that can be traced."""
    return NNsight(shell(model))


@torch.inference_mode()
def path_patch(
    model: NNsight,
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
) -> Tensor:
    """Scores [L, N, B] of `torch_reference.path_patching.path_patch`; `via` is None or "q"."""
    inputs = (clean, corrupt, labels, position, corrupt_position, last)
    return sweep(model, lambda *part: _prepare(model, *part), inputs, receivers, via, senders, chunk)


def _prepare(model: NNsight, prompts: Prompts, reads: dict[int, Tensor]) -> Run:
    """Saves attention outputs and z of the clean prompts and z of the corrupt ones; returns the passes that patch."""
    heads = model.config.num_attention_heads
    rows = torch.arange(len(prompts.clean), device=prompts.clean.device)
    attn_out, clean_z, corrupt_z = [], [], []  # per layer: [B, T, D], [B, N, H], [B, N, H]
    with model.trace(prompts.clean, use_cache=False) as tracer:
        for layer in model.model.layers:
            clean_z.append(at(layer.self_attn.o_proj.input, prompts.position).unflatten(-1, (heads, -1)))
            attn_out.append(layer.self_attn.output[0])
        tracer.stop()
    with model.trace(prompts.corrupt, use_cache=False) as tracer:
        for layer in model.model.layers:
            corrupt_z.append(at(layer.self_attn.o_proj.input, prompts.corrupt_position).unflatten(-1, (heads, -1)))
        tracer.stop()

    def patched(layer: int, head: int) -> Tensor:
        """The attention output [B, T, D] of the sender's layer."""
        weight = model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (heads, -1))[:, head]  # [D, H]
        value = attn_out[layer].clone()
        value[rows, prompts.position] += (corrupt_z[layer][:, head] - clean_z[layer][:, head]) @ weight.T
        return value

    def frozen_to_logits(frozen: list[Tensor]) -> Tensor:
        with model.trace(prompts.clean, use_cache=False):
            for layer, value in zip(model.model.layers, frozen, strict=True):
                layer.self_attn.skip((value, None))
            model.model.norm.input = at(model.model.norm.input, prompts.last)[:, None]
            logits = save(model.lm_head.output[:, 0])
        return logits

    def frozen_to_queries(frozen: list[Tensor]) -> dict[int, Tensor]:
        recorded = {}
        with model.trace(prompts.clean, use_cache=False) as tracer:
            for index, layer in enumerate(model.model.layers):
                if index in reads:
                    normed = at(layer.input_layernorm.output, prompts.position)
                    q = layer.self_attn.q_proj(normed).unflatten(-1, (heads, -1))
                    recorded[index] = q[:, reads[index]]
                if index == max(reads):
                    tracer.stop()
                layer.self_attn.skip((frozen[index], None))
        return recorded

    def live(recorded: dict[int, Tensor]) -> Tensor:
        with model.trace(prompts.clean, use_cache=False):
            for index in reads:
                q = model.model.layers[index].self_attn.q_proj.output.unflatten(-1, (heads, -1))
                q[rows[:, None], prompts.position[:, None], reads[index]] = recorded[index]
            model.model.norm.input = at(model.model.norm.input, prompts.last)[:, None]
            logits = save(model.lm_head.output[:, 0])
        return logits

    def run(sender: Head | None) -> Tensor:
        frozen = list(attn_out)
        if sender is not None:
            frozen[sender[0]] = patched(*sender)
        return live(frozen_to_queries(frozen)) if reads else frozen_to_logits(frozen)

    return run
