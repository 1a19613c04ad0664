"""The forward pass of DCM: base prompts whose heads are patched by a mask, on the causal cone of the group's role."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import cone
from jaxmech.config import Config
from jaxmech.dcm.prompts import Base
from jaxmech.dcm.targets import Targets
from jaxmech.interventions import head_mask
from jaxmech.model import Params
from jaxmech.suffixes import Suffixes

Heads = Sequence[Sequence[int]]


class Batch(NamedTuple):
    """Some examples."""

    base: Base
    targets: Targets


def patched_stream(config: Config, weights: Params, batch: Batch, weight: jax.Array, first: int) -> jax.Array:
    """resid_post of the last layer at `last`, [B, D], with every head patched by its weight [L, N]."""
    base = batch.base
    count, width, _ = base.resid_pre.shape
    suffixes = Suffixes.padded(base.p, base.last, width=width, prefix=base.k.shape[3])
    resid_pre = base.resid_pre.reshape(1, count * width, -1)  # of the first layer alone: no other is read
    k, v, z = (jnp.moveaxis(x, 1, 0) for x in (base.k, base.v, batch.targets.z))
    clean = cone.CleanCache(resid_pre=resid_pre, k=k, v=v, first=first)
    patches = {"z": cone.HeadPatch(weight, z)}
    return cone.live_stream(config, weights, clean, suffixes, patches, first)


def first_layer(config: Config, heads: Heads) -> int:
    """The lowest layer of `heads`, or the last but one, where a live stream starts at the latest."""
    return min(min(layer for layer, _ in heads), max(0, config.num_layers - 2))


def members(config: Config, heads: Heads, first: int) -> np.ndarray:
    """The heads from layer `first` on as bool [L, N]."""
    return head_mask(config, heads)[first:]


def check_heads(config: Config, heads: Heads) -> list[tuple[int, int]]:
    """The heads, each once; ValueError for others."""
    heads = list(heads)
    head_mask(config, heads)
    chosen = [(int(layer), int(head)) for layer, head in heads]
    if twice := [head for head in chosen if chosen.count(head) > 1]:
        raise ValueError(f"Head {twice[0]} is named twice in a group of DCM.")
    return chosen
