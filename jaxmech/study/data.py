"""The prompts of a study: those that are evaluated, the contexts of ablated activations, and the desiderata's pairs."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxmech import boxes
from jaxmech.boxes import Example
from jaxmech.pairs import Pairs
from jaxmech.study.settings import Settings

MAIN_DESIDERATA = ("positional", "object_value", "box_label_value")
LEAST_SCENES = 6  # of a data file: some to evaluate, some for contexts, some for the desiderata


@dataclass(frozen=True)
class StudyData:
    """Prompts for one tokenizer. Those of different uses come from different scenes."""

    settings: Settings
    tokenizer: Any

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Examples by use: "evaluation", "contexts" and "desiderata"."""
        settings = self.settings
        if settings.data is not None:
            return _split(boxes.read(settings.data), settings)
        pairs = settings.train + settings.validation + settings.test
        wanted = {"evaluation": settings.scenes, "contexts": settings.contexts}
        wanted["desiderata"] = math.ceil(max(pairs, settings.repeats * settings.patched) / settings.boxes)
        made = boxes.make(sum(wanted.values()), settings.boxes, settings.seed)
        found, start = {}, 0
        for use, scenes in wanted.items():
            found[use] = made[start : start + scenes * settings.boxes]
            start += scenes * settings.boxes
        return found

    @cached_property
    def pairs(self) -> Pairs:
        """The prompts on which circuits are found and evaluated, with corrupt ones."""
        return self._pairs("evaluation")

    @property
    def example(self) -> str:
        """The first of them as text, with its answer."""
        return self._examples["evaluation"][0].sentence

    @cached_property
    def contexts(self) -> np.ndarray:
        """Prompts over which ablated activations are averaged, int [B, T]: one of each scene, about any of its boxes.

        Raises:
          ValueError: they differ in length, so that a position does not mean the same in all.
        """
        examples = self._examples["contexts"]
        scenes = list(dict.fromkeys(example.scene for example in examples))
        asked = np.random.default_rng(self.settings.seed).integers(len(scenes[0].labels), size=len(scenes))
        chosen = [Example(scene, int(i) % len(scene.labels)) for scene, i in zip(scenes, asked, strict=True)]
        pairs = boxes.pairs(chosen, self.tokenizer, self.settings.seed, **self._options)
        lengths = {*pairs.position("last").tolist(), *self.pairs.position("last").tolist()}
        if len(lengths) > 1:
            raise ValueError(
                f"The prompts have {sorted(length + 1 for length in lengths)} tokens. Activations are averaged "
                "position by position, so all must be equally long: use scenes of one size, with objects of one token."
            )
        return pairs.clean

    def desideratum(self, name: str) -> dict[str, Pairs]:
        """Pairs of a desideratum for DCM: "train", "validation" and "test"."""
        sizes = {use: getattr(self.settings, use) for use in ("train", "validation", "test")}
        pairs, start = self._desideratum(name, self._examples["desiderata"], sum(sizes.values()), 0), 0
        found = {}
        for use, size in sizes.items():
            found[use] = pairs[start : start + size]
            start += size
        return found

    def patching(self, name: str, repeat: int) -> Pairs:
        """Pairs of a desideratum for one repeat of activation patching."""
        return self._desideratum(name, self._examples["desiderata"], self.settings.patched, 1 + repeat)

    def _desideratum(self, name: str, examples: list[Example], n: int, offset: int) -> Pairs:
        seed = 1000 * self.settings.seed + offset
        options = {"add_bos": self.settings.add_bos, "compat": self.settings.compat}
        return boxes.desideratum(name, examples, self.tokenizer, n, seed, **options)  # pyright: ignore

    def _pairs(self, use: str) -> Pairs:
        return boxes.pairs(self._examples[use], self.tokenizer, self.settings.seed, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"split_objects": "drop", "add_bos": self.settings.add_bos, "compat": self.settings.compat}


def _split(examples: list[Example], settings: Settings) -> dict[str, list[Example]]:
    """The examples of a file by use: half of its scenes to evaluate, and a quarter each for the others."""
    scenes = list(dict.fromkeys(example.scene for example in examples))
    if len(scenes) < LEAST_SCENES:
        raise ValueError(f"{settings.data} has {len(scenes)} scenes; a study needs at least {LEAST_SCENES}.")
    half, quarter = len(scenes) // 2, len(scenes) // 4
    parts = {
        "evaluation": scenes[: min(half, settings.scenes)],
        "contexts": scenes[half : half + min(quarter, settings.contexts)],
        "desiderata": scenes[half + quarter :],
    }
    return {use: [example for example in examples if example.scene in set(part)] for use, part in parts.items()}
