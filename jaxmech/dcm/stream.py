"""The forward pass of DCM: base prompts whose heads are patched by a mask, on the causal cone of the group's roles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmech.cone import CleanCache, Cone, HeadPatch, live_stream
from jaxmech.config import Config
from jaxmech.dcm.prompts import Base
from jaxmech.dcm.targets import Targets
from jaxmech.model import Params
from jaxmech.suffixes import Suffixes


class StepExamples(NamedTuple):
    """Some examples."""

    base: Base
    targets: Targets


def patched_stream(
    config: Config, weights: Params, examples: StepExamples, weight: jax.Array, first_layer: int, capacity: int
) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], with every head patched by its weight [L, U, N].

    Args:
      capacity: see `jaxmech.dcm.prompts.suffix_capacity`.
    """
    base = examples.base
    count, width, _ = base.resid_pre.shape
    suffixes = Suffixes.packed(base.p, base.last, capacity=capacity, width=width, prefix=base.k.shape[3])
    resid_pre = base.resid_pre.reshape(count * width, -1)
    if capacity < count * width:
        resid_pre = resid_pre[suffixes.unpacked]
    below = base.k.shape[1] - len(weight)
    k, v, z = (jnp.moveaxis(x, 1, 0) for x in (base.k[:, below:], base.v[:, below:], examples.targets.z))
    clean = CleanCache(resid_pre=resid_pre[None], k=k, v=v, first_layer=first_layer)  # of that layer: no other is read
    cone = Cone(config, weights, clean, suffixes)
    return live_stream(cone, {"z": HeadPatch(weight, z)}, first_layer)
