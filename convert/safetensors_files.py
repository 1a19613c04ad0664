"""The tensors of a directory's safetensors files (https://github.com/huggingface/safetensors, "Format").

Read from the files, not mapped: mapped pages count as memory of the process, and a whole checkpoint would.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.shards import find_shards, shard_of_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: bytes from `offset` of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafeTensors:
    """The tensors of all safetensors files of a directory; a `convert.tensors.Tensors`."""

    def __init__(self, path: Path, single: str = SINGLE):
        self.path = path
        shards, indexed = find_shards(path, single, INDEX)
        held = {shard: _entries(shard) for shard in shards}
        self._shard_of = shard_of_tensors(path / INDEX, indexed, held)
        self._entry_of = {name: held[shard][name] for name, shard in self._shard_of.items()}

    @property
    def names(self) -> Iterable[str]:
        return self._shard_of.keys()

    def file(self, name: str) -> Path:
        return self._shard_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry_of[name].shape

    def dtype(self, name: str) -> str:
        return self._entry_of[name].dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        entry = self._entry_of[name]
        dtype = np.dtype(DTYPES[entry.dtype])
        shape, skipped = entry.shape, 0
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            shape, skipped = (stop - start, *shape[1:]), start * math.prod(shape[1:])
        offset = entry.offset + skipped * dtype.itemsize
        bits = np.fromfile(self.file(name), f"<u{dtype.itemsize}", math.prod(shape), offset=offset)
        if bits.size != math.prod(shape):
            raise ValueError(f"{self.file(name)} became shorter while it was read; copy or download it again.")
        return bits.view(dtype).reshape(shape)


def _entries(shard: Path) -> dict[str, _Entry]:
    """What the header says of each tensor."""
    try:
        with safe_open(shard, framework="np"):  # checks the header, and that the file is as long as it says
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} is not a whole safetensors file ({error}); copy or download it again.") from error
    with shard.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: _Entry(fields["dtype"], tuple(fields["shape"]), 8 + size + fields["data_offsets"][0])
        for name, fields in header.items()
    }
