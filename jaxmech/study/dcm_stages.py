"""The stages of DCM and of the activation patching that follows it: what the groups of a circuit carry.

As `jaxmech.study.stages`, which lists them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxmech import dcm
from jaxmech.circuits import Circuit, Head
from jaxmech.loading import Model
from jaxmech.pairs import Pairs
from jaxmech.patching import patch_activations
from jaxmech.study.settings import Settings
from jaxmech.study.study import JSON, Study

Progress = Callable[[int, int], None]  # (done, in all) of a part
_UNPATCHED = ""  # in place of a group's name, which is not empty


def run_dcm(study: Study, part: str, progress: Progress) -> JSON:
    """{group: {desideratum: heads, masks and accuracies}}."""
    circuit = study.circuit(part)
    roles: dict[str, list[str]] = {}
    for group, heads in circuit.groups.items():
        if heads:
            roles.setdefault(circuit.roles[group], []).append(group)
    main, variants = study.data.desiderata, study.data.variants
    variants = [variants[i : i + len(main)] for i in range(0, len(variants), len(main))]
    steps = len(roles) + len(variants)
    found: dict[str, dict[str, JSON]] = {}

    def train(step: int, role: str, names: Sequence[str]) -> dict[str, dict[str, JSON]]:
        advance = step_of(progress, step, steps)
        compute = partial(_train, study, part, circuit, role, roles[role], names, advance)
        return study.unfinished.piece("dcm", part, f"{role}: {', '.join(names)}", compute)

    for i, role in enumerate(roles):
        found |= train(i, role, main)
    if variants and found:
        best = max(found, key=lambda group: found[group]["positional"]["test"])
        role = circuit.roles[best]
        for i, names in enumerate(variants):
            # In threes and with all groups of the role, so that nothing compiles again.
            names = (*names, *main)[: len(main)]
            more = train(len(roles) + i, role, names)[best]
            found[best] |= {name: run for name, run in more.items() if name not in found[best]}
    return {group: found[group] for group in circuit.groups if group in found}


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
        batch_size=min(settings.dcm_batch, len(data[names[0]]["train"])),
        progress=progress,
    )
    found: dict[str, dict[str, JSON]] = {group: {} for group in groups}
    train, validation, test = ({name: x[use] for name, x in data.items()} for use in ("train", "validation", "test"))
    trained = {(name, group): run for (name, group, *_), run in runs.items()}
    selected = dcm.select_many(model, trained, validation, compat=settings.compat, train_pairs=train)
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


def run_activation_patching(study: Study, part: str, progress: Progress) -> JSON:
    """{circuit of: {group: {desideratum: accuracies in the model `part`}}}."""
    settings, model = study.settings, study.model(part)
    found: dict[str, Any] = {name: {} for name in settings.names}
    chosen = selected_heads(study)
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


def selected_heads(study: Study) -> dict[tuple[str, str], dict[tuple[str, str], list[Head]]]:
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
    """Accuracy on each desideratum with each set of heads patched at a role; `chosen` is of `selected_heads`."""
    if settings.compat:
        options = {"batch_size": settings.batch_size, "compat": settings.compat, "keep_logits": False}
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


def step_of(progress: Progress, step: int, steps: int) -> Progress:
    """The progress of one of a part's steps."""
    return lambda done, total: progress(100 * step + 100 * done // total, 100 * steps)


def _mean_and_deviation(values: list[float]) -> JSON:
    if not values:
        return {"mean": None, "std": None, "values": []}
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "values": values}


def _short(values: np.ndarray) -> list[float]:
    """Numbers for a figure, to six decimals."""
    return [round(float(x), 6) for x in values]
