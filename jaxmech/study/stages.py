"""The stages of a study, each a function from the study so far to a piece of JSON.

A stage is run in parts, one for each model as a rule, which are kept as soon as they are done. Accuracies are
fractions, values are F of `jaxmech.criteria` by the study's measure, intervals are those of 95 % over prompts, heads
are [layer, head], and what is not a finite number is null.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmech.accuracy import predict
from jaxmech.chain import with_k
from jaxmech.circuits import Circuit, Head, overlap
from jaxmech.cmap import cmap
from jaxmech.collected import HeadValues, collect
from jaxmech.criteria import completeness, faithfulness, minimality
from jaxmech.criteria.measure import f_of
from jaxmech.discovery import discover, moved_heads
from jaxmech.head_sweep import cmap_heads
from jaxmech.knockout import knockout, random_target
from jaxmech.loading import Model
from jaxmech.metrics import ACCURACY
from jaxmech.predictions import Predictions
from jaxmech.study.dcm_stages import Progress, run_activation_patching, run_dcm, step_of
from jaxmech.study.doubt import doubt
from jaxmech.study.settings import RANDOM, WHOLE_CIRCUIT, Settings
from jaxmech.study.study import JSON, Study, heads_of


@dataclass(frozen=True)
class StudyStage:
    """One stage.

    Attributes:
      title: what it does, for progress bars.
      run: a function from the study, a part and a progress callback to the part's result.
      needs: earlier stages.
      uses: prompts that it uses beside those that are evaluated, "contexts" or "desiderata".
      tuned_only: its parts are the fine-tuned models, not all.
      assembled: from the results of all parts, by part, to those of the stage.
    """

    title: str
    run: Callable[[Study, str, Progress], JSON]
    needs: tuple[str, ...] = ()
    uses: str = ""
    tuned_only: bool = False
    assembled: Callable[[Mapping[str, JSON]], JSON] = dict

    def parts(self, settings: Settings) -> list[str]:
        """Names of its parts."""
        return settings.names[self.tuned_only :]

    def fits(self, settings: Settings) -> bool:
        """Whether there are prompts for it: boxes prompts have desiderata, pairs have those that are given."""
        return self.uses != "desiderata" or settings.pairs is None or bool(settings.desiderata)


def _by_circuit(parts: Mapping[str, Mapping[str, JSON]]) -> JSON:
    """{in model: {circuit of: x}} as {circuit of: {in model: x}}."""
    found: dict[str, JSON] = {}
    for in_model, by_circuit in parts.items():
        for circuit_of, result in by_circuit.items():
            found.setdefault(circuit_of, {})[in_model] = result
    return found


def _by_desideratum(parts: Mapping[str, Mapping[str, JSON]]) -> JSON:
    """{in model: {circuit of: {group: {desideratum: x}}}} as {circuit of: {group: {desideratum: {in model: x}}}}."""
    found: dict[str, JSON] = {}
    for circuit_of, by_model in _by_circuit(parts).items():
        found[circuit_of] = {}
        for in_model, groups in by_model.items():
            for group, desiderata in groups.items():
                for name, values in desiderata.items():
                    found[circuit_of].setdefault(group, {}).setdefault(name, {})[in_model] = values
    return found


def _accuracy(study: Study, part: str, progress: Progress) -> JSON:
    settings, model, pairs = study.settings, study.model(part), study.data.pairs
    answers = predict(model, pairs, batch_size=settings.batch_size, metric=settings.measure, keep_logits=False)
    found = _measured(settings, answers)
    if warning := doubt(part, found["value"], study.data.chance, settings.measure):
        warnings.warn(warning, stacklevel=2)
    return found


def _discovery(study: Study, part: str, progress: Progress) -> JSON:
    settings = study.settings
    place = {stage.group: i for i, stage in enumerate(settings.chain)}
    done = study.unfinished.sweeps("discovery", part)
    known = dict(done)

    def advance(stage, done, total):
        step_of(progress, place[stage.group], len(place))(done, total)

    def keep(stage, scores):
        known[stage.group] = scores
        study.unfinished.keep_sweeps("discovery", part, known)

    circuit = discover(
        study.model(part),
        study.data.pairs,
        k=settings.k,
        chain=settings.chain,
        min_effect=settings.min_effect,
        metric=settings.metric,
        batch_size=settings.batch_size,
        done=done,
        on_stage=keep,
        progress=advance,
    )
    found: dict[str, JSON] = {"groups": _lists(circuit.groups), "roles": circuit.roles, "stopped": circuit.stopped}
    found["means"] = {group: scores.mean.astype(float).tolist() for group, scores in circuit.scores.items()}
    found["moved"] = moved_heads(circuit, with_k(settings.chain, settings.k), settings.min_effect)
    found["heads"] = {}
    for group, heads in circuit.groups.items():
        low, high = circuit.scores[group].confidence_interval(seed=settings.seed)
        mean = circuit.scores[group].mean
        found["heads"][group] = [
            {"head": list(head), "score": float(mean[head]), "low": float(low[head]), "high": float(high[head])}
            for head in heads
        ]
    return found


def _minimality(study: Study, part: str, progress: Progress) -> JSON:
    found = study.results["discovery"][part]
    circuit, settings = Circuit(heads_of(found["groups"]), found["roles"]), study.settings
    result = minimality(
        study.model(part),
        study.data.pairs,
        circuit,
        study.means(part),
        threshold=settings.threshold,
        **_criterion(settings),
    )
    groups = {}
    for group, scores in result.scores.items():
        groups[group] = [
            {
                "head": list(head),
                "partners": [list(partner) for partner in result.partners[group][i]],
                "before": float(result.before[group][i]),
                "after": float(result.after[group][i]),
                "score": _number(scores[i]),
                "kept": head in result.circuit.groups[group],
            }
            for i, head in enumerate(circuit.groups[group])
        ]
    return {"threshold": settings.threshold, "groups": groups, "circuit": _lists(result.circuit.groups)}


def _faithfulness(study: Study, part: str, progress: Progress) -> JSON:
    settings, found = study.settings, {}
    for i, name in enumerate(settings.names):
        result = faithfulness(
            study.model(part),
            study.data.pairs,
            study.circuit(name),
            study.means(part),
            random=settings.random_circuits,
            seed=settings.seed,
            **_criterion(settings),
        )
        found[name] = {
            "model": _measured(settings, result.model),
            "circuit": _measured(settings, result.circuit),
            "empty": _measured(settings, result.empty),
            "ratio": _numbers(result.ratio, *result.confidence_interval()),
            "recovered": _numbers(result.recovered, *result.recovered_interval()),
            "random": f_of(settings.measure, result.random.mean).tolist(),
        }
        progress(i + 1, len(settings.names))
    return found


def _overlap(study: Study, part: str, progress: Progress) -> JSON:
    found = overlap(study.circuit(study.settings.names[0]), study.circuit(part))
    return {group: {"precision": _number(p), "recall": _number(r)} for group, (p, r) in found.items()}


def _completeness(study: Study, part: str, progress: Progress) -> JSON:
    settings = study.settings
    result = completeness(
        study.model(part),
        study.data.pairs,
        study.circuit(part),
        study.means(part),
        random=settings.random_subsets,
        seed=settings.seed,
        **_criterion(settings),
    )
    sizes = [sum(len(heads) for heads in subset.values()) for subset in result.subsets]
    columns = {
        "name": result.names,
        "kind": result.kinds,
        "size": sizes,
        "circuit": f_of(settings.measure, result.circuit.mean).tolist(),
        "model": f_of(settings.measure, result.model.mean).tolist(),
        "gap": result.gap.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _cmap(study: Study, part: str, progress: Progress) -> JSON:
    settings, pairs, circuit = study.settings, study.data.pairs, study.circuit(part)
    some = pairs[: settings.single_head_prompts]
    roles = list(dict.fromkeys(circuit.roles.values()))
    if not roles:  # discovery found no head
        return {"groups": {components: {} for components in settings.components}, "heads": {}}
    tuned: Model | HeadValues = study.model(part)
    single = collect(tuned, some, roles, batch_size=settings.batch_size)
    if not settings.compat:  # which patches more than `collect` keeps
        sites = {site for components in settings.components for site in components.split("+")}
        tuned = collect(tuned, pairs, roles, sorted(sites), batch_size=settings.batch_size)
    base = study.model(settings.names[0])
    nothing: dict[str, list[Head]] = {role: [] for role in roles}  # all sets have all roles, so that they compile once
    sets = {group: nothing | {circuit.roles[group]: heads} for group, heads in circuit.groups.items() if heads}
    sets[WHOLE_CIRCUIT] = nothing | circuit.heads_by_role
    options = {"batch_size": settings.batch_size, "compat": settings.compat, "keep_logits": False}
    options["metric"] = settings.measure
    done, steps = 0, len(settings.components) * len(sets)
    groups: dict[str, dict[str, JSON]] = {}
    for components in settings.components:
        groups[components] = {}
        for name, heads in sets.items():
            if any(heads.values()):
                found = cmap(base, tuned, pairs, heads, tuple(components.split("+")), **options)
                groups[components][name] = _measured(settings, found)
            done += 1
            progress(done, steps)
    singles, metric = {}, "probability" if settings.measure == ACCURACY else settings.measure
    for role in roles:
        sweep = cmap_heads(base, single, some, role, batch_size=settings.batch_size, metric=metric)
        scores = sweep.scores.mean.astype(float)
        change = sweep.accuracy - sweep.clean_accuracy if settings.measure == ACCURACY else scores
        singles[role] = {
            "accuracy": sweep.accuracy.tolist(),
            "score": scores.tolist(),
            "change": change.tolist(),
            "unpatched": sweep.clean_accuracy,
            "prompts": len(some),
        }
    return {"groups": groups, "heads": singles}


def _knockout(study: Study, part: str, progress: Progress) -> JSON:
    settings, pairs, found = study.settings, study.data.pairs, {}
    edges = study.data.edges
    for i, (source, target) in enumerate(edges):
        at = random_target(pairs, source, settings.seed) if target == RANDOM else target
        options = {"batch_size": settings.batch_size, "metric": settings.measure, "keep_logits": False}
        blocked = knockout(study.model(part), pairs, source, at, **options)
        found[f"{source} -> {target}"] = f_of(settings.measure, blocked.mean).tolist()
        progress(i + 1, len(edges))
    return found


STAGES = {
    "accuracy": StudyStage("accuracy", _accuracy),
    "discovery": StudyStage("circuit discovery", _discovery),
    "minimality": StudyStage("minimality", _minimality, ("discovery",), uses="contexts"),
    "faithfulness": StudyStage("faithfulness", _faithfulness, ("minimality",), uses="contexts", assembled=_by_circuit),
    "overlap": StudyStage("overlap of circuits", _overlap, ("minimality",), tuned_only=True),
    "completeness": StudyStage("completeness", _completeness, ("minimality",), uses="contexts"),
    "dcm": StudyStage("DCM", run_dcm, ("minimality",), uses="desiderata"),
    "activation_patching": StudyStage(
        "activation patching", run_activation_patching, ("dcm",), uses="desiderata", assembled=_by_desideratum
    ),
    "cmap": StudyStage("cross-model patching", _cmap, ("minimality",), tuned_only=True),
    "knockout": StudyStage("attention knockout", _knockout),
}


def _criterion(settings: Settings) -> dict[str, Any]:
    """Options of all criteria."""
    names = ("ablate_elsewhere", "batch_size", "compat")
    return {name: getattr(settings, name) for name in names} | {"metric": settings.measure}


def _measured(settings: Settings, found: Predictions) -> JSON:
    bounds = found.confidence_interval(seed=settings.seed)
    value, low, high = (float(f_of(settings.measure, x)) for x in (found.mean, *bounds))
    return {"accuracy": float(found.accuracy), "value": value, "low": low, "high": high}


def _lists(groups: Mapping[str, Sequence[Head]]) -> dict[str, list[list[int]]]:
    return {group: [list(head) for head in heads] for group, heads in groups.items()}


def _numbers(value: float, low: float, high: float) -> JSON:
    return {"value": _number(value), "low": _number(low), "high": _number(high)}


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
