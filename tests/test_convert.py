"""Conversion: Hugging Face directories in, and out again; the command line."""

import json
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conftest import TOLERANCES, assert_close
from hf_families import HF_FAMILIES
from hf_llama import FAMILIES, LLAMA3, SIZES, hf_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from words import word_tokenizer

import convert
import jaxmech as jm
from convert import params
from convert.__main__ import main
from jaxmech import checkpoint, host_arrays
from jaxmech.model import abstract_params

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 7))


def assert_identical(found, expected) -> None:
    """Same tree, same dtypes, same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), jax.tree_util.keystr(path)


def read(path, **changes):
    return convert.read_params(path, convert.read_config(path, **changes))


def edit_config(path, remove=(), **changes) -> None:
    fields = json.loads((path / "config.json").read_text())
    kept = {name: value for name, value in fields.items() if name not in remove}
    (path / "config.json").write_text(json.dumps(kept | changes))


def test_a_sharded_checkpoint_gives_the_tree_of_a_single_file(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert_identical(read(tmp_path / "sharded"), read(tmp_path / "single"))


def test_the_tree_is_that_of_flax_init(tmp_path):
    hf_model(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    config = convert.read_config(tmp_path)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), read(tmp_path))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_the_config_layout_before_transformers_5_is_read(tmp_path, name):
    hf_model(**FAMILIES["llama3 RoPE"]).save_pretrained(tmp_path)
    expected = convert.read_config(tmp_path)
    scaling = {field: value for field, value in LLAMA3.items() if field not in ("rope_theta", "rope_type")}
    edit_config(
        tmp_path,
        remove=("rope_parameters", "dtype"),
        rope_theta=LLAMA3["rope_theta"],
        rope_scaling=scaling | {name: "llama3"},
        torch_dtype="float32",
    )
    assert convert.read_config(tmp_path) == expected
    assert expected.rope == jm.Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def test_a_config_of_the_first_llama_is_read(tmp_path):
    """No rope fields, no num_key_value_heads, no head_dim, null where later versions have a value."""
    hf_model(num_key_value_heads=4).save_pretrained(tmp_path)
    edit_config(tmp_path, remove=("rope_parameters", "num_key_value_heads", "head_dim"), rope_scaling=None)
    config = convert.read_config(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rope) == (4, 8, jm.Rope())


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_fields_that_are_not_there_have_the_defaults_of_transformers(family):
    given = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 30, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 2, "intermediate_size": 40, "pad_token_id": 0}
    if family in ("qwen2", "qwen3"):
        given["use_sliding_window"] = True
    theirs = getattr(transformers, HF_FAMILIES[family][0])(**given).to_dict()
    assert convert.config_from_hf({"model_type": family, **given}) == convert.config_from_hf(theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_tensors_become_float32_without_loss(tmp_path, dtype):
    model = hf_model(dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    expected = model.model.embed_tokens.weight.detach().float().numpy()
    assert_close(read(tmp_path)["params"]["embed"], expected, TOLERANCES.exact)
    kept = read(tmp_path, dtype=dtype, param_dtype=dtype)["params"]["embed"]
    assert kept.dtype == dtype
    assert_close(kept, expected, TOLERANCES.exact)


def test_a_tied_checkpoint_may_carry_an_identical_unembedding(tmp_path):
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    without = read(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_identical(read(tmp_path), without)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path, name):
    hf_model().save_pretrained(tmp_path)
    expected = read(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_identical(read(tmp_path), expected)


def test_a_stacked_parameter_is_let_go_before_the_next_is_made(tmp_path, monkeypatch):
    """Where the device has a memory of its own; on the CPU it takes the array over."""
    hf_model().save_pretrained(tmp_path)
    held, alive, empty, placed = [], [], host_arrays.empty, params._placed

    def spy(shape, dtype):
        alive.append(sum(memory() is not None for memory in held))
        array = empty(shape, dtype)
        held.append(weakref.ref(array.base))  # what all views of it keep
        return array

    monkeypatch.setattr(host_arrays, "empty", spy)
    monkeypatch.setattr(params, "_placed", lambda array, sharding: placed(array.copy(), sharding))
    read(tmp_path)
    assert alive == [0] * (3 + 9)


def test_parameters_on_the_cpu_are_the_memory_that_was_read_into(tmp_path, monkeypatch):
    hf_model().save_pretrained(tmp_path)
    arrays, empty = [], host_arrays.empty
    monkeypatch.setattr(host_arrays, "empty", lambda *args: arrays.append(empty(*args)) or arrays[-1])
    found = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(read(tmp_path))}
    assert found == {array.ctypes.data for array in arrays}


@pytest.mark.parametrize("family", ["GQA", "tied embeddings"])
def test_tensors_read_in_many_pieces_are_those_read_in_one(tmp_path, monkeypatch, family):
    hf_model(**FAMILIES[family]).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held.get("lm_head.weight", held["model.embed_tokens.weight"]).copy()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected, calls = read(tmp_path), []
    monkeypatch.setattr(params, "PIECE", 100)  # numbers: three rows of most matrices, one head of q, k and v
    config = convert.read_config(tmp_path)
    assert_identical(convert.read_params(tmp_path, config, lambda *counts: calls.append(counts)), expected)
    assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)]
    held["lm_head.weight"][-1, -1] += 1
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if config.tie_embeddings:
        with pytest.raises(ValueError, match=r"lm_head.weight differs"):
            read(tmp_path)


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895314e38)])
def test_numbers_too_large_for_the_parameter_dtype_are_refused(tmp_path, dtype, largest):
    hf_model().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["model.norm.weight"][5] = largest
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read(tmp_path, param_dtype=dtype)["params"]["final_norm"].max() == largest
    held["model.norm.weight"][5] = 1.003 * largest
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.norm.weight holds numbers that are too large for {dtype}"):
        read(tmp_path, param_dtype=dtype)


def test_progress_counts_the_tensors(tmp_path):
    hf_model().save_pretrained(tmp_path)
    calls = []
    convert.read_params(tmp_path, convert.read_config(tmp_path), lambda done, total: calls.append((done, total)))
    total = 3 + 9 * SIZES["num_hidden_layers"]
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_the_same_in_transformers(tmp_path, family):
    hf_model(**FAMILIES[family]).save_pretrained(tmp_path / "theirs")
    model = jm.load(tmp_path / "theirs")
    convert.write_hf(tmp_path / "ours", model.config, model.params, word_tokenizer())
    exported, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        expected = exported(torch.tensor(TOKENS)).logits.numpy()
    assert_close(model(TOKENS)[0], expected, TOLERANCES.parity)
    assert jm.load(tmp_path / "ours").tokenizer("w3 w1")["input_ids"] == [3, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["attention bias", "MLP bias", "tied embeddings", "llama3 RoPE"])
def test_export_and_import_give_the_same_bits_and_config(tmp_path, dtype, family):
    hf_model(**FAMILIES[family]).save_pretrained(tmp_path / "theirs")
    first = jm.load(tmp_path / "theirs", dtype)
    convert.write_hf(tmp_path / "ours", first.config, first.params)
    second = jm.load(tmp_path / "ours", dtype)
    assert second.config.to_dict() == first.config.to_dict()
    assert_identical(second.params, first.params)
    stored = load_file(tmp_path / "ours" / "model.safetensors").values()
    assert {x.dtype for x in stored} == {np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "float32")}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda blocks: blocks | {"q_bias": blocks["q"]}, ["blocks.q_bias", "unknown"]),
        (lambda blocks: {name: x for name, x in blocks.items() if name != "up"}, ["blocks.up", "missing"]),
        (lambda blocks: blocks | {"k": blocks["q"]}, ["blocks.k", "[4, 24, 4, 8]", "[4, 24, 2, 8]"]),
        (lambda blocks: blocks | {"o": blocks["o"].astype(jnp.bfloat16)}, ["blocks.o", "bfloat16", "float32"]),
    ],
    ids=["leftover", "missing", "shape", "dtype"],
)
def test_a_tree_that_is_not_the_models_is_refused(tmp_path, random_model, spoil, words):
    model = random_model(num_kv_heads=2)
    params = {"params": {**model.weights, "blocks": spoil(dict(model.weights["blocks"]))}}
    for write in (convert.write_hf, jm.checkpoint.save):
        with pytest.raises(ValueError) as error:
            write(tmp_path / "out", model.config, params)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert not (tmp_path / "out").exists()


def test_the_command_converts_a_directory_that_load_reads(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    word_tokenizer().save_pretrained(tmp_path / "hf")
    command = [sys.executable, "-m", "convert", "--model", tmp_path / "hf", "--out", tmp_path / "orbax"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reading" in done.stderr and "Wrote" in done.stderr
    expected, found = jm.load(tmp_path / "hf"), jm.load(tmp_path / "orbax")
    assert found.config.to_dict() == expected.config.to_dict()
    assert_identical(found.params, expected.params)
    assert found.tokenizer("w3 w7")["input_ids"] == [3, 7]


def test_the_command_stores_the_dtype_it_is_asked_for(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    arguments = ["--model", str(tmp_path / "hf"), "--out", str(tmp_path / "orbax"), "--dtype", "bfloat16"]
    main(arguments)
    assert jm.checkpoint.read_config(tmp_path / "orbax").param_dtype == "bfloat16"
    assert_identical(jm.load(tmp_path / "orbax", "bfloat16").params, jm.load(tmp_path / "hf", "bfloat16").params)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    main([*arguments[:4], "--overwrite"])
    assert jm.checkpoint.read_config(tmp_path / "orbax").param_dtype == "float32"


def test_the_command_refuses_an_output_that_exists_before_it_reads_anything(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error:") and "exists already" in printed and "nowhere" not in printed


def test_the_command_says_that_its_input_is_converted_already(tmp_path, capsys, random_model):
    model = random_model()
    checkpoint.save(tmp_path / "done", model.config, model.params)
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path / "done"), "--out", str(tmp_path / "out")])
    printed = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "done is converted already: it is an Orbax checkpoint" in printed


def test_the_command_says_what_is_wrong_with_its_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error:") and "nowhere" in printed
    assert not (tmp_path / "out").exists()
