"""Examples to tokens: clean and corrupt prompts, labels, and the token position of every role.

Positions come from the tokenizer's own character offsets, so that they hold for any tokenizer and any wording with
"Box X" in it, with or without BOS.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxmech.boxes.scenes import LABELS, Example, Scene
from jaxmech.compat import check_compat
from jaxmech.pairs import Pairs
from jaxmech.tokenized import Text, continued, right_padded, text_reader

ROLES = ("last", "query_box", "prev_query_box")  # of clean and corrupt prompts; clean ones have "object" as well
_LABEL = re.compile(r"(?<=\bBox )[A-Z]\b")
_OBJECT = re.compile(r"(?<=[Tt]he )[^\s,.]+(?=,? is\b)|(?<=contains the )[^\s,.]+")


def pairs(
    examples: Sequence[Example],
    tokenizer: Any,
    seed: int = 0,
    *,
    split_objects: Literal["refuse", "drop"] = "refuse",
    add_bos: bool | None = None,
    compat: Literal["paper"] | None = None,
) -> Pairs:
    """Clean and corrupt prompts of `examples`, with the roles `last`, `query_box`, `prev_query_box` and `object`.

    `object` is the answer where the scene names it; corrupt prompts, whose question has no answer, have no such role.

    The corrupt prompt is that of another scene of `examples`, its query label replaced by a letter that is in neither
    prompt; it names the query label once only, so the counterpart of `prev_query_box` is one of its scene's labels
    (Prakash et al. 2024, section 3.2). Each example's draws depend on `seed`, its sentence and the set of scenes, and
    not on the order of the examples.

    Args:
      examples: from `make` or `read`.
      tokenizer: a fast Hugging Face tokenizer.
      split_objects: what to do with a scene in which the tokenizer splits or does not know an object: "refuse", or
        "drop" the scene's examples with a warning.
      add_bos: prepend the tokenizer's BOS token; None: if the tokenizer does so by itself.
      compat: "paper" draws the corrupt query letter from all 26, as the published code does
        (`load_pp_data`): with 7 boxes it occurs in 7/26 of the corrupt scenes, and in 7/26 of the clean ones.

    Raises:
      ValueError: an object or a label that is not one token, fewer than two scenes, a tokenizer without offsets, or an
        unknown `compat`.
    """
    check_compat(compat)
    read = PromptReader(tokenizer, add_bos)
    examples = whole_objects(examples, read, split_objects)
    scenes = sorted({example.scene for example in examples}, key=lambda scene: scene.text)
    if len(scenes) < 2:
        raise ValueError(f"{len(scenes)} scenes; at least 2 are needed, since corrupt prompts come from another scene.")
    corruptions = [_corrupt(example, scenes, seed, any_letter=compat == "paper") for example in examples]
    clean = read.many([example.prompt for example in examples])
    corrupt = read.many([scene.prompt(label) for scene, label, _ in corruptions])
    sources = [(t.label_positions[-1], t.label_positions[i]) for t, (_, _, i) in zip(corrupt, corruptions, strict=True)]
    return Pairs(
        clean=right_padded(clean),
        corrupt=right_padded(corrupt),
        labels=np.array(read.continuations(clean, [example.answer for example in examples])),
        positions=roles(clean, [tokens.query_boxes for tokens in clean])
        | {"object": np.array([tokens.object_positions[e.query] for tokens, e in zip(clean, examples, strict=True)])},
        corrupt_positions=roles(corrupt, sources),
    )


@dataclass(frozen=True)
class Tokens:
    """A prompt's token ids and the positions of its labels, the query's last."""

    text: str
    ids: list[int]
    labels: list[str]
    label_positions: list[int]
    object_positions: list[int]  # of those that are one known token
    split_objects: list[str]  # objects that are not

    @property
    def query_boxes(self) -> tuple[int, int]:
        """Position of the query label and of its first occurrence."""
        return self.label_positions[-1], self.label_positions[self.labels.index(self.labels[-1])]


class PromptReader:
    """Prompts to their tokens, with the tokenizer's settings checked once; see `jaxmech.tokenized.text_reader`."""

    def __init__(self, tokenizer: Any, add_bos: bool | None):
        self._read = text_reader(tokenizer, add_bos)

    def many(self, texts: Iterable[str]) -> list[Tokens]:
        """The tokens of prompts. ValueError for a box label that is not one token."""
        return [_tokens(text) for text in self._read.many(list(texts))]

    def continuations(self, prompts: Sequence[Tokens], words: Sequence[str]) -> list[int]:
        """Token id of each word where it stands, after its prompt. ValueError if it is not one token there."""
        return continued(self._read, prompts, [f" {word}" for word in words])


def _tokens(read: Text) -> Tokens:
    text = read.text
    spans = [_without_space(text, start, end) for start, end in read.spans]
    whole = {span: position for position, span in enumerate(spans) if read.known[position]}
    labels = [match.span() for match in _LABEL.finditer(text)]
    objects = [match.span() for match in _OBJECT.finditer(text)]
    if split := [text[slice(*span)] for span in labels if span not in whole]:
        raise ValueError(f"The tokenizer gives the box label {split[0]!r} no token of its own in {text!r}.")
    return Tokens(
        text=text,
        ids=read.ids,
        labels=[text[slice(*span)] for span in labels],
        label_positions=[whole[span] for span in labels],
        object_positions=[whole[span] for span in objects if span in whole],
        split_objects=[text[slice(*span)] for span in objects if span not in whole],
    )


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's span of characters without the space in front, which some tokenizers count in and some do not."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def whole_objects(examples: Sequence[Example], read: PromptReader, split_objects: str) -> list[Example]:
    """The examples whose scene has no object that the tokenizer splits; `split_objects` as in `pairs`."""
    if split_objects not in ("refuse", "drop"):
        raise ValueError(f"split_objects={split_objects!r}; expected 'refuse' or 'drop'.")
    scenes = list(dict.fromkeys(example.scene for example in examples))
    tokens = read.many(scene.text for scene in scenes)
    split = {scene: found.split_objects for scene, found in zip(scenes, tokens, strict=True)}
    kept = [example for example in examples if not split[example.scene]]
    if len(kept) == len(examples):
        return kept
    found = splits({word for objects in split.values() for word in objects})
    if split_objects == "refuse":
        raise ValueError(f"{found}. Use other objects, or split_objects='drop' to leave their scenes out.")
    if not kept:
        raise ValueError(f"{found}. They are in every scene, so none is left; use other objects.")
    warnings.warn(f"{found}. Dropped {len(examples) - len(kept)} of {len(examples)} examples.", stacklevel=3)
    return kept


def splits(objects: Iterable[str]) -> str:
    """The start of an error message: which objects are not one known token."""
    words = sorted(objects)
    more = ", ..." * (len(words) > 8)
    return f"The tokenizer splits or does not know {len(words)} objects: {', '.join(words[:8])}{more}"


def generator(seed: int, text: str) -> np.random.Generator:
    """Random numbers that depend on `seed` and `text` alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def _corrupt(example: Example, scenes: Sequence[Scene], seed: int, any_letter: bool) -> tuple[Scene, str, int]:
    """Another scene, a query label that is in neither, and the segment whose label stands for `prev_query_box`."""
    rng = generator(seed, example.sentence)
    others = [scene for scene in scenes if scene != example.scene]
    scene = others[rng.integers(len(others))]
    used = () if any_letter else example.scene.labels + scene.labels
    letters = [label for label in LABELS if label not in used]
    return scene, letters[rng.integers(len(letters))], int(rng.integers(len(scene.labels)))


def roles(prompts: Sequence[Tokens], positions: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Positions of the roles, [B] each: true last tokens, and (query label, earlier label) as given."""
    query_box, prev_query_box = np.array(positions).T
    last = np.array([len(prompt.ids) - 1 for prompt in prompts])
    return {"last": last, "query_box": query_box, "prev_query_box": prev_query_box}
