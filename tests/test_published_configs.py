"""Fields that published or hand-written config.json files have: read as transformers reads them, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_families import family_model
from hf_llama import SIZES, hf_model
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM

import convert
import jaxmech as jm

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40))
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


def rope(**scaling) -> Callable[[dict], None]:
    def change(fields: dict) -> None:
        fields.pop("rope_parameters")
        fields.update(rope_theta=1e4, rope_scaling=scaling)

    return change


def alone(name: str, value: str) -> Callable[[dict], None]:
    """Only one of Gemma's two fields for the activation."""

    def change(fields: dict) -> None:
        fields.pop("hidden_activation", None)
        fields.pop("hidden_act", None)
        fields[name] = value

    return change


AS_TRANSFORMERS = {
    "Gemma 2": ("gemma2", lambda f: f.update(sliding_window_size=4)),
    "Phi-4-mini": ("phi3", lambda f: f.update(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False)),
    "DeepSeek-R1-0528-Qwen3-8B": ("qwen3", rope(**SCALED, attn_factor=0.878)),
    "Yarn-Llama-2": ("llama", rope(**SCALED, finetuned=True)),
    "dynamic, with another original context": (
        "llama",
        rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16),
    ),
    "yarn, truncate null": ("llama", rope(**SCALED, truncate=None)),
    "original context outside of ropes by kind of layer": (
        "olmo3",
        lambda f: f.update(original_max_position_embeddings=64),
    ),
    "fields of older versions": (
        "llama",
        lambda f: f.update(temperature=0.6, do_sample=True, quantization_config=None, pruned_heads={}),
    ),
    "hidden_act of Gemma 2": ("gemma2", alone("hidden_act", "silu")),
    "hidden_activation of Gemma 2": ("gemma2", alone("hidden_activation", "silu")),
    "hidden_act of Gemma": ("gemma", alone("hidden_act", "silu")),
}


def saved(path: Path, family: str, change: Callable[[dict], None]) -> None:
    family_model(family).save_pretrained(path)
    fields = json.loads((path / "config.json").read_text())
    change(fields)
    (path / "config.json").write_text(json.dumps(fields))


def theirs(path: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_logits_are_those_of_transformers(tmp_path, name):
    saved(tmp_path, *AS_TRANSFORMERS[name])
    assert_close(jm.load(tmp_path, precision="highest")(TOKENS)[0], theirs(tmp_path), TOLERANCES.parity)


def test_gemma_2_with_silu_is_exported_as_such(tmp_path):
    saved(tmp_path / "theirs", "gemma2", alone("hidden_activation", "silu"))
    model = jm.load(tmp_path / "theirs", precision="highest")
    convert.write_hf(tmp_path / "ours", model.config, model.params)
    assert_close(theirs(tmp_path / "ours"), theirs(tmp_path / "theirs"), TOLERANCES.exact)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("phi3", lambda f: f.update(lm_head_bias=True), "lm_head_bias=True is not supported; expected False"),
        ("gemma2", lambda f: f.update(hidden_activation="gelu"), "hidden_activation='gelu' is not supported"),
        ("gemma", lambda f: f.update(hidden_activation="silu"), "transformers 4 takes the first, 5 the second"),
    ],
)
def test_what_would_change_numbers_is_refused(tmp_path, family, change, words):
    saved(tmp_path, family, change)
    with pytest.raises(ValueError, match=words):
        convert.read_config(tmp_path)


def test_a_tied_model_may_have_its_embedding_under_the_unembeddings_name(tmp_path):
    model = hf_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    expected = jm.load(tmp_path)(TOKENS)[0]
    (tmp_path / "model.safetensors").unlink()
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "lm_head.weight" in convert.tensors.open_tensors(tmp_path).names
    np.testing.assert_array_equal(jm.load(tmp_path)(TOKENS)[0], expected)


def test_an_adapter_beside_a_model_is_not_merged_without_a_word(tmp_path):
    hf_model().save_pretrained(tmp_path)
    config = convert.read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="an adapter, which is not merged in .* adapter='"):
        assert convert.read_config(tmp_path) == config
