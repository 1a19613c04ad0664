"""Methods by plain full forward passes with `Interventions`, one head or circuit at a time: the fast paths' oracles."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

import jaxmech as jm
from jaxmech.model import attention_output


def path_patch(
    model: jm.Model,
    pairs: jm.Pairs,
    sender: str | Sequence[str] = "last",
    receivers: Sequence[tuple[int, int]] | None = None,
    via: str | None = None,
    outcome: Callable[[jax.Array], jax.Array] | None = None,
) -> np.ndarray:
    """Scores [L, N, B] from the definition in `jaxmech.path_patching`, with no causal cone.

    A score is (p_patched - p_clean) / p_clean, or the change of `outcome`, a function from logits [B, T, V] to [B].
    """
    rows, last = np.arange(len(pairs)), pairs.position("last")
    senders = [sender] if isinstance(sender, str) else sender
    there = np.any([np.arange(pairs.clean.shape[1]) == pairs.position(role)[:, None] for role in senders], axis=0)
    logits, clean = model(pairs.clean, capture=("z", "attn_out"))
    _, corrupt = model(pairs.corrupt, capture=("z",))
    probability = lambda logits: jax.nn.softmax(logits[rows, last])[rows, pairs.labels]  # noqa: E731
    scores = np.zeros((model.config.num_layers, model.config.num_heads, len(pairs)))
    for layer, head in np.ndindex(scores.shape[:2]):
        z = clean["z"][layer]
        for role in senders:
            from_corrupt = corrupt["z"][layer, rows, pairs.corrupt_position(role), head]
            z = z.at[rows, pairs.position(role), head].set(from_corrupt)
        changed = attention_output(model.config, {n: w[layer] for n, w in model.weights["blocks"].items()}, z)
        frozen = jm.Interventions(attn_out=jm.Patch(1.0, clean["attn_out"].at[layer].set(changed)))
        patched, seen = model(pairs.clean, frozen, capture=() if via is None else (via,))
        if via is not None:
            weight = jm.head_weights(model.config, receivers) * there[..., None]  # [L, B, T, N]
            patched, _ = model(pairs.clean, jm.Interventions(**{via: jm.Patch(weight, seen[via])}))
        if outcome:
            scores[layer, head] = outcome(patched) - outcome(logits)
        else:
            scores[layer, head] = probability(patched) / probability(logits) - 1
    return scores


Heads = Mapping[str, Sequence[tuple[int, int]]]  # by role


def last_logits(model: jm.Model, pairs: jm.Pairs, interventions: jm.Interventions | None = None) -> np.ndarray:
    """Logits [B, V] of the clean prompts at `last`."""
    logits, _ = model(pairs.clean, interventions)
    return np.asarray(logits)[np.arange(len(pairs)), pairs.position("last")]


def weights(model: jm.Model, pairs: jm.Pairs, heads: Heads) -> np.ndarray:
    """1 at the heads of each role, at its token: [L, B, T, N]."""
    found = np.zeros((model.config.num_layers, *pairs.clean.shape, model.config.num_heads), np.float32)
    for role, chosen in heads.items():
        for layer, head in chosen:
            found[layer, np.arange(len(pairs)), pairs.position(role), head] = 1
    return found


def evaluate(model: jm.Model, pairs: jm.Pairs, heads: Heads, means: np.ndarray, ablate_elsewhere: bool) -> np.ndarray:
    """Logits [B, V] with all heads ablated but those of the circuit; means [T, L, N, H] or [B, T, L, N, H]."""
    ablated = np.full((model.config.num_layers, *pairs.clean.shape, model.config.num_heads), float(ablate_elsewhere))
    for role in heads:
        ablated[:, np.arange(len(pairs)), pairs.position(role)] = 1
    ablated = ablated * (1 - weights(model, pairs, heads))
    values = np.moveaxis(means if means.ndim == 5 else means[None], 2, 0)[:, :, : pairs.clean.shape[1]]
    return last_logits(model, pairs, jm.Interventions(z=jm.Patch(ablated, values)))


def from_corrupt(model: jm.Model, pairs: jm.Pairs, heads: Heads) -> np.ndarray:
    """Logits [B, V] with the z that heads have at their roles in the corrupt prompts."""
    z = np.asarray(model(pairs.corrupt, capture=("z",))[1]["z"])
    rows, value = np.arange(len(pairs)), np.zeros((*z.shape[:2], pairs.clean.shape[1], *z.shape[3:]), np.float32)
    for role in heads:
        value[:, rows, pairs.position(role)] = z[:, rows, pairs.corrupt_position(role)]
    return last_logits(model, pairs, jm.Interventions(z=jm.Patch(weights(model, pairs, heads), value)))


def from_model(base: jm.Model, tuned: jm.Model, pairs: jm.Pairs, heads: Heads, components: Sequence[str]) -> np.ndarray:
    """Logits [B, V] of `base` with the activations that `tuned` has at the heads' roles."""
    _, theirs = tuned(pairs.clean, capture=components)
    weight = weights(base, pairs, heads)
    return last_logits(base, pairs, jm.Interventions(**{site: jm.Patch(weight, theirs[site]) for site in components}))


def knocked_out(
    model: jm.Model, pairs: jm.Pairs, sources: Sequence[np.ndarray], keys: np.ndarray, layers: slice | int
) -> np.ndarray:
    """Logits [B, V] when none of the `sources` [B] may attend to the `keys`, bool [B, T], before it, in some layers."""
    length = pairs.clean.shape[1]
    mask = np.zeros((model.config.num_layers, len(pairs), length, 1, length), bool)
    for source in sources:
        mask[layers, np.arange(len(pairs)), source, 0] = keys & (np.arange(length) < source[:, None])
    return last_logits(model, pairs, jm.Interventions(knockout=mask))
