"""Gemma 3 from 4B on: the decoder of a checkpoint that holds a vision encoder as well."""

import json

import jax
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_families import HF_FAMILIES
from hf_llama import SIZES, hf_model
from safetensors.numpy import load_file, save_file
from test_adapters import peft_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

import convert
import jaxmech as jm
from jaxmech import verify

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"] - 1, (3, 11))
IMAGE = SIZES["vocab_size"] - 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(transformers' model, its folder)."""
    torch.manual_seed(0)
    _, own = HF_FAMILIES["gemma3_text"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=SIZES | own | {"initializer_range": 0.2, "final_logit_softcapping": None},
        vision_config=SiglipVisionConfig(**small, image_size=28, patch_size=14).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE,
        eoi_token_index=IMAGE,
    )
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def changed(saved, tmp_path):
    """A function that copies the checkpoint with changed fields of config.json and its tensors renamed."""

    def copy(rename=lambda name: name, **fields):
        _, folder = saved
        config = json.loads((folder / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        tensors = load_file(folder / "model.safetensors")
        save_file({rename(name): x for name, x in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return copy


def in_the_model(name: str) -> str:
    """The name that some versions of transformers saved a tensor by."""
    return f"model.{name.replace('language_model.model.', 'language_model.')}"


@pytest.mark.parametrize("rename", [lambda name: name, in_the_model], ids=["published", "in the model"])
def test_logits_of_the_decoder_equal_those_of_transformers(saved, changed, rename):
    theirs, folder = saved
    published = load_file(folder / "model.safetensors")
    assert "language_model.model.norm.weight" in published and any(name.startswith("vision") for name in published)
    ours = jm.load(changed(rename), precision="highest")
    assert ours.config.family == "gemma3_text" and len(ours.config.ropes) == 2
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert_close(ours(TOKENS)[0], expected, TOLERANCES.parity)


def test_sites_of_the_decoder_are_verified(saved):
    report = verify.verify(saved[1])
    assert report.ok, report
    assert {"pattern", "mlp_out", "inv_freq"} <= {c.site for c in report.comparisons}


def test_the_decoder_is_written_as_a_model_of_its_own(saved, tmp_path):
    ours = jm.load(saved[1])
    convert.write_hf(tmp_path, ours.config, ours.params)
    again = jm.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3_text"
    assert again.config.to_dict() == ours.config.to_dict()
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, ours.params))


def test_fields_that_published_configs_leave_out_are_those_of_transformers():
    """gemma-3-4b-pt says six fields of its decoder."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    theirs = Gemma3Config(text_config=dict(text)).to_dict()
    ours = convert.config_from_hf({"model_type": "gemma3", "text_config": text})
    assert ours == convert.config_from_hf(theirs)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.vocab_size) == (8, 4, 256, 262208)
    assert ours.rope == jm.Rope(1e6, "linear", 8.0) and ours.other_rope == jm.Rope(1e4)
    assert ours.full_layers == (5, 11, 17, 23, 29) and ours.tie_embeddings
    untied = {"model_type": "gemma3", "text_config": text | {"tie_word_embeddings": False}}
    assert convert.config_from_hf(untied).tie_embeddings, "that of the decoder does not count"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "unknown fields quantization_config"),
        ({"text_config": None}, "text_config=None; expected the fields of a decoder"),
        ({"text_config": {"model_type": "llama"}}, "model_type 'gemma3_text'"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping=30.0.*expected null"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "ForSequenceClassification.*expected.*Conditional"),
    ],
)
def test_what_is_not_the_decoder_that_it_should_be_is_refused(changed, fields, message):
    with pytest.raises(ValueError, match=message):
        jm.load(changed(**fields))


def test_unknown_tensors_are_refused(changed):
    path = changed(lambda name: name.replace("multi_modal_projector", "audio_tower"))
    with pytest.raises(ValueError, match="tensors that its config does not call for: audio_tower"):
        jm.load(path)
    twice = load_file(path / "model.safetensors")
    twice = {name.replace("audio_tower", "multi_modal_projector"): x for name, x in twice.items()}
    twice["model.norm.weight"] = twice["language_model.model.norm.weight"] + 1
    save_file(twice, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="language_model.model.norm.weight and model.norm.weight, which mean the same"):
        jm.load(path)
    path = changed(lambda name: name.replace("language_model.model.norm", "model.language_model.norm"))
    with pytest.raises(ValueError, match="lacks 1 tensors that its config calls for: model.norm"):
        jm.load(path)


ADAPTERS = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "all linear layers, those of images, too": {"target_modules": "all-linear", "use_dora": True},
    "an expression of whole names": {"target_modules": r"model\.language_model\.layers\.[02]\..*(q|o)_proj"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {r"language_model\..*\.v_proj": 3}},
    "whole modules": {"target_modules": ["k_proj"], "modules_to_save": ["language_model.norm"]},
}


@pytest.mark.parametrize("older", [False, True], ids=["as saved", "as saved by older versions"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_give_the_logits_that_peft_gives(saved, tmp_path, case, older):
    theirs = peft_model(saved[1], tmp_path, **ADAPTERS[case])
    if older:
        file = tmp_path / "adapter_model.safetensors"
        renamed = {
            name.replace(".model.language_model.", ".language_model.model."): x for name, x in load_file(file).items()
        }
        save_file(renamed, file)
        config = (tmp_path / "adapter_config.json").read_text()
        (tmp_path / "adapter_config.json").write_text(
            config.replace(r"model\\.language_model", r"language_model\\.model")
        )
    ours, plain = jm.load(saved[1], adapter=tmp_path), jm.load(saved[1])
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert_close(ours(TOKENS)[0], expected, TOLERANCES.parity)
    assert np.abs(plain(TOKENS)[0] - expected).max() > 0.1


def test_an_adapter_of_a_multimodal_model_is_refused_where_there_is_no_decoder_of_one(saved, tmp_path):
    peft_model(saved[1], tmp_path / "adapter", target_modules=["q_proj"])
    hf_model().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is an adapter of a multimodal model, and the base .*llama"):
        jm.load(tmp_path / "llama", adapter=tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "vision_tower" in name}, file)
    with pytest.raises(ValueError, match="tensors that the base .* does not have"):
        jm.load(saved[1], adapter=tmp_path / "adapter")


def test_an_adapter_of_the_multimodal_model_fits_its_decoder_alone(saved, tmp_path):
    peft_model(saved[1], tmp_path / "adapter", target_modules="all-linear")
    whole = jm.load(saved[1])
    convert.write_hf(tmp_path / "decoder", whole.config, whole.params)
    ours, expected = (jm.load(path, adapter=tmp_path / "adapter") for path in (tmp_path / "decoder", saved[1]))
    np.testing.assert_array_equal(ours(TOKENS)[0], expected(TOKENS)[0])
