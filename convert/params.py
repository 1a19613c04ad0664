"""The tensors of a checkpoint to the Flax parameter tree, one stacked tensor at a time."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.families import IGNORED_SUFFIXES, TABLES, Source, source
from convert.tensors import FLOATS, Tensors, open_tensors
from jaxmech.config import Config
from jaxmech.model import check_params, parameter_shapes


def read_params(path: Path, config: Config, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The parameters of the checkpoint directory `path`, {"params": tree}, in `config.param_dtype`.

    Files are memory-mapped and read tensor by tensor: beside the parameters themselves, the host holds one stacked
    tensor and one tensor of the checkpoint at a time.

    Args:
      progress: called with (tensors read, tensors in all) after each.

    Raises:
      FileNotFoundError: no safetensors, or a shard named in the index is missing.
      ValueError: a file is damaged; a tensor is missing, left over, of a wrong shape, not of floats or not finite; the
        tree is not the model's.
    """
    shapes = cast(dict[tuple[str, ...], tuple[int, ...]], flatten_dict(parameter_shapes(config)))
    table = TABLES[config.family]
    sources = {keys: source(keys, table) for keys in shapes}
    with ExitStack() as stack:
        tensors = open_tensors(Path(path), stack)
        _check_tensors(config, tensors, sources.values(), unembed=table["unembed"].name, embed=table["embed"].name)
        read = _counted(tensors.read, sum(len(s.names(config)) for s in sources.values()), progress)
        leaves = {}
        for keys, shape in shapes.items():  # waits for each copy to the device, so that only one is on the host
            leaves[keys] = jnp.asarray(_stacked(config, sources[keys], shape, tensors, read)).block_until_ready()
    params = {"params": unflatten_dict(leaves)}
    check_params(config, params)
    return params


def _stacked(
    config: Config,
    source: Source,
    shape: tuple[int, ...],
    tensors: Tensors,
    read: Callable[[str, slice | None], np.ndarray],
) -> np.ndarray:
    """The parameter of that shape: the source's tensors in our axes, one a layer, cast to the parameter dtype."""
    stacked = np.empty(shape, jnp.dtype(config.param_dtype))
    layers = stacked if source.per_layer else stacked[None]
    for layer, name in zip(layers, source.names(config), strict=True):
        tensor = read(name, source.rows(config))
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{tensors.file(name)}: tensor {name} holds numbers that are not finite (NaN or infinity). The file is "
                "damaged, or training diverged; copy or download it again, or choose an earlier checkpoint."
            )
        layer[...] = source.to_ours(config, tensor)
    return stacked


def _counted(read: Callable, total: int, progress: Callable[[int, int], None] | None) -> Callable:
    """`read`, reporting after each call how many there were."""
    if progress is None:
        return read
    done = 0

    def counted(name: str, rows: slice | None) -> np.ndarray:
        nonlocal done
        tensor, done = read(name, rows), done + 1
        progress(done, total)
        return tensor

    return counted


def _check_tensors(config: Config, tensors: Tensors, sources: Iterable[Source], *, embed: str, unembed: str) -> None:
    """Every tensor is mapped or refused, and has its shape and a dtype of floats, before anything is read."""
    expected = {name: source.shape(config) for source in sources for name in source.names(config)}
    found = {name for name in tensors.names if not name.endswith(IGNORED_SUFFIXES)}
    if config.tie_embeddings and unembed in found:
        _check_tied(tensors, embed, unembed)
        found.remove(unembed)
    if missing := sorted(expected.keys() - found):
        raise ValueError(
            f"{tensors.path} lacks {len(missing)} tensors that its config.json calls for: {_list(missing)}. Copy all "
            "files of the checkpoint, or its original config.json."
        )
    if extra := sorted(found - expected.keys()):
        raise ValueError(
            f"{tensors.path} has {len(extra)} tensors that its config.json does not call for: {_list(extra)}. "
            "They would be ignored silently, so they are refused; is config.json the model's own?"
        )
    for name, shape in expected.items():
        where = f"{tensors.file(name)}: tensor {name} has"
        if tensors.shape(name) != shape:
            raise ValueError(
                f"{where} shape {tensors.shape(name)}; config.json calls for {shape}. They belong to different models."
            )
        if tensors.dtype(name) not in FLOATS:
            raise ValueError(
                f"{where} dtype {tensors.dtype(name)}; expected one of {', '.join(FLOATS)}. Save the model unquantised."
            )


def _check_tied(tensors: Tensors, embed: str, unembed: str) -> None:
    """Some checkpoints of tied models carry the unembedding as well; it must be the embedding."""
    if embed in tensors.names and not np.array_equal(tensors.read(embed), tensors.read(unembed)):
        raise ValueError(
            f"{tensors.file(unembed)}: config.json says tie_word_embeddings, but {unembed} differs from {embed}. "
            "Set tie_word_embeddings to false if the unembedding was trained."
        )


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
