"""Damaged and unsupported checkpoints are refused; the message says what was found, where, and what to do."""

import json
import shutil

import numpy as np
import pytest
from hf_llama import hf_model, word_tokenizer
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import jaxmech as jm
from jaxmech import checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders `single`, `sharded`, `tied` and `orbax` of good checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    hf_model().save_pretrained(root / "single")
    hf_model().save_pretrained(root / "sharded", max_shard_size="20KB")
    hf_model(tie_word_embeddings=True).save_pretrained(root / "tied")
    model = jm.load(root / "single")
    checkpoint.save(root / "orbax", model.config, model.params)
    return root


def config(remove=(), **changes):
    """Spoils config.json."""

    def spoil(path):
        fields = json.loads((path / "config.json").read_text())
        kept = {name: value for name, value in fields.items() if name not in remove}
        (path / "config.json").write_text(json.dumps(kept | changes))

    return spoil


def text(name, content):
    return lambda path: (path / name).write_text(content)


def remove(name):
    return lambda path: (path / name).unlink()


def tensors(change):
    """Spoils the tensors; `change` gets {name: array} and edits it."""

    def spoil(path):
        held = load_file(path / WEIGHTS)
        change(held)
        save_file(held, path / WEIGHTS, metadata={"format": "pt"})

    return spoil


def truncate(name, keep=0.5):
    def spoil(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(keep * len(data))])

    return spoil


def move_in_index(path):
    index = json.loads((path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][UP] = next(s for s in shards if s != index["weight_map"][UP])
    (path / INDEX).write_text(json.dumps(index))


def remove_a_shard(path):
    sorted(path.glob("*-00002-of-*.safetensors"))[0].unlink()


def truncate_orbax(path):
    for data in (path / "state").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:100])


def edit_orbax_config(path):
    file = path / "_CHECKPOINT_METADATA"
    fields = json.loads(file.read_text())
    fields["custom_metadata"]["jaxmech"]["config"]["sliding_window"] = 4
    file.write_text(json.dumps(fields))


def without_jaxmech(path):
    shutil.rmtree(path)
    ocp.save(str(path), {"w": np.ones(3)})


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}

# checkpoint, how it is spoilt, words that the message must hold: what was found, where, what to do
BAD = {
    "no such directory": ("single", shutil.rmtree, ["No checkpoint directory", "single", "Give a local directory"]),
    "no config.json": ("single", remove("config.json"), ["single holds no config.json", WEIGHTS]),
    "config.json not JSON": ("single", text("config.json", '{"a": '), ["config.json is not valid JSON", "line 1"]),
    "config.json not an object": ("single", text("config.json", "[1]"), ["config.json", "list [1]", "JSON object"]),
    "unknown model_type": ("single", config(model_type="gpt2"), ["config.json", "'gpt2'", "llama"]),
    "unknown architecture": (
        "single",
        config(architectures=["LlamaForSequenceClassification"]),
        ["config.json", "'LlamaForSequenceClassification'", "choose", "'LlamaForCausalLM'"],
    ),
    "unknown field": ("single", config(sliding_window=4), ["config.json", "sliding_window=4", "remove"]),
    "missing field": ("single", config(["vocab_size"]), ["config.json", "'vocab_size' is missing", "copy"]),
    "size not a number": ("single", config(hidden_size="32"), ["config.json", "hidden_size='32'", "positive integer"]),
    "no heads": ("single", config(num_attention_heads=0), ["config.json", "num_attention_heads=0", "positive integer"]),
    "odd head_dim": ("single", config(head_dim=7), ["config.json", "head_dim=7", "odd"]),
    "heads not a multiple of kv heads": ("single", config(num_key_value_heads=3), ["config.json", "num_kv_heads=3"]),
    "width not a multiple of heads": (
        "single",
        config(["head_dim"], hidden_size=33),
        ["config.json", "hidden_size=33", "num_attention_heads=4", "head_dim"],
    ),
    "unsupported activation": ("single", config(hidden_act="gelu"), ["config.json", "hidden_act='gelu'", "'silu'"]),
    "unsupported RoPE": ("single", config(rope_parameters=YARN), ["config.json", "'yarn'", "default, linear, llama3"]),
    "RoPE lacks a field": (
        "single",
        config(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0}),
        ["config.json", "'linear' lacks factor"],
    ),
    "RoPE with an unknown field": (
        "single",
        config(rope_parameters={"rope_type": "default", "beta_fast": 32}),
        ["config.json", "unknown fields beta_fast"],
    ),
    "RoPE on a part of the head": ("single", config(partial_rotary_factor=0.5), ["config.json", "0.5", "expected 1.0"]),
    "RoPE band of no width": (
        "single",
        config(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64}),
        ["config.json", "high_freq_factor=4", "larger than", "low_freq_factor=4"],
    ),
    "no safetensors": ("single", remove(WEIGHTS), [WEIGHTS, "found: config.json", "save_pretrained"]),
    "truncated": ("single", truncate(WEIGHTS), [f"{WEIGHTS} is not a whole safetensors file", "download it again"]),
    "not safetensors": ("single", text(WEIGHTS, "version https://git-lfs"), [WEIGHTS, "not a whole safetensors file"]),
    "wrong shape": (
        "single",
        tensors(lambda held: held.update({UP: held[UP].T.copy()})),
        [WEIGHTS, UP, "(32, 40)", "calls for (40, 32)"],
    ),
    "another width in the config": ("single", config(intermediate_size=44), [WEIGHTS, "(40, 32)", "(44, 32)"]),
    "missing tensor": ("single", tensors(lambda held: held.pop(UP)), ["lacks 1 tensors", UP, "Copy all files"]),
    "missing layer": ("single", config(num_hidden_layers=4), ["lacks 9 tensors", "model.layers.3", "and 5 more"]),
    "extra tensor": (
        "single",
        tensors(lambda held: held.update({"model.layers.0.self_attn.sinks": np.ones(4, np.float32)})),
        ["has 1 tensors", "model.layers.0.self_attn.sinks", "refused"],
    ),
    "extra layer": ("single", config(num_hidden_layers=2), ["has 9 tensors", "model.layers.2", "refused"]),
    "quantised tensor": (
        "single",
        tensors(lambda held: held.update({UP: held[UP].astype(np.int8)})),
        [WEIGHTS, UP, "I8", "BF16", "unquantised"],
    ),
    "tied, but trained unembedding": (
        "tied",
        tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1})),
        [WEIGHTS, "lm_head.weight differs", "Set tie_word_embeddings to false"],
    ),
    "tokenizer larger than the embedding": (
        "single",
        word_tokenizer(60).save_pretrained,
        ["single: the tokenizer has 60 tokens", "vocabulary 48", "copy the tokenizer"],
    ),
    "broken tokenizer": ("single", text("tokenizer.json", "{"), ["single: the tokenizer cannot be read", "copy"]),
    "missing shard": ("sharded", remove_a_shard, [INDEX, "model-00002-of-", "Copy them too"]),
    "truncated shard": ("sharded", lambda path: truncate(sorted(path.glob("*.safetensors"))[3].name)(path), ["00004"]),
    "index not JSON": ("sharded", truncate(INDEX), [INDEX, "weight_map", "download it again"]),
    "index without a map": ("sharded", text(INDEX, "{}"), [INDEX, "weight_map", "download it again"]),
    "index not an object": ("sharded", text(INDEX, '["weight_map"]'), [INDEX, "weight_map", "download it again"]),
    "index names the wrong shard": ("sharded", move_in_index, [INDEX, UP, "different versions"]),
    "Orbax without a jaxmech config": ("orbax", without_jaxmech, ["orbax", "without a jaxmech config", "convert"]),
    "Orbax with an unknown config field": ("orbax", edit_orbax_config, ["orbax", "sliding_window", "newer jaxmech"]),
    "damaged Orbax": ("orbax", truncate_orbax, ["orbax is damaged", "python -m convert"]),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax closes its event loop too soon
@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_with_a_message_that_helps(checkpoints, tmp_path, case):
    kind, spoil, words = BAD[case]
    path = tmp_path / kind
    shutil.copytree(checkpoints / kind, path)
    spoil(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        jm.load(path)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("kind", ["single", "sharded", "tied", "orbax"])
def test_the_same_checkpoints_load_when_they_are_whole(checkpoints, kind):
    logits, _ = jm.load(checkpoints / kind)(np.array([[1, 2, 3]]))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter": "lora"}, ["'lora'", "not supported", "merge"]),
        ({"dtype": "int8"}, ["'int8'", "float32, bfloat16, float16"]),
        ({"precision": "best"}, ["'best'", "highest"]),
    ],
)
def test_options_that_are_not_supported_are_refused(checkpoints, options, words):
    with pytest.raises(ValueError) as error:
        jm.load(checkpoints / "single", **options)
    assert all(word in str(error.value) for word in words), str(error.value)
