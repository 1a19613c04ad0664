"""Safetensors files of a Hugging Face checkpoint to the Flax parameter tree, one stacked tensor at a time."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from convert.families import IGNORED_SUFFIXES, TOP, Source, source
from jaxmech.config import Config
from jaxmech.model import check_params, parameter_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


def read_params(path: Path, config: Config, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The parameters of the checkpoint directory `path`, {"params": tree}, in `config.param_dtype`.

    Files are memory-mapped and read tensor by tensor: beside the parameters themselves, the host holds one stacked
    tensor and one tensor of the checkpoint at a time.

    Args:
      progress: called with (tensors read, tensors in all) after each.

    Raises:
      FileNotFoundError: no safetensors, or a shard named in the index is missing.
      ValueError: a file is damaged; a tensor is missing, left over, of a wrong shape or not of floats; the tree is not
        the model's.
    """
    shapes = cast(dict[tuple[str, ...], tuple[int, ...]], flatten_dict(parameter_shapes(config)))
    sources = {keys: source(keys) for keys in shapes}
    with ExitStack() as stack:
        tensors = _Tensors(Path(path), stack)
        _check_tensors(config, tensors, sources.values())
        read = _counted(tensors.read, sum(len(s.names(config)) for s in sources.values()), progress)
        leaves = {}
        for keys, shape in shapes.items():  # waits for each copy to the device, so that only one is on the host
            leaves[keys] = jnp.asarray(_stacked(config, sources[keys], shape, read)).block_until_ready()
    params = {"params": unflatten_dict(leaves)}
    check_params(config, params)
    return params


def _stacked(config: Config, source: Source, shape: tuple[int, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter of that shape: the source's tensors in our axes, one a layer, cast to the parameter dtype."""
    stacked = np.empty(shape, jnp.dtype(config.param_dtype))
    layers = stacked if source.per_layer else stacked[None]
    for layer, name in zip(layers, source.names(config), strict=True):
        layer[...] = source.to_ours(config, read(name))
    return stacked


def _counted(read: Callable, total: int, progress: Callable[[int, int], None] | None) -> Callable:
    """`read`, reporting after each call how many there were."""
    if progress is None:
        return read
    done = 0

    def counted(name: str) -> np.ndarray:
        nonlocal done
        tensor, done = read(name), done + 1
        progress(done, total)
        return tensor

    return counted


class _Tensors:
    """The tensors of all shards by name; a tensor is read when it is asked for."""

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
        self.shard_of = {name: shard for shard in shards for name in held[shard]} | indexed

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self._handles[self.shard_of[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._handles[self.shard_of[name]].get_slice(name)


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
    indexed = _indexed(index)
    shards = sorted(set(indexed.values()))
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}. Copy them too.")
    return shards, indexed


def _indexed(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / shard for name, shard in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of safetensors ({error!r}); expected a JSON object with 'weight_map', tensor to "
            "file. Copy or download it again."
        ) from error


def _check_tensors(config: Config, tensors: _Tensors, sources: Iterable[Source]) -> None:
    """Every tensor is mapped or refused, and has its shape and a dtype of floats, before anything is read."""
    expected = {name: source.shape(config) for source in sources for name in source.names(config)}
    found = {name for name in tensors.shard_of if not name.endswith(IGNORED_SUFFIXES)}
    if config.tie_embeddings and TOP["unembed"].name in found:
        _check_tied(tensors)
        found.remove(TOP["unembed"].name)
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
        where = f"{tensors.shard_of[name]}: tensor {name} has"
        if tensors.shape(name) != shape:
            raise ValueError(
                f"{where} shape {tensors.shape(name)}; config.json calls for {shape}. They belong to different models."
            )
        if tensors.dtype(name) not in FLOATS:
            raise ValueError(
                f"{where} dtype {tensors.dtype(name)}; expected one of {', '.join(FLOATS)}. Save the model unquantised."
            )


def _check_tied(tensors: _Tensors) -> None:
    """Some checkpoints of tied models carry the unembedding as well; it must be the embedding."""
    embed, unembed = TOP["embed"].name, TOP["unembed"].name
    if embed in tensors.shard_of and not np.array_equal(tensors.read(embed), tensors.read(unembed)):
        raise ValueError(
            f"{tensors.shard_of[unembed]}: config.json says tie_word_embeddings, but {unembed} differs from {embed}. "
            "Set tie_word_embeddings to false if the unembedding was trained."
        )


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
