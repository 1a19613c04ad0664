"""The command line: `jaxmech demo`, `study`, `discover`, `prompts`, `data` and `verify`.

Only commands print and show progress.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jaxmech as jm
from jaxmech.chain import PAPER_CHAIN, Stage, check_number_of_heads, read_chain, with_k
from jaxmech.cli_options import Command, Data, Demo, Discover, LookAtPrompts, PromptOptions, StudyCommand, Verify
from jaxmech.cli_prompts import Prompts, oddities, prompts_of
from jaxmech.discovery import discover, moved_heads
from jaxmech.files import check_file, check_folder, write_text
from jaxmech.provenance import versions
from jaxmech.report import (
    CHANGED,
    accuracy_table,
    circuit_table,
    deviation_tables,
    doubts,
    heat_map,
    prompts_table,
    report_files,
    save_figure,
    study_tables,
    write_report,
)
from jaxmech.run_folder import CIRCUIT, SCORES, RunFolder, earlier_config, fingerprint
from jaxmech.scores import PathScores
from jaxmech.study import STAGES, Settings, StudyFolder, doubt, run
from jaxmech.study.chains import check_chain_on
from jaxmech.study.models import Known, known
from jaxmech.verify import verify

console = Console()
# Settings of a study that are no options of the command: those of the paper, or what a chain's author decides.
NO_OPTIONS = ("dcm_batch", "variants", "components", "edges")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 1 if `verify` finds a deviation, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        console.print(f"jaxmech {versions(['jaxmech'])['jaxmech']}", highlight=False)
        return
    description = f"{jm.__doc__}\n\n`jaxmech --version` says which version this is."
    options = tyro.cli(Command, prog="jaxmech", description=description, args=arguments)  # pyright: ignore
    try:
        _COMMANDS[type(options)](options)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished stages are kept; the same command goes on from there.")
        sys.exit(130)


def run_data(options: Data) -> None:
    """`jaxmech data`."""
    check_file(options.out)
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} exists already; choose another --out, or replace it with --overwrite.")
    examples = jm.boxes.make(options.scenes, options.boxes, options.seed)
    jm.boxes.write(options.out, examples)
    console.print(f"Wrote {len(examples)} examples to {options.out}; the first: {examples[0].sentence}")


def run_verify(options: Verify) -> None:
    """`jaxmech verify`."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    path, out = values.pop("model"), values.pop("out")
    if out is not None:
        check_file(out)
    report = verify(path, **values)
    for check in report.checks:
        line = f"{check.name}: {'' if check.ok else 'NO, '}{check.detail}"
        console.print(line, style=None if check.ok else "red", markup=False, highlight=False, soft_wrap=True)
    for table in deviation_tables(report):
        console.print(table)
    for note in report.notes:
        _note(note)
    if out is not None:
        write_text(out, json.dumps(_settings(options) | report.to_dict(), indent=2) + "\n")
    console.print(report.verdict, style="bold" if report.ok else "bold red", highlight=False, soft_wrap=True)
    if not report.ok:
        sys.exit(1)


def run_demo(options: Demo) -> None:
    """`jaxmech demo`: the study of the shipped pair, by a chain that fits it, smaller than the paper's."""
    settings = Settings(
        base=jm.demo.path("base"),
        tuned=(jm.demo.path("tuned"),),
        chain=read_chain(jm.demo.path("chain.toml")),
        train=320,
        validation=160,
        test=160,
        repeats=4,
        patched=120,
        seed=options.seed,
    )
    out = options.out or Path("out/demo-quick" if options.quick else "out/demo")
    _study_into(out, settings.quick() if options.quick else settings, overwrite=options.overwrite)
    console.print(f"What the heads of these models do: {jm.demo.path('MODEL_CARD.md')}")


def run_study(options: StudyCommand) -> None:
    """`jaxmech study`."""
    names = [f.name for f in fields(Settings) if f.name not in NO_OPTIONS]
    values: dict[str, Any] = {name: getattr(options, name) for name in names}
    values["chain"] = _chain(options.chain)
    _check_copies(options.copies)
    settings = Settings(**values)
    settings = settings.quick() if options.quick else settings
    _study_into(options.out, settings, only=options.only, start=options.start, overwrite=options.overwrite)


def _study_into(
    out: Path, settings: Settings, *, only: Sequence[str] = (), start: str | None = None, overwrite: bool = False
) -> None:
    """Runs a study in its folder, writes the report and prints the most important numbers."""
    began = time.perf_counter()
    folder = StudyFolder.open(out, settings, report=_earlier_report(out), overwrite=overwrite)
    done = [f"{STAGES[stage].title} ({', '.join(parts)})" for stage, parts in folder.parts.items()]
    if done:
        console.print(f"Going on with the study in {out}; done already: {'; '.join(done)}.", highlight=False)
    with _study_progress() as progress, _warnings_printed():
        results = run(settings, folder, only=tuple(only), start=start, progress=progress)
    report = write_report(out, results, settings=settings.in_use(), versions=folder.versions, timings=folder.timings)
    for table in study_tables(results):
        console.print(table)
    for warning in doubts(results):
        _note(warning)
    console.print(
        f"The study took {time.perf_counter() - began:.0f} s. Numbers: {out / 'results.json'}. Figures and text:"
    )
    console.print(str(report), style="bold", soft_wrap=True)


@contextmanager
def _study_progress():
    """A progress bar for each part of each stage; yields the callback that `run` takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[tuple[str, str], Any] = {}

        def advance(stage: str, part: str, done: int, total: int) -> None:
            if (stage, part) not in tasks:
                tasks[stage, part] = bars.add_task(f"{STAGES[stage].title}, {part}", total=total)
            bars.update(tasks[stage, part], completed=done, total=total)

        yield advance


def run_discover(options: Discover) -> None:
    """`jaxmech discover`."""
    chain = _chain(options.chain)
    prompts = prompts_of(options)
    check_chain_on(prompts.roles, chain, options.k, options.min_effect, options.metric)
    if options.metric == "logit_difference" and not prompts.wrong_answers:
        raise ValueError('--metric logit_difference is of pairs with wrong answers: --pairs, with "wrong_answer".')
    check_folder(options.out)
    found = _known(options)
    check_number_of_heads(with_k(chain, options.k), found.config)
    found.check_weights()
    with _warnings_printed():
        pairs = prompts.pairs(found.tokenizer)
    run = _run_folder(options, chain, prompts)
    model, name = _load(options, found), _name(options)
    if run.scores:
        console.print(f"Going on with the run in {run.path}; finished stages: {', '.join(run.scores)}.")
    correct = jm.predict(model, pairs, keep_logits=False).correct
    console.print(accuracy_table({name: correct.mean()}, len(pairs)))
    if options.correct_only:
        pairs = _right(pairs, correct, name)
    elif warning := doubt(name, correct.mean(), prompts.chance):
        _note(warning)
    values = {field: getattr(options, field) for field in ("k", "min_effect", "metric", "batch_size")}
    _discover_into(run, model, pairs, chain, **values)


def run_prompts(options: LookAtPrompts) -> None:
    """`jaxmech prompts`."""
    if options.show < 0:
        raise ValueError(f"--show {options.show}; expected a number of examples.")
    prompts, found = prompts_of(options, corrupt=False), _known(options)
    found.check_weights()
    with _warnings_printed():
        pairs = prompts.pairs(found.tokenizer)
    for row in range(min(options.show, len(pairs))):
        console.print(pairs.show(found.tokenizer, row), markup=False, highlight=False, soft_wrap=True)
        console.print()
    model, sides = _load(options, found), {"clean": pairs}
    if pairs.corrupt is not None:
        sides["corrupt"] = replace(pairs, clean=pairs.corrupt, positions=pairs.corrupt_positions)
    metrics = ["probability"] + ["logit_difference"] * (pairs.wrong_labels is not None)
    how = {"batch_size": options.batch_size, "keep_logits": False}
    answers = {side: {m: jm.predict(model, some, metric=m, **how) for m in metrics} for side, some in sides.items()}
    console.print(prompts_table(pairs, answers))
    clean = answers["clean"]["probability"]
    for oddity in oddities(pairs):
        _note(oddity)
    if "corrupt" in answers and answers["corrupt"]["probability"].mean >= clean.mean:
        _note("The answers are no less probable behind the corrupt prompts, so that patching from them loses nothing.")
    if warning := doubt(_name(options), float(clean.accuracy), prompts.chance):
        _note(warning)


def _known(options: PromptOptions) -> Known:
    """What the options name, before weights are read. ValueError for numbers that are none."""
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}; expected at least 1.")
    _check_copies(options.copies)
    return known(options.model, options.adapter, {"precision": options.precision})


def _load(options: PromptOptions, found: Known) -> jm.Model:
    mesh = None if options.copies is None else jm.make_mesh(rows=options.copies)
    how = {"precision": options.precision, "mesh": mesh, "tokenizer": found.tokenizer}
    return jm.load(options.model, options.dtype, options.adapter, **how)


def _name(options: PromptOptions) -> str:
    return (options.adapter or options.model).resolve().name


def _right(pairs: jm.Pairs, correct: np.ndarray, name: str) -> jm.Pairs:
    """The pairs that the model answers right; ValueError if there are none."""
    if not correct.any():
        raise ValueError(
            f"--correct-only: {name} answers none of the {len(pairs)} prompts right. Are these its prompts, its "
            "tokenizer, and its BOS token (add_bos)?"
        )
    console.print(f"Scores are of the {correct.sum()} prompts that it answers right (--correct-only).")
    return pairs[correct]


def _run_folder(options: Discover, chain: Sequence[Stage], prompts: Prompts) -> RunFolder:
    """The folder at --out. Models and data are the same if their files are, however their paths are spelt, and how many
    examples are computed at a time, and where, makes no difference."""
    settings = _settings(options)
    names = ("model", "adapter", "data", "pairs", "chain", "batch_size", "copies")
    given = {name: settings.pop(name) for name in names}
    settings |= {"command": "discover", "stages": [asdict(stage) for stage in chain]}
    sources = {
        "model_files": fingerprint(options.model),
        "adapter_files": options.adapter and fingerprint(options.adapter),
        "examples": prompts.fingerprint,
    }
    earlier = earlier_config(options.out).get("stages") or []
    groups = [stage.group for stage in chain] + [
        str(stage.get("group")) for stage in earlier if isinstance(stage, dict)
    ]
    files = [SCORES, CIRCUIT, *[f"{group}.png" for group in groups if Path(group).name == group]]
    outputs = [options.out / name for name in files]
    return RunFolder.open(options.out, settings | sources, given=given, outputs=outputs, overwrite=options.overwrite)


def _discover_into(run: RunFolder, model: jm.Model, pairs: jm.Pairs, chain: Sequence[Stage], **options: Any) -> None:
    """Runs the chain, writes everything to the run's folder stage by stage, and prints the table of heads."""

    def keep(stage: Stage, scores: PathScores) -> None:
        run.keep(stage.group, scores)

    with _progress(chain) as progress, _warnings_printed():
        circuit = discover(model, pairs, chain=chain, done=run.scores, on_stage=keep, progress=progress, **options)
    circuit.save(run.path / CIRCUIT)
    moved = moved_heads(circuit, with_k(chain, options["k"]), options["min_effect"])
    for stage in chain:
        if stage.group in circuit.scores:
            mean, chosen = circuit.scores[stage.group].mean, circuit.groups.get(stage.group, [])
            reads = "direct effect on the logits" if stage.receivers is None else stage.reads
            changed = CHANGED[options["metric"]]
            look: dict[str, Any] = {"label": changed.label, "unit": changed.unit}
            look |= {"moved": [one["head"] for one in moved.get(stage.group, [])]}
            figure = heat_map(mean, chosen, stage.group, f"sender at {stage.sender}, {reads}", **look)
            save_figure(figure, run.path / f"{stage.group}.png")
    console.print(circuit_table(chain, circuit, moved))
    console.print(f"Results are in {run.path}: circuit.json, scores.npz, config.json and a heat map (PNG) per stage.")


def _chain(file: Path | None) -> tuple[Stage, ...]:
    """The chain of --chain."""
    if file is None:
        return PAPER_CHAIN
    if not file.is_file():
        raise FileNotFoundError(f"--chain {file}: there is no such file; expected TOML, one [[stage]] table per stage.")
    return read_chain(file)


def _check_copies(copies: int | None) -> None:
    """ValueError if --copies is given and does not divide the number of devices."""
    count = jax.device_count()
    if copies is not None and (copies < 1 or count % copies):
        there = "is 1 device" if count == 1 else f"are {count} devices"
        raise ValueError(f"--copies {copies}: there {there} here; expected a divisor of that number.")


def _earlier_report(out: Path) -> list[Path]:
    """The files of the report that an earlier study left in --out."""
    try:
        return report_files(out, json.loads((out / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or one that cannot be read
        return [out / "report.html"]


def _settings(options: Any) -> dict[str, Any]:
    """What a run's results depend on, as JSON values: the options but for those that only say where and whether."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return {name: value for name, value in values.items() if name not in ("out", "overwrite")}


@contextmanager
def _progress(chain: Sequence[Stage]):
    """A progress bar for each stage of the chain; yields the callback that `discover` takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks = {stage.group: bars.add_task(stage.group, total=None, start=False) for stage in chain}

        def advance(stage: Stage, done: int, total: int) -> None:
            bars.start_task(tasks[stage.group])
            bars.update(tasks[stage.group], completed=done, total=total)

        yield advance


def _note(message: Warning | str) -> None:
    console.print(f"note: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _warnings_printed() -> Iterator[None]:
    """Prints the warnings of the library as notes, as they come."""

    def note(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, UserWarning):
            _note(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note
        yield


_COMMANDS: dict[type, Any] = {
    Demo: run_demo,
    StudyCommand: run_study,
    Discover: run_discover,
    LookAtPrompts: run_prompts,
    Data: run_data,
    Verify: run_verify,
}

if __name__ == "__main__":
    main()
