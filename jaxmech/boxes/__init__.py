"""The entity-tracking task of the paper: objects in labelled boxes, and a question about one box.

`make`, `read` and `write` handle examples as text; `pairs` and `desideratum` (`triples` for several) turn them into
tokens with a tokenizer. No method of jaxmech knows about boxes; this package is one way to make `jaxmech.Pairs`.
"""

from jaxmech.boxes.desiderata import DESIDERATA, POSITION_VARIANTS, Desideratum, check_desideratum, desideratum, triples
from jaxmech.boxes.objects import OBJECTS
from jaxmech.boxes.prompts import ROLES, pairs
from jaxmech.boxes.scenes import Example, Scene, make, read, write

__all__ = [
    "DESIDERATA",
    "OBJECTS",
    "POSITION_VARIANTS",
    "ROLES",
    "Desideratum",
    "Example",
    "Scene",
    "check_desideratum",
    "desideratum",
    "make",
    "pairs",
    "read",
    "triples",
    "write",
]
