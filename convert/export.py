"""Flax parameters to a Hugging Face checkpoint directory that transformers loads: the inverse of `read_params`."""

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from convert.families import source
from jaxmech.config import Config
from jaxmech.model import check_params


def write_hf(path: Path, config: Config, params: Any, tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors and, if given, the tokenizer's files to the folder `path`.

    Files of these names that are there already are replaced, as `save_pretrained` does.

    Args:
      params: {"params": tree}; written in the dtype they have.
      tokenizer: a Hugging Face tokenizer.

    Raises:
      ValueError: `params` are not those that `config` calls for.
    """
    check_params(config, params)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for keys, value in cast(dict[tuple[str, ...], Any], flatten_dict(params["params"])).items():
        target = source(keys)
        layers = np.asarray(value) if target.per_layer else np.asarray(value)[None]
        for name, layer in zip(target.names(config), layers, strict=True):
            tensors[name] = target.to_theirs(config, layer)
    temporary = path / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})  # transformers refuses files without a format
    os.replace(temporary, path / "model.safetensors")
    fields = config_to_hf(config)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
        fields |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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
