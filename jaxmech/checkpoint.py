"""Orbax checkpoints of a model: parameters, config, provenance and tokenizer in one directory.

The only import of Orbax, and of TensorStore, by which Orbax stores arrays. Orbax writes, TensorStore reads: one
parameter after the other, into memory that JAX takes over, where Orbax would hold several of them twice. The parameters
of blocks are stored in one chunk a layer, so that `read_layers` reads no more than it is asked for.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.tree_util import keystr
from orbax.checkpoint import v1 as ocp

from jaxmech import host_arrays
from jaxmech.config import Config
from jaxmech.model import abstract_params, check_params, parameter_shapes
from jaxmech.provenance import Provenance

FORMAT = 2
PARAMS, TOKENIZER = "state", "tokenizer"  # folders inside the checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is an Orbax checkpoint directory."""
    # ocp.is_orbax_checkpoint would not do: Orbax takes a folder of safetensors for a checkpoint, too.
    return (Path(path) / "_CHECKPOINT_METADATA").is_file()


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to write a checkpoint over something else.

    Raises:
      ValueError: `path` exists and `overwrite` is False, or it is not a checkpoint.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another output directory or ask to overwrite it.")
    if path.exists() and not is_checkpoint(path):
        raise ValueError(
            f"{path} exists and is not a checkpoint, so it is not overwritten; choose another output directory."
        )


def save(
    path: Path,
    config: Config,
    params: Any,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    provenance: Provenance | None = None,
) -> None:
    """Writes `params` ({"params": tree}) with `config` and, if given, a Hugging Face tokenizer to `path`.

    Everything is written to a folder beside `path` that is renamed at the end, so that an interrupted save leaves no
    half checkpoint. Beside `params`, the host holds about twice as much as the largest of them.

    Args:
      path: the folder to make.
      config: that of the model.
      params: they may lie on several devices; what is written can be read onto any others.
      tokenizer: a Hugging Face tokenizer, or None.
      overwrite: replace a checkpoint that is at `path`.
      provenance: source and files; versions and date are added here.

    Raises:
      ValueError: `path` exists and is not to be overwritten (see `check_output`), or `params` are not the config's.
    """
    path = Path(path).absolute()
    check_output(path, overwrite=overwrite)
    check_params(config, params)
    signed = (provenance or Provenance()).signed().to_dict()
    metadata: dict[str, Any] = {"jaxmech": {"format": FORMAT, "config": config.to_dict(), "provenance": signed}}
    unfinished = path.with_name(f"{path.name}.unfinished")
    context = ocp.Context()
    # Weights hardly compress; to try takes most of the time and holds a second copy of the model in memory.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _one_chunk_a_layer
    # Its chunks are copies: without a limit they are a second model, too. It must exceed the largest parameter.
    context.memory.write_concurrent_bytes = 1 + max(x.nbytes for x in jax.tree.leaves(params))
    with context:
        ocp.save(str(unfinished), params, checkpointable_name=PARAMS, custom_metadata=metadata, overwrite=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished / TOKENIZER)
    if path.exists():
        shutil.rmtree(path)
    unfinished.rename(path)


def read_config(path: Path) -> Config:
    """The config inside the checkpoint at `path`.

    Raises:
      ValueError: the checkpoint was not written by `save`, or by that of another version.
    """
    try:
        return Config.from_dict(_saved(path)["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_provenance(path: Path) -> Provenance:
    """Where the parameters at `path` come from. Raises as `read_config` does."""
    return Provenance(**_saved(path)["provenance"])


def read_params(path: Path, config: Config, shardings: Any = None) -> Any:
    """The parameters at `path`, {"params": tree}, cast to `config.param_dtype` while they are read.

    Args:
      shardings: where they go, see `jaxmech.sharding.parameter_shardings`; without, to the default device. Where they
        lay when they were saved does not matter.

    Raises:
      ValueError: the parameters are not those that `config` calls for, the checkpoint is damaged, or numbers are too
        large for float16.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves({"params": shardings})
    dtype = jnp.dtype(config.param_dtype)
    try:
        check_params(config, _stored(path), dtypes=False)
        arrays = _open(path, [keystr(keys, simple=True, separator=".") for keys, _ in leaves])
        read = [_placed(array, dtype, place) for array, place in zip(arrays, places, strict=True)]
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    if config.param_dtype == "float16" and not all(jnp.isfinite(x).all() for x in read):
        raise ValueError(f"{path} holds numbers that are too large for float16; choose float32 or bfloat16.")
    return jax.tree.unflatten(tree, read)


def read_layers(path: Path, layers: Sequence[int], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The parameters of some layers alone: only their data is read, and nothing goes to a device.

    Args:
      path: a checkpoint that `save` or `python -m convert` wrote.
      layers: l of them, in any order.
      names: parameters of blocks, such as "q" or "attn_norm" (see `jaxmech.model.parameter_shapes`); all by default.

    Returns:
      {name: array [l, ...]} in the dtype in which they are stored.

    Raises:
      ValueError: an unknown layer or name, or the checkpoint is damaged.
    """
    config = read_config(path)
    blocks, rows = parameter_shapes(config)["blocks"], [int(layer) for layer in layers]
    names = list(blocks) if names is None else list(names)
    if unknown := [layer for layer in rows if not 0 <= layer < config.num_layers]:
        raise ValueError(f"{path} has no layer {unknown[0]}; expected layers in 0..{config.num_layers - 1}.")
    if unknown := [name for name in names if name not in blocks]:
        raise ValueError(f"Blocks of {path} have no parameter {unknown[0]!r}; they have {', '.join(blocks)}.")
    try:
        arrays = _open(path, [f"params.blocks.{name}" for name in names])
        found = [array[np.array(rows, np.int64)].read() for array in arrays]  # at once, in TensorStore's threads
        return {name: future.result() for name, future in zip(names, found, strict=True)}
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error


def check(path: Path, *, finite: bool = False, progress: Callable[[int, int], None] | None = None) -> None:
    """Checks that the parameters at `path` are those that its config calls for, without loading the model.

    Args:
      finite: also read every number and check that it is finite, a layer at a time.
      progress: called with (parameters read, parameters in all) after each.

    Raises:
      ValueError: a parameter is missing, unknown, of another shape or dtype or, if `finite`, damaged or not finite.
    """
    config = read_config(path)
    try:
        check_params(config, _stored(path))
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    names = [keystr(keys, simple=True, separator=".") for keys, _ in leaves]
    for done, name in enumerate(names if finite else [], start=1):
        _check_finite(path, name)
        if progress:
            progress(done, len(names))


def _check_finite(path: Path, name: str) -> None:
    """Raises ValueError unless every number of the parameter is there and finite."""
    try:
        (array,) = _open(path, [f"params.{name}"])
        parts = [array[layer] for layer in range(array.shape[0])] if name.startswith("blocks.") else [array]
        finite = all(np.isfinite(part.read().result()).all() for part in parts)
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    if not finite:
        raise ValueError(
            f"{path}: parameter {name} holds numbers that are not finite (NaN or infinity). The checkpoint is damaged, "
            "or training diverged; convert the Hugging Face model again with `python -m convert`."
        )


def _saved(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the parameters."""
    metadata = cast(dict[str, Any], ocp.metadata(str(Path(path).absolute())).custom_metadata or {})
    saved = metadata.get("jaxmech")
    if saved is None:
        raise ValueError(
            f"{path} is an Orbax checkpoint without a jaxmech config; convert the Hugging Face model with `python -m "
            "convert`."
        )
    if saved["format"] != FORMAT:
        raise ValueError(
            f"{path} is a jaxmech checkpoint of format {saved['format']}; this version reads format {FORMAT}. Convert "
            "the Hugging Face model again with `python -m convert`, or use the jaxmech that wrote it."
        )
    return saved


def _stored(path: Path) -> Any:
    """Shapes and dtypes of the parameters, as {"params": tree}."""
    return ocp.metadata(str(Path(path).absolute()), PARAMS).metadata


def _one_chunk_a_layer(key: Any, value: Any) -> Any:
    """How Orbax splits a parameter into chunks, which are read as a whole: along L, if it has that axis."""
    layers = any(part.key == "blocks" for part in key)
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if layers else None


def _open(path: Path, names: Sequence[str]) -> list[ts.TensorStore]:
    """The stored arrays of these names; nothing is read yet."""
    context = ts.Context()  # opens the database once for all of them
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{Path(path).absolute() / PARAMS}/"}}
    opened = [
        ts.open({"driver": "zarr3", "kvstore": database | {"path": f"{name}/"}}, read=True, open=True, context=context)
        for name in names
    ]
    return [array.result() for array in opened]


def _placed(array: ts.TensorStore, dtype: np.dtype, sharding: Any) -> jax.Array:
    """The stored array on its devices; waits, so that only one is on the host."""
    host = host_arrays.empty(array.shape, dtype)
    ts.array(host, copy=False).write(ts.cast(array, dtype)).result()
    return jax.device_put(host, sharding).block_until_ready()


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged; convert the Hugging Face model again with `python -m convert`. ({str(error)[:300]})"
    )
