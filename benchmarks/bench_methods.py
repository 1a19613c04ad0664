"""Times the methods besides path patching against PyTorch with forward hooks, in one run on one machine.

    python benchmarks/bench_methods.py --shape small --out out/bench_methods_small.json

  circuit evaluation   32 random circuits, all else mean-ablated; PyTorch: a forward pass each
  circuits, other      the same at two roles, `last` and `query_box`, heads at all other tokens as they are
  tokens left alone
  DCM                  a mask over 8 heads at `last`, 2 epochs of batches of 16; PyTorch: each step runs its
                       counterfactual and its base prompts and a backward pass
  DCM, 8 lambdas       the same for 8 values of lambda at once; PyTorch: one value, extrapolated
  CMAP                 every head at `last`, one at a time; PyTorch: a forward pass a head with the tuned model's
                       activations at hand, a sample of heads, extrapolated
  knockout             `last` may not attend to `query_box`, from each layer upwards; PyTorch: a forward pass a layer

For each: median time of jaxmech and of PyTorch (`torch_reference`), ratio, compilation time, and the largest difference
of their results, relative to the largest result. Prompts are those of `bench_path_patching.py`, but for DCM, whose
desiderata have a scene for each: random ones that share nothing. Needs neither tyro nor rich; without torch, or with
--reference-runs 0, jaxmech is timed alone.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import shapes  # noqa: E402
from measuring import add_words, machine, save, timed  # noqa: E402

import jaxmech as jm  # noqa: E402

METHODS = ("circuit", "DCM", "CMAP", "knockout")  # how the names of the rows start
CIRCUITS = 32
LAMBDAS = [0.01 * 2**i for i in range(8)]
DCM_HEADS, DCM_BATCH, DCM_EPOCHS = 8, 16, 2


@dataclass(frozen=True)
class Bench:
    """One row of the table.

    Attributes:
      units: of the work, what is done of it in one run of jaxmech.
      reference_units: what one run of PyTorch does; if fewer, its time is extrapolated.
      compared: what of the results is.
      ours: the method; returns its results as a NumPy array.
      theirs: the same in PyTorch, or None; returns the results of its units.
      shared: the units of ours that theirs has, as an index.
      check: returns what is compared instead, of ours and of theirs, where the results that are timed are accuracies,
        which say little, since logits take longer to move to the host than to compute; not timed.
    """

    name: str
    unit: str
    units: int
    reference_units: int
    compared: str
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray] | None
    shared: Any = ...
    check: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None


@dataclass(frozen=True)
class Work:
    """What is benchmarked; `torch` has the two models in PyTorch, or is None."""

    shape: shapes.Shape
    model: jm.Model
    tuned: jm.Model
    pairs: jm.Pairs
    torch: tuple[Any, Any] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--out", type=Path, default=Path("out/bench_methods.json"))
    parser.add_argument("--runs", type=int, default=5, help="timed runs of jaxmech, after a warm-up")
    parser.add_argument("--reference-runs", type=int, default=3, help="timed runs of PyTorch, after a warm-up")
    parser.add_argument("--dcm-prompts", type=int, default=128)
    parser.add_argument("--cmap-heads", type=int, default=8, help="heads that PyTorch runs; its time is extrapolated")
    add_words(parser, "--methods", METHODS, ",".join(METHODS))
    options = parser.parse_args()
    shape = shapes.SHAPES[options.shape]
    reference_runs = options.reference_runs if find_spec("torch") else 0
    models = shapes.random_model(shape.config), shapes.random_model(shape.config, seed=1)
    work = Work(shape, *models, shapes.pairs(shape), twins(*models) if reference_runs else None)
    result = {
        "shape": options.shape,
        "prompts": shape.prompts,
        "tokens": shape.tokens,
        "config": shape.config.to_dict(),
        "machine": machine(),
        "runs": options.runs,
        "reference_runs": reference_runs,
        "dcm_prompts": options.dcm_prompts,
        "methods": [],
    }
    benches = [
        circuit_evaluation(work),
        circuit_evaluation(work, elsewhere=False),
        dcm(work, options.dcm_prompts, [0.01]),
        dcm(work, options.dcm_prompts, LAMBDAS),
        cmap(work, options.cmap_heads),
        knockout(work),
    ]
    for bench in benches:
        if bench.name.startswith(tuple(options.methods)):
            result["methods"].append(run(bench, options.runs, reference_runs))
            print(json.dumps(result["methods"][-1]), flush=True)
            save(options.out, result)
    print(f"Wrote {options.out}.")


def twins(model: jm.Model, tuned: jm.Model) -> tuple[Any, Any]:
    """The two models in PyTorch; one, twice, if they are the same."""
    from to_torch import in_torch

    theirs = in_torch(model)
    return theirs, theirs if tuned is model else in_torch(tuned)


def run(bench: Bench, runs: int, reference_runs: int) -> dict:
    """One row of the table: both timed, results compared."""
    row = run_ours(bench, runs)
    return row | {"reference": None if bench.theirs is None else run_theirs(bench, row["seconds"], reference_runs)}


def run_ours(bench: Bench, runs: int, seconds: float = math.inf) -> dict:
    """The row without PyTorch; no further run begins after so many `seconds`."""
    started = time.perf_counter()
    bench.ours()
    first = time.perf_counter() - started
    times = timed(bench.ours, runs, seconds)
    return {
        **{name: getattr(bench, name) for name in ("name", "unit", "units", "compared")},
        "seconds": statistics.median(times),
        "all_seconds": times,
        "compile_seconds": max(0.0, first - statistics.median(times)),
        "reference": None,
    }


def run_theirs(bench: Bench, ours_seconds: float, runs: int) -> dict[str, Any]:
    """PyTorch's time for the same work, and how far its results are from ours."""
    assert bench.theirs is not None
    expected = bench.theirs()
    found, expected = (bench.ours()[bench.shared], expected) if bench.check is None else bench.check()
    measured = timed(bench.theirs, runs)
    seconds = statistics.median(measured) * bench.units / bench.reference_units
    return {
        "units": bench.reference_units,
        "measured_seconds": measured,
        "seconds": seconds,
        "ratio": seconds / ours_seconds,
        "largest_relative_difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
    }


def circuit_evaluation(
    work: Work, count: int = CIRCUITS, sample: int | None = None, *, elsewhere: bool = True
) -> Bench:
    """Random circuits in which a head is at each role with probability 0.3.

    `elsewhere`: heads are ablated at all other tokens; else these are left as they are, and circuits are at two roles.

    Both return accuracies [C], theirs of the first `sample` circuits, whose logits [sample, B, V] are compared.
    """
    sample = min(sample or count, count)
    model, pairs = work.model, work.pairs
    means = jm.mean_activations(model, pairs.clean)
    rng, shape = np.random.default_rng(0), (model.config.num_layers, model.config.num_heads)
    roles = ("last", "query_box", "prev_query_box") if elsewhere else ("last", "query_box")
    circuits = [{role: np.argwhere(rng.random(shape) < 0.3).tolist() for role in roles} for _ in range(count)]

    def ours() -> np.ndarray:
        return jm.evaluate(model, pairs, circuits, means, elsewhere, keep_logits=False).accuracy

    @cache
    def their_means() -> Any:
        import torch

        assert work.torch is not None
        return torch.tensor(means).to(work.torch[0].device)

    def their_logits(circuit: dict[str, Any]) -> Any:
        from torch_reference.circuits import evaluate

        assert work.torch is not None
        return evaluate(work.torch[0], pairs.clean, pairs.positions, circuit, their_means(), ablate_elsewhere=elsewhere)

    def theirs() -> np.ndarray:
        return np.stack([accuracy(their_logits(circuit), pairs) for circuit in circuits[:sample]])

    def check() -> tuple[np.ndarray, np.ndarray]:
        logits = jm.evaluate(model, pairs, circuits[:sample], means, elsewhere).logits
        assert logits is not None
        return logits, np.stack([their_logits(circuit).float().cpu().numpy() for circuit in circuits[:sample]])

    reference = theirs if work.torch else None
    name = "circuit evaluation" if elsewhere else "circuits, other tokens left alone"
    return Bench(name, "circuits", count, sample, "logits", ours, reference, check=check)


def accuracy(logits: Any, pairs: jm.Pairs) -> float:
    """Of PyTorch's logits [B, V]."""
    import torch

    return float((logits.argmax(-1) == torch.as_tensor(pairs.labels).to(logits.device)).float().mean())


def dcm(work: Work, prompts: int, lams: list[float], batch: int = DCM_BATCH, sample: int | None = None) -> Bench:
    """A mask over 8 heads in the upper half of the layers; ours and theirs return the mask of every step, [R, S, n].

    Theirs takes the first `sample` steps.
    """
    model = work.model
    pairs = shapes.pairs(dataclasses.replace(work.shape, prompts=prompts), boxes=False)
    config, steps = model.config, DCM_EPOCHS * -(-prompts // batch)
    sample = min(sample or steps, steps)
    layers = np.linspace(config.num_layers // 2, config.num_layers - 1, DCM_HEADS).round().astype(int)
    heads = [(int(layer), i % config.num_heads) for i, layer in enumerate(layers)]
    options = {"epochs": DCM_EPOCHS, "batch_size": batch}

    def ours() -> np.ndarray:
        runs = jm.dcm.train_many(model, {"": pairs}, {"": heads}, "last", lams=lams, **options)
        return np.stack([run.history.mask for run in runs.values()])

    def theirs() -> np.ndarray:
        import torch
        from torch_reference.dcm import new_mask, step

        assert work.torch is not None
        mask = new_mask(work.torch[0], heads)
        adam, masks = torch.optim.Adam([mask], lr=0.1), []
        for start in (list(range(0, prompts, batch)) * DCM_EPOCHS)[:sample]:
            part = pairs[start : start + batch]
            positions = part.position("last"), part.corrupt_position("last"), part.position("last")
            inputs = part.clean, part.corrupt, part.labels, *positions
            step(work.torch[0], *inputs, heads, mask, adam, lam=lams[0])
            masks.append(mask.detach().cpu().numpy().copy())
        return np.stack(masks)[None]

    name = "DCM" if len(lams) == 1 else f"DCM, {len(lams)} lambdas"
    reference = theirs if work.torch else None
    shared = (slice(1), slice(sample))
    return Bench(name, "steps", steps * len(lams), sample, "masks", ours, reference, shared)


def cmap_groups(work: Work) -> Bench:
    """Four groups of eight heads, at the paper's roles, each patched alone; both return accuracies [4].

    Logits [4, B, V] are compared.
    """
    model, pairs, config = work.model, work.pairs, work.model.config
    groups = []
    for role, low in (("last", 0.5), ("last", 0.45), ("query_box", 0.35), ("prev_query_box", 0.1)):
        layers = np.linspace(low * config.num_layers, config.num_layers - 1, DCM_HEADS).round().astype(int)
        groups.append({role: sorted({(int(layer), i % config.num_heads) for i, layer in enumerate(layers)})})

    def patched(keep_logits: bool) -> list[jm.Predictions]:
        return [jm.cmap(model, work.tuned, pairs, heads, keep_logits=keep_logits) for heads in groups]

    def ours() -> np.ndarray:
        return np.array([found.accuracy for found in patched(keep_logits=False)])

    def their_logits() -> list[Any]:
        from torch_reference.cmap import cmap

        assert work.torch is not None
        return [cmap(*work.torch, pairs.clean, pairs.positions, heads) for heads in groups]

    def theirs() -> np.ndarray:
        return np.array([accuracy(logits, pairs) for logits in their_logits()])

    def check() -> tuple[np.ndarray, np.ndarray]:
        logits = [found.logits for found in patched(keep_logits=True) if found.logits is not None]
        return np.stack(logits), np.stack([x.float().cpu().numpy() for x in their_logits()])

    reference = theirs if work.torch else None
    return Bench("CMAP of groups", "groups", len(groups), len(groups), "logits", ours, reference, check=check)


def cmap(work: Work, sample: int) -> Bench:
    """Ours returns the change of the label's log-probability by every head [L * N, B], theirs that by some heads."""
    model, pairs, config = work.model, work.pairs, work.model.config
    count = config.num_layers * config.num_heads
    chosen = np.unique(np.linspace(0, count - 1, min(sample, count)).round().astype(int))

    def ours() -> np.ndarray:
        found = jm.cmap_heads(model, work.tuned, pairs, "last", metric="log_probability")
        return found.scores.per_example.reshape(count, -1)

    reference = cmap_by_hooks(work, [(int(i) // config.num_heads, int(i) % config.num_heads) for i in chosen])
    return Bench("CMAP", "heads", count, len(chosen), "log-probabilities", ours, reference, chosen)


def cmap_by_hooks(work: Work, heads: list[tuple[int, int]]) -> Callable[[], np.ndarray] | None:
    """`torch_reference.cmap` for one head after another, but that the tuned model is run once, here and untimed."""
    if work.torch is None:
        return None
    import torch
    from torch_reference import hooks

    base, tuned = work.torch
    pairs = work.pairs
    tokens, last, labels = (hooks.indices(base, x) for x in (pairs.clean, pairs.position("last"), pairs.labels))

    def log_probability(edits) -> Any:
        with hooks.edited(base, edits):
            return hooks.at(hooks.last_logits(base, tokens, last).log_softmax(-1), labels)

    with torch.inference_mode():
        z = hooks.capture(tuned, tokens, {"z": last})["z"]  # [L, B, N, H]
        clean = log_probability([])

    @torch.inference_mode()
    def theirs() -> np.ndarray:
        edits = [
            ("z", layer, hooks.replace(last, hooks.indices(base, [head]), z[layer][:, [head]])) for layer, head in heads
        ]
        return torch.stack([log_probability([edit]) - clean for edit in edits]).cpu().numpy()

    return theirs


def knockout(work: Work, sample: int | None = None) -> Bench:
    """Both return accuracies [L], theirs of a sample of first layers, whose logits are compared."""
    model, pairs = work.model, work.pairs
    layers = model.config.num_layers
    starts = np.unique(np.linspace(0, layers - 1, min(sample or layers, layers)).round().astype(int))
    positions = [pairs.position(role) for role in ("last", "query_box", "last")]

    def ours() -> np.ndarray:
        return jm.knockout(model, pairs, "last", "query_box", keep_logits=False).accuracy

    def their_results() -> Any:
        from torch_reference.knockout import knockout

        assert work.torch is not None
        return knockout(work.torch[0], pairs.clean, pairs.labels, *positions, starts=starts.tolist())

    def theirs() -> np.ndarray:
        return their_results()[0].cpu().numpy()

    def check() -> tuple[np.ndarray, np.ndarray]:
        logits = jm.knockout(model, pairs, "last", "query_box").logits
        assert logits is not None
        return logits[starts], their_results()[1].float().cpu().numpy()

    reference = theirs if work.torch else None
    return Bench("knockout", "first layers", layers, len(starts), "logits", ours, reference, check=check)


if __name__ == "__main__":
    main()
