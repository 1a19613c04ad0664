"""What a mask is over: heads at a role, heads at several roles together, or at each role its own heads.

Axes as in `jaxmech.dcm`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmech.circuits import Circuit, Head, HeadsByRole, as_heads_by_role
from jaxmech.cone import live_start
from jaxmech.config import Config
from jaxmech.interventions import head_mask
from jaxmech.pairs import Pairs, one_or_more, positions_of
from jaxmech.patching import clashing_roles

Heads = Sequence[Sequence[int]]
Group = Heads | HeadsByRole
Listed = list[Any] | dict[str, list[Any]]  # a group as lists, see `as_group`
Role = str | Sequence[str]


class PatchedRoles(NamedTuple):
    """The roles at which the groups of a call are patched."""

    roles: tuple[str, ...]  # R
    mask_per_role: bool  # not one mask for all of them

    @property
    def units(self) -> int:
        """U."""
        return len(self.roles) if self.mask_per_role else 1


class Masked(NamedTuple):
    """The n heads of a mask, and where each of its numbers is in [L, U, N]."""

    heads: list[Head]
    roles: list[tuple[str, ...]]  # at which each is patched
    layer: np.ndarray  # [n], of the model's
    unit: np.ndarray  # [n], which of U
    head: np.ndarray  # [n]

    def within(self, first_layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices into a mask [L, U, N] whose layers begin at `first_layer`."""
        return self.layer - first_layer, self.unit, self.head


def as_group(group: Group) -> Listed:
    """The group as lists: of its heads or, if each role has its own, {role: heads} without roles that have none.

    Raises:
      TypeError: it is neither.
    """
    if not isinstance(group, Mapping | Circuit):
        if not isinstance(group, Iterable):
            raise TypeError(f"heads={group!r}; expected a list of (layer, head), {{role: heads}} or a Circuit.")
        return list(group)
    found = {role: list(heads) for role, heads in as_heads_by_role(group).items()}
    return {role: heads for role, heads in found.items() if heads}


def patched_roles(groups: Iterable[Listed], role: Role) -> PatchedRoles:
    """The roles at which any of the groups is patched: `role`, or those that they name.

    Raises:
      ValueError: no role, one that is named twice, or groups of both kinds.
    """
    groups = list(groups)
    by_role = [group for group in groups if isinstance(group, dict)]
    if by_role and len(by_role) < len(groups):
        raise ValueError("Some groups are lists of heads, others {role: heads}; expected one kind.")
    if by_role:
        return PatchedRoles(tuple(dict.fromkeys(role for group in by_role for role in group)), mask_per_role=True)
    roles = one_or_more(role, "role")
    if len(set(roles)) < len(roles):
        raise ValueError(f"role={role!r} names a role twice.")
    return PatchedRoles(tuple(roles), mask_per_role=False)


def masked(config: Config, group: Listed, roles: Sequence[str]) -> Masked:
    """The heads of a group; `roles` are those of its call.

    Raises:
      ValueError: no heads, one that does not exist or is named twice at a role.
    """
    if isinstance(group, dict):
        by_role = {role: _check(config, heads) for role, heads in group.items()}
        found = [(head, (role,), roles.index(role)) for role, heads in by_role.items() for head in heads]
    else:
        found = [(head, tuple(roles), 0) for head in _check(config, group)]
    heads, at, unit = (list(x) for x in zip(*found, strict=True))
    layer, number = np.array(heads).T
    return Masked(heads, at, layer, np.array(unit), number)


def _check(config: Config, heads: list[Any]) -> list[Head]:
    head_mask(config, heads)
    chosen = [(int(layer), int(head)) for layer, head in heads]
    if twice := [head for head in chosen if chosen.count(head) > 1]:
        raise ValueError(f"Head {twice[0]} is named twice in a group of DCM.")
    return chosen


def first_layer_of(config: Config, groups: Iterable[Masked]) -> int:
    """The first layer that is run where the heads of `groups` are patched."""
    return int(live_start(config, min(int(group.layer.min()) for group in groups)))


def check_roles(pairs: Pairs, patched: PatchedRoles) -> None:
    """ValueError if one token would need the masks of two roles, or take the values of two tokens."""
    roles = patched.roles
    clean, corrupt = (positions_of(position, roles) for position in (pairs.position, pairs.corrupt_position))
    if patched.mask_per_role:
        corrupt = np.broadcast_to(np.arange(len(roles)), clean.shape)  # any two roles differ
    for i, j, row in clashing_roles(clean, corrupt):
        clash = "would need the masks of both" if patched.mask_per_role else "would take the values of two"
        raise ValueError(
            f"In example {row}, {roles[i]!r} and {roles[j]!r} are one token of the clean prompt ({clean[row, i]}), "
            f"which {clash}. Leave such examples out, or one of the roles."
        )
