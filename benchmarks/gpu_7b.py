"""Times every method at the shapes of Llama-7B and Llama-3.1-8B on one large GPU, against PyTorch on the same GPU.

    python benchmarks/gpu_7b.py --out out/gpu_7b.json              # on the GPU; no network

`compile_only.py` compiles the same work for such a GPU without having one. This script, for each shape, in bfloat16
with random weights that are made on the device:

  check      four layers of the shape in float32: scores of the causal cone equal those of full forward passes
  stages     the paper's four stages, 300 prompts of 57 tokens
  circuits   100 circuits x 500 prompts
  DCM        a mask over a group of 8 heads, 1000 prompts, 2 epochs
  CMAP       all four groups, and every head one by one
  knockout   last -> query_box from every layer upwards

PyTorch (`torch_reference`, hooks, SDPA, the same weights) runs a sample of the senders, circuits, steps, heads and
layers; its time is extrapolated, and the JSON and the table say from how many. Needs neither tyro nor rich.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # the rest is for PyTorch's copy of the weights

import numpy as np

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "tests")]

import bench_methods  # noqa: E402
import flops  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from bench_path_patching import sweep_sizes  # noqa: E402
from measuring import add_words, machine, matmul_rate, peak_memory, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402

PARTS = ("check", "stages", "circuits", "DCM", "CMAP", "knockout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_words(parser, "--shapes", shapes.SHAPES, "7b,8b")
    add_words(parser, "--parts", PARTS, ",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/gpu_7b.json"))
    parser.add_argument("--runs", type=int, default=3, help="timed runs of jaxmech, after a warm-up")
    parser.add_argument("--sample", type=int, default=8, help="units that PyTorch runs of each; 0: no PyTorch")
    parser.add_argument("--prompts", type=int, default=300, help="of the stages, CMAP and knockout")
    parser.add_argument("--circuit-prompts", type=int, default=500)
    parser.add_argument("--circuits", type=int, default=100)
    parser.add_argument("--dcm-prompts", type=int, default=1000)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "options": _plain(options), "shapes": {}}
    for name in options.shapes:
        shape = dataclasses.replace(shapes.SHAPES[name], prompts=options.prompts)
        rate = matmul_rate(shape.config.compute_dtype)
        found: dict[str, Any] = {"config": shape.config.to_dict(), "matmul_flops_per_s": rate, "rows": []}
        result["shapes"][name] = found
        for row in rows(shape, options, rate):
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            save(options.out, result)
    save(options.out, result)
    print(report.gpu_table(result))


def rows(shape: shapes.Shape, options: argparse.Namespace, rate: float):
    """The rows of the table, one after another."""
    if "check" in options.parts:
        yield check(shape)
    model = shapes.random_model(shape.config)
    tuned = shapes.random_model(shape.config, seed=1) if "CMAP" in options.parts else model
    torch_models = bench_methods.twins(model, tuned) if options.sample else None
    pairs = shapes.pairs(shape)
    if "stages" in options.parts:
        for stage in shapes.stages(shape.config):
            yield bench_stage(model, torch_models, pairs, stage, options, rate)
    work = bench_methods.Work(shape, model, tuned, pairs, torch_models)
    many = dataclasses.replace(shape, prompts=options.circuit_prompts)
    benches: dict[str, list[Callable[[], bench_methods.Bench]]] = {
        "circuits": [
            lambda: bench_methods.circuit_evaluation(
                dataclasses.replace(work, shape=many, pairs=shapes.pairs(many)), options.circuits, options.sample
            )
        ],
        "DCM": [lambda: bench_methods.dcm(work, options.dcm_prompts, [0.01], batch=32, sample=options.sample)],
        "CMAP": [lambda: bench_methods.cmap_groups(work), lambda: bench_methods.cmap(work, options.sample)],
        "knockout": [lambda: bench_methods.knockout(work, options.sample)],
    }
    for part, makers in benches.items():
        for make in makers if part in options.parts else []:
            bench = make()
            row = bench_methods.run(bench, options.runs, 1 if options.sample else 0)
            yield row | {"peak_bytes": peak_memory()}


def check(shape: shapes.Shape) -> dict[str, Any]:
    """Scores of four layers of the shape in float32 against full forward passes: the largest difference, relative."""
    from full_forward import path_patch

    config = shape.config.replace(
        num_layers=4, vocab_size=4096, dtype="float32", param_dtype="float32", precision="highest"
    )
    small = shapes.Shape(config, prompts=4, tokens=shape.tokens)
    model, pairs = shapes.random_model(config), shapes.pairs(small)
    receivers = [(2, 0), (3, 1)]
    differences = {}
    for sender, chosen, via in (("last", None, None), ("query_box", receivers, "v")):
        expected = path_patch(model, pairs, sender, chosen, via)
        found = jm.path_patch(model, pairs, sender, chosen, via).per_example
        differences[f"{sender} {via or 'logits'}"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    return {"name": "check", "seconds": None, "largest_relative_difference": differences}


def bench_stage(
    model: jm.Model, torch_models: Any, pairs: jm.Pairs, stage: shapes.Stage, options: argparse.Namespace, rate: float
) -> dict[str, Any]:
    """One stage; PyTorch runs the clean row and then it and a sample of senders, whose difference is extrapolated."""

    def ours() -> np.ndarray:
        return jm.path_patch(model, pairs, stage.sender, stage.receivers, stage.via).per_example

    started = time.perf_counter()
    scores = ours()
    first = time.perf_counter() - started
    times = timed(ours, options.runs)
    seconds = statistics.median(times)
    work = sweep_sizes(model, pairs, stage)
    cone = flops.cone(model.config, work)
    row: dict[str, Any] = {
        **dataclasses.asdict(stage),
        "seconds": seconds,
        "all_seconds": times,
        "compile_seconds": max(0.0, first - seconds),
        "peak_bytes": peak_memory(),
        "cone_flops": cone,
        "naive_flops": flops.naive(model.config, work),
        "matmul_fraction": cone / seconds / rate,
        "largest_score": float(np.abs(scores).max()),
        "reference": None,
    }
    if torch_models is not None:
        row["reference"] = reference_stage(model, torch_models[0], pairs, stage, options.sample, scores, seconds)
    return row


def reference_stage(
    model: jm.Model, theirs: Any, pairs: jm.Pairs, stage: shapes.Stage, sample: int, scores: np.ndarray, seconds: float
) -> dict[str, Any]:
    """The reference on a sample of senders, spread over the layers that reach a receiver."""
    from torch_reference import path_patching as reference

    config = model.config
    top = max((layer for layer, _ in stage.receivers or ()), default=config.num_layers)
    layers = np.linspace(0, top - 1, sample).round().astype(int)
    senders = sorted({(int(layer), int(i % config.num_heads)) for i, layer in enumerate(layers)})
    positions = pairs.position(stage.sender), pairs.corrupt_position(stage.sender), pairs.position("last")
    prompts = pairs.clean, pairs.corrupt, pairs.labels, *positions

    def run(chosen: list[tuple[int, int]]) -> np.ndarray:
        arguments = *prompts, stage.receivers, stage.via
        found = reference.path_patch(theirs, *arguments, senders=chosen, frozen="hooks", chunk=100)
        return found.float().cpu().numpy()

    run(senders[:1])
    without, some = (timed(lambda chosen=chosen: run(chosen), 1)[0] for chosen in ([], senders))
    expected = run(senders)
    index = tuple(np.array(senders).T)
    total = without + (some - without) / len(senders) * config.num_layers * config.num_heads
    return {
        "units": len(senders),
        "seconds": total,
        "measured_seconds": [without, some],
        "ratio": total / seconds,
        "largest_relative_difference": float(np.abs(scores[index] - expected[index]).max() / np.abs(scores).max()),
    }


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    main()
