"""Hugging Face's config.json to `jaxmech.config.Config`.

Reads the layout of transformers 5 (`rope_parameters`, `dtype`) and the older ones (`rope_theta` + `rope_scaling`,
`torch_dtype`). Every field of the file is read, known to have no effect on inference, or refused by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmech.config import Config, Rope

ARCHITECTURES = {"llama": ("LlamaForCausalLM", "LLaMAForCausalLM")}  # model_type: names in use, ours first

# Fields without effect on a forward pass: bookkeeping, token ids, training and generation settings.
IGNORED = frozenset(
    """architectures attention_dropout auto_map bos_token_id eos_token_id pad_token_id sep_token_id
    chunk_size_feed_forward dtype finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id
    max_sequence_length model_type output_attentions output_hidden_states output_scores prefix pretraining_tp
    problem_type return_dict task_specific_params tokenizer_class torch_dtype torchscript transformers_version
    unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
READ = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    rms_norm_eps max_position_embeddings attention_bias mlp_bias tie_word_embeddings hidden_act rope_parameters
    rope_theta rope_scaling partial_rotary_factor""".split()
)
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(path: Path, **changes: Any) -> Config:
    """The `Config` of the checkpoint directory `path`; `changes` set fields such as dtype.

    Raises:
      FileNotFoundError: no such directory, or no config.json in it.
      ValueError: config.json is not JSON or describes a model that is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"No checkpoint directory at {path}. Give a local directory that holds config.json and *.safetensors."
        )
    file = path / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise FileNotFoundError(f"{path} holds no config.json (found: {found}); is it a Hugging Face checkpoint?")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy or download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds {type(fields).__name__} {fields!r}; expected a JSON object.")
    try:
        config = config_from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config.replace(**changes)


def config_from_hf(fields: Mapping[str, Any]) -> Config:
    """A `Config` from the fields of config.json. ValueError names whatever is unknown or unsupported."""
    _check_architecture(fields)
    unknown = sorted(name for name in fields if name not in READ | IGNORED and not name.startswith("_"))
    if unknown:
        raise ValueError(
            f"unknown fields {', '.join(f'{name}={fields[name]!r}' for name in unknown)}. They might change what the "
            "model computes, so they are refused; remove those that do not."
        )
    if (activation := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported; choose a checkpoint with 'silu'.")
    heads = _size(fields, "num_attention_heads")
    width = _size(fields, "hidden_size")
    if fields.get("head_dim") is None and width % heads:
        raise ValueError(
            f"hidden_size={width} is not a multiple of num_attention_heads={heads} and head_dim is absent. Add the "
            "head_dim that the model was trained with."
        )
    return Config(
        vocab_size=_size(fields, "vocab_size"),
        width=width,
        num_layers=_size(fields, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(fields, "num_key_value_heads", default=heads),
        head_dim=_size(fields, "head_dim", default=width // heads),
        mlp_width=_size(fields, "intermediate_size"),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        max_positions=fields.get("max_position_embeddings", 2048),
        rope=_rope(fields),
        attention_bias=bool(fields.get("attention_bias", False)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _check_architecture(fields: Mapping[str, Any]) -> None:
    model_type = fields.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; choose a checkpoint of type {', '.join(ARCHITECTURES)}."
        )
    names = ARCHITECTURES[model_type]
    for name in fields.get("architectures") or names[:1]:
        if name not in names:
            raise ValueError(f"architecture {name!r} is not supported; choose a checkpoint of {names[0]!r}.")


def _size(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """The positive integer at `name`, or the default if it is absent or null."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise ValueError(f"field {name!r} is missing and has no safe default; copy the model's original config.json.")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; expected a positive integer.")
    return value


def _rope(fields: Mapping[str, Any]) -> Rope:
    """Either layout: `rope_parameters` {rope_theta, rope_type, ...}, or `rope_theta` beside `rope_scaling`.

    Where both are given, `rope_scaling` wins (HF `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).
    """
    parameters = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", None) or parameters.get("type", "default")
    parameters.pop("type", None)  # the name of the field before transformers 4.43
    fraction = parameters.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise ValueError(f"partial_rotary_factor={fraction} is not supported; expected 1.0.")
    if kind not in ROPE_FIELDS:
        raise ValueError(
            f"rope_type={kind!r} is not supported; choose a checkpoint with one of {', '.join(ROPE_FIELDS)}."
        )
    needed = ROPE_FIELDS[kind]
    if missing := [name for name in needed if name not in parameters]:
        raise ValueError(f"rope_type={kind!r} lacks {', '.join(missing)}; copy the model's original config.json.")
    if unknown := sorted(set(parameters) - set(needed)):
        raise ValueError(
            f"rope_type={kind!r} has unknown fields {', '.join(unknown)}; remove those that change nothing."
        )
    names = {"original_max_position_embeddings": "original_max_positions"}
    return Rope(theta=theta, kind=kind, **{names.get(name, name): parameters[name] for name in needed})
