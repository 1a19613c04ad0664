"""Hugging Face's config.json to `jaxmech.config.Config`.

Reads the layout of transformers 5 (`dtype`) and the older ones (`torch_dtype`); `convert.hf_rope` reads what concerns
the rotary embedding. Every field of the file is read, known to have no effect on inference, or refused by name.

What a family computes is said once, here, in the fields of `Config`; where its tensors are, in `convert.families`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert import meta
from convert.adapters import Adapter, is_adapter
from convert.hf_rope import LAYER_TYPES, read_rope, read_ropes_by_layer_type
from convert.json_files import Fields, positive_integer, positive_number, read_fields, refuse_unknown
from convert.multimodal import MULTIMODAL, text_fields
from jaxmech.config import Config, Rope

# Fields without effect on a forward pass: bookkeeping, token ids, training and generation settings.
IGNORED = frozenset(
    """architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder is_llama_config
    label2id length_penalty max_length max_sequence_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
READ = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    rms_norm_eps max_position_embeddings original_max_position_embeddings attention_bias mlp_bias tie_word_embeddings
    hidden_act rope_parameters rope_theta rope_scaling partial_rotary_factor""".split()
)
# Fields that would change the mathematics, in any family, if they were not as here.
UNUSED = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "full_attn_mod": 1,  # this and the next two are in Phi-4-mini's config.json
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "pruned_heads": {},
    "quantization_config": None,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}
IsFull = Callable[[int, int], bool]
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What config.json of one model_type says otherwise than Llama's.

    Attributes:
      architectures: names in use, ours first.
      settings: from its fields to fields of `Config`.
      fields: names that it has beside Llama's.
      defaults: values that transformers takes for fields that are not there, where not Llama's.
    """

    architectures: tuple[str, ...]
    settings: Callable[[Fields], dict[str, Any]]
    fields: tuple[str, ...] = ()
    defaults: Fields = field(default_factory=dict)


def _llama(fields: Fields) -> dict[str, Any]:
    bias = bool(fields.get("attention_bias"))
    return {"attention_bias": bias, "output_bias": bias, "mlp_bias": bool(fields.get("mlp_bias"))}


def _window(fields: Fields) -> dict[str, Any]:
    return {"window": fields.get("sliding_window") or 0}


def _qwen2(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": True, **_windows(fields, fields.get("use_sliding_window"), lambda i, first: i < first)}


def _qwen3(fields: Fields) -> dict[str, Any]:
    windows = _windows(fields, fields.get("use_sliding_window"), lambda i, first: i < first)
    return {"qk_norm": "head", **_biases(fields), **windows}


def _gemma(fields: Fields) -> dict[str, Any]:
    return {"norm_style": "gemma", "embed_scale": fields["hidden_size"] ** 0.5, **_biases(fields)}


def _gemma2(fields: Fields, is_full: IsFull = lambda i, _: i % 2 == 1) -> dict[str, Any]:
    return {
        **_gemma(fields),
        **_windows(fields, True, is_full),
        "post_norm": True,
        "score_scale": positive_number(fields, "query_pre_attn_scalar") ** -0.5,
        "score_cap": fields.get("attn_logit_softcapping") or 0.0,
        "logit_cap": fields.get("final_logit_softcapping") or 0.0,
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    if fields.get("attn_logit_softcapping"):
        raise ValueError(
            f"attn_logit_softcapping={fields['attn_logit_softcapping']!r}; expected null, since transformers does not "
            "cap the scores of this family."
        )
    positive_integer(fields, "sliding_window")
    every = positive_integer(fields, "sliding_window_pattern")
    windowed = _gemma2(fields, lambda i, _: (i + 1) % every == 0)
    return {**windowed, "qk_norm": "head", **_ropes_by_window(fields, windowed)}


def _olmo2(fields: Fields) -> dict[str, Any]:
    return {"norm_style": "float32", "pre_norm": False, "post_norm": True, "qk_norm": "all", **_biases(fields)}


def _olmo3(fields: Fields) -> dict[str, Any]:
    positive_integer(fields, "sliding_window")
    windows = _windows(fields, True, lambda i, _: i % 4 == 3)
    theta, local = fields["rope_theta"], fields["rope_local_base_freq"]
    if windows and theta != local and not fields.get("rope_parameters"):
        raise ValueError(
            f"rope_theta={theta!r} outside of rope_parameters: transformers 4 takes it for all layers, 5 for those "
            f"without a window, and {local} for the others. Say it in rope_parameters, for {' and '.join(LAYER_TYPES)}."
        )
    return {**_olmo2(fields), **windows, **_ropes_by_window(fields, windows)}


def _smollm3(fields: Fields) -> dict[str, Any]:
    layers, every = fields["num_hidden_layers"], positive_integer(fields, "no_rope_layer_interval")
    rotated = fields.get("no_rope_layers")  # so it is called, but it has 1 where a layer rotates
    if rotated is None:
        rotated = [int(i % every != every - 1) for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(x not in (0, 1) for x in rotated):
        raise ValueError(f"no_rope_layers={rotated!r}; expected 1 for each of {layers} layers that rotates, or 0.")
    used = bool(fields.get("use_sliding_window") and fields.get("sliding_window"))
    if not used and LAYER_TYPES[1] in (fields.get("layer_types") or []):
        raise ValueError(
            f"layer_types={fields['layer_types']} have windows, but use_sliding_window and sliding_window do not; "
            "expected both or neither."
        )
    windows = _windows(fields, used, lambda i, _: bool(rotated[i]))
    others = tuple(i for i in range(layers) if not rotated[i])
    return {**_llama(fields), **windows, **_ropes(read_rope(fields), Rope(kind="none"), others, layers)}


def _ropes_by_window(fields: Fields, settings: Fields) -> dict[str, Any]:
    """`rope` and `other_rope`, that of layers with a window, if `settings` have any."""
    full, sliding = read_ropes_by_layer_type(fields)
    layers = range(fields["num_hidden_layers"])
    others = tuple(i for i in layers if i not in settings["full_layers"]) if "window" in settings else ()
    return _ropes(full, sliding, others, len(layers))


def _ropes(rope: Rope, other: Rope, others: tuple[int, ...], layers: int) -> dict[str, Any]:
    if rope == other or not others:
        return {"rope": rope}
    if len(others) == layers:
        return {"rope": other}
    return {"rope": rope, "other_rope": other, "other_rope_layers": others}


def _granite(fields: Fields) -> dict[str, Any]:
    return {
        **_llama(fields),
        "embed_scale": positive_number(fields, "embedding_multiplier"),
        "residual_scale": positive_number(fields, "residual_multiplier"),
        "score_scale": positive_number(fields, "attention_multiplier"),
        "logit_divisor": positive_number(fields, "logits_scaling"),
    }


def _biases(fields: Fields) -> dict[str, Any]:
    bias = bool(fields.get("attention_bias"))
    return {"attention_bias": bias, "output_bias": bias}


def _windows(fields: Fields, used: Any, is_full: IsFull) -> dict[str, Any]:
    """`window` and `full_layers`; is_full(layer, max_window_layers) where config.json does not say it of each layer."""
    window, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if not used or window is None:
        return {}
    full, sliding = LAYER_TYPES
    first = fields.get("max_window_layers", 0)
    if type(first) is not int or first < 0:
        raise ValueError(f"max_window_layers={first!r}; expected a number of layers.")
    types = fields.get("layer_types") or [full if is_full(i, first) else sliding for i in range(layers)]
    if len(types) != layers or set(types) - set(LAYER_TYPES):
        raise ValueError(f"layer_types={types}; expected {layers} of {', '.join(map(repr, LAYER_TYPES))}.")
    full_layers = tuple(i for i, kind in enumerate(types) if kind == full)
    return {} if len(full_layers) == layers else {"window": window, "full_layers": full_layers}


_TIED = {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256}
_WINDOWS = ("sliding_window", "layer_types")
_QWEN = (*_WINDOWS, "use_sliding_window", "max_window_layers")
_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
# `sliding_window_size`, in Gemma 2's config.json as published, is not read by transformers.
_GEMMA2 = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_GEMMA2_DEFAULTS = dict(zip(_GEMMA2, (256, 50.0, 30.0), strict=True))
_GEMMA3_DEFAULTS = {  # config.json of the larger models, as published, leaves out what is as here
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_OLMO3_DEFAULTS = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5, "rope_local_base_freq": 5e5}
_SMOLLM3 = ("no_rope_layers", "no_rope_layer_interval", *_QWEN)
_SMOLLM3_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
FAMILIES = {
    "llama": Family(("LlamaForCausalLM", "LLaMAForCausalLM"), _llama),
    "mistral": Family(
        ("MistralForCausalLM",),
        _window,
        ("sliding_window",),
        {"sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(("Qwen2ForCausalLM",), _qwen2, _QWEN, _QWEN_DEFAULTS),
    "qwen3": Family(("Qwen3ForCausalLM",), _qwen3, _QWEN, _QWEN_DEFAULTS | {"head_dim": 128}),
    "gemma": Family(("GemmaForCausalLM",), _gemma, ("hidden_activation",), _TIED | {"max_position_embeddings": 8192}),
    "gemma2": Family(
        ("Gemma2ForCausalLM",),
        _gemma2,
        (*_WINDOWS, *_GEMMA2, "hidden_activation", "sliding_window_size"),
        _TIED | _GEMMA2_DEFAULTS | {"max_position_embeddings": 8192, "sliding_window": 4096},
    ),
    "gemma3_text": Family(
        ("Gemma3ForCausalLM",),
        _gemma3,
        (*_WINDOWS, *_GEMMA2, "hidden_activation", "sliding_window_pattern", "rope_local_base_freq"),
        _TIED | _GEMMA3_DEFAULTS,
    ),
    "phi3": Family(
        ("Phi3ForCausalLM",),
        _window,
        ("sliding_window",),
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    ),
    "olmo2": Family(("Olmo2ForCausalLM",), _olmo2, (), {"rms_norm_eps": 1e-5}),
    "olmo3": Family(("Olmo3ForCausalLM",), _olmo3, _WINDOWS, _OLMO3_DEFAULTS),
    "smollm3": Family(("SmolLM3ForCausalLM",), _smollm3, _SMOLLM3, _SMOLLM3_DEFAULTS),
    "granite": Family(("GraniteForCausalLM",), _granite, _MULTIPLIERS, dict.fromkeys(_MULTIPLIERS, 1.0)),
}


def read_config(path: Path, adapter: Path | None = None, **changes: Any) -> Config:
    """The `Config` of the checkpoint directory `path`, Meta's params.json where there is no config.json.

    Args:
      adapter: directory of an adapter; it may bring another vocabulary, or set embeddings apart that were tied.
      changes: fields to set, such as dtype.

    Raises:
      FileNotFoundError: no such directory, or no config.json in it.
      ValueError: config.json is not JSON or describes a model that is not supported; so for the adapter's config.
    """
    config = read_base_config(Path(path))
    if adapter is not None:
        config = Adapter.open(adapter).adapted(config)
    elif is_adapter(path):
        warnings.warn(
            f"{path} holds a model and, beside it, an adapter, which is not merged in (transformers would load it). "
            f"To merge it in, name it as the adapter, too: adapter={str(path)!r}.",
            stacklevel=2,
        )
    return config.replace(**changes)


def read_base_config(path: Path) -> Config:
    """`read_config` of a checkpoint alone, whether or not an adapter is beside it."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"No checkpoint directory at {path}. Give a local directory that holds config.json and *.safetensors."
        )
    file = path / "config.json"
    if not file.is_file() and (path / meta.PARAMS).is_file():
        return meta.read_config(path)
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        advice = "is it a checkpoint?"
        if is_adapter(path):
            advice = "it is an adapter: give the model that it was trained on, and this as the adapter."
        raise FileNotFoundError(f"{path} holds no config.json and no params.json (found: {found}); {advice}")
    fields = read_fields(file)
    try:
        return config_from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_from_hf(fields: Fields) -> Config:
    """A `Config` from the fields of config.json. ValueError names whatever is unknown or unsupported."""
    fields = text_fields(fields, IGNORED)
    family = _family(fields)
    private = {name for name in fields if name.startswith("_")}
    refuse_unknown(fields, READ | IGNORED | UNUSED.keys() | set(family.fields) | private)
    if used := [name for name, value in UNUSED.items() if fields.get(name) not in (None, value)]:
        raise ValueError(f"{used[0]}={fields[used[0]]!r} is not supported; expected {UNUSED[used[0]]!r}.")
    fields = {**family.defaults, **fields}
    heads = positive_integer(fields, "num_attention_heads")
    width = positive_integer(fields, "hidden_size")
    if fields.get("head_dim") is None and width % heads:
        raise ValueError(
            f"hidden_size={width} is not a multiple of num_attention_heads={heads} and head_dim is absent. Add the "
            "head_dim that the model was trained with."
        )
    sizes = {
        "vocab_size": positive_integer(fields, "vocab_size"),
        "width": width,
        "num_layers": positive_integer(fields, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": positive_integer(fields, "num_key_value_heads", default=heads),
        "head_dim": positive_integer(fields, "head_dim", default=width // heads),
        "mlp_width": positive_integer(fields, "intermediate_size"),
    }
    settings = family.settings(fields)
    if "rope" not in settings:
        settings["rope"] = read_rope(fields)
    return Config(
        family=fields["model_type"],
        **sizes,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        max_positions=positive_integer(fields, "max_position_embeddings", default=2048),
        activation=_activation(fields),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        **settings,
    )


def _family(fields: Fields) -> Family:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; choose a checkpoint of type "
            f"{', '.join([*FAMILIES, *MULTIMODAL])}."
        )
    family = FAMILIES[model_type]
    for name in fields.get("architectures") or family.architectures[:1]:
        if name not in family.architectures:
            raise ValueError(
                f"architecture {name!r} is not supported; choose a checkpoint of {family.architectures[0]!r}."
            )
    return family


def _activation(fields: Fields) -> str:
    """The activation of the MLP: Gemma's configs have two fields for it (HF `GemmaConfig`, `Gemma2Config`)."""
    kind, value = fields["model_type"], fields.get("hidden_act", "silu")
    name, also = "hidden_act", fields.get("hidden_activation")
    if kind == "gemma" and value == "gelu":  # the first configs say so and mean the approximation
        value = "gelu_pytorch_tanh"
    if kind == "gemma" and also not in (None, "gelu", value):
        raise ValueError(
            f"hidden_activation={also!r} beside hidden_act={fields['hidden_act']!r}: transformers 4 takes the first, 5 "
            "the second. Leave out the one that the model was not trained with."
        )
    if kind in ("gemma2", "gemma3_text"):
        name, value = "hidden_activation", also or "gelu_pytorch_tanh"
    if value not in ACTIVATIONS:
        raise ValueError(
            f"{name}={value!r} is not supported; choose a checkpoint with one of {', '.join(map(repr, ACTIVATIONS))}."
        )
    return ACTIVATIONS[value]
