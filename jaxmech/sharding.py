"""Where parameters lie on several devices: which axis of each is split over the mesh axis "model".

Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): heads, the MLP's hidden units and the vocabulary are split,
so that a device computes its part of every layer, and the parts of `o` and `down` are summed. The rest of the library
knows no devices: XLA splits whatever is jitted on parameters that lie so.

Owns the table of axes, in the letters of `jaxmech.model`, and the mesh. What is read, and when, is for `convert` and
`jaxmech.checkpoint` to say.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmech.config import Config
from jaxmech.model import parameter_shapes

AXIS = "model"  # of the mesh
SPLIT = frozenset("NKFV")  # axes that are split over it; a parameter has one of them at most
AXES = {
    "embed": "V D",
    "unembed": "D V",
    "final_norm": "D",
    "attn_norm": "L D",
    "attn_post_norm": "L D",
    "mlp_norm": "L D",
    "mlp_post_norm": "L D",
    "q": "L D N H",
    "k": "L D K H",
    "v": "L D K H",
    "o": "L N H D",
    "q_bias": "L N H",
    "k_bias": "L K H",
    "v_bias": "L K H",
    "o_bias": "L D",
    "q_norm": "L N H",  # of all heads together; that of each head has no axis of heads
    "k_norm": "L K H",
    "gate": "L D F",
    "up": "L D F",
    "down": "L F D",
    "gate_bias": "L F",
    "up_bias": "L F",
    "down_bias": "L D",
}


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, "model", over `devices` (of `jax.devices()`, all by default); XLA propagates its splits."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def parameter_shardings(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter, a tree like `Model.weights`.

    An axis whose size the mesh axis does not divide, such as few kv heads over many devices, is not split: every device
    holds all of it. Over other axes of the mesh all parameters are repeated.

    Raises:
      ValueError: the mesh has no axis "model", or one that XLA does not propagate.
    """
    _check_mesh(mesh)

    def sharding(path: tuple[Any, ...], shape: tuple[int, ...]) -> NamedSharding:
        axes = parameter_axes(config, path[-1].key)
        split = [a in SPLIT and n % mesh.shape[AXIS] == 0 for a, n in zip(axes, shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*(AXIS if here else None for here in split)))

    return jax.tree_util.tree_map_with_path(sharding, parameter_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def parameter_axes(config: Config, name: str) -> tuple[str, ...]:
    """The letter of each axis of the parameter `name`."""
    axes = AXES[name].split()
    return (axes[0], axes[-1]) if config.qk_norm == "head" and name in ("q_norm", "k_norm") else tuple(axes)


def _check_mesh(mesh: Mesh) -> None:
    if AXIS not in mesh.axis_names:
        raise ValueError(
            f"The mesh has the axes {', '.join(map(repr, mesh.axis_names))}; expected one named {AXIS!r}, over which "
            "parameters are split. Make it with jaxmech.make_mesh()."
        )
    if others := {str(kind) for kind in mesh.axis_types if kind != AxisType.Auto}:
        raise ValueError(
            f"The mesh has axes of type {', '.join(sorted(others))}; expected Auto. Make it with jaxmech.make_mesh(), "
            "or give axis_types to jax.make_mesh, whose default is another one."
        )
