"""The boxes prompts of a study: which scenes are of which use, and what is drawn."""

import dataclasses

from small_study import SETTINGS

import jaxmech as jm
from jaxmech.study.boxes_data import BoxesData
from jaxmech.study.study import Study


def test_prompts_of_different_uses_share_no_scene():
    examples = Study(SETTINGS, {}).data._examples
    scenes = {use: {example.scene for example in part} for use, part in examples.items()}
    sizes = {use: len(part) for use, part in scenes.items()}
    assert sizes == {"evaluation": 8, "contexts": 20, "train": 7, "validation": 2, "test": 3}
    assert len(set().union(*scenes.values())) == sum(sizes.values())


def test_draws_of_all_repeats_and_seeds_differ_on_the_same_scenes(tmp_path):
    """Scenes of a file are the same for every seed."""
    jm.boxes.write(tmp_path / "data.jsonl", jm.boxes.make(20, seed=3))
    drawn = []
    for seed in (0, 1):
        data = BoxesData(
            dataclasses.replace(SETTINGS, data=tmp_path / "data.jsonl", seed=seed), Study(SETTINGS, {}).data.tokenizer
        )
        drawn += [data.desideratum("positional")["test"], *(data.patching("positional", repeat) for repeat in range(2))]
    assert len({pairs.corrupt.tobytes() for pairs in drawn}) == 6


def test_contexts_ask_about_any_box():
    data = Study(SETTINGS, {}).data
    query = data.contexts[:, data.pairs.position("query_box")[0]]  # all prompts are equally long
    segment = (data.contexts == query[:, None]).argmax(-1)  # where the scene names that box
    assert len(segment) == 20 and len(set(segment)) > 4
