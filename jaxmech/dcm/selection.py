"""How well masks do on other pairs than those they were trained on, and which mask of a training is the best."""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from jaxmech import memory
from jaxmech.batches import equal_parts
from jaxmech.compat import check_compat
from jaxmech.config import Config
from jaxmech.dcm.prompts import Base, BasePrompts, base_key, masked_examples_at_a_time
from jaxmech.dcm.stream import Heads, StepExamples, check_heads, first_layer_of, patched_stream
from jaxmech.dcm.targets import Targets, collect_targets
from jaxmech.dcm.training import Run
from jaxmech.loading import Model
from jaxmech.model import Params, unembed
from jaxmech.pairs import Pairs
from jaxmech.predictions import answers, is_correct
from jaxmech.sharding import over_rows

Name = TypeVar("Name", bound=Hashable)
Desideratum = TypeVar("Desideratum", bound=Hashable)
Array = Any  # NumPy on the host, jax.Array inside jit


def accuracy(model: Model, pairs: Pairs, heads: Heads, masks: np.ndarray, role: str = "last") -> np.ndarray:
    """How often the model says the target when heads are patched by `masks`, at once for all of them: float [M].

    Args:
      model: the model that is run.
      pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      heads: the n heads, distinct (layer, head).
      masks: float [M, n], in which 0 patches a head and 1 leaves it alone, as `train` has them; round them for the
        accuracy of a selection of heads.
      role: the role at which the heads are patched.

    Raises:
      ValueError: as `train`, or masks of another shape.
    """
    return accuracies(model, {"": pairs}, {("", role): {"": (heads, masks)}})["", role][""]


def accuracies(
    model: Model,
    pairs: Mapping[Desideratum, Pairs],
    masks: Mapping[tuple[Desideratum, str], Mapping[Name, tuple[Heads, np.ndarray]]],
) -> dict[tuple[Desideratum, str], dict[Name, np.ndarray]]:
    """`accuracy` of masks over several sets of heads, at several roles, on the pairs of several desiderata.

    Base prompts are run once for all desiderata that share them, counterfactual prompts once for all roles.

    Args:
      model: the model that is run.
      pairs: desideratum -> its pairs.
      masks: (desideratum, role) -> {name: (n heads, masks [M, n])}.

    Returns:
      (desideratum, role) -> {name: accuracy [M]}.

    Raises:
      ValueError: as `accuracy`.
    """
    roles: dict[Desideratum, set[str]] = {}
    for name, role in masks:
        roles.setdefault(name, set()).add(role)
    sharing: dict[Any, dict[Desideratum, Pairs]] = {}
    for name, named in roles.items():
        key = tuple((role, base_key(pairs[name], role)) for role in sorted(named))
        sharing.setdefault(key, {})[name] = pairs[name]
    found: dict[tuple[Desideratum, str], dict[Name, np.ndarray]] = {}
    for same in sharing.values():
        found |= _accuracies(model, same, {(name, role): x for (name, role), x in masks.items() if name in same})
    return {key: found[key] for key in masks}


def _accuracies(
    model: Model,
    pairs: Mapping[Desideratum, Pairs],
    masks: Mapping[tuple[Desideratum, str], Mapping[Name, tuple[Heads, np.ndarray]]],
) -> dict[tuple[Desideratum, str], dict[Name, np.ndarray]]:
    """`accuracies` on desiderata that share their base prompts, at the same roles."""
    config, some = model.config, next(iter(pairs.values()))
    roles = list(dict.fromkeys(role for _, role in masks))
    first_layer = {role: _first_layer_at(config, masks, role) for role in roles}
    weights = {(name, role): _weights(config, sets, first_layer[role]) for (name, role), sets in masks.items()}
    last = [max(_last_patched(x, first_layer[at]) for (name, at), x in weights.items() if name == one) for one in pairs]
    most = {role: max(len(x) for (_, at), x in weights.items() if at == role) for role in roles}
    most = {role: 2 ** (count - 1).bit_length() for role, count in most.items()}  # few numbers, so few compilations
    kept = 2 * memory.of_heads(config, len(pairs) * len(roles), config.num_layers)  # once more as they are sorted
    size = min(masked_examples_at_a_time(model, some, role, first_layer[role], most[role], kept) for role in roles)
    parts = list(equal_parts(len(some), size))
    base = {role: BasePrompts(model, [some], role, first_layer[role], [rows for rows, _ in parts]) for role in roles}
    correct: dict[tuple[Desideratum, str], list[np.ndarray]] = {key: [] for key in masks}
    for part, (rows, new) in enumerate(parts):
        collected = collect_targets(model, [x[rows] for x in pairs.values()], roles, last)
        targets = dict(zip(pairs, collected, strict=True))
        for i, role in enumerate(roles):
            prompts = base[role].run(part)
            for name in [name for name, at in weights if at == role]:
                weight = weights[name, role]
                padded = np.pad(weight, ((0, most[role] - len(weight)), (0, 0), (0, 0)))
                here = over_rows(model.weights, padded)
                inputs = prompts, targets[name], here
                found = _answers(config, model.weights, *inputs, role=i, first_layer=first_layer[role])
                right = is_correct(np.asarray(found)[: len(weight)], pairs[name].labels[rows])
                correct[name, role].append(right[:, new])
    answered = {key: np.concatenate(x, axis=1).mean(-1) for key, x in correct.items()}
    ends = {key: np.cumsum([len(some) for _, some in sets.values()])[:-1] for key, sets in masks.items()}
    return {key: dict(zip(sets, np.split(answered[key], ends[key]), strict=True)) for key, sets in masks.items()}


def select(
    model: Model,
    run: Run,
    validation_pairs: Pairs,
    role: str = "last",
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
      role: the one it was trained at.
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
    role: str = "last",
    *,
    every: int = 4,
    compat: str | None = None,
    train_pairs: Mapping[Desideratum, Pairs] | None = None,
) -> dict[tuple[Desideratum, Name], Run]:
    """`select` for several runs at one role, {(desideratum, name): run}, in one pass over the validation pairs.

    Args:
      model: the model that the runs were trained on.
      runs: (desideratum, name) -> what was trained; names are any that tell the runs of a desideratum apart.
      validation_pairs: desideratum -> pairs that it was not trained on.
      role: the one that all were trained at.
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
    found: dict[tuple[Desideratum, Name], np.ndarray] = {}
    if paper and role == "prev_query_box":
        if train_pairs is None:
            raise ValueError('compat="paper" at prev_query_box validates at training positions; give train_pairs.')
        for key, run in runs.items():
            pairs = validation_pairs[key[0]], train_pairs[key[0]]
            moved = [_training_positions(*pairs, run.history.rows[step - 1], role) for step in steps[key]]
            tried = zip(moved, rounded[key], strict=True)
            found[key] = np.array([accuracy(model, x, run.heads, mask[None], role)[0] for x, mask in tried])
    else:
        distinct = {key: np.unique(masks, axis=0, return_inverse=True) for key, masks in rounded.items()}
        masks: dict[tuple[Desideratum, str], dict[Name, tuple[Heads, np.ndarray]]] = {}
        for (desideratum, name), (once, _) in distinct.items():
            masks.setdefault((desideratum, role), {})[name] = runs[desideratum, name].heads, once
        answered = accuracies(model, validation_pairs, masks)
        for (desideratum, name), (_, index) in distinct.items():
            found[desideratum, name] = answered[desideratum, role][name][index.reshape(-1)]

    def best(key: tuple[Desideratum, Name]) -> Run:
        run, patched = runs[key], (rounded[key] == 0).sum(axis=1)
        rank = [(x, n if paper else -n, -i) for i, (x, n) in enumerate(zip(found[key], patched, strict=True))]
        i = rank.index(max(rank))
        step = steps[key][i]
        return Run(run.heads, run.history.mask[step - 1], run.history, step, float(found[key][i]))

    return {key: best(key) for key in runs}


@partial(jax.jit, static_argnames=("config", "role", "first_layer"))
def _answers(
    config: Config, weights: Params, base: Base, targets: Targets, weight: Array, *, role: int, first_layer: int
) -> jax.Array:
    """Answers with heads patched by each of the weights [M, L, N], int [M, B], at one of the targets' roles."""
    base = jax.tree.map(lambda x: x[: len(targets.labels)], base)  # calls of prompts are filled up
    batch = StepExamples(base, targets.at(role, first_layer))

    def one(weight):
        return answers(unembed(config, weights, patched_stream(config, weights, batch, weight, first_layer)))

    return jax.vmap(one)(weight)


def _first_layer_at(config: Config, masks: Mapping[Any, Mapping[Any, tuple[Heads, Any]]], role: str) -> int:
    """The first layer of all heads that are patched at a role."""
    here = [heads for (_, at), sets in masks.items() if at == role for heads, _ in sets.values()]
    return first_layer_of(config, [head for heads in here for head in check_heads(config, heads)])


def _last_patched(weights: np.ndarray, first_layer: int) -> int:
    """The last layer in which one of the `weights` [M, L, N] patches a head, or `first_layer`."""
    return first_layer + int(np.append(0, np.flatnonzero(weights.any(axis=(0, 2))))[-1])


def _weights(config: Config, masks: Mapping[Any, tuple[Heads, np.ndarray]], first_layer: int) -> np.ndarray:
    """What is patched by each of the masks of all sets, [M, L, N]."""
    found = []
    for heads, some in masks.values():
        heads = check_heads(config, heads)
        if np.shape(some)[1:] != (len(heads),):
            raise ValueError(
                f"masks has shape {np.shape(some)}; expected [M, {len(heads)}], of one mask [1, {len(heads)}]."
            )
        layers, numbers = np.array(heads).T
        found.append(np.zeros((len(some), config.num_layers - first_layer, config.num_heads), np.float32))
        found[-1][:, layers - first_layer, numbers] = 1 - np.asarray(some)
    return np.concatenate(found)


def _training_positions(pairs: Pairs, train_pairs: Pairs, batch: np.ndarray, role: str) -> Pairs:
    """The pairs with `role` where the examples of a training batch have it, over and over again (compat, h)."""
    batch = np.resize(batch[batch >= 0], len(pairs))
    clean = np.minimum(train_pairs.position(role)[batch], pairs.position("last"))
    corrupt = np.minimum(train_pairs.corrupt_position(role)[batch], pairs.corrupt_position("last"))
    positions, corrupt_positions = {**pairs.positions, role: clean}, {**pairs.corrupt_positions, role: corrupt}
    return Pairs(pairs.clean, pairs.corrupt, pairs.labels, positions, corrupt_positions)
