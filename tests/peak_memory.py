"""Reads checkpoints and prints, as JSON lines, how much memory that took beside the parameters, in bytes.

Run as a process of its own, `python tests/peak_memory.py DIR DTYPE [DIR DTYPE ...]`: what a process once had at most
includes all it did before.
"""

import gc
import json
import sys
from pathlib import Path

import jax

import convert


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, memory in use, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measured(path: Path, dtype: str) -> dict[str, int]:
    """Reads the checkpoint at `path`: size of the parameters, of the largest of them, and the peak beside them."""
    config = convert.read_config(path, param_dtype=dtype)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    sizes = [x.nbytes for x in jax.tree.leaves(convert.read_params(path, config))]
    return {"params": sum(sizes), "stacked": max(sizes), "beside": memory("VmHWM") - before - sum(sizes)}


if __name__ == "__main__":
    small, *arguments = sys.argv[1:]
    for path in small.split(","):  # imports what it needs and starts JAX, which is not to be counted
        measured(Path(path), "float32")
    for path, dtype in zip(arguments[::2], arguments[1::2], strict=True):
        print(json.dumps(measured(Path(path), dtype)), flush=True)
