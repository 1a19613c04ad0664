"""Times the plain forward pass of jaxmech against Hugging Face's, on the prompts of a benchmark shape.

    python benchmarks/bench_forward.py --shape small

Logits at the last token of every prompt, median of --runs after a warm-up, and the largest difference of the logits.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import flops  # noqa: E402
import shapes  # noqa: E402
from measuring import machine, matmul_rate, timed  # noqa: E402

import jaxmech as jm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="small")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    shape = shapes.SHAPES[options.shape]
    model, pairs = shapes.random_model(shape.config), shapes.pairs(shape, boxes=False)

    def ours() -> Any:
        return jm.predict(model, pairs, batch_size=shape.prompts).logits

    started = time.perf_counter()
    logits = ours()
    first = time.perf_counter() - started
    seconds = statistics.median(timed(ours, options.runs))
    work = shape.prompts * flops.forward(shape.config, shape.tokens)
    rate = matmul_rate(shape.config.compute_dtype)
    theirs = hugging_face(model, pairs)
    expected = theirs()
    theirs_seconds = statistics.median(timed(theirs, options.runs))
    result = {
        "shape": options.shape,
        "machine": machine(),
        "seconds": seconds,
        "compile_seconds": max(0.0, first - seconds),
        "matmul_fraction": work / seconds / rate,
        "hugging_face_seconds": theirs_seconds,
        "ratio": theirs_seconds / seconds,
        "largest_relative_difference": float(np.abs(expected - logits).max() / np.abs(expected).max()),
    }
    print(json.dumps(result, indent=1))


def hugging_face(model, pairs):
    """A function that returns Hugging Face's logits at the last tokens, float32 [B, V]."""
    import torch
    from to_torch import in_torch
    from torch_reference.hooks import indices, last_logits

    theirs = in_torch(model)

    def run() -> np.ndarray:
        with torch.inference_mode():
            last = indices(theirs, pairs.position("last"))
            return last_logits(theirs, indices(theirs, pairs.clean), last).cpu().numpy()

    return run


if __name__ == "__main__":
    main()
