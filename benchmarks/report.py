"""Turns the JSON of `bench_path_patching.py` into a Markdown table and a bar chart, of `bench_methods.py` into a table.

python benchmarks/report.py out/bench_small.json --chart out/bench_small.png
python benchmarks/report.py out/bench_methods_small.json
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    parser.add_argument("--chart", type=Path, help="PNG to write, of path patching")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    if "methods" in result:
        print(methods_table(result))
        return
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
            + [gibibytes(stage["peak_bytes"])] * memory
            + [
                f"{stage['compile_seconds']:.1f} s",
                f"{stage['cone_flops'] / 1e12:.3g} / {stage['naive_flops'] / 1e12:.3g}",
                f"{int(100 * stage['matmul_fraction'])} %",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return conditions(result) + "\n\n" + "\n".join(lines)


def methods_table(result: dict) -> str:
    """The result of `bench_methods.py` as Markdown: a line on the conditions, and a row per method."""
    rows = [["method", "work", "jaxmech", "PyTorch hooks", "compilation", "largest difference"]]
    rows.append(["---", "---"] + ["---:"] * 4)
    for method in result["methods"]:
        theirs = method["reference"]
        rate = f"{floor(method['units'] / method['seconds'])} {method['unit']} a second"
        rows.append(
            [method["name"], f"{method['units']} {method['unit']}", f"{method['seconds']:.3g} s, {rate}"]
            + [_reference(method) if theirs else "-"]
            + [f"{method['compile_seconds']:.1f} s"]
            + [f"{theirs['largest_relative_difference']:.1g} of {method['compared']}" if theirs else "-"]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    runs = f"medians of {result['runs']} (PyTorch: {result['reference_runs']})"
    prompts = f"{result['prompts']} boxes prompts x {result['tokens']} tokens"
    prompts += f", {result['dcm_prompts']} random ones for DCM"
    return f"{model_line(result)}; {prompts}; {machine_line(result)}; {runs}.\n\n" + "\n".join(lines)


def gpu_table(result: dict) -> str:
    """The result of `gpu_7b.py` as Markdown: for each shape the conditions, a table, and lines on what is not in it."""
    parts = []
    for shape, found in result["shapes"].items():
        head = ["work", "jaxmech", "PyTorch hooks", "compilation", "peak memory so far", "cone, PFLOP"]
        rows = [[*head, "of matmul rate"], ["---"] + ["---:"] * 6]
        rows += [_gpu_row(row) for row in found["rows"] if row["seconds"] is not None]
        rate = f"matmul rate {found['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s"
        rate += f", copies {found['bytes_per_s'] / 1e12:.3g} TB/s"
        line = f"{model_line({'shape': shape, 'config': found['config']})}; {machine_line(result)}; {rate}."
        besides = [f"- {row['name']}: {text}" for row in found["rows"] for text in _gpu_lines(row)]
        parts.append("\n\n".join([line, "\n".join("| " + " | ".join(row) + " |" for row in rows), "\n".join(besides)]))
    return "\n\n".join(parts)


def _gpu_row(row: dict) -> list[str]:
    unit = f", {row['units']} {row['unit']}" if "units" in row else ""
    theirs = row["reference"]
    note = f"; from {theirs['units']}" if theirs else ""
    return [
        row["name"] + unit,
        f"{row['seconds']:.3g} s",
        f"{theirs['seconds']:.3g} s ({floor(theirs['ratio'])}x{note})" if theirs else "-",
        f"{row['compile_seconds']:.1f} s",
        gibibytes(row["peak_bytes"]),
        f"{row['cone_flops'] / 1e15:.3g}" if "cone_flops" in row else "-",
        f"{int(100 * row['matmul_fraction'])} %" if "matmul_fraction" in row else "-",
    ]


def _gpu_lines(row: dict) -> list[str]:
    """What is said of a row besides the table."""
    lines = [f"failed, {row['error']}"] if "error" in row else []
    for what, x in row.get("differences", {}).items():
        against = "hooks" if what.endswith("PyTorch") else "full forward passes"
        lines.append(
            f"{what}: {x['largest_difference']:.1g} from {against}, the largest score is {x['largest_score']:.2g}"
        )
    functions = row.get("functions", {})
    for function, found in functions.items():
        if found["busy"] < 0.01 * sum(other["busy"] for other in functions.values()):
            continue
        shares = ", ".join(f"{kind} {seconds / found['busy']:.0%}" for kind, seconds in found["kinds"].items())
        lines.append(f"{function} {found['seconds']:.3g} s, kernels {found['busy']:.3g} s: {shares}")
    if theirs := row.get("reference"):
        text = f"{theirs['largest_relative_difference']:.1g} of the largest result from PyTorch"
        if "correlation" in theirs:
            text += f", correlation {theirs['correlation']:.4f}"
        if "reachable_ratio" in theirs:
            text += f"; {floor(theirs['reachable_ratio'])}x over PyTorch if it runs the heads with a path alone"
        lines.append(text)
    return lines


def _reference(method: dict) -> str:
    theirs = method["reference"]
    sampled = theirs["units"] < method["units"]
    note = f", extrapolated from {theirs['units']} {method['unit']}" if sampled else ""
    return f"{theirs['seconds']:.3g} s ({floor(theirs['ratio'])}x){note}"


def gibibytes(count: int | None) -> str:
    """Bytes for people; CPUs do not tell."""
    return "-" if count is None else f"{count / 2**30:.3g} GiB"


def floor(ratio: float) -> str:
    """The ratio to two digits, rounded down."""
    return str(int(ratio)) if ratio >= 10 else f"{int(10 * ratio) / 10:.1f}"


def comparisons(result: dict) -> list[str]:
    """The comparisons that occur, in the order of NAMES."""
    return [name for name in NAMES if any(name in stage["comparisons"] for stage in result["stages"])]


def conditions(result: dict) -> str:
    """What the numbers were measured on."""
    worst = [x["largest_relative_difference"] for stage in result["stages"] for x in stage["comparisons"].values()]
    agreement = f" Scores agree to {max(worst):.1g} of the largest." if worst else ""
    prompts = "boxes" if result["shared_prefixes"] else "random"
    return (
        f"{model_line(result)}; {result['prompts']} {prompts} prompts x {result['tokens']} tokens; "
        f"{machine_line(result)}; medians of {result['runs']} (comparisons: {result['reference_runs']}). Matmul rate "
        f"{result['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s.{agreement}"
    )


def model_line(result: dict) -> str:
    config = result["config"]
    return (
        f"`{result['shape']}`: {config['num_layers']} layers x {config['width']}, {config['num_heads']} heads, "
        f"vocabulary {config['vocab_size']}, {config['dtype']}"
    )


def machine_line(result: dict) -> str:
    machine = result["machine"]
    versions = [f"{name} {machine['versions'][name]}" for name in ("jax", "torch") if name in machine["versions"]]
    return f"{machine['device']} ({machine['cores']} cores), {', '.join(versions)}"


def chart(result: dict) -> "Figure":
    """Seconds per stage on a logarithmic axis, a bar for jaxmech and each comparison."""
    from matplotlib.figure import Figure

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
