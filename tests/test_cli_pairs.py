"""The commands on prompts of the user's own task, from a file of pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
from pairs_task import records, write_task

import jaxmech as jm
from jaxmech import cli

BASE = str(jm.demo.path("base"))


@pytest.fixture
def task(tmp_path) -> Path:
    """A folder with pairs.jsonl and chain.toml."""
    write_task(tmp_path, records(6))
    return tmp_path


def discover(task: Path, *more: str) -> None:
    files = ["--pairs", str(task / "pairs.jsonl"), "--chain", str(task / "chain.toml")]
    cli.main(["discover", "--model", BASE, "--out", str(task / "run"), *files, *more])


@pytest.mark.parametrize("metric", ["probability", "logit_difference"])
def test_discovery_on_pairs_of_a_file_is_that_of_the_library(task, capsys, metric):
    discover(task, "--metric", metric)
    model = jm.load(BASE)
    pairs = jm.read_pairs(task / "pairs.jsonl", model.tokenizer)
    assert len(set(pairs.position("last"))) == 2 and set(pairs.positions) == {"last", "asked", "before"}
    expected = jm.discover(model, pairs, chain=task / "chain.toml", metric=metric)
    assert len(expected.groups) == 4
    assert jm.Circuit.load(task / "run" / "circuit.json", task / "chain.toml").groups == expected.groups
    found = jm.read_scores(task / "run")
    for group, scores in expected.scores.items():
        np.testing.assert_array_equal(found[group].per_example, scores.per_example)
    printed = capsys.readouterr().out
    assert "Accuracy on 12 prompts" in printed and (task / "run" / "lookup.png").exists()
    words = {"probability": "mean change of p(correct)", "logit_difference": "mean change of the logit difference"}
    assert words[metric] in printed and "layer.head (change" in printed


def test_a_run_on_pairs_goes_on_and_other_pairs_are_other_settings(task, capsys):
    discover(task)
    discover(task)
    assert "finished stages: movers, lookup, binders, matchers" in " ".join(capsys.readouterr().out.split())
    changed = records(6)
    changed[3]["wrong_answer"] = changed[2]["wrong_answer"]
    write_task(task, changed)
    with pytest.raises(SystemExit):
        discover(task)
    assert "other settings (examples differ)" in " ".join(capsys.readouterr().err.split())


def test_a_model_that_cannot_do_the_task_of_a_file_is_warned_of(task, capsys):
    wrong = [x | {"answer": x["wrong_answer"], "wrong_answer": x["answer"]} for x in records(2)]
    write_task(task, wrong)
    discover(task)
    printed = " ".join(capsys.readouterr().out.split())
    assert "base answers no prompt right. A model that cannot do the task" in printed


def test_how_answers_are_read_can_be_chosen(task, capsys):
    several = [record | {"answer": f" {record['answer']} is"} for record in records(1)]
    write_task(task, several)
    with pytest.raises(SystemExit):
        discover(task)
    assert "is 2 tokens behind" in capsys.readouterr().err
    discover(task, "--first-token")
    assert json.loads((task / "run" / "config.json").read_text())["first_token"] is True


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        (["--scenes", "4"], records(2), "--scenes is of scenes that are made; with --data or --pairs, leave it out"),
        (["--data", "data.jsonl"], records(1), "--data and --pairs: give one of them"),
        (["--pairs", "none.jsonl"], records(1), "There is no file none.jsonl; expected a JSONL file of pairs"),
        ([], [{"clean": "The fig is", "answer": "in"}], 'has no "corrupt" prompts; path patching needs one'),
        ([], [{**records(1)[0], "roles": {}, "corrupt_roles": {}}], "'asked'; the prompts have the roles last."),
        (
            ["--metric", "logit_difference"],
            [{**records(1)[0], "wrong_answer": None}],
            "--metric logit_difference is of pairs with wrong answers",
        ),
        (["--batch-size", "0"], records(1), "--batch-size 0; expected at least 1"),
        ([], [{**records(1)[0], "answer": 3.5}], """pairs.jsonl, line 1: "answer" is 3.5; expected a text"""),
    ],
)
def test_bad_input_ends_with_a_message_and_leaves_nothing(task, capsys, arguments, lines, message):
    write_task(task, lines)
    with pytest.raises(SystemExit) as stop:
        discover(task, *arguments)
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (task / "run").exists()


def test_the_default_chain_is_not_that_of_another_task(task, capsys):
    with pytest.raises(SystemExit):
        cli.main(["discover", "--model", BASE, "--out", str(task / "run"), "--pairs", str(task / "pairs.jsonl")])
    printed = " ".join(capsys.readouterr().err.split())
    assert "Stage 'pos_detector' of the chain has the sender 'query_box'; the prompts have the roles last" in printed
    assert "The chain is the paper's, for boxes prompts; give that of your task." in printed


def test_what_a_file_lacks_is_said_before_weights_are_read(task, capsys, monkeypatch):
    write_task(task, [line | {"answer": "fig jar"} for line in records(2)])
    monkeypatch.setattr(jm, "load", None)
    with pytest.raises(SystemExit):
        discover(task)
    assert "pairs.jsonl, line 1: answers[0]: 'fig jar' is 2 tokens" in " ".join(capsys.readouterr().err.split())


def test_options_of_pairs_are_refused_without_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["discover", "--model", BASE, "--out", str(tmp_path / "run"), "--first-token"])
    assert "say how answers of --pairs are read; give --pairs, too" in " ".join(capsys.readouterr().err.split())


def test_boxes_prompts_have_no_wrong_answers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["discover", "--model", BASE, "--out", str(tmp_path / "run"), "--metric", "logit_difference"])
    assert "is of pairs with wrong answers" in " ".join(capsys.readouterr().err.split())
