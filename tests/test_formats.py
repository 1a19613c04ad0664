"""Checkpoints other than safetensors in a local directory: PyTorch's files, Meta's release, names on the Hub."""

import json
import shutil
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_llama import LLAMA3, SIZES, hf_model
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects
from other_formats import META_SIZES, meta_tensors, save_bin, save_meta
from words import word_tokenizer

import convert
import jaxmech as jm
from convert import hub, torch_files
from convert.__main__ import main
from convert.meta import MetaTensors

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 7))


def assert_identical(found, expected) -> None:
    """Same config but for what a format does not say, same tree, same bits."""
    assert found.config.to_dict() == expected.config.to_dict()
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


# PyTorch's files


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_files_give_the_model_that_safetensors_give(tmp_path, shards):
    hf_model().save_pretrained(tmp_path / "safetensors")
    save_bin(hf_model(), tmp_path / "bin", shards)
    assert len(list((tmp_path / "bin").glob("*.bin"))) == shards
    assert_identical(jm.load(tmp_path / "bin"), jm.load(tmp_path / "safetensors"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_pytorch_files_is_kept_to_the_bit(tmp_path, dtype):
    model = hf_model(dtype=getattr(torch, dtype))
    save_bin(model, tmp_path / "bin")
    found = jm.load(tmp_path / "bin", dtype).weights["embed"]
    assert found.dtype == dtype
    assert np.array_equal(np.asarray(found).view(np.int16), model.model.embed_tokens.weight.view(torch.int16).numpy())
    assert_close(jm.load(tmp_path / "bin").weights["embed"], found, TOLERANCES.exact)


def test_parameters_and_views_in_pytorch_files_are_read_as_their_values(tmp_path):
    save_bin(hf_model(), tmp_path / "bin")
    expected = jm.load(tmp_path / "bin")
    state = hf_model().state_dict()
    state = {name: torch.nn.Parameter(x.T.contiguous().T if x.ndim == 2 else x) for name, x in state.items()}
    assert not state["lm_head.weight"].is_contiguous()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    assert_identical(jm.load(tmp_path / "bin"), expected)


def test_files_are_mapped_anew_after_as_much_as_the_largest_holds_was_read(tmp_path, monkeypatch):
    save_bin(hf_model(), tmp_path / "bin", shards=3)
    expected, loaded, load = jm.load(tmp_path / "bin"), [], torch_files._load
    monkeypatch.setattr(torch_files, "_load", lambda file: loaded.append(file) or load(file))
    monkeypatch.setattr(torch_files, "MAPPED", 10_000)
    assert_identical(jm.load(tmp_path / "bin"), expected)
    size = sum(file.stat().st_size for file in (tmp_path / "bin").glob("*.bin"))
    assert 3 + 3 < len(loaded) < 3 + 3 * (1 + size / 10_000)  # three to see what is in them


def test_pickles_with_code_are_never_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    save_bin(hf_model(), tmp_path / "bin")
    for zipped in (True, False):
        state = hf_model().state_dict() | {"extra": Touch()}
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError):
            jm.load(tmp_path / "bin")
        assert not (tmp_path / "ran").exists()


def test_only_pytorch_files_need_pytorch(tmp_path, monkeypatch):
    hf_model().save_pretrained(tmp_path / "safetensors")
    save_bin(hf_model(), tmp_path / "bin")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    config = convert.read_config(tmp_path / "bin")
    assert convert.read_params(tmp_path / "safetensors", config)
    with pytest.raises(ValueError, match=r"pytorch_model.bin was written by PyTorch.*pip install torch.*safetensors"):
        convert.read_params(tmp_path / "bin", config)


def test_safetensors_are_preferred_to_pytorch_files_and_those_to_metas(tmp_path):
    models = {name: hf_model(seed, **META_SIZES) for seed, name in enumerate(("meta", "bin", "safetensors"))}
    path = tmp_path / "all"
    save_meta(models["meta"], path)
    expected = [models["meta"].lm_head.weight]
    found = [jm.load(path).weights["unembed"]]
    for name in ("bin", "safetensors"):
        save_bin(models[name], tmp_path / name)
        shutil.copytree(tmp_path / name, path, dirs_exist_ok=True)
        if name == "safetensors":
            (path / "pytorch_model.bin").write_bytes((tmp_path / "bin" / "pytorch_model.bin").read_bytes())
            models[name].save_pretrained(path)
        expected.append(models[name].lm_head.weight)
        found.append(jm.load(path).weights["unembed"])
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y.detach().numpy().T, TOLERANCES.exact)


# Meta's release


@pytest.mark.parametrize(("parts", "embed_axis"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_meta_checkpoint_gives_the_logits_of_transformers(tmp_path, parts, embed_axis, kv_heads):
    model = hf_model(num_key_value_heads=kv_heads, **META_SIZES)
    save_meta(model, tmp_path / "meta", parts, embed_axis)
    model.save_pretrained(tmp_path / "hf")
    found = jm.load(tmp_path / "meta")
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    assert_close(found(TOKENS)[0], expected, TOLERANCES.parity)
    assert_identical(found, jm.load(tmp_path / "hf"))


def test_scaled_rope_of_a_meta_checkpoint_is_that_of_llama_3_1(tmp_path):
    rope = {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}
    model = hf_model(hidden_size=128, intermediate_size=344, **rope)  # heads with enough frequencies
    save_meta(model, tmp_path / "meta", rope_theta=500000.0, use_scaled_rope=True)
    model.save_pretrained(tmp_path / "hf")
    assert_identical(jm.load(tmp_path / "meta"), jm.load(tmp_path / "hf"))


def test_rows_of_matrices_in_parts_are_those_of_the_whole(tmp_path):
    model = hf_model(**META_SIZES)
    save_meta(model, tmp_path / "meta", parts=4, embed_axis=0)
    tensors, whole = MetaTensors(tmp_path / "meta"), meta_tensors(model)
    layer = "layers.1.attention."
    for name in ("tok_embeddings.weight", layer + "wo.weight", layer + "wq.weight", layer[:-1] + "_norm.weight"):
        for rows in (slice(0, 3), slice(5, 21), slice(8, 16), slice(30, 32), None):
            assert np.array_equal(tensors.read(name, rows), whole[name][rows or slice(None)].numpy()), (name, rows)


LLAMA_2 = {"norm_eps": 1e-5, "vocab_size": 32000}
LLAMA_3 = {"norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 500000.0, "n_kv_heads": 8}
# params.json of the releases; width of the MLP, RoPE factor and context length in their config.json on the Hub
RELEASES = {
    "Llama 2 7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, **LLAMA_2}, 11008, None, 2048),
    "Llama 2 70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, **LLAMA_2}
        | {"n_kv_heads": 8},
        28672,
        None,
        2048,  # the release's is 4096; see `convert.meta`
    ),
    "Code Llama 7B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "rope_theta": 1e6}
        | {"norm_eps": 1e-5, "vocab_size": 32016},
        11008,
        None,
        16384,
    ),
    "Llama 3 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **LLAMA_3},
        14336,
        None,
        8192,
    ),
    "Llama 3.1 405B": (
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, **LLAMA_3}
        | {"use_scaled_rope": True},
        53248,
        8.0,
        131072,
    ),
    "Llama 3.2 1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5, **LLAMA_3}
        | {"use_scaled_rope": True},
        8192,
        32.0,
        131072,
    ),
    "Llama 3.2 3B": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0, **LLAMA_3}
        | {"use_scaled_rope": True},
        8192,
        32.0,
        131072,
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_params_json_of_the_releases_gives_their_shapes(tmp_path, release):
    fields, mlp_width, factor, positions = RELEASES[release]
    (tmp_path / "params.json").write_text(json.dumps(fields | {"max_batch_size": 1, "max_seq_len": 512}))
    config = convert.read_config(tmp_path, dtype="bfloat16")
    assert (config.width, config.num_layers, config.num_heads) == (fields["dim"], fields["n_layers"], fields["n_heads"])
    assert config.num_kv_heads == fields.get("n_kv_heads", fields["n_heads"])
    assert config.head_dim * config.num_heads == config.width
    assert (config.vocab_size, config.mlp_width, config.max_positions) == (fields["vocab_size"], mlp_width, positions)
    assert config.rope.theta == fields.get("rope_theta", 10000.0)
    assert config.rope.kind == ("llama3" if factor else "default") and config.rope.factor == (factor or 1.0)
    assert config.dtype == "bfloat16" and config.family == "llama" and not config.tie_embeddings


# Names on the Hub


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A folder whose folders are repositories; what is downloaded from them is a copy of the files asked for."""
    root = tmp_path / "on the hub"

    def download(name, *, revision, allow_patterns, ignore_patterns):
        name = name if revision is None else f"{name}@{revision}"
        if not (root / name).exists():
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        files = [str(file.relative_to(root / name)) for file in (root / name).rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            target = tmp_path / "cache" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name / file, target)
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return root


def downloaded(path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_a_name_on_the_hub_loads_the_model_and_only_the_files_needed(tmp_path, on_the_hub):
    path = on_the_hub / "org" / "model"
    hf_model().save_pretrained(path, max_shard_size="20KB")
    word_tokenizer().save_pretrained(path)
    needed = downloaded(path) - {"generation_config.json"}
    save_meta(hf_model(**META_SIZES), path / "original")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling.py", "onnx/model.safetensors", "README.md"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("not needed")
    assert_identical(jm.load("org/model"), jm.load(path))
    assert downloaded(tmp_path / "cache" / "org" / "model") == needed
    assert jm.load("org/model").tokenizer("w3")["input_ids"] == [3]


def test_a_revision_is_that_of_the_hub(tmp_path, on_the_hub):
    hf_model().save_pretrained(on_the_hub / "org" / "model")
    save_bin(hf_model(num_hidden_layers=1), on_the_hub / "org" / "model@step100")
    assert_identical(jm.load("org/model", revision="step100"), jm.load(on_the_hub / "org" / "model@step100"))
    assert jm.load("org/model").config.num_layers != 1
    with pytest.raises(FileNotFoundError, match="org/model on the Hugging Face Hub has no revision 'step7'"):
        jm.load("org/model", revision="step7")
    for local in (on_the_hub / "org" / "model", "nowhere"):
        with pytest.raises(ValueError, match="revision='main', but .* is no model on the Hub"):
            jm.load(local, revision="main")


def test_older_formats_are_downloaded_where_there_is_no_newer_one(tmp_path, on_the_hub):
    save_bin(hf_model(), on_the_hub / "org" / "bin", shards=3)
    (on_the_hub / "org" / "bin" / "training_args.bin").write_text("not needed")
    assert_identical(jm.load("org/bin"), jm.load(on_the_hub / "org" / "bin"))
    assert "training_args.bin" not in downloaded(tmp_path / "cache" / "org" / "bin")
    save_meta(hf_model(**META_SIZES), on_the_hub / "org" / "meta", parts=2)
    assert_identical(jm.load("org/meta"), jm.load(on_the_hub / "org" / "meta"))


def test_a_local_directory_is_preferred_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    hf_model().save_pretrained(tmp_path / "org" / "model")
    assert_identical(jm.load("org/model"), jm.load(tmp_path / "org" / "model"))


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "a/b/c", "gpt2", "https://huggingface.co/org/model"])
def test_what_is_neither_a_directory_nor_a_name_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="No checkpoint directory"):
        jm.load(name)


def test_the_command_converts_a_model_on_the_hub(tmp_path, on_the_hub):
    hf_model().save_pretrained(on_the_hub / "org" / "model")
    main(["--model", "org/model", "--out", str(tmp_path / "orbax")])
    assert_identical(jm.load(tmp_path / "orbax"), jm.load(on_the_hub / "org" / "model"))


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"org/model.*cannot be reached.*hf download org/model --local-dir"):
        jm.load("org/model")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RepositoryNotFoundError, ["No directory at org/model", "no model of this name", "hf auth login"]),
        (GatedRepoError, ["org/model", "terms", "https://huggingface.co/org/model", "HF_TOKEN"]),
        (huggingface_hub.errors.HTTPError, ["org/model", "cannot be downloaded", "Try again", "--local-dir"]),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, kind, words):
    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(OSError) as error:
        jm.load("org/model")
    assert all(word in str(error.value) for word in words), str(error.value)
