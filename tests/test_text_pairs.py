"""Pairs of prompts of any task, read from a file: they are those of `from_text`, and every wrong line is named."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from words import word_tokenizer

import jaxmech as jm
from jaxmech.text_pairs import pairs_of, read_texts

LINES = [
    {"clean": "w1 w2 w3 w4", "corrupt": "w5 w6 w3 w7", "answer": "w2", "wrong_answer": "w6", "roles": {"verb": "w3"}},
    {"clean": "w8 w9 w3", "corrupt": "w4 w1 w3", "answer": "w9", "wrong_answer": {"token": 1}, "roles": {"verb": "w3"}},
]
EQUAL = ("clean", "corrupt", "labels", "wrong_labels")


@pytest.fixture
def written(tmp_path):
    def write(lines) -> str:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "pairs.jsonl").write_text("\n".join(texts))
        return str(tmp_path / "pairs.jsonl")

    return write


def test_a_file_gives_the_pairs_of_its_texts(written):
    found = jm.read_pairs(written([LINES[0], "  ", LINES[1]]), word_tokenizer())
    expected = jm.Pairs.from_text(
        word_tokenizer(),
        [line["clean"] for line in LINES],
        [line["corrupt"] for line in LINES],
        ["w2", "w9"],
        {"verb": "w3"},
        wrong_answers=["w6", 1],
    )
    for name in EQUAL:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("positions", "corrupt_positions"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert set(ours) == {"last", "verb"} == set(theirs)
        for role in ours:
            np.testing.assert_array_equal(ours[role], theirs[role])
    assert found.position("verb").tolist() == [2, 2] and found.labels.tolist() == [2, 9]


def test_roles_by_numbers_and_places_of_their_own_in_corrupt_prompts(written):
    line = LINES[0] | {"roles": {"verb": [6, 8], "first": 0}, "corrupt_roles": {"verb": "w7", "first": 1}}
    found = jm.read_pairs(written([line]), word_tokenizer())
    assert {role: int(at[0]) for role, at in found.positions.items()} == {"last": 3, "verb": 2, "first": 0}
    assert {role: int(at[0]) for role, at in found.corrupt_positions.items()} == {"last": 3, "verb": 3, "first": 1}
    some = line | {"roles": {"verb": "w3", "first": 0}, "corrupt_roles": {"first": 1}}
    found = jm.read_pairs(written([some]), word_tokenizer())
    assert {role: int(at[0]) for role, at in found.corrupt_positions.items()} == {"last": 3, "verb": 2, "first": 1}


def test_a_byte_order_mark_and_other_ends_of_lines_are_no_text(tmp_path):
    text = "\r\n".join(json.dumps(line) for line in LINES)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(jm.read_pairs(tmp_path / "windows.jsonl", word_tokenizer())) == 2


def test_what_may_be_left_out(written):
    found = jm.read_pairs(written([{"clean": "w1 w2", "answer": "w3", "note": "other keys are"}]), word_tokenizer())
    assert found.corrupt is None and found.wrong_labels is None and set(found.positions) == {"last"}
    found = jm.read_pairs(written([{"clean": "w1 w2", "answer": "w3", "corrupt": "w2 w2"}]), word_tokenizer())
    assert set(found.corrupt_positions) == {"last"}


def test_how_answers_are_read_can_be_chosen(written):
    several = written([{"clean": "w1 w2", "answer": "w3 w4"}])
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 1: answers\[0\]: 'w3 w4' is 2 tokens"):
        jm.read_pairs(several, word_tokenizer())
    assert jm.read_pairs(several, word_tokenizer(), first_token=True).labels.tolist() == [3]
    spaced = written([{"clean": "w1 ", "answer": "w3"}])
    with pytest.raises(ValueError, match="ends in white space"):
        jm.read_pairs(spaced, word_tokenizer())
    assert jm.read_pairs(spaced, word_tokenizer(), between="").labels.tolist() == [3]
    with pytest.raises(ValueError, match="has no BOS token"):
        jm.read_pairs(spaced, word_tokenizer(), add_bos=True)


def test_the_example_of_the_readme_is_a_pair(written):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall(r"```\n(\{\"clean\".*?)```", readme, flags=re.DOTALL)
    (pair,) = read_texts(written([block.replace("\n", "")]))
    assert (pair.answer, pair.wrong_answer) == ("Mary", "John")
    for text, roles in ((pair.clean, pair.roles), (pair.corrupt, pair.corrupt_roles)):
        assert text and text.count(str(roles["subject"])) == 1


def test_a_sentence_is_the_prompt_with_its_answer(written):
    texts = read_texts(written(LINES))
    assert [pair.sentence for pair in texts] == ["w1 w2 w3 w4 [w2]", "w8 w9 w3 [w9]"]
    assert pairs_of(texts[1:], word_tokenizer()).clean.tolist() == [[8, 9, 3]]
    assert read_texts(written([{"clean": "w1", "answer": {"token": 7}}]))[0].sentence == "w1 [token 7]"


BAD = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[1]", 'found list; expected an object with the keys "clean" and "answer"'),
    "no answer": ({"clean": "w1"}, '"answer" is missing or null; expected "clean" and "answer" at least'),
    "clean no text": ({"clean": 3, "answer": "w1"}, '"clean" is 3; expected a text'),
    "answer no text": ({"clean": "w1", "answer": True}, '"answer" is True; expected a text, or {"token": ID}'),
    "answer a number": ({"clean": "w1", "answer": 42}, '"answer" is 42; expected a text; "42", if that is the answer'),
    "answer an object": ({"clean": "w1", "answer": {"token": "42"}}, "is {'token': '42'}; expected a text, or"),
    "roles no object": (LINES[0] | {"roles": "w3"}, """"roles" is 'w3'; expected an object"""),
    "a role without a place": (LINES[0] | {"roles": {"verb": None}}, """"roles" of 'verb' is None; expected a piece"""),
    "other roles": (LINES[0] | {"roles": {"noun": "w3"}}, r"has the roles \['noun'\], the first one \['verb'\]"),
    "no roles": (LINES[0] | {"roles": None}, r"has the roles \[\], the first one \['verb'\]"),
    "no corrupt prompt": ({**LINES[0], "corrupt": None}, 'this line has no "corrupt", but the first one has'),
    "no wrong answer": ({**LINES[0], "wrong_answer": None}, 'this line has no "wrong_answer", but the first one has'),
    "numbers of clean prompts alone": (LINES[0] | {"roles": {"verb": 2}}, r"gives \['verb'\] by numbers"),
    "a key misspelt": ({**LINES[0], "wrong_answers": "w3"}, 'there is no key "wrong_answers"; is "wrong_answer" meant'),
    "another": ({**LINES[0], "role": {}}, 'there is no key "role"; is "roles" meant'),
    "a piece that the corrupt prompt lacks": (
        LINES[0] | {"roles": {"verb": "w4"}},
        "the role 'verb' is 'w4', which is not in the corrupt prompt 'w5 w6 w3 w7'; give its place",
    ),
    "corrupt roles unknown": (
        LINES[0] | {"corrupt_roles": {"noun": 1}},
        r"corrupt_roles names \['noun'\], which are none of the roles \['verb'\]",
    ),
    "corrupt roles of none": (
        {"clean": "w1", "answer": "w2", "corrupt_roles": {"noun": 1}},
        r"corrupt_roles names \['noun'\], but there is no .corrupt. prompt",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_line_is_named(written, name):
    line, message = BAD[name]
    with pytest.raises(ValueError, match=rf"pairs.jsonl, line 2: .*{message}"):
        jm.read_pairs(written([LINES[0], line]), word_tokenizer())


def test_what_the_tokenizer_does_not_find_names_the_file_and_the_example(written):
    lines = [LINES[0], " ", LINES[1] | {"roles": {"verb": "w30"}, "corrupt_roles": {"verb": "w3"}}]
    with pytest.raises(
        ValueError, match=r"^[^:]*pairs.jsonl, line 3: roles\['verb'\] of example 1: 'w30' is not in 'w8"
    ):
        jm.read_pairs(written(lines), word_tokenizer())
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 1: wrong_answers\[0\]: 'w1 w2' is 2 tokens"):
        jm.read_pairs(written([LINES[0] | {"wrong_answer": "w1 w2"}]), word_tokenizer())
    with pytest.raises(ValueError, match="pairs.jsonl holds no pairs of prompts"):
        jm.read_pairs(written([""]), word_tokenizer())
    with pytest.raises(FileNotFoundError, match="There is no file none.jsonl"):
        jm.read_pairs("none.jsonl", word_tokenizer())


def test_unknown_words_are_warned_of_where_they_are(written):
    with pytest.warns(UserWarning, match="does not know all words of 1 of the 2 prompts, first 'w99'") as caught:
        jm.read_pairs(written([{"clean": "w1 w99", "answer": "w3", "corrupt": "w1 w2"}]), word_tokenizer())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jm.read_pairs(written(LINES), word_tokenizer())
