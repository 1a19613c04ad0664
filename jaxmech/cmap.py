"""Cross-model activation patching (CMAP): heads of a fine-tuned model at work in its base.

The method of Prakash et al. 2024, section 5, for a set of heads: a group or a whole circuit. `jaxmech.head_sweep`
patches every single head in turn.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import memory
from jaxmech.circuits import HeadsByRole, role_masks
from jaxmech.collected import HeadValues, check_components, check_same_shape, values_of
from jaxmech.compat import check_compat, last_column
from jaxmech.config import Config
from jaxmech.gathered import Gathered
from jaxmech.interventions import Interventions, Patch
from jaxmech.loading import Model, check_prompts
from jaxmech.metrics import ACCURACY, Metric
from jaxmech.model import Params, forward
from jaxmech.pairs import Pairs, positions_of
from jaxmech.patching import at_tokens, patched_predictions
from jaxmech.predictions import Predictions, answers
from jaxmech.sharding import devices_of

Array = Any  # NumPy on the host, jax.Array inside jit


def cmap(
    base: Model,
    tuned: Model | HeadValues,
    pairs: Pairs,
    heads_by_role: HeadsByRole,
    components: Sequence[str] = ("z",),
    *,
    batch_size: int | None = None,
    compat: str | None = None,
    metric: Metric = ACCURACY,
    wrong_labels: np.ndarray | None = None,
    keep_logits: bool = True,
) -> Predictions:
    """Answers of `base` to the clean prompts when its heads' activations are those that `tuned` has there.

    Args:
      base: the model that is patched.
      tuned: a model of the same shape (a fine-tune, also one that a LoRA adapter was merged into), or what `collect`
        kept of it for these pairs.
      pairs: prompts and labels; only the clean prompts are run.
      heads_by_role: the heads patched at each role, {role: [(layer, head)]}, or a `Circuit`.
      components: any of "z", "q", "k" and "v" (q and k before RoPE but after their norm, where the family has one; k
        and v for the named query heads alone). Each is patched at the roles; what a head of a later layer computes from
        it is free to change.
      batch_size: examples in one call; None picks as many as fit the memory budget.
      compat: "paper" does for q, k and v as the published code does: k and v are patched at all tokens before the role
        and not at the role itself, and every head's z is held at its value in the base model at all tokens but the last
        column (docs/paper_compat.md, m). For z, heads of roles other than `prev_query_box` are patched at the last
        column (f).
      metric: what `mean` and `per_example` of the result are, "accuracy", one of `jaxmech.metrics` or a function of the
        logits, see `predict`; it is measured whether or not logits are kept.
      wrong_labels: int [B], a wrong answer for each prompt, for "logit_difference"; None: those of the pairs.
      keep_logits: return the logits, float32 [B, V]; without, they stay on the device.

    Returns:
      Predictions with `accuracy` [], `correct` [B], `logits` [B, V] and, of another metric, `measured` [B].

    Raises:
      ValueError: models of different shapes, values collected of other pairs, unknown roles, heads, components or
        metrics, or no heads at all.
    """
    components = check_components(components)
    options = {"metric": metric, "wrong_labels": wrong_labels, "keep_logits": keep_logits}
    gathered = Gathered.of(base.config, pairs, **options)
    roles, mask = role_masks(base.config, heads_by_role)
    if check_compat(compat):
        if isinstance(tuned, HeadValues):
            raise ValueError('compat="paper" patches tokens that `collect` does not keep; give the tuned model itself.')
        check_same_shape(base, tuned)
        return _paper_cmap(base, tuned, pairs, roles, mask, components, batch_size, gathered)
    values = values_of(base, tuned, pairs, roles, components)
    return patched_predictions(base, pairs, roles, mask, values, batch_size, gathered)


def _paper_cmap(
    base: Model,
    tuned: Model,
    pairs: Pairs,
    roles: Sequence[str],
    mask: np.ndarray,
    components: Sequence[str],
    batch_size: int | None,
    gathered: Gathered,
) -> Predictions:
    """As the published code does it, by full forward passes with patches at every token."""
    pairs = last_column(pairs)
    tokens, last = check_prompts(base.config, pairs), pairs.position("last")
    if devices_of(base.weights) != devices_of(tuned.weights):
        raise ValueError('compat="paper" runs both models in one call; load them onto the same devices.')
    if batch_size is None:
        batch_size = max(
            1, memory.fitting_prompts(base.config, base.weights, tokens.shape[1]) // base.config.num_layers
        )
    for start in range(0, len(pairs), batch_size):
        rows = np.arange(start, min(start + batch_size, len(pairs)))
        positions = positions_of(pairs.position, roles)[rows]
        if components == ("z",):  # every role but prev_query_box is taken to be the last column
            positions = np.stack(
                [x if role == "prev_query_box" else last[rows] for role, x in zip(roles, positions.T, strict=True)], 1
            )
        arguments = base.config, base.weights, tuned.weights, tokens[rows], positions, last[rows], mask
        gathered.add(rows, *_paper_answers(*arguments, components=components))
    return gathered.predictions()


@partial(jax.jit, static_argnames=("config", "components"))
def _paper_answers(
    config: Config,
    base: Params,
    tuned: Params,
    tokens: Array,
    positions: Array,
    last: Array,
    mask: Array,
    *,
    components,
) -> tuple[jax.Array, jax.Array]:
    """Answers [B] and logits [B, V] of the base model, patched as published; mask [L, R, N], positions [B, R]."""
    (batch, length), dtype = tokens.shape, config.compute_dtype
    _, theirs = forward(config, tuned, tokens, capture=components, logits_at=last)
    at_role = at_tokens(positions, mask).astype(dtype)  # [L, B, R, N]
    token = jnp.arange(length)
    here = (token == positions[..., None]).astype(dtype)  # [B, R, T]
    before = (token < positions[..., None]).astype(dtype)
    patches: dict[str, Any] = {}
    for site in components:
        where = before if site in ("k", "v") else here
        weight = jnp.minimum(jnp.einsum("lbrn,brt->lbtn", at_role, where), 1)
        patches[site] = Patch(weight, theirs[site])
    if "z" not in components:
        _, own = forward(config, base, tokens, capture=("z",), logits_at=last)
        frozen = (token < length - 1).astype(dtype)[:, None]  # [T, 1]
        patches["z"] = Patch(jnp.broadcast_to(frozen, (batch, length, 1)), own["z"])
    logits = forward(config, base, tokens, Interventions(**patches), logits_at=last)[0]
    return answers(logits), logits
