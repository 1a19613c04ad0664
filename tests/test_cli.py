"""The commands, run as a user runs them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TOLERANCES, assert_close

import convert
import jaxmech as jm
from jaxmech import cli
from jaxmech.cli_options import StudyCommand
from jaxmech.provenance import versions
from jaxmech.run_folder import RunFolder
from jaxmech.study import STAGES, Settings

CHAIN = str(jm.demo.path("chain.toml"))
BASE, TUNED = str(jm.demo.path("base")), str(jm.demo.path("tuned"))


def discover(out, *more: str) -> None:
    made = [] if "--data" in more else ["--scenes", "6"]
    cli.main(["discover", "--model", BASE, "--chain", CHAIN, *made, "--out", str(out), *more])


@pytest.fixture(scope="module")
def discovered(tmp_path_factory) -> Path:
    """The folder of a finished run; not to be written to."""
    folder = tmp_path_factory.mktemp("discovered") / "run"
    discover(folder)
    return folder


@pytest.fixture
def copied(discovered, tmp_path) -> Path:
    """A copy of it, for the tests that write."""
    return Path(shutil.copytree(discovered, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("options", "folder"),
    [([], "out/demo"), (["--quick"], "out/demo-quick"), (["--quick", "--out", "here"], "here")],
    ids=" ".join,
)
def test_a_quick_demo_has_a_folder_of_its_own(monkeypatch, options, folder):
    """So that one can be run after the other, whose settings differ."""
    opened = []
    monkeypatch.setattr(cli, "_study_into", lambda out, settings, overwrite: opened.append(out))
    cli.main(["demo", *options])
    assert opened == [Path(folder)]


def test_the_demo_is_a_study_with_a_report_and_goes_on_when_it_is_called_again(tmp_path, capsys):
    cli.main(["demo", "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in ("base", "tuned", "whole circuit", "value_fetcher"):
        assert words in printed
    assert printed.split()[-1].endswith("MODEL_CARD.md") and str(tmp_path / "report.html") in printed.replace("\n", "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["prompts"] == 84
    assert [3, 6] in results["discovery"]["base"]["groups"]["value_fetcher"]
    own = results["faithfulness"]["tuned"]["tuned"]
    assert own["circuit"]["accuracy"] > 0.5 > max(own["random"])
    page = (tmp_path / "report.html").read_text()
    assert "tuned" in page and len(page) > 100_000
    before = (tmp_path / "results.json").read_bytes()
    cli.main(["demo", "--quick", "--out", str(tmp_path)])
    assert "Going on with the study" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_bytes() == before

    everything = contents(tmp_path)
    study = ["study", "--base", BASE, "--tuned", TUNED, "--chain", CHAIN, "--out", str(tmp_path), "--overwrite"]
    for bad in (["--only", "nope"], ["--k", "value_fetcher", "33"], ["--k", "typo", "3"], ["--data", "none.jsonl"]):
        with pytest.raises(SystemExit):
            cli.main([*study, *bad])
        assert contents(tmp_path) == everything
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    cli.main([*study, "--scenes", "2", "--only", "knockout"])
    left = contents(tmp_path)
    assert "figures/mine.png" in left and "circuits/base.json" not in left and "parts/dcm.base.json" not in left
    assert "figures/accuracy.png" in everything and "figures/accuracy.png" not in left


def test_study_takes_its_settings_from_the_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_study_into", lambda out, settings, **rest: seen.append((out, settings, rest)))
    command = ["study", "--base", BASE, "--tuned", TUNED, "--tuned", str(tmp_path / "x"), "--out", str(tmp_path / "o")]
    sizes = ["--k", "value_fetcher", "3", "--lam", "0.1", "--min-effect", "0.02"]
    cli.main([*command, "--chain", CHAIN, *sizes, "--only", "cmap", "--from", "dcm"])
    ((out, settings, rest),) = seen
    assert out == tmp_path / "o" and settings.names == ["base", "tuned", "x"]
    assert settings.chain == jm.read_chain(CHAIN) and settings.k == {"value_fetcher": 3}
    assert (settings.lam, settings.min_effect) == (0.1, 0.02)
    assert rest["only"] == ("cmap",) and rest["start"] == "dcm"
    assert (settings.repeats, settings.patched, settings.train) == (10, 500, 1000)


def test_every_setting_of_a_study_is_an_option_or_said_to_be_none():
    settings = {field.name for field in dataclasses.fields(Settings)}
    options = {field.name for field in dataclasses.fields(StudyCommand)}
    assert settings - options == set(cli.NO_OPTIONS)


def test_the_version_is_that_of_the_package(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"jaxmech {versions(['jaxmech'])['jaxmech']}"


def test_data_does_not_replace_a_file_unless_asked(tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text("mine")
    command = ["data", "--scenes", "2", "--out", str(file)]
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2 and file.read_text() == "mine"
    assert "exists already; choose another --out, or replace it with --overwrite" in " ".join(
        capsys.readouterr().err.split()
    )
    cli.main([*command, "--overwrite"])
    assert jm.boxes.read(file) == jm.boxes.make(2)


@pytest.fixture
def unable(tmp_path):
    """A folder with the base model without its attention, which answers nothing right."""
    model = jm.load(BASE)
    blocks = {**model.weights["blocks"], "o": 0 * model.weights["blocks"]["o"]}
    convert.write_hf(
        tmp_path / "unable", model.config, {"params": {**model.weights, "blocks": blocks}}, model.tokenizer
    )
    return tmp_path / "unable"


def test_a_model_that_cannot_do_the_task_is_warned_of(tmp_path, unable, capsys):
    command = ["--chain", CHAIN, "--scenes", "3", "--out"]
    cli.main(["discover", "--model", str(unable), *command, str(tmp_path / "discovery")])
    warning = "unable answers no prompt right; naming any object of the scene would be right for 14.3 %."
    printed = capsys.readouterr().out
    assert warning in printed and "0.0 %" in printed
    with pytest.raises(SystemExit) as stop:
        cli.main(["discover", "--model", str(unable), *command, str(tmp_path / "right"), "--correct-only"])
    assert stop.value.code == 2 and "unable answers none of the 21 prompts right" in capsys.readouterr().err
    assert not (tmp_path / "right").exists()

    study = ["study", "--base", str(unable), "--tuned", TUNED, "--quick", *command, str(tmp_path / "study")]
    cli.main([*study, "--only", "accuracy"])
    assert capsys.readouterr().out.count(warning) == 2, "at once, and with the results"
    cli.main([*study, "--only", "accuracy"])
    assert warning in capsys.readouterr().out
    assert warning in (tmp_path / "study" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")


def test_discovery_on_the_prompts_that_are_answered_right(tmp_path, capsys):
    discover(tmp_path, "--correct-only", "--k", "value_fetcher", "2")
    model = jm.load(BASE)
    pairs = jm.boxes.pairs(jm.boxes.make(6), model.tokenizer)
    right = pairs[jm.predict(model, pairs).correct]
    assert f"Scores are of the {len(right)} prompts that it answers right" in capsys.readouterr().out
    assert 0 < len(right) < len(pairs)
    circuit = jm.discover(model, right, {"value_fetcher": 2}, jm.read_chain(CHAIN))
    assert jm.Circuit.load(tmp_path / "circuit.json", CHAIN).groups == circuit.groups
    with np.load(tmp_path / "scores.npz") as scores:
        np.testing.assert_array_equal(scores["value_fetcher"], circuit.scores["value_fetcher"].per_example)


def test_discovery_by_another_metric_goes_on_as_such(tmp_path, capsys):
    discover(tmp_path, "--metric", "log_probability", "--min-effect", "0.05")
    model = jm.load(BASE)
    pairs = jm.boxes.pairs(jm.boxes.make(6), model.tokenizer)
    expected = jm.discover(model, pairs, chain=CHAIN, metric="log_probability", min_effect=0.05)
    assert jm.Circuit.load(tmp_path / "circuit.json", CHAIN).groups == expected.groups
    first = capsys.readouterr().out
    assert "mean change of log p(correct)" in first
    discover(tmp_path, "--metric", "log_probability", "--min-effect", "0.05")
    again = capsys.readouterr().out
    assert "Going on with the run" in again and first[first.index("Circuit: heads") :] in again


def test_copies_on_one_device_are_refused_by_the_name_of_the_option(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 1)
    command = ["study", "--base", BASE, "--tuned", TUNED, "--out", str(tmp_path / "out"), "--copies", "8"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "--copies 8: there is 1 device here; expected a divisor" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


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


def test_copies_on_several_devices_find_what_one_finds(discovered, tmp_path):
    discover(tmp_path, "--copies", "4")
    one, four = (np.load(folder / "scores.npz") for folder in (discovered, tmp_path))
    assert set(one) == set(four) and len(set(one)) > 0
    for name in one:
        assert_close(four[name], one[name], TOLERANCES.cone)


def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(discovered, tmp_path, capsys, monkeypatch):
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
    assert (tmp_path / "broken/circuit.json").read_text() == (discovered / "circuit.json").read_text()
    with np.load(tmp_path / "broken/scores.npz") as broken, np.load(discovered / "scores.npz") as unbroken:
        assert broken.files == unbroken.files
        for name in broken.files:
            np.testing.assert_array_equal(broken[name], unbroken[name])


def test_results_of_other_settings_are_not_overwritten_unless_asked(copied, capsys):
    before = (copied / "scores.npz").read_bytes()
    with pytest.raises(SystemExit) as stop:
        discover(copied, "--seed", "9")
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "other settings (examples, seed differ)" in printed and "--overwrite" in printed
    assert (copied / "scores.npz").read_bytes() == before
    discover(copied, "--seed", "9", "--overwrite")
    assert (copied / "scores.npz").read_bytes() != before


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_overwrite_with_a_bad_option_leaves_everything_and_with_a_good_one_nothing_old(copied, tmp_path):
    (copied / "mine.png").write_bytes(b"mine")
    before = contents(copied)
    for bad in (["--k", "typo", "3"], ["--k", "value_fetcher", "33"], ["--min-effect", "-1"]):
        with pytest.raises(SystemExit):
            discover(copied, *bad, "--overwrite")
        assert contents(copied) == before
    (tmp_path / "one.toml").write_text('[[stage]]\ngroup = "only_one"\nsender = "last"')
    command = ["discover", "--model", BASE, "--scenes", "6", "--out", str(copied), "--overwrite"]
    cli.main([*command, "--chain", str(tmp_path / "one.toml")])
    written = {"config.json", "scores.npz", "circuit.json", "only_one.png"}
    assert set(contents(copied)) == {"mine.png", *written}


def test_a_rejected_option_does_not_stand_in_the_way_of_the_corrected_one(tmp_path):
    with pytest.raises(SystemExit):
        discover(tmp_path, "--k", "value_fetcher", "33")
    discover(tmp_path, "--k", "value_fetcher", "3")


def test_a_run_goes_on_however_its_paths_are_spelt_and_however_much_is_computed_at_a_time(
    copied, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mybase").symlink_to(BASE)
    (tmp_path / "mychain.toml").write_text(open(CHAIN).read())
    monkeypatch.chdir(tmp_path)
    command = ["discover", "--scenes", "6", "--out", copied.name]
    for model, chain in (("mybase", "mychain.toml"), (str(tmp_path / "mybase"), CHAIN)):
        cli.main([*command, "--model", model, "--chain", chain, "--batch-size", "2", "--copies", "1"])
        assert "finished stages: value_fetcher, object_lookup" in " ".join(capsys.readouterr().out.split())


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
        (["--data", "no/such/file.jsonl"], "There is no file no/such/file.jsonl; expected a JSONL file of examples"),
        (["--chain", "no/such/chain.toml"], "--chain no/such/chain.toml: there is no such file"),
        (["--out", f"{BASE}/config.json"], "config.json is a file; expected a folder"),
        (["--out", BASE], "config.json is not that of a run, so it is not overwritten"),
        (["--out", BASE, "--overwrite"], "config.json is not that of a run, so it is not overwritten"),
        (["--k", "typo", "3"], "k names the groups ['typo']; the chain has"),
        (["--k", "value_fetcher", "0"], "k=0; expected"),
        (["--min-effect", "2"], "min_effect=2.0; expected a fraction from 0 to 1"),
        (["--metric", "log_probability", "--min-effect", "-1"], "min_effect=-1.0; expected a finite number"),
        (["--min-effect", "nan"], "min_effect=nan; expected a fraction"),
        (["--seed", "-1"], "seed=-1; expected at least 0"),
        (["--k", "value_fetcher", "33"], "k=33, but the model has 32 heads"),
        (["--boxes", "11"], "n_boxes=11; expected 2 to 10"),
        (["--copies", "3"], "--copies 3: there are 8 devices here; expected a divisor of that number"),
        (["--precision", "bf16"], "precision is 'bf16'; expected one of default, high, highest"),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        discover(tmp_path / "run", *arguments)
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "error:" in printed and message in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp16"], "invalid choice 'fp16' for argument '--dtype'. Expected one of ('float32', 'bfloat16',"),
        (["--k", "value_fetcher", "x"], "parsing --k: the group 'value_fetcher' is followed by 'x'; expected a number"),
        (["--k", "value_fetcher", "3", "b"], "parsing --k: the group 'b' is followed by nothing; expected a number"),
        (["--k", "b", "3", "b", "4"], "parsing --k: the group 'b' is given twice"),
    ],
)
def test_options_that_cannot_be_parsed_are_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        discover(tmp_path / "run", *arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("command", [["discover", "--model", BASE], ["study", "--base", BASE, "--tuned", TUNED]])
def test_a_chain_that_cannot_work_is_refused_before_anything_is_written(tmp_path, capsys, command):
    chain = jm.demo.path("chain.toml").read_text().replace('"query_box"', '"object"')
    (tmp_path / "chain.toml").write_text(chain)
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--chain", str(tmp_path / "chain.toml"), "--out", str(tmp_path / "out"), "--scenes", "6"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "has the sender 'object'; the prompts have the roles" in printed.err
    assert not printed.out
    assert [file.name for file in tmp_path.iterdir()] == ["chain.toml"]


def test_help_names_the_stages_and_has_no_empty_defaults(capsys):
    for command in ("study", "discover", "verify"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "Meta's" in printed and "Hugging Face Hub" in printed
        assert "{None}" not in printed and "(default: )" not in printed
        if command == "study":
            only, anew = printed.split("--only STR")[1].split("--from STR")
            for stage in STAGES:
                assert stage in only and stage in anew.split("--quick")[0]
