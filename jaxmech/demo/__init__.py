"""The demo pair, two small trained models that ship with the package; MODEL_CARD.md says what they are."""

from importlib import resources
from pathlib import Path


def path(name: str) -> Path:
    """Path of a file or folder of the demo.

    Args:
      name: "base", "tuned", "chain.toml" or "MODEL_CARD.md".

    Raises:
      FileNotFoundError: there is none of that name.
    """
    found = Path(str(resources.files(__name__))) / name
    if not found.exists():
        raise FileNotFoundError(f"The demo has no {name!r}; it has base, tuned, chain.toml and MODEL_CARD.md.")
    return found
