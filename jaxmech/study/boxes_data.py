"""The boxes prompts of a study: to be evaluated, contexts of ablated activations, and the desiderata's pairs."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxmech import boxes
from jaxmech.ablation import mean_activations
from jaxmech.boxes import POSITION_VARIANTS, Example, Scene
from jaxmech.boxes.prompts import PromptReader, whole_objects
from jaxmech.config import Config
from jaxmech.loading import Model, check_prompts
from jaxmech.pairs import Pairs
from jaxmech.study.doubt import chance
from jaxmech.study.settings import EDGES, Settings

MAIN_DESIDERATA = ("positional", "object_value", "box_label_value")
DCM_USES = ("train", "validation", "test")
# Scenes of each use; corrupt prompts need a second.
LEAST = {"evaluation": 2, "contexts": 2, "train": 1, "validation": 1, "test": 1}
LEAST_SCENES = 9  # of a data file: half of them to evaluate, a quarter for contexts, the rest for the desiderata
SAMPLE = 20  # scenes whose prompts all tokenizers must read alike


@dataclass(frozen=True)
class BoxesData:
    """Prompts for one tokenizer. Those of different uses come from different scenes."""

    settings: Settings
    tokenizer: Any

    @staticmethod
    def sample(settings: Settings) -> list[str]:
        """Prompts as text, with all words that are in any."""
        if settings.data is not None:
            return [example.sentence for example in boxes.read(settings.data)]
        objects = " the ".join(["The box contains", *boxes.OBJECTS])
        return [*(example.sentence for example in boxes.make(SAMPLE)), objects]

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Examples by use, a key of LEAST; those whose objects the tokenizer splits are left out."""
        settings = self.settings
        if settings.data is None:
            sizes = _scenes_to_make(settings)
            examples = boxes.make(sum(sizes.values()), settings.boxes, settings.seed)
            whole, parts = self._whole(examples), _in_turn(_scenes(examples), sizes)
        else:
            whole = self._whole(boxes.read(settings.data))
            parts = _split(_scenes(whole), settings)
        use = {scene: name for name, part in parts.items() for scene in part}
        return {name: [example for example in whole if use.get(example.scene) == name] for name in parts}

    def _whole(self, examples: Sequence[Example]) -> list[Example]:
        return whole_objects(examples, PromptReader(self.tokenizer, self.settings.add_bos), "drop")

    def check(self, config: Config, uses: Collection[str]) -> None:
        """Checks that there are prompts enough for all that is to come, and that they can be read.

        Args:
          config: that of the models.
          uses: "contexts" if activations are averaged, "desiderata" if DCM is trained or its heads are patched.

        Raises:
          ValueError: too few scenes or objects, prompts that differ in length where they must not, or tokens that the
            models do not know.
        """
        contexts, desiderata = "contexts" in uses, "desiderata" in uses
        uses = ["evaluation", *["contexts"] * contexts, *DCM_USES * desiderata]
        for use in uses:
            if (found := len(_scenes(self._examples[use]))) < LEAST[use]:
                raise ValueError(
                    f"{found} scenes are left for {use}, of objects that the tokenizer does not split; expected at "
                    f"least {LEAST[use]}. Give examples of more scenes, or ask for more of them."
                )
        check_prompts(config, self.pairs)
        if contexts:
            _ = self.contexts
        for name in (*self.desiderata, *self.variants) if desiderata else ():
            for use in DCM_USES:
                boxes.check_desideratum(name, self._examples[use], self._objects, self.settings.compat)  # pyright: ignore
        if desiderata:
            self._triples("train", 1, 0)

    @cached_property
    def pairs(self) -> Pairs:
        """The prompts on which circuits are found and evaluated, with corrupt ones."""
        return self._pairs(self._examples["evaluation"])

    @property
    def example(self) -> str:
        """The first of them as text, with its answer."""
        return self._examples["evaluation"][0].sentence

    @property
    def chance(self) -> float:
        """Accuracy on them of naming any object of the scene."""
        return chance(self._examples["evaluation"])

    @cached_property
    def contexts(self) -> np.ndarray:
        """Prompts over which ablated activations are averaged, int [B, T]: one of each scene, about any of its boxes.

        Raises:
          ValueError: they differ in length, so that a position does not mean the same in all.
        """
        scenes = _scenes(self._examples["contexts"])
        asked = np.random.default_rng(self.settings.seed).integers(len(scenes[0].labels), size=len(scenes))
        chosen = [Example(scene, int(i) % len(scene.labels)) for scene, i in zip(scenes, asked, strict=True)]
        pairs = self._pairs(chosen)
        lengths = {*pairs.position("last").tolist(), *self.pairs.position("last").tolist()}
        if len(lengths) > 1:
            raise ValueError(
                f"The prompts have {sorted(length + 1 for length in lengths)} tokens. Activations are averaged "
                "position by position, so all must be equally long: use scenes of one size, with objects of one token."
            )
        return pairs.clean

    def means(self, model: Model) -> np.ndarray:
        """What ablated heads put out: z averaged over the contexts, [T, L, N, H]."""
        return mean_activations(model, self.contexts, batch_size=self.settings.batch_size)

    @property
    def edges(self) -> Sequence[tuple[str, str]]:
        """Attention that is knocked out, (source, target)."""
        return EDGES if self.settings.edges is None else self.settings.edges

    @property
    def desiderata(self) -> tuple[str, ...]:
        """Names of those that every group of a circuit is tried on."""
        return MAIN_DESIDERATA

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants of the positional one, tried on the group that carries position best."""
        return POSITION_VARIANTS if self.settings.variants else ()

    def desideratum(self, name: str) -> dict[str, Pairs]:
        """Pairs of a desideratum for DCM: "train", "validation" and "test", each of scenes of its own."""
        return {use: self._triples(use, getattr(self.settings, use), 0)[name] for use in DCM_USES}

    def patching(self, name: str, repeat: int) -> Pairs:
        """Pairs of a desideratum for one repeat of activation patching, of the scenes on which DCM is tested."""
        return self._triples("test", self.settings.patched, 1 + repeat)[name]

    def _triples(self, use: str, n: int, offset: int) -> dict[str, Pairs]:
        """Those of all desiderata, which are kept: to make them takes a while, and all models are given the same."""
        if (use, n, offset) not in self._made:
            names, seed = (*self.desiderata, *self.variants), 1000 * self.settings.seed + offset
            options = {"objects": self._objects, "add_bos": self.settings.add_bos, "compat": self.settings.compat}
            made = boxes.triples(names, self._examples[use], self.tokenizer, n, seed, **options)  # pyright: ignore
            self._made[use, n, offset] = made
        return self._made[use, n, offset]

    @cached_property
    def _made(self) -> dict[tuple[str, int, int], dict[str, Pairs]]:
        return {}

    @cached_property
    def _objects(self) -> set[str]:
        """All objects that the study's prompts name."""
        return {word for part in self._examples.values() for example in part for word in example.scene.objects}

    def _pairs(self, examples: Sequence[Example]) -> Pairs:
        options = {"add_bos": self.settings.add_bos, "compat": self.settings.compat}
        return boxes.pairs(examples, self.tokenizer, self.settings.seed, **options)  # pyright: ignore


def _scenes(examples: Collection[Example]) -> list[Scene]:
    return list(dict.fromkeys(example.scene for example in examples))


def _scenes_to_make(settings: Settings) -> dict[str, int]:
    """Scenes for each use, so many that no prompt of a desideratum must be drawn twice."""
    pairs = {use: getattr(settings, use) for use in DCM_USES}
    pairs["test"] = max(settings.test, settings.repeats * settings.patched)
    return {
        "evaluation": settings.scenes,
        "contexts": settings.contexts,
        **{use: math.ceil(size / settings.boxes) for use, size in pairs.items()},
    }


def _split(scenes: list[Scene], settings: Settings) -> dict[str, list[Scene]]:
    """The scenes of a file by use: half to evaluate, a quarter for contexts, and the rest as DCM's sizes are."""
    if len(scenes) < LEAST_SCENES:
        raise ValueError(
            f"{settings.data} has {len(scenes)} scenes of objects that the tokenizer does not split; a study needs at "
            f"least {LEAST_SCENES}."
        )
    half, quarter = len(scenes) // 2, len(scenes) // 4
    rest = scenes[half + quarter :]

    def share(size: int) -> int:
        return len(rest) * size // (settings.train + settings.validation + settings.test)

    test = min(max(share(settings.test), 1), len(rest) - 2)
    validation = min(max(share(settings.validation), 1), len(rest) - test - 1)
    sizes = {"train": len(rest) - validation - test, "validation": validation, "test": test}
    return {
        "evaluation": scenes[: min(half, settings.scenes)],
        "contexts": scenes[half : half + min(quarter, settings.contexts)],
        **_in_turn(rest, sizes),
    }


def _in_turn(scenes: Sequence[Scene], sizes: dict[str, int]) -> dict[str, list[Scene]]:
    """The first scenes for the first use, the next ones for the next, and so on."""
    found, start = {}, 0
    for use, size in sizes.items():
        found[use] = list(scenes[start : start + size])
        start += size
    return found
