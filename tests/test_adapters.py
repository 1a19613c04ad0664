"""LoRA adapters: logits as PEFT's own, the same bits however an adapter is spelt, and refusals that help."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close
from hf_families import family_model
from hf_llama import SIZES
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from words import word_tokenizer

import convert
import jaxmech as jm
from convert import params
from convert.__main__ import main
from convert.adapters import AdaptedTensors, Adapter, merging
from convert.adapters.config import UNSUPPORTED
from convert.families import META
from convert.tensors import open_tensors
from jaxmech import cli
from jaxmech.study import Settings
from jaxmech.study.models import check_models, known
from jaxmech.study.stages import Study

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
TIED = {"tie_word_embeddings": True}
ENDS = ["embed_tokens", "lm_head"]

# family, changes of its config, fields of PEFT's LoraConfig
CASES = {
    "LoRA": ("llama", {}, {}),
    "all linear": ("llama", {}, {"target_modules": "all-linear"}),
    "by regular expression": ("llama", {}, {"target_modules": r".*\.[02]\.self_attn\.[qk]_proj"}),
    "in some layers": ("llama", {}, {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "not in all": (
        "llama",
        {},
        {"exclude_modules": ["1.self_attn.q_proj", "down_proj"], "target_modules": "all-linear"},
    ),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {
            "rank_pattern": {"q_proj": 2, r"model\.layers\.[12]\.self_attn\.v_proj": 3, "roj": 7},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 11, "v_proj": 1},
        },
    ),
    "DoRA": ("llama", {}, {"target_modules": "all-linear", "use_dora": True}),
    "biases": ("llama", {}, {"bias": "all"}),
    "biases of LoRA's modules": ("llama", {}, {"bias": "lora_only"}),
    "LoRA in biases": ("llama", {}, {"lora_bias": True}),
    "LoRA beside whole modules": ("llama", {}, {"target_modules": "all-linear", "modules_to_save": ["o_proj"]}),
    "whole modules": ("llama", {}, {"modules_to_save": [*ENDS, "norm"]}),
    "embeddings": ("llama", {}, {"target_modules": ["q_proj", *ENDS]}),
    "DoRA in embeddings": ("llama", {}, {"target_modules": ["q_proj", *ENDS], "use_dora": True}),
    "tied, LoRA in the embedding": ("llama", TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, LoRA in the unembedding": ("llama", TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "tied, LoRA in both": ("llama", TIED, {"target_modules": ENDS}),
    "tied, LoRA in both alike": ("llama", TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, own embedding": ("llama", TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied, own unembedding": ("llama", TIED, {"modules_to_save": ["lm_head"]}),
    "tied, own both alike": ("llama", TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "Qwen2": ("qwen2", {}, {"target_modules": "all-linear", "bias": "all"}),
    "Gemma 2": ("gemma2", {}, {"target_modules": ["o_proj", "gate_proj", "embed_tokens"]}),
    "Phi-3": ("phi3", {}, {"target_modules": "all-linear"}),
    "Phi-3, DoRA": ("phi3", {}, {"target_modules": "all-linear", "use_dora": True}),
    "OLMo 2": ("olmo2", {}, {"modules_to_save": ["q_norm", "post_feedforward_layernorm"]}),
}
# fields of LoraConfig, changes of the base's config; the vocabulary has been made larger
RESIZED = {
    "saved beside LoRA": ({}, {}),
    "saved beside LoRA, tied": ({}, TIED),
    "whole modules": ({"modules_to_save": ENDS}, {}),
    "whole embedding": ({"modules_to_save": ["embed_tokens"]}, {}),
    "whole embedding, tied": ({"modules_to_save": ["embed_tokens"]}, TIED),
    "LoRA in embeddings": ({"target_modules": ["q_proj", *ENDS]}, {}),
    "LoRA in the embedding, tied": ({"target_modules": ["q_proj", "embed_tokens"]}, TIED),
    "LoRA in the unembedding, tied": ({"target_modules": ["q_proj", "lm_head"]}, TIED),
}


def peft_model(base, path, vocab: int | None = None, **fields):
    """PEFT's model of the checkpoint `base` with a random adapter, which is saved to `path`."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if vocab is not None:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6} | fields
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    return model.eval()


def logits(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def write_adapter(path, tensors, **fields) -> None:
    """Writes an adapter by hand; `tensors` by their names in the base."""
    path.mkdir()
    save_file({PREFIX + name: x for name, x in tensors.items()}, path / WEIGHTS, metadata={"format": "pt"})
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "base_model_name_or_path": "B"}
    (path / CONFIG).write_text(json.dumps(plain | fields))


def q_lora(layers=SIZES["num_hidden_layers"], rank=2, width=SIZES["hidden_size"]) -> dict[str, np.ndarray]:
    """LoRA in every q_proj."""
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (rank, width), "lora_B": (SIZES["hidden_size"], rank)}
    return {
        f"model.layers.{i}.self_attn.q_proj.{part}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(layers)
        for part, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of bases: `plain`, `tied`, `biased`, `phi3`, and `plain` converted, `orbax`."""
    root = tmp_path_factory.mktemp("bases")
    none = {"attention_bias": False, "mlp_bias": False}
    family_model("llama", **none).save_pretrained(root / "plain")
    family_model("llama", **none, **TIED).save_pretrained(root / "tied")
    family_model("llama").save_pretrained(root / "biased")
    family_model("phi3").save_pretrained(root / "phi3")
    main(["--model", str(root / "plain"), "--out", str(root / "orbax")])
    return root


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_logits_are_those_of_peft(tmp_path, monkeypatch, case):
    for module in (params, merging):  # so that tensors are read in several pieces
        monkeypatch.setattr(module, "PIECE", 100)
    family, changes, fields = CASES[case]
    base = family_model(family, **changes)
    base.save_pretrained(tmp_path / "base")
    theirs = peft_model(tmp_path / "base", tmp_path / "adapter", **fields)
    found, _ = jm.load(tmp_path / "base", adapter=tmp_path / "adapter", precision="highest")(TOKENS)
    expected = logits(theirs)
    assert_close(found, expected, TOLERANCES.parity)
    assert np.abs(logits(base) - expected).max() > 0.05 * np.abs(expected).max()
    if not theirs.config.tie_word_embeddings:  # PEFT merges into both of two tied modules what it computes in one
        assert_close(found, logits(theirs.merge_and_unload()), TOLERANCES.parity)


@pytest.mark.parametrize("case", RESIZED)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_may_bring_a_larger_vocabulary(bases, tmp_path, case):
    fields, changes = RESIZED[case]
    base = bases / ("tied" if changes else "plain")
    theirs = peft_model(base, tmp_path / "adapter", vocab=53, **fields)
    model = jm.load(base, adapter=tmp_path / "adapter", precision="highest")
    assert model.config.vocab_size == 53
    assert model.config.tie_embeddings == (case == "saved beside LoRA, tied")
    tokens = np.concatenate([TOKENS, [[52, 51, 50, 49, 48, 1, 2, 3, 52]]])
    assert_close(model(tokens)[0], logits(theirs, tokens), TOLERANCES.parity)


def test_lora_is_the_product_of_its_matrices_times_alpha_over_rank(bases, tmp_path):
    lora = q_lora()
    write_adapter(tmp_path / "adapter", lora)
    before, after = (jm.load(bases / "plain", adapter=a).weights["blocks"] for a in (None, tmp_path / "adapter"))
    for i, x in enumerate(np.asarray(after["q"] - before["q"])):
        a, b = (lora[f"model.layers.{i}.self_attn.q_proj.{part}.weight"] for part in ("lora_A", "lora_B"))
        np.testing.assert_allclose(x.reshape(x.shape[0], -1).T, 1.5 * b @ a, atol=1e-5)
    assert all(np.array_equal(before[name], after[name]) for name in before.keys() - {"q"})


@pytest.mark.parametrize(("rows", "rank", "columns"), [(7, 16, 300), (300, 2000, 23), (1, 1, 1)])
def test_a_product_in_tiles_is_the_product(rows, rank, columns):
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, rank), (columns, rank)))
    np.testing.assert_allclose(merging.product(left, right.T), left @ right.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_merging_is_in_float32_and_the_cast_comes_after_it(bases, tmp_path, stored):
    AutoModelForCausalLM.from_pretrained(bases / "plain", dtype=stored).save_pretrained(tmp_path / "base")
    lora = {name: x.astype(ml_dtypes.bfloat16) for name, x in q_lora().items()}
    write_adapter(tmp_path / "adapter", lora)
    full, half = (jm.load(tmp_path / "base", dtype, tmp_path / "adapter") for dtype in ("float32", "bfloat16"))
    for x, y in zip(jax.tree.leaves(full.params), jax.tree.leaves(half.params), strict=True):
        assert y.dtype == "bfloat16" and np.array_equal(x.astype("bfloat16"), y)
    base = jm.load(tmp_path / "base", "bfloat16").weights["blocks"]["q"][0].reshape(SIZES["hidden_size"], -1)
    a, b = (lora[f"model.layers.0.self_attn.q_proj.{part}.weight"].astype(np.float32) for part in ("lora_A", "lora_B"))
    in_bfloat16 = base + (1.5 * b @ a).T.astype("bfloat16")
    assert not np.array_equal(in_bfloat16, half.weights["blocks"]["q"][0].reshape(base.shape))


def renamed(path, rename) -> dict[str, np.ndarray]:
    return {rename(name): x for name, x in load_file(path / WEIGHTS).items()}


def named(name: str) -> str:
    """The tensor's name in PEFT's own model, where that of the adapter is part of it."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.", f".{part}.other.") if f".{part}." in name else name
        name = f"{name}.other" if name.endswith(f".{part}") else name
    return name.replace("model.norm.weight", "model.norm.modules_to_save.other.weight")


@pytest.mark.parametrize("spelling", ["named", "without prefix", "torch.save"])
def test_every_spelling_of_an_adapter_gives_the_same_bits(bases, tmp_path, spelling):
    fields = {"target_modules": ["q_proj", *ENDS], "use_dora": True, "modules_to_save": ["model.norm"]}
    peft_model(bases / "plain", tmp_path / "one", **fields)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    if spelling == "torch.save":
        held = {name: torch.from_numpy(x) for name, x in load_file(tmp_path / "one" / WEIGHTS).items()}
        torch.save(held, tmp_path / "other" / "adapter_model.bin")
        (tmp_path / "other" / WEIGHTS).unlink()
    else:
        rename = named if spelling == "named" else lambda name: name.removeprefix(PREFIX)
        held = renamed(tmp_path / "one", rename)
        assert len(held.keys() - load_file(tmp_path / "one" / WEIGHTS).keys()) > 10
        save_file(held, tmp_path / "other" / WEIGHTS, metadata={"format": "pt"})
    one, other = (jm.load(bases / "plain", adapter=tmp_path / name).params for name in ("one", "other"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


@pytest.mark.parametrize("dora", [False, True])
def test_some_rows_are_those_rows_of_the_whole(bases, tmp_path, dora):
    fields = {"use_dora": True, "target_modules": ["q_proj", *ENDS]} if dora else {"lora_bias": True}
    peft_model(bases / "biased", tmp_path, modules_to_save=["k_proj"], **fields)
    base, adapter = convert.read_config(bases / "biased"), Adapter.open(tmp_path)
    tensors = AdaptedTensors(open_tensors(bases / "biased"), base, adapter)
    assert {name.rpartition(".")[0] for name in tensors.names} >= {*adapter.lora}
    for name in tensors.names:
        whole = tensors.read(name)
        assert whole.shape == tensors.shape(name)
        np.testing.assert_allclose(tensors.read(name, slice(3, 17)), whole[3:17], rtol=1e-5, atol=1e-6)


def test_the_tokenizer_of_the_adapter_is_preferred_to_that_of_the_base(bases, tmp_path):
    shutil.copytree(bases / "plain", tmp_path / "base")
    write_adapter(tmp_path / "adapter", q_lora())
    word_tokenizer(30).save_pretrained(tmp_path / "base")
    assert len(jm.load(tmp_path / "base", adapter=tmp_path / "adapter").tokenizer) == 30
    word_tokenizer(40).save_pretrained(tmp_path / "adapter")
    assert len(jm.load(tmp_path / "base", adapter=tmp_path / "adapter").tokenizer) == 40
    assert len(jm.load(tmp_path / "base").tokenizer) == 30


def test_the_command_merges_an_adapter(bases, tmp_path):
    write_adapter(tmp_path / "adapter", q_lora())
    main(["--model", str(bases / "plain"), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")])
    found, expected = jm.load(tmp_path / "out"), jm.load(bases / "plain", adapter=tmp_path / "adapter")
    assert found.config.to_dict() == expected.config.to_dict()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found.params, expected.params)))
    assert not np.array_equal(found.weights["blocks"]["q"], jm.load(bases / "plain").weights["blocks"]["q"])


def test_discover_merges_an_adapter(tmp_path, monkeypatch, capsys):
    def load(*arguments, **options):
        raise ValueError(f"loaded {arguments}")

    read = []
    demo = known(jm.demo.path("base"), None, {})
    monkeypatch.setattr(cli, "known", lambda *paths: read.append(paths[:2]) or demo)
    monkeypatch.setattr(cli, "fingerprint", str)
    monkeypatch.setattr(jm, "load", load)
    command = ["discover", "--model", "base", "--adapter", "lora", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert f"loaded {(Path('base'), 'float32', Path('lora'))}" in capsys.readouterr().err
    assert read == [(Path("base"), Path("lora"))]


def test_a_study_takes_an_adapter_as_a_fine_tuned_model(tmp_path):
    base = jm.demo.path("base")
    config = convert.read_config(base)
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, config.width), "lora_B": (config.num_heads * config.head_dim, 2)}
    lora = {
        f"model.layers.{i}.self_attn.q_proj.{part}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(config.num_layers)
        for part, shape in shapes.items()
    }
    write_adapter(tmp_path / "adapter", lora)
    study = Study(Settings(base=base, tuned=(tmp_path / "adapter", jm.demo.path("tuned"))), {})
    expected = jm.load(base, adapter=tmp_path / "adapter")
    found = study.model("adapter")
    assert found.tokenizer is not None
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found.params, expected.params)))
    tuned = jm.load(jm.demo.path("tuned"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, study.model("tuned").params, tuned.params)))


def test_a_study_of_an_adapter_of_another_model_does_not_begin(tmp_path):
    write_adapter(tmp_path / "adapter", q_lora())
    with pytest.raises(ValueError, match=r"q_proj.*has shape \(.*expected"):
        check_models(jm.demo.path("base"), [tmp_path / "adapter"], [])


def config(**changes):
    """Spoils adapter_config.json."""

    def spoil(path):
        fields = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(fields | changes))

    return spoil


def tensors(added=None, removed=(), **changes):
    """Spoils the tensors, given by their names in the base, and adapter_config.json."""

    def spoil(path):
        held = load_file(path / WEIGHTS) | {PREFIX + name: np.asarray(x) for name, x in (added or {}).items()}
        kept = {name: x for name, x in held.items() if name.removeprefix(PREFIX) not in removed}
        save_file(kept, path / WEIGHTS, metadata={"format": "pt"})
        config(**changes)(path)

    return spoil


def text(name, content):
    return lambda path: (path / name).write_text(content)


def other(**options):
    """Replaces the adapter by one for another model."""

    def spoil(path):
        shutil.rmtree(path)
        write_adapter(path, q_lora(**options))

    return spoil


def truncate(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def ones(*shape):
    return np.ones(shape, np.float32)


D, V = SIZES["hidden_size"], SIZES["vocab_size"]
Q, EMBED, HEAD, NORM = "model.layers.1.self_attn.q_proj", "model.embed_tokens", "lm_head", "model.norm"
EMBED_LORA = {f"{EMBED}.lora_embedding_A": ones(2, V), f"{EMBED}.lora_embedding_B": ones(D, 2)}
# base, how a good adapter is spoilt, words that the message must hold: what was found, where, what to do
BAD = {
    "no directory": ("plain", shutil.rmtree, ["No adapter directory", "adapter", "Give a local directory"]),
    "no config": ("plain", lambda path: (path / CONFIG).unlink(), [f"no {CONFIG}", f"found: {WEIGHTS}", "PEFT"]),
    "config not JSON": ("plain", text(CONFIG, "{"), [CONFIG, "not valid JSON", "again"]),
    "config not an object": ("plain", text(CONFIG, "[1]"), [CONFIG, "list [1]", "JSON object"]),
    "no tensors": ("plain", lambda path: (path / WEIGHTS).unlink(), [WEIGHTS, "adapter_model.bin", f"found: {CONFIG}"]),
    "truncated": ("plain", truncate, [WEIGHTS, "not a whole safetensors file", "again"]),
    "not LoRA": ("plain", config(peft_type="IA3"), [CONFIG, "'IA3'", "'LORA'", "merge_and_unload"]),
    "another task": ("plain", config(task_type="SEQ_CLS"), [CONFIG, "'SEQ_CLS'", "'CAUSAL_LM'"]),
    "unknown field": ("plain", config(new_kind=3), [CONFIG, "unknown fields new_kind=3", "remove"]),
    "PiSSA": ("plain", config(init_lora_weights="pissa_niter_4"), [CONFIG, "'pissa_niter_4'", "path_initial_model"]),
    "unknown bias": ("plain", config(bias="some"), [CONFIG, "bias='some'", "'lora_only'"]),
    "rank not a number": ("plain", config(r="8"), [CONFIG, "r='8'", "positive integer"]),
    "no alpha": ("plain", config(lora_alpha=0), [CONFIG, "lora_alpha=0", "positive number"]),
    "patterns not an object": ("plain", config(rank_pattern=[4]), [CONFIG, "rank_pattern=[4]", "object"]),
    "pattern of no number": ("plain", config(alpha_pattern={"q": None}), [CONFIG, "alpha_pattern['q']=None", "number"]),
    "pattern not regular": ("plain", config(rank_pattern={"(": 4}), [CONFIG, "rank_pattern", "'('", "expression"]),
    "targets not regular": ("plain", config(target_modules="*q"), [CONFIG, "target_modules", "'*q'", "expression"]),
    "layers not numbers": (
        "plain",
        config(layers_to_transform=["1"]),
        [CONFIG, "layers_to_transform=['1']", "numbers"],
    ),
    "no tensor of LoRA": (
        "plain",
        tensors({"prompt_embeddings": ones(2, D)}),
        [WEIGHTS, "prompt_embeddings", "refused"],
    ),
    "two adapters": (
        "plain",
        tensors({f"{Q}.lora_A.one.weight": ones(2, D), f"{Q}.lora_B.two.weight": ones(D, 2)}),
        ["several adapters, one, two", "by itself"],
    ),
    "copies that differ": (
        "plain",
        tensors({f"{NORM}.weight": ones(D), f"{NORM}.modules_to_save.weight": 2 * ones(D)}),
        [WEIGHTS, f"{NORM}.weight", "modules_to_save", "differ"],
    ),
    "original module alone": (
        "plain",
        tensors({f"{NORM}.original_module.weight": ones(D)}),
        [WEIGHTS, f"{NORM}.original_module.weight", "not saved whole"],
    ),
    "base with fewer layers": (
        "plain",
        other(layers=5),
        ["changes 2 tensors", "model.layers.3.self_attn.q_proj.weight", "another model", "trained on, 'B'"],
    ),
    "base with more layers": (
        "plain",
        other(layers=2),
        ["lacks tensors for model.layers.2.self_attn.q_proj", "smaller model", "'B'"],
    ),
    "base of another width": (
        "plain",
        other(width=24),
        [WEIGHTS, "q_proj.lora_A", "(2, 24)", "expected (2, 32)", "'B'"],
    ),
    "base of another family": ("phi3", lambda path: None, ["changes 3 tensors", Q, "another model", "'B'"]),
    "another rank": ("plain", config(rank_pattern={"1.self_attn.q_proj": 4}), [Q, "(2, 32)", "expected (4, 32)"]),
    "half a product": ("plain", tensors(removed=[f"{Q}.lora_A.weight"]), [f"has lora_B of {Q}", "lora_A, lora_B"]),
    "DoRA without norms": ("plain", config(use_dora=True), ["has lora_A, lora_B of", "lora_magnitude_vector"]),
    "norms without DoRA": (
        "plain",
        tensors({f"{Q}.lora_magnitude_vector": ones(D)}),
        [f"has lora_A, lora_B, lora_magnitude_vector of {Q}", "expected lora_A, lora_B"],
    ),
    "LoRA in a norm": (
        "plain",
        tensors({f"{NORM}.lora_A.weight": ones(2, D), f"{NORM}.lora_B.weight": ones(D, 2)}),
        ["LoRA in model.norm", "(32,)", "expected a matrix"],
    ),
    "LoRA of linear layers in the embedding": (
        "plain",
        tensors({f"{EMBED}.lora_A.weight": ones(2, D), f"{EMBED}.lora_B.weight": ones(V, 2)}),
        [f"has lora_A, lora_B of {EMBED}", "lora_embedding_A"],
    ),
    "LoRA that no field names": (
        "plain",
        tensors({f"{HEAD}.lora_A.weight": ones(2, D), f"{HEAD}.lora_B.weight": ones(V, 2)}),
        ["LoRA in 1 modules", "does not name: lm_head"],
    ),
    "quantised": ("plain", tensors({f"{NORM}.weight": np.ones(D, np.int8)}), [WEIGHTS, "dtype I8", "unquantised"]),
    "NaN": ("plain", tensors({f"{Q}.lora_A.weight": np.nan * ones(2, D)}), [WEIGHTS, f"{Q}.lora_A", "not finite"]),
    "whole module not there": (
        "plain",
        config(modules_to_save=["model.norm"]),
        ["lacks tensors for model.norm.weight"],
    ),
    "whole module of another shape": (
        "plain",
        tensors({f"{NORM}.weight": ones(24)}),
        [WEIGHTS, "model.norm.weight", "(24,)", "expected (32,)"],
    ),
    "biases not there": ("biased", config(bias="all"), ["lacks tensors for", "model.layers.0.mlp.down_proj.bias"]),
    "LoRA's biases not there": ("biased", config(bias="lora_only"), ["lacks tensors for", "q_proj.bias", "whole"]),
    "biases that the base has not": (
        "plain",
        tensors({f"{Q}.bias": ones(D)}, bias="all"),
        ["changes 1 biases", f"{Q}.bias", "plain", "'B'"],
    ),
    "LoRA in biases that the base has not": (
        "plain",
        tensors({f"model.layers.{i}.self_attn.q_proj.lora_B.bias": ones(D) for i in range(3)}, lora_bias=True),
        ["changes 3 biases", f"{Q}.bias", "plain", "'B'"],
    ),
    "vocabulary of the embedding alone": (
        "plain",
        tensors({f"{EMBED}.weight": ones(53, D)}),
        [f"{EMBED}.weight has 53 rows and lm_head.weight 48", "one vocabulary", "save_embedding_layers"],
    ),
    "embedding of another width": (
        "tied",
        tensors({f"{EMBED}.weight": ones(V, 24)}),
        [WEIGHTS, f"{EMBED}.weight", "(48, 24)", "expected (48, 32)"],
    ),
    "tied, but not alike": (
        "tied",
        tensors(EMBED_LORA, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        ["lacks tensors for lm_head", "not saved whole"],
    ),
    "tied, but replaced by two": (
        "tied",
        tensors({f"{EMBED}.weight": ones(V, D), f"{HEAD}.weight": 2 * ones(V, D)}),
        ["tie_word_embeddings", "lm_head.weight differs"],
    ),
    "converted base": ("orbax", lambda path: None, ["orbax is an Orbax checkpoint", "python -m convert", "--adapter"]),
    **{
        name: ("plain", config(**{name: [1]}), [CONFIG, f"{name}=[1] is not supported", "merge_and_unload"])
        for name in sorted(UNSUPPORTED)
    },
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit_are_refused_with_a_message_that_helps(bases, tmp_path, case):
    base, spoil, words = BAD[case]
    write_adapter(tmp_path / "adapter", q_lora())
    spoil(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        jm.load(bases / base, adapter=tmp_path / "adapter")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_same_adapter_loads_when_it_is_whole(bases, tmp_path):
    write_adapter(tmp_path / "adapter", q_lora())
    assert np.isfinite(jm.load(bases / "plain", adapter=tmp_path / "adapter")(TOKENS)[0]).all()


def test_a_base_in_metas_layout_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", q_lora())
    (tmp_path / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 48}))
    config = convert.read_config(tmp_path)
    shapes = {name: source.shape(config) for source in META.values() for name in source.names(config)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match="not in Hugging Face's layout.*Give the base in that layout"):
        jm.load(tmp_path, adapter=tmp_path / "adapter")


def test_an_adapter_alone_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", q_lora())
    with pytest.raises(FileNotFoundError, match="it is an adapter: give the model that it was trained on"):
        jm.load(tmp_path / "adapter")


def test_a_config_that_was_read_without_the_adapter_is_refused(bases, tmp_path):
    whole = {f"{name}.weight": ones(53, D) for name in (EMBED, HEAD)}
    write_adapter(tmp_path / "adapter", q_lora() | whole)
    with pytest.raises(ValueError, match="vocab_size=48; expected 53 with the adapter .*read_config"):
        convert.read_params(bases / "plain", convert.read_config(bases / "plain"), adapter=tmp_path / "adapter")


def test_a_base_that_is_damaged_is_not_blamed_on_the_adapter(bases, tmp_path):
    shutil.copytree(bases / "plain", tmp_path / "base")
    write_adapter(tmp_path / "adapter", q_lora())
    held = load_file(tmp_path / "base" / "model.safetensors")
    del held[f"{Q}.weight"]
    save_file(held, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="base lacks 1 tensors that its config calls for: .*q_proj"):
        jm.load(tmp_path / "base", adapter=tmp_path / "adapter")
