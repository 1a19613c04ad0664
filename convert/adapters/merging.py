"""The tensors of a base with an adapter merged in."""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from convert.adapters.files import BIAS, EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B, MAGNITUDE, Adapter, ends
from convert.adapters.fit import check_fits
from convert.tensors import Tensors
from jaxmech.config import Config

KEPT = 8  # modules whose LoRA is in memory; more than threads read at once
PIECE = 1 << 20  # numbers
TILE = 1 << 18  # multiplications; OpenBLAS divides products that take more among threads


@dataclass(frozen=True)
class LowRank:
    """What LoRA makes of a weight W [I, J]: W + scale left right, and with DoRA, that with other norms.

    DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) trains the norm of every output: in a linear layer that of a row. In
    an embedding PEFT takes it for that of a column (`DoraEmbeddingVariant`).

    Attributes:
      left, right, scale: float32 [I, R], [R, J] and a number.
      row_norms: norms that the rows get, float32 [I]; None: those that they have.
      column_factor: what columns are multiplied by, float32 [J]; None: 1.
    """

    left: np.ndarray
    right: np.ndarray
    scale: np.float32
    row_norms: np.ndarray | None = None
    column_factor: np.ndarray | None = None

    def merged(self, weight: np.ndarray, rows: slice | None) -> np.ndarray:
        """Those rows of the new weight, float32, from the same rows of the old one."""
        rows = rows or slice(None)
        merged = product(self.left[rows], self.right)
        merged *= self.scale
        merged += weight
        if self.row_norms is not None:
            merged *= (self.row_norms[rows] / np.linalg.norm(merged, axis=1))[:, None]
        if self.column_factor is not None:
            merged *= self.column_factor
        return merged


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right, float32 [I, R] and [R, J], tile by tile, each on the thread that it is called in.

    Many threads merge at once. Where each product is divided among threads of BLAS again, these mostly wait for each
    other if the machine is busy: at rank 16, a product took ten times as long.
    """
    out = np.empty((len(left), right.shape[1]), np.float32)
    side = max(1, math.isqrt(TILE // left.shape[1]))
    for i in range(0, len(left), side):
        for j in range(0, right.shape[1], side):
            np.matmul(left[i : i + side], right[:, j : j + side], out=out[i : i + side, j : j + side])
    return out


class AdaptedTensors:
    """A base with an adapter merged in; a `convert.tensors.Tensors`. What the adapter adds to is float32."""

    def __init__(self, base: Tensors, config: Config, adapter: Adapter):
        """Checks that the adapter fits the base, whose config is `config`; raises what `check_fits` raises."""
        self.path = base.path
        self._base, self._adapter, self._replaced = base, adapter, adapter.replaced(config)
        embed, unembed = ends(config)
        self._sources = {name: name for name in base.names}
        if config.tie_embeddings:
            self._sources[unembed] = embed
        check_fits(adapter, config, base.path, {name: base.shape(source) for name, source in self._sources.items()})
        tied = adapter.adapted(config).tie_embeddings
        self._names = self._sources.keys() - ({unembed} if tied and unembed not in adapter.whole else set())
        self._lock = threading.Lock()  # so that a module's LoRA is read once and not by every thread
        self._kept = lru_cache(KEPT)(self._low_rank)

    @property
    def names(self) -> Iterable[str]:
        """All tensors of the base, and the unembedding where it no longer is the embedding."""
        return self._names

    def file(self, name: str) -> Path:
        """The file that a tensor is in before LoRA."""
        tensors, place = self._place(name)
        return tensors.file(place)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        tensors, place = self._place(name)
        return tensors.shape(place)

    def dtype(self, name: str) -> str:
        """The dtype in which it is read, by safetensors' name for it."""
        tensors, place = self._place(name)
        return "F32" if self._added(name) else tensors.dtype(place)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor with the adapter merged in, or some consecutive rows of its first axis."""
        tensors, place = self._place(name)
        tensor = tensors.read(place, rows)
        added = self._added(name)
        if BIAS in added:
            return tensor.astype(np.float32) + self._scale(name) * self._part(added[BIAS])[rows or slice(None)]
        if not added:
            return tensor
        with self._lock:
            lora = self._kept(name)
        return lora.merged(tensor, rows)

    def _place(self, name: str) -> tuple[Tensors, str]:
        """Where a tensor is, before LoRA."""
        if name in self._replaced:
            return self._adapter.tensors, self._replaced[name]
        return self._base, self._sources[name]

    def _added(self, name: str) -> dict[str, str]:
        """The parts of LoRA that add to a tensor."""
        module, _, leaf = name.rpartition(".")
        parts = self._adapter.lora.get(module, {})
        return {part: tensor for part, tensor in parts.items() if (part == BIAS) == (leaf == "bias")}

    def _scale(self, name: str) -> np.float32:
        return np.float32(self._adapter.config.scale_of(name.rpartition(".")[0]))

    def _low_rank(self, name: str) -> LowRank:
        """The LoRA of a weight, read."""
        parts = {part: self._part(tensor) for part, tensor in self._added(name).items()}
        if EMBEDDING_A not in parts:
            return LowRank(parts[LORA_B], parts[LORA_A], self._scale(name), row_norms=parts.get(MAGNITUDE))
        lora = LowRank(parts[EMBEDDING_A].T, parts[EMBEDDING_B].T, self._scale(name))
        if MAGNITUDE not in parts:
            return lora
        norms = self._column_norms(lora, name)
        return LowRank(lora.left, lora.right, lora.scale, column_factor=parts[MAGNITUDE] / norms)

    def _column_norms(self, lora: LowRank, name: str) -> np.ndarray:
        """Norms of the columns of a weight with LoRA, float32 [J]; reads some rows at a time."""
        tensors, place = self._place(name)
        count, width = tensors.shape(place)
        step = max(1, PIECE // width)
        parts = (slice(i, i + step) for i in range(0, count, step))
        squares = (np.square(lora.merged(tensors.read(place, rows), rows), dtype=np.float64) for rows in parts)
        return np.sqrt(sum(square.sum(axis=0) for square in squares)).astype(np.float32)

    def _part(self, name: str) -> np.ndarray:
        """A tensor of LoRA, float32."""
        tensor = self._adapter.tensors.read(name).astype(np.float32)
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{self._adapter.tensors.file(name)}: tensor {name} holds numbers that are not finite (NaN or "
                "infinity). The file is damaged, or training diverged; copy it again, or choose an earlier checkpoint."
            )
        return tensor
