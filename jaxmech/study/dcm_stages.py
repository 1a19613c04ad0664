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
    circuit, main, variants = study.circuit(part), study.data.desiderata, study.data.variants
    groups = [group for group, heads in circuit.groups.items() if heads]
    steps = 2 if variants else 1

    def train(step: int, groups: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, JSON]]:
        compute = partial(_train, study, part, circuit, groups, names, step_of(progress, step, steps))
        return study.unfinished.piece("dcm", part, f"{', '.join(groups)}: {', '.join(names)}", compute)

    if not groups:
        return {}
    found = train(0, groups, main)
    if variants:
        best = max(found, key=lambda group: found[group]["positional"]["test"])
        found[best] |= train(1, [best], variants)[best]
    return found


def _train(
    study: Study, part: str, circuit: Circuit, groups: Sequence[str], names: Sequence[str], progress: Progress
) -> dict[str, dict[str, JSON]]:
    """DCM of some groups on several desiderata, {group: {desideratum: result}}."""
    settings, model, role_of = study.settings, study.model(part), circuit.roles
    data = {name: study.data.desideratum(name) for name in names}
    runs = dcm.train_many(
        model,
        {name: pairs["train"] for name, pairs in data.items()},
        {group: {role_of[group]: circuit.groups[group]} for group in groups},
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
        masks.setdefault((name, role_of[group]), {})[group] = run.heads, np.round(run.mask)[None]
    first = groups[0]
    for name in names:  # a mask that patches nothing: how often the model says the target by itself
        masks[name, role_of[first]][_UNPATCHED] = circuit.groups[first][:1], np.ones((1, 1))
    tested = dcm.accuracies(model, test, masks)
    for (name, group), run in selected.items():
        found[group][name] = {
            "heads": [list(head) for head in run.heads],
            "mask": _short(run.mask),
            "selected": [list(head) for head in run.selected],
            "step": run.step,
            "validation": run.validation_accuracy,
            "test": float(tested[name, role_of[group]][group][0]),
            "unpatched": float(tested[name, role_of[first]][_UNPATCHED][0]),
            "loss": _short(run.history.loss),
            "masks": [_short(mask) for mask in run.history.mask],
        }
    return found


def run_activation_patching(study: Study, part: str, progress: Progress) -> JSON:
    """{circuit of: {group: {desideratum: accuracies in the model `part`}}}."""
    settings, model = study.settings, study.model(part)
    found: dict[str, Any] = {name: {} for name in settings.names}
    chosen = selected_heads(study)
    repeats = [
        {name: study.data.patching(name, repeat) for name in dict.fromkeys(name for name, _ in chosen)}
        for repeat in range(settings.repeats if chosen else 0)
    ]
    values = _patched_accuracies(settings, model, repeats, chosen, progress) if repeats else {}
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
    repeats: Sequence[Mapping[str, Pairs]],
    chosen: Mapping[tuple[str, str], Mapping[tuple[str, str], list[Head]]],
    progress: Progress,
) -> dict[tuple[str, str, str], list[float]]:
    """(model, group, desideratum) -> accuracies in each of the `repeats` with the `chosen` heads patched.

    Args:
      repeats: desideratum -> its pairs, as many in each repeat.
      chosen: see `selected_heads`.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    if settings.compat:  # of the published code, which patches set by set
        options = {"batch_size": settings.batch_size, "compat": settings.compat, "keep_logits": False}
        for i, pairs in enumerate(repeats):
            for (name, role), sets in chosen.items():
                for key, heads in sets.items():
                    accuracy = patch_activations(model, pairs[name], {role: heads}, **options).accuracy
                    found.setdefault((*key, name), []).append(float(accuracy))
            progress(i + 1, len(repeats))
        return found
    masks = {
        at: {key: (heads, np.zeros((1, len(heads)))) for key, heads in sets.items()} for at, sets in chosen.items()
    }
    # All repeats together, so that they are split into calls of one size, and compiled once.
    together = {name: Pairs.concatenate([pairs[name] for pairs in repeats]) for name in repeats[0]}
    for (name, _), sets in dcm.correct(model, together, masks, progress).items():
        for key, right in sets.items():
            found[*key, name] = right.reshape(len(repeats), -1).mean(axis=1).tolist()
    return found


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
