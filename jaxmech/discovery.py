"""Circuit discovery: a chain of path-patching sweeps, each of which reads its receivers from earlier ones.

The chain is data, see `jaxmech.chain`; what is found is a `Circuit`.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.accuracy import predict
from jaxmech.chain import PAPER_CHAIN, Stage, check_number_of_heads, read_chain, with_k
from jaxmech.circuits import Circuit, Head
from jaxmech.loading import Model
from jaxmech.metrics import Metric, name_of
from jaxmech.pairs import Pairs
from jaxmech.path_patching import path_patch
from jaxmech.scores import PathScores

# Clean probabilities, of one run and of another, may differ by so many nats: float32 by the order of its sums, coarse
# products by their rounding, which another batch size changes. What is less than the least one counts as that.
SAME_PROBABILITY = {False: 0.01, True: 1.0}
LEAST_PROBABILITY = 1e-30


def discover(
    model: Model,
    pairs: Pairs,
    k: Mapping[str, int] | None = None,
    chain: Sequence[Stage] | str | Path | None = None,
    min_effect: float = 1e-3,
    *,
    metric: Metric = "probability",
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
        pairs lack a role, or two are the same token, a stage without receivers is not at the last token, min_effect is
        out of range, scores are not finite, or those of `done` are of another shape, metric, model or other prompts.
    """
    default = chain is None
    chain = read_chain(chain) if isinstance(chain, str | Path) else PAPER_CHAIN if chain is None else chain
    chain = with_k(chain, k or {})
    _check_roles(pairs, chain, default)
    check_one_name(pairs, chain)
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


def moved_heads(circuit: Circuit, chain: Sequence[Stage], min_effect: float) -> dict[str, list[dict[str, Any]]]:
    """The heads that a stage selected, but that a later one at the same role took into its own group.

    Args:
      circuit: what `discover` found.
      chain: the stages, with the numbers of heads that were asked for.
      min_effect: as `discover` was given it.

    Returns:
      {group: [{"head": [layer, head], "to": the group that has it now}]}, without groups that lost none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for stage in chain:
        if stage.group not in circuit.groups:
            continue
        same = [g for g, role in circuit.roles.items() if role == stage.sender and g != stage.group]
        for head in circuit.scores[stage.group].top(stage.k, min_effect):
            if head not in circuit.groups[stage.group]:
                to = next(group for group in same if head in circuit.groups[group])
                found.setdefault(stage.group, []).append({"head": list(head), "to": to})
    return found


def check_min_effect(min_effect: float, metric: Metric) -> None:
    """ValueError if no mean effect in units of `metric` is compared with such a number."""
    most = 1 if metric == "probability" else math.inf
    if not (0 <= min_effect <= most and math.isfinite(min_effect)):
        expected = "a fraction from 0 to 1" if metric == "probability" else "a finite number of at least 0"
        raise ValueError(f"min_effect={min_effect}; expected {expected}, in units of {name_of(metric)}.")


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


def check_one_name(pairs: Pairs, chain: Sequence[Stage]) -> None:
    """ValueError if two roles of the chain are the same token in every prompt: a head would be in two groups there."""
    for one, other in itertools.combinations(dict.fromkeys(stage.sender for stage in chain), 2):
        if (pairs.position(one) == pairs.position(other)).all():
            raise ValueError(
                f"The roles {one!r} and {other!r} of the chain are the same token in every prompt, so that heads would "
                "be in two groups there. Call it by one name in all stages."
            )


def _check_done(
    model: Model, pairs: Pairs, done: Mapping[str, PathScores], metric: Metric, batch_size: int | None
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
