"""Which files of a folder are a checkpoint's or an adapter's, for hashes that tell one model from another."""

from pathlib import Path

from convert import meta, safetensors_files, torch_files
from convert.adapters import config as adapter_config
from convert.adapters import files as adapter_files
from convert.hub import FILES, OLDER
from convert.shards import find_shards
from jaxmech import checkpoint

CONFIG = "config.json"


def source_files(path: Path, adapter: Path | None = None) -> dict[str, Path]:
    """The files that `read_config` and `read_params` read, by name; those of an adapter as "adapter/NAME".

    Raises:
      FileNotFoundError: a shard that an index names is not there.
      ValueError: an index is damaged.
    """
    path = Path(path)
    config = next((path / name for name in (CONFIG, meta.PARAMS) if (path / name).is_file()), None)
    found = {file.name: file for file in (config, *_weights(path)) if file is not None}
    if adapter is None:
        return found
    weights = [name for name in (adapter_files.SAFETENSORS, adapter_files.TORCH) if (adapter / name).is_file()]
    return found | {f"adapter/{name}": adapter / name for name in (adapter_config.FILE, *weights[:1])}


def checkpoint_files(path: Path) -> list[Path]:
    """The files in the folder `path` that are a checkpoint's or an adapter's, of any format, or their tokenizer's."""
    if checkpoint.is_checkpoint(path):
        found = [*path.glob("*"), *(path / checkpoint.PARAMS).rglob("*"), *(path / checkpoint.TOKENIZER).rglob("*")]
    else:
        found = [file for pattern in (*FILES, *OLDER[0], *OLDER[1]) for file in path.glob(pattern)]
    return sorted({file for file in found if file.is_file()})


def _weights(path: Path) -> list[Path]:
    """The files of tensors and, where it is used, their index, by the order of `convert.tensors.open_tensors`."""
    for files in (safetensors_files, torch_files):
        if (path / files.SINGLE).is_file() or (path / files.INDEX).is_file():
            shards, indexed = find_shards(path, files.SINGLE, files.INDEX)
            return [path / files.INDEX, *shards] if indexed else shards
    return meta.find_parts(path)
