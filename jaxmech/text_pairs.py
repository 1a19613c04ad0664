"""Pairs of prompts of any task, written as text in a JSONL file, one pair a line.

    {"clean": "The fig is in Box X. Box X contains the", "corrupt": "The bag is in Box T. Box T contains the",
     "answer": "fig", "wrong_answer": "bag", "roles": {"verb": "contains"}}

`corrupt`, `wrong_answer` and `roles` may be left out, by all lines alike. A role's place is a piece of the prompt that
is there once, [start, end] among its characters, or the index of a token, as in `Pairs.from_text`. `corrupt_roles` are
the places in the corrupt prompt; a piece of text stands for both prompts if they do not name it. Other keys are
ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmech.json_lines import read_json_lines
from jaxmech.pairs import Pairs
from jaxmech.tokenized import Place


@dataclass(frozen=True)
class TextPair:
    """A prompt, its corrupt counterpart and its answer, as text.

    Attributes:
      clean, corrupt: the prompts; None: there is no corrupt one.
      answer, wrong_answer: continuations of the clean prompt, or ids of tokens; None: there is no wrong one.
      roles, corrupt_roles: role -> its place in the clean and in the corrupt prompt.
    """

    clean: str
    answer: str | int
    corrupt: str | None = None
    wrong_answer: str | int | None = None
    roles: Mapping[str, Place] = field(default_factory=dict)
    corrupt_roles: Mapping[str, Place] = field(default_factory=dict)

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
    role. Other keys are ignored.

    Args:
      path: the file.
      tokenizer: a fast Hugging Face tokenizer.
      first_token, between, add_bos: as for `Pairs.from_text`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: names the file and the line that is not such an object, or the example, counted from 0, whose prompt,
        answer or role cannot be read, as `Pairs.from_text` does.
    """
    try:
        texts = read_texts(path)
        return pairs_of(texts, tokenizer, first_token=first_token, between=between, add_bos=add_bos)
    except ValueError as error:
        named = str(error).startswith(str(path))
        raise error if named else ValueError(f"{path}: {error}") from error


def read_texts(path: str | Path) -> list[TextPair]:
    """The pairs in a file. Raises as `read_pairs`, but for what a tokenizer finds."""
    found: list[TextPair] = []

    def parse(record: Any) -> TextPair:
        found.append(_text_pair(record))
        _check_alike(found[0], found[-1])
        return found[-1]

    return read_json_lines(path, parse, "pairs of prompts")


def pairs_of(
    texts: Sequence[TextPair],
    tokenizer: Any,
    *,
    first_token: bool = False,
    between: str = " ",
    add_bos: bool | None = None,
) -> Pairs:
    """The token ids of pairs that are alike (see `read_texts`). Raises as `Pairs.from_text`."""
    first = texts[0]

    def places(name: str) -> dict[str, list[Place]]:
        return {role: [getattr(pair, name)[role] for pair in texts] for role in getattr(first, name)}

    return Pairs.from_text(
        tokenizer,
        [pair.clean for pair in texts],
        None if first.corrupt is None else [str(pair.corrupt) for pair in texts],
        [pair.answer for pair in texts],
        places("roles"),
        None if first.corrupt is None else places("corrupt_roles"),
        wrong_answers=None if first.wrong_answer is None else [pair.wrong_answer for pair in texts],  # pyright: ignore
        first_token=first_token,
        between=between,
        add_bos=add_bos,
    )


def _text_pair(record: Any) -> TextPair:
    """What a line holds, or a ValueError saying what it lacks."""
    if not isinstance(record, dict):
        raise ValueError(f'found {type(record).__name__}; expected an object with the keys "clean" and "answer".')
    clean, corrupt = (_text(record, name) for name in ("clean", "corrupt"))
    answer, wrong_answer = (_answer(record, name) for name in ("answer", "wrong_answer"))
    if clean is None or answer is None:
        raise ValueError(f'found the keys {", ".join(sorted(record))}; expected "clean" and "answer" at least.')
    roles, theirs = (_places(record, name) for name in ("roles", "corrupt_roles"))
    if unknown := sorted(theirs.keys() - (roles.keys() if corrupt is not None else ())):
        expected = "roles of the clean prompt" if corrupt is not None else "none without a corrupt prompt"
        raise ValueError(f"corrupt_roles names {unknown}; expected {expected}.")
    if corrupt is not None:
        theirs = {role: place for role, place in roles.items() if isinstance(place, str)} | theirs
    if missing := sorted(roles.keys() - theirs.keys()) if corrupt is not None else ():
        raise ValueError(f"roles gives {missing} by numbers in the clean prompt; give those of the corrupt one, too.")
    return TextPair(
        clean, answer, corrupt, wrong_answer, roles, {role: theirs[role] for role in roles if role in theirs}
    )


def _text(record: Mapping[str, Any], name: str) -> str | None:
    if not isinstance(record.get(name), str | None):
        raise ValueError(f'"{name}" is {record[name]!r}; expected a text.')
    return record.get(name)


def _answer(record: Mapping[str, Any], name: str) -> str | int | None:
    given = record.get(name)
    if not isinstance(given, str | int | None) or isinstance(given, bool):
        raise ValueError(f'"{name}" is {given!r}; expected a text, or the id of a token.')
    return given


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
