"""Pairs of prompts of any task, written as text in a JSONL file, one pair a line.

    {"clean": "The fig is in Box X. Box X contains the", "corrupt": "The bag is in Box T. Box T contains the",
     "answer": "fig", "wrong_answer": "bag", "roles": {"verb": "contains"}}

`corrupt`, `wrong_answer` and `roles` may be left out, by all lines alike. A role's place is a piece of the prompt that
is there once, [start, end] among its characters, or the index of a token, as in `Pairs.from_text`. `corrupt_roles` are
the places in the corrupt prompt; a piece of text stands for both prompts if they do not name it. An answer that is no
text, but the id of a token, is {"token": 42}; a number is refused, since "42" may be meant. Other keys are ignored, but
for what looks like one of these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxmech.json_lines import read_json_lines
from jaxmech.pairs import Pairs
from jaxmech.tokenized import ExampleError, Place

KEYS = ("clean", "corrupt", "answer", "wrong_answer", "roles", "corrupt_roles")


@dataclass(frozen=True)
class TextPair:
    """A prompt, its corrupt counterpart and its answer, as text.

    Attributes:
      clean, corrupt: the prompts; None: there is no corrupt one.
      answer, wrong_answer: continuations of the clean prompt, or ids of tokens; None: there is no wrong one.
      roles, corrupt_roles: role -> its place in the clean and in the corrupt prompt.
      place: where it is written, "FILE, line 3".
    """

    clean: str
    answer: str | int
    corrupt: str | None = None
    wrong_answer: str | int | None = None
    roles: Mapping[str, Place] = field(default_factory=dict)
    corrupt_roles: Mapping[str, Place] = field(default_factory=dict)
    place: str = field(default="", compare=False, repr=False)

    @property
    def sentence(self) -> str:
        """The clean prompt and its answer, to be read."""
        answer = f"token {self.answer}" if isinstance(self.answer, int) else self.answer.strip()
        return f"{self.clean} [{answer}]"


def read_pairs(
    path: str | Path,
    tokenizer: Any,
    *,
    first_token: bool = False,
    between: str = " ",
    add_bos: bool | None = None,
) -> Pairs:
    """Reads pairs from a JSONL file.

    One object a line, with the keys "clean" and "answer", and if all lines have them "corrupt", "wrong_answer", "roles"
    and "corrupt_roles", {role: place}. A place is a piece of the prompt that is there once, [start, end] among its
    characters, or the index of a token. A piece is looked for in the corrupt prompt, too, unless corrupt_roles name the
    role. Answers are texts, or {"token": ID}. Other keys are ignored, but for what looks like one of these.

    Args:
      path: the file.
      tokenizer: a fast Hugging Face tokenizer.
      first_token, between, add_bos: as for `Pairs.from_text`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: names the file and the line that is not such an object, or whose prompt, answer or role the tokenizer
        does not find; see `Pairs.from_text`.
    """
    return pairs_of(read_texts(path), tokenizer, first_token=first_token, between=between, add_bos=add_bos)


def read_texts(path: str | Path, *, corrupt: bool = False) -> list[TextPair]:
    """The pairs in a file.

    Args:
      path: the file.
      corrupt: they must have corrupt prompts.

    Raises:
      ValueError: as `read_pairs`, but for what a tokenizer finds; or there are no corrupt prompts.
    """
    found: list[TextPair] = []

    def parse(record: Any, place: str) -> TextPair:
        found.append(replace(_text_pair(record), place=place))
        _check_alike(found[0], found[-1])
        return found[-1]

    texts = read_json_lines(path, parse, "pairs of prompts")
    if corrupt and texts[0].corrupt is None:
        raise ValueError(f'{path} has no "corrupt" prompts; path patching needs one for each clean prompt.')
    return texts


def pairs_of(
    texts: Sequence[TextPair],
    tokenizer: Any,
    *,
    first_token: bool = False,
    between: str = " ",
    add_bos: bool | None = None,
) -> Pairs:
    """The token ids of pairs that are alike (see `read_texts`). Raises as `Pairs.from_text`, and names the place."""
    first = texts[0]

    def places(name: str) -> dict[str, list[Place]]:
        return {role: [getattr(pair, name)[role] for pair in texts] for role in getattr(first, name)}

    try:
        return Pairs.from_text(
            tokenizer,
            [pair.clean for pair in texts],
            None if first.corrupt is None else [str(pair.corrupt) for pair in texts],
            [pair.answer for pair in texts],
            places("roles"),
            None if first.corrupt is None else places("corrupt_roles"),
            wrong_answers=None if first.wrong_answer is None else [x.wrong_answer for x in texts],  # pyright: ignore
            first_token=first_token,
            between=between,
            add_bos=add_bos,
        )
    except ExampleError as error:
        raise ValueError(f"{texts[error.row].place}: {error}") from error


def _text_pair(record: Any) -> TextPair:
    """What a line holds, or a ValueError saying what it lacks."""
    if not isinstance(record, dict):
        raise ValueError(f'found {type(record).__name__}; expected an object with the keys "clean" and "answer".')
    for key in record.keys() - set(KEYS):
        if meant := get_close_matches(key, KEYS, n=1, cutoff=0.8):
            raise ValueError(f'there is no key "{key}"; is "{meant[0]}" meant?')
    clean, corrupt = (_text(record, name) for name in ("clean", "corrupt"))
    answer, wrong_answer = (_answer(record, name) for name in ("answer", "wrong_answer"))
    if clean is None or answer is None:
        missing = '"clean"' if clean is None else '"answer"'
        raise ValueError(f'{missing} is missing or null; expected "clean" and "answer" at least.')
    roles, theirs = (_places(record, name) for name in ("roles", "corrupt_roles"))
    return TextPair(clean, answer, corrupt, wrong_answer, roles, _corrupt_places(corrupt, roles, theirs))


def _corrupt_places(corrupt: str | None, roles: Mapping[str, Place], given: Mapping[str, Place]) -> dict[str, Place]:
    """The places of all roles in the corrupt prompt: those that are given, or the same pieces of text."""
    if unknown := sorted(given.keys() - (roles.keys() if corrupt is not None else ())):
        if corrupt is None:
            raise ValueError(f'corrupt_roles names {unknown}, but there is no "corrupt" prompt.')
        raise ValueError(f"corrupt_roles names {unknown}, which are none of the roles {sorted(roles)}.")
    if corrupt is None:
        return {}
    if numbers := sorted(role for role in roles.keys() - given.keys() if not isinstance(roles[role], str)):
        raise ValueError(f"roles gives {numbers} by numbers in the clean prompt; give those of the corrupt one, too.")
    found = {role: given.get(role, place) for role, place in roles.items()}
    for role, place in found.items():
        if isinstance(place, str) and place not in corrupt:
            raise ValueError(
                f"the role {role!r} is {place!r}, which is not in the corrupt prompt {corrupt!r}; give its place there "
                'in "corrupt_roles".'
            )
    return found


def _text(record: Mapping[str, Any], name: str) -> str | None:
    if not isinstance(record.get(name), str | None):
        raise ValueError(f'"{name}" is {record[name]!r}; expected a text.')
    return record.get(name)


def _answer(record: Mapping[str, Any], name: str) -> str | int | None:
    given = record.get(name)
    if isinstance(given, str | None):
        return given
    if isinstance(given, dict) and list(given) == ["token"] and type(given["token"]) is int:
        return given["token"]
    number = f'; "{given}", if that is the answer' if type(given) in (int, float) else ""
    raise ValueError(f'"{name}" is {given!r}; expected a text{number}, or {{"token": ID}} for the token of that id.')


def _places(record: Mapping[str, Any], name: str) -> dict[str, Place]:
    given = {} if record.get(name) is None else record[name]
    if not isinstance(given, dict):
        raise ValueError(f'"{name}" is {given!r}; expected an object, a place for the name of each role.')
    return {role: _place(place, f'"{name}" of {role!r}') for role, place in given.items()}


def _place(place: Any, name: str) -> Place:
    if isinstance(place, str) or type(place) is int:  # which a bool is not
        return place
    if isinstance(place, list) and len(place) == 2 and all(type(x) is int for x in place):
        return place[0], place[1]
    raise ValueError(f"{name} is {place!r}; expected a piece of the prompt, [start, end], or the index of a token.")


def _check_alike(first: TextPair, pair: TextPair) -> None:
    """ValueError unless a pair has what the first one has."""
    for name in ("corrupt", "wrong_answer"):
        one, other = (getattr(x, name) is not None for x in (first, pair))
        if one != other:
            has = f'has "{name}", but the first one has none' if other else f'has no "{name}", but the first one has'
            raise ValueError(f"this line {has}.")
    if set(pair.roles) != set(first.roles):
        raise ValueError(f"this line has the roles {sorted(pair.roles)}, the first one {sorted(first.roles)}.")
