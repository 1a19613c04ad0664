"""`Circuit`: groups of heads that act at roles, in files and as the masks that kernels take.

Every method that patches or ablates heads takes a circuit, or its heads alone: {role: [(layer, head)]}.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.chain import PAPER_CHAIN, Stage, read_chain
from jaxmech.config import Config
from jaxmech.files import write_text
from jaxmech.interventions import head_mask
from jaxmech.scores import PathScores

Head = tuple[int, int]  # (layer, head)
_PAPER_ROLES = {stage.group: stage.sender for stage in PAPER_CHAIN}


@dataclass(frozen=True, repr=False)
class Circuit:
    """Groups of heads, each acting at one role. Circuits are equal if their groups and roles are.

    Attributes:
      groups: group name -> [(layer, head)], strongest first; sequences and arrays of whole numbers are taken as well.
        `discover` puts a head that it finds several times at one role into the last group alone.
      roles: group name -> role.
      scores: group name -> the sweep that found it; empty for a circuit that was read from a file.
      stopped: why the chain ended early, or "".

    Raises:
      ValueError: groups and roles do not name the same, or something is no head or is twice in a group.
    """

    groups: dict[str, list[Head]]
    roles: dict[str, str]
    scores: dict[str, PathScores] = field(default_factory=dict, compare=False)
    stopped: str = field(default="", compare=False)

    def __post_init__(self):
        if missing := [group for group in self.groups if group not in self.roles]:
            raise ValueError(f"Circuit: roles says nothing of the groups {missing}; expected {{group: role}} for each.")
        if unknown := [group for group in self.roles if group not in self.groups]:
            raise ValueError(f"Circuit: roles names {unknown}; the groups are {list(self.groups)}. One may be empty.")
        object.__setattr__(self, "groups", {group: _heads(group, heads) for group, heads in self.groups.items()})

    def __repr__(self) -> str:
        groups = [f"{group}: {len(heads)} at {self.roles[group]}" for group, heads in self.groups.items()]
        return f"Circuit({', '.join(groups)}{'; stopped early' if self.stopped else ''})"

    @property
    def heads_by_role(self) -> dict[str, list[Head]]:
        """The heads that act at each role, {role: [(layer, head)]}, in the order of the groups."""
        by_role: dict[str, list[Head]] = {role: [] for role in self.roles.values()}
        for group, heads in self.groups.items():
            by_role[self.roles[group]] += [head for head in heads if head not in by_role[self.roles[group]]]
        return by_role

    def without(self, subset: Mapping[str, Sequence[Head]]) -> "Circuit":
        """The circuit without the heads of `subset`, {group: heads}; its groups and roles stay, empty or not.

        Raises:
          ValueError: `subset` names a group that the circuit has not.
        """
        if unknown := [group for group in subset if group not in self.groups]:
            raise ValueError(f"Unknown groups {unknown}; the circuit has {list(self.groups)}.")
        gone = {group: {tuple(head) for head in heads} for group, heads in subset.items()}
        left = {
            group: [head for head in heads if head not in gone.get(group, ())] for group, heads in self.groups.items()
        }
        return Circuit(left, self.roles)

    def save(self, path: str | Path, *, roles: bool | None = None) -> None:
        """Writes JSON to `path`, which is replaced only when it is whole. `load` reads both forms.

        Args:
          path: the file.
          roles: False writes what the paper's code reads, {group: [[layer, head], ...]}, which does not say where a
            group acts. True writes {"groups": that, "roles": {group: role}}. None: the former if all groups are the
            paper's and act where its chain has them, so that `load` needs nothing else; else the latter.
        """
        if roles is None:
            roles = not self.roles.items() <= _PAPER_ROLES.items()
        found: dict[str, Any] = {group: [list(head) for head in heads] for group, heads in self.groups.items()}
        write_text(path, json.dumps({"groups": found, "roles": self.roles} if roles else found) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        chain: Sequence[Stage] | str | Path | None = None,
        *,
        roles: Mapping[str, str] | None = None,
    ) -> "Circuit":
        """Reads a file of either form that `save` writes.

        The paper's form, which `jaxmech discover` writes, does not say where a group acts: `roles` does, or `chain`,
        the paper's four stages by default.

        Args:
          path: the file.
          chain: stages, or the TOML file of a chain (see `read_chain`), whose groups the file has.
          roles: {group: role}, in place of a chain.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not JSON of either form, a group of which neither the file nor `roles` or `chain` says where it
            acts, roles that are not those of the file, or roles as well as a chain.
        """
        path = Path(path)
        try:
            groups, own = _read(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(
                f'{path} is not a circuit file, {{group: [[layer, head], ...]}} or {{"groups": that, "roles": {{group: '
                f"role}}}}: {error}"
            ) from error
        given = _given_roles(chain, roles)
        if own is None:
            known = given or _PAPER_ROLES
            if unknown := [group for group in groups if group not in known]:
                all_known = _roles_beside(path) | dict(known)
                example = {group: all_known.get(group, "...") for group in groups}
                raise ValueError(
                    f"{path} has groups {unknown}, but roles are known of {list(known)}; give the chain that found "
                    f"them, stages or a TOML file, or the roles: Circuit.load({str(path)!r}, roles={example})."
                )
            own = {group: known[group] for group in groups}
        elif given and (other := {group: given.get(group) for group in own if given.get(group) != own[group]}):
            raise ValueError(f"{path} says that groups act at {own}; the roles given differ: {other}.")
        return cls(groups, own)


HeadsByRole = Circuit | Mapping[str, Iterable[Sequence[int]]]


def role_masks(config: Config, heads_by_role: HeadsByRole) -> tuple[list[str], np.ndarray]:
    """The roles and their heads, bool [L, R, N]; a role may have none.

    Raises:
      ValueError: a head does not exist, or there is none.
    """
    heads = {role: list(chosen) for role, chosen in as_heads_by_role(heads_by_role).items()}
    if not any(heads.values()):
        raise ValueError("heads_by_role names no heads: a patch that selects nothing is an error.")
    none = np.zeros((config.num_layers, config.num_heads), bool)
    return list(heads), np.stack([head_mask(config, x) if x else none for x in heads.values()], axis=1)


def as_heads_by_role(circuit: HeadsByRole) -> Mapping[str, Iterable[Sequence[int]]]:
    """{role: heads} of a `Circuit`, or of such a mapping itself.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(circuit, Circuit):
        return circuit.heads_by_role
    if not isinstance(circuit, Mapping):
        raise TypeError(f"Found {circuit!r}; expected a Circuit, or its heads as {{role: [(layer, head)]}}.")
    return circuit


def overlap(circuit: Circuit, reference: Circuit) -> dict[str, tuple[float, float]]:
    """Precision and recall of `circuit` against `reference`, group by group of both: {group: (precision, recall)}.

    Precision is the share of the circuit's heads that the reference has in the same group, recall the share of the
    reference's that the circuit has; nan where a group is empty.
    """
    found = {}
    for group in [group for group in circuit.groups if group in reference.groups]:
        ours, theirs = set(map(tuple, circuit.groups[group])), set(map(tuple, reference.groups[group]))
        common = len(ours & theirs)
        found[group] = tuple(common / len(x) if x else math.nan for x in (ours, theirs))
    return found


def _read(found: Any) -> tuple[dict[str, list[Head]], dict[str, str] | None]:
    """Groups and roles, None where the JSON does not say, of either form."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    roles = None
    if set(found) == {"groups", "roles"} and all(isinstance(value, dict) for value in found.values()):
        found, roles = found["groups"], found["roles"]
        if set(found) != set(roles) or not all(isinstance(role, str) for role in roles.values()):
            raise ValueError(f"roles is {roles}; expected one for each of {list(found)}")
    return {group: _heads(group, heads) for group, heads in found.items()}, roles


def _roles_beside(path: Path) -> dict[str, str]:
    """{group: role} by the settings of the run that wrote `path`, which `jaxmech discover` keeps beside it, if any."""
    try:
        stages = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["stages"]
        return {stage["group"]: stage["sender"] for stage in stages}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _given_roles(chain: Sequence[Stage] | str | Path | None, roles: Mapping[str, str] | None) -> Mapping[str, str]:
    """{group: role} by a chain or as they are; empty if neither is given."""
    if chain is None:
        return roles or {}
    if roles is not None:
        raise ValueError("Circuit.load: chain and roles are given; expected one of them.")
    chain = read_chain(chain) if isinstance(chain, str | Path) else chain
    return {stage.group: stage.sender for stage in chain}


def _heads(group: str, heads: Any) -> list[Head]:
    """The heads of a group as tuples of Python's numbers.

    Raises:
      ValueError: something else than (layer, head), or a head that is there twice.
    """
    form = f"Circuit: group {group!r} holds {{}}; expected a list of (layer, head), whole numbers from 0 on."
    if isinstance(heads, str | Mapping) or not isinstance(heads, Iterable):
        raise ValueError(form.format(repr(heads)))
    found: list[Head] = []
    for value in heads:
        pair = tuple(value) if isinstance(value, Iterable) else ()
        whole = [int(x) for x in pair if isinstance(x, Integral) and not isinstance(x, bool)]
        if len(pair) != 2 or len(whole) != 2 or min(whole) < 0:
            raise ValueError(form.format(repr(value)))
        found.append((whole[0], whole[1]))
    if repeated := sorted({head for head in found if found.count(head) > 1}):
        raise ValueError(f"Circuit: group {group!r} holds {repeated} more than once; expected each head once.")
    return found
