"""Desiderata: texts and targets worked out by hand, roles, draws, and the defects that `compat` brings back."""

import re

import numpy as np
import pytest
from test_boxes import byte_level, sentencepiece_like, word_level
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import jaxmech as jm
from jaxmech import boxes
from jaxmech.boxes import desiderata
from jaxmech.boxes.scenes import LABELS

NAMES = tuple(boxes.DESIDERATA)
EXTRA_WORDS = (
    "There there are some boxes here each with one thing it These all of and what them contained three additional not"
).split()
SEGMENT = r"[Tt]he (\w+),? is (?:not in|in|contained in the) Box ([A-Z])|Box ([A-Z]) contains the (\w+)"


def demo():
    return AutoTokenizer.from_pretrained(jm.demo.path("base"))


def wordy():
    """A word-level tokenizer that knows every word of every variant, so that its text can be read back."""
    return word_level((*boxes.OBJECTS, *EXTRA_WORDS))


TOKENIZERS = {"demo": demo, "sentencepiece-like": sentencepiece_like, "byte-level": byte_level}
ORDINARY = wordy()


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def prompts(tokenizer, tokens, roles) -> list[str]:
    """Prompts as text, spaces as in the original."""
    texts = [
        tokenizer.decode(row[: last + 1], skip_special_tokens=True)
        for row, last in zip(tokens, roles["last"], strict=True)
    ]
    return [re.sub(r" ([,.])", r"\1", text).strip() for text in texts]


def triples(pairs, tokenizer=ORDINARY) -> list[tuple[str, str, str]]:
    """Base prompt, counterfactual prompt and target word of every example."""
    clean = prompts(tokenizer, pairs.clean, pairs.positions)
    corrupt = prompts(tokenizer, pairs.corrupt, pairs.corrupt_positions)
    return list(zip(clean, corrupt, [tokenizer.decode([label]).strip() for label in pairs.labels], strict=True))


def scene(prompt: str) -> list[tuple[str, str]]:
    """(object, label) of every segment, in order, whatever its wording; the question left out."""
    text, _, question = prompt.rpartition(". ")
    assert re.fullmatch(r"Box [A-Z] contains the", question)
    return [(m[1] or m[4], m[2] or m[3]) for m in re.finditer(SEGMENT, text)]


def queried(prompt: str) -> int:
    labels = [label for _, label in scene(prompt)]
    return labels.index(re.search(r"Box ([A-Z]) contains the$", prompt)[1])


# By hand: the base is segment 1 of four, the counterfactual segment 2. Nothing is shuffled, so that the counterfactual
# takes the first objects and letters that the base leaves; the next ones are spare.
BASE = boxes.Example(boxes.Scene(("fig", "engine", "radio", "bell"), ("X", "T", "R", "K")), 1)
POOL = ("bell", "coin", "cup", "egg", "engine", "fig", "hat", "map", "radio")
CORE = "the coin is in Box A, the cup is in Box B, the egg is in Box C, the hat is in Box D"
BY_HAND = {
    "positional": (f"T{CORE[1:]}. Box C contains the", "radio"),
    "object_value": (f"T{CORE[1:]}. Box C contains the", "egg"),
    "box_label_value": (
        "The coin is in Box A, the cup is in Box B, the egg is in Box X, the hat is in Box D. Box X contains the",
        "fig",
    ),
    "random_text_start": (
        f"There are some boxes here, each with one thing in it. T{CORE[1:]}. Box C contains the",
        "radio",
    ),
    "random_text_end": (
        f"T{CORE[1:]}. These are all of the boxes and what is in them. Box C contains the",
        "radio",
    ),
    "add_tokens_btw_box_and_obj": (
        "The coin is in Box A, the cup is in Box B, the egg is contained in the Box C, the hat is in Box D. "
        "Box C contains the",
        "radio",
    ),
    "add_seg_start": (f"The map is in Box E, {CORE}. Box C contains the", "radio"),
    "add_seg_end": (f"T{CORE[1:]}, the map is in Box E. Box C contains the", "radio"),
    "add_box_before_correct_segment": (
        "The coin is in Box A, the cup is in Box B, there are three additional boxes, Box E, Box F and Box G, "
        "the egg is in Box C, the hat is in Box D. Box C contains the",
        "radio",
    ),
    "incorrect_segment": (f"T{CORE[1:]}. Box C contains the", "bell"),
    "altered_box_obj_order": (
        "The coin is in Box A, the cup is in Box B, Box C contains the egg, the hat is in Box D. Box C contains the",
        "radio",
    ),
    "altered_box_obj_association": (
        "The coin is in Box A, the cup is in Box B, the egg is not in Box C, the hat is in Box D. Box C contains the",
        "radio",
    ),
    "add_comma": (
        "The coin, is in Box A, the cup, is in Box B, the egg, is in Box C, the hat, is in Box D. Box C contains the",
        "radio",
    ),
    "no_comma": (
        "The coin is in Box A the cup is in Box B the egg is in Box C the hat is in Box D. Box C contains the",
        "radio",
    ),
}


class Unshuffled:
    """Random numbers that shuffle nothing and of all choices pick `row`."""

    def __init__(self, row: int):
        self.row = row

    def permutation(self, values):
        return values

    def integers(self, high):
        return self.row


def test_a_text_is_worked_out_for_every_name():
    assert set(BY_HAND) == set(NAMES) == {"positional", "object_value", "box_label_value", *boxes.POSITION_VARIANTS}
    assert len(boxes.POSITION_VARIANTS) == 11


@pytest.mark.parametrize("name", BY_HAND)
def test_texts_and_targets_are_those_worked_out_by_hand(name):
    choices = desiderata._choices(name, BASE.query, 4, None)
    row = choices.index({"box_label_value": (2, 0), "incorrect_segment": (2, 3)}.get(name, (2, 2)))
    assert desiderata._triple(name, BASE, POOL, Unshuffled(row), None) == BY_HAND[name]


def test_the_first_segment_of_an_altered_scene_starts_with_a_capital():
    start = {
        "altered_box_obj_order": "Box A contains the coin, the cup",
        "add_box_before_correct_segment": "There are three additional boxes, Box E, Box F and Box G, the coin is",
    }
    for name, text in start.items():
        assert desiderata._triple(name, BASE, POOL, Unshuffled(0), None)[0].startswith(text)


SIZES = [(name, size) for name in NAMES for size in (2, 3, 7, 10) if name != "incorrect_segment" or size > 3]


@pytest.mark.parametrize(("name", "n_boxes"), SIZES)
def test_targets_follow_from_the_two_prompts(name, n_boxes):
    for base, counterfactual, target in triples(boxes.desideratum(name, boxes.make(8, n_boxes), ORDINARY)):
        told, other = scene(base), scene(counterfactual)
        i, j = queried(base), queried(counterfactual) - (name == "add_seg_start")
        assert len(told) == n_boxes and len(other) == n_boxes + name.startswith("add_seg")
        k = next((k for k, (_, label) in enumerate(told) if label == other[j][1]), None)
        if name == "object_value":
            assert target == other[j][0]
        elif name == "box_label_value":
            assert target == told[k][0] and j != k != i and (j != i or n_boxes == 2)
        else:
            assert target == told[j + (name == "incorrect_segment")][0]
        assert target != told[i][0] and (j != i or (name, n_boxes) == ("box_label_value", 2))


def test_counterfactuals_share_nothing_with_the_base_but_a_label_that_is_asked_for(name):
    for base, counterfactual, _ in triples(boxes.desideratum(name, boxes.make(8), ORDINARY)):
        objects, labels = (set(x) for x in zip(*scene(base), strict=True))
        other_objects = [word for word, _ in scene(counterfactual)]
        *told, asked = re.findall(r"Box ([A-Z])", counterfactual)
        assert len(set(told)) == len(told) and asked in told
        assert len(set(other_objects)) == len(other_objects) and not objects & set(other_objects)
        assert labels & set(told) == ({asked} if name == "box_label_value" else set())


def test_variants_alter_the_counterfactual_of_the_same_seed():
    plain, *altered = (
        triples(boxes.desideratum(name, boxes.make(6), ORDINARY))
        for name in ("positional", *boxes.POSITION_VARIANTS)
        if name != "incorrect_segment"
    )
    for variant in altered:
        for (base, counterfactual, target), (its_base, its_counterfactual, its_target) in zip(
            plain, variant, strict=True
        ):
            assert (base, target) == (its_base, its_target) and counterfactual != its_counterfactual
            assert set(scene(counterfactual)) <= set(scene(its_counterfactual))


def test_roles_and_targets_are_the_tokens_they_name(tokenizer, name):
    examples = boxes.make(6)
    pairs = boxes.desideratum(name, examples, tokenizer)
    expected = triples(boxes.desideratum(name, examples, ORDINARY))
    word = lambda token: tokenizer.decode([token]).strip()  # noqa: E731
    for row, (base, counterfactual, target) in enumerate(expected):
        assert word(pairs.labels[row]) == target
        for text, tokens, positions in (
            (base, pairs.clean[row], pairs.positions),
            (counterfactual, pairs.corrupt[row], pairs.corrupt_positions),
        ):
            last, query_box, prev_query_box = (int(positions[role][row]) for role in boxes.ROLES)
            assert [word(token) for token in tokens[query_box - 1 : last + 1]] == text.split()[-4:]
            assert list(np.flatnonzero(tokens[:query_box] == tokens[query_box])) == [prev_query_box]


def test_targets_are_the_tokens_that_continue_the_base(tokenizer, name):
    pairs = boxes.desideratum(name, boxes.make(3), tokenizer, add_bos=False)
    words = [target for _, _, target in triples(boxes.desideratum(name, boxes.make(3), ORDINARY))]
    for row, (example, word) in enumerate(zip(boxes.make(3), words, strict=True)):
        ids = tokenizer(f"{example.prompt} {word}", add_special_tokens=False).input_ids
        assert [*pairs.clean[row, : pairs.positions["last"][row] + 1], pairs.labels[row]] == ids


def test_scenes_of_different_sizes_are_padded_on_the_right(name):
    pairs = boxes.desideratum(name, boxes.make(3, 4) + boxes.make(3, 6), ORDINARY)
    assert len(set(pairs.positions["last"])) == len(set(pairs.corrupt_positions["last"])) == 2
    for _, counterfactual, _ in triples(pairs):
        assert counterfactual.endswith("contains the")


@pytest.mark.parametrize("n", [None, 5, 60])
def test_triples_do_not_depend_on_the_order_of_the_examples(name, n):
    examples = boxes.make(4)
    shuffled = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))]
    forth, back = (triples(boxes.desideratum(name, e, ORDINARY, n=n, seed=3)) for e in (examples, shuffled))
    assert sorted(forth) == sorted(back)


@pytest.mark.parametrize("compat", [None, "paper"])
def test_several_desiderata_are_those_of_each_alone(compat):
    options = {"n": 60, "seed": 3, "compat": compat}  # some bases come twice, and with the same target
    together = boxes.triples(NAMES, boxes.make(4, 6), demo(), **options)
    assert list(together) == list(NAMES)
    for name, found in together.items():
        alone = boxes.desideratum(name, boxes.make(4, 6), demo(), **options)
        for field in ("clean", "corrupt", "labels"):
            np.testing.assert_array_equal(getattr(found, field), getattr(alone, field))
        for field in ("positions", "corrupt_positions"):
            ours, theirs = getattr(found, field), getattr(alone, field)
            assert all((ours[role] == theirs[role]).all() for role in boxes.ROLES)


def test_triples_depend_on_the_seed(name):
    first, second = (triples(boxes.desideratum(name, boxes.make(4), ORDINARY, seed=seed)) for seed in (0, 1))
    assert [base for base, *_ in first] == [base for base, *_ in second]
    assert all(a[1] != b[1] for a, b in zip(first, second, strict=True))
    some = [triples(boxes.desideratum(name, boxes.make(4), ORDINARY, n=9, seed=seed)) for seed in (0, 1)]
    assert [base for base, *_ in some[0]] != [base for base, *_ in some[1]]


def test_triples_stand_in_the_order_of_the_examples():
    prompts_in_order = [example.prompt for example in boxes.make(4)]
    every = [base for base, *_ in triples(boxes.desideratum("positional", boxes.make(4), ORDINARY))]
    some = [base for base, *_ in triples(boxes.desideratum("positional", boxes.make(4), ORDINARY, n=9))]
    assert every == prompts_in_order
    assert len(some) == 9 and some == [prompt for prompt in prompts_in_order if prompt in some]


def test_more_triples_than_examples_repeat_bases_with_other_counterfactuals(name):
    found = triples(boxes.desideratum(name, boxes.make(3), ORDINARY, n=100))
    assert len({base for base, *_ in found}) <= 21 and len({counterfactual for _, counterfactual, _ in found}) == 100


def test_the_defect_of_the_segment_index_makes_a_seventh_of_the_targets_the_own_answer():
    for name in ("positional", "random_text_end", "incorrect_segment"):
        examples = boxes.make(60)
        found = triples(boxes.desideratum(name, examples, ORDINARY, compat="paper"))
        own = np.mean([target == e.answer for e, (_, _, target) in zip(examples, found, strict=True)])
        assert abs(own - 1 / 7) < 0.06, name  # 3.5 standard deviations of 420 draws
        assert {queried(counterfactual) for _, counterfactual, _ in found} == {1, 2, 3, 4, 5, 6}
        for base, counterfactual, target in found:
            place = (queried(counterfactual) + (name == "incorrect_segment")) % 7
            assert target == scene(base)[place][0]


def test_the_defect_of_the_list_makes_the_target_a_token_without_space():
    bare, words = (
        boxes.OBJECTS[::2],
        (*EXTRA_WORDS, "The", "the", "is", "in", "Box", "contains", *LABELS, *boxes.OBJECTS),
    )
    tokens = ["<unk>", ",", ".", "The", *(f"\u2581{word}" for word in words), *bare]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    right, wrong = (
        boxes.desideratum("box_label_value", boxes.make(9), tokenizer, compat=compat) for compat in (None, "paper")
    )
    np.testing.assert_array_equal(right.corrupt, wrong.corrupt)
    for good, bad in zip(right.labels, wrong.labels, strict=True):
        word = tokens[good].removeprefix("\u2581")
        assert tokens[bad] == (word if word in bare else "<unk>")
    assert 0.3 < (wrong.labels == 0).mean() < 0.7


def test_the_defect_of_the_list_needs_a_token_for_unknown_words():
    with pytest.raises(ValueError, match="no token '[a-z]+' and no unknown token"):
        boxes.desideratum("box_label_value", boxes.make(9), byte_level(), compat="paper")


def test_the_defect_of_the_corrupt_letter_lets_it_occur_in_the_scenes():
    examples = boxes.make(100)
    pairs, sound = (boxes.pairs(examples, ORDINARY, compat=compat) for compat in ("paper", None))
    texts = [corrupt for _, corrupt, _ in triples(pairs)]
    asked = [re.search(r"Box ([A-Z]) contains the$", text)[1] for text in texts]
    in_corrupt = [label in dict(map(reversed, scene(text))) for label, text in zip(asked, texts, strict=True)]
    in_clean = [label in example.scene.labels for label, example in zip(asked, examples, strict=True)]
    assert abs(np.mean(in_corrupt) - 7 / 26) < 0.06 and abs(np.mean(in_clean) - 7 / 26) < 0.06  # 3.5 deviations
    assert set(asked) == set(LABELS)
    np.testing.assert_array_equal(pairs.corrupt_positions["prev_query_box"], sound.corrupt_positions["prev_query_box"])
    scenes = lambda found: [text.rpartition(". ")[0] for _, text, _ in triples(found)]  # noqa: E731
    assert scenes(pairs) == scenes(sound)


BAD_CALLS = {
    "There is no desideratum 'position'; expected one of positional, object_value": {"name": "position"},
    "No examples; desiderata need base examples": {"examples": []},
    "n=0; expected at least 1": {"n": 0},
    "compat='publication'; expected None, or 'paper'": {"compat": "publication"},
    "There are 7 objects; 'positional' needs 14 for scenes of 7 boxes": {"examples": boxes.make(1)},
    "'add_seg_end' needs 15 for scenes of 7": {"examples": boxes.make(1), "name": "add_seg_end"},
    "'incorrect_segment' has no target for segment 0 of 2; use scenes of at least 4": {
        "examples": boxes.make(9, 2),
        "name": "incorrect_segment",
    },
}


@pytest.mark.parametrize(("message", "arguments"), BAD_CALLS.items(), ids=range(len(BAD_CALLS)))
def test_impossible_desiderata_are_refused(message, arguments):
    sound = {"name": "positional", "examples": boxes.make(4)}
    with pytest.raises(ValueError, match=message):
        boxes.desideratum(tokenizer=ORDINARY, **(sound | arguments))
    if "n" not in arguments:
        with pytest.raises(ValueError, match=message):
            boxes.check_desideratum(**(sound | arguments))


def test_a_desideratum_that_passes_its_check_can_be_made(name):
    examples = boxes.make(2, 4)
    boxes.check_desideratum(name, examples, boxes.OBJECTS)
    assert len(boxes.desideratum(name, examples, ORDINARY, objects=boxes.OBJECTS)) == 8


def test_counterfactuals_are_made_of_the_objects_given():
    examples = boxes.make(1, 2)
    pool = {*examples[0].scene.objects, "fig", "map"}
    for base, counterfactual, _ in triples(boxes.desideratum("positional", examples, ORDINARY, objects=pool)):
        named = {word for word, _ in scene(counterfactual)}
        assert named == pool - {word for word, _ in scene(base)} == {"fig", "map"}


def test_pairs_refuse_an_unknown_compat():
    with pytest.raises(ValueError, match="compat='publication'; expected None, or 'paper'"):
        boxes.pairs(boxes.make(4), ORDINARY, compat="publication")


def test_objects_that_the_tokenizer_splits_are_refused(name):
    known = word_level([word for word in boxes.OBJECTS if word != "fig"])
    with pytest.raises(ValueError, match="does not know 1 objects: fig. Use examples with other objects"):
        boxes.desideratum(name, boxes.make(40), known)


def test_a_tokenizer_without_the_labels_is_refused(name):
    tokenizer = word_level()
    vocabulary = {k: v for k, v in tokenizer.get_vocab().items() if k not in ("A", "B", "C")}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    with pytest.raises(ValueError, match="no token of its own"):
        boxes.desideratum(name, boxes.make(10), tokenizer)
