"""Flax parameters to a Hugging Face checkpoint directory that transformers loads: the inverse of `read_params`."""

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from convert.families import TABLES, source
from convert.hf_config import FAMILIES, LAYER_TYPES
from jaxmech.config import Config
from jaxmech.files import replacing, write_text
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
    tensors = hf_tensors(config, params)
    with replacing(path / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})  # transformers refuses files without a format
    fields = config_to_hf(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # transformers' own defaults may not be in V
        fields[name] = None if tokenizer is None else getattr(tokenizer, name)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    write_text(path / "config.json", json.dumps(fields, indent=2) + "\n")


def hf_tensors(config: Config, params: Any) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint, in the dtype that `params` have."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for keys, value in cast(dict[tuple[str, ...], Any], flatten_dict(params["params"])).items():
        target = source(keys, TABLES[config.family])
        layers = np.asarray(value) if target.per_layer else np.asarray(value)[None]
        for name, layer in zip(target.names(config), layers, strict=True):
            parts.setdefault(name, {})[target.part] = target.to_theirs(config, layer)
    whole = {
        name: np.concatenate([some[i] for i in sorted(some)]) if len(some) > 1 else some[0]
        for name, some in parts.items()
    }
    return {name: np.ascontiguousarray(x) for name, x in whole.items()}  # safetensors writes what lies in memory


def config_to_hf(config: Config) -> dict[str, Any]:
    """The fields of config.json (transformers 5 layout) that describe `config`."""
    common = {
        "architectures": [FAMILIES[config.family].architectures[0]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _rope_parameters(config),
        "dtype": config.param_dtype,
    }
    return common | _family_fields(config)


def _family_fields(config: Config) -> dict[str, Any]:
    """What config.json has in some families only."""
    window = config.window or None
    full, sliding = LAYER_TYPES
    types = [full if i in config.full_layers or not window else sliding for i in range(config.num_layers)]
    match config.family:
        case "mistral":
            return {"sliding_window": window}
        case "qwen2" | "qwen3":
            return {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": types}
        case "gemma2":
            return {
                "hidden_activation": "gelu_pytorch_tanh",
                "sliding_window": window,
                "layer_types": types,
                "query_pre_attn_scalar": _whole(config.score_scale**-2),
                "attn_logit_softcapping": config.score_cap or None,
                "final_logit_softcapping": config.logit_cap or None,
            }
        case "phi3":
            original = config.rope.original_max_positions if config.rope.kind == "longrope" else config.max_positions
            return {"sliding_window": window, "original_max_position_embeddings": original}
        case "granite":
            return {
                "embedding_multiplier": config.embed_scale,
                "residual_multiplier": config.residual_scale,
                "attention_multiplier": config.score_scale,
                "logits_scaling": config.logit_divisor,
            }
    return {}


def _rope_parameters(config: Config) -> dict[str, Any]:
    rope = config.rope
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.fraction != 1:
        parameters["partial_rotary_factor"] = rope.fraction
    if rope.kind in ("linear", "dynamic", "llama3", "yarn"):
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        parameters |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind in ("yarn", "longrope"):
        parameters["attention_factor"] = rope.attention_factor
    return parameters


def _whole(number: float) -> float | int:
    """A number that the inverse of a power has made almost whole, whole again."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
