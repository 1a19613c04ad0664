"""How well masks do on other pairs than those they were trained on, and which mask of a training is the best."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.compat import check_compat
from jaxmech.config import Config
from jaxmech.dcm.groups import Group, Listed, Place, Role, as_group, check_place, first_layer_of, masked, place_of
from jaxmech.dcm.prompts import Base, BasePrompts, base_key, masked_examples_at_a_time
from jaxmech.dcm.runs import Run
from jaxmech.dcm.stream import StepExamples, patched_stream
from jaxmech.dcm.targets import Targets, collect_targets
from jaxmech.loading import Model
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs, one_or_more
from jaxmech.predictions import answers, is_correct
from jaxmech.sharding import over_rows

Name = TypeVar("Name", bound=Hashable)
Desideratum = TypeVar("Desideratum", bound=Hashable)
Roles = TypeVar("Roles", bound=str | tuple[str, ...])
Array = Any  # NumPy on the host, jax.Array inside jit
Masks = Mapping[tuple[Desideratum, Roles], Mapping[Name, tuple[Group, np.ndarray]]]
Accuracies = dict[tuple[Desideratum, Roles], dict[Name, np.ndarray]]


def accuracy(model: Model, pairs: Pairs, heads: Group, masks: np.ndarray, role: Role = "last") -> np.ndarray:
    """How often the model says the target when heads are patched by `masks`, at once for all of them: float [M].

    Args:
      model: the model that is run.
      pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      heads: the n heads, distinct (layer, head); or {role: heads} or a `Circuit`.
      masks: float [M, n], in which 0 patches a head and 1 leaves it alone, as `train` has them; round them for the
        accuracy of a selection of heads.
      role: the role at which the heads are patched, or several. Not used where `heads` name their roles.

    Raises:
      ValueError: as `train`, or masks of another shape.
    """
    key = "", tuple(one_or_more(role, "role"))
    return accuracies(model, {"": pairs}, {key: {"": (heads, masks)}})[key][""]


def accuracies(
    model: Model,
    pairs: Mapping[Desideratum, Pairs],
    masks: Masks[Desideratum, Roles, Name],
) -> Accuracies[Desideratum, Roles, Name]:
    """`accuracy` of masks over several sets of heads, at several roles, on the pairs of several desiderata.

    Base prompts are run once for all desiderata that share them, counterfactual prompts once for all roles.

    Args:
      model: the model that is run.
      pairs: desideratum -> its pairs.
      masks: (desideratum, role) -> {name: (n heads, masks [M, n])}; the role may be a tuple of several, and is not used
        where heads are {role: heads}, which all of one key are or none.

    Returns:
      (desideratum, role) -> {name: accuracy [M]}.

    Raises:
      ValueError: as `accuracy`.
    """
    given = {key: {name: (as_group(group), x) for name, (group, x) in sets.items()} for key, sets in masks.items()}
    places = {key: place_of((group for group, _ in sets.values()), key[1]) for key, sets in given.items()}
    named: dict[Desideratum, set[Place]] = {}
    for (name, _), place in places.items():
        check_place(pairs[name], place)
        named.setdefault(name, set()).add(place)
    sharing: dict[Any, dict[Desideratum, Pairs]] = {}
    for name, some in named.items():
        key = tuple((place, base_key(pairs[name], place.roles)) for place in sorted(some))
        sharing.setdefault(key, {})[name] = pairs[name]
    found: Accuracies[Desideratum, Roles, Name] = {}
    for same in sharing.values():
        found |= _accuracies(model, same, {key: sets for key, sets in given.items() if key[0] in same}, places)
    return {key: found[key] for key in masks}


def _accuracies(
    model: Model,
    pairs: Mapping[Desideratum, Pairs],
    masks: Mapping[tuple[Desideratum, Roles], Mapping[Name, tuple[Listed, np.ndarray]]],
    places: Mapping[tuple[Desideratum, Roles], Place],
) -> Accuracies[Desideratum, Roles, Name]:
    """`accuracies` on desiderata that share their base prompts, at the same places."""
    config, some = model.config, next(iter(pairs.values()))
    keys_at: dict[Place, list[tuple[Desideratum, Roles]]] = {}
    for key in masks:
        keys_at.setdefault(places[key], []).append(key)
    roles = list(dict.fromkeys(role for place in keys_at for role in place.roles))
    first_layer = {
        place: first_layer_of(config, [masked(config, x, place.roles) for key in keys for x, _ in masks[key].values()])
        for place, keys in keys_at.items()
    }
    weights = {key: _weights(config, sets, places[key], first_layer[places[key]]) for key, sets in masks.items()}
    last = [max(_last_patched(x, first_layer[places[key]]) for key, x in weights.items() if key[0] == d) for d in pairs]
    most = {place: max(len(weights[key]) for key in keys) for place, keys in keys_at.items()}
    most = {place: 2 ** (count - 1).bit_length() for place, count in most.items()}  # few numbers, so few compilations
    kept = 2 * memory.of_heads(config, len(pairs) * len(roles), config.num_layers)  # once more as they are sorted
    size = min(
        masked_examples_at_a_time(model, some, place.roles, first_layer[place], most[place], kept) for place in keys_at
    )
    parts = list(equal_parts(len(some), size))
    base = {
        place: BasePrompts(model, [some], place.roles, first_layer[place], [rows for rows, _ in parts])
        for place in keys_at
    }
    correct: dict[tuple[Desideratum, Roles], list[np.ndarray]] = {key: [] for key in masks}
    for part, (rows, new) in enumerate(parts):
        collected = collect_targets(model, [x[rows] for x in pairs.values()], roles, last)
        targets = dict(zip(pairs, collected, strict=True))
        for place, keys in keys_at.items():
            prompts, at = base[place].run(part), tuple(roles.index(role) for role in place.roles)
            for key in keys:
                weight = weights[key]
                padded = np.pad(weight, ((0, most[place] - len(weight)), *((0, 0),) * 3))
                inputs = prompts, targets[key[0]], over_rows(model.weights, padded)
                found = _answers(config, model.weights, *inputs, roles=at, first_layer=first_layer[place])
                right = is_correct(np.asarray(found)[: len(weight)], pairs[key[0]].labels[rows])
                correct[key].append(right[:, new])
    answered = {key: np.concatenate(x, axis=1).mean(-1) for key, x in correct.items()}
    ends = {key: np.cumsum([len(some) for _, some in sets.values()])[:-1] for key, sets in masks.items()}
    return {key: dict(zip(sets, np.split(answered[key], ends[key]), strict=True)) for key, sets in masks.items()}


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
      role: where the heads are patched; None: where they were in training.
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
      role: where the heads are patched; None: where they were in training.
      every: steps between two masks that are tried.
      compat: "paper" does as in `select`.
      train_pairs: desideratum -> what its runs were trained on; for compat="paper" at `prev_query_box` alone.

    Returns:
      (desideratum, name) -> the run with its best mask.
    """
    paper = check_compat(compat)
    if every < 1:
        raise ValueError(f"every={every}; expected at least 1.")
    steps, rounded = {}, {}
    for key, run in runs.items():
        steps[key] = sorted({*range(every, len(run.history.mask) + 1, every), len(run.history.mask)})
        rounded[key] = np.round(run.history.mask[np.array(steps[key]) - 1])
    at = {key: _roles(run, role) for key, run in runs.items()}
    moved = {key for key, roles in at.items() if paper and roles == ("prev_query_box",)}
    if moved and train_pairs is None:
        raise ValueError('compat="paper" at prev_query_box validates at training positions; give train_pairs.')
    found: dict[tuple[Desideratum, Name], np.ndarray] = {}
    distinct, masks = {}, {}
    for key, run in runs.items():
        (desideratum, name), roles = key, at[key]
        if key in moved and train_pairs is not None:
            pairs = validation_pairs[desideratum], train_pairs[desideratum]
            tried = [_training_positions(*pairs, run.history.rows[step - 1], *roles) for step in steps[key]]
            each = zip(tried, rounded[key], strict=True)
            found[key] = np.array([accuracy(model, x, run.group, mask[None], roles)[0] for x, mask in each])
        else:
            once, distinct[key] = np.unique(rounded[key], axis=0, return_inverse=True)
            masks.setdefault((desideratum, roles), {})[name] = run.group, once
    answered = accuracies(model, validation_pairs, masks)
    for (desideratum, name), index in distinct.items():
        found[desideratum, name] = answered[desideratum, at[desideratum, name]][name][index.reshape(-1)]

    def best(key: tuple[Desideratum, Name]) -> Run:
        run, patched = runs[key], (rounded[key] == 0).sum(axis=1)
        rank = [(x, n if paper else -n, -i) for i, (x, n) in enumerate(zip(found[key], patched, strict=True))]
        i = rank.index(max(rank))
        step = steps[key][i]
        return replace(run, mask=run.history.mask[step - 1], step=step, validation_accuracy=float(found[key][i]))

    return {key: best(key) for key in runs}


@partial(jax.jit, static_argnames=("config", "roles", "first_layer"))
def _answers(
    config: Config,
    weights: Params,
    base: Base,
    targets: Targets,
    weight: Array,
    *,
    roles: tuple[int, ...],
    first_layer: int,
) -> jax.Array:
    """Answers with heads patched by each of the weights [M, L, U, N], int [M, B], at some of the targets' roles."""
    base = jax.tree.map(lambda x: x[: len(targets.labels)], base)  # calls of prompts are filled up
    batch = StepExamples(base, targets.at(roles, first_layer))

    def one(weight):
        return answers(unembed(config, weights, patched_stream(config, weights, batch, weight, first_layer)))

    return jax.vmap(one)(weight)


def _roles(run: Run, role: Role | None) -> tuple[str, ...]:
    """Where the heads of a run are patched: at `role`, or where they were in training."""
    group = run.group
    if isinstance(group, Mapping):
        return tuple(group)
    return run.roles[0] if role is None else tuple(one_or_more(role, "role"))


def _last_patched(weights: np.ndarray, first_layer: int) -> int:
    """The last layer in which one of the `weights` [M, L, U, N] patches a head, or `first_layer`."""
    return first_layer + int(np.append(0, np.flatnonzero(weights.any(axis=(0, 2, 3))))[-1])


def _weights(config: Config, masks: Mapping[Any, tuple[Listed, Any]], place: Place, first_layer: int) -> np.ndarray:
    """What is patched by each of the masks of all sets, [M, L, U, N]."""
    found = []
    for group, some in masks.values():
        heads = masked(config, group, place.roles)
        count = len(heads.heads)
        if np.shape(some)[1:] != (count,):
            raise ValueError(f"masks has shape {np.shape(some)}; expected [M, {count}], of one mask [1, {count}].")
        layers = config.num_layers - first_layer
        found.append(np.zeros((len(some), layers, place.units, config.num_heads), np.float32))
        found[-1][(slice(None), *heads.within(first_layer))] = 1 - np.asarray(some)
    return np.concatenate(found)


def _training_positions(pairs: Pairs, train_pairs: Pairs, batch: np.ndarray, role: str) -> Pairs:
    """The pairs with `role` where the examples of a training batch have it, over and over again (compat, h)."""
    batch = np.resize(batch[batch >= 0], len(pairs))
    clean = np.minimum(train_pairs.position(role)[batch], pairs.position("last"))
    corrupt = np.minimum(train_pairs.corrupt_position(role)[batch], pairs.corrupt_position("last"))
    positions, corrupt_positions = {**pairs.positions, role: clean}, {**pairs.corrupt_positions, role: corrupt}
    return Pairs(pairs.clean, pairs.corrupt, pairs.labels, positions, corrupt_positions)
