"""Flax parameters to a Hugging Face checkpoint directory that transformers loads: the inverse of `read_params`."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from convert.families import TABLES, source
from convert.hf_config import FAMILIES, config_from_hf
from convert.hf_rope import LAYER_TYPES, rope_parameters
from jaxmech.config import Config, Rope
from jaxmech.files import replacing, write_text
from jaxmech.model import check_params

_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def write_hf(path: Path, config: Config, params: Any, tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors and, if given, the tokenizer's files to the folder `path`.

    Files of these names that are there already are replaced, as `save_pretrained` does.

    Args:
      params: {"params": tree}; written in the dtype they have.
      tokenizer: a Hugging Face tokenizer.

    Raises:
      ValueError: `params` are not those that `config` calls for, or no checkpoint of its family can say what it
        computes, or none that transformers loads.
    """
    check_params(config, params)
    fields = config_to_hf(config)
    _check_transformers(fields)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(config, params)
    with replacing(path / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})  # transformers refuses files without a format
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
    """The fields of config.json (transformers 5 layout) that describe `config`; ValueError if none can."""
    fields = _fields(config)
    meant, said = _meaning(config), _meaning(config_from_hf(fields))
    if lost := [name for name in meant if not _alike(meant[name], said[name])]:
        raise ValueError(
            f"A checkpoint of family {config.family!r} cannot say {lost[0]}={meant[lost[0]]!r}, but "
            f"{said[lost[0]]!r}; expected a config of that family, such as `convert.read_config` reads."
        )
    return fields


def _check_transformers(fields: dict[str, Any]) -> None:
    """ValueError if transformers refuses a config.json of these fields."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**copy.deepcopy(fields))
    except Exception as error:  # it raises errors of many kinds
        raise ValueError(f"transformers refuses the config of this model: {str(error)[:300]}") from error


def _meaning(config: Config) -> dict[str, Any]:
    """What decides what a model computes, but for dtypes."""
    layers = range(config.num_layers)
    unsaid = {"rope", "other_rope", "other_rope_layers", "window", "full_layers", "param_dtype", "dtype", "precision"}
    said = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.compare and f.name not in unsaid}
    ropes = [config.rope_of(i) for i in layers]
    windows = [0 if i in config.full_layers else config.window for i in layers]
    scale = config.score_scale or config.head_dim**-0.5
    return said | {
        "score_scale": scale,
        "windows": windows,
        "RoPE of the layers": [_turning(rope) for rope in ropes],
    }


def _turning(rope: Rope) -> dict[str, Any]:
    """What decides how a layer rotates."""
    if rope.kind == "none":
        return {}
    scaled = {} if rope.kind in ("default", "linear") else {"original_max_positions": rope.original_max_positions}
    return rope_parameters(rope) | scaled


def _alike(x: Any, y: Any) -> bool:
    return math.isclose(x, y, rel_tol=1e-9) if isinstance(x, float) and isinstance(y, float) else x == y


def _fields(config: Config) -> dict[str, Any]:
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
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope_parameters(config.rope),
        "dtype": config.param_dtype,
    }
    return common | _family_fields(config)


def _family_fields(config: Config) -> dict[str, Any]:
    """What config.json has in some families only."""
    window = config.window or None
    full, sliding = LAYER_TYPES
    types = [full if i in config.full_layers or not window else sliding for i in range(config.num_layers)]
    windows = {"sliding_window": window, "layer_types": types}
    always_one = {"sliding_window": window or config.max_positions}  # where null is refused; no layer may have it
    match config.family:
        case "mistral":
            return {"sliding_window": window}
        case "qwen2" | "qwen3":
            return windows | {"use_sliding_window": bool(window)}
        case "gemma2":
            return windows | always_one | _gemma_fields(config)
        case "gemma3_text":
            return windows | always_one | _gemma_fields(config) | {"rope_parameters": _by_layer_type(config)}
        case "olmo3":
            return windows | always_one | {"rope_parameters": _by_layer_type(config)}
        case "smollm3":
            rotated = [int(config.rope_of(i).kind != "none") for i in range(config.num_layers)]
            return windows | {"use_sliding_window": bool(window), "no_rope_layers": rotated}
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


def _gemma_fields(config: Config) -> dict[str, Any]:
    return {
        "hidden_activation": _HF_ACTIVATIONS[config.activation],
        "query_pre_attn_scalar": _whole(config.score_scale**-2) if config.score_scale else config.head_dim,
        "attn_logit_softcapping": config.score_cap or None,
        "final_logit_softcapping": config.logit_cap or None,
    }


def _by_layer_type(config: Config) -> dict[str, Any]:
    """RoPE of the layers without and with a window."""
    ropes = config.rope, config.other_rope or config.rope
    return {name: rope_parameters(rope) for name, rope in zip(LAYER_TYPES, ropes, strict=True)}


def _whole(number: float) -> float | int:
    """A number that the inverse of a power has made almost whole, whole again."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
