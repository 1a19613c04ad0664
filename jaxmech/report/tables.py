"""Tables for the terminal (rich). Functions return them; the commands print."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.table import Table

from jaxmech.chain import Stage, receivers_text
from jaxmech.circuits import Circuit
from jaxmech.metrics import ACCURACY
from jaxmech.pairs import Pairs
from jaxmech.predictions import Predictions
from jaxmech.report.measures import CHANGED, Changed, measure_of
from jaxmech.verify import Report


def accuracy_table(accuracies: Mapping[str, float], count: int) -> Table:
    """Accuracy of each model, a fraction, on `count` prompts."""
    title = f"Accuracy on {count} prompts"
    table = Table(title=title, min_width=len(title))  # rich would wrap a title that is wider than the columns
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    for name, accuracy in accuracies.items():
        table.add_row(name, f"{100 * accuracy:.1f} %")
    return table


def prompts_table(pairs: Pairs, found: Mapping[str, Mapping[str, Predictions]]) -> Table:
    """How long prompts are, where roles are in them, and what a model makes of them.

    Args:
      pairs: the prompts.
      found: {"clean": {metric: what the model answers}}, and "corrupt", where the answers are those of the clean ones.
    """
    sides = {"clean": pairs.positions} | ({} if pairs.corrupt is None else {"corrupt": pairs.corrupt_positions})
    title = f"{len(pairs)} prompts"
    table = Table(title=title, min_width=len(title))
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")

    def extent(at: np.ndarray) -> str:
        low, high = int(at.min()), int(at.max())
        return f"{low}" if low == high else f"{low} to {high}"

    table.add_row("tokens", *(extent(positions["last"] + 1) for positions in sides.values()))
    for role in dict.fromkeys(role for positions in sides.values() for role in positions):
        places = (extent(positions[role]) if role in positions else "-" for positions in sides.values())
        table.add_row(f"token of {role}, from 0", *places)
    shown = {
        "answer is the most probable token": lambda x: f"{100 * x['probability'].accuracy:.1f} %",
        "its probability, mean": lambda x: f"{100 * x['probability'].mean:.1f} %",
        "its logit minus the wrong answer's, mean": lambda x: f"{x['logit_difference'].mean:+.2f}",
    }
    for name, show in shown.items():
        if "wrong" not in name or pairs.wrong_labels is not None:
            table.add_row(name, *(show(found[side]) for side in sides))
    return table


def circuit_table(
    chain: Sequence[Stage],
    circuit: Circuit,
    moved: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
    most: int = 8,
) -> Table:
    """The first `most` heads of every stage that was run, with the mean change of what their metric measures.

    Args:
      chain: the stages.
      circuit: what `discover` found.
      moved: heads that a later stage took into its own group, see `jaxmech.discovery.moved_heads`.
    """
    metric = next((scores.metric for scores in circuit.scores.values()), "probability")
    changed = CHANGED.get(metric, Changed(metric, f"change of {metric}", 1, ""))
    unit, change = changed.unit, "{:+.1f}" if changed.unit == 100 else "{:+.3f}"
    table = Table(title=f"Circuit: heads by group, mean change of {changed.short}")
    for column in ("group", "sender at", "receivers", f"layer.head (change{', %' * (unit == 100)})"):
        table.add_column(column)
    for stage in chain:
        if stage.group not in circuit.scores:
            continue
        mean, heads = circuit.scores[stage.group].mean, circuit.groups.get(stage.group, [])

        def named(heads: Sequence[Sequence[int]], mean: Any = mean) -> str:
            shown = (f"{layer}.{head} ({change.format(unit * mean[layer, head])})" for layer, head in heads[:most])
            return "  ".join(shown) + (f"  and {len(heads) - most} more" if len(heads) > most else "")

        lines = [named(heads)] if heads else []
        for group in dict.fromkeys(one["to"] for one in moved.get(stage.group, ())):
            lines.append(f"now in {group}: {named([one['head'] for one in moved[stage.group] if one['to'] == group])}")
        receivers = "logits" if stage.receivers is None else f"{receivers_text(stage.receivers)}, {stage.via}"
        table.add_row(stage.group, stage.sender, receivers, "\n".join(lines) or "none")
    return table


def study_tables(results: Mapping[str, Any]) -> list[Table]:
    """What a study found, in short: models with their circuits alone, and what CMAP gains by each group."""
    tables, models, measure = [], results["models"], measure_of(results)
    if "accuracy" in results:
        table = Table(title=f"{measure.title} on {results['prompts']} prompts")
        right = [] if measure.name == ACCURACY else ["answered right"]
        for column in ("model", *right, measure.short, "of its circuit alone", "heads in its circuit"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for model in models:
            own = results.get("faithfulness", {}).get(model, {}).get(model)
            circuit = results.get("minimality", {}).get(model, {}).get("circuit")
            table.add_row(
                model,
                *(_percent(results["accuracy"][model]["accuracy"]) for _ in right),
                measure.text(results["accuracy"][model]["value"]),
                measure.text(own["circuit"]["value"]) if own else "-",
                str(sum(map(len, circuit.values()))) if circuit is not None else "-",
            )
        tables.append(table)
    for tuned, found in results.get("cmap", {}).items():
        groups = list(dict.fromkeys(group for by_group in found["groups"].values() for group in by_group))
        if not groups:  # no head is left in the circuit
            continue
        table = Table(title=f"{measure.title} of {models[0]} with heads of {tuned} patched in")
        table.add_column("group")
        for components in found["groups"]:
            table.add_column(components, justify="right")
        for group in groups:
            cells = [by_group.get(group) for by_group in found["groups"].values()]
            table.add_row(group, *(measure.text(cell["value"]) if cell else "-" for cell in cells))
        tables.append(table)
    return tables


def deviation_tables(report: Report) -> list[Table]:
    """How far each site is from transformers' own at most, a table for each dtype."""
    measures = {
        "float32": "float32: largest deviation, relative to the largest value",
        "bfloat16": "bfloat16: root mean square deviation from transformers' float32, relative",
    }
    tables = []
    for dtype, title in measures.items():
        if not (worst := report.worst(dtype)):
            continue
        table = Table(title=title, min_width=len(title))
        for column in ("site", "worst layer", "deviation", "allowed", "ok"):
            table.add_column(column, justify="left" if column == "site" else "right")
        for found in worst:
            layer = "-" if found.layer is None else str(found.layer)
            verdict = "yes" if found.ok else "[red]NO[/red]"
            table.add_row(found.site, layer, f"{found.deviation:.2g}", f"{found.allowed:.2g}", verdict)
        tables.append(table)
    return tables


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
