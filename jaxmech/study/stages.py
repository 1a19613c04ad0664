"""The stages of a study, each a function from the study so far to a piece of JSON.

A stage is run in parts, one for each model as a rule, which are kept as soon as they are done. Accuracies are
fractions, intervals are those of 95 % over prompts, heads are [layer, head], and what is not a finite number is
null.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxmech import dcm
from jaxmech.accuracy import predict
from jaxmech.boxes import POSITION_VARIANTS
from jaxmech.cmap import HeadValues, cmap, cmap_heads, collect
from jaxmech.criteria import completeness, faithfulness, minimality, overlap
from jaxmech.discovery import Circuit, Head, discover, with_k
from jaxmech.knockout import knockout, random_target
from jaxmech.loading import Model
from jaxmech.pairs import Pairs
from jaxmech.patching import patch_activations
from jaxmech.predictions import Predictions
from jaxmech.study.chains import moved_heads
from jaxmech.study.data import MAIN_DESIDERATA
from jaxmech.study.doubt import doubt
from jaxmech.study.settings import Settings
from jaxmech.study.study import JSON, Study, heads_of

Progress = Callable[[int, int], None]  # (done, in all) of a part
_UNPATCHED = ""  # in place of a group's name, which is not empty


@dataclass(frozen=True)
class StudyStage:
    """One stage.

    Attributes:
      title: what it does, for progress bars.
      run: a function from the study, a part and a progress callback to the part's result.
      needs: earlier stages.
      uses: prompts that it uses beside those that are evaluated, "contexts" or "desiderata".
      tuned_only: its parts are the fine-tuned models, not all.
      turned: its parts are the models something is run in; results are given by what was run there first.
    """

    title: str
    run: Callable[[Study, str, Progress], JSON]
    needs: tuple[str, ...] = ()
    uses: str = ""
    tuned_only: bool = False
    turned: bool = False

    def parts(self, settings: Settings) -> list[str]:
        """Names of its parts."""
        return settings.names[self.tuned_only :]

    def assembled(self, parts: Mapping[str, JSON]) -> JSON:
        """The results of all parts as one."""
        return _turned(parts) if self.turned else dict(parts)


def _accuracy(study: Study, part: str, progress: Progress) -> JSON:
    pairs = study.data.pairs
    found = _with_interval(predict(study.model(part), pairs, batch_size=study.settings.batch_size or 64))
    if warning := doubt(part, found["accuracy"], study.data.chance):
        warnings.warn(warning, stacklevel=2)
    return found


def _discovery(study: Study, part: str, progress: Progress) -> JSON:
    settings = study.settings
    place = {stage.group: i for i, stage in enumerate(settings.chain)}
    done = study.unfinished.sweeps("discovery", part)
    known = dict(done)

    def advance(stage, done, total):
        _step(progress, place[stage.group], len(place))(done, total)

    def keep(stage, scores):
        known[stage.group] = scores
        study.unfinished.keep_sweeps("discovery", part, known)

    circuit = discover(
        study.model(part),
        study.data.pairs,
        k=settings.k,
        chain=settings.chain,
        min_effect=settings.min_effect,
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
        batch_size=settings.batch_size,
        compat=settings.compat,
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
            batch_size=settings.batch_size,
            compat=settings.compat,
        )
        low, high = result.confidence_interval()
        found[name] = {
            "model": _with_interval(result.model),
            "circuit": _with_interval(result.circuit),
            "ratio": {"value": _number(result.ratio), "low": _number(low), "high": _number(high)},
            "random": result.random.accuracy.tolist(),
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
        batch_size=settings.batch_size,
        compat=settings.compat,
    )
    sizes = [sum(len(heads) for heads in subset.values()) for subset in result.subsets]
    columns = result.names, sizes, result.circuit.accuracy.tolist(), result.model.accuracy.tolist(), result.gap.tolist()
    return [
        dict(zip(("name", "size", "circuit", "model", "gap"), row, strict=True)) for row in zip(*columns, strict=True)
    ]


def _dcm(study: Study, part: str, progress: Progress) -> JSON:
    circuit, settings = study.circuit(part), study.settings
    roles: dict[str, list[str]] = {}
    for group, heads in circuit.groups.items():
        if heads:
            roles.setdefault(circuit.roles[group], []).append(group)
    size = len(MAIN_DESIDERATA)
    variants = [POSITION_VARIANTS[i : i + size] for i in range(0, len(POSITION_VARIANTS), size)]
    steps = len(roles) + len(variants) * settings.variants
    found: dict[str, dict[str, JSON]] = {}

    def train(step: int, role: str, names: Sequence[str]) -> dict[str, dict[str, JSON]]:
        advance = _step(progress, step, steps)
        compute = partial(_train, study, part, circuit, role, roles[role], names, advance)
        return study.unfinished.piece("dcm", part, f"{role}: {', '.join(names)}", compute)

    for i, role in enumerate(roles):
        found |= train(i, role, MAIN_DESIDERATA)
    if settings.variants and found:
        best = max(found, key=lambda group: found[group]["positional"]["test"])
        role = circuit.roles[best]
        for i, names in enumerate(variants):
            # In threes and with all groups of the role, so that nothing compiles again.
            names = (*names, *MAIN_DESIDERATA)[:size]
            more = train(len(roles) + i, role, names)[best]
            found[best] |= {name: run for name, run in more.items() if name not in found[best]}
    return {group: found[group] for group in circuit.groups if group in found}


def _step(progress: Progress, step: int, steps: int) -> Progress:
    """The progress of one of a part's steps."""
    return lambda done, total: progress(100 * step + 100 * done // total, 100 * steps)


def _train(
    study: Study,
    part: str,
    circuit: Circuit,
    role: str,
    groups: Sequence[str],
    names: Sequence[str],
    progress: Progress,
) -> dict[str, dict[str, JSON]]:
    """DCM of the groups of one role on several desiderata, {group: {desideratum: result}}."""
    settings, model = study.settings, study.model(part)
    data = {name: study.desideratum(name) for name in names}
    runs = dcm.train_many(
        model,
        {name: pairs["train"] for name, pairs in data.items()},
        {group: circuit.groups[group] for group in groups},
        role,
        lams=[settings.lam],
        epochs=settings.epochs,
        batch_size=min(settings.dcm_batch, settings.train),
        progress=progress,
    )
    found: dict[str, dict[str, JSON]] = {group: {} for group in groups}
    train, validation, test = ({name: x[use] for name, x in data.items()} for use in ("train", "validation", "test"))
    trained = {(name, group): run for (name, group, *_), run in runs.items()}
    selected = dcm.select_many(model, trained, validation, role, compat=settings.compat, train_pairs=train)
    masks: dict[tuple[str, str], dict[str, Any]] = {}
    for (name, group), run in selected.items():
        masks.setdefault((name, role), {})[group] = run.heads, np.round(run.mask)[None]
    some = circuit.groups[groups[0]][:1]
    for name in names:  # a mask that patches nothing: how often the model says the target by itself
        masks[name, role][_UNPATCHED] = some, np.ones((1, 1))
    tested = dcm.accuracies(model, test, masks)
    for (name, group), run in selected.items():
        found[group][name] = {
            "heads": [list(head) for head in run.heads],
            "mask": _short(run.mask),
            "selected": [list(head) for head in run.selected],
            "step": run.step,
            "validation": run.validation_accuracy,
            "test": float(tested[name, role][group][0]),
            "unpatched": float(tested[name, role][_UNPATCHED][0]),
            "loss": _short(run.history.loss),
            "masks": [_short(mask) for mask in run.history.mask],
        }
    return found


def _activation_patching(study: Study, part: str, progress: Progress) -> JSON:
    settings, model = study.settings, study.model(part)
    found: dict[str, Any] = {name: {} for name in settings.names}
    chosen = _selected_heads(study)
    names = list(dict.fromkeys(name for name, _ in chosen))
    values: dict[tuple[str, str, str], list[float]] = {}
    for repeat in range(settings.repeats if names else 0):
        pairs = {name: study.patching(name, repeat) for name in names}
        for (name, _), sets in _patched_accuracies(settings, model, pairs, chosen).items():
            for key, accuracy in sets.items():
                values.setdefault((*key, name), []).append(accuracy)
        progress(repeat + 1, settings.repeats)
    for name in settings.names:
        for group, desiderata in study.results["dcm"][name].items():
            found[name][group] = {d: _mean_and_deviation(values.get((name, group, d), [])) for d in desiderata}
    return found


def _selected_heads(study: Study) -> dict[tuple[str, str], dict[tuple[str, str], list[Head]]]:
    """(desideratum, role) -> {(model, group): the heads that DCM selected there}, without empty ones."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[Head]]] = {}
    for model in study.settings.names:
        for group, desiderata in study.results["dcm"][model].items():
            for name, run in desiderata.items():
                if run["selected"]:
                    role = study.circuit(model).roles[group]
                    heads = [(layer, head) for layer, head in run["selected"]]
                    found.setdefault((name, role), {})[model, group] = heads
    return found


def _patched_accuracies(
    settings: Settings,
    model: Model,
    pairs: Mapping[str, Pairs],
    chosen: Mapping[tuple[str, str], Mapping[Any, list[Head]]],
) -> dict[tuple[str, str], dict[Any, float]]:
    """Accuracy on each desideratum with each set of heads patched at a role; `chosen` is of `_selected_heads`."""
    if settings.compat:
        options = {"batch_size": settings.batch_size, "compat": settings.compat}
        return {
            (name, role): {
                key: float(patch_activations(model, pairs[name], {role: heads}, **options).accuracy)
                for key, heads in sets.items()
            }
            for (name, role), sets in chosen.items()
        }
    masks = {
        at: {key: (heads, np.zeros((1, len(heads)))) for key, heads in sets.items()} for at, sets in chosen.items()
    }
    found = dcm.accuracies(model, pairs, masks)
    return {at: {key: float(x[0]) for key, x in sets.items()} for at, sets in found.items()}


def _cmap(study: Study, part: str, progress: Progress) -> JSON:
    settings, pairs, circuit = study.settings, study.data.pairs, study.circuit(part)
    tuned: Model | HeadValues = study.model(part)
    if settings.models_in_memory == 1 and not settings.compat:  # compat patches more than `collect` keeps
        sites = {site for components in settings.components for site in ("z", *components.split("+"))}
        tuned = collect(tuned, pairs, dict.fromkeys(circuit.roles.values()), sorted(sites))
    base = study.model(settings.names[0])
    sets = {group: {circuit.roles[group]: heads} for group, heads in circuit.groups.items() if heads}
    sets["whole circuit"] = {role: heads for role, heads in circuit.heads_by_role.items() if heads}
    options = {"batch_size": settings.batch_size, "compat": settings.compat}
    done, steps = 0, len(settings.components) * len(sets)
    groups: dict[str, dict[str, JSON]] = {}
    for components in settings.components:
        groups[components] = {}
        for name, heads in sets.items():
            if heads:
                found = cmap(base, tuned, pairs, heads, tuple(components.split("+")), **options)
                groups[components][name] = _with_interval(found)
            done += 1
            progress(done, steps)
    singles = {}
    for role in dict.fromkeys(circuit.roles.values()):
        sweep = cmap_heads(base, tuned, pairs, role, batch_size=settings.batch_size)
        singles[role] = {"accuracy": sweep.accuracy.tolist(), "score": sweep.scores.mean.astype(float).tolist()}
    return {"groups": groups, "heads": singles}


def _knockout(study: Study, part: str, progress: Progress) -> JSON:
    settings, pairs, found = study.settings, study.data.pairs, {}
    for i, (source, target) in enumerate(settings.edges):
        at = random_target(pairs, source, settings.seed) if target == "random" else target
        options = {"batch_size": settings.batch_size, "keep_logits": False}
        found[f"{source} -> {target}"] = knockout(study.model(part), pairs, source, at, **options).accuracy.tolist()
        progress(i + 1, len(settings.edges))
    return found


STAGES = {
    "accuracy": StudyStage("accuracy", _accuracy),
    "discovery": StudyStage("circuit discovery", _discovery),
    "minimality": StudyStage("minimality", _minimality, ("discovery",), uses="contexts"),
    "faithfulness": StudyStage("faithfulness", _faithfulness, ("minimality",), uses="contexts", turned=True),
    "overlap": StudyStage("overlap of circuits", _overlap, ("minimality",), tuned_only=True),
    "completeness": StudyStage("completeness", _completeness, ("minimality",), uses="contexts"),
    "dcm": StudyStage("DCM", _dcm, ("minimality",), uses="desiderata"),
    "activation_patching": StudyStage(
        "activation patching", _activation_patching, ("dcm",), uses="desiderata", turned=True
    ),
    "cmap": StudyStage("cross-model patching", _cmap, ("minimality",), tuned_only=True),
    "knockout": StudyStage("attention knockout", _knockout),
}


def _turned(parts: Mapping[str, Mapping[str, JSON]]) -> JSON:
    """{in model: {circuit of: x}} as {circuit of: {in model: x}}; of activation patching, the model is innermost."""
    found: dict[str, JSON] = {}
    for in_model, by_circuit in parts.items():
        for circuit_of, result in by_circuit.items():
            place = found.setdefault(circuit_of, {})
            if "ratio" in result:
                place[in_model] = result
                continue
            for group, desiderata in result.items():
                for name, values in desiderata.items():
                    place.setdefault(group, {}).setdefault(name, {})[in_model] = values
    return found


def _with_interval(found: Predictions) -> JSON:
    low, high = found.confidence_interval()
    return {"accuracy": float(found.accuracy), "low": float(low), "high": float(high)}


def _mean_and_deviation(values: list[float]) -> JSON:
    if not values:
        return {"mean": None, "std": None, "values": []}
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "values": values}


def _lists(groups: Mapping[str, Sequence[Head]]) -> dict[str, list[list[int]]]:
    return {group: [list(head) for head in heads] for group, heads in groups.items()}


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def _short(values: np.ndarray) -> list[float]:
    """Numbers for a figure, to six decimals."""
    return [round(float(x), 6) for x in values]
