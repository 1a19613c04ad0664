"""Runs the stages of a study and keeps their results in a folder, so that a run that was cut off goes on from there.

The folder holds config.json (settings, the models' and the data's fingerprints, versions), parts/STAGE.MODEL.json,
written whole as soon as a part is done, results.json, which puts them together, circuits in the paper's format, and
timings.json. The report beside them is the commands' business.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmech.files import write_text
from jaxmech.run_folder import RunFolder, file_hash, fingerprint
from jaxmech.study.settings import Settings
from jaxmech.study.stages import STAGES, Study

Progress = Callable[[str, str, int, int], None]  # stage, part, done and in all; called when a part starts and ends, too


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    Attributes:
      path: the folder.
      parts: {stage: {part: result}} of what is done.
    """

    path: Path
    parts: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: str | Path, settings: Settings, *, overwrite: bool = False) -> "StudyFolder":
        """Starts a study, or takes up the one in `path` if it has the same settings.

        Raises:
          ValueError: the folder holds another study and `overwrite` is False.
        """
        sources = {"model_files": {name: fingerprint(folder) for name, folder in settings.paths.items()}}
        if settings.data is not None:
            sources["examples"] = {settings.data.name: file_hash(settings.data)}
        RunFolder.open(path, settings.to_dict() | sources, overwrite=overwrite)
        folder = cls(Path(path), {})
        for stage in STAGES:
            for part in settings.names:
                file = folder._file(stage, part)
                if file.exists() and overwrite:
                    file.unlink()
                elif file.exists():
                    folder.parts.setdefault(stage, {})[part] = json.loads(file.read_text(encoding="utf-8"))
        return folder

    def keep(self, stage: str, part: str, result: Any, seconds: float) -> None:
        """Saves a finished part, and the seconds it took."""
        timings = self.timings
        timings.setdefault(stage, {})[part] = round(seconds, 3)
        write_text(self.path / "timings.json", json.dumps(timings, indent=1) + "\n")
        write_text(self._file(stage, part), json.dumps(result) + "\n")
        # As it will be read back, so that a study that is resumed and one that is not see the same.
        self.parts.setdefault(stage, {})[part] = json.loads(json.dumps(result))

    def forget(self, stage: str) -> None:
        """Removes the results of a stage."""
        for part in self.parts.pop(stage, {}):
            self._file(stage, part).unlink(missing_ok=True)

    @property
    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds of every finished part, with loading and compilation."""
        file = self.path / "timings.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the study was begun with."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))["versions"]

    def write_results(self, study: Study) -> dict[str, Any]:
        """Writes results.json and the circuits, and returns the results."""
        settings = study.settings
        results: dict[str, Any] = {
            "models": settings.names,
            "prompts": len(study.data.pairs),
            "example": study.data.example,
            "chain": [vars(stage) | {"k": settings.k.get(stage.group, stage.k)} for stage in settings.chain],
        }
        for name, stage in STAGES.items():
            if name in self.parts:
                ordered = {part: self.parts[name][part] for part in settings.names if part in self.parts[name]}
                results[name] = stage.assembled(ordered)
        write_text(self.path / "results.json", json.dumps(results, indent=1) + "\n")
        for name in self.parts.get("minimality", {}):
            study.circuit(name).save(self.path / "circuits" / f"{name}.json")
        return results

    def _file(self, stage: str, part: str) -> Path:
        return self.path / "parts" / f"{stage}.{part}.json"


def run(
    settings: Settings,
    folder: StudyFolder,
    *,
    only: tuple[str, ...] = (),
    start: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs what is not done yet, and returns the results of all stages that are.

    Args:
      only: run these stages alone; what they need must be done.
      start: run this stage and all behind it anew.
      progress: called with (stage, part, done, in all).

    Raises:
      ValueError: an unknown stage, or one whose needs are not met.
    """
    _check_stages([*only, *([start] if start else [])])
    chosen = [name for name in STAGES if not only or name in only]
    for name in list(STAGES)[list(STAGES).index(start) :] if start else chosen if only else ():
        folder.forget(name)
    study = Study(settings, folder.parts)
    for name in chosen:
        stage = STAGES[name]
        if missing := [need for need in stage.needs if not _complete(folder.parts, need, settings)]:
            raise ValueError(
                f"Stage {name!r} needs {', '.join(missing)}, which is not done in {folder.path}; run that first."
            )
        for part in stage.parts(settings):
            if part in folder.parts.get(name, {}):
                continue

            def report(done: int, total: int, name: str = name, part: str = part) -> None:
                if progress:
                    progress(name, part, done, total)

            report(0, 1)
            started = time.perf_counter()
            result = stage.run(study, part, report)
            folder.keep(name, part, result, time.perf_counter() - started)
            report(1, 1)
    return folder.write_results(study)


def _complete(parts: Mapping[str, Mapping[str, Any]], stage: str, settings: Settings) -> bool:
    return all(part in parts.get(stage, {}) for part in STAGES[stage].parts(settings))


def _check_stages(names: list[str]) -> None:
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"Unknown stages {', '.join(unknown)}; the stages are {', '.join(STAGES)}.")
