"""How examples are split: parts of one shape, every index once, and sizes that GPUs and TPUs like."""

import jax
import numpy as np
import pytest

from jaxmech import compiled_sizes
from jaxmech.batches import Batches, calls_of_equal_size, equal_parts


@pytest.mark.parametrize(("count", "size"), [(10, 3), (10, 10), (10, 99), (1, 1), (7, 2)])
@pytest.mark.parametrize("copies", [1, 4])
def test_parts_have_one_shape_and_every_index_once(count, size, copies):
    parts = list(equal_parts(count, size, copies))
    (length,) = {len(rows) for rows, _ in parts}
    assert len(parts) <= -(-count // size) and length * len(parts) < count + len(parts) * copies, "as few and as small"
    np.testing.assert_array_equal(np.concatenate([rows[new] for rows, new in parts]), np.arange(count))


@pytest.mark.parametrize(
    ("count", "size", "copies", "expected"),
    [(300, 999, 1, 304), (304, 999, 1, 304), (100, 999, 1, 100), (900, 300, 6, 300)],
)
def test_parts_are_multiples_of_eight_on_gpus_where_that_adds_little(monkeypatch, count, size, copies, expected):
    monkeypatch.setitem(compiled_sizes.ALIGNMENT, jax.default_backend(), 8)
    assert {len(rows) for rows, _ in equal_parts(count, size, copies)} == {expected}
    if copies == 1:
        tokens, last = np.zeros((count, 9), int), np.full(count, 8)
        plan = Batches.plan([tokens], last[:, None], last, size)
        assert {len(rows) for rows in plan.rows} == {expected}
        assert set(np.concatenate(plan.rows)) == set(range(count))


@pytest.mark.parametrize("besides", [0, 1])
@pytest.mark.parametrize("copies", [1, 4])
def test_calls_have_one_shape_that_copies_divide_and_every_row(besides, copies):
    for count, work in [(17, 0.3), (64, 0.1), (5, 9.0)]:
        calls = calls_of_equal_size(np.arange(count), work, most=5, copies=copies, besides=besides)
        assert len({len(call) for call in calls}) == 1 and (len(calls[0]) + besides) % copies == 0
        assert len(calls) <= 5 and set(np.concatenate(calls)) == set(range(count))


def test_a_part_has_an_example_at_least():
    with pytest.raises(ValueError, match="batch_size=0; expected at least 1"):
        list(equal_parts(3, 0))
