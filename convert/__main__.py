"""`python -m convert`: a Hugging Face checkpoint directory to an Orbax checkpoint with config and tokenizer inside."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import convert
from jaxmech import checkpoint
from jaxmech.provenance import Provenance, hashing

console = Console(stderr=True)


@dataclass(frozen=True)
class Options:
    """Convert a Llama-family checkpoint of Hugging Face to an Orbax checkpoint that `jaxmech.load` reads."""

    model: Path
    """Hugging Face directory (config.json, *.safetensors or PyTorch's *.bin and, if there is one, the tokenizer),
    Meta's (params.json, consolidated.*.pth), or the name of a model on the Hugging Face Hub."""
    out: Path
    """Directory to write; it must not exist, unless --overwrite is given."""
    adapter: Path | None = None
    """LoRA adapter of --model that PEFT saved (adapter_config.json, adapter_model.safetensors), to merge in."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype in which parameters are stored. float32 loses nothing, whatever dtype the checkpoint has, and
    `jaxmech.load` casts to any other; bfloat16 and float16 take half the space."""
    overwrite: bool = False
    """Replace the checkpoint that is at --out. Anything else there is never replaced."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the conversion. Exit status 2 for bad input, 130 when interrupted."""
    options = tyro.cli(Options, prog="python -m convert", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        run(options)
    except (ValueError, OSError) as error:
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written to --out.")
        sys.exit(130)


def run(options: Options) -> None:
    """Reads `options.model` and writes `options.out`. Raises what `read_config`, `read_params` and `save` raise."""
    checkpoint.check_output(options.out, overwrite=options.overwrite)
    model = convert.local_path(options.model)
    if checkpoint.is_checkpoint(model):
        raise ValueError(
            f"{options.model} is converted already: it is an Orbax checkpoint, which jaxmech.load reads. To merge an "
            "adapter or for another dtype, convert the model that it was made from."
        )
    adapter = None if options.adapter is None else convert.local_path(options.adapter)
    config = convert.read_config(model, adapter, dtype=options.dtype, param_dtype=options.dtype)
    tokenizer = convert.read_tokenizer(model, config, adapter)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    files = convert.source_files(model, adapter)
    with Progress(*columns, console=console) as bars, hashing(files, _bar(bars, "hashing")) as hashes:
        params = convert.read_params(model, config, _bar(bars, "reading"), adapter)
        source = Provenance(str(options.model), str(options.adapter or ""), hashes.result())
        written = _bar(bars, "writing")
        checkpoint.save(options.out, config, params, tokenizer, overwrite=options.overwrite, provenance=source)
        written(1, 1)
    without = (
        "" if tokenizer is not None else f" {options.model} holds no tokenizer, so the checkpoint has none either."
    )
    console.print(f"Wrote {options.out} ({options.dtype}).{without}", markup=False, highlight=False, soft_wrap=True)


def _bar(bars: Progress, description: str) -> Callable[[int, int], None]:
    """A bar of its own, as a function that is called with (steps done, steps in all)."""
    task = bars.add_task(description, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # conversion computes nothing; accelerators are left alone
    main()
