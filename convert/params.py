"""The tensors of a checkpoint to the Flax parameter tree, one stacked parameter at a time.

Owns the way of every number: read, checked, cast and put in its place, in pieces, by several threads. Beside the
parameters themselves, the host holds one stacked parameter, where the device has a memory of its own, and a few pieces.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert import floats
from convert.adapters import AdaptedTensors, Adapter
from convert.families import IGNORED_SUFFIXES, META, TABLES, Source, source
from convert.hf_config import read_base_config
from convert.meta import MetaTensors
from convert.multimodal import text_tensors
from convert.tensors import FLOATS, Tensors, open_tensors
from jaxmech import host_arrays
from jaxmech.config import Config
from jaxmech.model import check_params, parameter_shapes

PIECE = 1 << 19  # numbers: few enough to stay in a processor's cache on their way
THREADS = min(8, 2 * (os.cpu_count() or 1))  # more than processors: some wait for the disk

Progress = Callable[[int, int], None]


def read_params(
    path: Path,
    config: Config,
    progress: Progress | None = None,
    adapter: Path | None = None,
    *,
    shardings: Any = None,
) -> dict[str, Any]:
    """The parameters of the checkpoint directory `path`, {"params": tree}, in `config.param_dtype`.

    Args:
      progress: called with (tensors read, tensors in all) after each.
      adapter: directory of a LoRA adapter to merge in, in float32; `config` must be read with it, too.
      shardings: where the parameters go, a tree as that under "params"; without, to the default device.

    Raises:
      FileNotFoundError: no weights, or a shard named in the index is missing.
      ValueError: a file is damaged or holds code; a tensor is missing, left over, of a wrong shape, not of floats, not
        finite, or too large for the parameter dtype; the tree is not the model's; the adapter does not fit.
    """
    shapes = cast(dict[tuple[str, ...], tuple[int, ...]], flatten_dict(parameter_shapes(config)))
    tensors, table = _opened(path, config, adapter)
    sources = {keys: source(keys, table) for keys in shapes}
    count = _counter(sum(len(s.names(config)) for s in sources.values()), progress)
    places = {} if shardings is None else flatten_dict(shardings)
    leaves = {}
    with ThreadPoolExecutor(THREADS) as threads:
        stacked = partial(_stacked, config, tensors, threads, count)
        for keys, shape in shapes.items():  # the array has no name here, so it is let go once it is on its devices
            leaves[keys] = _placed(stacked(sources[keys], shape), places.get(keys))
    params = {"params": unflatten_dict(leaves)}
    check_params(config, params)
    return params


def check_weights(path: Path, config: Config, adapter: Path | None = None) -> None:
    """Checks what `read_params` checks before it reads: raises what it raises of names, shapes and dtypes of tensors.

    Args:
      path: the checkpoint directory.
      config: what `read_config` says of it, with the adapter if there is one.
      adapter: directory of a LoRA adapter.
    """
    _opened(path, config, adapter)


def _opened(path: Path, config: Config, adapter: Path | None) -> tuple[Tensors, Mapping[str, Source]]:
    """The tensors of a checkpoint, all of which its config calls for, and where they are in it."""
    tensors = text_tensors(open_tensors(Path(path)), config.family)
    table = META if isinstance(tensors, MetaTensors) else TABLES[config.family]
    if adapter is None and config.tie_embeddings and table["embed"].name not in tensors.names:
        # safetensors' save_model keeps one of two names of a tensor, and that may be the unembedding's.
        table = {**table, "embed": replace(table["embed"], name=table["unembed"].name)}
    if adapter is not None:
        tensors = _adapted(path, tensors, table, adapter, config)
    _check_tensors(config, tensors, table)
    return tensors, table


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor, and where they go.

    Attributes:
      out: the place in the parameter, with one axis for each letter of the tensor's axes.
      last: whether they are the tensor's last.
    """

    tensor: str
    rows: slice
    out: np.ndarray
    last: bool


def _stacked(
    config: Config,
    tensors: Tensors,
    threads: ThreadPoolExecutor,
    count: Callable[[], None],
    source: Source,
    shape: tuple[int, ...],
) -> np.ndarray:
    """One parameter, all layers of it; calls `count` after each tensor of the checkpoint."""
    array = host_arrays.empty(shape, jnp.dtype(config.param_dtype))
    pieces = list(_pieces(config, source, array))
    for piece, _ in zip(pieces, threads.map(partial(_read, tensors), pieces), strict=True):
        if piece.last:
            count()
    return array


def _pieces(config: Config, source: Source, array: np.ndarray) -> Iterator[_Piece]:
    """All pieces of one parameter, `array`, one tensor of the checkpoint after the other."""
    start, rows = (source.rows(config) or slice(0, None)).start, source.rows_per_step(config)
    for name, layer in zip(source.names(config), array if source.per_layer else array[None], strict=True):
        out = source.in_their_axes(config, layer)
        step = max(1, PIECE // math.prod(out.shape[1:]))
        for i in range(0, len(out), step):
            part = out[i : i + step]
            first = start + i * rows
            yield _Piece(name, slice(first, first + len(part) * rows), part, i + step >= len(out))


def _read(tensors: Tensors, piece: _Piece) -> None:
    """Reads the piece into its place. ValueError if it holds a number that is not finite, there or in the file."""
    values = tensors.read(piece.tensor, piece.rows).reshape(piece.out.shape)
    where = f"{tensors.file(piece.tensor)}: tensor {piece.tensor} holds numbers that are"
    if not floats.is_finite(values):
        raise ValueError(
            f"{where} not finite (NaN or infinity). The file is damaged, or training diverged; copy or download it "
            "again, or choose an earlier checkpoint."
        )
    written = floats.put(values, piece.out)
    if floats.is_narrower(written.dtype, than=values.dtype) and not floats.is_finite(written):
        raise ValueError(f"{where} too large for {piece.out.dtype}; choose float32 or bfloat16.")


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    """The array on its devices, without a copy if that is one CPU; waits, so that only one is on the host."""
    return jax.device_put(array, sharding).block_until_ready()


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    """A function that reports how often it was called."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return count


def _adapted(path: Path, tensors: Tensors, table: Mapping[str, Source], adapter: Path, config: Config) -> Tensors:
    """The tensors with the adapter merged in. The base is checked first, so that errors say whose they are."""
    base, opened = read_base_config(path), Adapter.open(adapter)
    _check_tensors(base, tensors, table)
    expected = opened.adapted(base)
    for name in ("vocab_size", "tie_embeddings"):
        if getattr(config, name) != getattr(expected, name):
            raise ValueError(
                f"config has {name}={getattr(config, name)}; expected {getattr(expected, name)} with the adapter "
                f"{adapter}. Read it with the adapter: convert.read_config(path, adapter)."
            )
    return AdaptedTensors(tensors, base, opened)


def _check_tensors(config: Config, tensors: Tensors, table: Mapping[str, Source]) -> None:
    """Every tensor is mapped or refused, and has its shape and a dtype of floats, before anything is read."""
    embed, unembed = table["embed"].name, table["unembed"].name
    sources = [source(keys, table) for keys in flatten_dict(parameter_shapes(config))]
    expected = {name: source.shape(config) for source in sources for name in source.names(config)}
    found = {name for name in tensors.names if not name.endswith(IGNORED_SUFFIXES)}
    if config.tie_embeddings and unembed in found and unembed != embed:
        _check_tied(tensors, embed, unembed)
        found.remove(unembed)
    if missing := sorted(expected.keys() - found):
        raise ValueError(
            f"{tensors.path} lacks {len(missing)} tensors that its config calls for: {_list(missing)}. Copy all files "
            "of the checkpoint, or its original config."
        )
    if extra := sorted(found - expected.keys()):
        raise ValueError(
            f"{tensors.path} has {len(extra)} tensors that its config does not call for: {_list(extra)}. They would be "
            "ignored silently, so they are refused; is the config the model's own?"
        )
    for name, shape in expected.items():
        where = f"{tensors.file(name)}: tensor {name} has"
        if tensors.shape(name) != shape:
            raise ValueError(
                f"{where} shape {tensors.shape(name)}; the config calls for {shape}. They belong to different models."
            )
        if tensors.dtype(name) not in FLOATS:
            raise ValueError(
                f"{where} dtype {tensors.dtype(name)}; expected one of {', '.join(FLOATS)}. Save the model unquantised."
            )


def _check_tied(tensors: Tensors, embed: str, unembed: str) -> None:
    """Some checkpoints of tied models carry the unembedding as well; it must be the embedding."""
    if embed in tensors.names and not _equal(tensors, embed, unembed):
        raise ValueError(
            f"{tensors.file(unembed)}: config.json says tie_word_embeddings, but {unembed} differs from {embed}. "
            "Set tie_word_embeddings to false if the unembedding was trained."
        )


def _equal(tensors: Tensors, name: str, other: str) -> bool:
    """Whether two tensors are equal; reads some rows of each at a time."""
    shape = tensors.shape(name)
    step = max(1, PIECE // math.prod(shape[1:]))
    parts = (slice(i, i + step) for i in range(0, shape[0], step))
    return shape == tensors.shape(other) and all(
        np.array_equal(tensors.read(name, rows), tensors.read(other, rows)) for rows in parts
    )


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
