"""What is checked of a chain of sweeps on the boxes task before it is run."""

from collections.abc import Mapping, Sequence

from jaxmech.boxes import ROLES
from jaxmech.chain import Stage, with_k
from jaxmech.discovery import check_min_effect


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
