"""Texts to token ids and the positions of what stands in them, by the character offsets of any fast tokenizer.

Owns what every task written as text needs. It knows no task; that of the paper is `jaxmech.boxes`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np

Place = str | tuple[int, int] | int  # a piece of a prompt, the characters from start to before end, or a token


class ExampleError(ValueError):
    """What is wrong with one example of several.

    Attributes:
      row: which, counted from 0.
    """

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row


@contextmanager
def _example(row: int) -> Iterator[None]:
    """Makes a ValueError in its block one of that example."""
    try:
        yield
    except ValueError as error:
        raise ExampleError(str(error), row) from error


class HasTokens(Protocol):
    """A prompt and its token ids."""

    @property
    def text(self) -> str: ...
    @property
    def ids(self) -> list[int]: ...


@dataclass(frozen=True)
class Text:
    """A text's token ids, the characters of each, (0, 0) of BOS, and whether the tokenizer knows it."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    known: list[bool]


class TextReader:
    """Texts to their tokens, without EOS.

    Args:
      bos: token ids in front of texts that do not begin with them.
    """

    def __init__(self, tokenizer: Any, bos: list[int]):
        self._tokenizer, self._bos = tokenizer, bos
        self._unknown, self._written_out = tokenizer.unk_token_id, tokenizer.unk_token  # which are looked up slowly

    def __call__(self, text: str) -> Text:
        return self.many([text])[0]

    def many(self, texts: Sequence[str]) -> list[Text]:
        """Those of several texts, in one call of the tokenizer."""
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)  # EOS would be last
        return [self._text(*one) for one in zip(texts, found.input_ids, found.offset_mapping, strict=True)]

    def _text(self, text: str, ids: list[int], offsets: Any) -> Text:
        before = [] if ids[:1] == self._bos else self._bos  # chat templates write it out
        ids, spans = before + ids, [(0, 0)] * len(before) + list(map(tuple, offsets))
        if self._unknown not in ids:
            return Text(text, ids, spans, [True] * len(ids))
        # One that is written out is meant, and so is BOS, which is the same token for some tokenizers.
        pieces, meant = (text[slice(*span)] for span in spans), ("", self._written_out)
        known = [token != self._unknown or piece in meant for token, piece in zip(ids, pieces, strict=True)]
        return Text(text, ids, spans, known)


def text_reader(tokenizer: Any, add_bos: bool | None = None) -> TextReader:
    """A reader of texts, with the tokenizer's settings checked once.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      add_bos: prepend its BOS token to texts that do not begin with it; None: if the tokenizer does so by itself.

    Raises:
      ValueError: it gives no character offsets, or has no BOS token to add.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, from which roles are found; use a fast tokenizer "
            "(AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    if add_bos is None:
        add_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError("add_bos=True, but the tokenizer has no BOS token.")
    return TextReader(tokenizer, [tokenizer.bos_token_id] if add_bos else [])


def continued(read: TextReader, prompts: Sequence[HasTokens], texts: Sequence[str]) -> list[int]:
    """Token id of each text where it stands, right after its prompt. ValueError if one is not one more token."""
    found = read.many([prompt.text + text for prompt, text in zip(prompts, texts, strict=True)])
    for prompt, text, whole in zip(prompts, texts, found, strict=True):
        if whole.ids[:-1] != prompt.ids:
            raise ValueError(f"The tokenizer does not continue {prompt.text!r} by one token for {text.strip()!r}.")
    return [whole.ids[-1] for whole in found]


def right_padded(prompts: Sequence[HasTokens]) -> np.ndarray:
    """Token ids [B, T]; the padding repeats each prompt's first token, which no other token attends to there."""
    length = max(len(prompt.ids) for prompt in prompts)
    return np.array([prompt.ids + [prompt.ids[0]] * (length - len(prompt.ids)) for prompt in prompts])


def read_prompts(read: TextReader, texts: Sequence[str], name: str) -> list[Text]:
    """The tokens of prompts. ValueError if there are none, or one has no tokens or is no text; `name` says of what."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"{name} is {texts!r}; expected a list of prompts.")
    if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(f"{name}[{wrong[0]}] is {texts[wrong[0]]!r}; expected a prompt as text.")
    prompts = read.many(texts)
    if empty := [i for i, prompt in enumerate(prompts) if not (prompt.text and prompt.ids)]:  # BOS alone says nothing
        raise ExampleError(f"{name}[{empty[0]}] is {texts[empty[0]]!r}, which has no tokens.", empty[0])
    return prompts


def continuation(answer: str, between: str) -> str:
    """What stands behind a prompt: the answer, with `between` before it unless it begins with white space itself."""
    return answer if answer[:1].isspace() else between + answer


def answer_tokens(
    read: TextReader,
    prompts: Sequence[Text],
    answers: Sequence[str | int],
    between: str,
    name: str,
    *,
    first_token: bool,
) -> np.ndarray:
    """The token of each answer where it stands, int [B].

    Args:
      answers: texts, or ids of tokens.
      name: what they are called in errors.
      first_token: of an answer of several tokens, take the first.

    Raises:
      TypeError: an answer that is neither a text nor an id.
      ValueError: an answer that is not one known token, or white space twice before it; the prompt is named.
    """
    found = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with _example(i):
            found.append(_answer_token(read, prompt, answer, between, f"{name}[{i}]", first_token=first_token))
    return np.array(found)


def _answer_token(
    read: TextReader, prompt: Text, answer: str | int, between: str, name: str, *, first_token: bool
) -> int:
    """The token of one answer; see `answer_tokens`."""
    if _is_index(answer):
        return int(answer)
    if not isinstance(answer, str):
        raise TypeError(f"{name} is {answer!r}; expected a text, the continuation of {prompt.text!r}, or a token's id.")
    text = continuation(answer, between)
    indented = text is answer and prompt.text.endswith("\n")
    if text[:1].isspace() and prompt.text[-1:].isspace() and not indented:
        raise ValueError(
            f"{name}: the prompt {prompt.text!r} ends in white space, and {text!r} begins with it. End the prompt "
            "before it, or give between=''."
        )
    whole, place = read(prompt.text + text), len(prompt.ids)
    if whole.ids[:place] != prompt.ids or len(whole.ids) == place:
        raise ValueError(
            f"{name}: the tokenizer does not continue {prompt.text!r} by tokens of {text!r} (between={between!r})."
        )
    if len(whole.ids) > place + 1 and answer.strip() and not whole.text[slice(*whole.spans[place])].strip():
        raise ValueError(
            f"{name}: behind {prompt.text!r}, the first token of {text!r} is white space alone. Give between='', and "
            "if there is to be a space, let the prompt end in it."
        )
    if len(whole.ids) > place + 1 and not first_token:
        raise ValueError(
            f"{name}: {answer!r} is {len(whole.ids) - place} tokens behind {prompt.text!r}. Choose an answer that is "
            "one token there, or take the first of its tokens: first_token=True."
        )
    if not whole.known[place]:
        raise ValueError(f"{name}: the tokenizer does not know {answer!r}, the answer to {prompt.text!r}.")
    return whole.ids[place]


def marked(tokenizer: Any, ids: Sequence[int], at: Mapping[str, int]) -> str:
    """The text of a prompt with the names of roles, in brackets, behind the tokens that they are `at`."""
    decoded = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in range(len(ids) + 1)]
    pieces = [after[len(before) :] for before, after in zip(decoded, decoded[1:], strict=False)]
    names = ["".join(f"[{role}]" for role, position in at.items() if position == i) for i in range(len(ids))]
    return "".join(piece + name for piece, name in zip(pieces, names, strict=True))


def role_positions(
    prompts: Sequence[Text], roles: Mapping[str, Place | Sequence[Place]], name: str
) -> dict[str, np.ndarray]:
    """Positions of the roles, [B] each, `last` among them.

    Args:
      roles: where each role is in each prompt; one place may stand for all prompts, and arrays are lists of tokens.

    Raises:
      ValueError: a number of places that is not that of the prompts, or a place that is not in its prompt or twice.
    """
    if "last" in roles:
        raise ValueError(f"{name} names 'last', which is the last token of each prompt; leave it out.")
    found = {"last": np.array([len(prompt.ids) - 1 for prompt in prompts])}
    for role, given in roles.items():
        places = _places(given, len(prompts))
        if len(places) != len(prompts):
            raise ValueError(f"{name}[{role!r}] has {len(places)} places; expected one for each of {len(prompts)}.")
        found[role] = np.zeros(len(prompts), int)
        for i, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
            with _example(i):
                found[role][i] = _position(prompt, place, f"{name}[{role!r}] of example {i}")
    return found


def roles_by_numbers(roles: Mapping[str, Place | Sequence[Place]]) -> list[str]:
    """The roles that give (start, end), or the index of a token, for some prompt."""
    return [
        role for role, given in roles.items() if any(_is_span(place) or _is_index(place) for place in _places(given, 1))
    ]


def warn_of_unknown_words(prompts: Sequence[Text]) -> None:
    """Warns the caller's caller if the tokenizer does not know what stands in some prompts."""
    if not (partly := [prompt for prompt in prompts if not all(prompt.known)]):
        return
    first = partly[0]
    start, end = first.spans[first.known.index(False)]
    warnings.warn(
        f"The tokenizer does not know all words of {len(partly)} of the {len(prompts)} prompts, first "
        f"{first.text[start:end]!r} in {first.text!r}. To the model they are all the same token.",
        stacklevel=3,
    )


def _places(given: Any, count: int) -> Any:
    """What is given for a role as one place for each of `count` prompts."""
    given = given.tolist() if hasattr(given, "tolist") else given  # an array, or one of its numbers
    one = isinstance(given, str) or not hasattr(given, "__len__") or _is_span(given)
    return [given] * count if one else given


def _is_index(place: Any) -> bool:
    return isinstance(place, Integral) and not isinstance(place, bool)


def _is_span(place: Any) -> bool:
    return isinstance(place, tuple) and len(place) == 2 and all(isinstance(x, int | np.integer) for x in place)


def _position(prompt: Text, place: Any, name: str) -> int:
    """The last token of a place: that of its last character, or the last of several that have it in parts."""
    text, tokens = prompt.text, len(prompt.ids)
    if _is_index(place) and 0 <= place < tokens:
        return int(place)
    if isinstance(place, str):
        if not place or (count := text.count(place)) == 0:
            raise ValueError(f"{name}: {place!r} is not in {text!r}.")
        if count > 1:
            raise ValueError(
                f"{name}: {place!r} is {count} times in {text!r}; give a longer piece, or (start, end) in it."
            )
        place = text.index(place), text.index(place) + len(place)
    elif not _is_span(place) or not 0 <= place[0] < place[1] <= len(text):
        raise ValueError(
            f"{name}: {place!r}; expected a piece of {text!r}, (start, end) of its {len(text)} characters, or the "
            f"index of one of its tokens, 0..{tokens - 1}."
        )
    last = place[1] - 1
    there = [i for i, (start, end) in enumerate(prompt.spans) if start <= last < end]
    if not there:
        raise ValueError(f"{name}: the tokenizer has no token for {text[last]!r}, the end of {text[slice(*place)]!r}.")
    return there[-1]
