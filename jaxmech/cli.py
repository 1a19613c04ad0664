"""The command line: `jaxmech demo`, `jaxmech discover`, `jaxmech data`. Only commands print and show progress."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jaxmech as jm
from jaxmech.discovery import PAPER_CHAIN, Stage, discover, read_chain
from jaxmech.report import accuracy_table, circuit_table, heat_map, save_figure
from jaxmech.run_folder import RunFolder, fingerprint, text_hash
from jaxmech.scores import PathScores

console = Console()


@dataclass(frozen=True)
class Demo:
    """Find the circuit of the small model that ships with jaxmech, and compare it with its fine-tuned descendant."""

    out: Path = Path("out/demo")
    """Folder for results."""
    scenes: int = 50
    """Scenes; every box of a scene is queried in turn."""
    seed: int = 0
    """Seed of scenes and corrupt prompts."""


@dataclass(frozen=True)
class Discover:
    """Find the entity-tracking circuit of a model by the chain of path-patching sweeps."""

    model: Path
    """Checkpoint: a Hugging Face directory, or an Orbax directory written by `python -m convert`."""
    out: Path
    """Folder for config.json, scores.npz, circuit.json and one heat map per stage."""
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
    precision: str = "default"
    """Precision of matrix products: default, high or highest."""
    batch_size: int | None = None
    """Examples per call; without it, as many as fit the memory budget."""
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


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Discover, tyro.conf.subcommand("discover")]
    | Annotated[Data, tyro.conf.subcommand("data")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 2 for bad input, 130 when interrupted."""
    options = tyro.cli(Command, prog="jaxmech", description=jm.__doc__, args=arguments)  # pyright: ignore
    try:
        {Demo: run_demo, Discover: run_discover, Data: run_data}[type(options)](options)
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


def run_demo(options: Demo) -> None:
    """`jaxmech demo`: both shipped models' accuracies, and the base model's circuit by a chain that fits it."""
    started = time.perf_counter()
    examples = jm.boxes.make(options.scenes, seed=options.seed)
    models = {name: jm.load(jm.demo.path(name)) for name in ("base", "tuned")}
    pairs = jm.boxes.pairs(examples, models["base"].tokenizer, seed=options.seed)
    _print_accuracies(models, pairs)
    chain = read_chain(jm.demo.path("chain.toml"))
    run = RunFolder.open(options.out, _settings(options, chain), overwrite=True)  # it takes seconds
    _discover_into(run, models["base"], pairs, chain)
    console.print(
        f"The demo took {time.perf_counter() - started:.0f} s. What the heads do: {jm.demo.path('MODEL_CARD.md')}"
    )


def run_discover(options: Discover) -> None:
    """`jaxmech discover`."""
    if options.data is None:
        examples = jm.boxes.make(options.scenes, options.boxes, options.seed)
    else:
        examples = jm.boxes.read(options.data)
    chain = PAPER_CHAIN if options.chain is None else read_chain(options.chain)
    model = jm.load(options.model, options.dtype, precision=options.precision)
    if model.tokenizer is None:
        raise ValueError(f"{options.model} holds no tokenizer; copy tokenizer.json or tokenizer.model there.")
    with _warnings_printed():
        pairs = jm.boxes.pairs(
            examples, model.tokenizer, seed=options.seed, split_objects="drop", add_bos=options.add_bos
        )
    sources = {
        "model_files": fingerprint(options.model),
        "examples": text_hash(example.sentence for example in examples),
    }
    run = RunFolder.open(options.out, _settings(options, chain) | sources, overwrite=options.overwrite)
    if run.scores:
        console.print(f"Going on with the run in {run.path}; finished stages: {', '.join(run.scores)}.")
    _print_accuracies({options.model.name: model}, pairs)
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


def _settings(options: Any, chain: Sequence[Stage]) -> dict[str, Any]:
    """What a run's results depend on, as JSON values: the options but for those that only say where and whether."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return {k: v for k, v in values.items() if k not in ("out", "overwrite")} | {"stages": [asdict(s) for s in chain]}


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


if __name__ == "__main__":
    main()
