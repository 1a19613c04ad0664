"""Reads checkpoints, saves one, and prints, as JSON lines, how much memory that took beside the parameters, in bytes.

Run as a process of its own, `python tests/peak_memory.py SMALL DIR [DIR ...]`: what a process once had at most includes
all it did before. The SMALL checkpoints, separated by commas, are only there to import what is needed. The first DIR is
the one that is saved, at the end, as memory that a save has let go may stay with the process and hide what comes after.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import jax

import convert
import jaxmech as jm


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, memory in use, or VmHWM, the most since `start`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def start() -> int:
    """The memory in use, of which VmHWM is now the most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def read(path: Path) -> tuple[Any, dict[str, int]]:
    """The parameters in float32; their size, that of the largest, and the peak beside them."""
    config, before = convert.read_config(path), start()
    params = convert.read_params(path, config)
    beside = memory("VmHWM") - before
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    return params, {"params": sum(sizes), "stacked": max(sizes), "reading": beside - sum(sizes)}


def save(path: Path, params: Any) -> int:
    """Writes them to a folder in `path`; the peak beside them."""
    before = start()
    jm.checkpoint.save(path / "saved", convert.read_config(path), params)
    return memory("VmHWM") - before


if __name__ == "__main__":
    small, *large = sys.argv[1:]
    for path in map(Path, small.split(",")):  # imports what it needs and starts JAX, which is not to be counted
        save(path, read(path)[0])
    for path in map(Path, large):
        print(json.dumps(read(path)[1]), flush=True)
    params, found = read(Path(large[0]))
    print(json.dumps(found | {"saving": save(Path(large[0]), params)}))
