"""How the time of a sweep grows with examples, layers and the length of the prompt, for jaxmech and PyTorch.

    python benchmarks/bench_scaling.py --out out/scaling.json --chart out/scaling.png

Stages 1 and 2 on a model of 4 layers x 256, one size varied at a time, random prompts that share nothing. jaxmech:
median of 3 after a warm-up, of the whole sweep and of its senders alone: what grows with the length of the prompts is
above all the one forward pass of the clean and the corrupt prompts that every sweep begins with, which a large model's
many heads share. The PyTorch reference with hooks: the better of two runs, and no larger size after one that took
longer than --reference-limit.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import jax  # noqa: E402
import shapes  # noqa: E402
from bench_path_patching import comparisons  # noqa: E402
from measuring import add_words, machine, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import path_patching  # noqa: E402

BASE = shapes.Shape(
    jm.Config(vocab_size=1024, width=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64, mlp_width=704),
    prompts=16,
    tokens=57,
)
POINTS = {"examples": (4, 8, 16, 32, 64, 128, 256), "layers": (2, 4, 8, 16), "prompt length": (57, 128, 256, 512)}
UNITS = {"examples": "examples", "layers": "layers", "prompt length": "tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/scaling.json"))
    parser.add_argument("--chart", type=Path, default=Path("out/scaling.png"))
    parser.add_argument(
        "--reference-limit", type=float, default=20.0, help="no larger points after one that took longer"
    )
    add_words(parser, "--axes", POINTS, ",".join(POINTS))
    options = parser.parse_args()
    result = {"machine": machine(), "axes": {}}
    for axis, values in POINTS.items():
        if axis not in options.axes:
            continue
        rows, slow = [], False
        for value in values:
            rows.append(point(varied(axis, value), slow))
            slow = slow or max(x or 0 for x in rows[-1]["hooks"]) > options.reference_limit
            print(axis, value, json.dumps(rows[-1]), flush=True)
        result["axes"][axis] = {"values": values, "rows": rows}
        save(options.out, result)
    chart(result).savefig(options.chart, dpi=160)


def varied(axis: str, value: int) -> shapes.Shape:
    """BASE with one size changed."""
    if axis == "examples":
        return dataclasses.replace(BASE, prompts=value)
    if axis == "layers":
        return dataclasses.replace(BASE, config=BASE.config.replace(num_layers=value))
    return dataclasses.replace(BASE, tokens=value)


def point(shape: shapes.Shape, slow: bool) -> dict:
    """Seconds of stages 1 and 2 for jaxmech, its senders alone and the reference (None if it is too slow here)."""
    model, pairs = shapes.random_model(shape.config), shapes.pairs(shape, boxes=False)
    stages = shapes.stages(shape.config)[:2]
    row: dict = {"jaxmech": [], "senders": [], "hooks": []}
    reference = None if slow else comparisons(model, pairs, ["hooks"])["hooks"]
    for stage in stages:

        def ours(stage=stage):
            return jm.path_patch(model, pairs, stage.sender, stage.receivers, stage.via).per_example

        for who, run in (("jaxmech", ours), ("senders", senders_alone(model, pairs, stage))):
            run()
            row[who].append(statistics.median(timed(run, 3)))
        row["hooks"].append(None if reference is None else min(timed(lambda stage=stage: reference(stage), 2)))
    return row


def senders_alone(model: jm.Model, pairs: jm.Pairs, stage: shapes.Stage):
    """A function that runs the senders of a sweep on clean and corrupt prompts that have been run before."""
    plan = path_patching.plan(model, pairs, stage.sender, stage.receivers, stage.via)
    receivers = plan.receivers
    prepared = [
        path_patching.prepare(model.config, model.weights, plan.batch(rows), live=receivers is not None)
        for rows in plan.batches.rows
    ]

    def run():
        arguments = [(inputs, call, receivers) for inputs in prepared for call in plan.calls]
        found = [
            path_patching.sender_outcomes(model.config, model.weights, *rest, via=stage.via, measure=None)
            for rest in arguments
        ]
        return jax.device_get(found)

    return run


def chart(result: dict) -> Figure:
    """A panel per axis: seconds against size, both logarithmic."""
    figure = Figure(figsize=(10, 4.1), layout="constrained")
    panels = figure.subplots(1, len(result["axes"]), sharey=True, squeeze=False)[0]
    styles = {
        "jaxmech": ("jaxmech", "#0072b2", "o"),
        "senders": ("its senders alone", "#56b4e9", "^"),
        "hooks": ("PyTorch hooks", "#d55e00", "s"),
    }
    for panel, (axis, found) in zip(panels, result["axes"].items(), strict=True):
        for who, (name, colour, marker) in styles.items():
            for stage, line in ((0, "-"), (1, "--")):
                seconds = [row[who][stage] for row in found["rows"]]
                shown = [(x, y) for x, y in zip(found["values"], seconds, strict=True) if y is not None]
                panel.plot(
                    *zip(*shown, strict=True),
                    line,
                    color=colour,
                    marker=marker,
                    ms=4,
                    label=f"{name}, stage {stage + 1}",
                )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(found["values"], labels=[str(value) for value in found["values"]])
        panel.set_xlabel(f"{axis} ({UNITS[axis]})" if axis == "prompt length" else axis)
        panel.grid(color="#e5e5e5", linewidth=0.6)
    panels[0].set_ylabel("seconds per sweep")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8
    )
    return figure


if __name__ == "__main__":
    main()
