"""Turns the JSON of `bench_path_patching.py` into a Markdown table and a bar chart.

python benchmarks/report.py out/bench_small.json --chart out/bench_small.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

NAMES = {
    "hooks": "PyTorch hooks",
    "reachable": "PyTorch hooks, reachable heads",
    "lean": "PyTorch, lean frozen pass",
    "transformer_lens": "TransformerLens",
    "nnsight": "nnsight",
    "incremental": "PyTorch, incremental",
}
COLOURS = {  # Okabe-Ito
    "jaxmech": "#0072b2",
    "hooks": "#d55e00",
    "reachable": "#f0e442",
    "lean": "#e69f00",
    "transformer_lens": "#cc79a7",
    "nnsight": "#56b4e9",
    "incremental": "#009e73",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--chart", type=Path, help="PNG to write")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    print(table(result))
    if options.chart:
        chart(result).savefig(options.chart, dpi=160)


def table(result: dict) -> str:
    """The result as Markdown: a line on the conditions, and a row per stage."""
    names = comparisons(result)
    head = ["stage", "jaxmech"] + [NAMES[name] for name in names]
    memory = any(stage["peak_bytes"] for stage in result["stages"])
    head += ["peak memory"] * memory + ["compilation", "cone / full forwards, TFLOP", "of matmul rate"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for stage in result["stages"]:
        theirs = [stage["comparisons"].get(name) for name in names]
        rows.append(
            [stage["name"], f"{stage['seconds']:.3g} s"]
            + [f"{x['seconds']:.3g} s ({floor(x['ratio'])}x)" if x else "-" for x in theirs]
            + [f"{(stage['peak_bytes'] or 0) / 2**30:.3g} GiB"] * memory
            + [
                f"{stage['compile_seconds']:.1f} s",
                f"{stage['cone_flops'] / 1e12:.3g} / {stage['naive_flops'] / 1e12:.3g}",
                f"{int(100 * stage['matmul_fraction'])} %",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return conditions(result) + "\n\n" + "\n".join(lines)


def floor(ratio: float) -> str:
    """The ratio to two digits, rounded down."""
    return str(int(ratio)) if ratio >= 10 else f"{int(10 * ratio) / 10:.1f}"


def comparisons(result: dict) -> list[str]:
    """The comparisons that occur, in the order of NAMES."""
    return [name for name in NAMES if any(name in stage["comparisons"] for stage in result["stages"])]


def conditions(result: dict) -> str:
    """What the numbers were measured on."""
    config, machine = result["config"], result["machine"]
    versions = [f"{name} {machine['versions'][name]}" for name in ("jax", "torch") if name in machine["versions"]]
    worst = [x["largest_relative_difference"] for stage in result["stages"] for x in stage["comparisons"].values()]
    agreement = f" Scores agree to {max(worst):.1g} of the largest." if worst else ""
    prompts = "boxes" if result["shared_prefixes"] else "random"
    return (
        f"`{result['shape']}`: {config['num_layers']} layers x {config['width']}, {config['num_heads']} heads, "
        f"vocabulary {config['vocab_size']}, {config['dtype']}; {result['prompts']} {prompts} prompts x "
        f"{result['tokens']} tokens; {machine['device']} ({machine['cores']} cores), {', '.join(versions)}; medians of "
        f"{result['runs']} (comparisons: {result['reference_runs']}). Matmul rate "
        f"{result['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s.{agreement}"
    )


def chart(result: dict) -> Figure:
    """Seconds per stage on a logarithmic axis, a bar for jaxmech and each comparison."""
    names = ["jaxmech", *comparisons(result)]
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for j, stage in enumerate(result["stages"]):
            found = stage if name == "jaxmech" else stage["comparisons"].get(name)
            if found:
                label = NAMES.get(name, name) if j == 0 else None
                bar = axes.bar(j + i * width, found["seconds"], width * 0.92, color=COLOURS[name], label=label)
                axes.bar_label(bar, fmt="%.2g", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("seconds (log scale)")
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(result["stages"]))])
    axes.set_xticklabels([f"stage {stage['name'].replace(' ', chr(10), 1)}" for stage in result["stages"]])
    axes.set_title(f"Path patching, shape {result['shape']}: time of one sweep", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


if __name__ == "__main__":
    main()
