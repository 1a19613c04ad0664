"""Pairs hold what was given, row by row, and refuse what cannot be prompts."""

import dataclasses

import numpy as np
import pytest

import jaxmech as jm

GOOD = {
    "clean": [[1, 2, 3], [4, 5, 0]],
    "corrupt": [[1, 2, 3, 4], [4, 5, 6, 0]],
    "labels": [7, 8],
    "positions": {"last": [2, 1], "early": [0, 1]},
    "corrupt_positions": {"last": [3, 2], "early": [1, 0]},
}


def test_rows_are_taken_of_everything():
    pairs = jm.Pairs(**GOOD)
    for rows in (slice(1, 2), np.array([1]), np.array([False, True])):
        one = pairs[rows]
        assert len(one) == 1 and one.labels.tolist() == [8] and one.clean.tolist() == [[4, 5, 0]]
        assert one.position("early").tolist() == [1] and one.corrupt_position("last").tolist() == [2]
    wrong = dataclasses.replace(pairs, wrong_labels=[5, 6])
    assert wrong[1:].wrong_labels.tolist() == [6] and pairs[1:].wrong_labels is None
    assert dataclasses.replace(pairs, labels=[0, 0]).labels.tolist() == [0, 0]
    assert pairs != pairs[:], "two objects; arrays are compared one by one"


def test_concatenated_pairs_are_those_of_all_parts():
    first, second = jm.Pairs(**GOOD), jm.Pairs(**GOOD)[::-1]
    longer = dataclasses.replace(second, clean=[[4, 5, 0, 0], [1, 2, 3, 0]], wrong_labels=[1, 2])
    both = jm.Pairs.concatenate([dataclasses.replace(first, wrong_labels=[5, 6]), longer])
    assert both.clean.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [4, 5, 0, 0], [1, 2, 3, 0]]
    assert both.labels.tolist() == [7, 8, 8, 7] and both.wrong_labels.tolist() == [5, 6, 1, 2]
    assert both.corrupt.tolist() == [*GOOD["corrupt"], *GOOD["corrupt"][::-1]]
    assert both.position("early").tolist() == [0, 1, 1, 0] and both.corrupt_position("last").tolist() == [3, 2, 2, 3]
    assert jm.Pairs.concatenate([first]).wrong_labels is None
    plain = jm.Pairs(first.clean, None, first.labels, first.positions)
    assert len(alone := jm.Pairs.concatenate([plain, plain[:1]])) == 3 and alone.corrupt is None
    for parts, message in (
        ([], "has no parts"),
        ([first, plain], r"corrupt prompts: parts\[1\] has none, parts\[0\] some; expected the same"),
        ([first, longer], r"wrong_labels: parts\[1\] has some, parts\[0\] none"),
        ([plain, dataclasses.replace(plain, positions={"last": [2, 1]})], r"^positions: parts\[1\] has \['last'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            jm.Pairs.concatenate(parts)


def test_tokens_between_roles_are_those_of_both_and_all_that_stand_there():
    pairs = jm.Pairs(**GOOD)
    assert pairs.between("early", "last").tolist() == [[True, True, True], [False, True, False]]
    assert pairs.between("last", "last").tolist() == [[False, False, True], [False, True, False]]
    with pytest.raises(ValueError, match="'last' is token 2 of example 0, 'early' token 0, before it"):
        pairs.between("last", "early")
    with pytest.raises(ValueError, match="Unknown role 'first'"):
        pairs.between("first", "last")


@pytest.mark.parametrize("rows", [0, np.int64(1)])
def test_one_row_is_a_slice(rows):
    with pytest.raises(TypeError, match=r"for one example take pairs\[i : i \+ 1\]"):
        jm.Pairs(**GOOD)[rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": [[1, 2, 3], [4, 5]]}, "clean is no array: .* Pad the prompts on the right"),
        ({"wrong_labels": [5]}, "wrong_labels has 1 examples, clean has 2"),
        ({"wrong_labels": [5, -6]}, "wrong_labels holds the negative id -6"),
        ({"clean": [1, 2, 3]}, r"clean has shape \(3,\); expected 2 axes"),
        ({"clean": [[1.0, 2, 3], [4, 5, 0]]}, "clean has dtype float64; expected integer token ids"),
        ({"clean": [[1, 2, -100], [4, 5, 0]]}, "clean holds the negative id -100; pad with any real token id"),
        ({"clean": [[1, 2, 2**33], [4, 5, 0]]}, "clean holds 8589934592, which is no 32-bit number"),
        ({"labels": [7, -1]}, r"labels holds the negative id -1\.$"),
        ({"labels": [7]}, "labels has 1 examples, clean has 2"),
        ({"corrupt": [[1, 2, 3, 4]]}, "corrupt has 1 examples, clean has 2"),
        ({"corrupt": None}, "corrupt_positions given without corrupt prompts"),
        ({"positions": {"early": [0, 1]}}, "'last' .* is missing"),
        ({"positions": {"last": [2]}}, r"positions\['last'\] has 1 examples, the prompts 2"),
        ({"positions": {"last": [2, 3]}}, r"positions\['last'\] of example 1 is 3; expected 0..2"),
        ({"positions": {"last": [2, -1]}}, "of example 1 is -1; expected 0..2, a token of .* counted from the start"),
        ({"positions": {"early": [0, 0], "last": [2, -1]}}, r"positions\['last'\] of example 1 is -1; expected 0..2"),
        ({"positions": {"last": [2, 1], "early": [0, -1]}}, r"positions\['early'\] of example 1 is -1; expected 0..1"),
        ({"positions": {"last": [2, 1], "early": [0, 2]}}, r"positions\['early'\] of example 1 is 2; expected 0..1"),
        ({"positions": {"last": [2.0, 1.0]}}, "dtype float64; expected integer positions"),
    ],
)
def test_what_cannot_be_prompts_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jm.Pairs(**{**GOOD, **change})


@pytest.mark.parametrize("rows", [np.zeros(2, bool), np.zeros(0, int), slice(0, 0), slice(5, None)])
def test_a_selection_of_no_prompts_is_named(rows):
    with pytest.raises(ValueError, match="selects none of the 2 prompts"):
        jm.Pairs(**GOOD)[rows]


def test_pairs_are_shown_in_one_line():
    pairs = jm.Pairs(**GOOD)
    assert repr(pairs) == "Pairs(2 prompts, 3 and 4 tokens, roles last, early)"
    assert repr(pairs[:1]) == "Pairs(1 prompt, 3 and 4 tokens, roles last, early)"
    alone = dataclasses.replace(pairs, corrupt=None, corrupt_positions={})
    assert repr(alone) == "Pairs(2 prompts, 3 tokens, roles last, early, no corrupt prompts)"


def test_unknown_roles_are_named():
    pairs = jm.Pairs(**GOOD)
    with pytest.raises(ValueError, match=r"Unknown role 'first'; these pairs have positions for \['early', 'last'\]"):
        pairs.position("first")
    with pytest.raises(ValueError, match="Unknown role 'first'; these pairs have positions for"):
        pairs.corrupt_position("first")
    some = dataclasses.replace(pairs, corrupt_positions={"last": pairs.corrupt_position("last")})
    with pytest.raises(ValueError, match=r"Unknown role 'early'; these pairs have corrupt_positions for \['last'\]"):
        some.corrupt_position("early")
    with pytest.raises(ValueError, match="no corrupt prompts"):
        jm.Pairs(GOOD["clean"], None, GOOD["labels"], GOOD["positions"]).corrupt_position("last")


LEFT = [[0, 0, 5, 6], [0, 3, 4, 5], [3, 4, 5, 6]]


@pytest.mark.parametrize("name", ["clean", "corrupt"])
def test_prompts_that_seem_to_be_padded_on_the_left_are_warned_of(name):
    last = {"last": [3, 3, 3]}
    given = {"clean": [[3, 4, 5, 6]] * 3, "corrupt": [[3, 4, 5, 6]] * 3, name: LEFT}
    words = f"1 of 3 {name} prompts begin with token 0 twice or more, the others do not.*pad prompts on the right"
    with pytest.warns(UserWarning, match=words) as found:
        jm.Pairs(**given, labels=[1, 2, 3], positions=last, corrupt_positions=last)
    assert len(found) == 1 and found[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("tokens", "last"),
    [
        ([[0, 0, 5], [0, 0, 6]], [2, 2]),  # all of them
        ([[0, 0, 5], [1, 1, 6], [2, 3, 4]], [2, 2, 2]),  # words that are said twice
        ([[7, 7, 7], [7, 3, 4]], [0, 2]),  # a prompt of one token, padded by itself
        ([[7], [8]], [0, 0]),
    ],
)
def test_prompts_that_begin_with_a_token_twice_may_be_meant(tokens, last):
    pairs = jm.Pairs(tokens, tokens, [1] * len(tokens), {"last": last}, {"last": last})
    others = jm.Pairs([[3, 4]], [[3, 4]], [1], {"last": [1]}, {"last": [1]})
    jm.Pairs.concatenate([pairs, others])[1:]
