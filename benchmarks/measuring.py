"""What the benchmark scripts share: timing, what is said about the machine, lists as options, results as JSON."""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmech.provenance import versions


def add_words(parser: argparse.ArgumentParser, option: str, allowed: Collection[str], default: str) -> None:
    """Adds an option that takes some of the words `allowed`, or none, with commas between them, as a list."""

    def parse(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",") if word.strip()]
        if unknown := [word for word in found if word not in allowed]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(map(repr, unknown))}; expected some of {', '.join(allowed)}, with commas between"
            )
        return found

    help = f"some of {', '.join(allowed)}, with commas between; by default {default}"
    parser.add_argument(option, type=parse, default=default, help=help)


def timed(run: Callable[[], Any], runs: int, seconds: float = math.inf) -> list[float]:
    """Seconds of each run; `run` returns a NumPy array or waits otherwise, so that nothing is left in flight.

    Args:
      seconds: no further run begins after so many, but there is always one.
    """
    times: list[float] = []
    while len(times) < min(runs, 1) or (len(times) < runs and sum(times) < seconds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def peak_memory() -> int | None:
    """The most bytes that JAX has held on the device so far; None where the device does not say (CPUs)."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def matmul_rate(dtype, size: int | None = None) -> float:
    """FLOP/s of square matrix products of this dtype on the first device, the best of ten.

    The factors are random: products of constants draw less power and run faster than any real work. On GPUs ten
    products are in flight at a time, since one takes little longer than the host takes to begin it.
    """
    on_gpu = jax.default_backend() == "gpu"
    size, together = size or (8192 if on_gpu else 2048), 10 if on_gpu else 1
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    times = timed(lambda: jax.block_until_ready([product(x, x) for _ in range(together)]), 10)
    return 2.0 * size**3 * together / min(times)


def copy_rate(size: int | None = None) -> float:
    """Bytes per second, read and written, that the first device moves in copying `size` bytes, the best of ten."""
    size = size or (2**32 if jax.default_backend() == "gpu" else 2**26)
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    times = timed(lambda: jax.block_until_ready(copy(x)), 10)
    return 2.0 * size / min(times)


def machine() -> dict:
    """What the numbers depend on besides the code."""
    packages = ("jaxmech", "jax", "jaxlib", "flax", "numpy", "transformers")
    found = versions(packages)
    try:
        import torch

        found["torch"], threads = torch.__version__, torch.get_num_threads()
    except ImportError:
        threads = None
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": threads,
        "python": platform.python_version(),
        "versions": found,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def save(path: Path, result: dict) -> None:
    """Writes what has been measured so far: a run that is cut off loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
