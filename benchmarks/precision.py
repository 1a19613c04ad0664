"""What low precision does to path patching: the scores, the heads they choose, and the time.

    python benchmarks/precision.py --out out/precision.json            # the demo pair and the 1B shape
    python benchmarks/precision.py --shape "" --out out/precision.json # the demo pair alone

Each precision is compared with float32 `highest`, stage by stage: the Spearman correlation of the mean scores of all
heads that have a path, how many of the top k heads are the same (k as the chain asks, 20 for the random model), and the
largest difference relative to the largest score. Receivers are those of the float32 circuit in every precision, so that
a stage's row says what that stage does; "circuit" says how much of a whole discovery agrees. Then the accuracy of the
discovered circuit alone (demo pair), and the median time of the stages together.

  bfloat16     weights and activations bfloat16
  TF32         float32, products as JAX does them by default: TF32 on recent NVIDIA GPUs, bfloat16 on TPUs
  3xTF32       float32, `precision="high"`: three products (bf16x3 on TPUs)
  float32      float32, `precision="highest"`

On a CPU the last three are the same arithmetic. The random model has effects far above rounding; it and its prompts are
those of the other benchmarks. Needs neither tyro nor rich.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import shapes  # noqa: E402
from measuring import machine, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech.discovery import read_chain  # noqa: E402

PRECISIONS = {
    "float32": {"dtype": "float32", "precision": "highest"},
    "3xTF32": {"dtype": "float32", "precision": "high"},
    "TF32": {"dtype": "float32", "precision": "default"},
    "bfloat16": {"dtype": "bfloat16", "precision": "default"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/precision.json"))
    parser.add_argument("--shape", default="1b", help="of the random model; empty for none")
    parser.add_argument("--prompts", type=int, default=100, help="of the random model")
    parser.add_argument("--scenes", type=int, default=20, help="of seven prompts each, of the demo pair")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "models": {}}
    for name in ("base", "tuned"):
        result["models"][name] = demo(name, options.scenes, options.runs)
    if options.shape:
        result["models"][options.shape] = random(options.shape, options.prompts, options.runs)
    save(options.out, result)
    print(table(result))


def demo(name: str, scenes: int, runs: int) -> dict[str, Any]:
    """The demo's chain of sweeps on one of its models."""
    chain = read_chain(jm.demo.path("chain.toml"))
    models = {name_: jm.load(jm.demo.path(name), **how) for name_, how in PRECISIONS.items()}
    examples = jm.boxes.make(n_scenes=2 * scenes, n_boxes=7, seed=0)
    pairs = jm.boxes.pairs(examples[: 7 * scenes], models["float32"].tokenizer, seed=0)
    other = jm.boxes.pairs(examples[7 * scenes :], models["float32"].tokenizer, seed=1)
    circuits = {how: jm.discover(model, pairs, chain=chain) for how, model in models.items()}
    exact = circuits["float32"].groups
    stages = [
        shapes.Stage(stage.group, stage.sender, exact.get(stage.receivers) if stage.receivers else None, stage.via)
        for stage in chain
    ]
    found = sweeps(models, pairs, stages, [stage.k for stage in chain], runs)
    chosen = {
        how: {(group, *head) for group, heads in c.groups.items() for head in heads} for how, c in circuits.items()
    }
    for how, model in models.items():
        means = jm.mean_activations(model, other.clean)
        found[how]["circuit"] = len(chosen[how] & chosen["float32"]) / len(chosen["float32"])
        found[how]["accuracy_of_circuit"] = float(jm.evaluate(model, pairs, [circuits[how]], means).accuracy[0])
    return found


def random(name: str, prompts: int, runs: int) -> dict[str, Any]:
    """The paper's four stages on a random model of a benchmark shape, weights in bfloat16 throughout."""
    config = shapes.SHAPES[name].config
    pairs = shapes.pairs(shapes.Shape(config, prompts, shapes.SHAPES[name].tokens))
    weights = shapes.random_model(config)
    models = {how: jm.Model(config.replace(**fields), weights.params) for how, fields in PRECISIONS.items()}
    stages = shapes.stages(config)
    return sweeps(models, pairs, stages, [20] * len(stages), runs)


def sweeps(
    models: dict[str, jm.Model], pairs: jm.Pairs, stages: list[shapes.Stage], ks: list[int], runs: int
) -> dict[str, Any]:
    """Scores of all stages in every precision, compared with the first, and the time they take together."""
    found: dict[str, Any] = {}
    exact: list[jm.PathScores] = []
    for how, model in models.items():

        def run(model=model) -> list[jm.PathScores]:
            return [jm.path_patch(model, pairs, s.sender, s.receivers, s.via) for s in stages]

        scores = run()
        exact = exact or scores
        rows = [compared(*both, k) for *both, k in zip(scores, exact, ks, strict=True)]
        for stage, row in zip(stages, rows, strict=True):
            row["stage"] = stage.name
        found[how] = {"stages": rows, "seconds": statistics.median(timed(run, runs))}
        print(how, json.dumps(found[how]), flush=True)
    return found


def compared(scores: jm.PathScores, exact: jm.PathScores, k: int) -> dict[str, Any]:
    """How far the scores of one sweep are from exact ones."""
    has_path = exact.per_example.any(axis=-1)
    difference = np.abs(scores.mean - exact.mean).max() / np.abs(exact.mean).max()
    return {
        "spearman": float(spearmanr(scores.mean[has_path], exact.mean[has_path]).statistic),
        "top_k": len(set(scores.top(k)) & set(exact.top(k))) / k,
        "k": k,
        "largest_relative_difference": float(difference),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = ["| model | precision | Spearman, each stage | top k the same | largest difference | circuit | time |"]
    rows.append("| --- | --- | --- | --- | ---: | ---: | ---: |")
    for name, found in result["models"].items():
        for how, row in found.items():
            stages = row["stages"]
            spearman = ", ".join(f"{stage['spearman']:.4f}" for stage in stages)
            same = ", ".join(f"{round(stage['top_k'] * stage['k'])}/{stage['k']}" for stage in stages)
            worst = max(stage["largest_relative_difference"] for stage in stages)
            circuit = f"{100 * row['circuit']:.0f} % the same" if "circuit" in row else "-"
            rows.append(f"| {name} | {how} | {spearman} | {same} | {worst:.1e} | {circuit} | {row['seconds']:.3g} s |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
