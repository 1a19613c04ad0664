"""Circuit discovery: a chain of path-patching sweeps, each of which reads its receivers from an earlier one.

The chain is data: a list of `Stage`, the paper's four by default (Prakash et al. 2024, section 3.2), or a TOML file.
"""

import json
import re
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.config import Config
from jaxmech.files import write_text
from jaxmech.loading import Model
from jaxmech.pairs import Pairs
from jaxmech.path_patching import path_patch
from jaxmech.scores import PathScores

Head = tuple[int, int]  # (layer, head)
NAMES_OF_NUMPY = ("file", "allow_pickle")  # arguments of numpy.savez, which takes arrays by name


@dataclass(frozen=True)
class Stage:
    """One sweep of the chain.

    Attributes:
      group: name of the head group that this stage finds.
      sender: role at which senders are patched, and at which the group acts.
      receivers: name of an earlier group whose heads read the change; None: the logits. They read it at the role
        `sender` too, wherever their own group acts: values that later tokens attend to, for instance.
      via: the receivers' input that is patched, "q", "k" or "v"; None without receivers.
      k: at most how many heads are selected.
    """

    group: str
    sender: str
    receivers: str | None = None
    via: str | None = None
    k: int = 5


PAPER_CHAIN = (
    Stage("value_fetcher", "last", k=20),
    Stage("pos_transmitter", "last", "value_fetcher", "q", k=5),
    Stage("pos_detector", "query_box", "pos_transmitter", "v", k=10),
    Stage("struct_reader", "prev_query_box", "pos_detector", "v", k=5),
)


@dataclass(frozen=True)
class Circuit:
    """Groups of heads, each acting at one role.

    Attributes:
      groups: group name -> [(layer, head)], strongest first.
      roles: group name -> role.
      scores: group name -> the sweep that found it; empty for a circuit that was read from a file.
      stopped: why the chain ended early, or "".
    """

    groups: dict[str, list[Head]]
    roles: dict[str, str]
    scores: dict[str, PathScores] = field(default_factory=dict)
    stopped: str = ""

    def __post_init__(self):
        if missing := [group for group in self.groups if group not in self.roles]:
            raise ValueError(f"Circuit: roles says nothing of the groups {missing}; expected {{group: role}} for each.")

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
            group: [head for head in heads if tuple(head) not in gone.get(group, ())]
            for group, heads in self.groups.items()
        }
        return Circuit(left, self.roles)

    def save(self, path: str | Path) -> None:
        """Writes the paper's JSON, {group: [[layer, head], ...]}, to `path`; it is replaced only when it is whole."""
        groups = {group: [list(head) for head in heads] for group, heads in self.groups.items()}
        write_text(path, json.dumps(groups) + "\n")

    @classmethod
    def load(cls, path: str | Path, chain: Sequence[Stage] | str | Path = PAPER_CHAIN) -> "Circuit":
        """Reads the paper's JSON. The file does not say where a group acts; `chain` does.

        Args:
          path: the file.
          chain: stages, or the TOML file of a chain (see `read_chain`), whose groups the file has.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not JSON of this form, or a group that `chain` does not name.
        """
        path = Path(path)
        chain = read_chain(chain) if isinstance(chain, str | Path) else chain
        roles = {stage.group: stage.sender for stage in chain}
        try:
            groups = {g: [_head(head) for head in heads] for g, heads in json.loads(path.read_text()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a circuit file, {{group: [[layer, head], ...]}}: {error}") from error
        if unknown := [group for group in groups if group not in roles]:
            raise ValueError(
                f"{path} has groups {unknown}, but the chain names {list(roles)}; give the chain that found them."
            )
        return cls(groups, {group: roles[group] for group in groups})


def _head(value: Sequence[int]) -> Head:
    layer, head = value
    if not (isinstance(layer, int) and isinstance(head, int)) or layer < 0 or head < 0:
        raise ValueError(f"{value!r} is not [layer, head], numbers from 0 on")
    return layer, head


def read_chain(path: str | Path) -> tuple[Stage, ...]:
    """Reads a chain from the TOML file `path`: one [[stage]] table per stage, with the fields of `Stage`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not TOML, an unknown or missing field, or stages that do not fit together (see `check_chain`).
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
        tables, names = table.pop("stage", []), [field.name for field in fields(Stage)]
        if unknown := sorted({key for stage in tables for key in stage} - set(names)):
            raise ValueError(f"unknown keys {unknown} in a [[stage]]; expected {', '.join(names)}")
        stages = tuple(Stage(**stage) for stage in tables)
        if table:
            raise ValueError(f"unknown tables {sorted(table)}; expected [[stage]] tables only")
        check_chain(stages)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a chain of stages: {error}") from error
    return stages


def check_chain(chain: Sequence[Stage]) -> None:
    """Refuses a chain whose stages cannot be run one after another.

    Raises:
      ValueError: it is empty, a group occurs twice or has no name for a file, receivers are none of the earlier groups,
        or k is no number from 1 on.
    """
    if not chain:
        raise ValueError("the chain has no stages; expected [[stage]] tables with group, sender, receivers, via and k.")
    earlier: list[str] = []
    for stage in chain:
        if not re.fullmatch(r"\w[\w +-]*", stage.group) or stage.group in NAMES_OF_NUMPY:
            raise ValueError(
                f"group {stage.group!r}: files and arrays are named by groups; expected a letter or digit, and then "
                f"letters, digits, spaces and _ + - only, and none of {', '.join(NAMES_OF_NUMPY)}."
            )
        if stage.group in earlier:
            raise ValueError(f"group {stage.group!r} occurs twice in the chain.")
        if stage.receivers is not None and stage.receivers not in earlier:
            raise ValueError(
                f"stage {stage.group!r}: receivers {stage.receivers!r} is none of the earlier groups {earlier}."
            )
        if (stage.receivers is None) != (stage.via is None) or stage.via not in (None, "q", "k", "v"):
            raise ValueError(
                f"stage {stage.group!r}: receivers={stage.receivers!r} with via={stage.via!r}; expected via "
                "'q', 'k' or 'v' with receivers, and neither for the logits."
            )
        if not isinstance(stage.k, Integral) or stage.k < 1:
            raise ValueError(f"stage {stage.group!r}: k={stage.k!r}; expected a whole number from 1 on.")
        earlier.append(stage.group)


def with_k(chain: Sequence[Stage], k: Mapping[str, int]) -> tuple[Stage, ...]:
    """The chain with other numbers of heads, {group: k}. ValueError for unknown groups, and as `check_chain`."""
    names = [stage.group for stage in chain]
    if unknown := sorted(set(k) - set(names)):
        raise ValueError(f"k names the groups {unknown}; the chain has {names}.")
    chain = tuple(replace(stage, k=k.get(stage.group, stage.k)) for stage in chain)
    check_chain(chain)
    return chain


def check_number_of_heads(chain: Sequence[Stage], config: Config) -> None:
    """ValueError if a stage is to select more heads than the model has."""
    heads = config.num_layers * config.num_heads
    for stage in chain:
        if stage.k > heads:
            raise ValueError(
                f"stage {stage.group!r}: k={stage.k}, but the model has {heads} heads "
                f"({config.num_layers} layers x {config.num_heads}). Choose a smaller k."
            )


def discover(
    model: Model,
    pairs: Pairs,
    k: Mapping[str, int] | None = None,
    chain: Sequence[Stage] | str | Path | None = None,
    min_effect: float = 1e-3,
    *,
    metric: str = "probability",
    wrong_labels: np.ndarray | None = None,
    batch_size: int | None = None,
    done: Mapping[str, PathScores] | None = None,
    on_stage: Callable[[Stage, PathScores], None] | None = None,
    progress: Callable[[Stage, int, int], None] | None = None,
) -> Circuit:
    """Runs the chain of sweeps and keeps the top heads of each.

    A head is never selected if its mean score is above -min_effect. A head that is selected again by a later stage at
    the same role leaves the earlier group, as in the paper, where heads of stage 2 leave group 1. A stage that finds no
    head ends the chain: the circuit holds the groups found so far, `stopped` says why, and a warning is issued.

    Args:
      model: the model whose heads are swept.
      pairs: clean and corrupt prompts, with the roles that the chain names.
      k: {group: number of heads}, in place of the chain's own numbers; groups left out keep theirs.
      chain: the stages, or the TOML file of a chain; the paper's four by default.
      min_effect: the smallest mean loss that counts, in units of `metric`: of the probability, a fraction.
      metric: what scores are, and `wrong_labels` [B] for "logit_difference"; see `path_patch`.
      batch_size: see `path_patch`.
      done: {group: scores} of sweeps finished by an earlier call with the same arguments; they are not run again.
      on_stage: called with (stage, scores) after each sweep that was run, to save it.
      progress: called with (stage, calls done, calls in all; see `path_patch`).

    Raises:
      ValueError: the chain does not fit together, k or `done` name an unknown group, k exceeds the number of heads, the
        pairs lack a role, a stage without receivers is not at the last token, min_effect is out of range, or scores are
        not finite.
    """
    chain = read_chain(chain) if isinstance(chain, str | Path) else PAPER_CHAIN if chain is None else chain
    chain = with_k(chain, k or {})
    check_number_of_heads(chain, model.config)
    if not min_effect >= 0 or (metric == "probability" and min_effect > 1):
        raise ValueError(f"min_effect={min_effect}; expected a fraction from 0 to 1, or in other metrics at least 0.")
    if unknown := [group for group in done or {} if group not in [stage.group for stage in chain]]:
        raise ValueError(f"done has the groups {unknown}; the chain has {[stage.group for stage in chain]}.")
    options = {"metric": metric, "wrong_labels": wrong_labels, "batch_size": batch_size}
    for stage in chain:
        at_last = (pairs.position(stage.sender) == pairs.position("last")).all()
        pairs.corrupt_position(stage.sender)
        if stage.receivers is None and not at_last:
            raise ValueError(
                f"stage {stage.group!r}: sender={stage.sender!r} without receivers; only the last token has a direct "
                "path to the logits. Name receivers and via."
            )
    found: dict[str, list[Head]] = {}
    circuit = Circuit({}, {})
    for stage in chain:
        scores = (done or {}).get(stage.group)
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


def _sweep(
    model: Model, pairs: Pairs, stage: Stage, found: Mapping[str, list[Head]], progress, options: Mapping[str, Any]
) -> PathScores:
    receivers = None if stage.receivers is None else found[stage.receivers]
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
    where = "the logits" if stage.receivers is None else f"{stage.receivers} via {stage.via}"
    return (
        f"Stage {stage.group!r} (sender at {stage.sender}, receivers: {where}) found no head: the strongest mean "
        f"effect is {scores.mean.min():.2g}, above -min_effect = -{min_effect:g}. The chain ends here."
    )
