"""Run folders: nothing changes before a first result is kept, and damaged files are named."""

import json
import os
import shutil

import numpy as np
import pytest

import jaxmech as jm
from jaxmech.files import check_file
from jaxmech.run_folder import RunFolder, fingerprint
from jaxmech.scores import PathScores

SCORES = PathScores(np.zeros((2, 2, 3), np.float32), np.ones(3, np.float32))


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def finished(folder, **settings) -> RunFolder:
    run = RunFolder.open(folder, settings or {"seed": 0})
    run.keep("group", SCORES)
    return run


def test_a_run_is_written_with_its_first_result(tmp_path):
    run = RunFolder.open(tmp_path / "run", {"seed": 0}, given={"model": "here"})
    assert not (tmp_path / "run").exists() and not run.begun
    run.keep("group", SCORES)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["seed"], config["model"]) == (0, "here") and "jax" in config["versions"]
    again = RunFolder.open(tmp_path / "run", {"seed": 0}, given={"model": "./here"})
    assert again.begun and list(again.scores) == ["group"]


def test_finished_sweeps_are_read_back_as_they_were_kept(tmp_path):
    rng = np.random.default_rng(0)
    kept = {
        group: PathScores(rng.normal(size=(2, 2, 3)).astype(np.float32), rng.random(3).astype(np.float32))
        for group in ("one", "two")
    }
    run = RunFolder.open(tmp_path, {"seed": 0})
    for group, scores in kept.items():
        run.keep(group, scores)
    found = RunFolder.open(tmp_path, {"seed": 0}).scores
    assert list(found) == list(kept)
    for group, scores in kept.items():
        np.testing.assert_array_equal(found[group].per_example, scores.per_example)
        np.testing.assert_array_equal(found[group].probability, scores.probability)


@pytest.mark.parametrize(
    ("settings", "name"), [({"seed": 1, "k": 2}, "seed"), ({"seed": 0}, "k"), ({"seed": 0, "k": 2, "more": 1}, "more")]
)
def test_a_run_with_other_settings_is_refused_also_if_there_are_more_or_fewer(tmp_path, settings, name):
    finished(tmp_path, seed=0, k=2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"a run with other settings \({name} differ\)"):
        RunFolder.open(tmp_path, settings)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_another_command_is_left_alone(tmp_path, overwrite):
    """Its results would stand beside the new config.json; folders of earlier versions do not say whose they are."""
    finished(tmp_path, seed=0, command="study")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is the folder of `jaxmech study`; choose another --out"):
        RunFolder.open(tmp_path, {"seed": 0, "command": "discover"}, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert RunFolder.open(tmp_path, {"seed": 0, "command": "study"}).begun
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: x for key, x in config.items() if key != "command"}))
    assert RunFolder.open(tmp_path, {"seed": 0, "command": "study"}).begun


@pytest.fixture(params=["Hugging Face", "Orbax", "adapter"])
def model_folder(request, tmp_path):
    """A folder with the names of a checkpoint's files, all as old."""
    names = {
        "Hugging Face": ("config.json", "tokenizer.model", "pytorch_model.bin", "model-00001-of-00002.safetensors"),
        "Orbax": ("_CHECKPOINT_METADATA", "tokenizer/tokenizer.json", "state/_METADATA", "state/d/1"),
        "adapter": ("adapter_config.json", "tokenizer_config.json", "adapter_model.bin", "adapter_model.safetensors"),
    }
    for name in names[request.param]:
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
        os.utime(file, ns=(0, 10**9))
    return tmp_path / "model", [tmp_path / "model" / name for name in names[request.param]]


def test_the_fingerprint_of_a_checkpoint_changes_with_any_of_its_files(model_folder, tmp_path):
    model, files = model_folder
    seen = [fingerprint(model)]
    assert fingerprint(shutil.copytree(model, tmp_path / "elsewhere")) == seen[0] == fingerprint(model)
    for file in files:
        file.write_text("12")
        os.utime(file, ns=(0, 10**9))
        seen.append(fingerprint(model))
        os.utime(file, ns=(0, 10**9 + 1000))
        seen.append(fingerprint(model))
    files[-1].unlink()
    seen.append(fingerprint(model))
    assert len(set(seen)) == len(seen) == 10


def test_what_else_lies_in_the_folder_of_a_checkpoint_changes_nothing(model_folder):
    model, _ = model_folder
    before = fingerprint(model)
    for name in ("runs/events.log", "out/config.json", "checkpoint-500/model.safetensors"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("1")
    assert fingerprint(model) == before


def test_scores_of_a_run_are_read_without_its_settings(tmp_path):
    run = finished(tmp_path / "run")
    other = PathScores(np.full((2, 2, 3), -1.5, np.float32), np.full(3, 0.5, np.float32), "log_probability")
    run.keep("a group", other)
    for path in (tmp_path / "run", tmp_path / "run" / "scores.npz"):
        found = jm.read_scores(path)
        assert list(found) == ["group", "a group"]
        assert [scores.metric for scores in found.values()] == ["probability", "log_probability"]
        np.testing.assert_array_equal(found["a group"].per_example, other.per_example)
        np.testing.assert_array_equal(found["a group"].probability, other.probability)
    assert RunFolder.open(tmp_path / "run", {"seed": 0}).scores["a group"].metric == "log_probability"
    with pytest.raises(FileNotFoundError):
        jm.read_scores(tmp_path)
    other.save(tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"one.npz holds no probabilities of \['per_example',"):
        jm.read_scores(tmp_path / "one.npz")


def test_what_overwrite_replaces_is_there_until_the_first_result(tmp_path):
    finished(tmp_path)
    (tmp_path / "old.png").write_bytes(b"1")
    (tmp_path / "mine.png").write_bytes(b"2")
    before = contents(tmp_path)
    outputs = [tmp_path / "scores.npz", tmp_path / "old.png", tmp_path / "never.png"]
    run = RunFolder.open(tmp_path, {"seed": 1}, outputs=outputs, overwrite=True)
    assert contents(tmp_path) == before and not run.scores
    run.keep("other", SCORES)
    assert set(contents(tmp_path)) == {"config.json", "scores.npz", "mine.png"}
    assert list(RunFolder.open(tmp_path, {"seed": 1}).scores) == ["other"]


def test_results_without_settings_are_kept_unless_asked(tmp_path):
    finished(tmp_path)
    (tmp_path / "config.json").unlink()
    outputs = [tmp_path / "scores.npz"]
    with pytest.raises(ValueError, match=r"holds results \(scores.npz\) without the config.json.*--overwrite"):
        RunFolder.open(tmp_path, {"seed": 0}, outputs=outputs)
    RunFolder.open(tmp_path, {"seed": 0}, outputs=outputs, overwrite=True)


def test_the_config_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="other settings|not that of a run, so it is not overwritten"):
            RunFolder.open(tmp_path, {"seed": 0}, overwrite=overwrite)


@pytest.mark.parametrize("text", ["{", "[]", "\x00\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
    finished(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json is damaged.*--overwrite"):
        RunFolder.open(tmp_path, {"seed": 0})
    RunFolder.open(tmp_path, {"seed": 0}, overwrite=True)


@pytest.mark.parametrize("cut", ["truncated", "garbage", "empty", "another array"])
def test_damaged_scores_are_named(tmp_path, cut):
    finished(tmp_path)
    file = tmp_path / "scores.npz"
    if cut == "another array":
        with open(file, "wb") as stream:
            np.save(stream, np.zeros(3))
    else:
        file.write_bytes({"truncated": file.read_bytes()[:-40], "garbage": b"scores", "empty": b""}[cut])
    with pytest.raises(ValueError, match=r"scores.npz is damaged \(.*Delete it.*--overwrite"):
        RunFolder.open(tmp_path, {"seed": 0})
    RunFolder.open(tmp_path, {"seed": 0}, overwrite=True)


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(NotADirectoryError, match="file is a file; expected a folder"):
            RunFolder.open(path, {})
    with pytest.raises(IsADirectoryError, match="is a folder; expected the name of a file"):
        check_file(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="may not be written to"):
        RunFolder.open(tmp_path / "run", {})
