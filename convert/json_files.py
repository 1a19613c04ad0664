"""Files that hold one JSON object of fields, such as config.json: reading them, and refusing what nobody knows."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

Fields = Mapping[str, Any]


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of the JSON object in `file`. ValueError if it holds anything else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy or download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds {type(fields).__name__} {fields!r}; expected a JSON object.")
    return fields


def refuse_unknown(fields: Fields, known: Collection[str], *, what: str = "model") -> None:
    """ValueError names the fields that are not among the known ones; `what` they might change."""
    if unknown := sorted(fields.keys() - set(known)):
        raise ValueError(
            f"unknown fields {', '.join(f'{name}={fields[name]!r}' for name in unknown)}. They might change what the "
            f"{what} computes, so they are refused; remove those that do not."
        )


def positive_integer(fields: Fields, name: str, default: int | None = None) -> int:
    """The positive integer at `name`, or the default if it is absent or null."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise ValueError(f"field {name!r} is missing and has no safe default; copy the model's original config.json.")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; expected a positive integer.")
    return value


def positive_number(fields: Fields, name: str) -> float:
    """The positive number at `name`."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name}={value!r}; expected a positive number.")
    return value
