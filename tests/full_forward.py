"""Path patching by plain full forward passes with `Interventions`, one head at a time: the oracle of the fast path."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxmech as jm


def path_patch(
    model: jm.Model,
    pairs: jm.Pairs,
    sender: str = "last",
    receivers: Sequence[tuple[int, int]] | None = None,
    via: str | None = None,
    outcome: Callable[[jax.Array], jax.Array] | None = None,
) -> np.ndarray:
    """Scores [L, N, B] from the definition in `jaxmech.path_patching`, with no causal cone.

    A score is (p_patched - p_clean) / p_clean, or the change of `outcome`, a function from logits [B, T, V] to [B].
    """
    rows = np.arange(len(pairs))
    p, corrupt_p, last = pairs.position(sender), pairs.corrupt_position(sender), pairs.position("last")
    logits, clean = model(pairs.clean, capture=("z", "attn_out"))
    _, corrupt = model(pairs.corrupt, capture=("z",))
    delta_z = corrupt["z"][:, rows, corrupt_p] - clean["z"][:, rows, p]  # [L, B, N, H]
    probability = lambda logits: jax.nn.softmax(logits[rows, last])[rows, pairs.labels]  # noqa: E731
    scores = np.zeros((model.config.num_layers, model.config.num_heads, len(pairs)))
    for layer, head in np.ndindex(scores.shape[:2]):
        delta = jnp.einsum("bh,hd->bd", delta_z[layer, :, head], model.weights["blocks"]["o"][layer, head])
        frozen = jm.Interventions(attn_out=jm.Patch(1.0, clean["attn_out"].at[layer, rows, p].add(delta)))
        patched, seen = model(pairs.clean, frozen, capture=() if via is None else (via,))
        if via is not None:
            value = seen[via][:, rows, p][:, :, None]  # [L, B, 1, N, H]
            patch = jm.Patch(jm.head_weights(model.config, receivers), value, p[:, None])
            patched, _ = model(pairs.clean, jm.Interventions(**{via: patch}))
        if outcome:
            scores[layer, head] = outcome(patched) - outcome(logits)
        else:
            scores[layer, head] = probability(patched) / probability(logits) - 1
    return scores
