"""Circuit discovery: a chain of path-patching sweeps, each of which reads its receivers from earlier ones.

The chain is data, see `jaxmech.chain`; what is found is a `Circuit`.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.accuracy import predict
from jaxmech.chain import PAPER_CHAIN, Stage, check_number_of_heads, read_chain, with_k
from jaxmech.files import write_text
from jaxmech.loading import Model
from jaxmech.metrics import Function, name_of
from jaxmech.pairs import Pairs
from jaxmech.path_patching import path_patch
from jaxmech.scores import PathScores

Head = tuple[int, int]  # (layer, head)
# Clean probabilities, of one run and of another, may differ by so many nats: float32 by the order of its sums, coarse
# products by their rounding, which another batch size changes. What is less than the least one counts as that.
SAME_PROBABILITY = {False: 0.01, True: 1.0}
LEAST_PROBABILITY = 1e-30


@dataclass(frozen=True, repr=False)
class Circuit:
    """Groups of heads, each acting at one role. Circuits are equal if their groups and roles are.

    Attributes:
      groups: group name -> [(layer, head)], strongest first; sequences and arrays of whole numbers are taken as well.
        `discover` puts a head that it finds several times at one role into the last group alone.
      roles: group name -> role.
      scores: group name -> the sweep that found it; empty for a circuit that was read from a file.
      stopped: why the chain ended early, or "".

    Raises:
      ValueError: groups and roles do not name the same, or something is no head or is twice in a group.
    """

    groups: dict[str, list[Head]]
    roles: dict[str, str]
    scores: dict[str, PathScores] = field(default_factory=dict, compare=False)
    stopped: str = field(default="", compare=False)

    def __post_init__(self):
        if missing := [group for group in self.groups if group not in self.roles]:
            raise ValueError(f"Circuit: roles says nothing of the groups {missing}; expected {{group: role}} for each.")
        if unknown := [group for group in self.roles if group not in self.groups]:
            raise ValueError(f"Circuit: roles names {unknown}; the groups are {list(self.groups)}. One may be empty.")
        object.__setattr__(self, "groups", {group: _heads(group, heads) for group, heads in self.groups.items()})

    def __repr__(self) -> str:
        groups = [f"{group}: {len(heads)} at {self.roles[group]}" for group, heads in self.groups.items()]
        return f"Circuit({', '.join(groups)}{'; stopped early' if self.stopped else ''})"

    @property
    def heads_by_role(self) -> dict[str, list[Head]]:
        """The heads that act at each role, {role: [(layer, head)]}, in the order of the groups."""
        by_role: dict[str, list[Head]] = {role: [] for role in self.roles.values()}
        for group, heads in self.groups.items():
            by_role[self.roles[group]] += [head for head in heads if head not in by_role[self.roles[group]]]
        return by_role

    def without(self, subset: Mapping[str, Sequence[Head]]) -> "Circuit":
        """The circuit without the heads of `subset`, {group: heads}; its groups and roles stay, empty or not.

        Raises:
          ValueError: `subset` names a group that the circuit has not.
        """
        if unknown := [group for group in subset if group not in self.groups]:
            raise ValueError(f"Unknown groups {unknown}; the circuit has {list(self.groups)}.")
        gone = {group: {tuple(head) for head in heads} for group, heads in subset.items()}
        left = {
            group: [head for head in heads if head not in gone.get(group, ())] for group, heads in self.groups.items()
        }
        return Circuit(left, self.roles)

    def save(self, path: str | Path, *, roles: bool = False) -> None:
        """Writes JSON to `path`, which is replaced only when it is whole. `load` reads both forms.

        Args:
          roles: False writes what the paper's code reads, {group: [[layer, head], ...]}, which does not say where a
            group acts. True writes {"groups": that, "roles": {group: role}}.
        """
        found: dict[str, Any] = {group: [list(head) for head in heads] for group, heads in self.groups.items()}
        write_text(path, json.dumps({"groups": found, "roles": self.roles} if roles else found) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        chain: Sequence[Stage] | str | Path | None = None,
        *,
        roles: Mapping[str, str] | None = None,
    ) -> "Circuit":
        """Reads a file of either form that `save` writes.

        The paper's form, which `jaxmech discover` writes, does not say where a group acts: `roles` does, or `chain`,
        the paper's four stages by default.

        Args:
          path: the file.
          chain: stages, or the TOML file of a chain (see `read_chain`), whose groups the file has.
          roles: {group: role}, in place of a chain.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not JSON of either form, a group of which neither the file nor `roles` or `chain` says where it
            acts, roles that are not those of the file, or roles as well as a chain.
        """
        path = Path(path)
        try:
            groups, own = _read(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(
                f'{path} is not a circuit file, {{group: [[layer, head], ...]}} or {{"groups": that, "roles": {{group: '
                f"role}}}}: {error}"
            ) from error
        given = _given_roles(chain, roles)
        if own is None:
            known = given or {stage.group: stage.sender for stage in PAPER_CHAIN}
            if unknown := [group for group in groups if group not in known]:
                all_known = _roles_beside(path) | dict(known)
                example = {group: all_known.get(group, "...") for group in groups}
                raise ValueError(
                    f"{path} has groups {unknown}, but roles are known of {list(known)}; give the chain that found "
                    f"them, stages or a TOML file, or the roles: Circuit.load({str(path)!r}, roles={example})."
                )
            own = {group: known[group] for group in groups}
        elif given and (other := {group: given.get(group) for group in own if given.get(group) != own[group]}):
            raise ValueError(f"{path} says that groups act at {own}; the roles given differ: {other}.")
        return cls(groups, own)


def _read(found: Any) -> tuple[dict[str, list[Head]], dict[str, str] | None]:
    """Groups and roles, None where the JSON does not say, of either form."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    roles = None
    if set(found) == {"groups", "roles"} and all(isinstance(value, dict) for value in found.values()):
        found, roles = found["groups"], found["roles"]
        if set(found) != set(roles) or not all(isinstance(role, str) for role in roles.values()):
            raise ValueError(f"roles is {roles}; expected one for each of {list(found)}")
    return {group: _heads(group, heads) for group, heads in found.items()}, roles


def _roles_beside(path: Path) -> dict[str, str]:
    """{group: role} by the settings of the run that wrote `path`, which `jaxmech discover` keeps beside it, if any."""
    try:
        stages = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["stages"]
        return {stage["group"]: stage["sender"] for stage in stages}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _given_roles(chain: Sequence[Stage] | str | Path | None, roles: Mapping[str, str] | None) -> Mapping[str, str]:
    """{group: role} by a chain or as they are; empty if neither is given."""
    if chain is None:
        return roles or {}
    if roles is not None:
        raise ValueError("Circuit.load: chain and roles are given; expected one of them.")
    chain = read_chain(chain) if isinstance(chain, str | Path) else chain
    return {stage.group: stage.sender for stage in chain}


def _heads(group: str, heads: Any) -> list[Head]:
    """The heads of a group as tuples of Python's numbers.

    Raises:
      ValueError: something else than (layer, head), or a head that is there twice.
    """
    form = f"Circuit: group {group!r} holds {{}}; expected a list of (layer, head), whole numbers from 0 on."
    if isinstance(heads, str | Mapping) or not isinstance(heads, Iterable):
        raise ValueError(form.format(repr(heads)))
    found: list[Head] = []
    for value in heads:
        pair = tuple(value) if isinstance(value, Iterable) else ()
        whole = [int(x) for x in pair if isinstance(x, Integral) and not isinstance(x, bool)]
        if len(pair) != 2 or len(whole) != 2 or min(whole) < 0:
            raise ValueError(form.format(repr(value)))
        found.append((whole[0], whole[1]))
    if repeated := sorted({head for head in found if found.count(head) > 1}):
        raise ValueError(f"Circuit: group {group!r} holds {repeated} more than once; expected each head once.")
    return found


def discover(
    model: Model,
    pairs: Pairs,
    k: Mapping[str, int] | None = None,
    chain: Sequence[Stage] | str | Path | None = None,
    min_effect: float = 1e-3,
    *,
    metric: str | Function = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
    done: Mapping[str, PathScores] | None = None,
    on_stage: Callable[[Stage, PathScores], None] | None = None,
    progress: Callable[[Stage, int, int], None] | None = None,
) -> Circuit:
    """Runs the chain of sweeps and keeps the top heads of each.

    A head is never selected if its mean score is above -min_effect, or 0. A head that is selected again by a later
    stage at the same role leaves the earlier group, as in the paper, where heads of stage 2 leave group 1. So a group
    may have fewer heads than k: all that its stage selected, and that later stages take for receivers, are
    `circuit.scores[group].top(k, min_effect)`. A stage that finds no head ends the chain: the circuit holds the groups
    found so far, `stopped` says why, and a warning is issued.

    Args:
      model: the model whose heads are swept.
      pairs: clean and corrupt prompts, with the roles that the chain names.
      k: {group: number of heads}, in place of the chain's own numbers; groups left out keep theirs.
      chain: the stages, or the TOML file of a chain; the paper's four by default.
      min_effect: the smallest mean loss that counts, in units of `metric`: of the probability, a fraction.
      metric: what scores are, and `wrong_labels` [B] for "logit_difference"; see `path_patch`. A function must fall
        where the model gets worse: of one that rises, such as a divergence, give the negative.
      batch_size: see `path_patch`.
      done: {group: scores} of sweeps finished by an earlier call with the same arguments; they are not run again. That
        they are of this model, these pairs and this metric is checked by one forward pass of the clean prompts; of
        which corrupt prompts, chain and wrong labels they are, they do not say.
      on_stage: called with (stage, scores) after each sweep that was run, to save it.
      progress: called with (stage, calls done, calls in all; see `path_patch`).

    Raises:
      ValueError: the chain does not fit together, k or `done` name an unknown group, k exceeds the number of heads, the
        pairs lack a role, a stage without receivers is not at the last token, min_effect is out of range, scores are
        not finite, or those of `done` are of another shape, metric, model or other prompts.
    """
    default = chain is None
    chain = read_chain(chain) if isinstance(chain, str | Path) else PAPER_CHAIN if chain is None else chain
    chain = with_k(chain, k or {})
    _check_roles(pairs, chain, default)
    check_number_of_heads(chain, model.config)
    check_min_effect(min_effect, metric)
    done = dict(done or {})
    if unknown := [group for group in done if group not in [stage.group for stage in chain]]:
        raise ValueError(f"done has the groups {unknown}; the chain has {[stage.group for stage in chain]}.")
    options = {"metric": metric, "wrong_labels": wrong_labels, "batch_size": batch_size}
    if done:
        _check_done(model, pairs, done, metric, batch_size)
    found: dict[str, list[Head]] = {}
    circuit = Circuit({}, {})
    for stage in chain:
        scores = done.get(stage.group)
        if scores is None:
            scores = _sweep(model, pairs, stage, found, progress, options)
            if on_stage:
                on_stage(stage, scores)
        heads = scores.top(stage.k, min_effect)
        circuit = replace(circuit, scores=circuit.scores | {stage.group: scores})
        if not heads:
            reason = _nothing_found(stage, scores, min_effect)
            warnings.warn(reason, stacklevel=2)
            return replace(circuit, stopped=reason)
        found[stage.group] = heads
        circuit = _add_group(circuit, stage, heads)
    return circuit


def check_min_effect(min_effect: float, metric: str | Function) -> None:
    """ValueError if no mean effect in units of `metric` is compared with such a number."""
    most = 1 if metric == "probability" else math.inf
    if not (0 <= min_effect <= most and math.isfinite(min_effect)):
        expected = "a fraction from 0 to 1" if metric == "probability" else "a finite number of at least 0"
        raise ValueError(f"min_effect={min_effect}; expected {expected}, in units of the metric.")


def _check_roles(pairs: Pairs, chain: Sequence[Stage], default: bool) -> None:
    """ValueError if the pairs lack a role of the chain, or a stage without receivers is not at the last token.

    Args:
      default: the caller named no chain, so that roles of the paper's say nothing to them.
    """
    if default and (missing := [stage.sender for stage in chain if stage.sender not in pairs.positions]):
        raise ValueError(
            f"These pairs lack the roles {missing} of the default chain, the paper's for entity tracking; they have "
            f"{sorted(pairs.positions)}. Give the chain of your task, chain=[jm.Stage(group, role), ...]."
        )
    for stage in chain:
        at_last = (pairs.position(stage.sender) == pairs.position("last")).all()
        pairs.corrupt_position(stage.sender)
        if stage.receivers is None and not at_last:
            raise ValueError(
                f"stage {stage.group!r}: sender={stage.sender!r} without receivers; only the last token has a direct "
                "path to the logits. Name receivers and via."
            )


def _check_done(
    model: Model, pairs: Pairs, done: Mapping[str, PathScores], metric: str | Function, batch_size: int | None
) -> None:
    """ValueError if scores are not of this model, these clean prompts and labels, and this metric."""
    config = model.config
    shape = config.num_layers, config.num_heads, len(pairs)
    for group, scores in done.items():
        if scores.per_example.shape != shape or scores.probability.shape != shape[2:]:
            raise ValueError(
                f"done[{group!r}] has scores {scores.per_example.shape} and probabilities {scores.probability.shape}; "
                f"this model and these pairs have [L, N, B] = {shape}. Are they of another model, or of other pairs?"
            )
        if scores.metric != name_of(metric):
            raise ValueError(f"done[{group!r}] has scores of metric={scores.metric!r}; expected {name_of(metric)!r}.")
    now = predict(model, pairs, batch_size=batch_size, metric="probability", keep_logits=False).per_example
    for group, scores in done.items():
        before, after = (np.log(np.maximum(x, LEAST_PROBABILITY)) for x in (scores.probability, now))
        if not (agree := np.abs(after - before) <= SAME_PROBABILITY[config.coarse]).all():
            row = int(agree.argmin())
            raise ValueError(
                f"done[{group!r}] has probability {scores.probability[row]:.4g} of the label of example {row}, where "
                f"the model has {now[row]:.4g}: the scores are of another model or other pairs, or in another order."
            )


def _sweep(
    model: Model, pairs: Pairs, stage: Stage, found: Mapping[str, list[Head]], progress, options: Mapping[str, Any]
) -> PathScores:
    receivers = None
    if stage.receivers is not None:
        receivers = dict.fromkeys(head for group in stage.receiver_groups for head in found[group])
    report = None if progress is None else partial(progress, stage)
    return path_patch(model, pairs, stage.sender, receivers, stage.via, progress=report, **options)


def _add_group(circuit: Circuit, stage: Stage, heads: list[Head]) -> Circuit:
    same_role = {group for group, role in circuit.roles.items() if role == stage.sender}
    groups = {
        group: [head for head in old if not (group in same_role and head in heads)]
        for group, old in circuit.groups.items()
    }
    return replace(circuit, groups=groups | {stage.group: heads}, roles=circuit.roles | {stage.group: stage.sender})


def _nothing_found(stage: Stage, scores: PathScores, min_effect: float) -> str:
    least, most = scores.mean.min(), scores.mean.max()
    why = f"above -min_effect = -{min_effect:g}" if min_effect else "and no head lowers the metric"
    if scores.metric.endswith("()") and most > 0 and most >= min_effect:  # a function
        why += f", the largest {most:.2g}: is {scores.metric} larger where the model is worse? Then score its negative"
    return (
        f"Stage {stage.group!r} (sender at {stage.sender}, reading {stage.reads}) found no head: the strongest mean "
        f"effect is {least:.2g}, {why}. The chain ends here."
    )
