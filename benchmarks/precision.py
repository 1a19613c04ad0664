"""What low precision does to path patching: the scores, the heads they choose, and the time.

    python benchmarks/precision.py --out out/precision.json              # the demo pair and the 1B shape
    python benchmarks/precision.py --shapes "" --out out/precision.json  # the demo pair alone
    python benchmarks/precision.py --scenes 0 --stages 123 --runs 1 --minutes 4  # what fits

Each precision is compared with float32 `highest`, stage by stage: the Spearman correlation of the mean scores of all
heads that have a path, how many of the top k heads are the same (k as the demo asks, 20 for a random model), and the
largest difference relative to the largest score. Receivers are those of the float32 circuit in every precision, so that
a stage's row says what that stage does; "circuit" says how much of a whole discovery agrees. Then the accuracy of the
discovered circuit alone (demo pair), and the median time of the stages together.

  float32        `precision="highest"`; on TPUs this is "BF16_BF16_F32_X6"
  3xTF32         float32, products "TF32_TF32_F32_X3" (NVIDIA GPUs alone)
  bf16x3         float32, products "BF16_BF16_F32_X3"; on TPUs this is `precision="high"`
  TF32           float32, products "TF32_TF32_F32" (NVIDIA GPUs alone): JAX's default on recent ones, and "high"
  bf16 products  float32, products "BF16_BF16_F32": JAX's default on TPUs
  bfloat16       weights and activations bfloat16

On a CPU, all but the first and the last are emulated (`emulation.py`), and no times are given. The random model and its
prompts are those of the other benchmarks. What has been found is saved after every precision; one that fails says why
and leaves the others alone. XLA's compiler refuses some products for NVIDIA GPUs unless cuBLAS computes all of them:
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false. Needs neither tyro nor rich.
"""

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import shapes  # noqa: E402
from emulation import emulated  # noqa: E402
from measuring import add_words, machine, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech.chain import read_chain  # noqa: E402

PRECISIONS = {
    "float32": {"dtype": "float32", "precision": "highest"},
    "3xTF32": {"dtype": "float32", "precision": "TF32_TF32_F32_X3"},
    "bf16x3": {"dtype": "float32", "precision": "BF16_BF16_F32_X3"},
    "TF32": {"dtype": "float32", "precision": "TF32_TF32_F32"},
    "bf16 products": {"dtype": "float32", "precision": "BF16_BF16_F32"},
    "bfloat16": {"dtype": "bfloat16"},
}
GPUS_ALONE = ("3xTF32", "TF32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/precision.json"))
    add_words(parser, "--shapes", shapes.SHAPES, "1b")
    parser.add_argument("--prompts", type=int, default=100, help="of the random models")
    parser.add_argument("--stages", default="1234", help="digits of the stages of the random models to run")
    parser.add_argument("--scenes", type=int, default=20, help="of seven prompts each, of the demo pair; 0: not it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no precision begins after so many")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    on_cpu = jax.default_backend() == "cpu"
    result: dict[str, Any] = {"machine": machine(), "emulated": on_cpu, "prompts": options.prompts, "models": {}}
    with emulated() if on_cpu else nullcontext():
        for name, begin in studies(options):
            rows, study = result["models"].setdefault(name, {}), None
            for how in filter(runs_here, PRECISIONS):
                if time.monotonic() > deadline:
                    print(f"{name}: no time left for {how}.", flush=True)
                    continue
                try:
                    study = study or begin()
                    rows[how] = study(how)
                except Exception as error:
                    traceback.print_exc()
                    rows[how] = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
                print(name, how, json.dumps(rows[how]), flush=True)
                save(options.out, result)
    print(table(result))


def runs_here(how: str) -> bool:
    """Whether this device has the products of the precision, or a CPU emulates them."""
    return jax.default_backend() != "tpu" or how not in GPUS_ALONE


Study = Callable[[str], dict[str, Any]]  # from the name of a precision to what is found in it


def studies(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Study]]]:
    """The name of each model, and what begins its study."""
    runs = 0 if jax.default_backend() == "cpu" else options.runs
    for name in ("base", "tuned") if options.scenes else ():
        yield name, partial(demo, name, options.scenes, runs)
    for name in options.shapes:
        yield name, partial(random, name, options, runs)


def demo(name: str, scenes: int, runs: int) -> Study:
    """The demo's chain of sweeps on one of its models."""
    chain = read_chain(jm.demo.path("chain.toml"))

    def load(how: str) -> jm.Model:
        return jm.load(jm.demo.path(name), **PRECISIONS[how])

    model = load("float32")
    examples = jm.boxes.make(n_scenes=2 * scenes, n_boxes=7, seed=0)
    pairs = jm.boxes.pairs(examples[: 7 * scenes], model.tokenizer, seed=0)
    other = jm.boxes.pairs(examples[7 * scenes :], model.tokenizer, seed=1)
    exact = jm.discover(model, pairs, chain=chain)
    stages = [
        shapes.Stage(
            stage.group, stage.sender, exact.groups.get(stage.receivers) if stage.receivers else None, stage.via
        )
        for stage in chain
    ]
    swept = sweeps(model, pairs, stages, [stage.k for stage in chain], runs)

    def heads(circuit: jm.Circuit) -> set[tuple[str, int, int]]:
        return {(group, *head) for group, heads in circuit.groups.items() for head in heads}

    def study(how: str) -> dict[str, Any]:
        model = load(how)
        circuit, means = jm.discover(model, pairs, chain=chain), jm.mean_activations(model, other.clean)
        return swept(model) | {
            "circuit": len(heads(circuit) & heads(exact)) / len(heads(exact)),
            "accuracy_of_circuit": float(jm.evaluate(model, pairs, [circuit], means).accuracy[0]),
        }

    return study


def random(name: str, options: argparse.Namespace, runs: int) -> Study:
    """The paper's four stages on a random model of a benchmark shape, weights in bfloat16 throughout."""
    config = shapes.SHAPES[name].config
    pairs = shapes.pairs(shapes.Shape(config, options.prompts, shapes.SHAPES[name].tokens))
    weights = shapes.random_model(config)

    def load(how: str) -> jm.Model:
        return jm.Model(config.replace(**PRECISIONS[how]), weights.params)

    stages = [stage for stage in shapes.stages(config) if stage.name[0] in options.stages]
    k = min(20, config.num_layers * config.num_heads // 4)
    swept = sweeps(load("float32"), pairs, stages, [k] * len(stages), runs)
    return lambda how: swept(load(how))


def sweeps(
    exact_model: jm.Model, pairs: jm.Pairs, stages: list[shapes.Stage], ks: list[int], runs: int
) -> Callable[[jm.Model], dict[str, Any]]:
    """From a model to its scores of all stages, compared with exact ones, and the time they take together if `runs`."""

    def run(model: jm.Model) -> list[jm.PathScores]:
        return [jm.path_patch(model, pairs, s.sender, s.receivers, s.via) for s in stages]

    exact = run(exact_model)

    def swept(model: jm.Model) -> dict[str, Any]:
        rows = [compared(*both, k) for *both, k in zip(run(model), exact, ks, strict=True)]
        for stage, row in zip(stages, rows, strict=True):
            row["stage"] = stage.name
        return {"stages": rows, "seconds": statistics.median(timed(partial(run, model), runs)) if runs else None}

    return swept


def compared(scores: jm.PathScores, exact: jm.PathScores, k: int) -> dict[str, Any]:
    """How far the scores of one sweep are from exact ones."""
    has_path, top = exact.per_example.any(axis=-1), exact.top(k)
    difference = np.abs(scores.mean - exact.mean).max() / np.abs(exact.mean).max()
    return {
        "spearman": float(spearmanr(scores.mean[has_path], exact.mean[has_path]).statistic),
        "top_k": len(set(scores.top(k)) & set(top)) / len(top) if top else math.nan,
        "k": len(top),
        "largest_score": float(np.abs(exact.mean).max()),
        "largest_relative_difference": float(difference),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown; Spearman and top k stage by stage, the accuracy that of the circuit alone."""
    columns = ("model", "precision", "Spearman", "top k the same", "largest difference", "circuit", "accuracy", "time")
    rows = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for name, found in result["models"].items():
        for how, row in found.items():
            if "error" in row:
                rows.append(f"| {name} | {how} | failed: {row['error']} | | | | | |")
                continue
            stages = row["stages"]
            spearman = ", ".join(f"{stage['spearman']:.4f}" for stage in stages)
            same = ", ".join(
                f"{round(stage['top_k'] * stage['k'])}/{stage['k']}" if stage["k"] else "-" for stage in stages
            )
            worst = max(stage["largest_relative_difference"] for stage in stages)
            circuit = "- | -"
            if "circuit" in row:
                circuit = f"{row['circuit']:.0%} the same | {row['accuracy_of_circuit']:.1%}"
            time = f"{row['seconds']:.3g} s" if row["seconds"] else "-"
            rows.append(f"| {name} | {how} | {spearman} | {same} | {worst:.1e} | {circuit} | {time} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
