"""Orbax checkpoints of a model: parameters, config and tokenizer in one directory. The only import of Orbax."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxmech.config import Config
from jaxmech.model import Llama

FORMAT = 1
TOKENIZER = "tokenizer"  # folder inside the checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is an Orbax checkpoint directory."""
    # ocp.is_orbax_checkpoint would not do: Orbax takes a folder of safetensors for a checkpoint, too.
    return (Path(path) / "_CHECKPOINT_METADATA").is_file()


def save(path: Path, config: Config, params: Any, tokenizer: Any = None, *, overwrite: bool = False) -> None:
    """Writes `params` ({"params": tree}) with `config` and, if given, a Hugging Face tokenizer to `path`.

    Orbax writes to a temporary folder and renames it, so that an interrupted save leaves no half checkpoint.

    Raises:
      ValueError: `path` exists and `overwrite` is False.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another output directory or ask to overwrite it.")
    metadata = {"jaxmech": {"format": FORMAT, "config": config.to_dict()}}
    ocp.save(path, params, custom_metadata=metadata, overwrite=overwrite)
    if tokenizer is not None:
        shutil.rmtree(path / TOKENIZER, ignore_errors=True)
        tokenizer.save_pretrained(path / TOKENIZER)


def read_config(path: Path) -> Config:
    """The config inside the checkpoint at `path`.

    Raises:
      ValueError: the checkpoint was not written by `save`.
    """
    metadata = ocp.metadata(Path(path).absolute()).custom_metadata or {}
    saved = metadata.get("jaxmech", {})  # pyright: ignore[reportAttributeAccessIssue]
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{path} is an Orbax checkpoint without a jaxmech config of format {FORMAT}; convert the Hugging Face "
            "model again with `python -m convert`."
        )
    return Config.from_dict(saved["config"])


def read_params(path: Path, config: Config) -> Any:
    """The parameters at `path`, {"params": tree}, cast to `config.param_dtype` while they are read."""
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return ocp.load(Path(path).absolute(), placed)
