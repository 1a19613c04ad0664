"""Which mask of a training is the best, by how well each does on other pairs."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from jaxmech.compat import check_compat
from jaxmech.dcm.groups import Role
from jaxmech.dcm.runs import Run
from jaxmech.dcm.testing import accuracies, accuracy
from jaxmech.loading import Model
from jaxmech.pairs import Pairs, one_or_more

Name = TypeVar("Name", bound=Hashable)
Desideratum = TypeVar("Desideratum", bound=Hashable)


def select(
    model: Model,
    run: Run,
    validation_pairs: Pairs,
    role: Role | None = None,
    *,
    every: int = 4,
    compat: str | None = None,
    train_pairs: Pairs | None = None,
) -> Run:
    """The run with the mask whose rounding is best on other pairs, among those after every `every` steps and the last.

    Ties go to the mask that patches fewer heads, then to the earlier one.

    Args:
      model: the model that the run was trained on.
      run: what `train` returned.
      validation_pairs: as `train_pairs`, others.
      role: where heads are patched that have one mask; None: where they were in training.
      every: steps between two masks that are tried.
      compat: "paper" lets ties go to the mask that patches more heads (i), and takes `prev_query_box` from the training
        batch of the step instead of the validation pairs (h); see docs/paper_compat.md.
      train_pairs: what the run was trained on; for compat="paper" at `prev_query_box` alone.
    """
    options = {"every": every, "compat": compat, "train_pairs": None if train_pairs is None else {"": train_pairs}}
    return select_many(model, {("", ""): run}, {"": validation_pairs}, role, **options)["", ""]


def select_many(
    model: Model,
    runs: Mapping[tuple[Desideratum, Name], Run],
    validation_pairs: Mapping[Desideratum, Pairs],
    role: Role | None = None,
    *,
    every: int = 4,
    compat: str | None = None,
    train_pairs: Mapping[Desideratum, Pairs] | None = None,
) -> dict[tuple[Desideratum, Name], Run]:
    """`select` for several runs, {(desideratum, name): run}, in one pass over the validation pairs.

    Args:
      model: the model that the runs were trained on.
      runs: (desideratum, name) -> what was trained; names are any that tell the runs of a desideratum apart.
      validation_pairs: desideratum -> pairs that it was not trained on.
      role: where heads are patched that have one mask; None: where they were in training.
      every: steps between two masks that are tried.
      compat: "paper" does as in `select`.
      train_pairs: desideratum -> what its runs were trained on; for compat="paper" at `prev_query_box` alone.

    Returns:
      (desideratum, name) -> the run with its best mask.
    """
    paper = check_compat(compat)
    if every < 1:
        raise ValueError(f"every={every}; expected at least 1.")
    runs = {key: _moved(run, role) for key, run in runs.items()}
    steps, rounded = {}, {}
    for key, run in runs.items():
        steps[key] = sorted({*range(every, len(run.history.mask) + 1, every), len(run.history.mask)})
        rounded[key] = np.round(run.history.mask[np.array(steps[key]) - 1])
    found: dict[tuple[Desideratum, Name], np.ndarray] = {}
    distinct: dict[tuple[Desideratum, Name], np.ndarray] = {}
    masks: list[dict[tuple[Desideratum, tuple[str, ...]], dict[Name, Any]]] = [{}, {}]  # of lists, and of {role: heads}
    for key, run in runs.items():
        if paper and any("prev_query_box" in roles for roles in run.roles):
            found[key] = _at_training_positions(model, run, validation_pairs, train_pairs, key[0], steps[key])
        else:
            once, distinct[key] = np.unique(rounded[key], axis=0, return_inverse=True)
            of_kind = masks[isinstance(run.group, dict)].setdefault((key[0], _roles(run)), {})
            of_kind[key[1]] = run.group, once
    answered = [accuracies(model, validation_pairs, of_kind) for of_kind in masks]
    for key, index in distinct.items():
        run = runs[key]
        found[key] = answered[isinstance(run.group, dict)][key[0], _roles(run)][key[1]][index.reshape(-1)]

    def best(key: tuple[Desideratum, Name]) -> Run:
        run, patched = runs[key], (rounded[key] == 0).sum(axis=1)
        rank = [(x, n if paper else -n, -i) for i, (x, n) in enumerate(zip(found[key], patched, strict=True))]
        i = rank.index(max(rank))
        step = steps[key][i]
        return replace(run, mask=run.history.mask[step - 1], step=step, validation_accuracy=float(found[key][i]))

    return {key: best(key) for key in runs}


def _moved(run: Run, role: Role | None) -> Run:
    """The run with its heads at `role`, or where they were in training."""
    if role is None:
        return run
    if isinstance(run.group, dict):
        raise ValueError(f"role={role!r}, but heads of the run have masks at roles of their own; leave role out.")
    return replace(run, roles=[tuple(one_or_more(role, "role"))] * len(run.heads))


def _roles(run: Run) -> tuple[str, ...]:
    """All roles at which heads of a run are patched."""
    return tuple(dict.fromkeys(role for roles in run.roles for role in roles))


def _at_training_positions(
    model: Model,
    run: Run,
    validation_pairs: Mapping[Desideratum, Pairs],
    train_pairs: Mapping[Desideratum, Pairs] | None,
    desideratum: Desideratum,
    steps: Sequence[int],
) -> np.ndarray:
    """The accuracy of the rounded mask after each of the steps, [M], at `prev_query_box` of training (compat, h)."""
    if set(run.roles) != {("prev_query_box",)}:
        raise ValueError(f'compat="paper" is of masks at prev_query_box alone, not at {", ".join(_roles(run))}.')
    if train_pairs is None:
        raise ValueError('compat="paper" at prev_query_box validates at training positions; give train_pairs.')
    found = []
    for step in steps:
        batch = train_pairs[desideratum], run.history.rows[step - 1], "prev_query_box"
        pairs = _training_positions(validation_pairs[desideratum], *batch)
        found.append(accuracy(model, pairs, run.heads, np.round(run.history.mask[step - 1])[None], "prev_query_box")[0])
    return np.array(found)


def _training_positions(pairs: Pairs, train_pairs: Pairs, batch: np.ndarray, role: str) -> Pairs:
    """The pairs with `role` where the examples of a training batch have it, over and over again (compat, h)."""
    batch = np.resize(batch[batch >= 0], len(pairs))
    clean = np.minimum(train_pairs.position(role)[batch], pairs.position("last"))
    corrupt = np.minimum(train_pairs.corrupt_position(role)[batch], pairs.corrupt_position("last"))
    positions, corrupt_positions = {**pairs.positions, role: clean}, {**pairs.corrupt_positions, role: corrupt}
    return Pairs(pairs.clean, pairs.corrupt, pairs.labels, positions, corrupt_positions)
