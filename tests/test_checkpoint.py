"""Orbax checkpoints: bit-identical round trips, config and tokenizer inside, nothing overwritten or left half done."""

import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from hf_llama import word_tokenizer

import jaxmech as jm
from jaxmech import checkpoint

TOKENS = np.arange(20).reshape(2, 10)


class BrokenTokenizer:
    def save_pretrained(self, path):
        raise OSError("disk full")


def save(path, model, **options):
    checkpoint.save(path, model.config, model.params, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_keeps_every_bit_the_config_and_the_tokenizer(tmp_path, random_model, dtype):
    model = random_model(num_kv_heads=2, attention_bias=True)
    config = model.config.replace(dtype=dtype, param_dtype=dtype, precision="high")
    model = jm.Model(config, jax.tree.map(lambda x: x.astype(dtype), model.params))
    save(tmp_path / "model", model, tokenizer=word_tokenizer())
    found = jm.load(tmp_path / "model", dtype, precision="high")
    assert found.config == model.config == checkpoint.read_config(tmp_path / "model")
    assert jax.tree.structure(found.params) == jax.tree.structure(model.params)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        assert x.dtype == y.dtype == dtype and np.array_equal(x, y)
    assert found.tokenizer("w2 w39 unheard-of")["input_ids"][:2] == [2, 39]


def test_a_loaded_checkpoint_gives_the_same_logits(tmp_path, random_model):
    model = random_model()
    save(tmp_path / "model", model)
    assert_close(jm.load(tmp_path / "model")(TOKENS)[0], model(TOKENS)[0], TOLERANCES.exact)


def test_every_field_of_the_config_survives(tmp_path, random_model):
    rope = jm.Rope(500000.0, "llama3", 8.0, 1.5, 5.0, 4096)
    model = random_model(rope=rope, norm_eps=1e-5, max_positions=77, mlp_bias=True, tie_embeddings=True)
    save(tmp_path / "model", model)
    assert checkpoint.read_config(tmp_path / "model") == model.config


def test_a_checkpoint_without_a_tokenizer_loads_without_one(tmp_path, random_model):
    save(tmp_path / "model", random_model())
    assert jm.load(tmp_path / "model").tokenizer is None


def test_parameters_are_cast_while_they_are_read(tmp_path, random_model):
    model = random_model()
    save(tmp_path / "model", model)
    found = jm.load(tmp_path / "model", "bfloat16")
    assert found.config.dtype == found.config.param_dtype == "bfloat16"
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        assert x.dtype == "bfloat16" and np.array_equal(x, y.astype("bfloat16"))


def test_an_existing_checkpoint_is_kept_unless_asked(tmp_path, random_model):
    first, second = random_model(seed=0), random_model(seed=1)
    save(tmp_path / "model", first, tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="exists already"):
        save(tmp_path / "model", second)
    assert_close(jm.load(tmp_path / "model").weights["embed"], first.weights["embed"], TOLERANCES.exact)
    save(tmp_path / "model", second, overwrite=True)
    found = jm.load(tmp_path / "model")
    assert_close(found.weights["embed"], second.weights["embed"], TOLERANCES.exact)
    assert found.tokenizer is None, "the tokenizer of the first model must not stay"


def test_what_is_not_a_checkpoint_is_never_overwritten(tmp_path, random_model):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a checkpoint"):
        save(tmp_path, random_model(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_save_that_fails_leaves_no_half_checkpoint_and_the_old_one_whole(tmp_path, random_model):
    first, second = random_model(seed=0), random_model(seed=1)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "model", first, tokenizer=BrokenTokenizer())
    assert not (tmp_path / "model").exists()
    save(tmp_path / "model", first)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "model", second, tokenizer=BrokenTokenizer(), overwrite=True)
    assert_close(jm.load(tmp_path / "model").weights["embed"], first.weights["embed"], TOLERANCES.exact)
    save(tmp_path / "model", second, overwrite=True)  # the remains of the failed one are no obstacle
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
