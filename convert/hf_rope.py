"""config.json's fields of the rotary embedding to `jaxmech.config.Rope`, and back.

Reads the layout of transformers 5 (`rope_parameters`) and the older one (`rope_theta` + `rope_scaling`).
"""

import math
from typing import Any

from convert.json_files import Fields, positive_integer, positive_number
from jaxmech.config import Rope

# Fields of each RoPE type that must be there, and that may be.
ROPE_FIELDS: dict[str, tuple[str, str]] = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", "original_max_position_embeddings"),  # which transformers does not read
    "llama3": ("factor low_freq_factor high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "attention_factor beta_fast beta_slow mscale mscale_all_dim original_max_position_embeddings truncate",
    ),
    "longrope": ("short_factor long_factor", "attention_factor factor original_max_position_embeddings"),
}
# Fields of published checkpoints that transformers does not read: DeepSeek-R1-0528-Qwen3-8B's, and Yarn-Llama-2's.
NOT_READ = ("attn_factor", "finetuned")
LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(fields: Fields) -> Rope:
    """Either layout: `rope_parameters` {rope_theta, rope_type, ...}, or `rope_theta` beside `rope_scaling`.

    Where both are given, `rope_scaling` wins (HF `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).
    """
    parameters = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", None) or parameters.get("type", "default")
    for name in ("type", *NOT_READ):  # `type` is the name of `rope_type` before transformers 4.43
        parameters.pop(name, None)
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
    if "truncate" in parameters:
        given["truncate"] = bool(parameters["truncate"])  # null is false to transformers
    # yarn may say that its factor is null: then it follows from the two context lengths.
    if missing := [name for name in needed if name not in (parameters if kind == "yarn" else given)]:
        raise ValueError(f"rope_type={kind!r} lacks {', '.join(missing)}; copy the model's original config.json.")
    if unknown := sorted(set(parameters) - {*needed, *optional}):
        raise ValueError(
            f"rope_type={kind!r} has unknown fields {', '.join(unknown)}; remove those that change nothing."
        )
    lists = ("short_factor", "long_factor")
    for name in given.keys() - {"truncate", *lists}:
        positive_number(given, name)
    if wrong := [name for name in lists if name in given and not isinstance(given[name], list)]:
        raise ValueError(f"{wrong[0]}={given[wrong[0]]!r}; expected a list of numbers, one for each frequency.")
    if kind in ("default", "linear"):
        return Rope(theta=theta, kind=kind, fraction=fraction, factor=given.get("factor", 1.0))
    limit = positive_integer(fields, "max_position_embeddings", default=2048)
    original = given.pop("original_max_position_embeddings", limit)
    original = limit if kind == "dynamic" else original
    if kind != "dynamic" and fields.get("original_max_position_embeddings") is not None:
        original = positive_integer(fields, "original_max_position_embeddings")
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


def read_ropes_by_layer_type(fields: Fields) -> tuple[Rope, Rope]:
    """Those of layers without and with a window, of families whose `rope_parameters` hold one for each.

    In the older layout, `rope_theta` and `rope_scaling` are those of layers without a window, and `fields` must have
    `rope_local_base_freq`, the base of the others (HF `Gemma3TextConfig.convert_rope_params_to_dict`).
    """
    both = fields.get("rope_parameters") or {}
    if both.keys() - set(LAYER_TYPES):
        raise ValueError(f"rope_parameters={both}; expected one for each of {', '.join(map(repr, LAYER_TYPES))}.")
    full, sliding = (dict(both.get(name) or {}) for name in LAYER_TYPES)
    scaling = fields.get("rope_scaling") or {}
    if "type" in scaling:
        raise ValueError(f"rope_scaling={scaling}: transformers takes no notice of 'type' here; say 'rope_type'.")
    full |= scaling
    full.setdefault("rope_theta", fields["rope_theta"])
    sliding.setdefault("rope_theta", fields["rope_local_base_freq"])
    without = {**fields, "rope_scaling": None, "original_max_position_embeddings": None}  # those inside count alone
    full_rope, sliding_rope = (read_rope({**without, "rope_parameters": given}) for given in (full, sliding))
    return full_rope, sliding_rope


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


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """`rope` in the layout of transformers 5; "default" where nothing is rotated, which other fields say."""
    kind = "default" if rope.kind == "none" else rope.kind
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
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
