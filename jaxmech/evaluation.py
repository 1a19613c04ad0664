"""Circuit evaluation: how well a model does when all heads but a circuit's are ablated.

As in Prakash et al. 2024, section 3, a circuit's heads act at *vital* positions, the tokens of its roles. Everywhere
else every head is ablated, and at the vital positions every head that is not in the circuit at that role: its z is
replaced, by its mean over other prompts at the same position as a rule, or by zero, or by its value on another prompt.
What that costs is in `jaxmech.circuit_passes`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmech.ablation import AblatedValues, RoleMeans
from jaxmech.circuit_passes import Ablation, Circuits, Prompts, suffix_passes, vital_passes
from jaxmech.circuits import Circuit, HeadsByRole, as_heads_by_role
from jaxmech.compiled_sizes import few_counts
from jaxmech.config import Config
from jaxmech.gathered import Gathered
from jaxmech.interventions import head_mask
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Metric
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions


def evaluate(
    model: Model,
    pairs: Pairs,
    circuits: Sequence[HeadsByRole],
    means: AblatedValues,
    ablate_elsewhere: bool = True,
    *,
    batch_size: int | None = None,
    keep_logits: bool = True,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
) -> Predictions:
    """Runs many circuits at once on the clean prompts.

    Args:
      model: the model that is run.
      pairs: prompts and labels; only the clean prompts are run.
      circuits: C of them: a `Circuit`, or {role: [(layer, head)]}; a role may have no heads.
      means: float [T or more, L, N, H], what ablated heads put out, see `mean_activations`; or what `role_means` found,
        for prompts of unequal length; or [B, T or more, L, N, H], values for each example, see `resampled_activations`;
        or 0, for zero ablation.
      ablate_elsewhere: ablate all heads at the tokens that are not in a circuit's roles; False leaves these tokens as
        they are, and runs every circuit in a forward pass of the tokens from its first role on.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      keep_logits: return the logits, float32 [C, B, V]; many circuits of a large vocabulary need much memory.
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function of the
        logits, see `predict`; it is measured whether or not logits are kept.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.

    Returns:
      Predictions with `accuracy` [C], `correct` [C, B], `logits` [C, B, V] and, of another metric, `measured` [C, B].

    Raises:
      ValueError: no circuits, an unknown role, head or metric, or means that do not fit the model and the prompts.
    """
    config = model.config
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1.")
    roles, keep, named = _circuit_masks(config, circuits)
    prompts = Prompts(
        tokens=check_prompts(config, pairs),
        vital=np.stack([pairs.position(role) for role in roles], axis=1),
        last=pairs.position("last"),
    )
    token = np.arange(prompts.tokens.shape[1])
    ablated = token <= prompts.last[:, None]  # [B, T] the tokens at which heads may be
    if not ablate_elsewhere:
        ablated = (prompts.vital[:, named.any(axis=0), None] == token).any(axis=1)
    ablation = _ablation(config, means, pairs, ablated)
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(config, pairs, len(keep), **options)
    # Circuits that fill up a call are the first again: few numbers of circuits, so few compilations.
    filled = Circuits(*(np.resize(x, (few_counts(len(x)), *x.shape[1:])) for x in (keep, named)))
    run = vital_passes if ablate_elsewhere else suffix_passes
    for chosen, rows, found in run(model, prompts, ablation, filled, batch_size, keep_logits=gathered.needs_logits):
        gathered.add(rows, *found, at=chosen % len(keep))
    return gathered.predictions()


def _circuit_masks(config: Config, circuits: Sequence[HeadsByRole]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All roles, `last` the first; the heads of each circuit, bool [C, L, R, N]; the roles it names, bool [C, R]."""
    if isinstance(circuits, Mapping | Circuit):
        raise TypeError("One circuit given; expected a list of them: evaluate(model, pairs, [circuit], means).")
    if not len(circuits):
        raise ValueError("No circuits given; expected a list of circuits or of {role: [(layer, head)]}.")
    by_role = [{role: list(heads) for role, heads in as_heads_by_role(circuit).items()} for circuit in circuits]
    roles = list(dict.fromkeys(["last", *(role for heads in by_role for role in heads)]))
    keep = np.zeros((len(circuits), config.num_layers, len(roles), config.num_heads), bool)
    for circuit, heads in zip(keep, by_role, strict=True):
        for role, chosen in heads.items():
            if chosen:
                circuit[:, roles.index(role)] = head_mask(config, chosen)
    return roles, keep, np.array([[role in heads for role in roles] for heads in by_role])


def _ablation(config: Config, means: AblatedValues, pairs: Pairs, ablated: np.ndarray) -> Ablation:
    """The ablated values and their sources; ValueError unless they fit the model and reach the `ablated` tokens."""
    (count, length), heads = pairs.clean.shape, (config.num_layers, config.num_heads, config.head_dim)
    if isinstance(means, RoleMeans):
        given, own, source = means.by_position, False, _source_by_role(means, pairs)
        for role, x in means.by_role.items():
            if np.shape(x) != heads:
                raise ValueError(
                    f"means of role {role!r} have shape {np.shape(x)}; this model needs [L, N, H] = {heads}."
                )
        values = np.stack([given, *(np.broadcast_to(x, given.shape) for x in means.by_role.values())])
    else:
        given = np.asarray(means)
        values = np.zeros((length, *heads), np.float32) if not given.ndim and given == 0 else given
        values = values[None] if values.ndim == 4 else values
        own = values.ndim == 5 and len(values) > 1
        source = np.broadcast_to(np.arange(count)[:, None] * own, (count, length))
    fits = values.ndim == 5 and values.shape[2:] == heads and values.shape[1] >= length
    if not fits or (own and len(values) != count):
        raise ValueError(
            f"means has shape {given.shape}; this model and these prompts need [{length} or more, L, N, H] with "
            f"L, N, H = {heads}, or [{count}, {length} or more, L, N, H]. Means must come from prompts at least "
            "as long."
        )
    values = values[:, :length]
    missing = ~np.isfinite(values.sum(axis=(2, 3, 4), dtype=np.float64))  # [S, T]
    needed = missing[source, np.arange(length)] & ablated
    if needed.any():
        raise ValueError(
            f"means holds numbers that are not finite at position {int(needed.any(0).argmax())}, where heads are "
            "ablated. Did none of the prompts that they come from reach it? Else look at the model and its dtype."
        )
    return Ablation(np.where(missing[..., None, None, None], 0, values) if missing.any() else values, source, own)


def _source_by_role(means: RoleMeans, pairs: Pairs) -> np.ndarray:
    """1 and more for tokens with the roles of `means`, of several the first; 0 for others: int [B, T]."""
    source = np.zeros(pairs.clean.shape, int)
    for i, role in reversed(list(enumerate(means.by_role, start=1))):
        source[np.arange(len(pairs)), pairs.position(role)] = i
    return source
