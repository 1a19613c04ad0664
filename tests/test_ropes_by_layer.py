"""config.json of families whose layers rotate differently: both layouts, and what does not say it clearly."""

import jax
import numpy as np
import pytest
from hf_llama import SIZES
from transformers import Gemma3TextConfig, Olmo3Config, SmolLM3Config

import convert
import jaxmech as jm
from convert.export import config_to_hf
from jaxmech.model import abstract_params

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2}
LINEAR = {"rope_type": "linear", "factor": 8.0}
OLD = {  # as released before transformers 5
    "gemma3_text": {
        "rope_theta": 2e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": LINEAR,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 7,
    },
    "olmo3": {"rope_theta": 500000, "rope_scaling": YARN, "max_position_embeddings": 65536, "num_hidden_layers": 5},
    "smollm3": {"rope_theta": 5e6, "no_rope_layers": [1, 0, 1, 1, 0]},
}
EXPECTED = {
    "gemma3_text": (jm.Rope(2e6, "linear", 8.0), jm.Rope(2e4), (0, 1, 3, 4, 6)),
    "olmo3": (jm.Rope(5e5, "yarn", 8.0, attention_factor=1.2), jm.Rope(5e5), (0, 1, 2, 4)),
    "smollm3": (jm.Rope(5e6), jm.Rope(kind="none"), (1,)),
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
CONFIGS = {"gemma3_text": Gemma3TextConfig, "olmo3": Olmo3Config, "smollm3": SmolLM3Config}


def read(family: str, **fields) -> jm.Config:
    return convert.config_from_hf({"model_type": family, **SIZES, "pad_token_id": 0, **fields})


@pytest.mark.parametrize("family", OLD)
def test_older_configs_mean_what_they_mean_in_transformers(family):
    ours = read(family, **OLD[family])
    assert (ours.rope, ours.other_rope, ours.other_rope_layers) == EXPECTED[family]
    given = {**SIZES, "pad_token_id": 0, **OLD[family]}
    theirs = CONFIGS[family](**{k: dict(v) if isinstance(v, dict) else v for k, v in given.items()}).to_dict()
    theirs.pop("sliding_window_pattern", None)
    assert convert.config_from_hf(theirs) == ours


def test_the_published_config_of_smollm3_is_read():
    """SmolLM3-3B's, with fields that have no effect."""
    fields = {
        "max_window_layers": 28,
        "layer_types": ["full_attention"] * 36,
        "pretraining_tp": 2,
        "rope_scaling": None,
    }
    fields |= {"no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "rope_theta": 5e6, "vocab_size": 128256}
    fields |= {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "intermediate_size": 11008}
    ours = read("smollm3", **fields, use_sliding_window=False, sliding_window=None, num_key_value_heads=4)
    assert (ours.rope, ours.other_rope_layers) == (jm.Rope(5e6), tuple(range(3, 36, 4)))
    assert ours.tie_embeddings and not ours.window


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_layers_of_one_kind_alone_have_one_rope(family, kind):
    theta = {"full_attention": 1e6, "sliding_attention": 1e4}
    ropes = {name: {"rope_type": "default", "rope_theta": value} for name, value in theta.items()}
    ours = read(family, layer_types=[kind] * 3, rope_parameters=ropes)
    assert (ours.rope, ours.other_rope, ours.other_rope_layers) == (jm.Rope(theta[kind]), None, ())
    assert bool(ours.window) == (kind == "sliding_attention")
    fields = config_to_hf(ours)
    assert convert.config_from_hf(fields) == ours
    CONFIGS[family](**fields)


def test_a_model_that_never_rotates_has_no_other_rope():
    ours = read("smollm3", no_rope_layers=[0, 0, 0])
    assert (ours.rope.kind, ours.other_rope) == ("none", None)
    fields = config_to_hf(ours)
    assert convert.config_from_hf(fields) == ours


OTHER = {"other_rope": jm.Rope(1e3), "other_rope_layers": (0, 1)}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", OTHER, "family 'llama' cannot say RoPE of the layers"),
        ("llama", {"rope": jm.Rope(kind="none")}, "family 'llama' cannot say RoPE of the layers"),
        ("llama", {"window": 4}, "family 'llama' cannot say windows"),
        (
            "llama",
            {"rope": jm.Rope(kind="dynamic", factor=2.0, original_max_positions=16)},
            "family 'llama' cannot say RoPE of the layers",
        ),
        ("llama", {"qk_norm": "head"}, "family 'llama' cannot say qk_norm='head', but 'none'"),
        ("smollm3", OTHER, "family 'smollm3' cannot say RoPE of the layers"),
        (
            "gemma3_text",
            OTHER | {"window": 4, "full_layers": (1,)},
            "family 'gemma3_text' cannot say RoPE of the layers",
        ),
    ],
)
def test_what_a_family_cannot_say_is_not_written(family, changes, message):
    with pytest.raises(ValueError, match=message):
        config_to_hf(read(family).replace(**changes))


@pytest.mark.parametrize(
    ("family", "fields", "changes"),
    [
        ("phi3", {}, {"rope": jm.Rope(kind="linear", factor=2.0)}),
        ("gemma2", {"layer_types": ["sliding_attention"] * 3}, {"score_scale": 12.5**-0.5}),
    ],
)
def test_what_transformers_refuses_is_not_written(tmp_path, family, fields, changes):
    config = read(family, **fields).replace(**changes)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config))
    with pytest.raises(ValueError, match="transformers refuses the config"):
        convert.write_hf(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gemma3_text", {"rope_parameters": LINEAR}, "expected one for each of 'full_attention', 'sliding_attention'"),
        ("gemma3_text", {"sliding_window": None}, "field 'sliding_window' is missing"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0; expected null"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern=0; expected a positive integer"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta=10000.0 outside of rope_parameters.*full_attention"),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks factor"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]; expected 1 for each of 3 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "expected 1 for each of 3 layers that rotates, or 0"),
        ("smollm3", WINDOWED | {"sliding_window": 6}, "have windows, but use_sliding_window and"),
        ("smollm3", WINDOWED | {"use_sliding_window": True}, "have windows, but use_sliding_window and"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "no notice of 'type'.*say 'rope_type'"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0; expected a positive integer"),
    ],
)
def test_what_is_unclear_or_not_supported_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        read(family, **fields)
