"""Reading JSONL, one record a line, with errors that name the file and the line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def read_json_lines(path: str | Path, parse: Callable[[Any, str], Record], of: str) -> list[Record]:
    """What `parse` makes of each line; lines of white space are left out.

    Args:
      path: the file, in UTF-8, with a byte order mark or without.
      parse: a function from a line's JSON value and its place, "FILE, line 3", that raises ValueError for a value that
        it does not take.
      of: what the file holds, for errors: "examples".

    Raises:
      FileNotFoundError: no such file.
      IsADirectoryError: `path` is a folder.
      ValueError: it is no text or holds no records; or the file, the line and what `parse` said of it.
    """
    path, found = Path(path), []
    for number, line in enumerate(_lines(path, of), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            found.append(parse(_value(line), place))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no {of}; expected one JSON object a line.")
    return found


def _lines(path: Path, of: str) -> list[str]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a JSONL file of {of}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}; expected a JSONL file of {of}.")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would split at what JSON strings may hold
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); expected JSONL, one JSON object a line.") from error


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); expected one object a line.") from error
