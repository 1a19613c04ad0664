"""Where the parameters of a checkpoint come from: the model as it was given, hashes of its files, versions, a date.

`convert` says what the source is, and `jaxmech.checkpoint` stores it.
"""

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jaxmech", "jax", "orbax-checkpoint", "transformers")
PIECE = 2**22  # bytes hashed at a time
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Provenance:
    """Where the parameters of a checkpoint come from.

    Attributes:
      source: directory or hub id of the model, as it was given; "" where nobody said.
      adapter: likewise of an adapter that was merged into it.
      files: sha256, in hexadecimal, of each file that was read, by name.
      versions: of the packages that wrote the checkpoint.
      date: when it was written, ISO 8601, UTC.
    """

    source: str = ""
    adapter: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def signed(self) -> "Provenance":
        """A copy with the versions that are installed, and with the present as its date."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return dataclasses.replace(self, versions=versions(PACKAGES), date=now)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `Provenance(**values)` reads it back."""
        return dataclasses.asdict(self)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions; "unknown" for a package that is not installed, such as this one run from its sources."""
    found = dict.fromkeys(packages, "unknown")
    for name in found:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextmanager
def hashing(files: Mapping[str, Path], progress: Progress | None = None) -> Iterator[Future[dict[str, str]]]:
    """Computes the sha256 of every file in a thread, while the body of the `with` does something else.

    Args:
      files: name -> path.
      progress: called in that thread with (bytes hashed, bytes in all).

    Yields:
      A future of {name: sha256}. The body waits for its result; if it ends before, by an error, hashing ends too.
    """
    left = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield pool.submit(_hashes, files, progress, left)
        finally:
            left.set()


def _hashes(files: Mapping[str, Path], progress: Progress | None, left: threading.Event) -> dict[str, str]:
    total, done, found = sum(path.stat().st_size for path in files.values()), 0, {}
    for name, path in files.items():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not left.is_set() and (piece := file.read(PIECE)):
                digest.update(piece)  # releases the GIL
                done += len(piece)
                if progress:
                    progress(done, total)
        if left.is_set():
            raise CancelledError
        found[name] = digest.hexdigest()
    return found
