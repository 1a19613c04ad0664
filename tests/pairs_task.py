"""A task of pairs in a file: the demo's boxes, with roles of this file."""

import json
from collections.abc import Iterable
from pathlib import Path

import jaxmech as jm
from jaxmech.study import Settings

CHAIN = """
[[stage]]
group = "movers"
sender = "last"
k = 10

[[stage]]
group = "lookup"
sender = "asked"
receivers = "movers"
via = "v"
k = 6

[[stage]]
group = "binders"
sender = "before"
receivers = "lookup"
via = "v"
k = 6

[[stage]]
group = "matchers"
sender = "asked"
receivers = "lookup"
via = "q"
k = 8
"""


def records(count: int, seed: int = 5) -> list[dict]:
    """Pairs about the demo's boxes, with roles of this file, of scenes of two sizes: prompts differ in length."""
    found = []
    for i, size in ((i, size) for i in range(count) for size in (3, 4)):
        scene = jm.boxes.make(1, size, seed=seed + i)[0].scene
        held = [f"the {word} is in Box {box}" for word, box in zip(scene.objects, scene.labels, strict=True)]
        text = f"T{', '.join(held)[1:]}."
        record = {"answer": scene.objects[0], "wrong_answer": scene.objects[-1]}
        for name, roles, at in (("clean", "roles", 0), ("corrupt", "corrupt_roles", -1)):
            record[name] = f"{text} Box {scene.labels[at]} contains the"
            record[roles] = {"asked": f". Box {scene.labels[at]}", "before": held[at][4:]}
        found.append(record)
    return found


def desiderata(count: int) -> dict[str, list[dict]]:
    """Counterfactuals of these pairs by name: another box is asked about, or there is another scene."""
    lines = records(count)
    asked = [line | {"answer": line["wrong_answer"], "wrong_answer": line["answer"]} for line in lines]
    scene = []
    for line, other in zip(lines, lines[2:] + lines[:2], strict=True):
        theirs = {"corrupt": other["clean"], "corrupt_roles": other["roles"], "answer": other["answer"]}
        scene.append(line | theirs | {"wrong_answer": None})
    return {"asked": asked, "scene": scene}


def write_task(folder: Path, lines: Iterable[dict]) -> None:
    """Writes pairs.jsonl and chain.toml."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "chain.toml").write_text(CHAIN)


def settings_of(folder: Path) -> Settings:
    """A small study of what `write_task` wrote to a folder."""
    return Settings(
        base=jm.demo.path("base"),
        tuned=(jm.demo.path("tuned"),),
        pairs=folder / "pairs.jsonl",
        chain=jm.read_chain(folder / "chain.toml"),
        min_effect=0.01,
        metric="logit_difference",
        random_circuits=2,
        random_subsets=2,
        components=("z",),
        single_head_prompts=5,
        seed=2,
    )
