"""The folder of one run: its settings and what it found, written stage by stage, so that it can resume.

Holds config.json (settings, the model's and the data's fingerprints, versions) and, of a discovery run, scores.npz
(every finished sweep) and circuit.json. Nothing in the folder changes before the first result is kept. Figures beside
them are the commands' business.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import convert
from jaxmech.files import check_folder, write_text
from jaxmech.provenance import versions
from jaxmech.scores import PathScores, load_groups, save_groups

CONFIG, SCORES, CIRCUIT = "config.json", "scores.npz", "circuit.json"
_PACKAGES = ("jaxmech", "jax", "flax", "transformers", "numpy")
_ANEW = "Choose another --out, or start anew with --overwrite."


@dataclass
class RunFolder:
    """An open run folder.

    Attributes:
      path: the folder.
      config: what its config.json holds, or will hold once a result is kept.
      scores: {group: scores} of the sweeps that are finished.
      replaced: files of an earlier run, which are removed when the first result of this one is kept.
      begun: whether config.json is that of this run.
    """

    path: Path
    config: dict[str, Any]
    scores: dict[str, PathScores] = field(default_factory=dict)
    replaced: tuple[Path, ...] = ()
    begun: bool = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        given: Mapping[str, Any] | None = None,
        outputs: Iterable[Path] = (),
        overwrite: bool = False,
    ) -> "RunFolder":
        """Starts a run, or takes up the one in `path` if it has the same settings. Writes nothing yet.

        Args:
          settings: everything that the results depend on, as JSON values, "command" among them; versions of packages
            are added.
          given: kept in config.json as well, but free to differ when the run is taken up: where things lie that
            `settings` has hashes of, and how many are computed at a time.
          outputs: files that such runs write, beside config.json; with `overwrite`, they are removed when the first
            result is kept.
          overwrite: start anew whatever the folder holds.

        Raises:
          NotADirectoryError, PermissionError: `path` is no folder, or may not be written to.
          ValueError: `overwrite` is False, and the folder holds a run with other settings, outputs without settings, or
            a damaged file; or config.json is that of another command or program.
        """
        path, given = Path(path), dict(given or {})
        check_folder(path)
        there = tuple(file for file in dict.fromkeys(outputs) if file.is_file())
        config = json.loads(json.dumps({**given, **settings, "versions": versions(_PACKAGES)}))
        _check_whose(path, config.get("command"))
        if overwrite:
            return cls(path, config, replaced=there)
        if (path / CONFIG).exists():
            _check_same(path, config, given)
            return cls(path, config, scores_so_far(path / SCORES), begun=True)
        if there:
            found = ", ".join(str(file.relative_to(path)) for file in there[:3]) + ", ..." * (len(there) > 3)
            raise ValueError(f"{path} holds results ({found}) without the {CONFIG} that says what they are of. {_ANEW}")
        return cls(path, config)

    def begin(self) -> None:
        """Writes config.json if it is not that of this run, and removes what this run replaces."""
        if self.begun:
            return
        for file in self.replaced:
            file.unlink(missing_ok=True)
        write_text(self.path / CONFIG, json.dumps(self.config, indent=2) + "\n")
        self.begun = True

    def keep(self, group: str, scores: PathScores) -> None:
        """Saves a finished sweep."""
        self.begin()
        self.scores[group] = scores
        save_groups(self.path / SCORES, self.scores)


def read_scores(path: str | Path) -> dict[str, PathScores]:
    """The scores of the sweeps that a discovery run has finished: {group: scores}, in the order of the chain.

    To look at what a command found, or to hand it to `discover` as `done`.

    Args:
      path: the folder that the run was told to write to, or its scores.npz.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, or not that of a run.
    """
    path = Path(path)
    return load_groups(path / SCORES if path.is_dir() else path)


def earlier_config(path: str | Path) -> dict[str, Any]:
    """What config.json in `path` holds; empty if there is none that can be read."""
    try:
        found = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json(file: Path, remedy: str) -> Any:
    """What a file of a run holds. ValueError names the file and says the remedy if it is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error}). {remedy}") from error


def fingerprint(path: str | Path) -> str:
    """Changes when a file of a checkpoint or adapter does: a hash of names, sizes and times, not of contents.

    Args:
      path: its folder, or a name on the Hub. What else lies there does not count.
    """
    path, digest = convert.local_path(path), hashlib.blake2b(digest_size=8)
    for file in convert.checkpoint_files(path):
        status = file.stat()
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """A hash of the contents of a file."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def text_hash(lines: Iterable[str]) -> str:
    """A hash of lines of text."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _check_same(path: Path, now: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ValueError if config.json says of a key that is not `given` something else than `now`."""
    before = read_json(path / CONFIG, _ANEW)
    if not isinstance(before, dict):
        raise ValueError(f"{path / CONFIG} is damaged: it holds {before!r}, not the settings of a run. {_ANEW}")
    keys = (before.keys() | now.keys()) - given.keys() - {"command"}
    if changed := sorted(key for key in keys if before.get(key) != now.get(key)):
        raise ValueError(f"{path} holds a run with other settings ({', '.join(changed)} differ). {_ANEW}")


def _check_whose(path: Path, command: str | None) -> None:
    """ValueError if config.json is something else's, such as a model's or another command's, and must not be replaced.

    That of another command would stand beside its results, with or without --overwrite.
    """
    if not (found := earlier_config(path)):
        return
    if "jaxmech" not in (found.get("versions") or {}):
        raise ValueError(f"{path / CONFIG} is not that of a run, so it is not overwritten; choose another --out.")
    if (other := found.get("command", command)) != command:
        raise ValueError(f"{path} is the folder of `jaxmech {other}`; choose another --out.")


def scores_so_far(file: Path) -> dict[str, PathScores]:
    """The sweeps that an unfinished run has kept in `file`, none if there is no such file; ValueError if damaged."""
    if not file.exists():
        return {}
    try:
        return load_groups(file)
    except ValueError as error:
        raise ValueError(
            f"{error} Delete it, and the same command finds the scores again, or start anew with --overwrite."
        ) from error
