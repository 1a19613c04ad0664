"""Pairs from texts: positions by pieces and characters, and every prompt that cannot be meant is named."""

import numpy as np
import pytest
from test_boxes import TOKENIZERS

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
            r"answers\[1\]: The tokenizer does not continue 'The radio .* 'fig engine'",
        ),
        ({"answers": ["fig", "zebra"]}, r"answers\[1\]: the tokenizer does not know 'zebra', the answer to 'The radio"),
        ({"answers": ["fig"]}, r"answers is \['fig'\]; expected a list of 2"),
        ({"answers": "ab"}, "answers is 'ab'; expected a list of 2"),
        ({"clean": CLEAN[0]}, "clean is 'The fig .*; expected a list of prompts"),
        ({"clean": [CLEAN[0], 3]}, r"clean\[1\] is 3; expected a prompt as text"),
        ({"clean": [CLEAN[0], ""], "add_bos": False}, r"clean\[1\] is '', which has no tokens"),
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
        ({"corrupt": CORRUPT, "roles": {"a": (0, 3)}}, r"roles gives \['a'\] by characters of the clean prompts; give"),
        ({"corrupt": CORRUPT, "roles": {"a": ["The", (0, 3)]}}, r"roles gives \['a'\] by characters"),
        ({"corrupt_roles": {"x": "."}}, "corrupt_roles given without corrupt prompts"),
        ({"tokenizer": object()}, "object gives no character offsets"),
    ],
)
def test_what_cannot_be_meant_is_named(change, message):
    given = {"tokenizer": TOKENIZERS["word-level"](), "clean": CLEAN, "corrupt": None, "answers": ANSWERS}
    with pytest.raises(ValueError, match=message):
        jm.Pairs.from_text(**{**given, "roles": {"object": ROLES["object"]}, **change})
