"""How the examples of a sweep are split: into batches of equal shape, whose suffixes are packed and attend in buckets.

Owns which examples stand together and how much of their prompts is computed; what is computed is the methods' business.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxmech.compiled_sizes import aligned, aligned_examples
from jaxmech.shared_prefix import SharedPrompts, shared_length
from jaxmech.suffixes import Span, Suffixes, suffix_lengths

BUCKETS = 4  # parts of a batch that attend together, padded to the longest suffix and prefix in it


@dataclass(frozen=True)
class Batches:
    """The examples of a sweep in batches of equal shape.

    Attributes:
      tokens: int32 [S, B, T], the S prompts of each example (clean and corrupt, say), padded to one length.
      p: int [B, R], the tokens of each example's first prompt that are patched; its suffix starts at the first.
      last: int [B], where it ends.
      rows: the examples of each batch; all batches have equally many.
      capacity: packed suffix tokens of a batch.
      spans: the buckets of a batch.
      shared_tokens: tokens at the start of every prompt that are computed once for the prompts that share them.
      shared_prefixes: distinct ones in a batch, at most.
    """

    tokens: np.ndarray  # [S, B, T]
    p: np.ndarray  # [B, R]
    last: np.ndarray  # [B]
    rows: list[np.ndarray]
    capacity: int
    spans: list[Span]
    shared_tokens: int
    shared_prefixes: int

    @classmethod
    def plan(cls, prompts: Sequence[np.ndarray], p: np.ndarray, last: np.ndarray, size: int) -> "Batches":
        """Splits the examples into batches of at most `size`, longest suffixes first, with similar sums of lengths.

        Args:
          prompts: token ids [B, T] of each of the S prompts; lengths may differ between them.
          p, last: see `Batches`.

        Raises:
          ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"batch_size={size}; expected at least 1.")
        width = max(tokens.shape[1] for tokens in prompts)
        tokens = np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in prompts])
        length = suffix_lengths(p, last)
        count = -(-len(p) // size)
        order = np.argsort(-length, kind="stable")
        rows = [order[first::count] for first in range(count)]
        together = aligned_examples(len(rows[0]))
        rows = [np.pad(batch, (0, together - len(batch)), "edge") for batch in rows]
        shared_tokens, shared_prefixes = shared_length([tokens[:, batch].reshape(-1, width) for batch in rows])
        return cls(
            tokens=tokens,
            p=p,
            last=last,
            rows=rows,
            capacity=aligned(max(int(length[batch].sum()) for batch in rows)),
            spans=_spans(rows, p.min(axis=1), length, width),
            shared_tokens=shared_tokens,
            shared_prefixes=shared_prefixes,
        )

    @property
    def computed_tokens(self) -> int:
        """Tokens of all prompts that are computed, shared prefixes once a batch."""
        count, examples, width = self.tokens.shape
        behind = count * examples * (width - self.shared_tokens)
        return len(self.rows) * self.shared_prefixes * self.shared_tokens + behind

    def prompts(self, rows: np.ndarray) -> SharedPrompts:
        """The S * b prompts of a batch, the first of all examples, then the second, and so on."""
        together = self.tokens[:, rows].reshape(-1, self.tokens.shape[-1])
        return SharedPrompts.split(together, self.shared_tokens, self.shared_prefixes)

    def suffixes(self, rows: np.ndarray) -> Suffixes:
        """The suffixes of a batch."""
        return Suffixes.pack(self.p[rows], self.last[rows], capacity=self.capacity, spans=self.spans)


def equal_parts(count: int, size: int, copies: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices 0 .. count - 1 in as few parts of at most `size` as there can be, or a little more, all of one shape.

    The last part is filled up by indices from 0 on.

    Args:
      copies: of the model, that share a part: it is so much larger that they divide its size.

    Yields:
      The indices of a part, and which of them are new there, bool.

    Raises:
      ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"batch_size={size}; expected at least 1.")
    size = aligned_examples(-(-count // -(-count // size)), copies)
    for start in range(0, count, size):
        indices = np.arange(start, start + size)
        yield indices % count, indices < count


def calls_of_equal_size(
    rows: np.ndarray, work: float, most: int, *, copies: int = 1, besides: int = 0
) -> list[np.ndarray]:
    """Rows of a sweep (senders, heads, first layers) in consecutive calls of one shape.

    The last call repeats some of its own rows to be as long as the others.

    Args:
      work: what one row is of the work that a call should do at least, on each copy of the model.
      most: calls, however much work there is.
      copies: of the model, that share a call's rows: they divide its number of rows.
      besides: rows that every call has besides.
    """
    count = max(1, min(most, math.ceil(len(rows) * work / copies)))
    size = math.ceil(len(rows) / count) + besides
    size += -size % copies - besides
    return [np.resize(rows[first : first + size], size) for first in range(0, len(rows), size)]


def _spans(batches: list[np.ndarray], start: np.ndarray, length: np.ndarray, tokens: int) -> list[Span]:
    """Buckets of similar lengths, the same for all batches: equal parts of the order.

    Args:
      start: [B], where each suffix starts.
      length: [B], its tokens.
      tokens: of a prompt.
    """
    count = min(BUCKETS, len(np.unique(length)))
    bounds = [len(batches[0]) * i // count for i in range(count + 1)]
    spans = []
    for first, end in pairwise(bounds):
        if first < end:
            rows = np.concatenate([batch[first:end] for batch in batches])
            prefix = min(aligned(max(1, int(start[rows].max()))), tokens)
            spans.append(Span(first, end, aligned(int(length[rows].max())), prefix))
    return spans
