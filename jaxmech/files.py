"""Writing files: whole or not at all, so that an interruption never leaves half of one; and whether it is possible."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to; renames it to `path` at the end, or removes it on an error.

    Makes the folder if it is not there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | Path) -> None:
    """Checks that files can be written to the folder `path`, which need not be there yet.

    Raises:
      NotADirectoryError: it, or a folder that it lies in, is a file.
      PermissionError: it may not be written to.
    """
    path = Path(path)
    there = next((place for place in (path, *path.parents) if place.exists()), Path("."))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; expected a folder, new or of an earlier run. Choose another.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {there} may not be written to; choose another, or change its permissions.")


def check_file(path: str | Path) -> None:
    """Checks that the file `path` can be written. Raises as `check_folder` does, and IsADirectoryError for a folder."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file, which may be new.")
    check_folder(Path(path).parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
