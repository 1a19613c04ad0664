"""What a study is given: settings, models and files of examples, checked before anything is computed."""

import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from small_study import SETTINGS
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import jaxmech as jm
from jaxmech.loading import describe
from jaxmech.study import StudyFolder, run
from jaxmech.study.boxes_data import BoxesData
from jaxmech.study.study import Study

CONFIG = describe(jm.demo.path("base"))[0]
FETCHERS_AND_OBJECTS = (jm.Stage("fetchers", "last"), jm.Stage("objects", "object", "fetchers", "v"))


def test_a_file_of_examples_can_be_studied(tmp_path):
    jm.boxes.write(tmp_path / "data.jsonl", jm.boxes.make(20, seed=3))
    settings = dataclasses.replace(SETTINGS, data=tmp_path / "data.jsonl")
    data = Study(settings, {}).data
    assert (len(data.pairs), len(data.contexts)) == (56, 5)
    found = data.desideratum("positional")
    assert {use: len(part) for use, part in found.items()} == {"train": 48, "validation": 8, "test": 8}
    jm.boxes.write(tmp_path / "data.jsonl", jm.boxes.make(8))
    with pytest.raises(ValueError, match="has 8 scenes of objects .* a study needs at least 9"):
        _ = Study(settings, {}).data.pairs


@pytest.mark.parametrize("scenes", [9, 20])
def test_dcm_is_tested_on_prompts_that_it_was_not_trained_on_with_a_file_too(tmp_path, scenes):
    """Examples are fewer than the pairs asked for, so each use repeats its own."""
    jm.boxes.write(tmp_path / "data.jsonl", jm.boxes.make(scenes, seed=3))
    settings = dataclasses.replace(SETTINGS, data=tmp_path / "data.jsonl", train=100, validation=50, test=50)
    data = BoxesData(settings, jm.load(jm.demo.path("base")).tokenizer)
    data.check(CONFIG, {"contexts", "desiderata"})
    for name in ("positional", "object_value"):
        found = {use: {tuple(row) for row in part.clean.tolist()} for use, part in data.desideratum(name).items()}
        found["patching"] = {tuple(row) for row in data.patching(name, 0).clean.tolist()}
        assert not found["train"] & (found["validation"] | found["test"] | found["patching"])
        assert not found["validation"] & (found["test"] | found["patching"])


def splitting(word: str):
    """The demo's tokenizer without one of the objects."""
    tokenizer = jm.load(jm.demo.path("base")).tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["vocab"][word]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


@pytest.mark.parametrize("from_file", [False, True])
def test_objects_that_the_tokenizer_splits_are_left_out_of_all_prompts_alike(tmp_path, from_file):
    examples = jm.boxes.make(60, seed=0)
    word = examples[0].scene.objects[0]
    jm.boxes.write(tmp_path / "data.jsonl", examples)
    settings = dataclasses.replace(SETTINGS, data=tmp_path / "data.jsonl" if from_file else None)
    data = BoxesData(settings, splitting(word))
    with pytest.warns(UserWarning, match=rf"does not know 1 objects: {word}. Dropped \d+ of ") as caught:
        data.check(CONFIG, {"contexts", "desiderata"})
        assert len(data.desideratum("positional")["train"]) == 48
        assert len(data.patching("object_value", 1)) == 8
    assert len(caught) == 1
    assert all(word not in example.sentence for part in data._examples.values() for example in part)


def test_what_dcm_will_lack_is_said_before_anything_is_computed(tmp_path):
    names = jm.boxes.OBJECTS[:13]
    scenes = [jm.boxes.Scene(names[i % 7 :][:7], tuple("ABCDEFGHIJ"[i % 3 :][:7])) for i in range(21)]
    jm.boxes.write(tmp_path / "data.jsonl", [jm.boxes.Example(scene, 0) for scene in scenes])
    settings = dataclasses.replace(SETTINGS, data=tmp_path / "data.jsonl")
    ran = []
    with pytest.raises(ValueError, match="13 objects; 'positional' needs 14 for scenes of 7 boxes"):
        run(settings, StudyFolder.open(tmp_path / "out", settings), progress=lambda *call: ran.append(call))
    assert not ran and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": 1}, "1 scenes are left for contexts"),
        ({"boxes": 3, "variants": True}, "'incorrect_segment' has no target for segment 1 of 3"),
        ({"k": {"object_lookup": 33}}, "'object_lookup': k=33, but the model has 32 heads"),
    ],
)
def test_a_study_that_cannot_end_does_not_begin(tmp_path, change, message):
    settings = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(ValueError, match=message):
        run(settings, StudyFolder.open(tmp_path / "out", settings))
    assert not (tmp_path / "out").exists()


def test_models_and_data_are_the_same_however_their_paths_are_spelt(tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(jm.demo.path("base").parent)
    jm.boxes.write(tmp_path / "data.jsonl", jm.boxes.make(20))
    settings = dataclasses.replace(SETTINGS, data=tmp_path / "data.jsonl")
    StudyFolder.open(tmp_path / "out", settings).keep("accuracy", "base", 1.0, 0.0)
    monkeypatch.chdir(tmp_path)
    relative = Path("models")
    respelt = {"base": relative / "base", "tuned": (relative / "tuned",), "data": Path("data.jsonl")}
    folder = StudyFolder.open("out", dataclasses.replace(settings, **respelt))
    assert folder.parts == {"accuracy": {"base": 1.0}}
    turned = dataclasses.replace(settings, base=settings.tuned[0], tuned=(settings.base,))
    with pytest.raises(ValueError, match=r"other settings \(models differ\)"):
        StudyFolder.open("out", turned)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("a/base", "a/tuned"), ["base", "tuned"]),
        (("run1/checkpoint-500", "run2/checkpoint-500"), ["run1-checkpoint-500", "run2-checkpoint-500"]),
        (("x/a/ckpt", "x/b/ckpt", "y/b/ckpt", "last"), ["a-ckpt", "x-b-ckpt", "y-b-ckpt", "last"]),
        (("m/Base", "m/base"), ["Base", "base-1"]),
        (("m/a:b", "m/a?b", "m/my model"), ["a-b", "a-b-1", "my model"]),
        (("a/b-c", "a-b/c", "d/c"), ["b-c", "a-b-c", "d-c"]),
    ],
)
def test_models_of_folders_of_one_name_are_named_by_the_folders_above(tmp_path, folders, names):
    base, *tuned = (tmp_path / folder for folder in folders)
    settings = dataclasses.replace(SETTINGS, base=base, tuned=tuple(tuned))
    assert settings.names == names and list(settings.paths.values()) == [base, *tuned]


def changed(folder: Path, change) -> Path:
    """A copy of the demo's tuned model in which `change` was made."""
    shutil.copytree(jm.demo.path("tuned"), folder)
    change(folder)
    return folder


def edit(file: str, old: str, new: str):
    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return change


def remove(pattern: str):
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "No checkpoint directory at .*x"),
        (remove("config.json"), "holds no config.json"),
        (remove("*.safetensors"), "holds no weights"),
        (remove("tokenizer*"), "x holds no tokenizer; copy tokenizer.json"),
        (
            edit("config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 3'),
            r"x has \(layers, .*\) = \(3, .*shape",
        ),
        (
            edit("config.json", '"intermediate_size": ', '"intermediate_size": 1'),
            r"x.*has shape .*; the config calls for",
        ),
        (edit("tokenizer.json", '"fig"', '"figs"'), "tokenizer of .*x reads .* models of a study must share"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_any_is_loaded_and_anything_written(
    tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr(import_module("jaxmech.study.study"), "load", None)
    settings = dataclasses.replace(SETTINGS, tuned=(*SETTINGS.tuned, changed(tmp_path / "x", change)))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        StudyFolder.open(tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises((ValueError, FileNotFoundError)):  # as the base, too
        StudyFolder.open(tmp_path / "out", dataclasses.replace(SETTINGS, base=tmp_path / "x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned": ()}, "needs at least one fine-tuned model"),
        ({"tuned": (jm.demo.path("base"),)}, "must be different folders; .*base, .*base are the same"),
        ({"repeats": 0}, "repeats=0"),
        ({"data": jm.demo.path("chain.toml"), "boxes": 3}, "boxes=3 makes no difference to scenes of a file"),
        ({"compat": "published"}, "compat='published'"),
        ({"chain": ()}, "no stages"),
        ({"chain": FETCHERS_AND_OBJECTS}, "sender 'object'; the prompts have the roles last, query_box"),
        ({"chain": (jm.Stage("a", "query_box"),)}, "the sender 'query_box' and no receivers"),
        ({"k": {"value_fetchers": 3}}, r"k names the groups \['value_fetchers'\]; the chain has"),
        ({"k": {"value_fetcher": 0}}, "'value_fetcher': k=0; expected"),
        ({"min_effect": float("nan")}, "min_effect=nan"),
        ({"min_effect": -0.1}, "min_effect=-0.1"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"random_subsets": -1}, "random_subsets=-1"),
        ({"boxes": 1}, "boxes=1; expected 2 to 10"),
        ({"components": ("z", "q+zz")}, r"components=\['q', 'zz'\]; expected a tuple of 'z', 'q', 'k', 'v'"),
        ({"edges": (("lsat", "object"),)}, r"edges has \('lsat', 'object'\); expected a source of last, query_box"),
        ({"edges": (("last", "subject"),)}, "a target of last, query_box, prev_query_box, object, random"),
        ({"chain": (jm.Stage("whole circuit", "last"),)}, "named 'whole circuit', as all groups together are"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **{"k": {}, **change})
