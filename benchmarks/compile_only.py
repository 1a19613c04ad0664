"""Compiles every kernel of every method for a GPU or TPU that need not be there: memory, work, compilation time.

    python benchmarks/compile_only.py --target h200 --shapes 7b,8b --out out/compile_only.json
    python benchmarks/compile_only.py --target v5p --shapes 7b --parts stages
    python benchmarks/compile_only.py --target rtx4090 --shapes 7b --models 1 --share 0.9

Runs the methods as `gpu_7b.py` does, with weights that have a shape but no data, and catches the compiled functions
that they call: instead of running, each is compiled once for the target (`benchmarks/targets.py`) and answers with
zeros. Calls are split as they would be on that device, of which JAX has a share, beside one model or two; by default as
in `gpu_7b.py`, where the other share is PyTorch's. For each kernel:

  calls        how often it would run
  arguments, temporaries, results
               XLA's plan of the device's memory, and whether there is that much
  bodies       of the program and of each of its loops and branches: operations of the matrix products, bytes that
               everything else moves (`benchmarks/hlo.py`), and the share of the products in the time of both at the
               rates --rate and --bandwidth; of GPUs' programs

Nothing is timed but the compilation.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import bench_methods  # noqa: E402
import flops  # noqa: E402
import hlo  # noqa: E402
import shapes  # noqa: E402
from bench_path_patching import sweep_sizes  # noqa: E402
from instead import abstract, instead_of_compiled  # noqa: E402
from measuring import add_words, save  # noqa: E402
from targets import GIB, TARGETS, Target  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import compiled_sizes, memory  # noqa: E402
from jaxmech.model import abstract_params  # noqa: E402

PARTS = ("stages", "circuits", "DCM", "CMAP", "knockout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="h200")
    add_words(parser, "--shapes", shapes.SHAPES, "7b,8b")
    add_words(parser, "--parts", PARTS, ",".join(PARTS))
    parser.add_argument("--prompts", type=int, default=300, help="of the stages, CMAP and knockout")
    parser.add_argument("--circuit-prompts", type=int, default=500)
    parser.add_argument("--circuits", type=int, default=100)
    parser.add_argument("--dcm-prompts", type=int, default=1000)
    parser.add_argument("--models", type=int, default=2, help="that are on the device")
    parser.add_argument("--share", type=float, default=0.6, help="of the device's memory that JAX has")
    parser.add_argument("--rate", type=float, default=750e12, help="operations a second of large matrix products")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second of the device's memory")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs' text")
    parser.add_argument("--out", type=Path, default=Path("out/compile_only.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"target": options.target, "jax": jax.__version__, "shapes": {}}
    for name in options.shapes:
        found = result["shapes"][name] = {"config": shapes.SHAPES[name].config.to_dict(), "kernels": []}
        for row in kernels(name, options):
            found["kernels"].append(row)
            print(line(row), flush=True)
            save(options.out, result)
        print(table(found["kernels"]))


def kernels(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kernel of each part, at the shape of that name."""
    target = TARGETS[options.target]
    shape = dataclasses.replace(shapes.SHAPES[name], prompts=options.prompts)
    weights = abstract_params(shape.config)
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weights))
    free = options.share * target.memory - options.models * size
    budget = int(memory.DEVICE_FRACTION * free)
    if budget < GIB:
        raise SystemExit(f"{options.target} has {target.memory / GIB:.0f} GiB; the models of {name} do not fit.")
    memory.CPU_BUDGET = budget
    compiled_sizes.ALIGNMENT["cpu"] = compiled_sizes.ALIGNMENT["gpu"]  # what is planned here is for the target
    model = jm.Model(shape.config, weights)
    work = bench_methods.Work(shape, model, model, shapes.pairs(shape), None)
    many = dataclasses.replace(shape, prompts=options.circuit_prompts)
    circuits = dataclasses.replace(work, shape=many, pairs=shapes.pairs(many))

    def sweep(stage: shapes.Stage) -> Any:
        return jm.path_patch(model, work.pairs, stage.sender, stage.receivers, stage.via)

    runs: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "stages": [(f"stage {stage.name}", lambda stage=stage: sweep(stage)) for stage in shapes.stages(shape.config)],
        "circuits": [
            (name, lambda of=of: bench_methods.circuit_evaluation(circuits, options.circuits, elsewhere=of).ours())
            for name, of in (("circuits", True), ("circuits, other tokens left alone", False))
        ],
        "DCM": [
            ("DCM", lambda: bench_methods.dcm(work, options.dcm_prompts, [0.01], batch=32).ours()),
            ("DCM of a study", lambda: study_dcm(work, options.dcm_prompts)),
        ],
        "CMAP": [
            ("CMAP of groups", lambda: bench_methods.cmap_groups(work).ours()),
            ("CMAP of heads", lambda: bench_methods.cmap(work, 1).ours()),
        ],
        "knockout": [("knockout", lambda: bench_methods.knockout(work).ours())],
    }
    cone = {
        f"stage {s.name}": flops.cone(shape.config, sweep_sizes(model, work.pairs, s))
        for s in shapes.stages(shape.config)
    }
    for part in options.parts:
        for label, run in runs[part]:
            with recorded(target) as record:
                run()
            for kernel in record.kernels.values():
                row = _row(kernel, options, f"{name} {label}")
                needed = row["argument_bytes"] - size + row["temporary_bytes"] + row["result_bytes"]
                yield {"work": label, "cone_flops": cone.get(label), **row, "fits": bool(needed <= free)}


def study_dcm(work: bench_methods.Work, prompts: int) -> Any:
    """Three desiderata and two groups at once, as a study trains them, with suffixes nearly as long as the prompts.

    The desiderata share their base prompts, as those of a study do.
    """
    shape = dataclasses.replace(work.shape, prompts=prompts)
    base, others = (shapes.pairs(shape, boxes=False, seed=i) for i in range(2))
    desiderata = {str(i): dataclasses.replace(base, corrupt=np.roll(others.corrupt, i, axis=0)) for i in range(3)}
    receivers = [stage.receivers for stage in shapes.stages(shape.config) if stage.receivers]
    groups = {str(i): heads for i, heads in enumerate(receivers[-2:])}
    return jm.dcm.train_many(work.model, desiderata, groups, "prev_query_box")


@dataclasses.dataclass
class Kernel:
    """A compiled function at one set of shapes."""

    name: str
    compiled: Any
    seconds: float
    answer: Any
    calls: int = 0


class Record:
    """What was called instead of run: `kernels` by name and shapes."""

    def __init__(self, target: Target) -> None:
        self.sharding = SingleDeviceSharding(target.device())
        self.compiler_options = target.compiler_options
        self.kernels: dict[Any, Kernel] = {}

    def instead(self, name: str, function: Any) -> Callable[..., Any]:
        """A function that compiles `function` for the target and returns zeros of its results' shapes."""

        def call(*arguments, **static):
            arguments = jax.tree.map(partial(abstract, sharding=self.sharding), arguments)
            key = name, jax.tree.structure(arguments), tuple(jax.tree.leaves(arguments)), tuple(static.items())
            if key not in self.kernels:
                lowered = function.lower(*arguments, **static)
                started = time.perf_counter()
                compiled = lowered.compile(self.compiler_options)
                seconds = time.perf_counter() - started
                answer = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), lowered.out_info)
                self.kernels[key] = Kernel(name, compiled, seconds, answer)
            self.kernels[key].calls += 1
            return self.kernels[key].answer

        return call


@contextmanager
def recorded(target: Target) -> Iterator[Record]:
    """Within, the jit-compiled functions of jaxmech are compiled for the target instead of run."""
    record = Record(target)
    with instead_of_compiled(record.instead):
        yield record


def _row(kernel: Kernel, options: argparse.Namespace, label: str) -> dict[str, Any]:
    text, plan = kernel.compiled.as_text(), kernel.compiled.memory_analysis()
    if options.hlo:
        options.hlo.mkdir(parents=True, exist_ok=True)
        name = f"{label} {kernel.name}".replace(" ", "_")
        others = len(list(options.hlo.glob(f"{name}.*txt")))  # the same kernel at other sizes
        (options.hlo / (f"{name}.{others + 1}.txt" if others else f"{name}.txt")).write_text(text)
    return {
        "kernel": kernel.name,
        "calls": kernel.calls,
        "compile_seconds": kernel.seconds,
        "argument_bytes": plan.argument_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
        "result_bytes": plan.output_size_in_bytes,
        "bodies": [] if TARGETS[options.target].platform == "tpu" else list(_bodies(text, options)),
    }


def _bodies(text: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The bodies of a program that take more than a tenth of a millisecond."""
    for cost in hlo.costs(text):
        products, rest = cost.flops / options.rate, cost.bytes_moved / options.bandwidth
        if products + rest > 1e-4:
            yield {
                "name": cost.name,
                "flops": cost.flops,
                "bytes_moved": cost.bytes_moved,
                "share_of_products": products / (products + rest),
                "largest": [{"bytes": count, "name": x.name, "source": x.source} for count, x in cost.moved[:5]],
            }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = (
        f"{row['work']}: {row['kernel']} x {row['calls']}, compiled in {row['compile_seconds']:.1f} s, arguments "
        f"{row['argument_bytes'] / GIB:.1f} GiB, temporaries {row['temporary_bytes'] / GIB:.1f} GiB, results "
        f"{row['result_bytes'] / GIB:.1f} GiB{'' if row['fits'] else ': DOES NOT FIT'}"
    )
    bodies = [
        f"  {x['flops'] / 1e12:8.2f} TFLOP, {x['bytes_moved'] / 1e9:6.1f} GB moved, products "
        f"{100 * x['share_of_products']:3.0f} %  {x['name']}"
        for x in row["bodies"]
    ]
    return "\n".join([head, *bodies])


def table(kernels: list[dict[str, Any]]) -> str:
    """The kernels of a shape as Markdown; of each, what its heaviest body with matrix products does."""
    rows = [
        "| work | kernel | calls | compiled in | arguments | temporaries | heaviest body: products | moved | share |"
    ]
    rows.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in kernels:
        sizes = f"{row['argument_bytes'] / GIB:.1f} GiB | {row['temporary_bytes'] / GIB:.1f} GiB"
        found = "- | - | -"
        if row["bodies"]:
            x = max(row["bodies"], key=lambda x: x["flops"] / x["share_of_products"] if x["flops"] else 0)
            found = f"{x['flops'] / 1e12:.2f} TFLOP | {x['bytes_moved'] / 1e9:.1f} GB | {x['share_of_products']:.0%}"
        calls = f"{row['calls']} | {row['compile_seconds']:.0f} s"
        rows.append(f"| {row['work']} | `{row['kernel']}` | {calls} | {sizes} | {found} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
