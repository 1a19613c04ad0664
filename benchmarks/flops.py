"""Floating-point operations of path patching: what the causal cone needs, and what full forward passes need.

Counts are of matrix products only, 2 operations a multiply-add; norms, softmax, RoPE and gates are left out (a few per
cent). Letters as in `jaxmech.model`. One token costs

    MLP(layer)         6 D F
    q, k, v, o(layer)  2 D H (2 N + 2 K)
    attention(layer)   4 N H per key that is computed, allowed or not
    unembedding        2 D V
"""

from dataclasses import dataclass

import numpy as np

from jaxmech.config import Config


@dataclass(frozen=True)
class Sweep:
    """The sizes on which the cost of a sweep depends.

    Attributes:
      receiver_layers: layers that have receivers, or () for the logits.
      via: "q", "k", "v" or None.
      lengths: int [B], tokens from the sender's position to the last one.
      tokens: T, tokens of a prompt.
      computed_tokens: tokens of the clean and corrupt prompts that are computed, shared prefixes once.
    """

    receiver_layers: tuple[int, ...]
    via: str | None
    lengths: np.ndarray
    tokens: int
    computed_tokens: int


def mlp(config: Config) -> float:
    """One token, one layer."""
    return 6.0 * config.width * config.mlp_width


def projections(config: Config, sites: str = "qkvo") -> float:
    """One token, one layer, of the projections named by their letters."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads, "o": config.num_heads}
    return 2.0 * config.width * config.head_dim * sum(heads[site] for site in sites)


def attention(config: Config, keys: int) -> float:
    """One query token, one layer: scores and mixing of values."""
    return 4.0 * config.num_heads * config.head_dim * keys


def unembedding(config: Config) -> float:
    """One token."""
    return 2.0 * config.width * config.vocab_size


def forward(config: Config, tokens: int) -> float:
    """A full forward pass of one prompt of `tokens` tokens, logits at one of them."""
    layer = mlp(config) + projections(config) + attention(config, tokens)
    return config.num_layers * tokens * layer + unembedding(config)


def naive(config: Config, sweep: Sweep) -> float:
    """A sweep by full forward passes: one per head and stream, and a clean and a corrupt one."""
    heads = config.num_heads * (max(sweep.receiver_layers) if sweep.receiver_layers else config.num_layers)
    streams = 2 if sweep.receiver_layers else 1
    return len(sweep.lengths) * (heads * streams + 2) * forward(config, sweep.tokens)


def cone(config: Config, sweep: Sweep) -> float:
    """A sweep on the causal cone, without rows that repeat or pad: the floor of the algorithm.

    prepare  clean and corrupt prompts, every distinct prefix once: computed_tokens x L x (MLP + q, k, v, o + attention)
    frozen   a sender of layer l: one token through the MLPs of layers l .. the last receiver's (or the last layer)
    read     one projection per sender and receiver layer above it
    live     a sender: its suffix through the layers from its first receiver on: attention and MLP. The first of them
             projects o alone (its q, k, v are the clean ones, but for the receivers), the last has keys and values for
             the suffix, and the rest for the last token
    logits   one token per sender
    """
    L, N, B = config.num_layers, config.num_heads, len(sweep.lengths)
    layer = mlp(config) + projections(config) + attention(config, sweep.tokens)
    total = sweep.computed_tokens * L * layer
    senders = max(sweep.receiver_layers) if sweep.receiver_layers else L
    suffix = float(sweep.lengths.sum())
    keys = sweep.tokens + int(sweep.lengths.max())
    for sender in range(senders):
        above = [r for r in sweep.receiver_layers if r > sender]
        frozen = (max(sweep.receiver_layers) if above else L) - sender
        cost = B * (frozen * mlp(config) + unembedding(config))
        if above:
            cost += B * len(above) * projections(config, sweep.via or "")
            cost += _live(config, min(above), suffix, B, keys)
        total += N * cost
    return total


def _live(config: Config, first: int, suffix: float, count: int, keys: int) -> float:
    """The live streams of `count` examples with `suffix` tokens in all, from layer `first` on."""
    L = config.num_layers
    last = count * (mlp(config) + projections(config, "qo") + attention(config, keys))
    if first == L - 1:
        return last
    cost = suffix * (mlp(config) + projections(config, "o") + attention(config, keys))
    cost += (L - 2 - first) * suffix * (mlp(config) + projections(config) + attention(config, keys))
    return cost + suffix * projections(config, "kv") + last
