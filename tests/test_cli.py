"""The commands, run as a user runs them."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

import jaxmech as jm
from jaxmech import cli
from jaxmech.run_folder import RunFolder

CHAIN = str(jm.demo.path("chain.toml"))
BASE = str(jm.demo.path("base"))


def discover(out, *more: str) -> None:
    cli.main(["discover", "--model", BASE, "--chain", CHAIN, "--scenes", "6", "--out", str(out), *more])


def test_demo_prints_accuracies_and_circuit_and_writes_four_heat_maps(tmp_path, capsys):
    cli.main(["demo", "--scenes", "12", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in ("base", "tuned", "value_fetcher", "object_lookup", "object_binder", "label_matcher", "3.6"):
        assert words in printed
    groups = ("value_fetcher", "object_lookup", "object_binder", "label_matcher")
    for group in groups:
        image = imread(tmp_path / f"{group}.png")
        assert image.shape[0] > 300 and image[..., :3].std() > 0.05
    circuit = json.loads((tmp_path / "circuit.json").read_text())
    assert list(circuit) == list(groups) and [3, 6] in circuit["value_fetcher"] and [1, 0] in circuit["object_lookup"]
    with np.load(tmp_path / "scores.npz") as scores:
        assert scores["value_fetcher"].shape == (4, 8, 84)


def test_data_and_discover_agree_with_the_library(tmp_path, capsys):
    cli.main(["data", "--scenes", "6", "--boxes", "3", "--seed", "4", "--out", str(tmp_path / "data.jsonl")])
    assert jm.boxes.read(tmp_path / "data.jsonl") == jm.boxes.make(6, 3, seed=4)
    discover(tmp_path / "run", "--data", str(tmp_path / "data.jsonl"), "--k", "value_fetcher", "2", "--seed", "4")
    model = jm.load(BASE)
    pairs = jm.boxes.pairs(jm.boxes.make(6, 3, seed=4), model.tokenizer, seed=4)
    circuit = jm.discover(model, pairs, {"value_fetcher": 2}, jm.read_chain(CHAIN))
    chain = jm.read_chain(CHAIN)
    assert jm.Circuit.load(tmp_path / "run" / "circuit.json", chain).groups == circuit.groups
    assert "100.0 %" in capsys.readouterr().out or jm.accuracy(model, pairs) < 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["k"] == {"value_fetcher": 2} and config["stages"][0]["group"] == "value_fetcher"


def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(tmp_path, capsys, monkeypatch):
    discover(tmp_path / "unbroken")
    whole = RunFolder.keep

    def interrupted(self, group, scores):
        whole(self, group, scores)
        if group == "object_lookup":
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "keep", interrupted)
    with pytest.raises(SystemExit) as stop:
        discover(tmp_path / "broken")
    assert stop.value.code == 130 and "Interrupted" in capsys.readouterr().out
    assert not (tmp_path / "broken" / "circuit.json").exists()

    kept = []
    monkeypatch.setattr(RunFolder, "keep", lambda self, group, scores: (kept.append(group), whole(self, group, scores)))
    discover(tmp_path / "broken")
    assert kept == ["object_binder", "label_matcher"], "finished stages are not run again"
    assert "finished stages: value_fetcher, object_lookup" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "broken/circuit.json").read_text() == (tmp_path / "unbroken/circuit.json").read_text()
    with np.load(tmp_path / "broken/scores.npz") as broken, np.load(tmp_path / "unbroken/scores.npz") as unbroken:
        assert broken.files == unbroken.files
        for name in broken.files:
            np.testing.assert_array_equal(broken[name], unbroken[name])


def test_results_of_other_settings_are_not_overwritten_unless_asked(tmp_path, capsys):
    discover(tmp_path)
    before = (tmp_path / "scores.npz").read_bytes()
    with pytest.raises(SystemExit) as stop:
        discover(tmp_path, "--seed", "9")
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "other settings (examples, seed differ)" in printed and "--overwrite" in printed
    assert (tmp_path / "scores.npz").read_bytes() == before
    discover(tmp_path, "--seed", "9", "--overwrite")
    assert (tmp_path / "scores.npz").read_bytes() != before


def test_a_chain_that_finds_nothing_says_so_and_still_writes_what_it_found(tmp_path, capsys):
    cli.main(["discover", "--model", BASE, "--scenes", "6", "--out", str(tmp_path), "--min-effect", "0.01"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Stage 'pos_transmitter'" in printed and "found no head" in printed
    assert list(json.loads((tmp_path / "circuit.json").read_text())) == ["value_fetcher"]
    assert (tmp_path / "pos_transmitter.png").exists() and not (tmp_path / "pos_detector.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "No checkpoint directory at no/such/model"),
        (["--data", "no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--chain", "no/such/chain.toml"], "no/such/chain.toml"),
        (["--k", "value_fetcher", "33"], "k=33, but the model has 32 heads"),
        (["--boxes", "11"], "n_boxes=11; expected 2 to 10"),
        (["--dtype", "float64"], "float64"),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        discover(tmp_path / "run", *arguments)
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "error:" in printed and message in printed
