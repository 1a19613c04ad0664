"""Desiderata: counterfactual prompts, each with the token that it should make a model say on another prompt.

Owns the triples (base prompt, counterfactual prompt, target token) of Prakash et al. (2024, section 4 and appendix).
Patching from the counterfactual into the base is done elsewhere; this module makes text and `jaxmech.Pairs`.

The base queries its segment i, the counterfactual its segment j, counted from 0. In the example the base is "The fig is
in Box X, the engine is in Box T, the radio is in Box A, the bell is in Box K. Box T contains the", i = 1 and j = 2. All
counterfactuals but that of box_label_value end in "Box D contains the"; before that they read:

  positional, object_value, incorrect_segment
    The cup is in Box C, the coin is in Box H, the egg is in Box D, the map is in Box E.
  box_label_value
    The cup is in Box C, the coin is in Box H, the egg is in Box X, the map is in Box E. (Box X contains the)
  random_text_start
    There are some boxes here, each with one thing in it. The cup is in Box C, ..., the map is in Box E.
  random_text_end
    The cup is in Box C, ..., the map is in Box E. These are all of the boxes and what is in them.
  add_tokens_btw_box_and_obj
    The cup is in Box C, the coin is in Box H, the egg is contained in the Box D, the map is in Box E.
  add_seg_start
    The hat is in Box O, the cup is in Box C, the coin is in Box H, the egg is in Box D, the map is in Box E.
  add_seg_end
    The cup is in Box C, the coin is in Box H, the egg is in Box D, the map is in Box E, the hat is in Box O.
  add_box_before_correct_segment
    ..., the coin is in Box H, there are three additional boxes, Box O, Box P and Box B, the egg is in Box D, ...
  altered_box_obj_order
    The cup is in Box C, the coin is in Box H, Box D contains the egg, the map is in Box E.
  altered_box_obj_association
    The cup is in Box C, the coin is in Box H, the egg is not in Box D, the map is in Box E.
  add_comma
    The cup, is in Box C, the coin, is in Box H, the egg, is in Box D, the map, is in Box E.
  no_comma
    The cup is in Box C the coin is in Box H the egg is in Box D the map is in Box E.

The targets are "radio" (the base's segment 2), but "egg" for object_value, "bell" for incorrect_segment and "fig" for
box_label_value.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxmech.boxes.prompts import PromptReader, generator, roles, splits
from jaxmech.boxes.scenes import LABELS, Example, Scene, ask, tell
from jaxmech.compat import check_compat
from jaxmech.pairs import Pairs
from jaxmech.tokenized import right_padded


@dataclass(frozen=True)
class Desideratum:
    """What a kind of counterfactual prompt should make a model say, and what that shows."""

    name: str
    target: str  # which token is the target
    why: str  # what is tested


_SAME_PLACE = "The object in the base's segment j."
_NOT_COUNTING = "The object in the base's segment j, where j does not count the added segment."

_ALL = (
    Desideratum(
        "positional",
        _SAME_PLACE,
        "Whether the place of the queried segment is carried over; the scenes share no object and no label.",
    ),
    Desideratum("object_value", "The counterfactual's own answer.", "Whether the object itself is carried over."),
    Desideratum(
        "box_label_value",
        "The object in the base's box with the label that the counterfactual queries.",
        "Whether the label is carried over; it has another place in the base.",
    ),
    Desideratum(
        "random_text_start",
        _SAME_PLACE,
        "Whether places are counted from the first segment rather than from the first token.",
    ),
    Desideratum(
        "random_text_end",
        _SAME_PLACE,
        "Whether places hold when text stands between the scene and the question.",
    ),
    Desideratum(
        "add_tokens_btw_box_and_obj",
        _SAME_PLACE,
        "Whether places hold when the right segment has more tokens between object and box.",
    ),
    Desideratum(
        "add_seg_start",
        _NOT_COUNTING,
        "Whether places are counted from the first segment: if so, this target is missed. It is the published code's, "
        "which finds j before it adds the segment.",
    ),
    Desideratum(
        "add_seg_end",
        _NOT_COUNTING,
        "Whether places are counted from the last segment: if so, this target is missed.",
    ),
    Desideratum(
        "add_box_before_correct_segment",
        _SAME_PLACE,
        "Whether boxes without objects, named before the right segment, count as segments.",
    ),
    Desideratum(
        "incorrect_segment",
        "The object in the base's segment j + 1.",
        "A control: the counterfactual is that of `positional`, the target the segment after the right one.",
    ),
    Desideratum(
        "altered_box_obj_order",
        _SAME_PLACE,
        "Whether places hold when the right segment names the box before the object.",
    ),
    Desideratum(
        "altered_box_obj_association",
        _SAME_PLACE,
        "Whether places hold when the right segment says that the object is not in the box.",
    ),
    Desideratum("add_comma", _SAME_PLACE, "Whether places are counted by segments rather than by commas."),
    Desideratum("no_comma", _SAME_PLACE, "Whether segments are told apart without commas."),
)
DESIDERATA: Mapping[str, Desideratum] = MappingProxyType({entry.name: entry for entry in _ALL})
_MAIN = ("positional", "object_value", "box_label_value")
POSITION_VARIANTS: tuple[str, ...] = tuple(name for name in DESIDERATA if name not in _MAIN)
_BEFORE = "There are some boxes here, each with one thing in it."
_AFTER = "These are all of the boxes and what is in them."


def desideratum(
    name: str,
    examples: Sequence[Example],
    tokenizer: Any,
    n: int | None = None,
    seed: int = 0,
    *,
    objects: Iterable[str] | None = None,
    add_bos: bool | None = None,
    compat: Literal["paper"] | None = None,
) -> Pairs:
    """Triples of `DESIDERATA[name]`: clean = base prompts, corrupt = counterfactual prompts, labels = target tokens.

    For several names, `triples` reads the base prompts once.

    The counterfactual's scene is made for each triple: as many boxes as in the base, of `objects` those that the base
    does not name, labels that the base does not have (but for `box_label_value`, where one is shared). No target is
    the base's own answer. Draws depend on `seed`, the base sentence, how often it came before, and the set of objects,
    not on the order of the examples. With one seed, names share scenes, and j where they may query the same segments.

    Args:
      name: a key of `DESIDERATA`.
      examples: base examples, from `make` or `read`.
      tokenizer: a fast Hugging Face tokenizer. It may split or not know the words that a variant adds.
      n: number of triples. None: one for each example; fewer than examples: as many of them, in order; more: drawn
        with replacement.
      seed: of all draws.
      objects: what counterfactuals are made of; None: the objects that the examples name.
      add_bos: prepend the tokenizer's BOS token; None: if the tokenizer does so by itself.
      compat: "paper" for two defects of the published code. It searches the base's label in the question instead of
        the scene, so that i is always taken for 0: j is then any segment but the first, and where j is the real i
        (1/7 of the triples with 7 boxes) the target is the base's own answer; for `incorrect_segment` it is segment
        j + 1 modulo the number of boxes. And it encodes the target of `box_label_value` as a list of words, which the
        tokenizer takes for a list of tokens: the target is the token spelt just as the object, without the space in
        front ("fig", where " fig" is right), or the unknown token if there is none.

    Raises:
      ValueError: an unknown name or `compat`, no examples, n < 1, too few boxes (4 for `incorrect_segment`), too few
        objects, or an object or a label that is not one token.
    """
    return triples((name,), examples, tokenizer, n, seed, objects=objects, add_bos=add_bos, compat=compat)[name]


def triples(
    names: Iterable[str],
    examples: Sequence[Example],
    tokenizer: Any,
    n: int | None = None,
    seed: int = 0,
    *,
    objects: Iterable[str] | None = None,
    add_bos: bool | None = None,
    compat: Literal["paper"] | None = None,
) -> dict[str, Pairs]:
    """As `desideratum`, for each of several names; their base prompts are the same, and in the same order.

    Args:
      names: keys of `DESIDERATA`.
      examples, tokenizer, n, seed, objects, add_bos, compat: see `desideratum`.

    Raises:
      ValueError: as `desideratum`.
    """
    names = list(names)
    for name in names:
        _check(name, examples, n, compat)
    pool, bases = _pool(examples, objects), _bases(examples, n, seed)
    numbered = list(zip(bases, _repetitions(bases), strict=True))
    read = PromptReader(tokenizer, add_bos)
    clean = read.many(base.prompt for base in bases)
    padded, positions = right_padded(clean), roles(clean, [prompt.query_boxes for prompt in clean])
    split = {word for prompt in clean for word in prompt.split_objects}
    known: dict[tuple[str, str], int] = {}  # (prompt, word behind it) -> its token
    found = {}
    for name in names:
        drawn = [
            _triple(name, base, pool, generator(seed, f"{base.sentence} {repetition}"), compat)
            for base, repetition in numbered
        ]
        corrupt, words = read.many(text for text, _ in drawn), [word for _, word in drawn]
        if split := split | {word for prompt in corrupt for word in prompt.split_objects}:
            raise ValueError(f"{splits(split)}. Use examples with other objects.")
        if compat == "paper" and name == "box_label_value":
            labels = [_bare_token(tokenizer, word) for word in words]
        else:
            places = [(prompt.text, word) for prompt, word in zip(clean, words, strict=True)]
            new = [row for row, place in enumerate(places) if place not in known]
            tokens = read.continuations([clean[row] for row in new], [words[row] for row in new])
            known |= dict(zip([places[row] for row in new], tokens, strict=True))
            labels = [known[place] for place in places]
        found[name] = Pairs(
            clean=padded,
            corrupt=right_padded(corrupt),
            labels=np.array(labels),
            positions=positions,
            corrupt_positions=roles(corrupt, [prompt.query_boxes for prompt in corrupt]),
        )
    return found


def check_desideratum(
    name: str,
    examples: Sequence[Example],
    objects: Iterable[str] | None = None,
    compat: Literal["paper"] | None = None,
) -> None:
    """Checks that `desideratum` can make a triple of each example; no text is made.

    Args:
      name: a key of `DESIDERATA`.
      examples: base examples.
      objects: what counterfactuals are made of; None: the objects that the examples name.
      compat: see `desideratum`.

    Raises:
      ValueError: as `desideratum`, where no tokenizer is needed to see it.
    """
    _check(name, examples, None, compat)
    pool = _pool(examples, objects)
    for base in examples:
        _others(name, base, pool)
        _choices(name, base.query, len(base.scene.labels), compat)


def _check(name: str, examples: Sequence[Example], n: int | None, compat: str | None) -> None:
    if name not in DESIDERATA:
        raise ValueError(f"There is no desideratum {name!r}; expected one of {', '.join(DESIDERATA)}.")
    if not examples:
        raise ValueError("No examples; desiderata need base examples from boxes.make or boxes.read.")
    if n is not None and n < 1:
        raise ValueError(f"n={n}; expected at least 1, or None for one triple of each example.")
    check_compat(compat)


def _pool(examples: Sequence[Example], objects: Iterable[str] | None) -> list[str]:
    """What counterfactuals are made of, in an order of its own."""
    return sorted({word for example in examples for word in example.scene.objects} if objects is None else set(objects))


def _bases(examples: Sequence[Example], n: int | None, seed: int) -> list[Example]:
    """`n` of the examples, whatever their order; in their order unless drawn with replacement."""
    if n is None:
        return list(examples)
    rng = np.random.default_rng(seed)
    by_text = sorted(range(len(examples)), key=lambda row: examples[row].sentence)
    if n > len(examples):
        return [examples[by_text[row]] for row in rng.integers(len(examples), size=n)]
    return [examples[row] for row in sorted(rng.permutation(by_text)[:n])]


def _repetitions(bases: Sequence[Example]) -> list[int]:
    """How often each base came before."""
    seen: Counter[Example] = Counter()
    earlier = []
    for base in bases:
        earlier.append(seen[base])
        seen[base] += 1
    return earlier


@dataclass(frozen=True)
class _Counterfactual:
    """The counterfactual before it is altered, and objects and labels that are in neither scene."""

    example: Example
    spare_objects: Sequence[str]
    spare_labels: Sequence[str]

    @property
    def scene(self) -> Scene:
        return self.example.scene

    @property
    def spare_segments(self) -> list[str]:
        return Scene(tuple(self.spare_objects[:1]), tuple(self.spare_labels[:1])).segments

    def with_right_segment(self, wording: str) -> str:
        """The scene's text with another wording of segment j, made of {object} and {label}."""
        segments = self.scene.segments
        segments[self.example.query] = wording.format(object=self.example.answer, label=self.example.label)
        return tell(segments)


def _triple(
    name: str, base: Example, pool: Sequence[str], rng: np.random.Generator, compat: str | None
) -> tuple[str, str]:
    """The counterfactual prompt and the target word."""
    size = len(base.scene.labels)
    objects = [str(word) for word in rng.permutation(_others(name, base, pool))]
    labels = [str(label) for label in rng.permutation([label for label in LABELS if label not in base.scene.labels])]
    choices = _choices(name, base.query, size, compat)
    query, place = choices[rng.integers(len(choices))]
    if name == "box_label_value":
        labels[query] = base.scene.labels[place]
    source = Example(Scene(tuple(objects[:size]), tuple(labels[:size])), query)
    alter = _ALTERED.get(name, lambda c: c.scene.text)
    text = ask(alter(_Counterfactual(source, objects[size:], labels[size:])), source.label)
    return text, source.answer if name == "object_value" else base.scene.objects[place]


def _others(name: str, base: Example, pool: Sequence[str]) -> list[str]:
    """The objects of the pool that the base does not name, or a ValueError if a counterfactual needs more."""
    others = [word for word in pool if word not in base.scene.objects]
    size, added = len(base.scene.labels), int(name in ("add_seg_start", "add_seg_end"))
    if len(others) < size + added:
        raise ValueError(
            f"There are {len(pool)} objects; {name!r} needs {2 * size + added} for scenes of {size} boxes, as base and "
            "counterfactual share none. Give examples of more scenes."
        )
    return others


def _choices(name: str, query: int, size: int, compat: str | None) -> list[tuple[int, int]]:
    """Pairs of the segment j that the counterfactual may query and the base's segment that holds the target.

    Raises:
      ValueError: there are none, since the boxes are too few.
    """
    step = int(name == "incorrect_segment")
    if name == "box_label_value":
        shared = [(j, k) for j, k in permutations(range(size), 2) if k != query]
        found = [(j, k) for j, k in shared if j != query] or shared  # two boxes leave no third place
    elif compat == "paper":
        found = [(j, (j + step) % size) for j in range(1, size)]
    else:
        found = [(j, j + step) for j in range(size - step) if query not in (j, j + step)]
    if not found:
        raise ValueError(f"{name!r} has no target for segment {query} of {size}; use scenes of at least 4 boxes.")
    return found


_ALTERED: dict[str, Callable[[_Counterfactual], str]] = {
    "random_text_start": lambda c: f"{_BEFORE} {c.scene.text}",
    "random_text_end": lambda c: f"{c.scene.text} {_AFTER}",
    "add_tokens_btw_box_and_obj": lambda c: c.with_right_segment("the {object} is contained in the Box {label}"),
    "add_seg_start": lambda c: tell(c.spare_segments + c.scene.segments),
    "add_seg_end": lambda c: tell(c.scene.segments + c.spare_segments),
    "add_box_before_correct_segment": lambda c: c.with_right_segment(
        "there are three additional boxes, Box {}, Box {} and Box {}, ".format(*c.spare_labels[:3])
        + "the {object} is in Box {label}"
    ),
    "altered_box_obj_order": lambda c: c.with_right_segment("Box {label} contains the {object}"),
    "altered_box_obj_association": lambda c: c.with_right_segment("the {object} is not in Box {label}"),
    "add_comma": lambda c: tell([segment.replace(" is in", ", is in") for segment in c.scene.segments]),
    "no_comma": lambda c: tell(c.scene.segments, separator=" "),
}


def _bare_token(tokenizer: Any, word: str) -> int:
    token = tokenizer.convert_tokens_to_ids(word)
    if token is None:
        raise ValueError(f"compat='paper': the tokenizer has no token {word!r} and no unknown token to stand for it.")
    return token
