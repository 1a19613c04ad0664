"""What is checked of a chain of sweeps on prompts of known roles before it is run."""

from collections.abc import Collection, Mapping, Sequence

from jaxmech.chain import PAPER_CHAIN, Stage, with_k
from jaxmech.discovery import check_min_effect


def check_chain_on(
    roles: Collection[str] | None,
    chain: Sequence[Stage],
    k: Mapping[str, int],
    min_effect: float,
    metric: str = "probability",
) -> None:
    """Checks what can be checked without a model.

    Args:
      roles: those of the prompts; None: they are not known yet.
      chain: the stages.
      k: {group: number of heads}, in place of the chain's own.
      min_effect, metric: see `discover`.

    Raises:
      ValueError: the stages do not fit together (see `check_chain`), a sender is no role of the prompts, or one other
        than "last" without receivers, k names an unknown group or is below 1, or min_effect is out of range.
    """
    for stage in with_k(chain, k):
        if roles is not None and stage.sender not in roles:
            hint = ""
            if tuple(chain) == PAPER_CHAIN:
                hint = " The chain is the paper's, for boxes prompts; give that of your task."
            raise ValueError(
                f"Stage {stage.group!r} of the chain has the sender {stage.sender!r}; the prompts have the roles "
                f"{', '.join(roles)}.{hint}"
            )
        if stage.receivers is None and stage.sender != "last":
            raise ValueError(
                f"Stage {stage.group!r} of the chain has the sender {stage.sender!r} and no receivers; only the token "
                "`last` has a direct path to the logits. Name receivers and via."
            )
    check_min_effect(min_effect, metric)
