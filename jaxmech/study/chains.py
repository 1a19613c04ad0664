"""What is checked of a chain of sweeps on the boxes task before it is run, and which heads it moved between groups."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmech.boxes import ROLES
from jaxmech.discovery import Circuit, Stage, check_min_effect, with_k


def check_boxes_chain(
    chain: Sequence[Stage], k: Mapping[str, int], min_effect: float, metric: str = "probability"
) -> None:
    """Checks what can be checked without a model.

    Args:
      chain: the stages.
      k: {group: number of heads}, in place of the chain's own.
      min_effect, metric: see `discover`.

    Raises:
      ValueError: the stages do not fit together (see `check_chain`), a sender is no role of boxes prompts, or one other
        than "last" without receivers, k names an unknown group or is below 1, or min_effect is out of range.
    """
    for stage in with_k(chain, k):
        if stage.sender not in ROLES:
            raise ValueError(
                f"Stage {stage.group!r} of the chain has the sender {stage.sender!r}; boxes prompts have the roles "
                f"{', '.join(ROLES)}."
            )
        if stage.receivers is None and stage.sender != "last":
            raise ValueError(
                f"Stage {stage.group!r} of the chain has the sender {stage.sender!r} and no receivers; only the token "
                "`last` has a direct path to the logits. Name receivers and via."
            )
    check_min_effect(min_effect, metric)


def moved_heads(circuit: Circuit, chain: Sequence[Stage], min_effect: float) -> dict[str, list[dict[str, Any]]]:
    """The heads that a stage selected, but that a later one at the same role took into its own group.

    Args:
      circuit: what `discover` found.
      chain: the stages, with the numbers of heads that were asked for.
      min_effect: as `discover` was given it.

    Returns:
      {group: [{"head": [layer, head], "to": the group that has it now}]}, without groups that lost none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for stage in chain:
        if stage.group not in circuit.groups:
            continue
        same = [g for g, role in circuit.roles.items() if role == stage.sender and g != stage.group]
        for head in circuit.scores[stage.group].top(stage.k, min_effect):
            if head not in circuit.groups[stage.group]:
                to = next(group for group in same if head in circuit.groups[group])
                found.setdefault(stage.group, []).append({"head": list(head), "to": to})
    return found
