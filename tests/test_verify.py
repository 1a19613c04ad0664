"""`jaxmech verify`: sound models of every family hold, and what is spoilt is found where it was spoilt."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from hf_families import HF_FAMILIES, family_model
from safetensors.numpy import load_file, save_file
from words import word_tokenizer

import jaxmech as jm
from convert.__main__ import main as convert_main
from jaxmech import checkpoint, cli, deviations, hf_sites, verify
from jaxmech.deviations import compare_bfloat16, compare_float32

LAYER = "model.layers.1."
DOUBLED = {  # tensor of layer 1 (but for the first and last) that is doubled -> where that shows first
    "model.embed_tokens.weight": "resid_pre of layer 0",
    LAYER + "input_layernorm.weight": "q of layer 1",
    LAYER + "self_attn.q_proj.weight": "q of layer 1",
    LAYER + "self_attn.k_proj.bias": "k of layer 1",
    LAYER + "self_attn.v_proj.weight": "v of layer 1",
    LAYER + "self_attn.o_proj.weight": "attn_out of layer 1",
    LAYER + "post_attention_layernorm.weight": "mlp_out of layer 1",
    LAYER + "mlp.down_proj.bias": "mlp_out of layer 1",
    "model.norm.weight": "logits",
}


@pytest.fixture
def saved(tmp_path):
    """A function that makes a model of a family and saves it: its folder."""

    def make(family: str = "llama", **changes):
        family_model(family, **changes).save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


@pytest.fixture
def spoilt(tmp_path):
    """A function that copies a checkpoint and lets `change` edit its tensors and the fields of its config.json."""

    def make(folder, change):
        copy = tmp_path / "spoilt"
        shutil.copytree(folder, copy)
        tensors, text = load_file(copy / "model.safetensors"), (copy / "config.json").read_text()
        change(tensors, fields := json.loads(text))
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        if fields != json.loads(text):
            (copy / "config.json").write_text(json.dumps(fields))
        return copy

    return make


def command(*arguments) -> int:
    """Runs `jaxmech verify` and returns its exit status."""
    try:
        cli.main(["verify", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def deviating(report, dtype: str = "float32") -> set[str]:
    return {found.site for found in report.comparisons if found.dtype == dtype and not found.ok}


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_every_site_of_every_family_agrees_with_transformers(saved, family):
    report = verify.verify(saved(family))
    assert report.ok and report.first_deviation is None and not report.notes, report.first_deviation
    for dtype in ("float32", "bfloat16"):
        found = [(c.site, c.layer) for c in report.comparisons if c.dtype == dtype and c.site in jm.interventions.SITES]
        assert found == [(site, layer) for layer in range(3) for site in jm.interventions.SITES]
    assert [c.site for c in report.worst("float32")][:2] == ["inv_freq", "attention_factor"]
    assert {c.site for c in report.comparisons} >= {"logits"}


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_sites_add_up_in_transformers_as_they_do_here(saved, family):
    """attn_out and mlp_out are what is added, whatever norms and multipliers are in between; z and pattern fit v."""
    path = saved(family)
    theirs = hf_sites.load_hf(path, "float32")
    found = hf_sites.activations(theirs, np.arange(20).reshape(2, 10))
    assert_close(found["resid_pre"] + found["attn_out"], found["resid_mid"], TOLERANCES.recompiled)
    assert_close(found["resid_mid"] + found["mlp_out"], found["resid_post"], TOLERANCES.recompiled)
    assert_close(found["resid_post"][:-1], found["resid_pre"][1:], TOLERANCES.exact)
    mixed = np.einsum("lbtns,lbsnh->lbtnh", found["pattern"], found["v"])
    assert_close(mixed, found["z"], TOLERANCES.recompiled)
    head_dim = theirs.model.layers[0].self_attn.head_dim
    assert found["q"].shape == found["k"].shape == (3, 2, 10, 4, head_dim)
    assert np.array_equal(found["k"][:, :, :, 0], found["k"][:, :, :, 1]), "k is per query head"
    assert not np.allclose(found["k"][:, :, :, 1], found["k"][:, :, :, 2])


@pytest.mark.parametrize(("tensor", "where"), DOUBLED.items(), ids=DOUBLED)
def test_one_changed_tensor_is_found_where_it_acts_first(saved, spoilt, tensor, where):
    path = saved()

    def double(tensors, fields):
        tensors[tensor] *= 2

    report = verify.verify(path, spoilt(path, double))
    assert not report.ok and report.first_deviation is not None
    assert (report.first_deviation.where, report.first_deviation.dtype) == (where, "float32")
    below = [found for found in report.comparisons if found.layer == 0 and found.dtype == "float32"]
    assert all(found.ok for found in below) or tensor.startswith("model.embed"), "layer 0 is untouched"


def test_gate_and_up_exchanged_are_found_in_the_mlp_of_that_layer(saved, spoilt):
    path = saved("qwen2")

    def exchange(tensors, fields):
        gate, up = (f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    report = verify.verify(path, spoilt(path, exchange))
    assert report.first_deviation is not None and report.first_deviation.where == "mlp_out of layer 1"


@pytest.mark.parametrize(
    ("family", "field", "value", "where"),
    [
        ("mistral", "sliding_window", 6, "pattern of layer 0"),
        ("qwen2", "max_window_layers", 2, "pattern of layer 1"),
        ("gemma2", "attn_logit_softcapping", 3.0, "pattern of layer 0"),
        ("gemma2", "final_logit_softcapping", 2.0, "logits"),
        ("granite", "residual_multiplier", 0.3, "attn_out of layer 0"),
        ("granite", "embedding_multiplier", 2.0, "resid_pre of layer 0"),
        ("qwen3", "rms_norm_eps", 0.1, "q of layer 0"),
        ("smollm3", "no_rope_layers", [1, 1, 0], "pattern of layer 1"),
    ],
)
def test_another_setting_is_found_where_it_acts_first(saved, spoilt, family, field, value, where):
    path = saved(family)

    def change(tensors, fields):
        fields[field] = value
        fields.pop("layer_types", None)  # would overrule max_window_layers

    report = verify.verify(path, spoilt(path, change))
    assert report.first_deviation is not None and report.first_deviation.where == where


def test_another_rope_theta_shows_in_the_frequencies_and_in_the_pattern(saved, spoilt):
    path = saved()

    def change(tensors, fields):
        fields["rope_parameters"]["rope_theta"] = 20000.0

    report = verify.verify(path, spoilt(path, change))
    assert report.first_deviation is not None and report.first_deviation.where == "pattern of layer 0"
    assert "inv_freq" in deviating(report) and "attention_factor" not in deviating(report)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_of_long_prompts_is_compared_though_the_prompts_are_short(saved, spoilt, kind):
    """Within the original context, nothing else shows it."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    path = saved(rope_parameters=rope, max_position_embeddings=64)

    def change(tensors, fields):
        fields["rope_parameters"] |= {"long_factor": [3.0] * 4} if kind == "longrope" else {"factor": 8.0}

    assert verify.verify(path, length=8).ok
    report = verify.verify(path, spoilt(path, change), length=8)
    assert not report.ok and deviating(report) == {"inv_freq"} and report.first_deviation is None


def test_coarser_rounding_is_found_in_bfloat16_alone(saved, monkeypatch):
    """One bit more than bfloat16 loses would be allowed, two are not."""
    path, load = saved(), jm.load

    def coarse(where, dtype="float32", *rest, **options):
        model = load(where, dtype, *rest, **options)
        if dtype == "float32":
            return model
        rounded = jax.tree.map(lambda x: x.astype("float8_e4m3fn").astype(x.dtype), model.params)
        return jm.Model(model.config, rounded)

    assert verify.verify(path).ok
    monkeypatch.setattr(verify, "load", coarse)
    report = verify.verify(path)
    assert not deviating(report) and report.first_deviation is not None
    assert (report.first_deviation.where, report.first_deviation.dtype) == ("resid_pre of layer 0", "bfloat16")


def made_up(change: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {site: rng.normal(size=(2, 1, 4, 8)).astype(np.float32) for site in jm.interventions.SITES}
    found["v"][1, 0, 2, 3] += change * np.abs(found["v"][1]).max()
    return found | {"logits": rng.normal(size=(1, 4, 5)).astype(np.float32)}


def test_float32_is_judged_by_the_largest_value_of_the_site_and_layer():
    for share, holds in ((0.9, True), (1.2, False)):
        compared = list(compare_float32(made_up(share * deviations.FLOAT32), made_up()))
        assert [c.where for c in compared if not c.ok] == ([] if holds else ["v of layer 1"])
    assert [c.site for c in compared] == [*jm.interventions.SITES] * 2 + ["logits"]


def test_bfloat16_is_judged_by_the_worse_of_transformers_own_runs():
    exact, good, worse = made_up(), made_up(0.01), made_up(0.02)
    for share, holds in ((0.9, True), (1.1, False)):
        ours = made_up(share * 0.02 * deviations.BFLOAT16)
        for runs in ((good, worse), (worse, good)):
            bad = [c.where for c in compare_bfloat16(ours, exact, runs) if not c.ok]
            assert bad == ([] if holds else ["v of layer 1"])
    without_pattern = {site: x for site, x in worse.items() if site != "pattern"}
    assert all(c.ok for c in compare_bfloat16(exact, exact, (good, without_pattern)))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_always_deviate(number):
    ours, both = made_up(), made_up()
    ours["z"][0, 0, 1, 1] = both["z"][0, 0, 1, 1] = number
    for theirs in (made_up(), both):
        assert [c.where for c in compare_float32(ours, theirs) if not c.ok] == ["z of layer 0"]
        assert [c.where for c in compare_bfloat16(ours, theirs, (theirs,)) if not c.ok] == ["z of layer 0"]


def test_deviations_are_relative_to_all_numbers_of_the_site():
    found, expected = np.array([4.0, 1, 1, 5], np.float32), np.array([1.0, 1, 1, 1], np.float32)
    assert deviations.largest_deviation(found, expected) == 4.0
    assert deviations.mean_square_deviation(found, expected) == 2.5  # sqrt((3^2 + 4^2) / 4)
    assert deviations.mean_square_deviation(10 * found, 10 * expected) == 2.5
    unequal = np.array([0.0, 0, 6, 8], np.float32)  # of root mean square 5
    assert deviations.largest_deviation(unequal + np.float32([0, 0, 4, -3]), unequal) == 0.5
    assert deviations.mean_square_deviation(unequal + np.float32([0, 0, 4, -3]), unequal) == 0.5


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_ours_deviate_where_transformers_is_not_finite(number):
    theirs = made_up()
    theirs["z"][0, 0, 1, 1] = number
    for compare in (compare_float32(made_up(), theirs), compare_bfloat16(made_up(), theirs, (made_up(),))):
        (bad,) = (c for c in compare if not c.ok)
        assert (bad.where, bad.deviation) == ("z of layer 0", np.inf)


def test_the_worst_layer_of_a_site_is_that_which_exceeds_most():
    compared = [
        deviations.Comparison("float32", "z", layer, deviation, allowed)
        for layer, (deviation, allowed) in enumerate([(1.0, 2.0), (0.9, 1.0), (0.5, 1.0)])
    ]
    assert [found.layer for found in verify.Report((), tuple(compared)).worst("float32")] == [1]


def test_a_site_that_is_zero_in_transformers_must_be_zero_here():
    zero, ours = made_up(), made_up()
    zero["mlp_out"][1] = 0
    assert [c.where for c in compare_float32(ours, zero) if not c.ok] == ["mlp_out of layer 1"]
    ours["mlp_out"][1] = 0
    assert all(c.ok for c in compare_float32(ours, zero))


def test_the_command_prints_a_table_and_writes_all_numbers(saved, tmp_path, capsys):
    path = saved("gemma2")
    assert command("--model", path, "--out", tmp_path / "report.json", "--seed", "3") == 0
    printed = capsys.readouterr().out
    for words in ("float32", "bfloat16", "worst layer", "inv_freq", "resid_mid", "logits", "shapes, dtypes, finite"):
        assert words in printed
    assert "NO" not in printed.split() and "deviates" not in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["first_deviation"] is None and report["seed"] == 3 and report["model"] == str(path)
    assert len(report["comparisons"]) == 2 + 2 * (3 * 10 + 1)


def test_the_command_ends_with_status_1_and_names_the_first_deviation(saved, spoilt, tmp_path, capsys):
    path = saved()

    def infinite(tensors, fields):
        tensors[LAYER + "self_attn.o_proj.weight"][:] = np.inf

    out = tmp_path / "report.json"
    assert command("--model", path, "--against", spoilt(path, infinite), "--out", out) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "the first that deviates is attn_out of layer 1 (float32)" in printed and "NO" in printed.split()
    report = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert not report["ok"] and report["first_deviation"] == "attn_out of layer 1"


def test_prompts_within_a_window_are_said_not_to_show_it(saved, capsys):
    path = saved("mistral")
    assert command("--model", path, "--length", "5") == 0
    assert "windows of 5 tokens" in capsys.readouterr().out
    assert command("--model", path, "--length", "6") == 0
    assert "windows of" not in capsys.readouterr().out


@pytest.fixture
def prompts(monkeypatch) -> list[np.ndarray]:
    """The prompts of every run of transformers' model."""
    seen, run = [], hf_sites.activations

    def activations(model, tokens, *rest):
        seen.append(tokens)
        return run(model, tokens, *rest)

    monkeypatch.setattr(hf_sites, "activations", activations)
    return seen


def test_text_is_turned_into_tokens_by_the_models_own_tokenizer(saved, prompts):
    path = saved()
    word_tokenizer().save_pretrained(path)
    assert verify.verify(path, text="w3 w1 w4").ok
    assert [tokens.tolist() for tokens in prompts] == [[[3, 1, 4]]] * 3  # float32, bfloat16, bfloat16 by SDPA


def test_prompts_are_drawn_by_the_seed(saved, prompts):
    path = saved()
    for seed in (0, 0, 1):
        verify.verify(path, prompts=3, length=7, seed=seed)
    first, again, other = prompts[::3]
    assert first.shape == (3, 7) and np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.fixture
def converted(saved, tmp_path):
    """(the Hugging Face directory, the Orbax directory that was written from it)."""
    path = saved("phi3")
    convert_main(["--model", str(path), "--out", str(tmp_path / "orbax")])
    return path, tmp_path / "orbax"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_that_was_rounded_is_compared_with_weights_rounded_alike(saved, tmp_path, dtype):
    path = saved()
    convert_main(["--model", str(path), "--out", str(tmp_path / "orbax"), "--dtype", dtype])
    report = verify.verify(tmp_path / "orbax", path)
    assert report.ok and report.comparisons, report.first_deviation
    assert report.notes == (
        f"{tmp_path / 'orbax'} stores {dtype}, to which transformers' weights were rounded as well.",
    )


def test_a_converted_checkpoint_is_compared_with_its_source(converted, spoilt):
    path, orbax = converted
    report = verify.verify(orbax, path)
    assert report.ok and report.comparisons and len(report.checks) == 2

    def change(tensors, fields):
        tensors[LAYER + "mlp.down_proj.weight"] *= 2

    report = verify.verify(orbax, spoilt(path, change))
    assert report.first_deviation is not None and report.first_deviation.where == "mlp_out of layer 1"
    (note,) = report.notes
    assert "converted from other files than" in note and "model.safetensors" in note and "config.json" not in note


def test_an_adapter_is_compared_with_the_merged_model(saved, spoilt, tmp_path):
    path, adapter = saved(), tmp_path / "adapter"
    rng, name = np.random.default_rng(0), LAYER + "self_attn.v_proj"
    down, up = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(16, 2)).astype(np.float32)
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    halves = {f"base_model.model.{name}.lora_{half}.weight": x for half, x in (("A", down), ("B", up))}
    save_file(halves, adapter / "adapter_model.safetensors")

    def merge(tensors, fields):
        tensors[f"{name}.weight"] += 2 * up @ down

    assert verify.verify(path, spoilt(path, merge), adapter=adapter).ok
    report = verify.verify(path, path, adapter=adapter)
    assert report.first_deviation is not None and report.first_deviation.where == "v of layer 1"
    (note,) = verify.verify(path, adapter=adapter).notes
    assert "--against" in note


def test_a_converted_checkpoint_alone_is_checked_against_the_files_it_was_made_from(converted, capsys):
    path, orbax = converted
    assert command("--model", orbax) == 0
    printed = capsys.readouterr().out
    assert "it was converted from: 2 files" in printed and "--against" in printed and "worst layer" not in printed
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert command("--model", orbax) == 1
    printed = capsys.readouterr().out
    assert f"NO, missing or changed: {path / 'model.safetensors'}\n" in printed
    assert "Does not hold: sha256 of the files it was converted from" in printed
    shutil.rmtree(path)
    assert command("--model", orbax) == 0
    assert "is not here" in " ".join(capsys.readouterr().out.split())


def test_without_torch_hashes_are_compared_and_the_rest_is_said_to_be_missing(converted, spoilt, monkeypatch, capsys):
    path, orbax = converted
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed

    def change(tensors, fields):
        tensors["model.norm.weight"] *= 2

    other = spoilt(path, change)
    for arguments in (["--model", path], ["--model", orbax, "--against", path]):
        assert command(*arguments) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "Numbers were not compared" in printed and "pip install torch" in printed
    assert command("--model", orbax, "--against", other) == 1
    assert f"missing or changed: {other / 'model.safetensors'}" in capsys.readouterr().out


@pytest.mark.parametrize("torch", [True, False], ids=["torch", "no torch"])
def test_a_model_that_is_not_finite_is_bad_input(saved, spoilt, monkeypatch, capsys, torch):
    def change(tensors, fields):
        tensors[LAYER + "mlp.up_proj.weight"][3, 4] = np.nan

    path = spoilt(saved(), change)
    if not torch:
        monkeypatch.setitem(sys.modules, "torch", None)
    assert command("--model", path) == 2
    assert "mlp.up_proj.weight holds numbers that are not finite" in " ".join(capsys.readouterr().err.split())


def test_an_orbax_checkpoint_that_is_not_finite_is_bad_input(random_model, tmp_path, capsys):
    """In a token that no prompt has, say, where no activation would show it."""
    model = random_model()
    params = {"params": model.weights | {"embed": model.weights["embed"].at[7, 3].set(np.nan)}}
    checkpoint.save(tmp_path / "orbax", model.config, params)
    assert command("--model", tmp_path / "orbax") == 2
    assert "parameter embed holds numbers that are not finite" in " ".join(capsys.readouterr().err.split())


def test_bad_input_ends_with_a_message_and_status_2(converted, saved, tmp_path, capsys):
    path, orbax = converted
    deeper = tmp_path / "deeper"
    family_model("phi3", num_hidden_layers=4).save_pretrained(deeper)
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for arguments, message in {
        ("--model", "no/such/model"): "No checkpoint directory at no/such/model",
        ("--model", path, "--against", "no/such/model"): "No checkpoint directory at no/such/model",
        ("--model", path, "--against", orbax): "name the Hugging Face directory",
        ("--model", path, "--against", deeper): "num_layers=4, the model 3",
        ("--model", path, "--against", broken): "model.layers.2.self_attn.o_proj.weight the first",
        ("--model", path, "--length", "0"): "length=0; expected 1 or more",
        ("--model", path, "--text", "w1"): "holds no tokenizer",
    }.items():
        assert command(*arguments) == 2, arguments
        printed = " ".join(capsys.readouterr().err.split())
        assert "error:" in printed and message in printed, (arguments, printed)


def test_nothing_is_printed_by_the_library(saved, capfd):
    path = saved()
    capfd.readouterr()
    verify.verify(path)
    assert capfd.readouterr() == ("", "")
