"""Meta's own release of a Llama: params.json and consolidated.00.pth, which may lie in several model-parallel parts.

Owns what params.json says and how the parts are put together; names and axes of the tensors are in `convert.families`.
Source: `ModelArgs` and `Transformer` of https://github.com/meta-llama/llama-models, and transformers'
`convert_llama_weights_to_hf.py`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.families import META
from convert.json_files import read_fields, refuse_unknown
from convert.torch_files import MappedFiles
from jaxmech.config import Config, Rope

PARAMS = "params.json"
PARTS = "consolidated.*.pth"
EMBED = META["embed"].name
READ = frozenset(
    """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta
    use_scaled_rope""".split()
)
IGNORED = frozenset(("max_batch_size", "max_seq_len"))  # sizes of Meta's cache
# Llama 3.2 1B and 3B by (dim, n_layers): their RoPE is scaled by 32, of which params.json says nothing.
SCALED_BY_32 = ((2048, 16), (3072, 28))


def find_parts(path: Path) -> list[Path]:
    """The files of the weights in the directory `path`, in order; none if it is not Meta's."""
    return sorted(path.glob(PARTS))


def read_config(path: Path) -> Config:
    """The `Config` that params.json in the directory `path` describes.

    Where vocab_size is -1, as in Llama 2, it is read off the embedding.

    Raises:
      ValueError: params.json is not JSON, lacks a field, or has one that is unknown or of a wrong type.
      FileNotFoundError: vocab_size is to be read off the embedding, and there are no weights.
    """
    file = path / PARAMS
    fields = read_fields(file)
    try:
        _check_fields(fields)
        fields = {name: value for name, value in fields.items() if value is not None}
        if fields.get("vocab_size", -1) == -1:
            fields["vocab_size"] = _vocab_size(path, fields["dim"])
        return _config(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_fields(fields: Mapping[str, Any]) -> None:
    refuse_unknown(fields, READ | IGNORED)
    for name in ("dim", "n_layers", "n_heads"):
        if fields.get(name) is None:
            raise ValueError(f"{name!r} is missing; copy the model's original {PARAMS}.")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"):
        value = fields.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r}; expected a positive integer.")
    if fields["dim"] % fields["n_heads"]:
        raise ValueError(f"dim={fields['dim']} is not a multiple of n_heads={fields['n_heads']}.")


def _config(fields: Mapping[str, Any]) -> Config:
    dim, heads = fields["dim"], fields["n_heads"]
    return Config(
        vocab_size=fields["vocab_size"],
        width=dim,
        num_layers=fields["n_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("n_kv_heads", heads),
        head_dim=dim // heads,
        mlp_width=_mlp_width(dim, fields.get("ffn_dim_multiplier", 1.0), fields.get("multiple_of", 256)),
        norm_eps=fields.get("norm_eps", 1e-5),
        max_positions=_max_positions(fields),
        rope=_rope(fields),
    )


def _mlp_width(dim: int, multiplier: float, multiple: int) -> int:
    """2/3 of 4 dim, times the multiplier, rounded up to a multiple (Meta's `FeedForward`)."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or multiplier <= 0:
        raise ValueError(f"ffn_dim_multiplier={multiplier!r}; expected a positive number.")
    width = int(multiplier * int(8 * dim / 3))
    return -(-width // multiple) * multiple


def _rope(fields: Mapping[str, Any]) -> Rope:
    """RoPE; where it is scaled, with the constants of Meta's `apply_scaling`, but for Llama 3.2 Hugging Face's factor.

    Files of Llama 1 and 2 have no rope_theta and mean 10000.
    """
    theta = fields.get("rope_theta", 10000.0)
    if not fields.get("use_scaled_rope", False):
        return Rope(theta=theta)
    factor = 32.0 if (fields["dim"], fields["n_layers"]) in SCALED_BY_32 else 8.0
    return Rope(theta, "llama3", factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)


def _max_positions(fields: Mapping[str, Any]) -> int:
    """Context length, which params.json does not say, by the RoPE of the releases; where in doubt, the shorter one.

    131072 of Llama 3.1 and later, 16384 of Code Llama (theta 1e6), 8192 of Llama 3 (theta 5e5), 2048 of Llama 1; of
    Llama 2 it is 4096, but its fields are the same. Nothing is computed from it: longer prompts are warned of, and an
    export states it.
    """
    if fields.get("use_scaled_rope", False):
        return 131072
    theta = fields.get("rope_theta", 10000.0)
    return 16384 if theta >= 1e6 else 8192 if theta > 1e4 else 2048


def _vocab_size(path: Path, dim: int) -> int:
    """Rows of the embedding. Llama 1 and 2 split its columns over the parts, later ones its rows."""
    parts = find_parts(path)
    if not parts:
        raise FileNotFoundError(
            f"{path / PARAMS} has no vocab_size, and {path} no {PARTS} to read it off. Copy the weights too."
        )
    entries = MappedFiles(parts[:1]).entries[parts[0]]
    if EMBED not in entries or len(entries[EMBED].shape) != 2:
        raise ValueError(f"{parts[0]} holds no matrix {EMBED} to read vocab_size off; copy or download it again.")
    rows, columns = entries[EMBED].shape
    return rows * len(parts) if columns == dim else rows


class MetaTensors:
    """The tensors of all parts, put together; a `convert.tensors.Tensors`, whose names and axes are `families.META`.

    Of model-parallel parts, each holds some rows or some columns of a matrix, and all of a norm.
    """

    def __init__(self, path: Path):
        self.path = path
        self._parts = find_parts(path)
        names = [part.name for part in self._parts]
        if missing := sorted({PARTS.replace("*", f"{i:02}") for i in range(len(names))} - set(names)):
            raise FileNotFoundError(f"{path} lacks {missing[0]} (found: {', '.join(names)}). Copy all parts.")
        self._files = MappedFiles(self._parts)
        self._shapes, self._axes = self._fit(read_config(path))

    @property
    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def file(self, name: str) -> Path:
        return self._parts[0] if len(self._parts) == 1 else self.path / PARTS

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._files.entries[self._parts[0]][name].dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        axis, shape = self._axes[name], self._shapes[name]
        if axis is None:
            return self._replicated(name)[rows or slice(None)]
        if axis == 1:
            return np.concatenate([self._files.read(part, name, rows) for part in self._parts], axis=1)
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        size = shape[0] // len(self._parts)
        held = [
            self._files.read(part, name, slice(max(start - first, 0), min(stop - first, size)))
            for part, first in zip(self._parts, range(0, shape[0], size), strict=True)
            if start < first + size and stop > first
        ]
        return held[0] if len(held) == 1 else np.concatenate(held)

    def _replicated(self, name: str) -> np.ndarray:
        """A tensor that all parts hold. ValueError if they differ."""
        first, *others = (self._files.read(part, name) for part in self._parts)
        if not all(np.array_equal(first, other) for other in others):
            raise ValueError(f"{self.file(name)}: tensor {name} differs between the parts. {_MIXED}")
        return first

    def _fit(self, config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, int | None]]:
        """The whole shape of each tensor, and the axis along which the parts lie; None: each part holds all of it."""
        wanted = {name: s.shape(config) for s in META.values() for name in s.names(config)}
        first, *others = (self._files.entries[part] for part in self._parts)
        for part, entries in zip(self._parts[1:], others, strict=True):
            for name in sorted(first.keys() | entries.keys()):
                if (have := entries.get(name)) != (want := first.get(name)):
                    raise ValueError(f"{part} has {have} as {name}, {self._parts[0].name} has {want}. {_MIXED}")
        axes = {name: _axis(entry.shape, wanted.get(name), len(self._parts)) for name, entry in first.items()}
        for name, axis in axes.items():
            if axis == -1:
                raise ValueError(
                    f"{self.file(name)}: tensor {name} has shape {first[name].shape} in each of {len(self._parts)} "
                    f"parts, of which no axis adds up to {wanted[name]}, as {PARAMS} calls for. {_MIXED}"
                )
        return {name: wanted.get(name, entry.shape) for name, entry in first.items()}, axes


_MIXED = "A part is missing, or they belong to different models; copy or download all of them again."


def _axis(part: tuple[int, ...], whole: tuple[int, ...] | None, count: int) -> int | None:
    """The axis along which `count` parts make up the whole; None: each is the whole; -1: they do not fit."""
    if whole is None or part == whole:
        return None
    for axis in range(min(len(part), 2)):
        if (*part[:axis], count * part[axis], *part[axis + 1 :]) == whole:
            return axis
    return -1
