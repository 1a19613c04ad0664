"""Orbax checkpoints: bit-identical on any devices, all that belongs to the model inside, nothing left half done."""

import hashlib
import json
import time
from datetime import UTC, datetime
from importlib import metadata

import jax
import numpy as np
import pytest
import tensorstore as ts
from conftest import TOLERANCES, assert_close
from words import word_tokenizer

import convert
import jaxmech as jm
from convert.__main__ import main as convert_main
from jaxmech import checkpoint, host_arrays, provenance
from jaxmech.provenance import Provenance, hashing

TOKENS = np.arange(20).reshape(2, 10)


class BrokenTokenizer:
    def save_pretrained(self, path):
        raise OSError("disk full")


def save(path, model, **options):
    checkpoint.save(path, model.config, model.params, **options)


def on_devices(model: jm.Model, count: int) -> jm.Model:
    """The model, its parameters split over so many devices."""
    mesh = jm.make_mesh(jax.devices()[:count])
    return jm.Model(model.config, {"params": jax.device_put(model.weights, jm.parameter_shardings(model.config, mesh))})


def change_metadata(path, change) -> None:
    """Edits what `save` wrote beside the parameters."""
    file = path / "_CHECKPOINT_METADATA"
    fields = json.loads(file.read_text())
    change(fields["custom_metadata"]["jaxmech"])
    file.write_text(json.dumps(fields))


def bytes_read(function) -> int:
    """How many bytes `function` reads from files."""

    def total() -> int:
        found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for metric in found for value in metric["values"])

    before = total()
    function()
    return total() - before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_keeps_every_bit_the_config_and_the_tokenizer(tmp_path, random_model, dtype):
    model = random_model(num_kv_heads=2, attention_bias=True, output_bias=True)
    config = model.config.replace(dtype=dtype, param_dtype=dtype, precision="high")
    model = jm.Model(config, jax.tree.map(lambda x: x.astype(dtype), model.params))
    save(tmp_path / "model", model, tokenizer=word_tokenizer())
    found = jm.load(tmp_path / "model", dtype, precision="high")
    assert found.config.to_dict() == model.config.to_dict() == checkpoint.read_config(tmp_path / "model").to_dict()
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


def test_numbers_too_large_for_float16_are_refused(tmp_path, random_model):
    model = random_model()
    params = {"params": {**model.weights, "final_norm": model.weights["final_norm"].at[3].set(7e4)}}
    save(tmp_path / "model", jm.Model(model.config, params))
    jm.load(tmp_path / "model", "bfloat16")
    with pytest.raises(ValueError, match="too large for float16; choose float32 or bfloat16"):
        jm.load(tmp_path / "model", "float16")


def test_parameters_on_the_cpu_are_the_memory_that_was_read_into(tmp_path, random_model, monkeypatch):
    save(tmp_path / "model", random_model())
    arrays, empty = [], host_arrays.empty
    monkeypatch.setattr(host_arrays, "empty", lambda *args: arrays.append(empty(*args)) or arrays[-1])
    found = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(jm.load(tmp_path / "model").params)}
    assert found == {array.ctypes.data for array in arrays}


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


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 4), (8, 1)])
def test_a_checkpoint_is_read_onto_other_devices_than_it_was_saved_from(tmp_path, random_model, before, after):
    model = random_model(num_heads=8, num_kv_heads=4, mlp_width=48, vocab_size=64)
    save(tmp_path / "model", on_devices(model, before) if before > 1 else model)
    mesh = jm.make_mesh(jax.devices()[:after]) if after > 1 else None
    found = jm.load(tmp_path / "model", mesh=mesh)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(found.params)} == {after}
    assert found.weights["blocks"]["q"].addressable_shards[0].data.shape[2] == 8 // after
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_read_alone(tmp_path, random_model, devices, dtype):
    model = random_model(num_heads=8, num_kv_heads=4, param_dtype=dtype)
    save(tmp_path / "model", on_devices(model, devices) if devices > 1 else model)
    found = checkpoint.read_layers(tmp_path / "model", [3, 1])
    assert found.keys() == model.weights["blocks"].keys()
    for name, array in found.items():
        assert isinstance(array, np.ndarray) and array.dtype == dtype
        np.testing.assert_array_equal(array, model.weights["blocks"][name][np.array([3, 1])])
    few = checkpoint.read_layers(tmp_path / "model", [0], ["down", "q"])
    assert list(few) == ["down", "q"] and few["q"].shape == (1, 24, 8, 8)


def test_no_more_is_read_than_the_layers_asked_for(tmp_path, random_model):
    # Weights of megabytes: threads that race read an index of 5 kB each, several times over.
    model = random_model(num_layers=8, width=128, mlp_width=512)
    save(tmp_path / "model", model)
    whole = bytes_read(lambda: jm.load(tmp_path / "model"))
    one = bytes_read(lambda: checkpoint.read_layers(tmp_path / "model", [5]))
    size = sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert whole >= size, "this does not count what is read"
    assert one < size / 6


@pytest.mark.parametrize(
    ("layers", "names", "words"),
    [([4], None, ["no layer 4", "0..3"]), ([-1], None, ["no layer -1"]), ([0], ["w_q"], ["'w_q'", "attn_norm, "])],
    ids=str,
)
def test_layers_and_names_that_are_not_there_are_refused(tmp_path, random_model, layers, names, words):
    save(tmp_path / "model", random_model())
    with pytest.raises(ValueError) as error:
        checkpoint.read_layers(tmp_path / "model", layers, names)
    assert all(word in str(error.value) for word in words)


def test_a_checkpoint_says_where_it_comes_from(tmp_path, random_model):
    source = Provenance("org/model", "lora", {"config.json": "ab", "adapter/adapter_config.json": "cd"})
    save(tmp_path / "model", random_model(), provenance=source)
    found = checkpoint.read_provenance(tmp_path / "model")
    assert (found.source, found.adapter, found.files) == (source.source, source.adapter, source.files)
    assert found.versions["jax"] == jax.__version__
    assert found.versions["orbax-checkpoint"] == metadata.version("orbax-checkpoint")
    assert found.versions.keys() == {"jaxmech", "jax", "orbax-checkpoint", "transformers"}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found.date)).total_seconds()) < 600


def test_a_conversion_stores_the_source_as_it_was_given_and_the_hashes_of_its_files(
    tmp_path, random_model, monkeypatch
):
    model = random_model()
    convert.write_hf(tmp_path / "here", model.config, model.params)
    monkeypatch.chdir(tmp_path)
    convert_main(["--model", "here", "--out", "out"])
    found = checkpoint.read_provenance(tmp_path / "out")
    assert (found.source, found.adapter) == ("here", "")
    assert found.files == {
        name: hashlib.sha256((tmp_path / "here" / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    assert str(tmp_path) not in (tmp_path / "out" / "_CHECKPOINT_METADATA").read_text()


@pytest.mark.parametrize(
    ("there", "read"),
    [
        ("config.json model.safetensors pytorch_model.bin tokenizer.json", "config.json model.safetensors"),
        ("config.json pytorch_model.bin", "config.json pytorch_model.bin"),
        ("params.json consolidated.00.pth consolidated.01.pth", "params.json consolidated.00.pth consolidated.01.pth"),
    ],
)
def test_the_files_that_are_hashed_are_those_that_are_read(tmp_path, there, read):
    for name in (*there.split(), "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert convert.source_files(tmp_path) == {name: tmp_path / name for name in read.split()}
    adapter = convert.source_files(tmp_path, tmp_path).keys() - read.split()
    assert adapter == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_shards_and_their_index_are_hashed(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors", "c": "d.safetensors"}}))
    for name in ("b.safetensors", "d.safetensors", "config.json"):
        (tmp_path / name).touch()
    names = ("config.json", index.name, "b.safetensors", "d.safetensors")
    assert convert.source_files(tmp_path) == {name: tmp_path / name for name in names}


def test_hashing_ends_when_what_it_runs_beside_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PIECE", 1)
    (tmp_path / "large").write_bytes(bytes(1000))
    seen = []

    def slowly(done: int, total: int) -> None:
        seen.append((done, total))
        time.sleep(0.01)

    with pytest.raises(ValueError, match="damaged"), hashing({"large": tmp_path / "large"}, slowly):
        raise ValueError("damaged")
    assert len(seen) < 500
    with hashing({"large": tmp_path / "large"}, lambda done, total: seen.append((done, total))) as future:
        assert future.result() == {"large": hashlib.sha256(bytes(1000)).hexdigest()}
    assert seen[-1] == (1000, 1000)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, random_model):
    save(tmp_path / "model", random_model())
    change_metadata(tmp_path / "model", lambda saved: saved.update(format=1))
    for read in (jm.load, checkpoint.read_provenance, checkpoint.check):
        with pytest.raises(ValueError, match=r"format 1; this version reads format 2\. Convert .* again"):
            read(tmp_path / "model")


@pytest.mark.parametrize("finite", [True, False])
def test_what_a_checkpoint_holds_is_checked(tmp_path, random_model, finite):
    seen = []
    save(tmp_path / "model", random_model())
    checkpoint.check(tmp_path / "model", finite=finite, progress=lambda *counts: seen.append(counts))
    assert seen == ([(i, 12) for i in range(1, 13)] if finite else [])
    change_metadata(tmp_path / "model", lambda saved: saved["config"].update(mlp_width=41))
    with pytest.raises(ValueError, match=r"damaged.*blocks.down is float32\[4, 40, 24\]"):
        checkpoint.check(tmp_path / "model", finite=finite)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax closes its event loop too soon
def test_numbers_that_are_not_finite_or_not_there_are_found(tmp_path, random_model):
    model = random_model()
    up = model.weights["blocks"]["up"].at[2, 0, 0].set(np.inf)
    spoiled = jm.Model(model.config, {"params": {**model.weights, "blocks": {**model.weights["blocks"], "up": up}}})
    save(tmp_path / "model", spoiled)
    checkpoint.check(tmp_path / "model")
    with pytest.raises(ValueError, match=r"blocks\.up holds numbers that are not finite"):
        checkpoint.check(tmp_path / "model", finite=True)
    for data in (tmp_path / "model" / "state").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="model is damaged"):
        checkpoint.check(tmp_path / "model", finite=True)
