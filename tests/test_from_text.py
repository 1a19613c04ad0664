"""Pairs from texts: positions by pieces and characters, and every prompt that cannot be meant is named."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_boxes import TOKENIZERS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxmech as jm

CLEAN = ["The fig is in Box X, the engine is in Box T. Box X contains the", "The radio is in Box A. Box A contains the"]
CORRUPT = [
    "The radio is in Box A. Box B contains the",
    "The fig is in Box X, the engine is in Box T. Box Q contains the",
]
ANSWERS = ["fig", "radio"]
ROLES = {"object": ["fig", "radio"], "verb": ["Box X contains", "Box A contains"], "period": "."}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def span(text: str, piece: str, which: int = 0) -> tuple[int, int]:
    """The characters of an occurrence of `piece`."""
    start = -1
    for _ in range(which + 1):
        start = text.index(piece, start + 1)
    return start, start + len(piece)


def test_prompts_roles_and_answers_are_those_of_the_boxes_task(tokenizer):
    examples = jm.boxes.make(6, 3, seed=1)
    expected = jm.boxes.pairs(examples, tokenizer, seed=0)
    prompts = [example.prompt for example in examples]
    label = [f"Box {example.label}" for example in examples]
    roles = {
        "query_box": [span(text, piece, 1) for text, piece in zip(prompts, label, strict=True)],
        "prev_query_box": [span(text, piece, 0) for text, piece in zip(prompts, label, strict=True)],
        "object": [example.answer for example in examples],
    }
    found = jm.Pairs.from_text(tokenizer, prompts, None, [example.answer for example in examples], roles)
    np.testing.assert_array_equal(found.clean, expected.clean)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert set(found.positions) == set(expected.positions) and found.corrupt is None
    for role, positions in expected.positions.items():
        np.testing.assert_array_equal(found.position(role), positions)


def test_corrupt_prompts_have_places_of_their_own(tokenizer):
    theirs = {"object": ["radio", "fig"], "period": "."}
    found = jm.Pairs.from_text(tokenizer, CLEAN, CORRUPT, ANSWERS, ROLES, theirs)
    assert set(found.positions) == {"last", "object", "verb", "period"}
    assert set(found.corrupt_positions) == {"last", "object", "period"}
    same = jm.Pairs.from_text(tokenizer, CLEAN, CLEAN[::-1], ANSWERS, {"period": "."})
    np.testing.assert_array_equal(same.corrupt_positions["period"], same.positions["period"][::-1])
    np.testing.assert_array_equal(same.corrupt_positions["last"], same.positions["last"][::-1])
    assert len(set(same.positions["last"])) == 2, "of unequal lengths"
    for pairs, rows in ((same, same.clean), (found, found.clean)):
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in CLEAN]
        for row, last, own in zip(rows, pairs.positions["last"], ids, strict=True):
            assert row[last + 1 - len(own) : last + 1].tolist() == own


def test_a_place_is_its_last_token(tokenizer):
    text = "The fig is in Box X, the engine is in Box T. Box T contains the"
    places = {"first": "The fig is", "is": span(text, "is"), "letter": span(text, "X"), "part": span(text, "engin")}
    found = jm.Pairs.from_text(tokenizer, [text], None, ["engine"], places)
    assert found.position("first") == found.position("is")
    assert tokenizer.decode([found.clean[0, found.position("letter")[0]]]).strip() == "X"
    whole = jm.Pairs.from_text(tokenizer, [text], None, ["engine"], {"object": "engine"})
    assert found.position("part") == whole.position("object")


def test_bos_and_the_space_before_an_answer_can_be_chosen():
    tokenizer = TOKENIZERS["sentencepiece-like"]()
    with_bos, without = (jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS, ROLES, add_bos=x) for x in (None, False))
    assert (with_bos.clean[:, 0] == tokenizer.bos_token_id).all()
    assert (without.clean[:, 0] == with_bos.clean[:, 1]).all()
    for role in with_bos.positions:
        np.testing.assert_array_equal(with_bos.position(role), without.position(role) + 1)
    spaced = jm.Pairs.from_text(tokenizer, CLEAN, None, [f" {answer}" for answer in ANSWERS])
    np.testing.assert_array_equal(spaced.labels, with_bos.labels)
    comma = jm.Pairs.from_text(tokenizer, ["The fig is in Box X"], None, [","], between="")
    assert tokenizer.convert_ids_to_tokens(comma.labels.tolist()) == [","]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": ["fig", "fig engine"]},
            r"answers\[1\]: 'fig engine' is 2 tokens behind 'The radio",
        ),
        ({"answers": ["fig", "zebra"]}, r"answers\[1\]: the tokenizer does not know 'zebra', the answer to 'The radio"),
        ({"answers": ["fig"]}, r"answers is \['fig'\]; expected a list of 2"),
        ({"answers": "ab"}, "answers is 'ab'; expected a list of 2"),
        ({"clean": CLEAN[0]}, "clean is 'The fig .*; expected a list of prompts"),
        ({"clean": [CLEAN[0], 3]}, r"clean\[1\] is 3; expected a prompt as text"),
        ({"clean": [CLEAN[0], ""], "add_bos": False}, r"clean\[1\] is '', which has no tokens"),
        ({"clean": [CLEAN[0], ""]}, r"clean\[1\] is '', which has no tokens"),
        ({"corrupt": CORRUPT[:1]}, r"corrupt is \['The radio.*; expected a list of 2"),
        ({"roles": {"object": ["fig", "fig"]}}, r"roles\['object'\] of example 1: 'fig' is not in 'The radio"),
        ({"roles": {"box": "Box A"}}, r"roles\['box'\] of example 0: 'Box A' is not in"),
        ({"roles": {"box": ["Box T", "Box A"]}}, r"of example 1: 'Box A' is 2 times in .*; give a longer piece, or"),
        ({"roles": {"box": (60, 900)}}, r"example 0: \(60, 900\); expected a piece of .* of its 63 characters"),
        ({"roles": {"box": [(0, 3), (3, 3)]}}, r"example 1: \(3, 3\); expected a piece"),
        ({"roles": {"space": (3, 4)}}, "the tokenizer has no token for ' ', the end of ' '"),
        ({"roles": {"box": ["fig"]}}, r"roles\['box'\] has 1 places; expected one for each of 2"),
        ({"roles": {"last": "the"}}, "roles names 'last', which is the last token of each prompt"),
        ({"corrupt": CORRUPT}, r"without corrupt_roles, .*roles\['object'\] of example 0: 'fig' is not in 'The radio"),
        ({"corrupt": CORRUPT, "corrupt_roles": {"x": "Y"}}, r"^corrupt_roles\['x'\] of example 0: 'Y' is not in"),
        (
            {"corrupt": CORRUPT, "roles": {"a": (0, 3)}},
            r"roles gives \['a'\] by characters or tokens of the clean prompts; give",
        ),
        ({"corrupt": CORRUPT, "roles": {"a": 3}}, r"roles gives \['a'\] by characters or tokens"),
        ({"corrupt": CORRUPT, "roles": {"a": np.array([3, 4])}}, r"roles gives \['a'\] by characters or tokens"),
        (
            {"roles": {"a": -1}},
            r"roles\['a'\] of example 0: -1; expected .*, or the index of one of its tokens, 0\.\.\d\d\.",
        ),
        (
            {"roles": {"a": [3, 15]}},
            r"example 1: 15; expected a piece of 'The radio.*of one of its tokens, 0\.\.\d\d\.",
        ),
        ({"roles": {"a": [3]}}, r"roles\['a'\] has 1 places; expected one for each of 2"),
        ({"roles": {"a": [3, True]}}, "example 1: True; expected a piece"),
        ({"roles": {"a": np.array([[3, 4], [5, 6]])}}, r"example 0: \[3, 4\]; expected a piece"),
        ({"roles": {"a": None}}, "example 0: None; expected a piece"),
        (
            {"clean": [CLEAN[0] + " ", CLEAN[1]]},
            r"answers\[0\]: the prompt 'The fig.* the ' ends in white space, and ' fig'",
        ),
        ({"clean": [CLEAN[0], CLEAN[1] + "\n"]}, r"answers\[1\]: the prompt .* ends in white .*, or give between=''"),
        ({"clean": [CLEAN[0] + " ", CLEAN[1]], "between": "", "answers": [" fig", " radio"]}, "ends in white space"),
        ({"corrupt": CORRUPT, "roles": {"a": ["The", (0, 3)]}}, r"roles gives \['a'\] by characters"),
        ({"corrupt_roles": {"x": "."}}, "corrupt_roles given without corrupt prompts"),
        ({"tokenizer": object()}, "object gives no character offsets"),
    ],
)
def test_what_cannot_be_meant_is_named(change, message):
    given = {"tokenizer": TOKENIZERS["word-level"](), "clean": CLEAN, "corrupt": None, "answers": ANSWERS}
    with pytest.raises(ValueError, match=message):
        jm.Pairs.from_text(**{**given, "roles": {"object": ROLES["object"]}, **change})


def test_answers_that_are_no_text_are_named():
    with pytest.raises(TypeError, match=r"answers\[1\] is 3.0; expected a text, the continuation of 'The radio"):
        jm.Pairs.from_text(TOKENIZERS["word-level"](), CLEAN, None, ["fig", 3.0])


def test_answers_may_be_ids_of_tokens(tokenizer):
    labels = jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS).labels
    found = jm.Pairs.from_text(tokenizer, CLEAN, None, [int(labels[0]), ANSWERS[1]])
    assert found.labels.tolist() == labels.tolist()
    assert jm.Pairs.from_text(tokenizer, CLEAN, None, labels).labels.tolist() == labels.tolist()


def test_of_longer_answers_the_first_token_can_be_taken(tokenizer):
    longer = [f"{answer} and the" for answer in ANSWERS]
    with pytest.raises(ValueError, match=r"answers\[0\]: 'fig and the' is .* tokens behind .* first_token=True"):
        jm.Pairs.from_text(tokenizer, CLEAN, None, longer)
    found = jm.Pairs.from_text(tokenizer, CLEAN, None, longer, wrong_answers=ANSWERS[::-1], first_token=True)
    expected = jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS).labels
    assert found.labels.tolist() == expected.tolist()
    assert found.wrong_labels is not None and len(found.wrong_labels) == 2


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose every character is a token, also a space."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate("? a=bc")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.mark.parametrize("first_token", [False, True])
def test_white_space_alone_is_no_first_token_of_an_answer(first_token):
    """As Llama's tokenizer has it before digits: all answers would be the same token."""
    with pytest.raises(ValueError, match=r"answers\[0\]: behind 'a=', the first token of ' b' is white space alone"):
        jm.Pairs.from_text(letters(), ["a="], None, ["b"], first_token=first_token)
    found = jm.Pairs.from_text(letters(), ["a="], None, ["b"], between="", first_token=first_token)
    assert found.labels.tolist() == [4]
    with pytest.raises(ValueError, match=r"does not continue 'a=' by tokens of '' \(between=''\)"):
        jm.Pairs.from_text(letters(), ["a="], None, [""], between="", first_token=first_token)


def test_a_wrong_answer_is_not_the_right_one(tokenizer):
    with pytest.raises(ValueError, match=r"wrong_answers\[1\]: 'radio' and the answer 'radio' are one token"):
        jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS, wrong_answers=["engine", "radio"])


def test_wrong_answers_are_the_wrong_labels(tokenizer):
    wrong = ["engine", "fig"]
    found = jm.Pairs.from_text(tokenizer, CLEAN, CORRUPT, ANSWERS, ROLES, {}, wrong_answers=wrong)
    assert found.wrong_labels is not None
    assert found.wrong_labels.tolist() == jm.Pairs.from_text(tokenizer, CLEAN, None, wrong).labels.tolist()
    with pytest.raises(ValueError, match=r"wrong_answers is \['fig'\]; expected a list of 2"):
        jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS, wrong_answers=["fig"])
    with pytest.raises(ValueError, match=r"wrong_answers\[1\]: "):
        jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS, wrong_answers=["fig", "fig engine"])


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = TOKENIZERS["sentencepiece-like"]()
    plain = jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS)
    written = jm.Pairs.from_text(tokenizer, [f"{tokenizer.bos_token}{text}" for text in CLEAN], None, ANSWERS)
    for pairs in (plain, written):
        assert (pairs.clean[:, 0] == tokenizer.bos_token_id).all() and (pairs.clean[:, 1] != pairs.clean[:, 0]).all()
    assert written.labels.tolist() == plain.labels.tolist()


def test_prompts_are_shown_with_their_roles(tokenizer):
    pairs = jm.Pairs.from_text(tokenizer, CLEAN, CORRUPT, ANSWERS, ROLES, {"period": "."})
    clean, corrupt = pairs.show(tokenizer, 1).split("\n")
    bare = lambda line, roles: re.sub(rf"\[({'|'.join(roles)})\]", "", line)  # noqa: E731
    squeezed = lambda text: "".join(text.split())  # noqa: E731
    ids = [tokenizer(text).input_ids for text in (CLEAN[1], CORRUPT[1])]
    texts = [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]
    assert squeezed(bare(clean, pairs.positions)).startswith(squeezed(f"clean: {texts[0]}"))
    assert squeezed(bare(corrupt, pairs.corrupt_positions)) == squeezed(f"corrupt: {texts[1]}")
    assert "radio[object]" in clean and "contains[verb]" in clean and ".[period]" in clean
    assert "the[last] -> " in clean and clean.endswith("'") and "radio" in clean[-9:]
    assert corrupt.endswith("[last]") and "[object]" not in corrupt
    alone = jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS)
    assert alone.show(tokenizer).startswith("clean: ") and "\n" not in alone.show(tokenizer)


def test_an_answer_that_brings_its_indentation_stands_after_a_line_break():
    found = jm.Pairs.from_text(TOKENIZERS["word-level"](), [f"{CLEAN[0]}\n"], None, [" fig"])
    assert found.labels == jm.Pairs.from_text(TOKENIZERS["word-level"](), CLEAN[:1], None, ["fig"]).labels


def test_roles_are_tokens_by_their_index(tokenizer):
    pieces = jm.Pairs.from_text(tokenizer, CLEAN, CORRUPT, ANSWERS, {"a": "The"}, {"a": "The", "b": "."})
    first, stops = pieces.position("a"), pieces.corrupt_position("b")
    for given in (int(first[0]), first[0], first, list(first), jnp.asarray(first)):
        found = jm.Pairs.from_text(tokenizer, CLEAN, CORRUPT, ANSWERS, {"a": given}, {"b": stops})
        np.testing.assert_array_equal(found.position("a"), first)
        np.testing.assert_array_equal(found.corrupt_position("b"), stops)
    mixed = jm.Pairs.from_text(tokenizer, CLEAN, None, ANSWERS, {"a": ["The", int(pieces.position("last")[1])]})
    assert mixed.position("a").tolist() == [first[0], pieces.position("last")[1]]


def test_prompts_with_words_that_the_tokenizer_does_not_know_are_warned_of():
    tokenizer, unknown = TOKENIZERS["word-level"](), CLEAN[1].replace("radio", "zebra")
    words = "not know all words of 2 of the 4 prompts, first 'zebra' in 'The zebra is in Box A"
    with pytest.warns(UserWarning, match=words) as found:
        jm.Pairs.from_text(tokenizer, [CLEAN[0], unknown], [*CORRUPT[:1], unknown], ANSWERS)
    assert len(found) == 1 and found[0].filename == __file__
    with pytest.warns(UserWarning, match="1 of the 1 prompts"):
        jm.Pairs.from_text(tokenizer, [unknown], None, ANSWERS[1:])


@pytest.mark.filterwarnings("error")
def test_unknown_tokens_that_are_meant_are_not_warned_of(tokenizer):
    jm.Pairs.from_text(tokenizer, CLEAN, CORRUPT, ANSWERS)
    known = TOKENIZERS["sentencepiece-like"]()
    jm.Pairs.from_text(known, ["The <unk> is in Box X"], None, [","], between="")
    known.unk_token = "<s>"  # as GPT-2's, whose only special token it is
    jm.Pairs.from_text(known, CLEAN, None, ANSWERS)


def test_all_tokens_of_a_name_are_those_from_its_first_character_to_its_end(tokenizer):
    name = "the engine is in Box T"
    start = CLEAN[0].index(name)
    pairs = jm.Pairs.from_text(tokenizer, CLEAN[:1], None, ["fig"], {"first": (start, start + 1), "whole": name})
    tokens = pairs.clean[0, pairs.between("first", "whole")[0]]
    assert "".join(tokenizer.decode(tokens).split()) == "".join(name.split())
