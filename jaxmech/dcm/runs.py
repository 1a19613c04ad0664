"""What a training of a mask leaves: the mask, the heads that it selects, and every step on the way."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxmech.circuits import Head
from jaxmech.dcm.groups import Group


class History(NamedTuple):
    """Every step of a run."""

    loss: np.ndarray  # [steps] before the step's update
    mask: np.ndarray  # [steps, n] after it
    rows: np.ndarray  # [steps, E] the examples of the step; -1 where its batch is shorter

    def __repr__(self) -> str:
        losses = f", loss {self.loss[0]:.4g} to {self.loss[-1]:.4g}" if len(self.loss) else ""
        return f"History({len(self.loss)} steps{losses})"


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A trained mask.

    Attributes:
      heads: the n heads, (layer, head), those of one role behind those of another.
      roles: for each, the roles at which it is patched.
      mask: float32 [n] in [0, 1], 0 where a head is patched; after the last step, or the best one by `select`.
      history: loss and mask of every step.
      step: the step after which `mask` was taken, from 1 on.
      validation_accuracy: of the rounded mask, if it was selected by validation.
    """

    heads: list[Head]
    roles: list[tuple[str, ...]]
    mask: np.ndarray  # [n]
    history: History
    step: int
    validation_accuracy: float | None = None

    def __repr__(self) -> str:
        accuracy = self.validation_accuracy
        validation = "" if accuracy is None else f", validation accuracy {accuracy:.3f}"
        return f"Run({len(self.selected)} of {len(self.heads)} heads selected, step {self.step}{validation})"

    @property
    def group(self) -> Group:
        """The heads as `train` takes them: a list if all are at the same roles, else {role: heads}."""
        if len(set(self.roles)) == 1:
            return self.heads
        found: dict[str, list[Head]] = {}
        for head, (role, *_) in zip(self.heads, self.roles, strict=True):
            found.setdefault(role, []).append(head)
        return found

    @property
    def selected(self) -> list[Head]:
        """The heads that the rounded mask patches: those with m <= 0.5."""
        return [head for head, m in zip(self.heads, self.mask, strict=True) if np.round(m) == 0]

    @property
    def selected_by_role(self) -> dict[str, list[Head]]:
        """The same, {role: heads}, as `jm.patch_activations` takes them, without roles at which none is patched."""
        found: dict[str, list[Head]] = {}
        for head, roles, m in zip(self.heads, self.roles, self.mask, strict=True):
            for role in roles if np.round(m) == 0 else ():
                found.setdefault(role, []).append(head)
        return found
