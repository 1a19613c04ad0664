"""Path patching through TransformerLens: forward hooks on a TransformerBridge around the Hugging Face model.

Raw weights: no layer norm is folded, nothing is centered. Attention is held at its clean value by `hook_z`, so each
frozen pass computes attention and throws it away: a hook can replace a module's output but not skip the module. The
bridge computes attention and RMS norms itself, step by step, whatever attention kernel the model was loaded with.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.utilities import get_act_name
from transformers import LlamaForCausalLM

from ..torch_reference.hooks import at
from ..torch_reference.path_patching import Head, Prompts
from . import Run, shell, sweep


def load(model: LlamaForCausalLM) -> TransformerBridge:
    """A bridge on the weights of `model`.

    Not by `TransformerBridge.boot_transformers`, which asks the hub for a tokenizer even when it is given the model.
    """
    return build_bridge_from_module(shell(model), type(model).__name__, hf_config=model.config).eval()


@torch.inference_mode()
def path_patch(
    bridge: TransformerBridge,
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
    return sweep(bridge.original_model, lambda *part: _prepare(bridge, *part), inputs, receivers, via, senders, chunk)


def _prepare(bridge: TransformerBridge, prompts: Prompts, reads: dict[int, Tensor]) -> Run:
    """Caches z of the clean and corrupt prompts and returns the passes that patch it."""
    names = [get_act_name("z", layer) for layer in range(bridge.cfg.n_layers)]
    _, clean = bridge.run_with_cache(prompts.clean, names_filter=names, use_cache=False)
    _, corrupt = bridge.run_with_cache(prompts.corrupt, names_filter=names, use_cache=False)
    clean_z = [clean[name] for name in names]  # each [B, T, N, H]
    corrupt_z = [at(corrupt[name], prompts.corrupt_position) for name in names]  # each [B, N, H]
    del clean, corrupt
    rows = torch.arange(len(prompts.clean), device=prompts.clean.device)
    keep_last = ("ln_final.hook_in", lambda x, hook: at(x, prompts.last)[:, None])

    def freeze(layer: int, sender: Head | None):
        value = clean_z[layer]
        if sender is not None and layer == sender[0]:
            value = value.clone()
            value[rows, prompts.position, sender[1]] = corrupt_z[layer][:, sender[1]]
        return get_act_name("z", layer), lambda z, hook: value

    def replace(layer: int, value: Tensor):
        def patch(q: Tensor, hook) -> Tensor:
            q[rows[:, None], prompts.position[:, None], reads[layer]] = value
            return q

        return get_act_name("q", layer), patch

    def run(sender: Head | None) -> Tensor:
        frozen = [freeze(layer, sender) for layer in range(bridge.cfg.n_layers)]
        if not reads:
            return bridge.run_with_hooks(prompts.clean, fwd_hooks=[*frozen, keep_last], use_cache=False)[:, 0]
        queries = [get_act_name("q", layer) for layer in reads]
        with bridge.hooks(fwd_hooks=frozen):
            _, cache = bridge.run_with_cache(
                prompts.clean, names_filter=queries, stop_at_layer=max(reads) + 1, use_cache=False
            )
        patches = [replace(layer, at(cache["q", layer], prompts.position)[:, reads[layer]]) for layer in reads]
        return bridge.run_with_hooks(prompts.clean, fwd_hooks=[*patches, keep_last], use_cache=False)[:, 0]

    return run
