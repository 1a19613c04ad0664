"""Hugging Face's config.json to `jaxmech.config.Config`.

Reads the layout of transformers 5 (`rope_parameters`, `dtype`) and the older ones (`rope_theta` + `rope_scaling`,
`torch_dtype`). Every field of the file is read, known to have no effect on inference, or refused by name.

What a family computes is said once, here, in the fields of `Config`; where its tensors are, in `convert.families`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert import meta
from convert.adapters import Adapter, is_adapter
from convert.json_files import Fields, read_fields, refuse_unknown
from jaxmech.config import Config, Rope

# Fields without effect on a forward pass: bookkeeping, token ids, training and generation settings.
IGNORED = frozenset(
    """architectures attention_dropout auto_map bos_token_id cache_implementation chunk_size_feed_forward dtype
    embd_pdrop eos_token_id finetuning_task id2label initializer_range is_decoder is_encoder_decoder is_llama_config
    label2id max_sequence_length model_type output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type resid_pdrop return_dict sep_token_id task_specific_params tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache""".split()
)
READ = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    rms_norm_eps max_position_embeddings original_max_position_embeddings attention_bias mlp_bias tie_word_embeddings
    hidden_act rope_parameters rope_theta rope_scaling partial_rotary_factor""".split()
)
# Fields that would change the mathematics, in any family, if they were not as here.
UNUSED = {"rope_interleaved": False, "use_bidirectional_attention": False, "use_mrope": False}
# Fields of each RoPE type that must be there, and that may be.
ROPE_FIELDS: dict[str, tuple[str, str]] = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "attention_factor beta_fast beta_slow mscale mscale_all_dim original_max_position_embeddings truncate",
    ),
    "longrope": ("short_factor long_factor", "attention_factor factor original_max_position_embeddings"),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = ("full_attention", "sliding_attention")


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


def _gemma2(fields: Fields) -> dict[str, Any]:
    return {
        **_gemma(fields),
        **_windows(fields, True, lambda i, _: i % 2 == 1),
        "post_norm": True,
        "score_scale": _number(fields, "query_pre_attn_scalar") ** -0.5,
        "score_cap": fields.get("attn_logit_softcapping") or 0.0,
        "logit_cap": fields.get("final_logit_softcapping") or 0.0,
    }


def _olmo2(fields: Fields) -> dict[str, Any]:
    return {"norm_style": "float32", "pre_norm": False, "post_norm": True, "qk_norm": "all", **_biases(fields)}


def _granite(fields: Fields) -> dict[str, Any]:
    return {
        **_llama(fields),
        "embed_scale": _number(fields, "embedding_multiplier"),
        "residual_scale": _number(fields, "residual_multiplier"),
        "score_scale": _number(fields, "attention_multiplier"),
        "logit_divisor": _number(fields, "logits_scaling"),
    }


def _biases(fields: Fields) -> dict[str, Any]:
    bias = bool(fields.get("attention_bias"))
    return {"attention_bias": bias, "output_bias": bias}


def _windows(fields: Fields, used: Any, is_full: Callable[[int, int], bool]) -> dict[str, Any]:
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
_GEMMA2 = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_GEMMA2_DEFAULTS = dict(zip(_GEMMA2, (256, 50.0, 30.0), strict=True))
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
        (*_WINDOWS, *_GEMMA2, "hidden_activation"),
        _TIED | _GEMMA2_DEFAULTS | {"max_position_embeddings": 8192, "sliding_window": 4096},
    ),
    "phi3": Family(
        ("Phi3ForCausalLM",),
        _window,
        ("sliding_window",),
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    ),
    "olmo2": Family(("Olmo2ForCausalLM",), _olmo2, (), {"rms_norm_eps": 1e-5}),
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
    config = _read_config(Path(path))
    if adapter is not None:
        config = Adapter.open(adapter).adapted(config)
    return config.replace(**changes)


def _read_config(path: Path) -> Config:
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
    family = _family(fields)
    private = {name for name in fields if name.startswith("_")}
    refuse_unknown(fields, READ | IGNORED | UNUSED.keys() | set(family.fields) | private)
    if used := [name for name, value in UNUSED.items() if fields.get(name) not in (None, value)]:
        raise ValueError(f"{used[0]}={fields[used[0]]!r} is not supported; expected {UNUSED[used[0]]!r}.")
    fields = {**family.defaults, **fields}
    heads = _size(fields, "num_attention_heads")
    width = _size(fields, "hidden_size")
    if fields.get("head_dim") is None and width % heads:
        raise ValueError(
            f"hidden_size={width} is not a multiple of num_attention_heads={heads} and head_dim is absent. Add the "
            "head_dim that the model was trained with."
        )
    return Config(
        family=fields["model_type"],
        vocab_size=_size(fields, "vocab_size"),
        width=width,
        num_layers=_size(fields, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(fields, "num_key_value_heads", default=heads),
        head_dim=_size(fields, "head_dim", default=width // heads),
        mlp_width=_size(fields, "intermediate_size"),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        max_positions=_size(fields, "max_position_embeddings", default=2048),
        rope=_rope(fields),
        activation=_activation(fields),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        **family.settings(fields),
    )


def _family(fields: Fields) -> Family:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; choose a checkpoint of type {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    for name in fields.get("architectures") or family.architectures[:1]:
        if name not in family.architectures:
            raise ValueError(
                f"architecture {name!r} is not supported; choose a checkpoint of {family.architectures[0]!r}."
            )
    return family


def _activation(fields: Fields) -> str:
    gemma = fields["model_type"] in ("gemma", "gemma2")
    name = "hidden_activation" if gemma and fields.get("hidden_activation") else "hidden_act"
    value = fields.get(name, "silu")
    if gemma and value == "gelu":  # the first Gemma configs say so and mean the approximation (HF `GemmaConfig`)
        value = "gelu_pytorch_tanh"
    if value not in ACTIVATIONS:
        raise ValueError(
            f"{name}={value!r} is not supported; choose a checkpoint with one of {', '.join(map(repr, ACTIVATIONS))}."
        )
    return ACTIVATIONS[value]


def _size(fields: Fields, name: str, default: int | None = None) -> int:
    """The positive integer at `name`, or the default if it is absent or null."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise ValueError(f"field {name!r} is missing and has no safe default; copy the model's original config.json.")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; expected a positive integer.")
    return value


def _number(fields: Fields, name: str) -> float:
    """The positive number at `name`."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name}={value!r}; expected a positive number.")
    return value


def _rope(fields: Fields) -> Rope:
    """Either layout: `rope_parameters` {rope_theta, rope_type, ...}, or `rope_theta` beside `rope_scaling`.

    Where both are given, `rope_scaling` wins (HF `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).
    """
    parameters = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", None) or parameters.get("type", "default")
    parameters.pop("type", None)  # the name of the field before transformers 4.43
    fraction = parameters.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if fields["model_type"] == "phi3":
        kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)  # older names (HF `Phi3Config`)
    elif fraction != 1.0:
        raise ValueError(f"partial_rotary_factor={fraction} is not supported; expected 1.0.")
    if kind not in ROPE_FIELDS:
        raise ValueError(
            f"rope_type={kind!r} is not supported; choose a checkpoint with one of {', '.join(ROPE_FIELDS)}."
        )
    needed, optional = (names.split() for names in ROPE_FIELDS[kind])
    given = {name: value for name, value in parameters.items() if value is not None}
    # yarn may say that its factor is null: then it follows from the two context lengths.
    if missing := [name for name in needed if name not in (parameters if kind == "yarn" else given)]:
        raise ValueError(f"rope_type={kind!r} lacks {', '.join(missing)}; copy the model's original config.json.")
    if unknown := sorted(set(parameters) - {*needed, *optional}):
        raise ValueError(
            f"rope_type={kind!r} has unknown fields {', '.join(unknown)}; remove those that change nothing."
        )
    lists = ("short_factor", "long_factor")
    for name in given.keys() - {"truncate", *lists}:
        _number(given, name)
    if wrong := [name for name in lists if name in given and not isinstance(given[name], list)]:
        raise ValueError(f"{wrong[0]}={given[wrong[0]]!r}; expected a list of numbers, one for each frequency.")
    if kind in ("default", "linear"):
        return Rope(theta=theta, kind=kind, fraction=fraction, factor=given.get("factor", 1.0))
    limit = _size(fields, "max_position_embeddings", default=2048)
    original = given.pop("original_max_position_embeddings", limit)
    if kind != "dynamic" and fields.get("original_max_position_embeddings") is not None:
        original = _size(fields, "original_max_position_embeddings")
    factor = given.setdefault("factor", limit / original)
    if kind in ("yarn", "longrope"):
        scale = _attention_factor(kind, given, factor, original)
        for name in ("mscale", "mscale_all_dim"):
            given.pop(name, None)
        given["attention_factor"] = scale
    if kind == "longrope":
        given |= {"short_factors": tuple(given.pop("short_factor")), "long_factors": tuple(given.pop("long_factor"))}
        del given["factor"]
    return Rope(theta=theta, kind=kind, fraction=fraction, original_max_positions=original, **given)


def _attention_factor(kind: str, given: Fields, factor: float, original: int) -> float:
    """Factor of cos and sin (HF `_compute_yarn_parameters`, `_compute_longrope_parameters`)."""
    if "attention_factor" in given:
        return given["attention_factor"]
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1)
