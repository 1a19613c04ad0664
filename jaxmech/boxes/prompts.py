"""Examples to tokens: clean and corrupt prompts, labels, and the token position of every role.

Positions come from the tokenizer's own character offsets, so that they hold for any tokenizer and any wording with
"Box X" in it, with or without BOS.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxmech.boxes.scenes import LABELS, Example, Scene
from jaxmech.pairs import Pairs

ROLES = ("last", "query_box", "prev_query_box")
_LABEL = re.compile(r"(?<=\bBox )[A-Z]\b")
_OBJECT = re.compile(r"(?<=[Tt]he )[^\s,.]+(?= is in Box)")


def pairs(
    examples: Sequence[Example],
    tokenizer: Any,
    seed: int = 0,
    *,
    split_objects: Literal["refuse", "drop"] = "refuse",
    add_bos: bool | None = None,
) -> Pairs:
    """Clean and corrupt prompts of `examples`, with the roles `last`, `query_box` and `prev_query_box`.

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

    Raises:
      ValueError: an object or a label that is not one token, fewer than two scenes, or a tokenizer without offsets.
    """
    read = _reader(tokenizer, add_bos)
    examples = _whole_objects(examples, read, split_objects)
    scenes = sorted({example.scene for example in examples}, key=lambda scene: scene.text)
    if len(scenes) < 2:
        raise ValueError(f"{len(scenes)} scenes; at least 2 are needed, since corrupt prompts come from another scene.")
    corruptions = [_corrupt(example, scenes, seed) for example in examples]
    clean = [read(example.prompt) for example in examples]
    corrupt = [read(scene.prompt(label)) for scene, label, _ in corruptions]
    queries = [
        (tokens.label_positions[-1], tokens.label_positions[e.query]) for tokens, e in zip(clean, examples, strict=True)
    ]
    sources = [(t.label_positions[-1], t.label_positions[i]) for t, (_, _, i) in zip(corrupt, corruptions, strict=True)]
    return Pairs(
        clean=_right_padded(clean),
        corrupt=_right_padded(corrupt),
        labels=np.array([_answer(read, e, tokens) for e, tokens in zip(examples, clean, strict=True)]),
        positions=_roles(clean, queries),
        corrupt_positions=_roles(corrupt, sources),
    )


@dataclass(frozen=True)
class _Tokens:
    """A prompt's token ids and the positions of its labels, the query's last."""

    ids: list[int]
    label_positions: list[int]
    split_objects: list[str]  # objects that are not one known token


def _reader(tokenizer: Any, add_bos: bool | None) -> Callable[[str], _Tokens]:
    """A function from a prompt to its tokens, with the tokenizer's settings checked once."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, from which roles are found; use a fast tokenizer "
            "(AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    if add_bos is None:
        add_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError("add_bos=True, but the tokenizer has no BOS token.")
    bos = [tokenizer.bos_token_id] if add_bos else []

    def read(text: str) -> _Tokens:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # an EOS would become `last`
        spans = [_without_space(text, start, end) for start, end in encoding.offset_mapping]
        known = [i != tokenizer.unk_token_id for i in encoding.input_ids]
        whole = {span: position for position, span in enumerate(spans) if known[position]}
        labels = [match.span() for match in _LABEL.finditer(text)]
        if split := [text[slice(*span)] for span in labels if span not in whole]:
            raise ValueError(f"The tokenizer gives the box label {split[0]!r} no token of its own in {text!r}.")
        return _Tokens(
            ids=bos + encoding.input_ids,
            label_positions=[len(bos) + whole[span] for span in labels],
            split_objects=[m.group() for m in _OBJECT.finditer(text) if m.span() not in whole],
        )

    return read


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's span of characters without the space in front, which some tokenizers count in and some do not."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _whole_objects(examples: Sequence[Example], read: Callable[[str], _Tokens], split_objects: str) -> list[Example]:
    """The examples whose scene has no object that the tokenizer splits."""
    if split_objects not in ("refuse", "drop"):
        raise ValueError(f"split_objects={split_objects!r}; expected 'refuse' or 'drop'.")
    split = {scene: read(scene.text).split_objects for scene in {example.scene for example in examples}}
    kept = [example for example in examples if not split[example.scene]]
    if len(kept) == len(examples):
        return kept
    words = sorted({word for objects in split.values() for word in objects})
    more = ", ..." * (len(words) > 8)
    found = f"The tokenizer splits or does not know {len(words)} objects: {', '.join(words[:8])}{more}"
    if split_objects == "refuse":
        raise ValueError(f"{found}. Use other objects, or split_objects='drop' to leave their scenes out.")
    if not kept:
        raise ValueError(f"{found}. They are in every scene, so none is left; use other objects.")
    warnings.warn(f"{found}. Dropped {len(examples) - len(kept)} of {len(examples)} examples.", stacklevel=3)
    return kept


def _corrupt(example: Example, scenes: Sequence[Scene], seed: int) -> tuple[Scene, str, int]:
    """Another scene, a query label that is in neither, and the segment whose label stands for `prev_query_box`."""
    digest = hashlib.blake2b(example.sentence.encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    others = [scene for scene in scenes if scene != example.scene]
    scene = others[rng.integers(len(others))]
    unused = [label for label in LABELS if label not in example.scene.labels + scene.labels]
    return scene, unused[rng.integers(len(unused))], int(rng.integers(len(scene.labels)))


def _answer(read: Callable[[str], _Tokens], example: Example, prompt: _Tokens) -> int:
    """Token id of the answer where it stands, after the prompt."""
    ids = read(f"{example.prompt} {example.answer}").ids
    if ids[:-1] != prompt.ids:
        raise ValueError(f"The tokenizer does not continue {example.prompt!r} by one token for {example.answer!r}.")
    return ids[-1]


def _roles(prompts: Sequence[_Tokens], positions: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    query_box, prev_query_box = np.array(positions).T
    last = np.array([len(prompt.ids) - 1 for prompt in prompts])
    return {"last": last, "query_box": query_box, "prev_query_box": prev_query_box}


def _right_padded(prompts: Sequence[_Tokens]) -> np.ndarray:
    """Token ids [B, T]; the padding repeats each prompt's first token, which no other token attends to there."""
    length = max(len(prompt.ids) for prompt in prompts)
    return np.array([prompt.ids + [prompt.ids[0]] * (length - len(prompt.ids)) for prompt in prompts])
