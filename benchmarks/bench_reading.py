"""Times reading a checkpoint into parameters against reading its files and throwing them away, as `cat` does.

    python benchmarks/bench_reading.py

Safetensors in float32 and in bfloat16, of one block's shapes of Llama-7B, into float32 and bfloat16 parameters; medians
of --runs after a first one. The files have just been written, so that they are read from memory, not from a disk.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from measuring import machine  # noqa: E402

import convert  # noqa: E402
import jaxmech as jm  # noqa: E402
from convert.export import config_to_hf  # noqa: E402
from convert.families import TABLES, source  # noqa: E402
from jaxmech.model import parameter_shapes  # noqa: E402

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go, for a while; default: that of the system")
    options = parser.parse_args()
    config = jm.Config(4000, 4096, options.layers, 32, 32, 128, 11008)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for stored, dtype in DTYPES.items():
            path = Path(folder) / stored
            write(path, config, dtype)
            results += [measure(path, stored, params, options.runs) for params in DTYPES]
    print(
        json.dumps({"machine": machine(), "layers": options.layers, "runs": options.runs, "results": results}, indent=1)
    )


def write(path: Path, config: jm.Config, dtype: type) -> None:
    """Writes a checkpoint of random numbers with one shard a parameter."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(config)))
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    weight_map = {}
    for keys in flatten_dict(parameter_shapes(config)):
        target = source(keys, TABLES[config.family])
        shape, file = target.shape(config), f"model-{'-'.join(keys)}.safetensors"
        save_file({name: np.resize(numbers, shape).astype(dtype) for name in target.names(config)}, path / file)
        weight_map |= dict.fromkeys(target.names(config), file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(path: Path, stored: str, params: str, runs: int) -> dict:
    """Gigabytes of file a second: plain reading, reading into parameters, and that by processor time alone."""
    files = sorted(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    config = convert.read_config(path, param_dtype=params)
    plain, ours = [], []
    for _ in range(runs + 1):  # in turns, so that both have the machine at the same times
        plain.append(timed(lambda: [discard(file) for file in files]))
        ours.append(timed(lambda: convert.read_params(path, config)))
    seconds, processor = (statistics.median(column) for column in zip(*ours[1:], strict=True))
    return {
        "stored": stored,
        "parameters": params,
        "gigabytes": size / 1e9,
        "plain_gigabytes_a_second": size / 1e9 / statistics.median(wall for wall, _ in plain[1:]),
        "gigabytes_a_second": size / 1e9 / seconds,
        "seconds": seconds,
        "processor_seconds": processor,
        "first_seconds": ours[0][0],
    }


def discard(file: Path) -> None:
    buffer = bytearray(1 << 20)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def timed(run) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
