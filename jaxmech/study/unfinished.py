"""Pieces of a part that is not done yet, so that a part that was cut off goes on with its next piece.

unfinished/discovery.MODEL.npz holds the sweeps that are done, unfinished/dcm.MODEL.json the masks of the main
desiderata. A file is removed when its part is kept.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmech.files import write_text
from jaxmech.run_folder import RunFolder, read_json, scores_so_far
from jaxmech.scores import PathScores, save_groups

FOLDER = "unfinished"
_REMEDY = "Delete it, and the same command computes this again, or start anew with --overwrite."


@dataclass(frozen=True)
class Unfinished:
    """The pieces in the folder of a study; those of another study, which this one is to overwrite, are none.

    Attributes:
      run: the study's folder, which is begun before anything is written; None: nothing is kept.
    """

    run: RunFolder | None = None

    def sweeps(self, stage: str, part: str) -> dict[str, PathScores]:
        """The sweeps that are done, {group: scores}. ValueError if the file is damaged."""
        return scores_so_far(self._file(self.run, stage, part, "npz")) if self.run and self.run.begun else {}

    def keep_sweeps(self, stage: str, part: str, scores: Mapping[str, PathScores]) -> None:
        """Saves the sweeps that are done."""
        if self.run:
            self.run.begin()
            save_groups(self._file(self.run, stage, part, "npz"), scores)

    def piece(self, stage: str, part: str, name: str, compute: Callable[[], Any]) -> Any:
        """A piece of JSON that was kept, or else is computed and kept. ValueError if the file is damaged."""
        if self.run is None:
            return compute()
        file = self._file(self.run, stage, part, "json")
        done = read_json(file, _REMEDY) if self.run.begun and file.exists() else {}
        if name not in done:
            done[name] = compute()
            self.run.begin()
            write_text(file, json.dumps(done) + "\n")
        return done[name]

    def forget(self, stage: str, part: str) -> None:
        """Removes the pieces of a part, and the folder if there are no others."""
        if self.run and self.run.begun:
            for suffix in ("npz", "json"):
                self._file(self.run, stage, part, suffix).unlink(missing_ok=True)
            with suppress(OSError):  # not there, or not empty
                (self.run.path / FOLDER).rmdir()

    @staticmethod
    def _file(run: RunFolder, stage: str, part: str, suffix: str) -> Path:
        return run.path / FOLDER / f"{stage}.{part}.{suffix}"
