"""The command line: `jaxmech demo`, `study`, `discover`, `data` and `verify`. Only commands print and show progress."""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jaxmech as jm
from jaxmech.discovery import PAPER_CHAIN, Stage, discover, read_chain
from jaxmech.files import write_text
from jaxmech.report import (
    accuracy_table,
    circuit_table,
    deviation_tables,
    heat_map,
    save_figure,
    study_tables,
    write_report,
)
from jaxmech.run_folder import RunFolder, fingerprint, text_hash
from jaxmech.scores import PathScores
from jaxmech.study import STAGES, Settings, StudyFolder, run
from jaxmech.verify import verify

console = Console()


@dataclass(frozen=True)
class Demo:
    """The whole study on the pair of small models that ship with jaxmech, in a few minutes, with a report."""

    out: Path = Path("out/demo")
    """Folder for results."""
    quick: bool = False
    """Fewer prompts and steps: half a minute, rough numbers."""
    seed: int = 0
    """Seed of all draws."""
    overwrite: bool = False
    """Start anew whatever --out holds; without it, an interrupted demo goes on."""


@dataclass(frozen=True)
class StudyCommand:
    """The whole study of a base model and its fine-tuned descendants, with a report; can be interrupted and resumed."""

    base: Path
    """Checkpoint of the base model: a Hugging Face directory, or an Orbax directory written by `python -m convert`."""
    tuned: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Checkpoint of a fine-tuned descendant, or a LoRA adapter of --base; give it once for each."""
    out: Path
    """Folder for results.json, report.html and figures."""
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Run this stage alone; give it once for each."""
    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Run this stage and all behind it anew."""
    quick: bool = False
    """Far fewer prompts and steps, to see that everything runs; rough numbers."""
    data: Path | None = None
    """JSONL file of examples (key "sentence"); without it, scenes are made."""
    scenes: int = 50
    """Scenes of the prompts that are evaluated; every box of a scene is queried in turn."""
    boxes: int = 7
    """Boxes in a scene, 2 to 10."""
    contexts: int = 500
    """Prompts over which ablated activations are averaged."""
    chain: Path | None = None
    """TOML file of stages of discovery; without it, the paper's four."""
    k: dict[str, int] = field(default_factory=dict)
    """Heads to select per group, in place of the chain's numbers: --k value_fetcher 20 pos_transmitter 5."""
    random_circuits: int = 10
    """Random circuits to compare a circuit's faithfulness with."""
    random_subsets: int = 20
    """Random sets of heads for completeness."""
    threshold: float = 0.01
    """Least minimality score of a head that stays in the circuit."""
    train: int = 1000
    """Pairs to train masks (DCM) on; --validation and --test to choose and to test them."""
    validation: int = 500
    """Pairs to choose masks by."""
    test: int = 500
    """Pairs to test masks on."""
    lam: float = 0.01
    """Weight of the number of heads in the loss of DCM, logits per head."""
    repeats: int = 10
    """Repeats of activation patching, with new pairs each."""
    patched: int = 500
    """Pairs of one repeat."""
    seed: int = 0
    """Seed of all draws."""
    add_bos: bool | None = None
    """Prepend the tokenizer's BOS token; without it, the tokenizer decides."""
    dtype: str = "float32"
    """dtype of parameters and activations: float32, bfloat16 or float16."""
    precision: str = "highest"
    """How float32 products are computed: highest, default, BF16_BF16_F32_X3, ... (docs/precision.md)."""
    batch_size: int | None = None
    """Examples per call; without it, as many as fit the memory budget."""
    copies: int | None = None
    """Use all devices, with so many copies of the model, each split over its part of them; without it, one device."""
    models_in_memory: int = 2
    """Models that are held at a time; others are loaded again when they are needed."""
    compat: Literal["paper"] | None = None
    """"paper": reproduce the deviations of the published code (docs/paper_compat.md)."""
    overwrite: bool = False
    """Start anew whatever --out holds; without it, an interrupted study with the same settings goes on."""


@dataclass(frozen=True)
class Discover:
    """Find the entity-tracking circuit of a model by the chain of path-patching sweeps."""

    model: Path
    """Checkpoint: a Hugging Face directory, or an Orbax directory written by `python -m convert`."""
    out: Path
    """Folder for config.json, scores.npz, circuit.json and one heat map per stage."""
    adapter: Path | None = None
    """LoRA adapter of --model to merge in; --model then is a Hugging Face directory."""
    data: Path | None = None
    """JSONL file of examples (key "sentence"); without it, scenes are made."""
    scenes: int = 50
    """Scenes to make; every box of a scene is queried in turn."""
    boxes: int = 7
    """Boxes in a scene, 2 to 10."""
    seed: int = 0
    """Seed of scenes and corrupt prompts."""
    chain: Path | None = None
    """TOML file of stages; without it, the paper's four."""
    k: dict[str, int] = field(default_factory=dict)
    """Heads to select per group, in place of the chain's numbers: --k value_fetcher 20 pos_transmitter 5."""
    min_effect: float = 1e-3
    """Smallest relative loss of probability for which a head is selected."""
    add_bos: bool | None = None
    """Prepend the tokenizer's BOS token; without it, the tokenizer decides."""
    dtype: str = "float32"
    """dtype of parameters and activations: float32, bfloat16 or float16."""
    precision: str = "highest"
    """How float32 products are computed: highest, default, BF16_BF16_F32_X3, ... (docs/precision.md)."""
    batch_size: int | None = None
    """Examples per call; without it, as many as fit the memory budget."""
    copies: int | None = None
    """Use all devices, with so many copies of the model, each split over its part of them; without it, one device."""
    overwrite: bool = False
    """Start anew whatever --out holds; without it, an interrupted run with the same settings goes on."""


@dataclass(frozen=True)
class Data:
    """Write scenes with boxes as JSONL, key "sentence"."""

    out: Path
    """File to write."""
    scenes: int = 50
    """Scenes; every box of a scene is queried in turn."""
    boxes: int = 7
    """Boxes in a scene, 2 to 10."""
    seed: int = 0
    """Seed of the scenes."""


@dataclass(frozen=True)
class Verify:
    """Compare a model with transformers' own, site by site and layer by layer. Exit status 1 if one deviates."""

    model: Path
    """Checkpoint: a Hugging Face directory, or an Orbax directory written by `python -m convert`."""
    against: Path | None = None
    """Hugging Face directory of the same model; without it, --model itself if that is one."""
    adapter: Path | None = None
    """LoRA adapter of --model to merge in; --against then is the merged model."""
    prompts: int = 2
    """Prompts of random tokens."""
    length: int = 64
    """Tokens of each."""
    seed: int = 0
    """Seed of the tokens."""
    text: str | None = None
    """Prompt to take instead of random tokens."""
    out: Path | None = None
    """JSON file for all numbers."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[StudyCommand, tyro.conf.subcommand("study")]
    | Annotated[Discover, tyro.conf.subcommand("discover")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 1 if `verify` finds a deviation, 2 for bad input, 130 when interrupted."""
    options = tyro.cli(Command, prog="jaxmech", description=jm.__doc__, args=arguments)  # pyright: ignore
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
    examples = jm.boxes.make(options.scenes, options.boxes, options.seed)
    jm.boxes.write(options.out, examples)
    console.print(f"Wrote {len(examples)} examples to {options.out}; the first: {examples[0].sentence}")


def run_verify(options: Verify) -> None:
    """`jaxmech verify`."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    path, out = values.pop("model"), values.pop("out")
    report = verify(path, **values)
    for check in report.checks:
        line = f"{check.name}: {'' if check.ok else 'NO, '}{check.detail}"
        console.print(line, style=None if check.ok else "red", markup=False, highlight=False, soft_wrap=True)
    for table in deviation_tables(report):
        console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
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
    _study_into(options.out, settings.quick() if options.quick else settings, overwrite=options.overwrite)
    console.print(f"What the heads of these models do: {jm.demo.path('MODEL_CARD.md')}")


def run_study(options: StudyCommand) -> None:
    """`jaxmech study`."""
    values: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(Settings) if hasattr(options, f.name)}
    values["chain"] = PAPER_CHAIN if options.chain is None else read_chain(options.chain)
    settings = Settings(**values)
    settings = settings.quick() if options.quick else settings
    _study_into(options.out, settings, only=options.only, start=options.start, overwrite=options.overwrite)


def _study_into(
    out: Path, settings: Settings, *, only: Sequence[str] = (), start: str | None = None, overwrite: bool = False
) -> None:
    """Runs a study in its folder, writes the report and prints the most important numbers."""
    began = time.perf_counter()
    folder = StudyFolder.open(out, settings, overwrite=overwrite)
    done = [f"{STAGES[stage].title} ({', '.join(parts)})" for stage, parts in folder.parts.items()]
    if done:
        console.print(f"Going on with the study in {out}; done already: {'; '.join(done)}.", highlight=False)
    with _study_progress() as progress, _warnings_printed():
        results = run(settings, folder, only=tuple(only), start=start, progress=progress)
    report = write_report(out, results, settings=settings.to_dict(), versions=folder.versions, timings=folder.timings)
    for table in study_tables(results):
        console.print(table)
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
    if options.data is None:
        examples = jm.boxes.make(options.scenes, options.boxes, options.seed)
    else:
        examples = jm.boxes.read(options.data)
    chain = PAPER_CHAIN if options.chain is None else read_chain(options.chain)
    mesh = None if options.copies is None else jm.make_mesh(rows=options.copies)
    model = jm.load(options.model, options.dtype, options.adapter, precision=options.precision, mesh=mesh)
    if model.tokenizer is None:
        raise ValueError(f"{options.model} holds no tokenizer; copy tokenizer.json or tokenizer.model there.")
    with _warnings_printed():
        pairs = jm.boxes.pairs(
            examples, model.tokenizer, seed=options.seed, split_objects="drop", add_bos=options.add_bos
        )
    sources = {
        "model_files": fingerprint(options.model),
        "adapter_files": None if options.adapter is None else fingerprint(options.adapter),
        "examples": text_hash(example.sentence for example in examples),
    }
    settings = _settings(options) | {"stages": [asdict(stage) for stage in chain]}
    run = RunFolder.open(options.out, settings | sources, overwrite=options.overwrite)
    if run.scores:
        console.print(f"Going on with the run in {run.path}; finished stages: {', '.join(run.scores)}.")
    _print_accuracies({(options.adapter or options.model).name: model}, pairs)
    _discover_into(run, model, pairs, chain, k=options.k, min_effect=options.min_effect, batch_size=options.batch_size)


def _discover_into(run: RunFolder, model: jm.Model, pairs: jm.Pairs, chain: Sequence[Stage], **options: Any) -> None:
    """Runs the chain, writes everything to the run's folder stage by stage, and prints the table of heads."""

    def keep(stage: Stage, scores: PathScores) -> None:
        run.keep(stage.group, scores)

    with _progress(chain) as progress, _warnings_printed():
        circuit = discover(model, pairs, chain=chain, done=run.scores, on_stage=keep, progress=progress, **options)
    circuit.save(run.path / "circuit.json")
    for stage in chain:
        if stage.group in circuit.scores:
            mean, chosen = circuit.scores[stage.group].mean, circuit.groups.get(stage.group, [])
            reads = "direct effect on the logits" if stage.receivers is None else f"{stage.via} of {stage.receivers}"
            figure = heat_map(mean, chosen, stage.group, f"sender at {stage.sender}, {reads}")
            save_figure(figure, run.path / f"{stage.group}.png")
    console.print(circuit_table(chain, circuit))
    console.print(f"Results are in {run.path}: circuit.json, scores.npz, config.json and a heat map (PNG) per stage.")


def _settings(options: Any) -> dict[str, Any]:
    """What a run's results depend on, as JSON values: the options but for those that only say where and whether."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return {name: value for name, value in values.items() if name not in ("out", "overwrite")}


def _print_accuracies(models: Mapping[str, jm.Model], pairs: jm.Pairs) -> None:
    accuracies = {name: jm.accuracy(model, pairs) for name, model in models.items()}
    console.print(accuracy_table(accuracies, len(pairs)))


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


@contextmanager
def _warnings_printed() -> Iterator[None]:
    """Prints the warnings of the library as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            console.print(f"note: {warning.message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


_COMMANDS: dict[type, Any] = {
    Demo: run_demo,
    StudyCommand: run_study,
    Discover: run_discover,
    Data: run_data,
    Verify: run_verify,
}

if __name__ == "__main__":
    main()
