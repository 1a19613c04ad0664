"""Pairs: the token prompts that every method works on.

Owns the container and its checks. It knows nothing of boxes, and any token ids will do; `Pairs.from_text` makes them of
texts (`jaxmech.tokenized`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmech.tokenized import (
    ExampleError,
    Place,
    answer_tokens,
    marked,
    read_prompts,
    right_padded,
    role_positions,
    roles_by_numbers,
    text_reader,
    warn_of_unknown_words,
)


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Clean prompts, their corrupt counterparts, the correct next token and named token positions.

    Prompts are right-padded with any token id: attention is causal, so what stands behind the last
    token of a prompt cannot change it. A *role* is a named token position, one per example; `last` must
    be among them and is each prompt's true last token. A warning says if prompts seem to be padded on the left.

    Attributes:
      clean: token ids of the prompts, int32 [B, T].
      corrupt: token ids of the corrupt prompts, int32 [B, T'], or None where a method needs none.
      labels: the correct next token of each clean prompt, int32 [B].
      positions: role -> token position in the clean prompt, int32 [B].
      corrupt_positions: role -> token position in the corrupt prompt, int32 [B].
      wrong_labels: a wrong answer to each clean prompt, int32 [B], for metric="logit_difference"; or None.

    Raises:
      ValueError: if shapes disagree, ids or positions are negative, `last` is missing, or a role lies outside its
        prompt.
    """

    clean: np.ndarray  # [B, T]
    corrupt: np.ndarray | None  # [B, T']
    labels: np.ndarray  # [B]
    positions: Mapping[str, np.ndarray]  # role -> [B]
    corrupt_positions: Mapping[str, np.ndarray] = field(default_factory=dict)  # role -> [B]
    wrong_labels: np.ndarray | None = None  # [B]

    def __post_init__(self):
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_field("clean", _token_ids("clean", self.clean, ndim=2))
        set_field("labels", _token_ids("labels", self.labels, ndim=1))
        if len(self.labels) != len(self.clean):
            raise ValueError(f"Pairs: labels has {len(self.labels)} examples, clean has {len(self.clean)}.")
        if self.wrong_labels is not None:
            set_field("wrong_labels", _token_ids("wrong_labels", self.wrong_labels, ndim=1))
            if len(self.wrong_labels) != len(self.clean):
                raise ValueError(
                    f"Pairs: wrong_labels has {len(self.wrong_labels)} examples, clean has {len(self.clean)}."
                )
        set_field("positions", _roles("positions", self.positions, self.clean))
        _warn_of_left_padding("clean", self.clean, self.positions["last"])
        if self.corrupt is None:
            if self.corrupt_positions:
                raise ValueError("Pairs: corrupt_positions given without corrupt prompts.")
            return
        set_field("corrupt", _token_ids("corrupt", self.corrupt, ndim=2))
        if len(self.corrupt) != len(self.clean):
            raise ValueError(f"Pairs: corrupt has {len(self.corrupt)} examples, clean has {len(self.clean)}.")
        set_field("corrupt_positions", _roles("corrupt_positions", self.corrupt_positions, self.corrupt))
        _warn_of_left_padding("corrupt", self.corrupt, self.corrupt_positions["last"])

    @classmethod
    def from_text(
        cls,
        tokenizer: Any,
        clean: Sequence[str],
        corrupt: Sequence[str] | None,
        answers: Sequence[str | int],
        roles: Mapping[str, Place | Sequence[Place]] | None = None,
        corrupt_roles: Mapping[str, Place | Sequence[Place]] | None = None,
        *,
        wrong_answers: Sequence[str | int] | None = None,
        first_token: bool = False,
        between: str = " ",
        add_bos: bool | None = None,
    ) -> "Pairs":
        """Pairs of prompts that are texts, padded on the right, with `last` and other roles.

        Args:
          tokenizer: a fast Hugging Face tokenizer.
          clean: B prompts.
          corrupt: their counterparts, or None where a method needs none.
          answers: the correct continuation of each clean prompt, one token where it stands, or the id of one.
          roles: role -> where it is in each clean prompt: a piece of the prompt that is there once, (start, end) among
            its characters, or the index of a token, counted from 0, BOS included. The position is that of the place's
            last token. One place stands for all prompts; `last` is found by itself. A tuple of two numbers is (start,
            end); indices for two prompts are a list or an array.
          corrupt_roles: the same for the corrupt prompts; None: the pieces of `roles` are looked for in them, too.
          wrong_answers: a wrong continuation of each, for metric="logit_difference".
          first_token: of answers of several tokens, take the first.
          between: stands between a prompt and its answer, unless the answer begins with a space of its own; in either
            case, the prompt does not end in white space.
          add_bos: prepend the tokenizer's BOS token; None: if the tokenizer does so by itself. A prompt that begins
            with it in writing, as chat templates have it, gets no second one.

        Warns how many prompts have words that the tokenizer does not know.

        Raises:
          TypeError: an answer that is no text.
          ValueError: an answer that is not one token, or white space alone, white space twice before it, a wrong answer
            that is the right one, a place that is not in its prompt or twice, numbers of prompts that differ, or a
            tokenizer without offsets; the prompt is named.
        """
        read = text_reader(tokenizer, add_bos)
        prompts = read_prompts(read, clean, "clean")
        lists = {"answers": answers, "wrong_answers": wrong_answers, "corrupt": corrupt}
        for name, given in lists.items():
            if given is not None and (isinstance(given, str) or len(given) != len(prompts)):
                raise ValueError(f"{name} is {given!r}; expected a list of {len(prompts)}, one for each clean prompt.")
        found = {
            name: answer_tokens(read, prompts, lists[name], between, name, first_token=first_token)
            for name in ("answers", "wrong_answers")
            if lists[name] is not None
        }
        labels, wrong = found["answers"], found.get("wrong_answers")
        if wrong is not None and (same := np.flatnonzero(wrong == labels)).size:
            row = int(same[0])
            raise ExampleError(
                f"wrong_answers[{row}]: {wrong_answers[row]!r} and the answer {answers[row]!r} are one token.",  # pyright: ignore
                row,
            )
        positions = role_positions(prompts, roles or {}, "roles")
        if corrupt is None:
            if corrupt_roles:
                raise ValueError("corrupt_roles given without corrupt prompts.")
            warn_of_unknown_words(prompts)
            return cls(right_padded(prompts), None, labels, positions, wrong_labels=wrong)
        others = read_prompts(read, corrupt, "corrupt")
        if corrupt_roles is not None:
            theirs = role_positions(others, corrupt_roles, "corrupt_roles")
        elif numbers := roles_by_numbers(roles or {}):
            raise ValueError(
                f"roles gives {numbers} by characters or tokens of the clean prompts; give corrupt_roles for the "
                "corrupt ones."
            )
        else:
            theirs = role_positions(others, roles or {}, "without corrupt_roles, roles hold for corrupt prompts: roles")
        warn_of_unknown_words([*prompts, *others])
        return cls(right_padded(prompts), right_padded(others), labels, positions, theirs, wrong)

    def __repr__(self) -> str:
        tokens = str(self.clean.shape[1])
        if self.corrupt is not None and self.corrupt.shape[1] != self.clean.shape[1]:
            tokens += f" and {self.corrupt.shape[1]}"
        without = ", no corrupt prompts" if self.corrupt is None else ""
        prompts = f"{len(self)} prompt{'s' * (len(self) != 1)}"
        return f"Pairs({prompts}, {tokens} tokens, roles {', '.join(self.positions)}{without})"

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | np.ndarray) -> "Pairs":
        """The examples `rows` (a slice, or an integer or boolean array [b]); padding is kept.

        Raises:
          TypeError: a single number; `pairs[3:4]` are the pairs with example 3 alone.
          ValueError: no example is selected.
          IndexError: an example that is not there, or a boolean array of another length.
        """
        if not isinstance(rows, slice) and np.ndim(rows) == 0:
            raise TypeError(f"pairs[{rows!r}]: rows are a slice or an array; for one example take pairs[i : i + 1].")
        if not len(self.labels[rows]):
            raise ValueError(f"pairs[rows] selects none of the {len(self)} prompts; there are no empty pairs.")
        pick = lambda roles: {role: value[rows] for role, value in roles.items()}  # noqa: E731
        with _as_warned_of_before():
            return Pairs(
                clean=self.clean[rows],
                corrupt=None if self.corrupt is None else self.corrupt[rows],
                labels=self.labels[rows],
                positions=pick(self.positions),
                corrupt_positions=pick(self.corrupt_positions),
                wrong_labels=None if self.wrong_labels is None else self.wrong_labels[rows],
            )

    @classmethod
    def concatenate(cls, parts: Sequence["Pairs"]) -> "Pairs":
        """The examples of several sets of pairs, one behind another; shorter prompts are padded on.

        Args:
          parts: the sets.

        Raises:
          ValueError: no parts, or parts that differ in their roles, or in having corrupt prompts or wrong labels.
        """
        if not parts:
            raise ValueError("Pairs.concatenate has no parts; expected at least one.")
        for i, part in enumerate(parts):
            for what, (found, expected) in _kinds([part, parts[0]]).items():
                if found != expected:
                    raise ValueError(f"{what}: parts[{i}] has {found}, parts[0] {expected}; expected the same in all.")

        def roles(of: Callable[["Pairs"], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
            return {role: np.concatenate([of(part)[role] for part in parts]) for role in of(parts[0])}

        corrupt = [part.corrupt for part in parts if part.corrupt is not None]
        wrong = [part.wrong_labels for part in parts if part.wrong_labels is not None]
        with _as_warned_of_before():
            return cls(
                clean=_padded_together([part.clean for part in parts]),
                corrupt=_padded_together(corrupt) if corrupt else None,
                labels=np.concatenate([part.labels for part in parts]),
                positions=roles(lambda part: part.positions),
                corrupt_positions=roles(lambda part: part.corrupt_positions),
                wrong_labels=np.concatenate(wrong) if wrong else None,
            )

    def between(self, first: str, last: str) -> np.ndarray:
        """The tokens of each clean prompt from one role to another, both included, bool [B, T].

        Those of a name of several tokens, say, for `knockout`: `from_text` finds its first token as the place (start,
        start + 1) of its first character, and its last by the name itself.

        Args:
          first, last: the roles.

        Raises:
          ValueError: an unknown role, or one that is before the other in some prompt.
        """
        start, stop = self.position(first), self.position(last)
        if (start > stop).any():
            row = int((start > stop).argmax())
            raise ValueError(
                f"{first!r} is token {start[row]} of example {row}, {last!r} token {stop[row]}, before it."
            )
        token = np.arange(self.clean.shape[1])
        return (token >= start[:, None]) & (token <= stop[:, None])

    def show(self, tokenizer: Any, row: int = 0) -> str:
        """The prompts of one example as text, every role behind its token, to see that they are where they should be.

        Args:
          tokenizer: the one that the prompts were made with.
          row: which example.
        """
        sides = {"clean": (self.clean, self.positions)}
        if self.corrupt is not None:
            sides["corrupt"] = self.corrupt, self.corrupt_positions
        lines = []
        for name, (tokens, roles) in sides.items():
            at = {role: int(positions[row]) for role, positions in roles.items()}
            lines.append(f"{name}: {marked(tokenizer, tokens[row, : at['last'] + 1].tolist(), at)}")
        answer = tokenizer.decode([int(self.labels[row])])
        return "\n".join([f"{lines[0]} -> {answer!r}", *lines[1:]])

    def position(self, role: str) -> np.ndarray:
        """Position of `role` in each clean prompt, [B]; ValueError if there is no such role."""
        return _role(self.positions, role, "positions")

    def corrupt_position(self, role: str) -> np.ndarray:
        """Position of `role` in each corrupt prompt, [B]; ValueError if there is no such role."""
        if self.corrupt is None:
            raise ValueError("These pairs have no corrupt prompts; this method needs them (Pairs(corrupt=...)).")
        if role not in self.corrupt_positions:
            self.position(role)  # says so if no prompt has it
        return _role(self.corrupt_positions, role, "corrupt_positions")


def _kinds(some: Sequence[Pairs]) -> dict[str, list[Any]]:
    """What pairs must have in common to be concatenated, of each."""
    return {
        "positions": [sorted(pairs.positions) for pairs in some],
        "corrupt prompts": ["none" if pairs.corrupt is None else "some" for pairs in some],
        "corrupt_positions": [sorted(pairs.corrupt_positions) for pairs in some],
        "wrong_labels": ["none" if pairs.wrong_labels is None else "some" for pairs in some],
    }


def _padded_together(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Token ids [B, T] of all prompts [b, .]."""
    width = max(x.shape[1] for x in prompts)
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in prompts])


def positions_of(position: Callable[[str], np.ndarray], roles: Sequence[str]) -> np.ndarray:
    """Positions [B, R] of the roles; `position` is a function from a role to [B]."""
    return np.stack([position(role) for role in roles], axis=1)


def one_or_more(role: str | Sequence[str], name: str) -> list[str]:
    """A role, or several, as a list; `name` is what they are called in errors. ValueError for none."""
    roles = [role] if isinstance(role, str) else list(role) if isinstance(role, Sequence) else []
    if not roles:
        raise ValueError(f"{name} is {role!r}; expected the name of a role, or of several.")
    return roles


def _token_ids(name: str, value, ndim: int) -> np.ndarray:
    array = _integers(name, value, ndim, "token ids")
    if array.min() < 0:
        hint = "; pad with any real token id" if ndim == 2 else ""
        raise ValueError(f"Pairs: {name} holds the negative id {array.min()}{hint}.")
    return array.astype(np.int32)


def _integers(name: str, value, ndim: int, kind: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of unequal lengths
        raise ValueError(f"Pairs: {name} is no array: {error} Pad the prompts on the right to one length.") from error
    if array.ndim != ndim or 0 in array.shape:
        raise ValueError(f"Pairs: {name} has shape {array.shape}; expected {ndim} axes, none empty.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"Pairs: {name} has dtype {array.dtype}; expected integer {kind}.")
    if array.max() > np.iinfo(np.int32).max:
        raise ValueError(f"Pairs: {name} holds {array.max()}, which is no 32-bit number.")
    return array


def _roles(name: str, roles: Mapping, tokens: np.ndarray) -> dict[str, np.ndarray]:
    if "last" not in roles:
        raise ValueError(f"Pairs: {name} has roles {sorted(roles)}; 'last' (each true last token) is missing.")
    checked = {role: _integers(f"{name}[{role!r}]", value, 1, "positions") for role, value in roles.items()}
    for role, value in sorted(checked.items(), key=lambda item: item[0] != "last"):  # which others are compared with
        if len(value) != len(tokens):
            raise ValueError(f"Pairs: {name}[{role!r}] has {len(value)} examples, the prompts {len(tokens)}.")
        end = np.minimum(checked["last"], tokens.shape[1] - 1)
        outside = (value < 0) | (value > end)
        if outside.any():
            row = int(outside.argmax())
            expected = f"0..{end[row]}, a token up to `last` of a prompt of {tokens.shape[1]} tokens"
            if end[row] < 0:  # `last` itself
                expected = f"0..{tokens.shape[1] - 1}, a token of the prompt"
            raise ValueError(
                f"Pairs: {name}[{role!r}] of example {row} is {value[row]}; expected {expected}. Positions are counted "
                "from the start."
            )
    return {role: value.astype(np.int32) for role, value in checked.items()}


def _warn_of_left_padding(name: str, tokens: np.ndarray, last: np.ndarray) -> None:
    """Warns if some prompts, but not all, begin with one same token twice. Those of one token are none of them."""
    first, second = tokens[:, 0], tokens[:, min(1, tokens.shape[1] - 1)]
    twice = (first == second) & (last > 0)
    if not twice.any() or twice.all() or len(ids := np.unique(first[twice])) > 1:
        return
    warnings.warn(
        f"Pairs: {twice.sum()} of {len(tokens)} {name} prompts begin with token {ids[0]} twice or more, the others do "
        "not. This looks like padding on the left, which the model would read; pad prompts on the right.",
        stacklevel=4,
    )


@contextmanager
def _as_warned_of_before() -> Iterator[None]:
    """Of prompts that other pairs had before, a warning would be the second, or false, and point to this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _role(roles: Mapping[str, np.ndarray], role: str, name: str) -> np.ndarray:
    if not isinstance(role, str):
        raise ValueError(
            f"role is {role!r}; expected the name of one role: these pairs have {name} for {sorted(roles)}."
        )
    if role not in roles:
        raise ValueError(f"Unknown role {role!r}; these pairs have {name} for {sorted(roles)}.")
    return roles[role]
