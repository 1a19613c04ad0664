"""A model of ours as Hugging Face's, on the device that JAX uses, without a detour over the disk or the host."""

from typing import Any, cast

import jax
import torch
from flax.traverse_util import flatten_dict
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import jaxmech as jm
from convert.export import config_to_hf
from convert.families import TABLES, source


def in_torch(model: jm.Model) -> Any:
    """`LlamaForCausalLM` with copies of the weights of `model`, in eval mode, with SDPA and without gradients."""
    fields = {name: value for name, value in config_to_hf(model.config).items() if name != "dtype"}
    config = LlamaConfig(**fields, attn_implementation="sdpa", dtype=getattr(torch, model.config.dtype))
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(state(model), strict=not model.config.tie_embeddings, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config).to(theirs.device)  # its buffers are not parameters
    return theirs.eval().requires_grad_(False)


def state(model: jm.Model) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors, one layer at a time from the stacked parameters."""
    tensors: dict[str, torch.Tensor] = {}
    for keys, value in cast(dict[tuple[str, ...], jax.Array], flatten_dict(model.weights)).items():
        target = source(keys, TABLES[model.config.family])
        for i, name in enumerate(target.names(model.config)):
            layer = target.to_theirs(model.config, value[i] if target.per_layer else value)
            tensors[name] = torch.from_dlpack(jax.block_until_ready(layer)).clone()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # before JAX has the memory of `layer` for something else
    return tensors
