"""The script that trains the demo pair: it resumes exactly, and draws what it says."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest

import jaxmech as jm

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_demo_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_demo_models", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_an_interrupted_training_ends_with_the_same_weights(script, tmp_path):
    small = script.Options(layers=1, heads=2, head_dim=8, width=16, mlp_width=16, batch=4)
    for out, steps in (("unbroken", (20,)), ("broken", (10, 20))):
        for limit in steps:
            with pytest.raises(SystemExit, match=f"Stopped after {limit} steps"):
                script.main(replace(small, out=tmp_path / out, max_steps=limit))
    saved = [
        flax.serialization.msgpack_restore((tmp_path / out / "base_state.msgpack").read_bytes())
        for out in ("unbroken", "broken")
    ]
    assert saved[0]["state"]["step"] == 20 and saved[0]["log"] == saved[1]["log"]
    first, second = (jax.tree.leaves(s["state"]) for s in saved)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_model_is_shipped_when_it_is_good_enough(script, tmp_path):
    options = script.Options(layers=1, heads=2, head_dim=8, width=16, mlp_width=16, batch=4, out=tmp_path)
    script.main(replace(options, base_accuracy=0.0, tuned_accuracy=0.0))
    for name in ("base", "tuned"):
        model = jm.load(tmp_path / name)
        assert model.config.num_layers == 1 and model.config.tie_embeddings
        assert len(jm.boxes.pairs(jm.boxes.make(2), model.tokenizer)) == 14
        assert (tmp_path / name / "training.csv").read_text().startswith("step,boxes,labels,objects,loss")


def test_fine_tuning_changes_queries_keys_and_values_alone(script, tmp_path):
    options = script.Options(layers=1, heads=2, head_dim=8, width=16, mlp_width=16, batch=4, out=tmp_path)
    script.main(replace(options, base_accuracy=0.0, tuned_accuracy=0.0))
    base, tuned = (jm.load(tmp_path / name).weights for name in ("base", "tuned"))
    for name, weight in base["blocks"].items():
        assert np.array_equal(weight, tuned["blocks"][name]) == (name not in ("q", "k", "v"))
    assert np.array_equal(base["embed"], tuned["embed"])


def test_training_sequences_are_prompts_of_the_boxes_task(script):
    vocabulary = {word: i for i, word in enumerate(script.SPECIAL + script.WORDS + script.LETTERS + jm.boxes.OBJECTS)}
    words = list(vocabulary)
    lesson = script.LESSONS[-1]
    tokens, answers = script.sequences(np.random.default_rng(0), lesson, 5, vocabulary)
    for row in tokens:
        text = " ".join(words[i] for i in row[1 : answers[0] + 2]).replace(" ,", ",").replace(" .", ".")
        example = jm.boxes.scenes._example(text)
        assert len(example.scene.labels) == 7 and words[row[answers[0]]] == example.answer
        for answer in answers:  # every query is answered by the object in its box
            label = words[row[answer - 3]]
            assert words[row[answer]] == example.scene.objects[example.scene.labels.index(label)]
