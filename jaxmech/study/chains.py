"""What is checked of a chain of sweeps on the boxes task before anything is computed or written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxmech.boxes import ROLES
from jaxmech.config import Config
from jaxmech.discovery import Stage, check_chain


def check_boxes_chain(chain: Sequence[Stage], k: Mapping[str, int], min_effect: float) -> None:
    """Checks what can be checked without a model.

    Args:
      chain: the stages.
      k: {group: number of heads}, in place of the chain's own.
      min_effect: see `discover`.

    Raises:
      ValueError: the stages do not fit together (see `check_chain`), a sender is no role of boxes prompts, k names an
        unknown group or is below 1, or min_effect is no fraction.
    """
    check_chain(chain)
    groups = [stage.group for stage in chain]
    for stage in chain:
        if stage.sender not in ROLES:
            raise ValueError(
                f"Stage {stage.group!r} of the chain has the sender {stage.sender!r}; boxes prompts have the roles "
                f"{', '.join(ROLES)}."
            )
    if unknown := sorted(set(k) - set(groups)):
        raise ValueError(f"k names {', '.join(unknown)}; the groups of the chain are {', '.join(groups)}.")
    check_chain([replace(stage, k=k.get(stage.group, stage.k)) for stage in chain])
    if not 0 <= min_effect <= 1:
        raise ValueError(f"min_effect={min_effect}; expected a fraction from 0 to 1.")


def check_number_of_heads(chain: Sequence[Stage], k: Mapping[str, int], config: Config) -> None:
    """ValueError if a group is to have more heads than the model has."""
    heads = config.num_layers * config.num_heads
    for stage in chain:
        if (count := k.get(stage.group, stage.k)) > heads:
            raise ValueError(
                f"Stage {stage.group!r}: k={count}, but the model has {heads} heads ({config.num_layers} layers x "
                f"{config.num_heads}). Choose a smaller k."
            )
