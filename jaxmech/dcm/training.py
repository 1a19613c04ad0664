"""Training of masks over heads: what is trained, and what of it together."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optax

from jaxmech import memory
from jaxmech.config import Config
from jaxmech.dcm.groups import (
    Group,
    Masked,
    PatchedRoles,
    Role,
    as_group,
    check_roles,
    first_layer_of,
    masked,
    patched_roles,
)
from jaxmech.dcm.prompts import Place
from jaxmech.dcm.runs import History, Run
from jaxmech.dcm.steps import TARGET_LOGIT, GroupsAt, How, Training
from jaxmech.loading import Model
from jaxmech.metrics import METRICS, Metric, check_metric
from jaxmech.pairs import Pairs


def train(
    model: Model,
    train_pairs: Pairs,
    heads: Group,
    role: Role = "last",
    lam: float = 0.01,
    learning_rate: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    shuffle: bool = False,
    *,
    seed: int = 0,
    metric: Metric = TARGET_LOGIT,
    optimizer: optax.GradientTransformation | None = None,
) -> Run:
    """Trains one mask with Adam or another optimizer of optax, from m = 1; m is clipped to [0, 1] after every step.

    A head's z is m times its own plus 1 - m times that of the counterfactual prompt: 0 patches it, 1 leaves it alone.

    Args:
      model: the model, which stays as it is.
      train_pairs: base prompts (clean), counterfactual prompts (corrupt) and target tokens (labels).
      heads: distinct (layer, head), all at `role`; or {role: heads} or a `Circuit`, whose roles must be different
        tokens of every prompt, and where a head at two roles has two masks.
      role: the role at which the heads are patched, or several, at all of which a head has one mask: the tokens of a
        name, say. Not used where `heads` name their roles.
      lam: weight of the number of patched heads in the loss, logits per head. With 0, nothing holds back the masks of
        heads that change nothing: Adam turns the rounding of their gradients into steps.
      learning_rate: that of Adam.
      epochs: passes over the pairs; the last batch of each may be shorter.
      batch_size: pairs in one step.
      shuffle: draw another order for every epoch from `seed`.
      seed: of these orders.
      metric: what masks are trained to raise: "target_logit", the paper's; or one of `jaxmech.metrics`,
        "logit_difference" by the pairs' `wrong_labels`; or a function of the logits, see `path_patch`, that can be
        differentiated. The loss is minus its mean, and `lam` counts in its units.
      optimizer: one of optax, in place of Adam with `learning_rate`. Each new object compiles anew.

    Returns:
      The run; `mask` is that after the last step.

    Raises:
      TypeError: an optimizer that is none of optax.
      ValueError: no corrupt prompts, an unknown role or head, a head named twice, fewer pairs than a batch, no epochs,
        a lambda or learning rate that is no number, an unknown metric, roles that are one token and would give it two
        values, or a loss that is not finite.
    """
    options = {"learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size, "shuffle": shuffle}
    options |= {"metric": metric, "optimizer": optimizer}
    runs = train_many(model, {"": train_pairs}, {"": heads}, role, lams=[lam], seeds=[seed], **options)
    return runs["", "", lam, seed]


def train_many(
    model: Model,
    train_pairs: Mapping[str, Pairs],
    groups: Mapping[str, Group],
    role: Role = "last",
    *,
    lams: Sequence[float] = (0.01,),
    seeds: Sequence[int] = (0,),
    learning_rate: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    shuffle: bool = False,
    metric: Metric = TARGET_LOGIT,
    optimizer: optax.GradientTransformation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, str, float, int], Run]:
    """Trains a mask for every desideratum, group, lambda and seed at once; see `train`.

    Args:
      model: the model, which stays as it is.
      train_pairs: desideratum -> its pairs, equally many for each.
      groups: name -> heads of a group, all at `role`; or, in all groups, {role: heads} or a `Circuit`. Names say
        nothing of roles: {"early": heads} is a group at `role`. Prompts are run once for all groups, at whatever roles,
        if that fits the memory.
      role: the role at which the heads are patched, or several; see `train`.
      lams: the lambdas, weights of the number of patched heads in the loss; `lam` of `train`.
      seeds: the seeds; without `shuffle` they make no difference.
      learning_rate: that of Adam.
      epochs: passes over the pairs.
      batch_size: pairs in one step.
      shuffle: draw another order for every epoch from the seed.
      metric: what masks are trained to raise; see `train`.
      optimizer: one of optax, in place of Adam with `learning_rate`.
      progress: called with (calls done, calls in all); a call trains as many runs for as many steps as fit the memory.

    Returns:
      {(desideratum, group, lambda, seed): run}.
    """
    config = model.config
    for name, given in {"desiderata": train_pairs, "groups": groups, "lams": lams, "seeds": seeds}.items():
        if not len(given):
            raise ValueError(f"train_many has no {name}; expected at least one.")
    count = _check_training(config, train_pairs, lams, learning_rate, optimizer, epochs, batch_size, metric)
    at = _by_place(config, train_pairs, groups, role)
    orders = np.stack([_order(count, epochs, batch_size, seed if shuffle else None) for seed in seeds])
    how = How(lams, seeds, orders, learning_rate, optimizer, metric)
    trainings = [Training(model, some, here, how) for some, here in _fitting(model, train_pairs, at)]
    done, calls = itertools.count(1), sum(training.calls for training in trainings)

    def advance() -> None:
        number = next(done)
        if progress:
            progress(number, calls)

    trained = dict(run for training in trainings for run in training.run(advance))
    if count := sum(not np.isfinite(run.loss).all() for run in trained.values()):
        raise ValueError(
            f"The loss of {count} of {len(trained)} trainings is not finite; look at the model's parameters, or try "
            "dtype float32 or bfloat16."
        )
    heads = {name: group for here in at for name, group in here.groups.items()}
    runs = {}
    for key in itertools.product(train_pairs, groups, lams, seeds):
        group, history = heads[key[1]], History(*trained[key])
        runs[key] = Run(group.heads, group.roles, history.mask[-1], history, len(history.mask))
    return runs


def _by_place(
    config: Config, train_pairs: Mapping[str, Pairs], groups: Mapping[str, Group], role: Role
) -> list[GroupsAt]:
    """The groups by the roles at which they are patched; ValueError as `train`."""
    listed = {name: as_group(group) for name, group in groups.items()}
    if empty := [name for name, group in listed.items() if not group]:
        raise ValueError(f"No heads given in the group {empty[0]!r}; expected at least one to be masked.")
    patched = patched_roles(listed.values(), role)
    sorted_by_roles: dict[PatchedRoles, dict[str, Masked]] = {}
    for name, group in listed.items():
        roles = tuple(x for x in patched.roles if x in group) if isinstance(group, dict) else patched.roles
        sorted_by_roles.setdefault(patched._replace(roles=roles), {})[name] = masked(config, group, roles)
    for here in sorted_by_roles:
        for pairs in train_pairs.values():
            check_roles(pairs, here)
    return [
        GroupsAt(Place(here.roles, first_layer_of(config, some.values())), here.units, some)
        for here, some in sorted_by_roles.items()
    ]


def _fitting(
    model: Model, train_pairs: Mapping[str, Pairs], at: Sequence[GroupsAt]
) -> list[tuple[dict[str, Pairs], Sequence[GroupsAt]]]:
    """What is trained together: all, if the values to patch fit a quarter of the memory budget, or place by place.

    Then there are as many desiderata at a time as fit, one at least.
    """
    count, layers = len(next(iter(train_pairs.values()))), model.config.num_layers
    most = memory.fitting(model.weights, 4 * memory.of_heads(model.config, count, layers))
    names = list(train_pairs)
    if len(names) * sum(len(here.place.roles) for here in at) <= most:  # each place holds its own
        return [(dict(train_pairs), at)]
    found = []
    for here in at:
        together = max(1, most // len(here.place.roles))
        parts = np.array_split(np.arange(len(names)), math.ceil(len(names) / together))
        found += [({names[i]: train_pairs[names[i]] for i in part}, [here]) for part in parts]
    return found


def _check_training(
    config: Config,
    train_pairs: Mapping[str, Pairs],
    lams: Sequence[float],
    learning_rate: float,
    optimizer: optax.GradientTransformation | None,
    epochs: int,
    batch_size: int,
    metric: Metric,
) -> int:
    """How many pairs every desideratum has; ValueError and TypeError as `train`."""
    if not isinstance(optimizer, optax.GradientTransformation | None):
        raise TypeError(f"optimizer={optimizer!r}; expected one of optax, such as optax.sgd(0.1), or None for Adam.")
    if epochs < 1 or not np.isfinite(lams).all():
        raise ValueError(f"epochs={epochs}, lams={list(lams)}; expected epochs >= 1 and finite lambdas.")
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate={learning_rate}; expected a positive number.")
    if not callable(metric) and metric not in (TARGET_LOGIT, *METRICS):
        raise ValueError(f"metric={metric!r}; expected one of {', '.join((TARGET_LOGIT, *METRICS))}, or a function.")
    for pairs in train_pairs.values() if metric != TARGET_LOGIT else ():
        check_metric(metric, None, pairs, config.vocab_size)
    counts = {len(pairs) for pairs in train_pairs.values()}
    if len(counts) != 1:
        raise ValueError(f"train_many needs equally many pairs for each desideratum; found {sorted(counts)}.")
    (count,) = counts
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}, but there are {count} pairs; expected at most that many.")
    return count


def _order(count: int, epochs: int, batch_size: int, seed: int | None) -> np.ndarray:
    """The examples of every step, int [steps, E], -1 where a batch is shorter; in their own order without a seed."""
    rng = None if seed is None else np.random.default_rng(seed)
    fill = -count % batch_size
    orders = [np.arange(count) if rng is None else rng.permutation(count) for _ in range(epochs)]
    return np.concatenate([np.pad(x, (0, fill), constant_values=-1).reshape(-1, batch_size) for x in orders])
