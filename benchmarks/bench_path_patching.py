"""Times the four path-patching stages of jaxmech against PyTorch, in one run on one machine.

    python benchmarks/bench_path_patching.py --shape small --out out/bench_small.json

For each stage: median time of jaxmech and of each comparison, ratios, compilation time, the FLOPs that the cone needs
(`flops.cone`), their share of full forward passes (`flops.naive`), and the fraction of the machine's measured matmul
rate at which they ran. Comparisons (`torch_reference`): "hooks", a full forward pass per head and stream with forward
hooks, for every head, as the published code does it; "reachable", the same without the heads that have no path to a
receiver; "lean", that with a frozen pass that computes no attention; "incremental", the cone's algorithm in PyTorch
(stages 1 and 2); "transformer_lens" and "nnsight", the same stages by these libraries (the extra `bench-peers`). Scores
are compared before anything is timed. Needs neither tyro nor rich, so that it runs wherever
jaxmech and torch do; without torch, or with --comparisons "", jaxmech is timed alone.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import flops  # noqa: E402
import shapes  # noqa: E402
from measuring import add_words, machine, matmul_rate, peak_memory, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import path_patching as patching  # noqa: E402
from jaxmech.suffixes import suffix_lengths  # noqa: E402

EVERY_STAGE = ("hooks", "reachable", "lean")
COMPARISONS = (*EVERY_STAGE, "incremental", "transformer_lens", "nnsight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    add_words(parser, "--comparisons", COMPARISONS, "hooks,incremental")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of jaxmech, after a warm-up")
    parser.add_argument("--reference-runs", type=int, default=5, help="timed runs of each comparison, after a warm-up")
    parser.add_argument("--stages", default="1234", help="digits of the stages to run")
    parser.add_argument("--random-prompts", action="store_true", help="prompts that share nothing with each other")
    options = parser.parse_args()
    shape = shapes.SHAPES[options.shape]
    model = shapes.random_model(shape.config)
    pairs = shapes.pairs(shape, boxes=not options.random_prompts)
    compare = comparisons(model, pairs, options.comparisons) if options.comparisons else {}
    result = {
        "shape": options.shape,
        "shared_prefixes": not options.random_prompts,
        "prompts": shape.prompts,
        "tokens": shape.tokens,
        "config": shape.config.to_dict(),
        "machine": machine(),
        "matmul_flops_per_s": matmul_rate(shape.config.compute_dtype),
        "runs": options.runs,
        "reference_runs": options.reference_runs,
        "stages": [],
    }
    for stage in shapes.stages(shape.config):
        if stage.name[0] not in options.stages:
            continue
        row = bench_stage(model, pairs, stage, compare, options.runs, options.reference_runs)
        row["matmul_fraction"] = row["cone_flops"] / row["seconds"] / result["matmul_flops_per_s"]
        result["stages"].append(row)
        print(json.dumps(row), flush=True)
        save(options.out, result)
    print(f"Wrote {options.out}.")


def bench_stage(model, pairs, stage: shapes.Stage, compare: dict, runs: int, reference_runs: int) -> dict:
    """One row of the table."""

    def ours() -> np.ndarray:
        return jm.path_patch(model, pairs, stage.sender, stage.receivers, stage.via).per_example

    before = patching.sender_outcomes._cache_size()
    started = time.perf_counter()
    scores = ours()
    first = time.perf_counter() - started
    times = timed(ours, runs)
    work = sweep_sizes(model, pairs, stage)
    row = {
        **asdict(stage),
        "seconds": statistics.median(times),
        "all_seconds": times,
        "compile_seconds": max(0.0, first - statistics.median(times)),
        "peak_bytes": peak_memory(),
        "compilations": patching.sender_outcomes._cache_size() - before,
        "cone_flops": flops.cone(model.config, work),
        "naive_flops": flops.naive(model.config, work),
        "comparisons": {},
    }
    for name, run in compare.items():
        if name not in EVERY_STAGE and (stage.sender != "last" or stage.via not in (None, "q")):
            continue
        theirs = run(stage)
        difference = float(np.abs(theirs - scores).max() / np.abs(theirs).max())
        theirs_times = timed(lambda run=run: run(stage), reference_runs)
        seconds = statistics.median(theirs_times)
        row["comparisons"][name] = {
            "seconds": seconds,
            "all_seconds": theirs_times,
            "ratio": seconds / row["seconds"],
            "largest_relative_difference": difference,
        }
    return row


def sweep_sizes(model: jm.Model, pairs: jm.Pairs, stage: shapes.Stage) -> flops.Sweep:
    """What `flops` needs to know of the work."""
    batches = patching.plan(model, pairs, stage.sender, stage.receivers, stage.via, batch_size=len(pairs)).batches
    return flops.Sweep(
        receiver_layers=tuple(sorted({layer for layer, _ in stage.receivers or ()})),
        via=stage.via,
        lengths=suffix_lengths(batches.p, batches.last),
        tokens=pairs.clean.shape[1],
        computed_tokens=batches.computed_tokens,
    )


def comparisons(model: jm.Model, pairs: jm.Pairs, names: list[str]) -> dict[str, Callable]:
    """Functions from a stage to its scores [L, N, B], by the PyTorch implementations in `names`."""
    from to_torch import in_torch
    from torch_reference import incremental, path_patching

    theirs = in_torch(model)

    def run(function: Callable, **options) -> Callable:
        def stage_scores(stage: shapes.Stage) -> np.ndarray:
            p, corrupt_p = pairs.position(stage.sender), pairs.corrupt_position(stage.sender)
            prompts = (pairs.clean, pairs.corrupt, pairs.labels, p, corrupt_p, pairs.position("last"))
            return function(theirs, *prompts, stage.receivers, stage.via, **options).float().cpu().numpy()

        return stage_scores

    every = {
        "hooks": run(path_patching.path_patch, frozen="hooks", every_head=True),
        "reachable": run(path_patching.path_patch, frozen="hooks"),
        "lean": run(path_patching.path_patch, frozen="lean"),
        "incremental": run(incremental.path_patch),
    }
    if {"transformer_lens", "nnsight"} & set(names):
        every |= peers(theirs, run)
    return {name: every[name] for name in names}


def peers(model, run: Callable) -> dict[str, Callable]:
    """The sweeps of the peer libraries on the Hugging Face model `model`, wrapped by `run`."""
    from benchmarks.peers import nnsight_sweep, transformer_lens_sweep

    def sweep(module) -> Callable:
        loaded = module.load(model)
        return run(lambda model, *arguments: module.path_patch(loaded, *arguments))

    return {"transformer_lens": sweep(transformer_lens_sweep), "nnsight": sweep(nnsight_sweep)}


if __name__ == "__main__":
    main()
