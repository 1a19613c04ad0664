"""Tables for the terminal (rich). Functions return them; the commands print."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from jaxmech.discovery import Circuit, Stage


def accuracy_table(accuracies: Mapping[str, float], count: int) -> Table:
    """Accuracy of each model, a fraction, on `count` prompts."""
    title = f"Accuracy on {count} prompts"
    table = Table(title=title, min_width=len(title))  # rich would wrap a title that is wider than the columns
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    for name, accuracy in accuracies.items():
        table.add_row(name, f"{100 * accuracy:.1f} %")
    return table


def circuit_table(chain: Sequence[Stage], circuit: Circuit, most: int = 8) -> Table:
    """The first `most` heads of every stage that was run, with the mean relative change of p(correct)."""
    table = Table(title="Circuit: heads by group, mean change of p(correct)")
    for column in ("group", "sender at", "receivers", "layer.head (change, %)"):
        table.add_column(column)
    for stage in chain:
        if stage.group not in circuit.scores:
            continue
        mean, heads = circuit.scores[stage.group].mean, circuit.groups.get(stage.group, [])
        shown = "  ".join(f"{layer}.{head} ({100 * mean[layer, head]:+.1f})" for layer, head in heads[:most])
        more = f"  and {len(heads) - most} more" if len(heads) > most else ""
        receivers = "logits" if stage.receivers is None else f"{stage.receivers}, {stage.via}"
        table.add_row(stage.group, stage.sender, receivers, shown + more or "none")
    return table
