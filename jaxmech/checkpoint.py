"""Orbax checkpoints of a model: parameters, config and tokenizer in one directory. The only import of Orbax."""

import shutil
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint import v1 as ocp

from jaxmech.config import Config
from jaxmech.model import abstract_params, check_params

FORMAT = 1
TOKENIZER = "tokenizer"  # folder inside the checkpoint


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


def save(path: Path, config: Config, params: Any, tokenizer: Any = None, *, overwrite: bool = False) -> None:
    """Writes `params` ({"params": tree}) with `config` and, if given, a Hugging Face tokenizer to `path`.

    Everything is written to a folder beside `path` that is renamed at the end, so that an interrupted save leaves no
    half checkpoint.

    Raises:
      ValueError: `path` exists and is not to be overwritten (see `check_output`), or `params` are not the config's.
    """
    path = Path(path).absolute()
    check_output(path, overwrite=overwrite)
    check_params(config, params)
    metadata: dict[str, Any] = {"jaxmech": {"format": FORMAT, "config": config.to_dict()}}
    unfinished = path.with_name(f"{path.name}.unfinished")
    context = ocp.Context()
    # Weights hardly compress; to try takes most of the time and holds a second copy of the model in memory.
    context.array.saving.use_compression = False
    with context:
        ocp.save(str(unfinished), params, custom_metadata=metadata, overwrite=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished / TOKENIZER)
    if path.exists():
        shutil.rmtree(path)
    unfinished.rename(path)


def read_config(path: Path) -> Config:
    """The config inside the checkpoint at `path`.

    Raises:
      ValueError: the checkpoint was not written by `save`.
    """
    metadata = cast(dict[str, Any], ocp.metadata(str(Path(path).absolute())).custom_metadata or {})
    saved = metadata.get("jaxmech", {})
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{path} is an Orbax checkpoint without a jaxmech config of format {FORMAT}; convert the Hugging Face "
            "model again with `python -m convert`."
        )
    try:
        return Config.from_dict(saved["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_params(path: Path, config: Config) -> Any:
    """The parameters at `path`, {"params": tree}, cast to `config.param_dtype` while they are read.

    Raises:
      ValueError: the parameters are not those that `config` calls for, or the checkpoint is damaged.
    """
    source = str(Path(path).absolute())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        abstract_params(config),
    )
    try:
        check_params(config, ocp.metadata(source).metadata, dtypes=False)
        return ocp.load(source, placed)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is damaged; convert the Hugging Face model again with `python -m convert`. ({str(error)[:300]})"
        ) from error
