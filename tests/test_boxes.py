"""The boxes task: scenes, files, prompts and the positions of roles under three kinds of tokenizer."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxmech import boxes
from jaxmech.boxes.scenes import LABELS

PAPER = "The fig is in Box X, the engine is in Box T, the radio is in Box A. Box X contains the fig."
WORDS = ("The", "the", "is", "in", "Box", "contains", ",", ".")


def word_level(objects=boxes.OBJECTS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("<bos>", "<unk>", *WORDS, *LABELS, *objects))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """As Llama-3's and Qwen's: a word after a space is another token than at the start, and there is no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=2000, special_tokens=["<eos>"]), eos_token="<eos>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces are U+2581, one stands before the first word, and BOS is in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<unk>", "<s>"])
    trained = _trained(tokenizer, trainer, bos_token="<s>", unk_token="<unk>")
    trained.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return trained


def _trained(tokenizer, trainer, **special) -> PreTrainedTokenizerFast:
    texts = [re.sub(r"([,.])", r" \1", e.sentence) for e in boxes.make(300, 10, seed=5)]  # no merges across "X,"
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {"word-level": word_level, "byte-level": byte_level, "sentencepiece-like": sentencepiece_like}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_there_are_about_90_distinct_objects():
    assert 80 <= len(boxes.OBJECTS) == len(set(boxes.OBJECTS)) <= 100
    assert all(re.fullmatch("[a-z]+", word) for word in boxes.OBJECTS)


def test_every_box_of_a_scene_is_queried_in_turn():
    examples = boxes.make(n_scenes=3, n_boxes=4)
    assert [e.query for e in examples] == [0, 1, 2, 3] * 3
    assert len({e.scene for e in examples}) == 3
    for example in examples:
        assert f"he {example.answer} is in Box {example.label}" in example.prompt
        assert example.prompt.endswith(f". Box {example.label} contains the")


def test_labels_and_objects_of_a_scene_are_distinct():
    for example in boxes.make(n_scenes=30, n_boxes=10):
        assert len(set(example.scene.labels)) == len(set(example.scene.objects)) == 10
        assert set(example.scene.labels) <= set(LABELS)


def test_sentences_read_as_in_the_paper(tmp_path):
    (tmp_path / "paper.jsonl").write_text(json.dumps({"sentence": PAPER, "sample_id": 0, "numops": 0}) + "\n\n")
    (example,) = boxes.read(tmp_path / "paper.jsonl")
    assert example.sentence == PAPER
    assert (example.label, example.answer, example.query) == ("X", "fig", 0)
    assert example.prompt == PAPER.removesuffix(" fig.")


def test_written_examples_are_read_back(tmp_path):
    examples = boxes.make(5, 3)
    boxes.write(tmp_path / "new" / "data.jsonl", examples)
    assert boxes.read(tmp_path / "new" / "data.jsonl") == examples
    assert not list(tmp_path.glob("new/*.tmp"))


def test_scenes_depend_on_the_seed_and_not_on_their_number():
    assert boxes.make(9, seed=1)[: 4 * 7] == boxes.make(4, seed=1)
    assert boxes.make(4, seed=1) != boxes.make(4, seed=2)


def test_roles_are_the_tokens_they_name(tokenizer):
    examples = boxes.make(6, 7)
    pairs = boxes.pairs(examples, tokenizer)
    for row, example in enumerate(examples):
        at = {role: int(pairs.positions[role][row]) for role in (*boxes.ROLES, "object")}
        word = lambda position: tokenizer.decode([pairs.clean[row, position]]).strip()  # noqa: E731, B023
        assert word(at["query_box"]) == word(at["prev_query_box"]) == example.label
        assert word(at["last"]) == "the" and word(at["last"] - 1) == "contains"
        assert at["prev_query_box"] < at["query_box"] < at["last"]
        assert word(at["prev_query_box"] - 4) == word(at["object"]) == example.answer
        assert tokenizer.decode([pairs.labels[row]]).strip() == example.answer


def test_labels_are_the_tokens_that_continue_the_prompt(tokenizer):
    examples = boxes.make(2, 3)
    pairs = boxes.pairs(examples, tokenizer, add_bos=False)
    for row, example in enumerate(examples):
        ids = tokenizer(f"{example.prompt} {example.answer}", add_special_tokens=False).input_ids
        assert [*pairs.clean[row, : pairs.positions["last"][row] + 1], pairs.labels[row]] == ids


def test_corrupt_prompts_come_from_another_scene_with_an_unknown_query_label(tokenizer):
    examples = boxes.make(20, 5)
    pairs = boxes.pairs(examples, tokenizer)
    texts = {e.scene.text for e in examples}
    for row, example in enumerate(examples):
        last = pairs.corrupt_positions["last"][row]
        text = tokenizer.decode(pairs.corrupt[row, : last + 1], skip_special_tokens=True).strip()
        text = text.replace(" ,", ",").replace(" .", ".")  # how word-level tokens are joined
        scene, query = re.fullmatch(r"(.*\.) Box ([A-Z]) contains the", text).groups()
        assert scene in texts - {example.scene.text}
        assert f"Box {query}" not in scene + example.scene.text
        source = tokenizer.decode([pairs.corrupt[row, pairs.corrupt_positions["prev_query_box"][row]]]).strip()
        assert f"Box {source}" in scene
        assert tokenizer.decode([pairs.corrupt[row, pairs.corrupt_positions["query_box"][row]]]).strip() == query


def test_the_counterpart_of_the_earlier_label_is_any_of_the_labels():
    pairs = boxes.pairs(boxes.make(40, 4), word_level())
    assert len(set(pairs.corrupt_positions["prev_query_box"])) == 4


def test_pairs_do_not_depend_on_the_order_of_the_examples(tokenizer):
    examples = boxes.make(8, 3)
    order = np.random.default_rng(0).permutation(len(examples))
    forth = boxes.pairs(examples, tokenizer, seed=3)
    back = boxes.pairs([examples[i] for i in order], tokenizer, seed=3)
    for found, expected in ((back.clean, forth.clean), (back.corrupt, forth.corrupt), (back.labels, forth.labels)):
        np.testing.assert_array_equal(found, expected[order])
    for role in boxes.ROLES:
        np.testing.assert_array_equal(back.corrupt_positions[role], forth.corrupt_positions[role][order])


def test_pairs_depend_on_the_seed():
    examples = boxes.make(8, 3)
    first, second = (boxes.pairs(examples, word_level(), seed=seed).corrupt for seed in (0, 1))
    assert (first != second).any()


def test_scenes_of_different_sizes_are_padded_on_the_right():
    examples = boxes.make(3, 2) + boxes.make(3, 6)
    pairs = boxes.pairs(examples, word_level())
    assert set(pairs.positions["last"]) == {7 * 2 + 4, 7 * 6 + 4}


def test_bos_is_added_when_the_tokenizer_adds_it_or_when_asked():
    examples = boxes.make(2, 2)
    assert (boxes.pairs(examples, word_level()).clean[:, 0] == 0).all()
    without = boxes.pairs(examples, word_level(), add_bos=False)
    assert (without.clean[:, 0] != 0).all()
    with pytest.raises(ValueError, match="has no BOS token"):
        boxes.pairs(examples, byte_level(), add_bos=True)


def test_an_eos_that_the_tokenizer_appends_is_not_taken_for_the_last_token():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    pairs = boxes.pairs(boxes.make(2, 2), tokenizer)
    assert (pairs.clean != 0).all()


def test_objects_that_the_tokenizer_splits_are_refused_or_dropped():
    known = word_level([word for word in boxes.OBJECTS if word != "fig"])
    examples = [e for e in boxes.make(40, 7) if "fig" in e.scene.objects] + boxes.make(4, 2, seed=8)
    assert not any("fig" in e.scene.objects for e in boxes.make(4, 2, seed=8))
    with pytest.raises(ValueError, match="does not know 1 objects: fig.*split_objects='drop'"):
        boxes.pairs(examples, known)
    with pytest.warns(UserWarning, match=f"Dropped {len(examples) - 8} of {len(examples)}"):
        assert len(boxes.pairs(examples, known, split_objects="drop")) == 8
    with pytest.raises(ValueError, match="in every scene"):
        boxes.pairs(examples[:-8], known, split_objects="drop")


def test_split_objects_are_found_under_bpe():
    tokenizer = byte_level()
    odd = boxes.Example(boxes.Scene(("telescope", "fig"), ("A", "B")), 1)  # was not in the training text
    with pytest.raises(ValueError, match="splits or does not know 1 objects: telescope"):
        boxes.pairs([odd, *boxes.make(2, 2)], tokenizer)


def test_a_tokenizer_without_the_labels_is_refused():
    tokenizer = word_level()
    vocabulary = {k: v for k, v in tokenizer.get_vocab().items() if k not in ("A", "B", "C")}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    with pytest.raises(ValueError, match="no token of its own"):
        boxes.pairs(boxes.make(20, 7), tokenizer)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        boxes.pairs(boxes.make(2, 2), Slow())


def test_one_scene_is_too_few_for_pairs():
    with pytest.raises(ValueError, match="1 scenes; at least 2"):
        boxes.pairs(boxes.make(1, 3), word_level())


@pytest.mark.parametrize("arguments", [{"n_scenes": 0}, {"n_boxes": 1}, {"n_boxes": 11}, {"seed": -1}])
def test_impossible_scenes_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}; expected"):
        boxes.make(**arguments)


BAD_LINES = {
    '{"sentence": "The fig': "not JSON",
    "[1, 2]": "no string under the key 'sentence' .found: list",
    '{"text": "The fig"}': "no string under the key 'sentence' .found: text",
    '{"sentence": 3}': "no string under the key",
    PAPER.replace("Box X contains", "Box Q contains"): r"about Box Q, which is not in the scene \(X, T, A\)",
    PAPER.replace("contains the fig", "contains the radio"): "ends in 'radio', but Box X holds 'fig'",
    PAPER.replace("Box T", "Box X"): "label 'X' occurs twice",
    PAPER.replace("engine", "fig"): "object 'fig' occurs twice",
    PAPER.replace("the engine is in", "the engine is not in"): "cannot read the segment 'the engine is not in Box T'",
    "Box 0 contains shirt, Box 1 contains train. Box 0 contains shirt.": "cannot read 'Box 0 contains shirt",
    "The fig is in Box X. Box X contains the fig.": "has 1 boxes; expected 2 to 10",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_bad_lines_are_named_with_file_and_line(tmp_path, line, message):
    line = line if line.startswith(("{", "[")) else json.dumps({"sentence": line})
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"sentence": PAPER}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: .*{message}"):
        boxes.read(file)


def test_lines_end_where_json_lines_do(tmp_path):
    """Other separators that Unicode has may stand in a string."""
    file = tmp_path / "separators.jsonl"
    line = json.dumps({"sentence": PAPER, "note": "one\u2028two\x85three"}, ensure_ascii=False)
    file.write_bytes(f"{line}\r\n{line}\n".encode())
    assert [example.sentence for example in boxes.read(file)] == [PAPER, PAPER]


def test_an_empty_or_missing_file_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no examples"):
        boxes.read(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        boxes.read(tmp_path / "absent.jsonl")
    with pytest.raises(IsADirectoryError, match="is a folder; expected a JSONL file"):
        boxes.read(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.jsonl is not text in UTF-8 .*expected JSONL"):
        boxes.read(tmp_path / "binary.jsonl")
