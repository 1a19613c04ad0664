"""Suffixes of prompts, packed: where the tokens from an intervention's first position to the last one lie.

Suffixes differ in length, so their tokens stand one after another on one axis, and everything that acts on single
tokens (norms, projections, MLPs: nearly all the work) runs on that axis without padding. Attention alone unpacks them,
in *buckets* of examples with suffixes of similar length, whose padding is small.

Axes as in `jaxmech.model`; C counts the packed suffix tokens of all examples, R the tokens of each that are patched; in
a bucket, b counts its examples, W the tokens of its longest suffix and P those of its longest prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # NumPy on the host, jax.Array inside jit


def suffix_lengths(p: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Tokens of each suffix, [B], from the first of the patched tokens p [B, R] to last [B]."""
    return last - p.min(axis=1) + 1


class Span(NamedTuple):
    """The extent of a bucket of neighbouring examples."""

    start: int  # its first example
    stop: int  # behind its last one
    width: int  # W, at least its longest suffix
    prefix: int  # P, at least its longest prefix, and not 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bucket:
    """Neighbouring examples that attend together."""

    packed: Array  # [b, W] packed index of each suffix's tokens; behind the last one, that of the last one
    position: Array  # [b] where each suffix starts
    length: Array  # [b] its tokens
    patched: Array  # [b, R] which of them are patched, counted from its start
    span: Span = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Suffixes:
    """Where the packed suffix tokens of each example lie, from the first that is patched to the last one."""

    example: Array  # [C] example that a packed token belongs to
    position: Array  # [C] its position in the prompt
    unpacked: Array  # [C] its index among the unpacked tokens of all buckets, [b, W] of each one behind another
    at_p: Array  # [B, R] packed indices of each example's patched tokens
    at_last: Array  # [B] and of its last one
    buckets: tuple[Bucket, ...]

    @classmethod
    def pack(cls, p: np.ndarray, last: np.ndarray, *, capacity: int, spans: Sequence[Span]) -> "Suffixes":
        """The suffixes up to last [B], packed and filled up to C = capacity with copies of the first token.

        Args:
          p: [B, R], the patched tokens; the suffix starts at the first.
          capacity: C, at least the sum of the lengths.
          spans: the buckets; together all examples, in order.
        """
        start = p.min(axis=1)
        patched, length = p - start[:, None], last - start + 1
        example = np.repeat(np.arange(len(p)), length)
        first = np.cumsum(length) - length
        offset = np.arange(len(example)) - first[example]
        sizes = [(span.stop - span.start) * span.width for span in spans]
        row = np.concatenate(
            [sum(sizes[:i]) + np.arange(s.stop - s.start) * s.width for i, s in enumerate(spans)]
        )  # [B] index of each example's first unpacked token
        fill = (0, capacity - len(example))
        example, offset = np.pad(example, fill), np.pad(offset, fill)
        buckets = []
        for span in spans:
            of = slice(span.start, span.stop)
            packed = first[of, None] + np.minimum(np.arange(span.width), length[of, None] - 1)
            at = np.int32(start[of]), np.int32(length[of]), np.int32(patched[of])
            buckets.append(Bucket(np.int32(packed), *at, span))
        return cls(
            example=np.int32(example),
            position=np.int32(start[example] + offset),
            unpacked=np.int32(row[example] + offset),
            at_p=np.int32(first[:, None] + patched),
            at_last=np.int32(first + length - 1),
            buckets=tuple(buckets),
        )

    @classmethod
    def packed(cls, p: jax.Array, last: jax.Array, *, capacity: int, width: int, prefix: int) -> "Suffixes":
        """The suffixes from the first of the patched tokens p [B, R] to last [B], in one bucket; for jit.

        They are filled up to C = capacity with copies of the last token or, if that is B * W, `padded`.

        Args:
          capacity: C, at least the sum of the lengths.
          width: W, at least the longest suffix.
          prefix: P, at least the longest prefix, and not 0.
        """
        if capacity == len(p) * width:
            return cls.padded(p, last, width=width, prefix=prefix)
        start = p.min(axis=1)
        patched, length = p - start[:, None], last - start + 1
        first = jnp.cumsum(length) - length
        example = jnp.repeat(jnp.arange(len(p)), length, total_repeat_length=capacity)  # behind the sum the last one
        offset = jnp.minimum(jnp.arange(capacity) - first[example], length[example] - 1)
        packed = first[:, None] + jnp.minimum(jnp.arange(width), length[:, None] - 1)
        return cls(
            example=example,
            position=start[example] + offset,
            unpacked=width * example + offset,
            at_p=first[:, None] + patched,
            at_last=first + length - 1,
            buckets=(Bucket(packed, start, length, patched, Span(0, len(p), width, prefix)),),
        )

    @classmethod
    def padded(cls, p: jax.Array, last: jax.Array, *, width: int, prefix: int) -> "Suffixes":
        """The suffixes from the first of the patched tokens p [B, R] to last [B]; for jit.

        All are padded to `width` tokens with copies of their last one.

        Args:
          width: W, at least the longest suffix.
          prefix: P, at least the longest prefix, and not 0.
        """
        start = p[:, 0] if p.shape[1] == 1 else p.min(axis=1)
        count, length = len(p), last - start + 1
        offset = jnp.minimum(jnp.arange(width), length[:, None] - 1)  # [B, W]
        first = width * jnp.arange(count)
        packed = first[:, None] + jnp.arange(width)
        patched = jnp.zeros_like(p) if p.shape[1] == 1 else p - start[:, None]  # XLA is to know where a single one is
        bucket = Bucket(packed, start, length, patched, Span(0, count, width, prefix))
        return cls(
            example=jnp.repeat(jnp.arange(count), width),
            position=(start[:, None] + offset).reshape(-1),
            unpacked=jnp.arange(count * width),
            at_p=first[:, None] + patched,
            at_last=first + length - 1,
            buckets=(bucket,),
        )
