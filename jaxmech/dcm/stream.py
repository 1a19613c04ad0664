"""The forward pass of DCM: base prompts whose heads are patched by a mask, on the causal cone of the group's role."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.cone import CleanCache, Cone, HeadPatch, live_start, live_stream
from jaxmech.config import Config
from jaxmech.dcm.prompts import Base
from jaxmech.dcm.targets import Targets
from jaxmech.interventions import head_mask
from jaxmech.model import Params
from jaxmech.suffixes import Suffixes

Heads = Sequence[Sequence[int]]


class StepExamples(NamedTuple):
    """Some examples."""

    base: Base
    targets: Targets


def patched_stream(
    config: Config, weights: Params, examples: StepExamples, weight: jax.Array, first_layer: int
) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], with every head patched by its weight [L, N]."""
    base = examples.base
    count, width, _ = base.resid_pre.shape
    suffixes = Suffixes.padded(base.p, base.last, width=width, prefix=base.k.shape[3])
    resid_pre = base.resid_pre.reshape(1, count * width, -1)  # of the first layer alone: no other is read
    k, v, z = (jnp.moveaxis(x, 1, 0) for x in (base.k, base.v, examples.targets.z))
    cone = Cone(config, weights, CleanCache(resid_pre=resid_pre, k=k, v=v, first_layer=first_layer), suffixes)
    return live_stream(cone, {"z": HeadPatch(weight, z[:, :, None])}, first_layer)


def first_layer_of(config: Config, heads: Heads) -> int:
    """The first layer that is run where `heads` are patched."""
    return int(live_start(config, min(int(layer) for layer, _ in heads)))


def members(config: Config, heads: Heads, first_layer: int) -> np.ndarray:
    """The heads from `first_layer` on as bool [L, N]."""
    return head_mask(config, heads)[first_layer:]


def check_heads(config: Config, heads: Heads) -> list[tuple[int, int]]:
    """The heads, each once; ValueError for others."""
    heads = list(heads)
    head_mask(config, heads)
    chosen = [(int(layer), int(head)) for layer, head in heads]
    if twice := [head for head in chosen if chosen.count(head) > 1]:
        raise ValueError(f"Head {twice[0]} is named twice in a group of DCM.")
    return chosen
