"""The prompts of a command: of the boxes task, made or from a file, or pairs of another task from a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from jaxmech import boxes
from jaxmech.cli_options import PromptOptions
from jaxmech.pairs import Pairs
from jaxmech.run_folder import text_hash
from jaxmech.study import chance
from jaxmech.text_pairs import pairs_of, read_texts


@dataclass(frozen=True)
class Prompts:
    """Prompts as text.

    Attributes:
      roles: names of their token positions.
      fingerprint: changes when they do.
      chance: accuracy of naming any object of the scene, or None where there is none.
      wrong_answers: whether each has one.
      pairs: what they are for a tokenizer.
    """

    roles: Sequence[str]
    fingerprint: str
    chance: float | None
    wrong_answers: bool
    pairs: Callable[[Any], Pairs]


def prompts_of(options: PromptOptions, *, corrupt: bool = True) -> Prompts:
    """The prompts that the options name.

    Args:
      corrupt: pairs must have corrupt prompts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: two files, a line that cannot be read, or options that make no difference to such prompts.
    """
    made = [name for name in ("scenes", "boxes") if getattr(options, name) != getattr(PromptOptions, name)]
    if made and (options.data or options.pairs) is not None:
        raise ValueError(f"--{made[0]} is of scenes that are made; with --data or --pairs, leave it out.")
    if options.pairs is not None:
        return _of_pairs(options, corrupt)
    if options.first_token or options.between != " ":
        raise ValueError("--first-token and --between say how answers of --pairs are read; give --pairs, too.")
    if options.data is None:
        examples = boxes.make(options.scenes, options.boxes, options.seed)
    else:
        examples = boxes.read(options.data)

    def pairs(tokenizer: Any) -> Pairs:
        return boxes.pairs(examples, tokenizer, seed=options.seed, split_objects="drop", add_bos=options.add_bos)

    of_all = text_hash(example.sentence for example in examples)
    return Prompts(boxes.ROLES, of_all, chance(examples), wrong_answers=False, pairs=pairs)


def oddities(pairs: Pairs) -> list[str]:
    """What may be wrong with pairs of prompts, a sentence each."""
    found, count, last = [], len(pairs), pairs.position("last")
    read = [tuple(tokens[: end + 1].tolist()) for tokens, end in zip(pairs.clean, last, strict=True)]
    if again := count - len(set(read)):
        found.append(f"{again} of {count} clean prompts have been there before, the same token by token.")
    for one, other in combinations(pairs.positions, 2):
        if alike := int((pairs.position(one) == pairs.position(other)).sum()):
            found.append(f"{one!r} and {other!r} are one token in {alike} of {count} clean prompts.")
    if pairs.corrupt is None:
        return found
    ends = pairs.corrupt_position("last")
    theirs = [tuple(tokens[: end + 1].tolist()) for tokens, end in zip(pairs.corrupt, ends, strict=True)]
    if same := sum(one == other for one, other in zip(read, theirs, strict=True)):
        found.append(f"{same} of {count} corrupt prompts are the clean ones; no head has an effect there.")
    return found


def _of_pairs(options: PromptOptions, corrupt: bool) -> Prompts:
    """Those of --pairs."""
    if options.data is not None:
        raise ValueError("--data and --pairs: give one of them, boxes prompts or pairs of another task.")
    texts = read_texts(options.pairs, corrupt=corrupt)  # pyright: ignore

    def pairs(tokenizer: Any) -> Pairs:
        how = {"first_token": options.first_token, "between": options.between, "add_bos": options.add_bos}
        return pairs_of(texts, tokenizer, **how)

    roles, wrong = ["last", *texts[0].roles], texts[0].wrong_answer is not None
    return Prompts(roles, text_hash(map(repr, texts)), None, wrong_answers=wrong, pairs=pairs)
