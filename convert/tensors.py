"""The tensors of a checkpoint directory by name, whatever files they lie in; one is read when it is asked for.

Owns the interface `Tensors` and the choice of the format; `convert.safetensors_files`, `convert.torch_files` and
`convert.meta` each read one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from convert import meta, safetensors_files, torch_files

FLOATS = tuple(safetensors_files.DTYPES)  # safetensors' names


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
        """The tensor, or some consecutive rows of its first axis; not to be written to. Many threads read at once."""
        ...


def open_tensors(path: Path) -> Tensors:
    """The tensors of the checkpoint directory `path`: safetensors if there are any, else PyTorch's files, else Meta's.

    Raises:
      FileNotFoundError: no file of a known format, or a shard named in the index is missing.
      ValueError: a file is damaged, holds code, or cannot be read because PyTorch is not installed.
    """
    path = Path(path)
    for files, reader in ((safetensors_files, safetensors_files.SafeTensors), (torch_files, torch_files.TorchFiles)):
        if any((path / name).is_file() for name in (files.SINGLE, files.INDEX)):
            return reader(path)
    if meta.find_parts(path):
        return meta.MetaTensors(path)
    raise FileNotFoundError(
        f"{path} holds no weights (found: {', '.join(sorted(p.name for p in path.iterdir()))}); expected "
        f"{safetensors_files.SINGLE} or {safetensors_files.INDEX}, {torch_files.SINGLE} or {torch_files.INDEX}, or "
        f"Meta's {meta.PARTS}. Save the model with save_pretrained, which writes safetensors."
    )
