"""What a study of pairs is given: files, settings and tokenizers, checked before anything is computed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from pairs_task import records, settings_of, write_task
from tokenizers import Tokenizer

import jaxmech as jm
from jaxmech.study import Settings, StudyFolder, run


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, records(10))
    return settings_of(folder)


def with_other_numbers(folder: Path, one: str, other: str) -> Path:
    """The tuned model with a tokenizer that has the numbers of two words the other way round."""
    shutil.copytree(jm.demo.path("tuned"), folder)
    tokenizer = jm.load(jm.demo.path("tuned")).tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words[one], words[other] = words[other], words[one]
    Tokenizer.from_str(json.dumps(state)).save(str(folder / "tokenizer.json"))
    return folder


BAD = {
    "data, too": ({"data": Path("data.jsonl")}, records(2), "go without data and compat"),
    "compat": ({"compat": "paper"}, records(2), "go without data and compat"),
    "no prompts": ({"prompts": 0}, records(2), "prompts=0; expected at least 1"),
    "no wrong answers": (
        {},
        [line | {"wrong_answer": None} for line in records(2)],
        "needs wrong_labels, a wrong answer for each prompt; the pairs have none",
    ),
    "a metric": ({"metric": "accuracy"}, records(2), "metric='accuracy'; expected probability, log_probability or, of"),
    "another measure": ({"measure": "loss"}, records(2), "measure='loss'; expected accuracy, probability, log_prob"),
    "logit differences of boxes prompts": (
        {"pairs": None, "metric": "probability", "measure": "logit_difference", "chain": jm.PAPER_CHAIN},
        records(2),
        "measure='logit_difference'; expected accuracy, probability, log_probability or, of pairs with wrong answers",
    ),
    "no wrong answers to measure by": (
        {"metric": "probability", "measure": "logit_difference"},
        [line | {"wrong_answer": None} for line in records(2)],
        "needs wrong_labels, a wrong answer for each prompt; the pairs have none",
    ),
    "a measure that the published code lacks": (
        {"pairs": None, "metric": "probability", "measure": "probability", "chain": jm.PAPER_CHAIN, "compat": "paper"},
        records(2),
        "Measured by probability, with compat='paper': published code measures accuracy alone",
    ),
    "the logit difference of boxes prompts": ({"pairs": None}, records(2), "metric='logit_difference'; expected"),
    "desiderata of boxes prompts": (
        {"pairs": None, "metric": "probability", "chain": jm.PAPER_CHAIN, "desiderata": (Path("a.jsonl"),)},
        records(2),
        "desiderata are of pairs; those of boxes prompts are made",
    ),
    "desiderata of one name": (
        {"desiderata": (Path("a/x.jsonl"), Path("b/x.jsonl"))},
        records(2),
        "have the names of their files; 'x' is one of two",
    ),
    "a desideratum that is not there": ({"desiderata": (Path("x.jsonl"),)}, records(2), "There is no file x.jsonl"),
    "no corrupt prompts": ({}, [{"clean": "The fig is", "answer": "in"}] * 4, 'has no "corrupt" prompts'),
    "two prompts": ({}, records(1) * 3, "has 2 different clean prompts; a study needs at least 3"),
    "wrong answers that are right": (
        {},
        [line | {"wrong_answer": line["answer"]} for line in records(2)],
        "line 1: wrong_answers.0.: .* are one token",
    ),
    "two roles of the chain that are one token": (
        {"chain": (jm.Stage("a", "last"), jm.Stage("b", "asked", "a", "v"), jm.Stage("c", "twin", "a", "v"))},
        [
            line
            | {"roles": line["roles"] | {"twin": line["roles"]["asked"]}}
            | {"corrupt_roles": line["corrupt_roles"] | {"twin": line["corrupt_roles"]["asked"]}}
            for line in records(2)
        ],
        "roles 'asked' and 'twin' of the chain are the same token in every prompt",
    ),
    "an edge that leads on": ({"edges": (("before", "last"),)}, records(2), "the target must be before the source"),
    "an answer beyond the vocabulary": (
        {},
        [line | {"answer": {"token": 999}} for line in records(2)],
        "labels reach from",
    ),
    "a role with the name of the control": (
        {},
        [
            line | {"roles": line["roles"] | {"random": 0}, "corrupt_roles": line["corrupt_roles"] | {"random": 0}}
            for line in records(2)
        ],
        "A role is named 'random', as a random token is",
    ),
    "no file": ({"pairs": Path("none.jsonl")}, records(2), "There is no file none.jsonl"),
    "a role of the chain": (
        {},
        [line | {"roles": {}, "corrupt_roles": {}} for line in records(2)],
        "sender 'asked'; the prompts have the roles last",
    ),
    "the default chain": (
        {"chain": jm.PAPER_CHAIN},
        records(2),
        "has the sender 'query_box'; .* give that of your task",
    ),
    "edges": ({"edges": (("last", "object"),)}, records(2), "Unknown target 'object'; name roles of these pairs"),
    "an answer": (
        {},
        [*records(2), records(1)[0] | {"answer": "fig jar"}],
        "line 5: answers.4.: 'fig jar' is 2 tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_study_that_cannot_end_does_not_begin(settings, tmp_path, name):
    change, lines, message = BAD[name]
    write_task(tmp_path, lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        changed = dataclasses.replace(settings, **({"pairs": tmp_path / "pairs.jsonl"} | change))
        run(changed, StudyFolder.open(tmp_path / "out", changed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (records(1)[:1] * 3, "has 3 pairs; DCM needs at least 4"),
        ([line | {"corrupt": None, "corrupt_roles": {}} for line in records(2)], 'has no "corrupt" prompts'),
        (
            [line | {"roles": {}, "corrupt_roles": {}} for line in records(2)],
            r"'x' lacks the roles \['asked', 'before'\]",
        ),
        ([line | {"answer": "fig jar"} for line in records(2)], "x.jsonl, line 1: answers.* is 2 tokens"),
    ],
)
def test_desiderata_that_cannot_be_used_are_refused_before_anything_runs(settings, tmp_path, lines, message):
    write_task(tmp_path, lines)
    (tmp_path / "pairs.jsonl").rename(tmp_path / "x.jsonl")
    changed = dataclasses.replace(settings, desiderata=(tmp_path / "x.jsonl",))
    with pytest.raises(ValueError, match=message):
        run(changed, StudyFolder.open(tmp_path / "out", changed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("last_line_alone", [False, True])
def test_tokenizers_must_read_these_prompts_alike(settings, tmp_path, last_line_alone):
    lines = records(12)
    words = ("contains", "the") if not last_line_alone else (lines[-1]["answer"], lines[-1]["wrong_answer"])
    named = [set(line["clean"].replace(",", "").split()) for line in lines]
    lines = lines[-1:] * last_line_alone + [
        x for x, text in zip(lines, named, strict=True) if not last_line_alone or not text & set(words)
    ]
    write_task(tmp_path, lines[::-1])
    assert len(lines) > 10
    other = dataclasses.replace(
        settings, pairs=tmp_path / "pairs.jsonl", tuned=(with_other_numbers(tmp_path / "other", *words),)
    )
    with pytest.raises(ValueError, match="tokenizer of .*other reads .* models of a study must share one tokenizer"):
        StudyFolder.open(tmp_path / "out", other)


@pytest.mark.parametrize("change", [{"prompts": 5}, {"first_token": True}, {"between": ""}], ids=str)
def test_settings_of_pairs_are_refused_without_them(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* makes no difference to boxes prompts"):
        Settings(base=jm.demo.path("base"), tuned=(jm.demo.path("tuned"),), **change)


@pytest.mark.parametrize("change", [{"scenes": 5}, {"boxes": 3}, {"variants": False}, {"train": 10}], ids=str)
def test_settings_that_make_no_difference_to_pairs_are_refused_with_them(settings, tmp_path, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* makes no difference to pairs"):
        dataclasses.replace(settings, desiderata=(), **change)
    if "train" in change:
        assert dataclasses.replace(settings, desiderata=(tmp_path / "some.jsonl",), **change).train == 10
