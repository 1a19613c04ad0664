"""Times a whole study of a pair of models of a shape, stage by stage: what `jaxmech study` takes on this machine.

    python benchmarks/gpu_study.py --shape 7b --out out/gpu_study.json              # on the GPU; no network
    python benchmarks/gpu_study.py --shape 7b --models-in-memory 1                  # on a card for one model
    python benchmarks/gpu_study.py --shape 7b --once --minutes 5                    # the stages that fit
    python benchmarks/gpu_study.py --shape 7b --share 0.25 --no-sweeps              # all stages, of fewer prompts

The models have random weights, made on the device, and the demo's tokenizer; "tuned" has other projections to q, k and
v. Prompts, sizes and stages are those of `jaxmech study`, but what is found means nothing, and so that every stage has
as much to do as in a study of trained models, the answers that count as right are the base model's own, discovery finds
heads where the paper's circuit has them (`shapes.groups`), and of each group activation patching patches every second
head. Left out is the reading of checkpoints. The first study compiles; a second one in the same process, unless --once,
does not. What a study that is cut off, or by --minutes, has done by then is in --out. With --share, every stage has
that part of its prompts; with --no-sweeps, the sweeps of discovery, which gpu_7b.py times, are left out. Needs neither
tyro nor rich.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import shapes  # noqa: E402
from measuring import machine, peak_memory, save  # noqa: E402

import convert  # noqa: E402
import jaxmech as jm  # noqa: E402
from jaxmech import discovery  # noqa: E402
from jaxmech.study import Settings, StudyFolder, dcm_stages, run, running  # noqa: E402
from jaxmech.study.boxes_data import BoxesData  # noqa: E402
from jaxmech.study.models import Known  # noqa: E402
from jaxmech.study.study import Study  # noqa: E402

PROMPTS = ("scenes", "contexts", "train", "validation", "test", "patched", "single_head_prompts")  # their numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="7b")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_study.json"))
    parser.add_argument("--models-in-memory", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, within a stage or not")
    parser.add_argument("--quick", action="store_true", help="far fewer prompts, to see that everything runs")
    parser.add_argument("--share", type=float, default=1, help="of the prompts of every stage, from above 0 to 1")
    parser.add_argument("--no-sweeps", action="store_true", help="discovery finds its heads without sweeps")
    parser.add_argument("--once", action="store_true", help="one study, with compilation")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share is {options.share}; expected a number above 0 and at most 1")
    config = shapes.SHAPES[options.shape].config
    settings = settings_of(config, options.share, quick=options.quick, models_in_memory=options.models_in_memory)
    sweep = no_sweep if options.no_sweeps else discovery.path_patch
    result: dict[str, Any] = {"shape": options.shape, "config": config.to_dict(), "machine": machine()}
    result |= {"share": options.share, "sweeps": not options.no_sweeps}
    result["settings"] = settings.to_dict() | {"base": None, "tuned": None}
    deadline = time.monotonic() + 60 * options.minutes
    for name in ["with compilation"] if options.once else ["with compilation", "compiled"]:

        def keep(found: dict[str, Any], name: str = name) -> None:
            result[name] = found
            save(options.out, result)

        try:
            keep(study(config, settings, sweep, keep, deadline))
        except NoTimeLeft:
            keep(result.get(name, {"stages": {}}) | {"cut_off": True})
        print(f"{name}: {json.dumps(result[name])}", flush=True)


def settings_of(config: jm.Config, share: float = 1, *, quick: bool = False, models_in_memory: int = 2) -> Settings:
    """A study that finds the heads of `shapes.groups`, of a share of its prompts."""
    settings = Settings(
        base=jm.demo.path("base"),
        tuned=(jm.demo.path("tuned"),),
        k=sizes(shapes.groups(config)),
        threshold=0,
        dtype=config.dtype,
        models_in_memory=models_in_memory,
    )
    settings = settings.quick() if quick else settings
    return dataclasses.replace(settings, **{name: max(1, round(share * getattr(settings, name))) for name in PROMPTS})


class NoTimeLeft(Exception):
    """The deadline has passed."""


def study(
    config: jm.Config,
    settings: Settings,
    sweep: Callable[..., jm.PathScores],
    keep: Callable[[dict[str, Any]], None],
    deadline: float,
    weights_of: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Seconds of one study in a folder of its own, by stage and model; `keep` gets those so far.

    Args:
      sweep: `jm.path_patch`, or what takes its place in discovery.
      weights_of: from the name of a model to its weights; None: random ones.

    Raises:
      NoTimeLeft: the study has come to `deadline`, by time.monotonic().
    """

    class RandomStudy(Study):
        def _load(self, name: str) -> jm.Model:
            weights = weights_of(name) if weights_of else random_weights(config, base=name == settings.names[0])
            return jm.Model(config, {"params": weights}, convert.read_tokenizer(settings.paths[name], config))

        @cached_property
        def base(self) -> Known:
            tokenizer = convert.read_tokenizer(settings.base, config)
            return Known(settings.base, config, tokenizer, folder=settings.base, adapter=None)

        @cached_property
        def data(self) -> BoxesData:
            data = BoxesData(settings, self.base.tokenizer)
            logits = jm.predict(self.model(settings.names[0]), data.pairs).logits
            assert logits is not None
            vars(data)["pairs"] = dataclasses.replace(data.pairs, labels=logits.argmax(-1))
            return data

    plain, selected = discovery.path_patch, dcm_stages.selected_heads
    running.Study, discovery.path_patch = RandomStudy, finding_the_papers_heads(sweep)
    dcm_stages.selected_heads = every_second_head
    try:
        with tempfile.TemporaryDirectory() as path:
            folder, started = StudyFolder.open(path, settings), time.perf_counter()

            def progress(stage: str, part: str, done: int, total: int) -> None:
                if done == total:
                    keep({"stages": folder.timings, "done": f"{stage} of {part}"})
                if time.monotonic() > deadline:
                    raise NoTimeLeft

            results = run(settings, folder, progress=progress)
            seconds, stages = time.perf_counter() - started, folder.timings
    finally:
        running.Study, discovery.path_patch, dcm_stages.selected_heads = Study, plain, selected
    circuits = {"found": ("discovery", "groups"), "kept": ("minimality", "circuit")}
    heads = {
        name: {which: sizes(results[stage][name][key]) for which, (stage, key) in circuits.items()}
        for name in settings.names
    }
    return {"seconds": seconds, "stages": stages, "heads": heads, "peak_bytes": peak_memory()}


def random_weights(config: jm.Config, *, base: bool) -> dict[str, Any]:
    """Those of the base, or of the tuned model."""
    weights = dict(shapes.random_model(config).weights)
    if not base:
        weights["blocks"] = {k: 1.1 * x if k in "qkv" else x for k, x in weights["blocks"].items()}
    return weights


def finding_the_papers_heads(sweep: Callable[..., jm.PathScores]) -> Callable[..., jm.PathScores]:
    """`sweep`, `jm.path_patch`, with scores that make the heads of `shapes.groups` the strongest of their stage."""

    def found(model: jm.Model, pairs: jm.Pairs, sender: str, receivers: Any, via: str | None, **options) -> Any:
        scores = sweep(model, pairs, sender, receivers, via, **options)
        (group,) = [stage.group for stage in jm.PAPER_CHAIN if (stage.sender, stage.via) == (sender, via)]
        layers, heads = np.array(shapes.groups(model.config)[group]).T
        scores.per_example[layers, heads] -= 10  # a relative change of a probability is -1 or more
        return scores

    return found


def no_sweep(model: jm.Model, pairs: jm.Pairs, *_, **__) -> jm.PathScores:
    """In place of `jm.path_patch`: no head does anything."""
    shape = model.config.num_layers, model.config.num_heads, len(pairs)
    return jm.PathScores(np.zeros(shape, np.float32), np.ones(len(pairs), np.float32))


def every_second_head(study: Study) -> dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, int]]]]:
    """In place of `dcm_stages.selected_heads`, what masks select: every second head, on every desideratum."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, int]]]] = {}
    for model in study.settings.names:
        circuit = study.circuit(model)
        for group, desiderata in study.results["dcm"][model].items():
            for name in desiderata:
                found.setdefault((name, circuit.roles[group]), {})[model, group] = circuit.groups[group][::2]
    return found


def sizes(groups: dict[str, list[Any]]) -> dict[str, int]:
    return {group: len(heads) for group, heads in groups.items()}


if __name__ == "__main__":
    main()
