"""How sizes are rounded up: so that few differ, and others share what is compiled, or so that matrix units take them.

A function of JAX is compiled anew for every shape of its arguments. What fills up a size is computed in vain.
"""

import math

import jax

# Packed tokens, widths of suffixes, lengths of prefixes and examples are multiples of this where that adds little: the
# matrix units of GPUs and TPUs take no others, and where sizes are not, XLA copies the operands of every product.
ALIGNMENT = {"cpu": 1, "gpu": 8, "tpu": 8}


def few_sizes(size: int, multiple: int = 1, share: int = 8) -> int:
    """So many or up to an eighth more, or another `share`, a power of two; a multiple of `multiple`."""
    step = max(multiple, 2 ** max(0, size.bit_length() - share.bit_length()))
    return size + -size % step


def few_counts(count: int) -> int:
    """So many or a few more: a power of two up to eight, then a multiple of eight."""
    return 2 ** (count - 1).bit_length() if count < 8 else count + -count % 8


def aligned(size: int) -> int:
    """So many tokens or a few more, as matrix units take them; fewer than two of their steps are left as they are."""
    step = _alignment()
    return size if size < 2 * step else size + -size % step


def aligned_examples(examples: int, copies: int = 1) -> int:
    """So many examples or a few more: a multiple of `copies`, and of the alignment if that adds a fiftieth at most."""
    examples += -examples % copies
    more = -examples % math.lcm(_alignment(), copies)
    return examples + more if 50 * more <= examples else examples


def _alignment() -> int:
    return ALIGNMENT.get(jax.default_backend(), 1)
