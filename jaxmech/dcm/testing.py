"""How well masks do on other pairs than those they were trained on."""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.config import Config
from jaxmech.dcm.groups import (
    Group,
    Listed,
    Masked,
    PatchedRoles,
    Role,
    as_group,
    check_roles,
    first_layer_of,
    masked,
    patched_roles,
)
from jaxmech.dcm.prompts import Base, BasePrompts, Place, base_key, masked_examples_at_a_time, suffix_capacity
from jaxmech.dcm.stream import StepExamples, patched_stream
from jaxmech.dcm.targets import Counterfactuals, Targets
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
Answered = dict[tuple[Desideratum, Roles], dict[Name, np.ndarray]]


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
) -> Answered[Desideratum, Roles, Name]:
    """`accuracy` of masks over several sets of heads, at several roles, on the pairs of several desiderata.

    Base prompts are run once for all desiderata that share them, counterfactual prompts once, both for all roles.

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
    found = correct(model, pairs, masks)
    return {key: {name: right.mean(axis=-1) for name, right in sets.items()} for key, sets in found.items()}


def correct(
    model: Model,
    pairs: Mapping[Desideratum, Pairs],
    masks: Masks[Desideratum, Roles, Name],
    progress: Callable[[int, int], None] | None = None,
) -> Answered[Desideratum, Roles, Name]:
    """On which pairs the model says the target, where `accuracies` has how often.

    Args:
      model, pairs, masks: as there.
      progress: called with (examples done, examples in all); those of several desiderata count once if they share
        their base prompts.

    Returns:
      (desideratum, role) -> {name: bool [M, B]}.

    Raises:
      ValueError: as `accuracy`.
    """
    for (name, role), sets in masks.items():
        if name not in pairs or not sets:
            what = "no pairs of it" if sets else "no heads"
            raise ValueError(
                f"masks has {(name, role)!r}, but there are {what}; expected pairs and masked heads of each."
            )
    given = {key: {name: (as_group(group), x) for name, (group, x) in sets.items()} for key, sets in masks.items()}
    patched = {key: patched_roles((group for group, _ in sets.values()), key[1]) for key, sets in given.items()}
    for (name, _), here in patched.items():
        check_roles(pairs[name], here)
    every = dict.fromkeys(role for here in patched.values() for role in here.roles)
    sharing: dict[Any, dict[Desideratum, Pairs]] = {}
    for name in dict.fromkeys(name for name, _ in masks):
        of = pairs[name]
        known = [role for role in every if role in of.positions and role in of.corrupt_positions]
        sharing.setdefault((*known, base_key(of, known)), {})[name] = of
    total, done = sum(len(next(iter(same.values()))) for same in sharing.values()), 0
    found: Answered[Desideratum, Roles, Name] = {}
    for same in sharing.values():
        advance = None if progress is None else (lambda more, done=done: progress(done + more, total))
        found |= _correct(model, same, {key: sets for key, sets in given.items() if key[0] in same}, patched, advance)
        done += len(next(iter(same.values())))
    return {key: found[key] for key in masks}


class _MasksAt(NamedTuple):
    """The masks of all keys whose heads are patched at the same roles."""

    place: Place
    together: int  # masks that run in one call
    weights: dict[Any, np.ndarray]  # key -> what each of its masks patches, [M, L, U, N]


def _masks_at(config: Config, patched: PatchedRoles, masks: Mapping[Any, Mapping[Any, tuple[Listed, Any]]]) -> _MasksAt:
    chosen = {
        key: [(masked(config, group, patched.roles), some) for group, some in sets.values()]
        for key, sets in masks.items()
    }
    first_layer = first_layer_of(config, [heads for sets in chosen.values() for heads, _ in sets])
    shape = config.num_layers - first_layer, patched.units, config.num_heads
    weights = {
        key: np.concatenate([_weights(heads, some, first_layer, shape) for heads, some in sets])
        for key, sets in chosen.items()
    }
    most = max(map(len, weights.values()))
    together = 2 ** (most - 1).bit_length()  # few numbers, so few compilations
    return _MasksAt(Place(patched.roles, first_layer), together, weights)


def _correct(
    model: Model,
    pairs: Mapping[Desideratum, Pairs],
    masks: Mapping[tuple[Desideratum, Roles], Mapping[Name, tuple[Listed, np.ndarray]]],
    patched: Mapping[tuple[Desideratum, Roles], PatchedRoles],
    progress: Callable[[int], None] | None,
) -> Answered[Desideratum, Roles, Name]:
    """`correct` on desiderata that share their base prompts.

    Args:
      patched: where the heads of each key are.
      progress: called with the examples done.
    """
    config, some = model.config, next(iter(pairs.values()))
    order = np.lexsort(some.clean.T[::-1])  # prompts that begin alike stand together, and share what is computed
    pairs, some = {name: x[order] for name, x in pairs.items()}, some[order]
    at = [
        _masks_at(config, here, {key: sets for key, sets in masks.items() if patched[key] == here})
        for here in dict.fromkeys(patched[key] for key in masks)
    ]
    places = [here.place for here in at]
    roles = list(dict.fromkeys(role for here in places for role in here.roles))
    last = [
        max(
            _last_patched(x, here.place.first_layer) for here in at for key, x in here.weights.items() if key[0] == name
        )
        for name in pairs
    ]
    kept = 2 * memory.of_heads(config, len(pairs) * len(roles), config.num_layers)  # once more as they are sorted
    size = masked_examples_at_a_time(model, some, places, [here.together for here in at], kept)
    parts = list(equal_parts(len(some), size))
    batches = np.stack([rows for rows, _ in parts])
    base = BasePrompts(model, [some], places, list(batches))
    counterfactuals = Counterfactuals(model, list(pairs.values()), roles, last, list(batches))
    static = [
        {
            "roles": tuple(map(roles.index, here.roles)),
            "first_layer": here.first_layer,
            "capacity": suffix_capacity([some], here.roles, batches),
        }
        for here in places
    ]
    found: dict[tuple[Desideratum, Roles], list[np.ndarray]] = {key: [] for key in masks}

    def answer(part: int) -> None:  # a function, so that its prompts go before others come
        rows, new = parts[part]
        targets = dict(zip(pairs, counterfactuals.run(part), strict=True))
        for here, prompts, options in zip(at, base.run(part), static, strict=True):
            for key, weight in here.weights.items():
                padded = np.pad(weight, ((0, here.together - len(weight)), *((0, 0),) * 3))
                inputs = prompts, targets[key[0]], over_rows(model.weights, padded)
                answered = _answers(config, model.weights, *inputs, **options)
                right = is_correct(np.asarray(answered)[: len(weight)], pairs[key[0]].labels[rows])
                found[key].append(right[:, new])

    for part, (rows, _) in enumerate(parts):
        answer(part)
        if progress:
            progress(min((part + 1) * len(rows), len(some)))
    right = {key: np.concatenate(x, axis=1)[:, np.argsort(order)] for key, x in found.items()}
    ends = {key: np.cumsum([len(some) for _, some in sets.values()])[:-1] for key, sets in masks.items()}
    return {key: dict(zip(sets, np.split(right[key], ends[key]), strict=True)) for key, sets in masks.items()}


@partial(jax.jit, static_argnames=("config", "roles", "first_layer", "capacity"))
def _answers(
    config: Config,
    weights: Params,
    base: Base,
    targets: Targets,
    weight: Array,
    *,
    roles: tuple[int, ...],
    first_layer: int,
    capacity: int,
) -> jax.Array:
    """Answers with heads patched by each of the weights [M, L, U, N], int [M, B], at some of the targets' roles."""
    base = jax.tree.map(lambda x: x[: len(targets.labels)], base)  # calls of prompts are filled up
    batch = StepExamples(base, targets.at(roles, first_layer))

    def one(weight):
        return answers(unembed(config, weights, patched_stream(config, weights, batch, weight, first_layer, capacity)))

    return jax.vmap(one)(weight)


def _last_patched(weights: np.ndarray, first_layer: int) -> int:
    """The last layer in which one of the `weights` [M, L, U, N] patches a head, or `first_layer`."""
    return first_layer + int(np.append(0, np.flatnonzero(weights.any(axis=(0, 2, 3))))[-1])


def _weights(heads: Masked, masks: Any, first_layer: int, shape: tuple[int, int, int]) -> np.ndarray:
    """What is patched by each of the masks [M, n] of some heads, [M, L, U, N]; `shape` is that without M."""
    if np.shape(masks)[1:] != (count := len(heads.heads),):
        raise ValueError(f"masks has shape {np.shape(masks)}; expected [M, {count}], of one mask [1, {count}].")
    weights = np.zeros((len(masks), *shape), np.float32)
    weights[(slice(None), *heads.within(first_layer))] = 1 - np.asarray(masks)
    return weights
