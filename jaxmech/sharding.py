"""What lies where on several devices: a mesh of two axes, "rows" and "model".

Over "model", parameters are split (tensor parallelism, Shoeybi et al. 2019, arXiv:1909.08053): heads, the MLP's hidden
units and the vocabulary, so that a device computes its part of every layer, and the parts of `o` and `down` are summed.
Over "rows", parameters are repeated and the rows of a call are split: senders, heads, circuits, first layers or
trainings, whatever a method vmaps over, and the prompts of full forward passes. Rows need nothing of each other, so no
device waits for another.

The rest of the library knows no devices but for `row_devices` and `over_rows`: XLA splits whatever is jitted on arrays
that lie so. Owns the table of axes, in the letters of `jaxmech.model`, and the mesh. What is read, and when, is for
`convert` and `jaxmech.checkpoint` to say.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmech.config import Config
from jaxmech.model import parameter_shapes

AXIS = "model"  # of the mesh
ROWS = "rows"  # and its other one
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


def make_mesh(devices: Sequence[Any] | None = None, *, rows: int = 1) -> Mesh:
    """A mesh with the axes "rows" and "model" over `devices` (of `jax.devices()`, all by default).

    Args:
      rows: copies of the model, which share the rows of every call; each is split over len(devices) / rows devices.
        A model that fits on one device is fastest with as many copies as devices.

    Raises:
      ValueError: the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    if rows < 1 or len(devices) % rows:
        raise ValueError(f"rows={rows}, but there are {len(devices)} devices; expected a divisor of that.")
    shape, auto = (rows, len(devices) // rows), AxisType.Auto  # XLA propagates the splits
    return jax.make_mesh(shape, (ROWS, AXIS), axis_types=(auto, auto), devices=devices)


def parameter_shardings(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter, a tree like `Model.weights`.

    An axis whose size the mesh axis does not divide, such as few kv heads over many devices, is not split: every device
    holds all of it. Over other axes of the mesh all parameters are repeated.

    Args:
      config: that of the model, which says which parameters there are.
      mesh: the devices, such as `make_mesh` returns.

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


def row_devices(weights: Any) -> int:
    """How many copies of the parameters `weights` share the rows of a call."""
    mesh = _mesh(weights)
    return mesh.shape.get(ROWS, 1) if mesh else 1


def over_rows(weights: Any, rows: Any) -> Any:
    """The arrays of a tree `rows`, each with a leading axis of rows, split over the copies of `weights`.

    They are left alone where there is one copy, or where copies do not divide the rows.
    """
    count = row_devices(weights)
    if count == 1 or any(len(x) % count for x in jax.tree.leaves(rows)):
        return rows
    return jax.device_put(rows, NamedSharding(_mesh(weights), PartitionSpec(ROWS)))


def devices_of(weights: Any) -> list[Any]:
    """The devices of this process that hold the parameters `weights`; none where they are NumPy arrays or shapes."""
    found = getattr(weights["final_norm"], "sharding", None)
    return sorted(found.addressable_devices, key=lambda device: device.id) if found else []


def on_devices_of(weights: Any, values: Any) -> Any:
    """The arrays of a tree where `weights` are, each of their devices with all of them; those that are, unchanged."""
    devices = set(devices_of(weights))

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not devices or x.sharding.device_set == devices:
            return x
        mesh = _mesh(weights)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()) if mesh else next(iter(devices)))

    return jax.tree.map(place, values)


def _mesh(weights: Any) -> Any:
    return getattr(getattr(weights["final_norm"], "sharding", None), "mesh", None)


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
