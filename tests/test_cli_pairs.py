"""The commands on prompts of the user's own task, from a file of pairs."""

import dataclasses
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
    words = {"probability": "mean change of p(correct)", "logit_difference": "mean change of logit difference"}
    assert words[metric] in printed and "layer.head (change" in printed


def look(task: Path, *more: str) -> None:
    cli.main(["prompts", "--model", BASE, "--pairs", str(task / "pairs.jsonl"), *more])


def test_prompts_are_shown_with_what_the_model_makes_of_them(task, capsys):
    look(task, "--show", "2")
    printed = capsys.readouterr().out
    model = jm.load(BASE)
    pairs = jm.read_pairs(task / "pairs.jsonl", model.tokenizer)
    assert all(pairs.show(model.tokenizer, row) in printed for row in (0, 1))
    assert pairs.show(model.tokenizer, 2) not in printed and "12 prompts" in printed
    corrupt = dataclasses.replace(pairs, clean=pairs.corrupt, positions=pairs.corrupt_positions)
    for some in (pairs, corrupt):
        probability, difference = (jm.predict(model, some, metric=x) for x in ("probability", "logit_difference"))
        for number in (f"{100 * probability.accuracy:.1f} %", f"{100 * probability.mean:.1f} %"):
            assert number in printed
        assert f"{difference.mean:+.2f}" in printed
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    places = {name.strip(): [x.strip() for x in cells] for name, *cells in rows}
    asked = pairs.position("asked")
    assert places["token of asked, from 0"][0] == f"{asked.min()} to {asked.max()}"
    assert places["tokens"][0] == f"{pairs.position('last').min() + 1} to {pairs.position('last').max() + 1}"
    assert "note" not in printed


def test_prompts_that_are_no_use_are_pointed_out(task, capsys):
    given = records(6)
    given[3] = given[3] | {"corrupt": given[3]["clean"], "corrupt_roles": given[3]["roles"]}
    write_task(task, [*given, given[0]])
    look(task, "--show", "0")
    printed = capsys.readouterr().out
    assert "note: 1 of 13 corrupt prompts are the clean ones; no head has an effect there." in printed
    assert "note: 1 of 13 clean prompts have been there before" in printed
    write_task(task, [{"clean": x["clean"], "answer": x["answer"], "roles": {"verb": "contains"}} for x in given])
    look(task)
    printed = capsys.readouterr().out
    assert "corrupt" not in printed and "token of verb, from 0" in printed and "logit" not in printed
    write_task(
        task, [x | {"clean": x["corrupt"], "corrupt": x["clean"], "corrupt_roles": {}, "roles": {}} for x in given]
    )
    look(task)
    assert "The answers are no less probable behind the corrupt prompts" in capsys.readouterr().out


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
