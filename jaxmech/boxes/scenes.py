"""Scenes and the questions about them, as text: made from a seed, read from and written to JSONL.

The wording is the paper's (Prakash et al. 2024, section 3.1): "The fig is in Box X, the engine is in Box T. Box X
contains the fig."
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.boxes.objects import OBJECTS
from jaxmech.files import write_text
from jaxmech.json_lines import read_json_lines

LABELS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
MIN_BOXES, MAX_BOXES = (
    2,
    10,
)  # at most 10, so that a clean and a corrupt scene leave letters for the corrupt query
KEY = "sentence"

_SEGMENT = re.compile(r"[Tt]he (?P<object>[^\s,.]+) is in Box (?P<label>[A-Z])")
_SENTENCE = re.compile(r"(?P<scene>.+?)\. Box (?P<label>\w+) contains the (?P<object>[^\s,.]+)\.?")


@dataclass(frozen=True)
class Scene:
    """Which object is in which box, in the order in which they are told."""

    objects: tuple[str, ...]
    labels: tuple[str, ...]  # distinct capital letters, one per object

    @property
    def segments(self) -> list[str]:
        """["the fig is in Box X", "the engine is in Box T"]"""
        return [f"the {o} is in Box {label}" for o, label in zip(self.objects, self.labels, strict=True)]

    @property
    def text(self) -> str:
        """ "The fig is in Box X, the engine is in Box T." """
        return tell(self.segments)

    def prompt(self, label: str) -> str:
        """The scene and the start of a sentence about the box `label`, which need not be in the scene."""
        return ask(self.text, label)


@dataclass(frozen=True)
class Example:
    """A scene and the box that is asked about."""

    scene: Scene
    query: int  # index of the queried segment

    @property
    def label(self) -> str:
        """Label of the queried box."""
        return self.scene.labels[self.query]

    @property
    def answer(self) -> str:
        """The object in the queried box."""
        return self.scene.objects[self.query]

    @property
    def prompt(self) -> str:
        """What the model reads; the answer is the next word."""
        return self.scene.prompt(self.label)

    @property
    def sentence(self) -> str:
        """Prompt and answer, as in the paper's files."""
        return f"{self.prompt} {self.answer}."


def tell(segments: Sequence[str], separator: str = ", ") -> str:
    """The segments as one sentence, with a capital and a full stop."""
    text = separator.join(segments)
    return f"{text[0].upper()}{text[1:]}."


def ask(scene: str, label: str) -> str:
    """The text of a scene and the start of a sentence about the box `label`."""
    return f"{scene} Box {label} contains the"


def make(n_scenes: int = 50, n_boxes: int = 7, seed: int = 0) -> list[Example]:
    """Random scenes, every box of each queried in turn: n_scenes * n_boxes examples.

    Scene i depends on `seed`, `n_boxes` and i alone, so that a larger `n_scenes` only adds scenes.

    Raises:
      ValueError: n_scenes < 1, n_boxes outside 2..10, or seed < 0.
    """
    if n_scenes < 1:
        raise ValueError(f"n_scenes={n_scenes}; expected at least 1.")
    if seed < 0:
        raise ValueError(f"seed={seed}; expected at least 0.")
    if not MIN_BOXES <= n_boxes <= MAX_BOXES:
        raise ValueError(f"n_boxes={n_boxes}; expected {MIN_BOXES} to {MAX_BOXES}.")
    scenes = [_scene(np.random.default_rng([seed, n_boxes, i]), n_boxes) for i in range(n_scenes)]
    return [Example(scene, query) for scene in scenes for query in range(n_boxes)]


def _scene(rng: np.random.Generator, n_boxes: int) -> Scene:
    draw = lambda pool: tuple(str(x) for x in rng.choice(pool, n_boxes, replace=False))  # noqa: E731
    return Scene(objects=draw(OBJECTS), labels=draw(LABELS))


def read(path: str | Path) -> list[Example]:
    """Reads examples from JSONL: one object a line, its key "sentence" as in `Example.sentence`, other keys ignored.

    Raises:
      FileNotFoundError: no such file.
      IsADirectoryError: `path` is a folder.
      ValueError: names the file and the line that is not JSON, has no "sentence", or whose sentence is not an example.
    """
    return read_json_lines(path, lambda record, _: _example(_sentence(record)), "examples")


def write(path: str | Path, examples: Iterable[Example]) -> None:
    """Writes `examples` as JSONL, key "sentence", to `path`; the file is replaced only when it is whole."""
    lines = [json.dumps({KEY: example.sentence}, ensure_ascii=False) + "\n" for example in examples]
    write_text(path, "".join(lines))


def _sentence(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(KEY), str):
        found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no string under the key {KEY!r} (found: {found}).")
    return record[KEY]


def _example(sentence: str) -> Example:
    """The example that `sentence` spells, or a ValueError saying where it deviates."""
    wording = 'expected "The fig is in Box X, the engine is in Box T. Box X contains the fig."'
    whole = _SENTENCE.fullmatch(sentence)
    if not whole:
        raise ValueError(f"cannot read {sentence!r}; {wording}")
    segments = [(text, _SEGMENT.fullmatch(text)) for text in whole["scene"].split(", ")]
    for text, segment in segments:
        if not segment:
            raise ValueError(f"cannot read the segment {text!r}; {wording}, labels being capital letters")
    scene = Scene(tuple(s["object"] for _, s in segments if s), tuple(s["label"] for _, s in segments if s))
    _check_scene(scene)
    if whole["label"] not in scene.labels:
        raise ValueError(
            f"the query is about Box {whole['label']}, which is not in the scene ({', '.join(scene.labels)})."
        )
    example = Example(scene, scene.labels.index(whole["label"]))
    if whole["object"] != example.answer:
        raise ValueError(f"the sentence ends in {whole['object']!r}, but Box {example.label} holds {example.answer!r}.")
    return example


def _check_scene(scene: Scene) -> None:
    if not MIN_BOXES <= len(scene.labels) <= MAX_BOXES:
        raise ValueError(f"the scene has {len(scene.labels)} boxes; expected {MIN_BOXES} to {MAX_BOXES}.")
    for name, values in (("label", scene.labels), ("object", scene.objects)):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"the {name} {twice[0]!r} occurs twice in the scene.")
