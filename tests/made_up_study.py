"""The results of a study that never took place, of the right shapes and plausible sizes, to test its report with."""

import numpy as np

GROUPS = {
    "value_fetcher": ("last", None, None),
    "object_lookup": ("query_box", "value_fetcher", "v"),
    "object_binder": ("prev_query_box", "object_lookup", "v"),
    "label_matcher": ("query_box", "object_lookup", "q"),
}
MAIN = ("positional", "object_value", "box_label_value")
VARIANTS = (
    "random_text_start", "random_text_end", "add_tokens_btw_box_and_obj", "add_seg_start", "add_seg_end",
    "add_box_before_correct_segment", "incorrect_segment", "altered_box_obj_order", "altered_box_obj_association",
    "add_comma", "no_comma",
)  # fmt: skip
COMPONENTS = ("z", "q", "k", "v", "q+k+v")
EDGES = ("last -> object", "last -> query_box", "last -> random", "query_box -> prev_query_box",
         "query_box -> random", "prev_query_box -> object")  # fmt: skip


def entry(value: float, spread: float = 0.04) -> dict:
    return {"accuracy": value, "value": value, "low": max(0.0, value - spread), "high": min(1.0, value + 0.8 * spread)}


def study(models=("base", "tuned"), layers=4, heads=8, k=(4, 2, 2, 4), seed=0) -> dict:
    """Results as a study writes them: made up, but of the right shapes and of a plausible size."""
    rng = np.random.default_rng(seed)
    size = dict(zip(GROUPS, k, strict=True))
    accuracy = {model: 0.6114 + (0.38 - 0.02 * i if i else 0) for i, model in enumerate(models)}
    groups = {}
    for i, model in enumerate(models):
        numbers = np.random.default_rng(seed).permutation(layers * heads)
        numbers = np.where(np.arange(len(numbers)) % 7 == 6, (numbers + i) % (layers * heads), numbers)
        chosen, start = {}, 0
        for group, count in size.items():
            chosen[group] = [[int(n) // heads, int(n) % heads] for n in numbers[start : start + count]]
            start += count
        groups[model] = chosen
    results = {
        "models": list(models),
        "prompts": 350,
        "chance": 1 / 7,
        "example": "The fig is in Box X, the engine is in Box T, the radio is in Box A. Box T contains the engine.",
        "chain": [
            {"group": g, "sender": role, "receivers": receivers, "via": via, "k": size[g]}
            for g, (role, receivers, via) in GROUPS.items()
        ],
        "accuracy": {model: entry(value) for model, value in accuracy.items()},
    }
    results["discovery"] = {model: discovery(rng, groups[model], layers, heads) for model in models}
    results["minimality"] = {model: minimality(rng, groups[model]) for model in models}
    results["faithfulness"] = {of: {m: faithfulness(rng, accuracy[m], of == m) for m in models} for of in models}
    results["overlap"] = {m: {g: {"precision": 1.0, "recall": 0.75} for g in GROUPS} for m in models[1:]}
    results["completeness"] = {model: completeness(rng, accuracy[model]) for model in models}
    results["dcm"] = {model: dcm(rng, groups[model]) for model in models}
    results["activation_patching"] = {of: patching(rng, results["dcm"][of], models) for of in models}
    results["cmap"] = {m: cmap(rng, accuracy[models[0]], accuracy[m], layers, heads) for m in models[1:]}
    results["knockout"] = {model: knockout(accuracy[model], layers) for model in models}
    return results


def discovery(rng, groups, layers, heads) -> dict:
    means = {group: rng.normal(0, 0.01, (layers, heads)) for group in groups}
    for group, chosen in groups.items():
        for i, (layer, head) in enumerate(chosen):
            means[group][layer, head] = -0.85 / (1.6 + i) ** 1.5
    layer, head = groups["label_matcher"][0]
    means["object_lookup"][layer, head] = -0.9634  # strongest of its sweep, but a later stage selects it as well
    return {
        "groups": groups,
        "roles": {group: GROUPS[group][0] for group in groups},
        "stopped": "",
        "moved": {"object_lookup": [{"head": [layer, head], "to": "label_matcher"}]},
        "means": {group: mean.tolist() for group, mean in means.items()},
        "heads": {
            group: [
                {"head": head, "score": means[group][tuple(head)], "low": means[group][tuple(head)] - 0.02,
                 "high": means[group][tuple(head)] + 0.02}
                for head in chosen
            ]
            for group, chosen in groups.items()
        },
    }  # fmt: skip


def minimality(rng, groups) -> dict:
    found = {}
    for group, chosen in groups.items():
        scores = [float(x) for x in rng.exponential(0.3, len(chosen)) ** 2 - 0.002]
        found[group] = [
            {"head": head, "partners": [], "before": 0.5, "after": 0.5 / (1 + score), "score": score,
             "kept": score >= 0.01}
            for head, score in zip(chosen, scores, strict=True)
        ]  # fmt: skip
    circuit = {group: [e["head"] for e in entries if e["kept"]] for group, entries in found.items()}
    return {"threshold": 0.01, "groups": found, "circuit": circuit}


def faithfulness(rng, accuracy, own) -> dict:
    value = 0.97 if own else 0.9
    return {
        "model": entry(accuracy),
        "circuit": entry(accuracy * value),
        "ratio": {"value": value, "low": value - 0.03, "high": value + 0.02},
        "random": rng.uniform(0, 0.12, 10).tolist(),
    }


def completeness(rng, accuracy) -> list:
    names = ["nothing", *GROUPS, *(f"random {i + 1}" for i in range(20))]
    kinds = ["nothing", *["group"] * len(GROUPS), *["random"] * 20]
    left = np.array([1, 0.12, 0.1, 0.2, 0.3, *rng.uniform(0.1, 0.9, 20)])
    model, circuit = accuracy * left, accuracy * np.clip(left - rng.uniform(0, 0.1, len(left)), 0, 1)
    return [
        {"name": name, "kind": kinds[i], "size": i, "circuit": float(c), "model": float(m), "gap": float(abs(c - m))}
        for i, (name, c, m) in enumerate(zip(names, circuit, model, strict=True))
    ]


def dcm(rng, groups) -> dict:
    found: dict = {}
    for i, (group, heads) in enumerate(groups.items()):
        found[group] = {}
        for j, name in enumerate([*MAIN, *VARIANTS] if group == "object_lookup" else MAIN if heads else []):
            steps = np.arange(1, 65)[:, None] / 64
            masks = np.clip(1 + steps * rng.normal(-0.2 if i == j else 0.1, 1.2, len(heads)), 0, 1)
            selected = [head for head, m in zip(heads, masks[-1], strict=True) if np.round(m) == 0]
            test = float(rng.uniform(0.6, 0.98) if i == j else rng.uniform(0, 0.3))
            found[group][name] = {
                "heads": heads, "mask": masks[-1].tolist(), "selected": selected, "step": 60, "validation": test,
                "test": test, "unpatched": 0.031, "loss": (-5 - steps[:, 0]).tolist(), "masks": masks.tolist(),
            }  # fmt: skip
    return found


def patching(rng, runs, models) -> dict:
    found: dict = {}
    for group, by_name in runs.items():
        found[group] = {}
        for name, run in by_name.items():
            found[group][name] = {}
            for model in models:
                values = np.clip(run["test"] + rng.normal(0, 0.03, 5), 0, 1).tolist() if run["selected"] else []
                mean = float(np.mean(values)) if values else None
                std = float(np.std(values)) if values else None
                found[group][name][model] = {"mean": mean, "std": std, "values": values}
    return found


def cmap(rng, before, after, layers, heads) -> dict:
    share = {"value_fetcher": 0.3, "object_lookup": 0.86, "object_binder": 0.35, "label_matcher": 0.1}
    share["whole circuit"] = 0.97
    factor = {"z": 1, "q": 0.4, "k": 0.2, "v": 0.5, "q+k+v": 0.8}
    single = {}
    for role in dict.fromkeys(role for role, *_ in GROUPS.values()):
        change = rng.normal(0, 0.01, (layers, heads))
        change[rng.integers(layers), rng.integers(heads)] = 0.3
        accuracy = (before + 0.01 + change).tolist()  # fewer prompts, another accuracy
        single[role] = {
            "accuracy": accuracy,
            "score": (2 * change).tolist(),
            "change": change.tolist(),
            "unpatched": before + 0.01,
            "prompts": 100,
        }
    groups = {c: {g: entry(before + factor[c] * s * (after - before)) for g, s in share.items()} for c in COMPONENTS}
    return {"groups": groups, "heads": single}


def knockout(accuracy, layers) -> dict:
    steps, found = np.arange(layers), {}
    for i, edge in enumerate(EDGES):
        lost = 0.01 if "random" in edge else 1 / (1 + np.exp(steps - layers * (i + 1) / 8))
        found[edge] = (accuracy * (1 - lost * np.ones(layers))).tolist()
    return found


def odd() -> dict:
    """A study in which everything goes wrong that may: no gain of one group, no heads, no ratio, no selection."""
    results = study(models=("base", "<b>tuned</b> & $x_1$"))
    base, tuned = results["models"]
    found = results["discovery"][base]
    found["stopped"] = "Stage 'label_matcher' found no head: the strongest mean effect is -0.0004."
    found["moved"] = {}
    found["groups"]["label_matcher"], found["heads"]["label_matcher"] = [], []
    results["minimality"][base]["groups"].pop("label_matcher")
    results["minimality"][base]["circuit"]["label_matcher"] = []
    results["minimality"][base]["groups"]["value_fetcher"][0] |= {"after": 0.0, "score": None, "kept": True}
    results["minimality"][base]["groups"]["value_fetcher"][1] |= {"score": -0.34, "kept": False}
    results["faithfulness"][base][base]["ratio"] = {"value": None, "low": None, "high": None}
    results["overlap"][tuned]["label_matcher"] = {"precision": None, "recall": 0.0}
    results["dcm"][base].pop("label_matcher")
    results["activation_patching"][base].pop("label_matcher")
    results["completeness"][base] = [e for e in results["completeness"][base] if e["name"] != "label_matcher"]
    return results
