"""The command line: `jaxmech demo`, `jaxmech discover`, `jaxmech data`. Printing and progress bars live here only."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import jaxmech as jm
from jaxmech.discovery import PAPER_CHAIN, Stage, discover, read_chain
from jaxmech.path_patching import PathScores
from jaxmech.report import heat_map, save_figure

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
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
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
    demo = Path(str(resources.files("jaxmech.demo")))
    examples = jm.boxes.make(options.scenes, seed=options.seed)
    models = {name: jm.load(demo / name) for name in ("base", "tuned")}
    pairs = jm.boxes.pairs(examples, models["base"].tokenizer, seed=options.seed)
    _print_accuracies(models, pairs)
    _discover_into(
        options.out,
        _jsonable(options),
        models["base"],
        pairs,
        read_chain(demo / "chain.toml"),
        {},
        1e-3,
        None,
    )
    console.print(
        f"The demo took {time.perf_counter() - started:.0f} s. What the heads do: jaxmech/demo/MODEL_CARD.md."
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
    _print_accuracies({options.model.name: model}, pairs)
    _discover_into(
        options.out,
        _jsonable(options),
        model,
        pairs,
        chain,
        options.k,
        options.min_effect,
        options.batch_size,
    )


def _discover_into(
    out: Path,
    config: dict[str, Any],
    model: jm.Model,
    pairs: jm.Pairs,
    chain: Sequence[Stage],
    k: dict[str, int],
    min_effect: float,
    batch_size: int | None,
) -> None:
    """Runs the chain, writes everything to `out` stage by stage, and prints the table of heads."""
    config = config | {"chain": [asdict(stage) for stage in chain], "versions": _versions()}
    done = _start_or_resume(out, config)
    scores = dict(done)

    def keep(stage: Stage, found: PathScores) -> None:
        scores[stage.group] = found
        _save_scores(out / "scores.npz", scores)

    with _progress(chain) as progress, _warnings_printed():
        circuit = discover(
            model,
            pairs,
            k,
            chain,
            min_effect,
            batch_size=batch_size,
            done=done,
            on_stage=keep,
            progress=progress,
        )
    circuit.save(out / "circuit.json")
    for stage in chain:
        if stage.group in circuit.scores:
            mean, chosen = circuit.scores[stage.group].mean, circuit.groups.get(stage.group, [])
            reads = "direct effect on the logits" if stage.receivers is None else f"{stage.via} of {stage.receivers}"
            figure = heat_map(mean, chosen, stage.group, f"sender at {stage.sender}, {reads}")
            save_figure(figure, out / f"{stage.group}.png")
    _print_circuit(chain, circuit)
    console.print(f"Results are in {out}: circuit.json, scores.npz, config.json and a heat map (PNG) per stage.")


def _start_or_resume(out: Path, config: dict[str, Any]) -> dict[str, PathScores]:
    """Writes config.json; if the same run stopped there before, returns the scores of its finished stages.

    Raises:
      ValueError: `out` holds the results of other settings, which are not overwritten.
    """
    file = out / "config.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = sorted(key for key in before.keys() | config.keys() if before.get(key) != config.get(key))
        if changed:
            raise ValueError(
                f"{out} holds the results of another run (different {', '.join(changed)}). Choose another --out or "
                "delete the folder."
            )
        done = _load_scores(out / "scores.npz")
        if done:
            console.print(f"Going on with the run in {out}; finished stages: {', '.join(done)}.")
        return done
    out.mkdir(parents=True, exist_ok=True)
    _replace(file, lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n"))
    return {}


def _save_scores(file: Path, scores: dict[str, PathScores]) -> None:
    """All stages in one npz: GROUP (per example, [L, N, B]) and GROUP.probability ([B])."""
    arrays: dict[str, Any] = {group: found.per_example for group, found in scores.items()}
    arrays |= {f"{group}.probability": found.probability for group, found in scores.items()}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.savez_compressed(stream, **arrays)

    _replace(file, write)


def _load_scores(file: Path) -> dict[str, PathScores]:
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        groups = [name for name in arrays.files if not name.endswith(".probability")]
        return {group: PathScores(arrays[group], arrays[f"{group}.probability"]) for group in groups}


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    os.replace(temporary, file)


def _print_accuracies(models: dict[str, jm.Model], pairs: jm.Pairs) -> None:
    table = Table(title=f"Accuracy on {len(pairs)} prompts")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    for name, model in models.items():
        table.add_row(name, f"{100 * jm.accuracy(model, pairs):.1f} %")
    console.print(table)


def _print_circuit(chain: Sequence[Stage], circuit: jm.Circuit, most: int = 8) -> None:
    table = Table(title="Circuit: heads by group, mean change of p(correct)")
    for column in ("group", "sender at", "receivers", "layer.head (change, %)"):
        table.add_column(column)
    for stage in chain:
        if stage.group not in circuit.scores:
            continue
        mean, heads = circuit.scores[stage.group].mean, circuit.groups.get(stage.group, [])
        shown = "  ".join(f"{layer}.{head} ({100 * mean[layer, head]:+.1f})" for layer, head in heads[:most])
        more = f"  and {len(heads) - most} more" if len(heads) > most else ""
        receivers = "logits" if stage.receivers is None else f"{stage.receivers}, {stage.via}"
        table.add_row(stage.group, stage.sender, receivers, shown + more or "none")
    console.print(table)


@contextmanager
def _progress(chain: Sequence[Stage]):
    """A progress bar for all stages of the chain; yields the callback that `discover` takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks = {stage.group: bars.add_task(stage.group, total=None, start=False) for stage in chain}

        def advance(stage: Stage, done: int, total: int) -> None:
            task = tasks[stage.group]
            bars.start_task(task)
            bars.update(task, completed=done, total=total)

        yield advance


@contextmanager
def _warnings_printed():
    """Prints the warnings of the library as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            console.print(f"[yellow]note:[/] {warning.message}", soft_wrap=True)


def _jsonable(options: Any) -> dict[str, Any]:
    """The options as plain JSON, so that a run can be told from another and repeated."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("jaxmech", "jax", "flax", "transformers", "numpy")}


if __name__ == "__main__":
    main()
