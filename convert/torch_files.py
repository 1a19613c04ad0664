"""The tensors of files that `torch.save` wrote: `pytorch_model.bin`, with or without an index of shards.

The only import of PyTorch in the conversion, and only when there are such files: all else runs without it. Files are
loaded with `weights_only`, which builds tensors and runs no code that a file may hold.
"""

import pickle
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.shards import find_shards, shard_of_tensors

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
MAPPED = 256 << 20  # bytes
DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of a tensor; the dtype by safetensors' name, or PyTorch's for those that are not of floats."""

    shape: tuple[int, ...]
    dtype: str


class MappedFiles:
    """Files of `torch.save`, memory-mapped.

    The pages that were read count as memory of the process as long as their file is mapped. So all are unmapped, to be
    mapped anew by the next read, whenever as much was read as the largest file holds, or `MAPPED`.

    Attributes:
      entries: what each file holds.
    """

    def __init__(self, files: Sequence[Path]):
        self.entries = {file: _entries(file) for file in files}
        self._most = min(MAPPED, max(file.stat().st_size for file in files))
        self._lock = threading.Lock()
        self._mapped: dict[Path, dict[str, Any]] = {}
        self._read = 0  # bytes since the last time that all were unmapped

    def read(self, file: Path, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some rows of it, in the mapped memory; it stays mapped while the array is in use."""
        with self._lock:
            if self._read > self._most:
                self._mapped, self._read = {}, 0
            if file not in self._mapped:
                self._mapped[file] = _load(file)
            tensor = self._mapped[file][name]
            tensor = tensor if rows is None else tensor[rows]
            self._read += tensor.nbytes
        return _array(tensor)


class TorchFiles:
    """The tensors of all PyTorch files of a directory; a `convert.tensors.Tensors`."""

    def __init__(self, path: Path, single: str = SINGLE):
        self.path = path
        shards, indexed = find_shards(path, single, INDEX)
        self._files = MappedFiles(shards)
        self._shard_of = shard_of_tensors(path / INDEX, indexed, self._files.entries)

    @property
    def names(self) -> Iterable[str]:
        return self._shard_of.keys()

    def file(self, name: str) -> Path:
        return self._shard_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        return self._entry(name).dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._files.read(self._shard_of[name], name, rows)

    def _entry(self, name: str) -> Entry:
        return self._files.entries[self._shard_of[name]][name]


def _load(file: Path) -> dict[str, Any]:
    """Everything in the file, memory-mapped."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{file} was written by PyTorch, which is not installed here ({error}). Install it (pip install torch), or "
            "save the model as safetensors where it is: model.save_pretrained(DIR)."
        ) from error
    try:
        return torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        names = ", ".join(sorted(set(re.findall(r"GLOBAL (\S+)", str(error))))) or str(error).splitlines()[-1]
        raise ValueError(
            f"{file} holds more than tensors ({names}). To load it could run code, so it is refused. Save the tensors "
            "alone: torch.save(model.state_dict(), FILE), or better as safetensors: model.save_pretrained(DIR)."
        ) from error
    except Exception as error:  # of many types, depending on where the file ends
        raise ValueError(
            f"{file} is not a whole file of torch.save, PyTorch 1.6 or later ({str(error).splitlines()[0]}); copy or "
            "download it again."
        ) from error


def _entries(file: Path) -> dict[str, Entry]:
    """The entries of the file. ValueError if it holds anything but named tensors."""
    held = _load(file)
    if not isinstance(held, dict):
        raise ValueError(f"{file} holds a {type(held).__name__}; expected a dictionary, name to tensor. {_ADVICE}")
    for name, value in held.items():
        if not isinstance(name, str) or not hasattr(value, "untyped_storage"):
            raise ValueError(f"{file} holds a {type(value).__name__} at {name!r}; expected tensors only. {_ADVICE}")
    return {name: Entry(tuple(x.shape), DTYPES.get(str(x.dtype), str(x.dtype))) for name, x in held.items()}


_ADVICE = "Save the tensors alone: torch.save(model.state_dict(), FILE)."


def _array(tensor: Any) -> np.ndarray:
    """The tensor as an array in the same memory. NumPy has no bfloat16, so its bits go over as integers."""
    tensor = tensor.detach()
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    import torch  # pyright: ignore[reportMissingImports]

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
