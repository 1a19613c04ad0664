"""The study: its parts are what the methods say, and a run that is cut off ends with the same bytes."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_study import SETTINGS

import jaxmech as jm
from jaxmech import dcm
from jaxmech.chain import with_k
from jaxmech.discovery import moved_heads
from jaxmech.report.tables import circuit_table
from jaxmech.scores import PathScores
from jaxmech.sharding import row_devices
from jaxmech.study import EDGES, STAGES, StudyFolder, run
from jaxmech.study.study import Study

running = import_module("jaxmech.study.running")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> StudyFolder:
    folder = StudyFolder.open(tmp_path_factory.mktemp("study"), SETTINGS)
    run(SETTINGS, folder)
    return folder


@pytest.fixture(scope="module")
def results(done) -> dict:
    return json.loads((done.path / "results.json").read_text())


@pytest.fixture(scope="module")
def models() -> dict[str, jm.Model]:
    return {name: jm.load(jm.demo.path(name)) for name in ("base", "tuned")}


@pytest.fixture(scope="module")
def pairs(models) -> jm.Pairs:
    return jm.boxes.pairs(jm.boxes.make(8, seed=2), models["base"].tokenizer, seed=2)


def test_copies_of_each_model_lie_on_all_devices():
    study = Study(dataclasses.replace(SETTINGS, copies=4), {})
    for name in study.settings.names:
        weights = study.model(name).weights
        assert row_devices(weights) == 4 and len(weights["blocks"]["q"].devices()) == 8


def test_one_model_at_a_time_is_enough(done, results, tmp_path, monkeypatch):
    shutil.copytree(done.path, tmp_path, dirs_exist_ok=True)
    held = []  # weak references to the models that were loaded

    def watched(*arguments, **options):
        assert [model for model in held if model() is not None] == []
        model = jm.load(*arguments, **options)
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(import_module("jaxmech.study.study"), "load", watched)
    settings = dataclasses.replace(SETTINGS, models_in_memory=1)
    shutil.rmtree(tmp_path / "parts")
    shutil.copytree(done.path / "parts", tmp_path / "parts", ignore=shutil.ignore_patterns("cmap.*", "faithfulness.*"))
    found = run(settings, StudyFolder.open(tmp_path, settings))
    assert len(held) > 2
    assert found["cmap"] == results["cmap"] and found["faithfulness"] == results["faithfulness"]


def test_models_are_loaded_as_rarely_as_there_is_room_for_them(copied, tmp_path, monkeypatch):
    """Each stage begins with those that the one before left loaded; a finished study loads none."""
    loaded = []
    monkeypatch.setattr(
        import_module("jaxmech.study.study"),
        "load",
        lambda path, *rest, **options: loaded.append(path.name) or jm.load(path, *rest, **options),
    )
    other = shutil.copytree(jm.demo.path("tuned"), tmp_path / "other")
    settings = dataclasses.replace(SETTINGS, tuned=(jm.demo.path("tuned"), other), models_in_memory=2)
    stages = ("accuracy", "discovery", "minimality")
    found = run(settings, StudyFolder.open(tmp_path / "out", settings), only=stages)
    assert list(found["accuracy"]) == ["base", "tuned", "other"]
    assert loaded == ["base", "tuned", "other", "base", "tuned"]
    loaded.clear()
    run(SETTINGS, StudyFolder.open(copied, SETTINGS))
    assert loaded == []


def test_results_are_those_of_the_methods(results, models, pairs):
    assert (results["models"], results["prompts"]) == (["base", "tuned"], 56)
    for name, model in models.items():
        found = results["accuracy"][name]
        assert found["accuracy"] == pytest.approx(jm.accuracy(model, pairs))
        assert found["low"] < found["accuracy"] <= found["high"]
        circuit = jm.discover(model, pairs, SETTINGS.k, SETTINGS.chain, SETTINGS.min_effect)
        discovered = results["discovery"][name]
        assert discovered["groups"] == {g: [list(head) for head in heads] for g, heads in circuit.groups.items()}
        np.testing.assert_allclose(
            discovered["means"]["object_lookup"], circuit.scores["object_lookup"].mean, atol=1e-6
        )
        strongest = discovered["heads"]["object_lookup"][0]
        assert strongest["low"] < strongest["score"] < strongest["high"] < 0
    for target, at in (("query_box", "query_box"), ("random", jm.random_target(pairs, "last", seed=2))):
        found = jm.knockout(models["tuned"], pairs, "last", at).accuracy.tolist()
        assert results["knockout"]["tuned"][f"last -> {target}"] == found
    single, sweep = (
        results["cmap"]["tuned"]["heads"],
        jm.cmap_heads(models["base"], models["tuned"], pairs[:24], "last"),
    )
    np.testing.assert_allclose(single["last"]["accuracy"], sweep.accuracy)
    assert (single["last"]["unpatched"], single["last"]["prompts"]) == (sweep.clean_accuracy, 24)
    group = results["minimality"]["tuned"]["circuit"]["value_fetcher"]
    heads = {"last": [tuple(head) for head in group]}
    found = jm.cmap(models["base"], models["tuned"], pairs, heads, ("q", "k", "v")).accuracy
    assert results["cmap"]["tuned"]["groups"]["q+k+v"]["value_fetcher"]["accuracy"] == pytest.approx(found)


def test_stages_leave_logits_on_the_device(monkeypatch):
    settings = dataclasses.replace(SETTINGS, compat="paper", scenes=2, contexts=8, patched=4, components=("z",))
    stages, dcm_stages = (import_module(f"jaxmech.study.{name}") for name in ("stages", "dcm_stages"))
    logits = []

    def watched(method):
        def call(*arguments, **options):
            found = method(*arguments, **options)
            logits.append(found.logits)
            return found

        return call

    for module, name in ((stages, "predict"), (stages, "cmap"), (dcm_stages, "patch_activations")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    sweep = jm.HeadSweep(np.ones((1, 1)), jm.PathScores(np.ones((1, 1, 1)), np.ones(1)), 1.0)
    monkeypatch.setattr(stages, "cmap_heads", lambda *arguments, **options: sweep)
    study, heads = Study(settings, {}), [(0, 1), (1, 2)]
    monkeypatch.setattr(study, "circuit", lambda name: jm.Circuit({"value_fetcher": heads}, {"value_fetcher": "last"}))
    for stage in ("accuracy", "cmap"):
        STAGES[stage].run(study, "tuned", lambda done, total: None)
    chosen = {("positional", "last"): {("tuned", "value_fetcher"): heads}}
    pairs = [{"positional": study.data.patching("positional", 0)}]
    dcm_stages._patched_accuracies(settings, study.model("base"), pairs, chosen, lambda done, total: None)
    assert len(logits) == 4, "predict, cmap of a group and of the circuit, and patch_activations"
    assert all(x is None for x in logits)


def test_circuits_are_those_that_minimality_leaves_and_are_saved(results, done):
    for name in ("base", "tuned"):
        found = results["minimality"][name]
        for group, rows in found["groups"].items():
            assert [row["head"] for row in rows if row["kept"]] == found["circuit"][group]
            assert all((row["score"] is None or row["score"] >= 0.02) == row["kept"] for row in rows)
        circuit = jm.Circuit.load(done.path / "circuits" / f"{name}.json")
        assert circuit == jm.Circuit(found["circuit"], results["discovery"][name]["roles"])


def test_faithfulness_and_patching_name_the_circuits_first_and_then_the_models(results):
    ratio = results["faithfulness"]["base"]["tuned"]
    assert ratio["ratio"]["value"] == pytest.approx(ratio["circuit"]["accuracy"] / ratio["model"]["accuracy"])
    assert ratio["model"] == results["faithfulness"]["tuned"]["tuned"]["model"] and len(ratio["random"]) == 2
    for circuit_of, groups in results["activation_patching"].items():
        for group, desiderata in groups.items():
            for name, by_model in desiderata.items():
                chosen = results["dcm"][circuit_of][group][name]["selected"]
                assert set(by_model) == {"base", "tuned"}
                for found in by_model.values():
                    assert len(found["values"]) == (2 if chosen else 0)
                    assert (found["mean"] is None) == (not chosen)
                    if chosen:
                        assert (found["mean"], found["std"]) == (np.mean(found["values"]), np.std(found["values"]))


def test_criteria_are_those_of_each_circuit_in_each_model_with_the_models_own_means(results, models, pairs):
    data, circuits = running.Study(SETTINGS, {}).data, {}
    for name, model in models.items():
        means = jm.mean_activations(model, data.contexts)
        rows, roles = results["minimality"][name], results["discovery"][name]["roles"]
        groups = {group: [tuple(head) for head in heads] for group, heads in rows["circuit"].items()}
        circuits[name] = jm.Circuit(groups, roles)
        first = rows["groups"]["object_lookup"][0]
        found = {group: [tuple(row["head"]) for row in some] for group, some in rows["groups"].items()}
        gone = [tuple(head) for head in first["partners"]]
        without = jm.Circuit(found, roles).without({"object_lookup": gone})
        assert first["before"] == pytest.approx(jm.evaluate(model, pairs, [without], means).accuracy[0])
    for circuit_of, circuit in circuits.items():
        found = results["faithfulness"][circuit_of]["tuned"]
        expected = jm.faithfulness(models["tuned"], pairs, circuit, means, random=2, seed=2)
        assert found["circuit"]["accuracy"] == pytest.approx(expected.circuit.accuracy)
        assert found["random"] == pytest.approx(expected.random.accuracy)
    complete = jm.completeness(models["tuned"], pairs, circuits["tuned"], means, random=3, seed=2)
    rows = results["completeness"]["tuned"]
    assert [row["name"] for row in rows] == complete.names
    assert [row["circuit"] for row in rows] == pytest.approx(complete.circuit.accuracy)
    assert [row["model"] for row in rows] == pytest.approx(complete.model.accuracy)
    overlap = jm.overlap(circuits["base"], circuits["tuned"])
    found = {group: (x["precision"], x["recall"]) for group, x in results["overlap"]["tuned"].items()}
    assert found == overlap and any(precision != recall for precision, recall in found.values())


def selections(results):
    """(model, group, desideratum, selected heads) of every DCM run that selected any."""
    for model, groups in results["dcm"].items():
        for group, desiderata in groups.items():
            for name, found in desiderata.items():
                if found["selected"]:
                    yield model, group, name, [tuple(head) for head in found["selected"]]


def test_activation_patching_is_that_of_full_forwards(results, models):
    """The study patches many sets of heads at once on the cone; one by one, by full forward passes, is the same."""
    study, found = running.Study(SETTINGS, {}), list(selections(results))
    assert found
    for circuit_of, group, name, heads in found[:3]:
        role = results["discovery"][circuit_of]["roles"][group]
        for repeat, accuracy in enumerate(results["activation_patching"][circuit_of][group][name]["base"]["values"]):
            expected = jm.patch_activations(models["base"], study.data.patching(name, repeat), {role: heads}).accuracy
            assert accuracy == pytest.approx(expected)


def test_dcm_selects_by_validation_and_tests_on_other_prompts(results, models):
    circuit_of, group, name, _ = next(selections(results))
    found, role = results["dcm"][circuit_of][group][name], results["discovery"][circuit_of]["roles"][group]
    pairs = running.Study(SETTINGS, {}).data.desideratum(name)
    assert {use: len(part) for use, part in pairs.items()} == {"train": 48, "validation": 8, "test": 8}
    assert len(found["loss"]) == len(found["masks"]) == 18
    heads, mask = [tuple(head) for head in found["heads"]], np.round(found["mask"])[None]
    for use in ("validation", "test"):
        assert found[use] == pytest.approx(dcm.accuracy(models[circuit_of], pairs[use], heads, mask, role)[0])


def test_a_study_that_is_interrupted_after_every_part_ends_with_the_same_bytes(done, tmp_path):
    seen = []

    def interrupt(stage, part, finished, total):
        if (stage, part) not in seen and finished == 0:
            seen.append((stage, part))
            if len(seen) > 1:
                raise KeyboardInterrupt

    while True:
        try:
            run(SETTINGS, StudyFolder.open(tmp_path, SETTINGS), progress=interrupt)
            break
        except KeyboardInterrupt:
            pass
    parts = [(name, part) for name, stage in STAGES.items() for part in stage.parts(SETTINGS)]
    assert [stage for stage, _ in seen] == [stage for stage, _ in parts]
    assert sorted(seen) == sorted(parts), "each once; the model that is loaded comes first"
    assert (tmp_path / "results.json").read_bytes() == (done.path / "results.json").read_bytes()


@pytest.mark.parametrize("stage", ["discovery", "dcm"])
def test_a_study_that_is_killed_ends_with_the_same_bytes(done, tmp_path, stage):
    """SIGKILL as soon as a stage's first part is there; what is done already is copied, to save time."""
    copied_up_to(done, tmp_path, stage)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_study import *; "
        "run(SETTINGS, StudyFolder.open(sys.argv[2], SETTINGS))"
    )
    here = Path(__file__).parent
    process = subprocess.Popen([sys.executable, "-c", script, str(here), str(tmp_path)], cwd=here.parent)
    file = tmp_path / "parts" / f"{stage}.base.json"
    deadline = time.monotonic() + 300
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and file.exists()
    assert not (tmp_path / "results.json").exists()
    run(SETTINGS, StudyFolder.open(tmp_path, SETTINGS))
    assert (tmp_path / "results.json").read_bytes() == (done.path / "results.json").read_bytes()


def copied_up_to(done: StudyFolder, path: Path, stage: str) -> StudyFolder:
    """A study of which everything before a stage is done."""
    folder = StudyFolder.open(path, SETTINGS)
    for name in list(STAGES)[: list(STAGES).index(stage)]:
        for part, result in done.parts.get(name, {}).items():
            folder.keep(name, part, result, 0.0)
    return folder


def test_a_discovery_that_is_interrupted_goes_on_with_its_next_sweep(done, tmp_path, monkeypatch):
    discovery, seen = import_module("jaxmech.discovery"), []
    whole, stage, sweeps = discovery.path_patch, "discovery", 3

    def interrupted(*arguments, **options):
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(discovery, "path_patch", interrupted)
    folder = copied_up_to(done, tmp_path, stage)
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, folder, only=(stage,))
    assert stage not in folder.parts and len(contents(tmp_path / "unfinished")) == 1
    found = run(SETTINGS, StudyFolder.open(tmp_path, SETTINGS), only=(stage,))
    assert len(seen) == 2 + (sweeps - 1) + sweeps, "the first sweep is not computed again"
    for part in SETTINGS.names:
        file = f"parts/{stage}.{part}.json"
        assert (tmp_path / file).read_bytes() == (done.path / file).read_bytes()
    assert set(found) >= {stage} and not (tmp_path / "unfinished").exists()


def test_a_study_that_is_killed_in_its_second_sweep_goes_on_with_it(done, tmp_path, monkeypatch):
    copied_up_to(done, tmp_path, "discovery")
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from test_study import *; "
        "run(SETTINGS, StudyFolder.open(sys.argv[2], SETTINGS), "
        "progress=lambda stage, part, done, total: done > 100 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    here = Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", script, str(here), str(tmp_path)], cwd=here.parent, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert set(contents(tmp_path / "unfinished")) == {"discovery.base.npz"}
    discovery, swept = import_module("jaxmech.discovery"), []
    whole = discovery.path_patch
    monkeypatch.setattr(discovery, "path_patch", lambda *a, **o: swept.append(a[2]) or whole(*a, **o))
    run(SETTINGS, StudyFolder.open(tmp_path, SETTINGS), only=("discovery",))
    roles = [stage.sender for stage in SETTINGS.chain]
    assert swept == roles[1:] + roles, "the first sweep of the base is not run again"
    for part in SETTINGS.names:
        file = f"parts/discovery.{part}.json"
        assert (tmp_path / file).read_bytes() == (done.path / file).read_bytes()


def test_unfinished_pieces_are_removed_with_what_they_are_of_and_named_when_damaged(done, tmp_path):
    for suffix, stage in (("npz", "discovery"), ("json", "dcm")):
        folder = copied_up_to(done, tmp_path / stage, stage)
        file = folder.path / "unfinished" / f"{stage}.base.{suffix}"
        file.parent.mkdir()
        file.write_text("{")
        with pytest.raises(ValueError, match=rf"{file.name} is damaged.*Delete it.*--overwrite"):
            run(SETTINGS, folder, only=(stage,))
        folder.forget(stage, SETTINGS.names)
        assert not file.parent.exists()
        file.parent.mkdir()
        file.write_text("{")
        other = dataclasses.replace(SETTINGS, seed=1)
        StudyFolder.open(folder.path, other, overwrite=True).keep("knockout", "base", 1.0, 0.0)
        assert not file.exists()


def test_a_study_that_overwrites_another_takes_up_none_of_its_pieces(done, tmp_path):
    """Nor removes what is there before it has a result."""
    folder = copied_up_to(done, tmp_path / "study", "discovery")
    group = SETTINGS.chain[0].group
    scores = PathScores(np.ones((4, 8, 5), np.float32), np.ones(5, np.float32))
    folder.unfinished.keep_sweeps("discovery", "base", {group: scores})
    folder.unfinished.piece("dcm", "base", "last", lambda: "theirs")
    assert folder.unfinished.sweeps("discovery", "base") and len(contents(folder.path / "unfinished")) == 2
    before, other = contents(folder.path), dataclasses.replace(SETTINGS, seed=1)
    anew = StudyFolder.open(folder.path, other, overwrite=True)
    for stage in ("accuracy", "discovery", "dcm"):
        anew.forget(stage, SETTINGS.names)
    assert contents(folder.path) == before
    assert anew.unfinished.sweeps("discovery", "base") == {}
    assert anew.unfinished.piece("dcm", "base", "last", lambda: "ours") == "ours"
    assert set(contents(folder.path / "unfinished")) == {"dcm.base.json"}


def test_stages_can_be_run_alone_and_anew(done, tmp_path):
    folder = StudyFolder.open(tmp_path, SETTINGS)
    assert set(run(SETTINGS, folder, only=("accuracy", "knockout"))) >= {"accuracy", "knockout"}
    assert set(folder.parts) == {"accuracy", "knockout"}
    with pytest.raises(ValueError, match="Stage 'cmap' needs minimality, which is not done"):
        run(SETTINGS, folder, only=("cmap",))
    with pytest.raises(ValueError, match="Unknown stages circuits; the stages are accuracy,"):
        run(SETTINGS, folder, only=("circuits",))
    ran = []
    run(SETTINGS, StudyFolder.open(done.path, SETTINGS), start="cmap", progress=lambda *call: ran.append(call[0]))
    assert dict.fromkeys(ran) == {"cmap": None, "knockout": None}


def test_another_study_in_the_folder_is_refused(done):
    other = dataclasses.replace(SETTINGS, seed=SETTINGS.seed + 1)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed differ\)"):
        StudyFolder.open(done.path, other)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_is_removed_if_the_model_cannot_be_read(copied, monkeypatch):
    before = contents(copied)

    def damaged(*_, **__):
        raise ValueError("damaged")

    monkeypatch.setattr(import_module("jaxmech.study.study"), "load", damaged)
    with pytest.raises(ValueError, match="damaged"):
        run(SETTINGS, StudyFolder.open(copied, SETTINGS), start="accuracy")
    assert contents(copied) == before


@pytest.fixture
def copied(done, tmp_path) -> Path:
    """A copy of the finished study."""
    return Path(shutil.copytree(done.path, tmp_path / "copy"))


def test_stages_that_are_not_run_anew_are_kept(copied):
    before, ran = contents(copied), []
    folder = StudyFolder.open(copied, SETTINGS)
    run(SETTINGS, folder, only=("knockout",), start="accuracy", progress=lambda stage, *_: ran.append(stage))
    after = contents(copied)
    assert set(ran) == {"knockout"} and set(after) == set(before)
    assert all(after[name] == before[name] for name in before if name != "timings.json")
    with pytest.raises(ValueError, match="Unknown stages nope"):
        run(SETTINGS, StudyFolder.open(copied, SETTINGS), only=("knockout",), start="nope")
    assert contents(copied) == after


def test_overwrite_removes_nothing_before_the_first_result_and_then_all_that_a_study_wrote(copied):
    (copied / "mine.txt").write_text("mine")
    (copied / "circuits" / "mine.json").write_text("{}")
    (copied / "report.html").write_text("old")
    before, other = contents(copied), dataclasses.replace(SETTINGS, seed=1)
    for arguments in ({"only": ("nope",)}, {"only": ("cmap",)}):
        folder = StudyFolder.open(copied, other, report=[copied / "report.html"], overwrite=True)
        assert not folder.parts
        with pytest.raises(ValueError, match="Unknown stages nope|needs minimality"):
            run(other, folder, **arguments)
        assert contents(copied) == before
    run(other, folder, only=("accuracy",))
    assert set(contents(copied)) == {
        *("mine.txt", "circuits/mine.json", "config.json", "timings.json", "results.json"),
        *("parts/accuracy.base.json", "parts/accuracy.tuned.json"),
    }
    assert set(StudyFolder.open(copied, other).parts) == {"accuracy"}


def test_a_damaged_part_is_named(copied):
    (copied / "parts/accuracy.base.json").write_text('{"accuracy": 0.')
    with pytest.raises(ValueError, match=r"parts/accuracy.base.json is damaged: .*Delete it, .*--overwrite"):
        StudyFolder.open(copied, SETTINGS)
    (copied / "parts/accuracy.base.json").unlink()
    assert set(StudyFolder.open(copied, SETTINGS).parts["accuracy"]) == {"tuned"}
    (copied / "timings.json").write_text("")
    with pytest.raises(ValueError, match="timings.json is damaged: .*Delete it"):
        _ = StudyFolder.open(copied, SETTINGS).timings


def test_the_published_deviations_run_through(tmp_path):
    fewer = {"random_circuits": 1, "random_subsets": 1, "repeats": 1, "edges": EDGES[:1], "epochs": 1}
    settings = dataclasses.replace(SETTINGS, compat="paper", **fewer)
    results = run(settings, StudyFolder.open(tmp_path, settings))
    assert set(results) >= set(STAGES)
    accuracies = [row["before"] for rows in results["minimality"]["base"]["groups"].values() for row in rows]
    np.testing.assert_allclose(accuracies, np.round(accuracies, 2), atol=1e-12)


def test_heads_that_a_later_stage_took_are_named_with_their_group(models, pairs):
    chain = jm.read_chain(jm.demo.path("chain.toml"))
    again = (*chain[:2], jm.Stage("again", "last", k=1), jm.Stage("and_again", "last", k=2))
    circuit = jm.discover(models["base"], pairs, chain=again, k={"value_fetcher": 3})
    top = circuit.scores["value_fetcher"].top(3)
    moved = moved_heads(circuit, with_k(again, {"value_fetcher": 3}), 1e-3)
    assert moved == {
        "value_fetcher": [{"head": list(head), "to": "and_again"} for head in top[:2]],
        "again": [{"head": list(top[0]), "to": "and_again"}],
    }
    console = Console(width=200, file=io.StringIO())
    console.print(circuit_table(again, circuit, moved))
    mean = circuit.scores["value_fetcher"].mean
    names = [f"{layer}.{head} ({100 * mean[layer, head]:+.1f})" for layer, head in top]
    shown = console.file.getvalue()
    assert f"{names[2]} " in shown and f"now in and_again: {names[0]}  {names[1]} " in shown


def test_accuracies_without_a_patch_are_the_models_own(results, models):
    name, data = "positional", running.Study(SETTINGS, {}).data
    own = jm.accuracy(models["base"], data.desideratum(name)["test"])
    for runs in results["dcm"]["base"].values():
        assert runs[name]["unpatched"] == pytest.approx(own)
