"""Pieces of a part that is not done yet, so that a part that was cut off goes on with its next piece.

unfinished/discovery.MODEL.npz holds the sweeps that are done, unfinished/dcm.MODEL.json the masks of the roles. A file
is removed when its part is kept.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmech.files import write_text
from jaxmech.run_folder import read_json, scores_so_far
from jaxmech.scores import PathScores, save_groups

FOLDER = "unfinished"
_REMEDY = "Delete it, and the same command computes this again, or start anew with --overwrite."


@dataclass(frozen=True)
class Unfinished:
    """The pieces in the folder of a study.

    Attributes:
      path: the study's folder; None: nothing is kept.
      begin: called before anything is written.
    """

    path: Path | None = None
    begin: Callable[[], None] = lambda: None

    def sweeps(self, stage: str, part: str) -> dict[str, PathScores]:
        """The sweeps that are done, {group: scores}. ValueError if the file is damaged."""
        return {} if self.path is None else scores_so_far(self._file(self.path, stage, part, "npz"))

    def keep_sweeps(self, stage: str, part: str, scores: Mapping[str, PathScores]) -> None:
        """Saves the sweeps that are done."""
        if self.path is not None:
            self.begin()
            save_groups(self._file(self.path, stage, part, "npz"), scores)

    def piece(self, stage: str, part: str, name: str, compute: Callable[[], Any]) -> Any:
        """A piece of JSON that was kept, or else is computed and kept. ValueError if the file is damaged."""
        if self.path is None:
            return compute()
        file = self._file(self.path, stage, part, "json")
        done = read_json(file, _REMEDY) if file.exists() else {}
        if name not in done:
            done[name] = compute()
            self.begin()
            write_text(file, json.dumps(done) + "\n")
        return done[name]

    def forget(self, stage: str, part: str) -> None:
        """Removes the pieces of a part, and the folder if there are no others."""
        if self.path is not None:
            for suffix in ("npz", "json"):
                self._file(self.path, stage, part, suffix).unlink(missing_ok=True)
            with suppress(OSError):  # not there, or not empty
                (self.path / FOLDER).rmdir()

    @staticmethod
    def _file(path: Path, stage: str, part: str, suffix: str) -> Path:
        return path / FOLDER / f"{stage}.{part}.{suffix}"
