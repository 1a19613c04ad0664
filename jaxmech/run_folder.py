"""The folder of one discovery run: its settings and what it found, written stage by stage, so that it can resume.

Holds config.json (settings, the model's and the data's fingerprints, versions), scores.npz (every finished sweep) and
circuit.json (the paper's format). Figures beside them are the commands' business.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.files import replacing, write_text
from jaxmech.scores import PathScores

_PACKAGES = ("jaxmech", "jax", "flax", "transformers", "numpy")


@dataclass
class RunFolder:
    """An open run folder.

    Attributes:
      path: the folder.
      scores: {group: scores} of the sweeps that are finished.
    """

    path: Path
    scores: dict[str, PathScores] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> "RunFolder":
        """Starts a run, or takes up the one in `path` if it has the same settings.

        Args:
          settings: everything that the results depend on, as JSON values; versions of packages are added.
          overwrite: start anew whatever the folder holds.

        Raises:
          ValueError: the folder holds a run with other settings and `overwrite` is False.
        """
        folder = cls(Path(path))
        config = json.loads(json.dumps({**settings, "versions": {name: version(name) for name in _PACKAGES}}))
        file = folder.path / "config.json"
        if file.exists() and not overwrite:
            folder._check_same(json.loads(file.read_text(encoding="utf-8")), config)
            folder.scores = _load_scores(folder.path / "scores.npz")
            return folder
        (folder.path / "scores.npz").unlink(missing_ok=True)
        write_text(file, json.dumps(config, indent=2) + "\n")
        return folder

    def keep(self, group: str, scores: PathScores) -> None:
        """Saves a finished sweep."""
        self.scores[group] = scores
        arrays: dict[str, Any] = {name: found.per_example for name, found in self.scores.items()}
        arrays |= {f"{name}.probability": found.probability for name, found in self.scores.items()}
        with replacing(self.path / "scores.npz") as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, **arrays)

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed)} differ). Choose another --out, or "
                "start anew with --overwrite."
            )


def fingerprint(path: str | Path) -> str:
    """Changes when a file of the checkpoint folder `path` does: a hash of names, sizes and times, not of contents."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
        status = file.stat()
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """A hash of the contents of a file."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def text_hash(lines: Iterable[str]) -> str:
    """A hash of lines of text."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _load_scores(file: Path) -> dict[str, PathScores]:
    """All stages of the npz: GROUP (per example, [L, N, B]) and GROUP.probability ([B])."""
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        groups = [name for name in arrays.files if not name.endswith(".probability")]
        return {group: PathScores(arrays[group], arrays[f"{group}.probability"]) for group in groups}
