"""The tensors of a checkpoint directory by name, whatever files they lie in; one is read when it is asked for.

Owns the interface `Tensors` and safetensors files; `convert.torch_files` owns those that PyTorch wrote.
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


class Tensors(Protocol):
    """The tensors of a checkpoint."""

    path: Path  # of the checkpoint

    @property
    def names(self) -> Iterable[str]:
        """All of them."""
        ...

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def dtype(self, name: str) -> str:
        """Its dtype, by safetensors' name for it."""
        ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some rows of its first axis."""
        ...


class SafeTensors:
    """The tensors of all safetensors files of a directory, memory-mapped."""

    def __init__(self, path: Path, stack: ExitStack):
        self.path = path
        shards, indexed = _shards(path)
        self._handles = {shard: stack.enter_context(_opened(shard)) for shard in shards}
        held = {shard: handle.keys() for shard, handle in self._handles.items()}
        for name, shard in indexed.items():
            if name not in held[shard]:
                raise ValueError(
                    f"{path / INDEX} says that tensor {name} is in {shard.name}, but it is not. The files belong to "
                    "different versions; copy or download them again."
                )
        self._shard_of = {name: shard for shard in shards for name in held[shard]} | indexed

    @property
    def names(self) -> Iterable[str]:
        return self._shard_of.keys()

    def file(self, name: str) -> Path:
        return self._shard_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._handles[self._shard_of[name]].get_tensor(name) if rows is None else self._slice(name)[rows]

    def _slice(self, name: str) -> Any:
        return self._handles[self._shard_of[name]].get_slice(name)


def open_tensors(path: Path, stack: ExitStack) -> Tensors:
    """The tensors of the checkpoint directory `path`; files stay open until `stack` closes.

    Raises:
      FileNotFoundError: no file of a known format, or a shard named in the index is missing.
      ValueError: a file is damaged.
    """
    return SafeTensors(Path(path), stack)


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} is not a whole safetensors file ({error}); copy or download it again.") from error


def _shards(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """All safetensors files, and the file of each tensor that the index names (none if there is no index)."""
    if (single := path / SINGLE).is_file():  # transformers, too, prefers it to an index
        return [single], {}
    index = path / INDEX
    if not index.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir()))
        raise FileNotFoundError(
            f"{path} holds neither {SINGLE} nor {INDEX} (found: {found}). Save the model with save_pretrained, which "
            "writes safetensors."
        )
    indexed = read_index(index)
    shards = sorted(set(indexed.values()))
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}. Copy them too.")
    return shards, indexed


def read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor that an index of shards names. ValueError if it is not an index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / shard for name, shard in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of shards ({error!r}); expected a JSON object with 'weight_map', tensor to "
            "file. Copy or download it again."
        ) from error
