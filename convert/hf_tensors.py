"""Safetensors files of a Hugging Face checkpoint to the Flax parameter tree, one stacked tensor at a time."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.families import IGNORED_SUFFIXES, TOP, Source, sources
from jaxmech.config import Config
from jaxmech.model import Llama, parameter_shapes


def read_params(path: Path, config: Config, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The parameters of the checkpoint directory `path`, {"params": tree}, in `config.param_dtype`.

    Files are memory-mapped and read tensor by tensor: beside the parameters themselves, the host holds one stacked
    tensor at a time.

    Args:
      progress: called with (parameters read, parameters in all) after each.

    Raises:
      FileNotFoundError: no safetensors, or a shard named in the index is missing.
      ValueError: a file is truncated; a tensor is missing, left over or of a wrong shape; the tree is not the model's.
    """
    path = Path(path)
    shapes = parameter_shapes(config)
    wanted = dict(sources(shapes))
    with ExitStack() as stack:
        tensors = _Tensors(path, stack)
        _check_names(config, tensors, wanted.values())
        tree: dict[str, Any] = {"blocks": {}} if "blocks" in shapes else {}
        for done, (keys, source) in enumerate(wanted.items()):
            parent = tree["blocks"] if keys[0] == "blocks" else tree
            parent[keys[-1]] = jnp.asarray(_stacked(config, tensors, source))
            if progress:
                progress(done + 1, len(wanted))
    params = {"params": tree}
    check_tree(config, params)
    return params


def check_tree(config: Config, params: Any) -> None:
    """Compares `params` with what `Llama(config).init` would make; Linen itself ignores unknown parameters.

    Raises:
      ValueError: the first parameter that is missing, unknown or of another shape or dtype.
    """
    model = Llama(config)
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    expected, found = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (init, params))
    for key in expected.keys() | found.keys():
        name = jax.tree_util.keystr(key)
        if key not in found or key not in expected:
            raise ValueError(f"Parameter {name} is {'missing' if key in expected else 'unknown to the model'}.")
        want, have = (f"{x.dtype}{list(x.shape)}" for x in (expected[key], found[key]))
        if want != have:
            raise ValueError(f"Parameter {name} is {have}; the model expects {want}.")


class _Tensors:
    """The tensors of all shards by name, opened lazily."""

    def __init__(self, path: Path, stack: ExitStack):
        self.path = path
        self.shard_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        for shard in _shards(path):
            try:
                handle = stack.enter_context(safe_open(shard, framework="np"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{shard} is not a whole safetensors file ({error}); copy or download it again."
                ) from error
            self._handles[shard] = handle
            self.shard_of |= dict.fromkeys(handle.keys(), shard)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[self.shard_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._handles[self.shard_of[name]].get_tensor(name)


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}. Copy them too.")
        return shards
    if (single := path / "model.safetensors").is_file():
        return [single]
    found = ", ".join(sorted(p.name for p in path.iterdir()))
    raise FileNotFoundError(
        f"{path} holds neither model.safetensors nor model.safetensors.index.json (found: {found}). Save the model "
        "with save_pretrained, which writes safetensors."
    )


def _names(config: Config, source: Source) -> list[str]:
    layers = range(config.num_layers) if "{layer}" in source.name else range(1)
    return [source.name.format(layer=layer) for layer in layers]


def _check_names(config: Config, tensors: _Tensors, wanted: Iterable[Source]) -> None:
    """Every tensor is mapped or refused, and has its shape, before anything is read."""
    expected = {name: source.shape(config) for source in wanted for name in _names(config, source)}
    found = {name for name in tensors.shard_of if not name.endswith(IGNORED_SUFFIXES)}
    if config.tie_embeddings and TOP["unembed"].name in found:
        _check_tied(tensors)
        found.remove(TOP["unembed"].name)
    if missing := sorted(expected.keys() - found):
        raise ValueError(
            f"{tensors.path} lacks {len(missing)} tensors that its config.json calls for: {_list(missing)}"
        )
    if extra := sorted(found - expected.keys()):
        raise ValueError(
            f"{tensors.path} has {len(extra)} tensors that its config.json does not call for: {_list(extra)}. "
            "They would be ignored silently, so they are refused."
        )
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise ValueError(
                f"{tensors.shard_of[name]}: tensor {name} has shape {tensors.shape(name)}; config.json calls for {shape}."
            )


def _check_tied(tensors: _Tensors) -> None:
    """Some checkpoints of tied models carry the unembedding as well; it must be the embedding."""
    embed, unembed = TOP["embed"].name, TOP["unembed"].name
    if not np.array_equal(tensors.read(embed), tensors.read(unembed)):
        raise ValueError(
            f"{tensors.shard_of[unembed]}: config.json says tie_word_embeddings, but {unembed} differs from {embed}. "
            "Set tie_word_embeddings to false if the unembedding was trained."
        )


def _stacked(config: Config, tensors: _Tensors, source: Source) -> np.ndarray:
    """The source's tensors in our axes, stacked over layers, cast to the parameter dtype."""
    names = _names(config, source)
    dtype = jnp.dtype(config.param_dtype)
    if "{layer}" not in source.name:
        return np.ascontiguousarray(source.to_ours(config, tensors.read(names[0]))).astype(dtype)
    first = source.to_ours(config, tensors.read(names[0]))
    stacked = np.empty((len(names), *first.shape), dtype)
    for layer, name in enumerate(names):
        stacked[layer] = first if layer == 0 else source.to_ours(config, tensors.read(name))
    return stacked


def _list(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
