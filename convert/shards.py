"""In which file of a checkpoint directory each tensor lies, where an index may spread them over several. Reads none."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path


def find_shards(path: Path, single: str, index: str) -> tuple[list[Path], dict[str, Path]]:
    """The files of the directory `path` that hold tensors, and the file of each that the index names.

    Args:
      single: name of the file of a checkpoint in one piece; transformers, too, prefers it to an index.
      index: name of the index of one in several; used if `single` is not there.

    Raises:
      FileNotFoundError: a file that the index names is not there.
      ValueError: the index is damaged.
    """
    if (path / single).is_file():
        return [path / single], {}
    indexed = read_index(path / index)
    shards = sorted(set(indexed.values()))
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{path / index} names shards that are not there: {', '.join(missing)}. Copy them too.")
    return shards, indexed


def read_index(index: Path) -> dict[str, Path]:
    """The file of each tensor that an index of shards names. ValueError if it is not an index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / shard for name, shard in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of shards ({error!r}); expected a JSON object with 'weight_map', tensor to "
            "file. Copy or download it again."
        ) from error


def shard_of_tensors(index: Path, indexed: Mapping[str, Path], held: Mapping[Path, Collection[str]]) -> dict[str, Path]:
    """The file of every tensor. ValueError if one is not in the file that the index names.

    Args:
      indexed: what the index says.
      held: the tensors that each file holds.
    """
    for name, shard in indexed.items():
        if name not in held[shard]:
            raise ValueError(
                f"{index} says that tensor {name} is in {shard.name}, but it is not. The files belong to different "
                "versions; copy or download them again."
            )
    return {name: shard for shard, names in held.items() for name in names} | dict(indexed)
