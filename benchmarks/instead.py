"""Runs jaxmech without computing anything: something else takes the place of its compiled functions."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

import jaxmech as jm


@contextmanager
def instead_of_compiled(replacement: Callable[[str, Any], Callable[..., Any]]) -> Iterator[None]:
    """Within, the jit-compiled functions of jaxmech's modules are replaced.

    Args:
      replacement: from the name of a function, and the function, to what is called in its place.
    """
    replaced = []
    for module in [module for name, module in sys.modules.items() if name.startswith("jaxmech.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, jax.stages.Wrapped):
                replaced.append((module, name, value))
                setattr(module, name, replacement(name, value))
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def abstract(x: Any, sharding: Any = None) -> Any:
    """Shape and dtype of an argument; configs, which are static, as they are."""
    if isinstance(x, jm.Config):
        return x
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(dtype), sharding=sharding)
