"""F, what a circuit or a model does, and what all criteria check and take away."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmech.circuits import Circuit, Head
from jaxmech.compat import check_compat
from jaxmech.metrics import ACCURACY, Metric, name_of

Subset = Mapping[str, Sequence[Head]]  # group -> some of its heads
POSITIVE = (ACCURACY, "probability", "log_probability")  # metrics whose F is not negative


def f_of(metric: Metric, mean: np.ndarray) -> np.ndarray:
    """F by the mean of a metric over prompts."""
    return np.exp(mean) if metric == "log_probability" else mean


def check_circuit(circuit: Circuit) -> None:
    """TypeError if it is none: the criteria need heads in groups."""
    if not isinstance(circuit, Circuit):
        raise TypeError(
            f"Found a {type(circuit).__name__}; expected a Circuit, whose heads are in groups: jm.Circuit({{group: "
            "heads}, {group: role})."
        )


def as_published(compat: str | None, metric: Metric, ablate_elsewhere: bool) -> bool:
    """Whether it is to be as in the published code, which knows no metric but accuracy, nor circuits left alone."""
    paper = check_compat(compat)
    if paper and metric != ACCURACY:
        raise ValueError(f"Measured by {name_of(metric)}, with compat='paper': published code measures accuracy alone.")
    if paper and not ablate_elsewhere:
        raise ValueError("ablate_elsewhere=False with compat='paper': the published code ablates circuits everywhere.")
    return paper


def removed(heads_by_role: Mapping[str, Sequence[Head]], circuit: Circuit, subset: Subset) -> dict[str, list[Head]]:
    """Takes away the heads of `subset` at their groups' roles, also one that another group has at that role."""
    gone = {(circuit.roles[group], tuple(head)) for group, heads in subset.items() for head in heads}
    return {role: [head for head in heads if (role, tuple(head)) not in gone] for role, heads in heads_by_role.items()}


def span(values: np.ndarray) -> str:
    """The least and the largest, in words."""
    return f"{values.min():.3f} to {values.max():.3f}" if values.size else "none"
