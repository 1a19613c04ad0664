"""Several prompts of each example, run as one tree of tokens, in which what they begin with alike is computed once.

The counterfactual prompts of an example's desiderata tell of one scene and part where one of them words it otherwise:
together, the fourteen have little more than half of the tokens that they have one by one. A token of the tree attends
to those before it on the paths of its prompts. This is exact, as what follows a token cannot change it.

Of each prompt, z of some tokens is wanted, in the layers up to one that may differ between prompts. A tree goes through
the layers in stretches: where prompts end, the tokens that no other prompt has drop out.

Trees differ in size, so the tokens of those that run together stand one after another on one axis, as those of suffixes
do (`jaxmech.suffixes`); attention alone unpacks them, in buckets of trees of similar size.

Axes as in `jaxmech.model`; S prompts of each example are a tree of at most U tokens, P of which are kept. C counts the
packed tokens of all trees of a call; in a bucket, b counts its trees and W the tokens of the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech import rope
from jaxmech.attention import attention_pattern, mix_values, visible
from jaxmech.compiled_sizes import aligned, few_sizes
from jaxmech.config import Config
from jaxmech.model import Params, attention_input, attention_output, embed, layer_weights, mlp_half, project

WORTH_DROPPING = 0.8  # of the tokens that the trees have
BUCKETS = 2  # of a call, at most; each is compiled for itself
WORTH_PADDING = 17 / 16  # of the packed tokens: unpacking them for attention takes about as long
ALIKE = 5 / 4  # of the tokens of prompts that are no trees, most of which are equally long: few shapes save more
LITTLE = 2**11  # tokens of a call that are padded in any case: fewer shapes save more than packing
Array = Any  # NumPy on the host, jax.Array inside jit


class PromptTrees(NamedTuple):
    """The trees of B examples; the rest of each row is padding, tokens that no prompt has."""

    tokens: Array  # [B, U]
    position: Array  # [B, U] in the prompts
    member: Array  # [B, S, U] bool, which prompts have the token
    kept: Array  # [B, P] tokens of the tree; any of prompts that have dropped out
    before: Array  # [B, U] where the tokens were before prompts dropped out

    @classmethod
    def grow(cls, prompts: np.ndarray, length: np.ndarray, positions: np.ndarray) -> "PromptTrees":
        """The trees of prompts.

        Args:
          prompts: int [B, S, T].
          length: int [B, S], tokens of each that count.
          positions: int [B, S, R], tokens of each that are kept: P = S * R, prompt by prompt.
        """
        (count, several, width), row = prompts.shape, np.arange(len(prompts))
        token, size = np.arange(width), np.zeros(count, int)
        node = np.zeros(prompts.shape, int)  # where each prompt's tokens are in the tree
        for s in range(several):
            common, like = np.zeros(count, int), np.zeros(count, int)
            for other in range(s):
                both = np.minimum(length[:, s], length[:, other])
                alike = (prompts[:, s] == prompts[:, other]) & (token < both[:, None])
                shared = np.cumprod(alike, axis=1).sum(axis=1)
                common, like = np.maximum(common, shared), np.where(shared > common, other, like)
            own = (size - common)[:, None] + token
            node[:, s] = np.where(token < common[:, None], node[row, like], own)
            size += length[:, s] - common
        example, prompt, at = np.nonzero(token < length[..., None])
        there = node[example, prompt, at]
        tokens, position = np.zeros((2, count, int(size.max())), np.int32)
        member = np.zeros((count, several, int(size.max())), bool)
        tokens[example, there], position[example, there] = prompts[example, prompt, at], at
        member[example, prompt, there] = True
        kept = np.take_along_axis(node, positions, axis=2).reshape(count, -1)
        before = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return cls(tokens, position, member, np.int32(kept), before)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each tree, [B]."""
        return self.member.any(axis=1).sum(axis=1)

    def only(self, prompts: np.ndarray) -> "PromptTrees":
        """Without the tokens that only others than `prompts`, bool [S], have."""
        member = self.member & prompts[:, None]
        before = np.argsort(~member.any(axis=1), axis=1, kind="stable")
        now = np.argsort(before, axis=1)
        before = before[:, : int(member.any(axis=1).sum(axis=1).max())]
        stays = np.repeat(prompts, self.kept.shape[1] // len(prompts))
        return PromptTrees(
            np.take_along_axis(self.tokens, before, axis=1),
            np.take_along_axis(self.position, before, axis=1),
            np.take_along_axis(member, before[:, None], axis=2),
            np.int32(np.where(stays, np.take_along_axis(now, self.kept, axis=1), 0)),
            np.int32(before),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bucket:
    """Neighbouring trees that attend together; what fills up a row has no prompt."""

    packed: Array  # [b, W] packed index of each tree's tokens; behind the last one, that of the last one
    position: Array  # [b, W]
    member: Array  # [b, S, W] bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedTrees:
    """Trees of a call, filled up to C tokens by some of no prompt."""

    tokens: Array  # [C]
    position: Array  # [C]
    before: Array  # [C] where they were in the stretch before
    unpacked: Array  # [C] their index among the unpacked tokens of all buckets, [b, W] of each one behind another
    kept: Array  # [B, P] packed indices
    stays: Array  # [B, P] bool, not of prompts that have dropped out
    buckets: tuple[Bucket, ...]

    @property
    def padded(self) -> bool:
        """Whether the tokens stand as in the one bucket that there is."""
        return len(self.buckets) == 1 and self.buckets[0].packed.size == self.tokens.size  # see `Layout`


class Layout(NamedTuple):
    """How the trees of calls that are compiled once are packed; best if the small ones stand first."""

    capacity: int  # C
    spans: list[tuple[int, int, int]]  # the buckets: first tree, the one behind the last, W
    padded: bool  # see `PackedTrees`

    @classmethod
    def of(cls, sizes: np.ndarray, multiple: int, several: int) -> "Layout":
        """Of calls with such trees.

        Args:
          sizes: [calls, B].
          multiple: for `few_sizes`, of W.
          several: prompts of a tree.
        """
        count = sizes.shape[1]
        bounds = np.unique(np.linspace(0, count, BUCKETS + 1).astype(int)).tolist()
        spans: list[tuple[int, int, int]] = []
        for start, stop in pairwise(bounds):
            width = few_sizes(int(sizes[:, start:stop].max()), multiple)
            if spans and spans[-1][2] == width:
                start = spans.pop()[0]
            spans.append((start, stop, width))
        capacity = few_sizes(aligned(int(sizes.sum(axis=1).max())), share=32)
        widest = max(width for *_, width in spans)  # in any bucket: trees from which prompts dropped out change places
        if count * widest <= max(LITTLE, (ALIKE if several == 1 else WORTH_PADDING) * capacity):
            return cls(count * widest, [(0, count, widest)], padded=True)
        return cls(capacity, spans, padded=False)


def pack(trees: PromptTrees, pieces: np.ndarray, layout: Layout, before: PackedTrees | None) -> PackedTrees:
    """The trees of some examples, in arrays [pieces, ...].

    Args:
      pieces: int [pieces, B], the examples of a call, which may lie on different devices.
      before: what is returned for the stretch before; None in the first.
    """
    starts = np.zeros_like(pieces)
    if before is not None:
        starts = np.concatenate([bucket.packed[..., 0] for bucket in before.buckets], axis=1)
    packed = [_packed(trees, *piece, layout) for piece in zip(pieces, starts, strict=True)]
    return jax.tree.map(lambda *x: np.stack(x), *packed)


def _packed(trees: PromptTrees, rows: np.ndarray, starts_before: np.ndarray, layout: Layout) -> PackedTrees:
    """The trees of the examples `rows` [B].

    Args:
      starts_before: where each of them began in the stretch before, [B].
    """
    member = trees.member[rows]
    size = member.any(axis=1).sum(axis=1)
    start = layout.spans[0][2] * np.arange(len(rows)) if layout.padded else np.cumsum(size) - size
    example, offset = np.nonzero(np.arange(size.max()) < size[:, None])

    def on_one_axis(x: np.ndarray) -> np.ndarray:
        found = np.zeros(layout.capacity, np.int32)
        found[start[example] + offset] = x[example, offset]
        return found

    def in_a_bucket(x: np.ndarray, width: int) -> np.ndarray:
        fill = max(0, width - x.shape[-1])
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])[..., :width]

    buckets, unpacked = [], np.zeros(len(rows), int)
    for first, last, width in layout.spans:
        of, behind = slice(first, last), 0 if first == 0 else unpacked[first - 1] + buckets[-1].packed.shape[1]
        unpacked[of] = behind + width * np.arange(last - first)
        packed = start[of, None] + np.minimum(np.arange(width), size[of, None] - 1)
        position = in_a_bucket(trees.position[rows[of]], width)
        buckets.append(Bucket(np.int32(packed), position, in_a_bucket(member[of], width)))
    token = np.arange(trees.tokens.shape[1])
    return PackedTrees(
        tokens=on_one_axis(trees.tokens[rows]),
        position=on_one_axis(trees.position[rows]),
        before=on_one_axis(starts_before[:, None] + trees.before[rows]),
        unpacked=on_one_axis(unpacked[:, None] + token),
        kept=np.int32(start[:, None] + trees.kept[rows]),
        stays=np.repeat(member.any(axis=2), trees.kept.shape[1] // member.shape[1], axis=1),
        buckets=tuple(buckets),
    )


class Stretch(NamedTuple):
    """Layers through which trees go as they are."""

    trees: PromptTrees
    start: int
    stop: int  # the layer above, of which only z of the tokens that are kept is computed


def stretches(trees: PromptTrees, layers: Sequence[int]) -> list[Stretch]:
    """Where prompts drop out whose z is wanted up to `layers` [S], wherever many tokens go with them."""
    wanted, found, start = np.asarray(layers), [], 0
    for stop in sorted(set(layers)):
        rest = trees.only(wanted > stop)
        if stop == max(layers) or rest.sizes.sum() < WORTH_DROPPING * trees.sizes.sum():
            found.append(Stretch(trees, start, stop))
            trees, start = rest, stop
    return found


@partial(jax.jit, static_argnames="config", donate_argnames="z")
def run_stretch(
    config: Config,
    weights: Params,
    trees: PackedTrees,
    start: Array,
    stop: Array,
    x: Array = None,
    z: Array = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs packed trees through the layers of a stretch.

    Args:
      trees: in pieces, [pieces, ...] of every array.
      start, stop: see `Stretch`.
      x: the residual stream that the stretch before ended with; None in the first.
      z: what was found until then, which is added to; None in the first.

    Returns:
      resid_pre of the layer `stop`, [pieces, C, D]; and z [pieces, L, B, P, N, H] up to that layer at the tokens that
      are kept, 0 above the last layer of each prompt.
    """

    def piece(trees: PackedTrees, x: Array, z: Array) -> tuple[jax.Array, jax.Array]:
        if x is None:
            x = embed(config, weights, trees.tokens)
            z = jnp.zeros((config.num_layers, *trees.kept.shape, config.num_heads, config.head_dim), x.dtype)
        else:
            x = x[trees.before]
        return _run(config, weights, trees, start, stop, x, z)

    return jax.vmap(piece)(trees, x, z)


def _run(
    config: Config, weights: Params, trees: PackedTrees, start: Array, stop: Array, x: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`run_stretch` of one piece whose stream [C, D] and z [L, B, P, N, H] are there."""
    stays = trees.stays[..., None, None]
    members = [bucket.member.astype(config.compute_dtype) for bucket in trees.buckets]
    on_a_path = [jnp.einsum("bsu,bsv->buv", member, member) > 0 for member in members]

    def attend(i, x, only_kept):
        """z of layer i at all tokens, [C, N, H], or at those that are kept, [B, P, N, H]."""
        layer = layer_weights(weights, i)
        normed = attention_input(config, layer, x)
        rotation = rope.of_layer(config, i, rope.rotations(config, trees.position))
        q_at = trees.kept if only_kept else slice(None)
        q, k, v = (project(config, layer, site, y) for site, y in (("q", normed[q_at]), ("k", normed), ("v", normed)))
        q, k = rope.rotate(q, rope.Rotation(*(x[q_at] for x in rotation))), rope.rotate(k, rotation)
        found, first = [], 0
        for bucket, path in zip(trees.buckets, on_a_path, strict=True):
            if only_kept:
                of = slice(first, first + len(bucket.packed))
                token = trees.kept[of] - bucket.packed[:, :1]  # in its tree
                queries, position = q[of], jnp.take_along_axis(bucket.position, token, axis=1)
                path = jnp.take_along_axis(path, token[..., None], axis=1)
            else:
                queries, position = unpacked(q, bucket), bucket.position
            allowed = path[:, None] & visible(config, i, position, bucket.position)
            (pattern,) = attention_pattern(config, queries, [(unpacked(k, bucket), allowed)])
            found.append(mix_values(config, [(pattern, unpacked(v, bucket))]))
            first += len(bucket.packed)
        if only_kept:
            return jnp.concatenate(found)
        together = jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in found])
        return together if trees.padded else together[trees.unpacked]

    def unpacked(x, bucket):
        """A bucket's [b, W, ...] of the packed x [C, ...]."""
        return x.reshape(*bucket.packed.shape, *x.shape[1:]) if trees.padded else x[bucket.packed]

    def advance(i, carry):
        x, found = carry
        here, layer = attend(i, x, only_kept=False), layer_weights(weights, i)
        found = found.at[i].set(jnp.where(stays, here[trees.kept], found[i]))
        return mlp_half(config, layer, x + attention_output(config, layer, here)), found

    x, z = jax.lax.fori_loop(start, stop, advance, (x, z))
    return x, z.at[stop].set(jnp.where(stays, attend(stop, x, only_kept=True), z[stop]))
