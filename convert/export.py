"""Flax parameters to a Hugging Face checkpoint directory that transformers loads: the inverse of `read_params`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.families import sources
from jaxmech.config import Config


def write_hf(path: Path, config: Config, params: Any, tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors and, if given, the tokenizer's files to the folder `path`.

    Args:
      params: {"params": tree}; written in the dtype they have.
      tokenizer: a Hugging Face tokenizer.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for keys, source in sources(params["params"]):
        value = params["params"]
        for key in keys:
            value = value[key]
        value = np.asarray(value)
        if "{layer}" in source.name:
            tensors |= {source.name.format(layer=i): source.to_theirs(config, x) for i, x in enumerate(value)}
        else:
            tensors[source.name] = source.to_theirs(config, value)
    temporary = path / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})  # transformers refuses files without a format
    os.replace(temporary, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def config_to_hf(config: Config) -> dict[str, Any]:
    """The fields of config.json (transformers 5 layout) that describe `config`."""
    scaling = {
        "default": {},
        "linear": {"factor": config.rope.factor},
        "llama3": {
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_max_positions,
        },
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {
            "rope_type": config.rope.kind,
            "rope_theta": config.rope.theta,
            **scaling[config.rope.kind],
        },
        "dtype": config.param_dtype,
    }
