"""Every family against transformers (eager attention): logits, long prompts, bfloat16, and the way back."""

import copy
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_families import HF_FAMILIES, family_model
from hf_llama import SIZES
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from words import word_tokenizer

import convert
import jaxmech as jm

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 11))  # longer than the windows
LONG = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 40))  # and than the original context of 16
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {
    "llama3": (
        "llama",
        YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    "yarn": ("qwen2", YARN),
    "yarn in windows": ("qwen3", YARN | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.5, 6.0],
        },
    ),
}


def logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.fixture
def saved(tmp_path):
    """A function that makes a model of a family and saves it: (model, folder)."""

    def make(family: str, **changes):
        model = family_model(family, **changes)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return make


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_logits_equal_those_of_transformers(saved, family):
    theirs, path = saved(family)
    ours = jm.load(path, precision="highest")
    assert ours.config.family == family
    assert_close(ours(TOKENS)[0], logits(theirs, TOKENS), TOLERANCES.parity)


@pytest.mark.parametrize("family", [name for name, (_, own) in HF_FAMILIES.items() if "sliding_window" in own])
def test_windows_are_honoured_and_matter(saved, family):
    """On prompts far longer than the window; without it, the logits would be others."""
    theirs, path = saved(family)
    ours, wide = jm.load(path, precision="highest"), json.loads((path / "config.json").read_text())
    found = ours(LONG)[0]
    assert_close(found, logits(theirs, LONG), TOLERANCES.parity)
    (path / "config.json").write_text(json.dumps(wide | {"sliding_window": 64}))
    assert np.abs(jm.load(path)(LONG)[0] - found).max() > 0.01 * np.abs(found).max()


QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "full_layers", "changes"),
    [
        ("gemma2", (1, 3), {"num_hidden_layers": 4}),
        ("qwen2", (0,), QWEN_WINDOWS),
        ("gemma3_text", (2, 5), {"num_hidden_layers": 6, "sliding_window_pattern": 3, "layer_types": None}),
        ("olmo3", (3,), {"num_hidden_layers": 5, "layer_types": None}),
        ("smollm3", (0, 2), {}),
        ("qwen3", (0, 1), QWEN_WINDOWS | {"max_window_layers": 2, "num_hidden_layers": 4}),
    ],
)
def test_windows_of_a_config_that_does_not_name_the_kinds_of_its_layers(saved, family, full_layers, changes):
    """Older ones have no layer_types: there, the family says which layers have a window."""
    _, path = saved(family, **changes)
    expected, fields = convert.read_config(path), json.loads((path / "config.json").read_text())
    del fields["layer_types"]
    (path / "config.json").write_text(json.dumps(fields))
    ours = jm.load(path, precision="highest")
    assert ours.config == expected and ours.config.window and ours.config.full_layers == full_layers
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    assert_close(ours(LONG)[0], logits(theirs, LONG), TOLERANCES.parity)


@pytest.mark.parametrize("tokens", [TOKENS, LONG], ids=["within the original context", "beyond it"])
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rope_equals_that_of_transformers(saved, kind, tokens):
    family, parameters = SCALED[kind]
    changes = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    if kind == "longrope":
        changes["original_max_position_embeddings"] = 16
    theirs, path = saved(family, rope_parameters=dict(parameters), **changes)
    ours = jm.load(path, precision="highest")
    assert ours.config.rope.kind == parameters["rope_type"]
    assert_close(ours(tokens)[0], logits(theirs, tokens), TOLERANCES.parity)


@pytest.mark.parametrize("inside", [None, 8192])
def test_longrope_without_an_original_context_has_that_of_phi3(inside):
    """HF `Phi3Config`, whose default wins over what rope_scaling says."""
    _, parameters = SCALED["longrope"]
    parameters = parameters | ({"original_max_position_embeddings": inside} if inside else {})
    fields = {"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": parameters}
    fields |= {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ours = convert.config_from_hf(copy.deepcopy(fields) | {"intermediate_size": 64}).rope
    theirs = Phi3RotaryEmbedding(Phi3Config(**fields, pad_token_id=0, eos_token_id=1))
    assert ours.original_max_positions == theirs.config.original_max_position_embeddings == 4096
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling) != 1


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(saved, family):
    """Two kernels of transformers (eager, SDPA) and ours round differently; none may be further off than another."""
    _, path = saved(family, dtype=torch.bfloat16)
    exact = jm.load(path, precision="highest")(TOKENS)[0]
    kernels = {}
    for kernel in ("eager", "sdpa") if family != "gemma2" else ("eager",):  # SDPA cannot cap scores
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=kernel)
        kernels[kernel] = logits(loaded.eval(), TOKENS)
    ours = jm.load(path, "bfloat16")(TOKENS)[0]
    errors = [np.abs(x - exact).mean() for x in kernels.values()]
    assert 0 < np.abs(ours - exact).mean() < 1.15 * max(errors)
    assert_close(ours, kernels["eager"], TOLERANCES.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", HF_FAMILIES)
def test_export_and_import_give_the_same_bits_and_config(saved, tmp_path, family, dtype):
    _, path = saved(family, dtype=getattr(torch, dtype))
    first = jm.load(path, dtype)
    convert.write_hf(tmp_path / "ours", first.config, first.params)
    second = jm.load(tmp_path / "ours", dtype)
    assert second.config.to_dict() == first.config.to_dict()
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), *map(_params, (first, second)))
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        np.testing.assert_array_equal(tensor.view(np.uint8), after[name].view(np.uint8), err_msg=name)


@pytest.mark.parametrize("kind", [*HF_FAMILIES, *SCALED])
def test_transformers_loads_what_is_exported_as_the_same_model(saved, tmp_path, kind):
    family, parameters = SCALED.get(kind, (kind, None))
    changes = {} if parameters is None else {"rope_parameters": dict(parameters), "max_position_embeddings": 64}
    if kind == "longrope":
        changes["original_max_position_embeddings"] = 16
    theirs, path = saved(family, **changes)
    ours = jm.load(path)
    convert.write_hf(tmp_path / "ours", ours.config, ours.params, word_tokenizer())
    exported, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_array_equal(logits(exported.eval(), LONG), logits(theirs, LONG))


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_shards_of_other_families_load_alike(tmp_path, family):
    model = family_model(family)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (_params(jm.load(tmp_path / name)) for name in ("whole", "shards"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, shards))


def _params(model: jm.Model):
    return model.params
