"""Where a device's time goes in a trace of JAX's profiler: seconds of each kind of kernel, and the longest ones.

Knows nothing of the library. A kernel is an event that XLA gives the name of its operation and that contains no other;
its kind is guessed from the names that XLA, cuBLAS and cuDNN give their kernels.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

KINDS = {  # in this order: what the first pattern is found in
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|dot|ynn|convolution",
    "copies": r"memcpy|memset|copy|transpose|slice|concatenate|gather|scatter|pad|bitcast",
}
OTHER = "element-wise and reductions"


class Kernel(NamedTuple):
    """One run of a kernel."""

    module: str  # the jitted function
    operation: str  # of the compiled program
    name: str  # of the kernel
    start: float  # nanoseconds
    seconds: float


def summary(trace: Path, longest: int = 8) -> dict[str, Any]:
    """What the kernels of each jitted function took.

    Args:
      trace: folder that `jax.profiler.trace` wrote.

    Returns:
      For each function: `seconds` from its first kernel to the end of its last, `busy` in kernels (of a CPU, of all its
      threads together), `kinds` {kind: seconds}, and the `longest` operations as (operation, kernel, seconds, runs).

    Raises:
      ValueError: no kernels in the trace.
    """
    modules: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels(trace):
        modules[kernel.module].append(kernel)
    if not modules:
        raise ValueError(f"{trace} has no kernels of jitted functions.")
    return {module: _module(found, longest) for module, found in modules.items()}


def kernels(trace: Path) -> Iterator[Kernel]:
    """All runs of kernels, from devices if the trace has any, else from the host."""
    for path in sorted(trace.rglob("*.xplane.pb")):
        planes = list(ProfileData.from_file(str(path)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            for line in plane.lines:
                yield from _line(line)


def kind(kernel: Kernel) -> str:
    """One of KINDS, or OTHER."""
    names = f"{kernel.operation} {kernel.name}".lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, names)), OTHER)


def _line(line: Any) -> Iterator[Kernel]:
    """The kernels of a stream or thread: events with an operation that no other such event lies in."""
    events = []
    for event in line.events:
        stats = {str(name): value for name, value in event.stats}
        if "hlo_op" in stats and event.duration_ns > 0:
            events.append((event.start_ns, -event.duration_ns, event.name, stats))
    events.sort(key=lambda event: event[:2])
    for i, (start, minus, name, stats) in enumerate(events):
        if i + 1 == len(events) or events[i + 1][0] >= start - minus:
            yield Kernel(str(stats.get("hlo_module", "")), str(stats["hlo_op"]), name, start, -minus / 1e9)


def _module(found: list[Kernel], longest: int) -> dict[str, Any]:
    kinds: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in found:
        kinds[kind(kernel)] += kernel.seconds
        operations[kernel.operation, kernel.name].append(kernel.seconds)
    order = sorted(operations.items(), key=lambda item: -sum(item[1]))[:longest]
    end = max(kernel.start + 1e9 * kernel.seconds for kernel in found)
    return {
        "seconds": (end - min(kernel.start for kernel in found)) / 1e9,
        "busy": sum(kinds.values()),
        "kinds": dict(kinds),
        "longest": [(*names, sum(times), len(times)) for names, times in order],
    }
