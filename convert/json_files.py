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
