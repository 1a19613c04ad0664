"""What is known of the models of a study without their weights: their names, and whether a study of them can end."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import convert
from jaxmech import checkpoint
from jaxmech.config import Config
from jaxmech.loading import describe


def model_names(paths: Sequence[Path]) -> list[str]:
    """Names of models, all different: those of their folders, with folders above them where those are equal.

    run1/checkpoint-500 and run2/checkpoint-500 are run1-checkpoint-500 and run2-checkpoint-500. Names serve as names of
    files, also where case is ignored; characters that some file systems do not take become "-".

    Raises:
      ValueError: a folder is given twice.
    """
    found = [path.resolve() for path in paths]
    if twice := [path for path, place in zip(paths, found, strict=True) if found.count(place) > 1]:
        raise ValueError(f"Models of a study must be different folders; {', '.join(map(str, twice))} are the same.")
    tails = [path.parts[-1:] for path in found]
    while again := [i for i, tail in enumerate(tails) if tails.count(tail) > 1]:
        tails = [found[i].parts[-len(tail) - 1 :] if i in again else tail for i, tail in enumerate(tails)]
    names: list[str] = []
    for i, name in enumerate(map(_name, tails)):
        taken = name.casefold() in [other.casefold() for other in names]
        names.append(f"{name}-{i}" if taken else name)
    return names


def _name(parts: Sequence[str]) -> str:
    safe = [re.sub(r"[^\w .+=@-]+", "-", part).strip("-. ") for part in parts]
    return "-".join(part for part in safe if part) or "model"


@dataclass(frozen=True)
class Known:
    """What a checkpoint folder says of its model, weights apart.

    Attributes:
      path: as it was named, that of the adapter if there is one.
      folder, adapter: where the checkpoint and the adapter are.
    """

    path: Path
    config: Config
    tokenizer: Any
    folder: Path
    adapter: Path | None

    def check_weights(self) -> None:
        """Checks that the weights are those that the config calls for, as far as it can be seen without reading them.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged, or a tensor is missing, left over or of another shape.
        """
        if checkpoint.is_checkpoint(self.folder):
            checkpoint.check(self.folder)
        else:
            convert.check_weights(self.folder, self.config, self.adapter)


def check_models(base: Path, tuned: Sequence[Path], texts: Sequence[str], **changes: Any) -> None:
    """Checks what can be checked of the models of a study without reading weights.

    Args:
      base: checkpoint folder of the base.
      tuned: folders of its fine-tuned descendants, or of adapters of the base.
      texts: prompts that the tokenizers must read alike.
      changes: fields of `Config`, such as dtype.

    Raises:
      FileNotFoundError: a folder or a file in it is missing.
      OSError: the Hub cannot be reached.
      ValueError: a file is damaged or describes a model that is not supported, a model has no tokenizer, another shape
        than the base, or another tokenizer.
    """
    first = known(base, None, changes)
    first.check_weights()
    for path in tuned:
        adapter = convert.is_adapter(convert.local_path(path))
        found = known(base, path, changes) if adapter else known(path, None, changes)
        if found.config.patched_shape != first.config.patched_shape:
            raise ValueError(
                f"{path} has (layers, heads, head_dim, vocabulary) = {found.config.patched_shape}, the base model "
                f"{base} {first.config.patched_shape}; a study needs fine-tunes of the base's shape."
            )
        _check_same_tokens(first, found, texts)
        found.check_weights()


def known(path: Path, adapter: Path | None, changes: Mapping[str, Any]) -> Known:
    """What is known of the model in the folder `path`, with an adapter or without; see `check_models`."""
    named = path if adapter is None else adapter
    path, adapter = convert.local_path(path), None if adapter is None else convert.local_path(adapter)
    config, tokenizer = describe(path, adapter, **changes)
    if tokenizer is None:
        raise ValueError(f"{named} holds no tokenizer; copy tokenizer.json or tokenizer.model there.")
    return Known(named, config, tokenizer, path, adapter)


def _check_same_tokens(base: Known, tuned: Known, texts: Sequence[str]) -> None:
    for text in texts:
        ours, theirs = (known.tokenizer(text).input_ids for known in (base, tuned))
        if ours != theirs:
            i = next(i for i, (one, other) in enumerate(zip_longest(ours, theirs)) if one != other)
            raise ValueError(
                f"The tokenizer of {tuned.path} reads {text!r} as {theirs[i : i + 3]} from token {i} on, that of the "
                f"base model {base.path} as {ours[i : i + 3]}; models of a study must share one tokenizer."
            )
