"""Counts what a whole study of a pair of models computes, by stage and model, without computing it.

    python benchmarks/study_work.py --shape 7b --out out/study_work.json
    python benchmarks/study_work.py --shape 7b --models 1 --memory 22          # of a card of 24 GB

Runs the study of `gpu_study.py` with weights that have a shape but no data. Compiled functions are traced instead of
run and answer with zeros, so that discovery, minimality and masks find what the study is told to find. Calls are split
as on a GPU of --memory GiB that holds --models. Of every function, by stage:

  programs     that would be compiled anew, for arguments of other shapes
  calls
  flops        operations of the matrix products of all calls, loops included (2 a multiply-add)

A loop over layers whose bounds are no arguments of the call counts for half of the layers. Sweeps of discovery are
counted unless --no-sweeps. Needs neither a GPU nor time: the 7B shape takes two minutes on a CPU.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import gpu_study  # noqa: E402
import shapes  # noqa: E402
from instead import abstract, instead_of_compiled  # noqa: E402
from measuring import save  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import compiled_sizes, discovery, memory  # noqa: E402
from jaxmech.model import abstract_params  # noqa: E402

SMALL = 4096  # numbers of an argument whose values are followed, for the bounds of loops
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="7b")
    parser.add_argument("--memory", type=float, default=98, help="GiB that JAX has; by default three quarters of 131")
    parser.add_argument("--models", type=int, default=2, help="that are in memory at a time")
    parser.add_argument("--share", type=float, default=1, help="of the prompts of every stage, from above 0 to 1")
    parser.add_argument("--no-sweeps", action="store_true", help="discovery finds its heads without sweeps")
    parser.add_argument("--out", type=Path, default=Path("out/study_work.json"))
    options = parser.parse_args()
    config = shapes.SHAPES[options.shape].config
    weights = abstract_params(config)["params"]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weights))
    if (free := options.memory * GIB - options.models * size) < GIB:
        parser.error(f"{options.models} models of {size / GIB:.1f} GiB do not fit {options.memory:g} GiB")
    memory.CPU_BUDGET = int(memory.DEVICE_FRACTION * free)
    compiled_sizes.ALIGNMENT["cpu"] = compiled_sizes.ALIGNMENT["gpu"]
    settings = gpu_study.settings_of(config, options.share, models_in_memory=options.models)
    sweep = gpu_study.no_sweep if options.no_sweeps else discovery.path_patch
    result: dict[str, Any] = {"shape": options.shape, "config": config.to_dict(), "jax": jax.__version__}
    result |= {"memory_gib": options.memory, "models": options.models, "share": options.share, "stages": {}}
    with counted(config) as counts:

        def keep(found: dict[str, Any]) -> None:
            if "done" not in found:
                return
            stage = result["stages"].setdefault(found["done"], {})
            for name, count in counts.taken().items():
                before = stage.get(name, dict.fromkeys(count, 0))
                stage[name] = {key: before[key] + value for key, value in count.items()}
            save(options.out, result)

        gpu_study.study(config, settings, sweep, keep, math.inf, weights_of=lambda name: weights)
    print(table(result["stages"]))


def table(stages: dict[str, dict[str, dict[str, float]]]) -> str:
    """The stages as Markdown, the functions that do most in each named."""
    rows = ["| stage | PFLOP | calls | programs | most in |", "| --- | ---: | ---: | ---: | --- |"]
    total = dict.fromkeys(("flops", "calls", "programs"), 0.0)
    for stage, functions in stages.items():
        sums = {key: sum(x[key] for x in functions.values()) for key in total}
        total = {key: total[key] + sums[key] for key in total}
        most = sorted(functions, key=lambda name: -functions[name]["flops"])[:2]
        words = ", ".join(f"`{name}` {functions[name]['flops'] / 1e15:.1f}" for name in most)
        rows.append(
            f"| {stage} | {sums['flops'] / 1e15:.1f} | {sums['calls']:.0f} | {sums['programs']:.0f} | {words} |"
        )
    rows.append(f"| together | {total['flops'] / 1e15:.1f} | {total['calls']:.0f} | {total['programs']:.0f} | |")
    return "\n".join(rows)


class Counts:
    """What was called instead of run."""

    def __init__(self, layers: int):
        self._layers = layers
        self._traced: dict[Any, tuple[Jaxpr, Any]] = {}
        self._counts: dict[str, dict[str, float]] = {}

    def taken(self) -> dict[str, dict[str, float]]:
        """{function: programs, calls and flops} since this was asked last."""
        found, self._counts = self._counts, {}
        return found

    def instead(self, name: str, function: Any) -> Callable[..., Any]:
        """A function that traces `function` and returns zeros of its results' shapes."""

        def call(*arguments, **static):
            shapes_alone = jax.tree.map(abstract, arguments)
            key = name, jax.tree.structure(shapes_alone), tuple(jax.tree.leaves(shapes_alone)), tuple(static.items())
            count = self._counts.setdefault(name, {"programs": 0, "calls": 0, "flops": 0.0})
            if key not in self._traced:
                traced = function.trace(*shapes_alone, **static)
                zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), traced.out_info)
                self._traced[key] = traced.jaxpr.jaxpr, zeros
                count["programs"] += 1
            jaxpr, zeros = self._traced[key]
            count["calls"] += 1
            values = [x for x in jax.tree.leaves(arguments) if not isinstance(x, jm.Config)]
            of_jaxpr = len(values) == len(jaxpr.invars)  # or some by keyword are not static
            count["flops"] += flops_of(jaxpr, values if of_jaxpr else [], self._layers)
            return zeros

        return call


@contextmanager
def counted(config: jm.Config) -> Iterator[Counts]:
    """Within, the jit-compiled functions of jaxmech are counted instead of run."""
    counts = Counts(config.num_layers)
    with instead_of_compiled(counts.instead):
        yield counts


def flops_of(jaxpr: Jaxpr, inputs: Sequence[Any], unknown: int) -> float:
    """Operations of the matrix products of a program, 2 a multiply-add.

    Args:
      inputs: values of its arguments, or what stands for them; of small arrays of integers they are followed.
      unknown: layers of the model; a loop whose bounds are not known counts for half of them.
    """
    known: dict[Any, np.ndarray] = {}

    def value(x: Any) -> np.ndarray | None:
        return np.asarray(x.val) if isinstance(x, Literal) else known.get(x)

    def inner(closed: Any, inputs: Sequence[Any]) -> float:
        return flops_of(getattr(closed, "jaxpr", closed), inputs, unknown)

    for variable, x in zip(jaxpr.invars, inputs, strict=False):
        if not isinstance(x, jax.ShapeDtypeStruct) and x is not None and np.size(x) <= SMALL:
            if np.issubdtype(np.asarray(x).dtype, np.integer):
                known[variable] = np.asarray(x)
    total = 0.0
    for equation in jaxpr.eqns:
        kind, of = equation.primitive.name, equation.params
        given = [value(x) for x in equation.invars]
        if kind == "dot_general":
            (left, _), (contracted, _) = (x.aval.shape for x in equation.invars), of["dimension_numbers"][0]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        elif kind == "scan":
            constant = given[: of["num_consts"]]
            total += of["length"] * inner(of["jaxpr"], constant + [None] * (len(given) - len(constant)))
        elif kind == "while":
            of_condition, constants = of["cond_nconsts"], of["body_nconsts"]
            carry = given[of_condition + constants :]
            trips = _trips(given[:of_condition], carry, unknown)
            constant = given[of_condition : of_condition + constants]
            total += trips * inner(of["body_jaxpr"], constant + [None] * len(carry))
        elif kind == "cond":
            total += max(inner(branch, given[1:]) for branch in of["branches"])
        elif closed := next((of[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in of), None):
            total += inner(closed, given)
        elif all(x is not None for x in given) and all(math.prod(x.aval.shape) <= SMALL for x in equation.outvars):
            operands = [jax.numpy.asarray(x, y.aval.dtype) for x, y in zip(given, equation.invars, strict=True)]
            found = equation.primitive.bind(*operands, **of)
            found = found if equation.primitive.multiple_results else [found]
            known |= {x: np.asarray(y) for x, y in zip(equation.outvars, found, strict=True)}
    return total


def _trips(condition: Sequence[np.ndarray | None], carry: Sequence[np.ndarray | None], unknown: int) -> float:
    """Of a fori_loop, whose carry begins with its bounds, or with its start if the other is a constant."""
    bounds = [x for x in (*carry[:2], *condition) if x is not None and x.ndim == 0]
    return max(0, int(bounds[1]) - int(bounds[0])) if len(bounds) > 1 else unknown / 2


if __name__ == "__main__":
    main()
