"""Damaged and unsupported checkpoints are refused; the message says what was found, where, and what to do."""

import json
import shutil

import numpy as np
import pytest
import torch
from hf_llama import hf_model
from orbax.checkpoint import v1 as ocp
from other_formats import META_SIZES, save_bin, save_meta
from safetensors.numpy import load_file, save_file
from words import word_tokenizer

import jaxmech as jm
from jaxmech import checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PART = "consolidated.01.pth"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders `single`, `sharded`, `tied`, `orbax`, `bin`, `bin-sharded` and `meta` (two parts) of good checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    hf_model().save_pretrained(root / "single")
    hf_model().save_pretrained(root / "sharded", max_shard_size="20KB")
    hf_model(tie_word_embeddings=True).save_pretrained(root / "tied")
    model = jm.load(root / "single")
    checkpoint.save(root / "orbax", model.config, model.params)
    save_bin(hf_model(), root / "bin")
    save_bin(hf_model(), root / "bin-sharded", shards=3)
    save_meta(hf_model(**META_SIZES), root / "meta", parts=2)
    return root


def config(remove=(), file="config.json", **changes):
    """Spoils config.json, or another file like it."""

    def spoil(path):
        fields = json.loads((path / file).read_text())
        kept = {name: value for name, value in fields.items() if name not in remove}
        (path / file).write_text(json.dumps(kept | changes))

    return spoil


def params(remove=(), **changes):
    """Spoils Meta's params.json."""
    return config(remove, "params.json", **changes)


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


def torch_tensors(change, name=BIN):
    """Spoils what a file of PyTorch holds; `change` gets {name: tensor} and edits it."""

    def spoil(path):
        held = torch.load(path / name)
        change(held)
        torch.save(held, path / name)

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


def infinite(held):
    held[UP][3, 2] = -np.inf


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
    "unsupported RoPE": (
        "single",
        config(rope_parameters={"rope_type": "mrope", "rope_theta": 10000.0}),
        ["config.json", "'mrope'", "default, linear, dynamic, llama3"],
    ),
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
    "RoPE with a factor that is null": (
        "single",
        config(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": None}),
        ["config.json", "'linear' lacks factor"],
    ),
    "RoPE with a factor that is no number": (
        "single",
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": "4"}),
        ["config.json", "factor='4'", "positive number"],
    ),
    "longrope with one factor for all": (
        "single",
        config(rope_parameters={"rope_type": "longrope", "rope_theta": 1.0, "short_factor": 1.0, "long_factor": [1.0]}),
        ["config.json", "short_factor", "each"],
    ),
    "Gemma 2 without a scale of scores": (
        "single",
        config(model_type="gemma2", architectures=["Gemma2ForCausalLM"], query_pre_attn_scalar=None),
        ["config.json", "query_pre_attn_scalar=None", "positive number"],
    ),
    "Qwen with windows from no layer": (
        "single",
        config(
            ["attention_bias", "mlp_bias"],
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            use_sliding_window=True,
            max_window_layers="2",
        ),
        ["config.json", "max_window_layers='2'", "number of layers"],
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
    "NaN": ("single", tensors(lambda held: held[UP].fill(np.nan)), [WEIGHTS, UP, "NaN", "choose an earlier"]),
    "one infinity": ("single", tensors(infinite), [WEIGHTS, UP, "infinity", "choose an earlier"]),
    "too large for float32": (
        "single",
        tensors(lambda held: held.update({UP: 1e300 * held[UP].astype(np.float64)})),
        [WEIGHTS, UP, "too large for float32"],
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
    "pickle with code": (
        "bin",
        torch_tensors(lambda held: held.update(run=shutil.rmtree)),
        [BIN, "more than tensors (shutil.rmtree)", "could run code", "save_pretrained"],
    ),
    "truncated .bin": ("bin", truncate(BIN), [BIN, "not a whole file of torch.save", "download it again"]),
    ".bin of before PyTorch 1.6": (
        "bin",
        lambda path: torch.save(torch.load(path / BIN), path / BIN, _use_new_zipfile_serialization=False),
        [BIN, "not a whole file of torch.save, PyTorch 1.6 or later"],
    ),
    ".bin is not PyTorch's": ("bin", text(BIN, "version https://git-lfs"), [BIN, "not a whole file of torch.save"]),
    ".bin with more than tensors": (
        "bin",
        torch_tensors(lambda held: held.update(step=3)),
        [BIN, "holds a int at 'step'", "expected tensors only", "state_dict()"],
    ),
    ".bin without names": (
        "bin",
        lambda path: torch.save([torch.ones(3)], path / BIN),
        [BIN, "holds a list", "expected a dictionary", "state_dict()"],
    ),
    "quantised tensor in .bin": (
        "bin",
        torch_tensors(lambda held: held.update({UP: held[UP].to(torch.int8)})),
        [BIN, UP, "torch.int8", "BF16", "unquantised"],
    ),
    "NaN in .bin": ("bin", torch_tensors(lambda held: held[UP].fill_(np.nan)), [BIN, UP, "NaN", "choose an earlier"]),
    "missing .bin shard": (
        "bin-sharded",
        lambda path: sorted(path.glob("*.bin"))[1].unlink(),
        [BIN_INDEX, "pytorch_model-00002-of-00003.bin", "Copy them too"],
    ),
    "Meta: unknown field": ("meta", params(vision_chunk_size=448), ["params.json", "vision_chunk_size=448", "remove"]),
    "Meta: missing field": ("meta", params(["dim"]), ["params.json", "'dim' is missing", "copy"]),
    "Meta: size not a number": ("meta", params(n_layers="3"), ["params.json", "n_layers='3'", "positive integer"]),
    "Meta: width not a multiple of heads": ("meta", params(n_heads=5), ["params.json", "dim=32", "n_heads=5"]),
    "Meta: MLP of no width": ("meta", params(ffn_dim_multiplier=0), ["params.json", "multiplier=0", "positive number"]),
    "Meta: params.json not JSON": ("meta", text("params.json", "{"), ["params.json is not valid JSON", "line 1"]),
    "Meta: missing part": ("meta", remove(PART.replace("1", "0")), ["lacks consolidated.00.pth", "Copy all parts"]),
    "Meta: missing last part": (
        "meta",
        remove(PART),
        ["consolidated.00.pth", "in each of 1 parts", "params.json calls for", "part is missing"],
    ),
    "Meta: parts of other models": (
        "meta",
        torch_tensors(lambda held: held.update({"output.weight": held["output.weight"][:-1].clone()}), PART),
        [PART, "output.weight", "(23, 32)", "(24, 32)", "different models"],
    ),
    "Meta: parts with other norms": (
        "meta",
        torch_tensors(lambda held: held["norm.weight"].add_(1), PART),
        ["norm.weight differs between the parts", "different models"],
    ),
    "Meta: another width in params.json": (
        "meta",
        params(multiple_of=7, vocab_size=48),
        ["feed_forward.w1.weight", "(44, 32)", "2 parts", "(91, 32)"],
    ),
    "Meta: no weights to read the vocabulary off": (
        "meta",
        lambda path: [file.unlink() for file in path.glob("*.pth")],
        ["params.json has no vocab_size", "consolidated.*.pth", "Copy the weights"],
    ),
    "Meta: truncated part": ("meta", truncate(PART), [PART, "not a whole file of torch.save", "download it again"]),
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


@pytest.mark.parametrize("kind", ["single", "sharded", "tied", "orbax", "bin", "bin-sharded", "meta"])
def test_the_same_checkpoints_load_when_they_are_whole(checkpoints, kind):
    logits, _ = jm.load(checkpoints / kind)(np.array([[1, 2, 3]]))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, ["'int8'", "float32, bfloat16, float16"]),
        ({"precision": "best"}, ["'best'", "highest"]),
    ],
)
def test_options_that_are_not_supported_are_refused(checkpoints, options, words):
    with pytest.raises(ValueError) as error:
        jm.load(checkpoints / "single", **options)
    assert all(word in str(error.value) for word in words), str(error.value)
