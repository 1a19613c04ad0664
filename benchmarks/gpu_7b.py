"""Times every method at the shapes of Llama-7B and Llama-3.1-8B on one large GPU, against PyTorch on the same GPU.

    python benchmarks/gpu_7b.py --out out/gpu_7b.json              # on the GPU; no network
    python benchmarks/gpu_7b.py --shapes 7b --minutes 8            # what fits; the same command again goes on
    XLA_FLAGS=--xla_gpu_enable_triton_gemm=false python ...        # cuBLAS alone: less to compile and to tune

`compile_only.py` compiles the same work for such a GPU without having one. This script, for each shape, in bfloat16
with random weights that are made on the device:

  check      four layers of the shape in float32: scores of the causal cone equal those of full forward passes, and,
             if there is PyTorch, of its hooks
  depth      the same of a few heads of all layers, against PyTorch's hooks alone
  stages     the paper's four stages, 300 prompts of 57 tokens; the fourth, the longest, last of all
  profile    a call of each stage: the seconds of each kind of kernel in its trace (--traces keeps it)
  circuits   100 circuits x 500 prompts
  DCM        a mask over a group of 8 heads, 1000 prompts, 2 epochs
  knockout   last -> query_box from every layer upwards
  CMAP       all four groups, and every head one by one

PyTorch (`torch_reference`, hooks, SDPA, the same weights) runs a sample of the senders, circuits, steps, heads and
layers; its time is extrapolated, and the JSON and the table say from how many. In bfloat16, its scores and ours differ
by the rounding of both, so that their correlation is given too. Each row is saved when it is there. A
row that fails says why and leaves the others alone; rows that --out has from the same machine and options are not
measured again. Needs neither tyro nor rich; without torch, jaxmech is timed alone.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # the rest is for PyTorch's copy of the weights

import jax
import numpy as np

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent), str(ROOT.parent / "tests")]

import bench_methods  # noqa: E402
import flops  # noqa: E402
import kernels  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from bench_path_patching import sweep_sizes  # noqa: E402
from measuring import add_words, copy_rate, machine, matmul_rate, peak_memory, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import path_patching  # noqa: E402
from jaxmech.sharding import over_rows  # noqa: E402

ALLOWED = 5e-4  # of the largest score: rounding was 6.5e-5 on a CPU
ROUNDING = 2e-5  # of a score, a relative change of a probability, whatever the largest is: that of float32 logits
PARTS = ("check", "depth", "stages", "profile", "circuits", "DCM", "knockout", "CMAP")
LAST_STAGE = "4"  # it takes longer than all else
PLACES = ("out", "traces")  # of files; results do not say where they were
HOW_LONG = ("shapes", "parts", "stages", "minutes")  # options that change which rows there are, not what they say
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """A row of the table: its `name`, what measures it, and what adds PyTorch's time for the same work."""

    name: str
    ours: Callable[[], Row]
    theirs: Callable[[Row], Row] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_words(parser, "--shapes", shapes.SHAPES, "7b,8b")
    add_words(parser, "--parts", PARTS, ",".join(PARTS))
    parser.add_argument("--stages", default="1234", help="digits of the stages to time")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_7b.json"))
    parser.add_argument("--runs", type=int, default=3, help="timed runs of jaxmech, after a warm-up")
    parser.add_argument("--seconds", type=float, default=30, help="a row begins no further run after so many")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no row begins after so many")
    parser.add_argument("--traces", type=Path, help="folder for the traces of the profile, to look at them")
    parser.add_argument("--sample", type=int, default=8, help="units that PyTorch runs of each; 0: no PyTorch")
    parser.add_argument("--prompts", type=int, default=300, help="of the stages, CMAP and knockout")
    parser.add_argument("--circuit-prompts", type=int, default=500)
    parser.add_argument("--circuits", type=int, default=100)
    parser.add_argument("--dcm-prompts", type=int, default=1000)
    options = parser.parse_args()
    if not find_spec("torch"):
        options.sample = 0
    deadline = time.monotonic() + 60 * options.minutes
    result = begun(options)
    for name in options.shapes:
        shape = dataclasses.replace(shapes.SHAPES[name], prompts=options.prompts)
        found = result["shapes"].setdefault(name, {"config": shape.config.to_dict(), "rows": []})
        found |= {"matmul_flops_per_s": matmul_rate(shape.config.compute_dtype), "bytes_per_s": copy_rate()}
        for work in works(name, shape, options, found["matmul_flops_per_s"]):
            if work.name in [row["name"] for row in found["rows"] if "error" not in row]:
                continue
            if time.monotonic() > deadline:
                print(f"{name}: no time left for {work.name}. The same command goes on there.", flush=True)
                continue
            row: Row = {"name": work.name, "seconds": None, "reference": None, "error": "cut off"}
            found["rows"] = [other for other in found["rows"] if other["name"] != work.name] + [row]
            with failure_in(row):
                row |= work.ours() | {"name": work.name, "peak_bytes": peak_memory()}
                save(options.out, result)
                row["reference"] = work.theirs(row) if work.theirs and options.sample else None
                del row["error"]
            print(json.dumps(row), flush=True)
            save(options.out, result)
    print(report.gpu_table(result))
    failed = [row["name"] for found in result["shapes"].values() for row in found["rows"] if "error" in row]
    sys.exit(f"Failed: {', '.join(failed)}." if failed else 0)


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The result that --out has, to be gone on with, or an empty one if it is of another machine or other options."""
    said = {name: value for name, value in vars(options).items() if name not in PLACES}
    fresh = {"machine": machine(), "options": said, "shapes": {}}
    if not options.out.exists():
        return fresh
    found = json.loads(options.out.read_text())
    same = [{k: v for k, v in result["options"].items() if k not in HOW_LONG} for result in (found, fresh)]
    if found["machine"] == fresh["machine"] and same[0] == same[1]:
        return found
    sys.exit(f"{options.out} is of another machine or of other options. Move it away, or name another --out.")


@contextmanager
def failure_in(row: Row) -> Iterator[None]:
    """Whatever fails is said in the row, so that the others are measured all the same."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def works(name: str, shape: shapes.Shape, options: argparse.Namespace, rate: float) -> Iterator[Work]:
    """The rows of a shape, one after another; models are made when a row needs them."""
    pairs = shapes.pairs(shape)
    model = cache(lambda: shapes.random_model(shape.config))
    tuned = cache(lambda: shapes.random_model(shape.config, seed=1))
    theirs = cache(lambda: in_torch(model()))
    their_tuned = cache(lambda: in_torch(tuned()))
    stages = [StageBench(model, theirs, pairs, stage, options, rate) for stage in shapes.stages(shape.config)]
    sweeps = {
        bench.stage.name[0]: Work(f"stage {bench.stage.name}", bench.ours, bench.theirs)
        for bench in stages
        if "stages" in options.parts and bench.stage.name[0] in options.stages
    }
    longest = sweeps.pop(LAST_STAGE, None)
    if "check" in options.parts:
        yield Work("check", lambda: check(shape, options.sample))
    if "depth" in options.parts and options.sample:
        yield Work("check of all layers", lambda: check_whole(shape))
    yield from sweeps.values()
    for bench in stages if "profile" in options.parts else ():
        place = options.traces and options.traces / f"{name}_stage_{bench.stage.name[0]}"
        yield Work(f"profile of stage {bench.stage.name}", partial(bench.profile, place))

    def work(torch: bool, both: bool = False, prompts: int = shape.prompts) -> bench_methods.Work:
        sized = dataclasses.replace(shape, prompts=prompts)
        twins = (theirs(), their_tuned() if both else None) if torch else None
        return bench_methods.Work(sized, model(), tuned() if both else model(), shapes.pairs(sized), twins)

    sample = options.sample
    benches: dict[str, dict[str, Callable[[bool], bench_methods.Bench]]] = {
        "circuits": {
            "circuit evaluation": lambda torch: bench_methods.circuit_evaluation(
                work(torch, prompts=options.circuit_prompts), options.circuits, sample
            )
        },
        "DCM": {
            "DCM": lambda torch: bench_methods.dcm(work(torch), options.dcm_prompts, [0.01], batch=32, sample=sample)
        },
        "knockout": {"knockout": lambda torch: bench_methods.knockout(work(torch), sample)},
        "CMAP": {
            "CMAP of groups": lambda torch: bench_methods.cmap_groups(work(torch, both=True)),
            "CMAP": lambda torch: bench_methods.cmap(work(torch, both=True), sample),
        },
    }
    for part, makers in benches.items():
        for row, make in makers.items() if part in options.parts else ():
            yield Work(row, partial(bench_method, make, options), partial(reference_method, make))
    if longest:
        yield longest


def bench_method(make: Callable[[bool], bench_methods.Bench], options: argparse.Namespace) -> Row:
    return bench_methods.run_ours(make(False), options.runs, options.seconds)


def reference_method(make: Callable[[bool], bench_methods.Bench], row: Row) -> Row:
    return bench_methods.run_theirs(make(True), row["seconds"], runs=1)


def in_torch(model: jm.Model) -> Any:
    from to_torch import in_torch

    return in_torch(model)


def check(shape: shapes.Shape, sample: int) -> Row:
    """Scores of four layers of the shape in float32 against full forward passes: the largest difference, relative.

    With PyTorch, a sample of heads against its hooks, too. RuntimeError if a difference is larger than ALLOWED.
    """
    from full_forward import path_patch

    model, pairs = in_float32(shape, num_layers=4, vocab_size=4096)
    receivers = [(layer, head) for layer in (2, 3) for head in range(model.config.num_heads)]
    stages = [shapes.Stage("last logits", "last", None, None), shapes.Stage("query_box v", "query_box", receivers, "v")]
    differences = {}
    for stage in stages:
        expected = path_patch(model, pairs, stage.sender, stage.receivers, stage.via)
        found = jm.path_patch(model, pairs, stage.sender, stage.receivers, stage.via).per_example
        differences[stage.name] = compared(found, expected, np.abs(expected).max())
    if sample:
        differences |= differences_from_hooks(model, pairs, stages, [(0, 0), (1, 0)])
    return allowed(differences)


def check_whole(shape: shapes.Shape) -> Row:
    """Scores of a few heads of the whole shape in float32, three stages, against PyTorch's hooks; as `check`."""
    model, pairs = in_float32(shape)
    layers = (0, shape.config.num_layers // 4)
    stages = shapes.stages(shape.config)[:3]
    return allowed(differences_from_hooks(model, pairs, stages, [(layer, 1) for layer in layers]))


def in_float32(shape: shapes.Shape, **changes: Any) -> tuple[jm.Model, jm.Pairs]:
    """A model and four prompts of the shape with some changes, in float32 throughout."""
    config = shape.config.replace(dtype="float32", param_dtype="float32", precision="highest", **changes)
    return shapes.random_model(config), shapes.pairs(shapes.Shape(config, prompts=4, tokens=shape.tokens))


def differences_from_hooks(
    model: jm.Model, pairs: jm.Pairs, stages: list[shapes.Stage], heads: list[tuple[int, int]]
) -> dict[str, dict[str, float]]:
    """`compared` scores of some heads, by stage."""
    theirs, index, differences = in_torch(model), tuple(np.array(heads).T), {}
    for stage in stages:
        found = jm.path_patch(model, pairs, stage.sender, stage.receivers, stage.via).per_example
        expected = reference_scores(theirs, pairs, stage, heads)
        differences[f"{stage.name}, PyTorch"] = compared(found[index], expected[index], np.abs(found).max())
    return differences


def compared(found: np.ndarray, expected: np.ndarray, largest: float) -> dict[str, float]:
    """The largest difference of two scores, and the largest score of all heads."""
    return {"largest_difference": float(np.abs(found - expected).max()), "largest_score": float(largest)}


def allowed(differences: dict[str, dict[str, float]]) -> Row:
    """The row of a check; RuntimeError if a difference is above both ROUNDING and ALLOWED of the largest score."""
    for name, x in differences.items():
        if x["largest_difference"] > max(ROUNDING, ALLOWED * x["largest_score"]):
            raise RuntimeError(f"scores differ by more than rounding, {name}: {x}")
    return {"differences": differences}


def reference_scores(model: Any, pairs: jm.Pairs, stage: shapes.Stage, senders: list[tuple[int, int]]) -> np.ndarray:
    """Scores [L, N, B] by PyTorch's hooks, of these senders alone."""
    from torch_reference import path_patching as reference

    positions = pairs.position(stage.sender), pairs.corrupt_position(stage.sender), pairs.position("last")
    arguments = model, pairs.clean, pairs.corrupt, pairs.labels, *positions, stage.receivers, stage.via
    return reference.path_patch(*arguments, senders=senders, frozen="hooks", chunk=100).float().cpu().numpy()


@dataclasses.dataclass
class StageBench:
    """One stage of path patching, in both; models are made when they are needed."""

    model: Callable[[], jm.Model]
    torch: Callable[[], Any]
    pairs: jm.Pairs
    stage: shapes.Stage
    options: argparse.Namespace
    rate: float
    scores: np.ndarray | None = None
    compile_seconds: float | None = None

    def sweep(self) -> np.ndarray:
        self.scores = jm.path_patch(
            self.model(), self.pairs, self.stage.sender, self.stage.receivers, self.stage.via
        ).per_example
        return self.scores

    def one_call(self) -> None:
        """The prompts of the first batch, and the first call of senders: all that a sweep compiles."""
        model, via = self.model(), self.stage.via
        plan = path_patching.plan(model, self.pairs, self.stage.sender, self.stage.receivers, via)
        batch, live = plan.batch(plan.batches.rows[0]), plan.receivers is not None
        inputs = path_patching.prepare(model.config, model.weights, batch, live=live)
        call = plan.calls[0]._replace(senders=over_rows(model.weights, plan.calls[0].senders))
        inputs = model.config, model.weights, inputs, call, plan.receivers
        jax.block_until_ready(path_patching.sender_outcomes(*inputs, via=via, measure=None))  # as `path_patch` calls it

    def warm_up(self) -> None:
        """Two times one call, since a whole stage can take a minute, and what compilation takes of the first."""
        if self.compile_seconds is None:
            self.model()
            first, again = timed(self.one_call, 2)
            self.compile_seconds = max(0.0, first - again)

    def ours(self) -> Row:
        self.warm_up()
        times = timed(self.sweep, self.options.runs, self.options.seconds)
        seconds, config = statistics.median(times), self.model().config
        sizes = sweep_sizes(self.model(), self.pairs, self.stage)
        cone = flops.cone(config, sizes)
        assert self.scores is not None
        return {
            **dataclasses.asdict(self.stage),
            "seconds": seconds,
            "all_seconds": times,
            "compile_seconds": self.compile_seconds,
            "cone_flops": cone,
            "naive_flops": flops.naive(config, sizes),
            "matmul_fraction": cone / seconds / self.rate,
            "largest_score": float(np.abs(self.scores).max()),
        }

    def theirs(self, row: Row) -> Row:
        """A sample of senders, spread over the layers that reach a receiver; what one takes is extrapolated.

        To every head, as the published code sweeps them, and to those that have a path to a receiver.
        """
        config, scores, stage = self.model().config, self.scores, self.stage
        assert scores is not None
        top = max((layer for layer, _ in stage.receivers or ()), default=config.num_layers)
        layers = np.linspace(0, top - 1, self.options.sample).round().astype(int)
        senders = sorted({(int(layer), int(i % config.num_heads)) for i, layer in enumerate(layers)})
        theirs, found = self.torch(), {}

        def run(chosen: list[tuple[int, int]]) -> None:
            found[len(chosen)] = reference_scores(theirs, self.pairs, stage, chosen)

        run(senders[:1])
        without, some = min(timed(partial(run, []), 2)), timed(partial(run, senders), 1)[0]
        index = tuple(np.array(senders).T)
        each = (some - without) / len(senders)
        if each <= 0:
            raise RuntimeError(
                f"{len(senders)} senders took {some:.3g} s, none {without:.3g} s: too noisy, or too few."
            )
        seconds, reachable = (without + each * count * config.num_heads for count in (config.num_layers, top))
        ours, expected = scores[index], found[len(senders)][index]
        difference = np.abs(ours - expected).max() / np.abs(scores).max()
        return {
            "units": len(senders),
            "seconds": seconds,
            "reachable_seconds": reachable,
            "measured_seconds": [without, some],
            "ratio": seconds / row["seconds"],
            "reachable_ratio": reachable / row["seconds"],
            "largest_relative_difference": float(difference),
            "correlation": float(np.corrcoef(ours.ravel(), expected.ravel())[0, 1]),
        }

    def profile(self, place: Path | None) -> Row:
        """The kernels in a trace of one call, which is kept in the folder `place` if there is one."""
        self.warm_up()
        with tempfile.TemporaryDirectory() as passing:
            trace = Path(passing) if place is None else place
            with jax.profiler.trace(str(trace)):
                self.one_call()
            return {"functions": kernels.summary(trace)}


if __name__ == "__main__":
    main()
