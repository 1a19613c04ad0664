"""Runs the stages of a study and keeps their results in a folder, so that a run that was cut off goes on from there.

The folder holds config.json (settings, the models' and the data's fingerprints, versions), parts/STAGE.MODEL.json,
written whole as soon as a part is done, results.json, which puts them together, circuits in the paper's format, and
timings.json; of a part that is not done, what `jaxmech.study.unfinished` keeps. The report beside them is the commands'
business.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmech.chain import check_number_of_heads, with_k
from jaxmech.files import check_folder, write_text
from jaxmech.run_folder import RunFolder, file_hash, fingerprint, read_json
from jaxmech.study.data import kind_of_data
from jaxmech.study.models import check_models
from jaxmech.study.settings import AT_A_TIME, Settings
from jaxmech.study.stages import STAGES
from jaxmech.study.study import Study
from jaxmech.study.unfinished import FOLDER, Unfinished

_REMEDY = "Delete it, and the same command computes this part again, or start anew with --overwrite."
Progress = Callable[[str, str, int, int], None]  # stage, part, done and in all; called when a part starts and ends, too


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study. Nothing in it changes before the first result is kept.

    Attributes:
      path: the folder.
      parts: {stage: {part: result}} of what is done.
      run_folder: its config.json.
    """

    path: Path
    parts: dict[str, dict[str, Any]]
    run_folder: RunFolder

    @classmethod
    def open(
        cls, path: str | Path, settings: Settings, *, report: Iterable[Path] = (), overwrite: bool = False
    ) -> "StudyFolder":
        """Starts a study, or takes up the one in `path` if it has the same settings. Writes nothing yet.

        How much is computed or held at a time (`settings.AT_A_TIME`) may be another when a study is taken up. Models
        and data are the same if their files are, however their paths are spelt.

        Args:
          settings: the study.
          report: files of a report that is there, which `overwrite` removes with the results.
          overwrite: start anew whatever the folder holds.

        Raises:
          NotADirectoryError, PermissionError: see `RunFolder.open`.
          OSError, ValueError: the models are not there, or not such that a study of them can end (see `check_models`).
          ValueError: the folder holds another study and `overwrite` is False, or a damaged file.
        """
        check_folder(path)
        check_models(
            settings.base,
            settings.tuned,
            kind_of_data(settings).sample(settings),
            dtype=settings.dtype,
            param_dtype=settings.dtype,
            precision=settings.precision,
        )
        values = settings.to_dict()
        given = {name: values.pop(name) for name in ("base", "tuned", "data", "pairs", "desiderata", *AT_A_TIME)}
        file = settings.data or settings.pairs
        sources = {
            "command": "study",
            "models": settings.names,  # the base first
            "model_files": {name: fingerprint(folder) for name, folder in settings.paths.items()},
            "examples": None if file is None else file_hash(file),
            "counterfactuals": {path.stem: file_hash(path) for path in settings.desiderata},
        }
        outputs = [*_outputs(Path(path)), *report]
        run_folder = RunFolder.open(path, values | sources, given=given, outputs=outputs, overwrite=overwrite)
        folder = cls(Path(path), {}, run_folder)
        for stage in STAGES if run_folder.begun else ():
            for part in settings.names:
                if (file := folder._file(stage, part)).exists():
                    folder.parts.setdefault(stage, {})[part] = read_json(file, _REMEDY)
        return folder

    def keep(self, stage: str, part: str, result: Any, seconds: float) -> None:
        """Saves a finished part, and the seconds it took."""
        self.run_folder.begin()
        timings = self.timings
        timings.setdefault(stage, {})[part] = round(seconds, 3)
        write_text(self.path / "timings.json", json.dumps(timings, indent=1) + "\n")
        write_text(self._file(stage, part), json.dumps(result) + "\n")
        # As it will be read back, so that a study that is resumed and one that is not see the same.
        self.parts.setdefault(stage, {})[part] = json.loads(json.dumps(result))
        self.unfinished.forget(stage, part)

    def forget(self, stage: str, parts: Sequence[str]) -> None:
        """Removes the results of a stage, finished or not."""
        self.parts.pop(stage, None)
        for part in parts if self.run_folder.begun else ():
            self._file(stage, part).unlink(missing_ok=True)
            self.unfinished.forget(stage, part)

    @property
    def unfinished(self) -> Unfinished:
        """Pieces of parts that are not done."""
        return Unfinished(self.run_folder)

    @property
    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds of every finished part, with loading and compilation; of one that was cut off, since it went on."""
        file = self.path / "timings.json"
        return read_json(file, "Delete it; nothing else depends on it.") if file.exists() else {}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the study was begun with."""
        return self.run_folder.config["versions"]

    def write_results(self, study: Study) -> dict[str, Any]:
        """Writes results.json and the circuits, and returns the results."""
        settings = study.settings
        results: dict[str, Any] = {
            "models": settings.names,
            "prompts": len(study.data.pairs),
            "example": study.data.example,
            "chance": study.data.chance,
            "metric": settings.metric,
            "measure": settings.measure,
            "ablate_elsewhere": settings.ablate_elsewhere,
            "left_out": [name for name, stage in STAGES.items() if not stage.fits(settings)],
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
      only: run these stages alone, and anew if they are done; what they need must be done.
      start: run this stage and all behind it anew; with `only`, those of them.
      progress: called with (stage, part, done, in all).

    Raises:
      ValueError: an unknown stage, one whose needs are not met, or prompts or a model with which a stage cannot run;
        nothing has been computed or removed then.
    """
    _check_stages([*only, *([start] if start else [])], settings)
    chosen = [name for name, stage in STAGES.items() if stage.fits(settings) and (not only or name in only)]
    _check_needs(chosen, folder, settings)
    study = Study(settings, folder.parts, folder.unfinished)
    _check_prompts(study, chosen)
    whole = [name for name in chosen if only and _complete(folder.parts, name, settings)]
    anew = list(STAGES)[list(STAGES).index(start) :] if start else whole
    kept = {name: () if name in anew else folder.parts.get(name, ()) for name in chosen}
    if parts := [part for name in chosen for part in STAGES[name].parts(settings) if part not in kept[name]]:
        study.model(parts[0])  # if it cannot be read, nothing is removed
    for name in chosen:
        if name in anew:
            folder.forget(name, STAGES[name].parts(settings))
    for name in chosen:
        stage = STAGES[name]
        for part in study.loaded_first(stage.parts(settings)):
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


def _check_needs(chosen: Sequence[str], folder: StudyFolder, settings: Settings) -> None:
    for name in chosen:
        needs = [need for need in STAGES[name].needs if need not in chosen]
        if missing := [need for need in needs if not _complete(folder.parts, need, settings)]:
            raise ValueError(
                f"Stage {name!r} needs {', '.join(missing)}, which is not done in {folder.path}; run that first."
            )


def _check_prompts(study: Study, stages: Sequence[str]) -> None:
    """ValueError unless the prompts and the base model are such that the stages can run."""
    settings = study.settings
    check_number_of_heads(with_k(settings.chain, settings.k), study.base.config)
    study.data.check(study.base.config, {STAGES[name].uses for name in stages})


def _complete(parts: Mapping[str, Mapping[str, Any]], stage: str, settings: Settings) -> bool:
    return all(part in parts.get(stage, {}) for part in STAGES[stage].parts(settings))


def _check_stages(names: list[str], settings: Settings) -> None:
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"Unknown stages {', '.join(unknown)}; the stages are {', '.join(STAGES)}.")
    if without := [name for name in names if not STAGES[name].fits(settings)]:
        raise ValueError(f"Stages {', '.join(without)} use desiderata, and none are given with {settings.pairs}.")


def _outputs(path: Path) -> list[Path]:
    """All files in the folder `path` that a study wrote there, but for config.json."""
    parts = [file for stage in STAGES for file in sorted((path / "parts").glob(f"{stage}.*.json"))]
    circuits = [file.name.removeprefix("minimality.") for file in parts if file.name.startswith("minimality.")]
    parts += [file for stage in STAGES for file in sorted((path / FOLDER).glob(f"{stage}.*"))]
    names = [*[f"circuits/{name}" for name in circuits], "timings.json", "results.json"]
    return parts + [path / name for name in names]
