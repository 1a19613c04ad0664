"""The study of another task than boxes, of pairs from files: its parts are what the methods say."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pairs_task import desiderata, records, settings_of, write_task

import jaxmech as jm
from jaxmech import cli
from jaxmech.loading import describe
from jaxmech.report import write_report
from jaxmech.study import STAGES, Settings, StudyFolder, run
from jaxmech.study.pairs_data import PairsData

OF_DESIDERATA = ("dcm", "activation_patching")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, records(10))
    return folder


@pytest.fixture(scope="module")
def settings(task) -> Settings:
    return settings_of(task)


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory) -> StudyFolder:
    folder = StudyFolder.open(tmp_path_factory.mktemp("study") / "out", settings)
    run(settings, folder)
    return folder


@pytest.fixture(scope="module")
def results(done) -> dict:
    return json.loads((done.path / "results.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return jm.load(jm.demo.path("base")).tokenizer


@pytest.fixture(scope="module")
def data(settings, tokenizer) -> PairsData:
    return PairsData(settings, tokenizer)


CONFIG = describe(jm.demo.path("base"))[0]


def rows_in(part: jm.Pairs, whole: jm.Pairs) -> list[int]:
    every = [row.tobytes() for row in whole.clean]
    return [every.index(row.tobytes()) for row in part.clean]


def test_two_thirds_are_evaluated_and_the_others_averaged_over(settings, data, tokenizer):
    whole = jm.read_pairs(settings.pairs, tokenizer)
    evaluated, contexts = (rows_in(part, whole) for part in (data.pairs, data.contexts))
    assert (len(evaluated), len(contexts)) == (14, 6)
    assert sorted(evaluated + contexts) == list(range(20))
    assert evaluated == sorted(evaluated) != list(range(14)), "drawn, in the order of the file"
    assert data.contexts.position("last").max() == whole.position("last").max()
    fewer = PairsData(dataclasses.replace(settings, prompts=3, contexts=2), tokenizer)
    assert (len(fewer.pairs), len(fewer.contexts)) == (3, 2)
    assert set(rows_in(fewer.pairs, whole)) < set(evaluated) and set(rows_in(fewer.contexts, whole)) < set(contexts)
    assert fewer.contexts.position("last").max() == whole.position("last").max()
    other = PairsData(dataclasses.replace(settings, seed=3), tokenizer)
    assert rows_in(other.pairs, whole) != evaluated


def test_no_clean_prompt_is_both_evaluated_and_a_context_whatever_the_order(settings, data, tokenizer, tmp_path):
    """Of several pairs with one clean prompt, and other corrupt ones, say."""
    lines = [line | {"corrupt": corrupt} for line in records(10) for corrupt in (line["corrupt"], line["clean"])]
    lines = [line | {"corrupt_roles": line["roles"]} if line["corrupt"] == line["clean"] else line for line in lines]
    write_task(tmp_path, lines[::-1])
    twice = PairsData(dataclasses.replace(settings, pairs=tmp_path / "pairs.jsonl"), tokenizer)
    sides = [{row.tobytes() for row in part.clean} for part in (twice.pairs, twice.contexts)]
    assert not sides[0] & sides[1] and (len(twice.pairs), len(twice.contexts)) == (28, 6)
    assert sides[1] == {row.tobytes() for row in data.contexts.clean}


def test_every_stage_but_those_of_desiderata_says_what_the_methods_say(settings, data, done, results):
    assert results["left_out"] == list(OF_DESIDERATA)
    assert set(STAGES) - set(results) == set(OF_DESIDERATA)
    assert results["prompts"] == 14 and results["chance"] is None
    models = {name: jm.load(path) for name, path in settings.paths.items()}
    circuits = {name: jm.Circuit.load(done.path / "circuits" / f"{name}.json") for name in models}
    for name, model in models.items():
        answered = results["accuracy"][name]
        assert answered["accuracy"] == answered["value"] == jm.accuracy(model, data.pairs)
        found = jm.discover(model, data.pairs, chain=settings.chain, min_effect=0.01, metric="logit_difference")
        groups = results["discovery"][name]["groups"]
        assert {group: [tuple(head) for head in heads] for group, heads in groups.items()} == found.groups
        assert len(groups) == 4
        means = jm.role_means(model, data.contexts)
        left = jm.minimality(model, data.pairs, found, means).circuit
        assert circuits[name] == dataclasses.replace(left, scores={})
        whole = jm.faithfulness(model, data.pairs, circuits[name], means, random=2, seed=2)
        own = results["faithfulness"][name][name]
        assert own["circuit"]["accuracy"] > 0
        assert own["circuit"]["accuracy"] == whole.circuit.accuracy and own["random"] == whole.random.accuracy.tolist()
    patched = jm.cmap(models["base"], models["tuned"], data.pairs, circuits["tuned"])
    assert results["cmap"]["tuned"]["groups"]["z"]["whole circuit"]["accuracy"] == patched.accuracy


def test_attention_is_knocked_out_from_each_role_to_those_before_it(settings, data, results):
    edges = ["last -> asked", "last -> before", "asked -> before", "last -> random"]
    assert [f"{source} -> {target}" for source, target in data.edges] == edges
    tuned = jm.load(settings.paths["tuned"])
    found = results["knockout"]["tuned"]
    assert list(found) == edges
    assert found["asked -> before"] == jm.knockout(tuned, data.pairs, "asked", "before").accuracy.tolist()
    assert min(found["asked -> before"]) < results["accuracy"]["tuned"]["accuracy"]


def test_no_edge_leads_to_a_role_that_is_not_before_it_in_every_prompt(settings, data):
    for_once = {role: at.copy() for role, at in data.pairs.positions.items()}
    for_once["before"][3] = for_once["asked"][3]
    moved = PairsData(settings, data.tokenizer)
    vars(moved)["pairs"] = dataclasses.replace(data.pairs, positions=for_once)
    assert ("asked", "before") in data.edges and ("asked", "before") not in moved.edges


def test_it_goes_on_wherever_the_file_lies_and_not_with_another(settings, done, tmp_path):
    before = (done.path / "results.json").read_bytes()
    shutil.copy(settings.pairs, tmp_path / "moved.jsonl")
    moved = dataclasses.replace(settings, pairs=tmp_path / "moved.jsonl")
    ran = []
    run(moved, StudyFolder.open(done.path, moved), progress=lambda *call: ran.append(call))
    assert not ran and (done.path / "results.json").read_bytes() == before
    write_task(tmp_path, records(10)[::-1])
    with pytest.raises(ValueError, match=r"other settings \(examples differ\)"):
        StudyFolder.open(done.path, dataclasses.replace(settings, pairs=tmp_path / "pairs.jsonl"))


def test_stages_of_desiderata_cannot_be_asked_for(settings, done):
    for options in ({"only": ("dcm",)}, {"start": "activation_patching"}):
        with pytest.raises(ValueError, match="use desiderata, and none are given with .*pairs.jsonl"):
            run(settings, StudyFolder.open(done.path, settings), **options)


def test_the_command_makes_a_report_that_says_what_is_left_out(task, tmp_path, capsys):
    files = ["--pairs", str(task / "pairs.jsonl"), "--chain", str(task / "chain.toml")]
    models = ["--base", str(jm.demo.path("base")), "--tuned", str(jm.demo.path("tuned"))]
    cli.main(
        ["study", *models, *files, "--out", str(tmp_path / "quick"), "--quick", "--prompts", "4", "--only", "accuracy"]
    )
    assert "Accuracy on 4 prompts" in capsys.readouterr().out
    page = (tmp_path / "quick" / "report.html").read_text()
    assert page.count("Left out: no desiderata were given (--desideratum).") == 2
    assert "Naming any object" not in page


def test_the_report_lists_the_settings_of_such_a_study_alone(settings, with_desiderata):
    boxes = Settings(base=settings.base, tuned=settings.tuned)
    assert {"data", "scenes", "boxes", "train"} <= boxes.in_use().keys() and "pairs" not in boxes.in_use()
    assert {"pairs", "between", "contexts"} <= settings.in_use().keys()
    assert not {"scenes", "boxes", "train", "repeats"} & settings.in_use().keys()
    assert {"train", "repeats", "desiderata"} <= with_desiderata.in_use().keys()


def test_the_report_says_if_a_circuit_alone_does_nothing(results, tmp_path):
    words = "base: its circuit alone answers nothing right in base itself."
    broken = json.loads(json.dumps(results))
    broken["faithfulness"]["base"]["base"]["circuit"] = {"accuracy": 0.0, "value": 0.0, "low": 0.0, "high": 0.1}
    options = {"settings": {"between": " "}, "versions": {}, "timings": {}}
    pages = [write_report(tmp_path, found, **options).read_text() for found in (results, broken)]
    assert words not in pages[0] and words in pages[1] and "&#39; &#39;" in pages[0]


def test_the_report_gives_scores_in_units_of_their_metric(results, tmp_path):
    page = write_report(tmp_path, results, settings={}, versions={}, timings={}).read_text().replace("&#39;", "'")
    assert page.count("mean change of the right answer's logit minus the wrong one's") == 2
    score = results["discovery"]["tuned"]["heads"]["movers"][0]
    number = f"{score['score']:+.3f} [{score['low']:.3f}, {score['high']:.3f}]".replace("-", "\N{MINUS SIGN}")
    assert number in page and "score, %" not in page
    layer, head = score["head"]
    assert f"{layer}.{head}\N{NO-BREAK SPACE}({number.split()[0]})" in page


@pytest.fixture(scope="module")
def with_desiderata(settings, task) -> Settings:
    files = []
    for name, lines in desiderata(10).items():
        files.append(task / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines[: 20 if name == "asked" else 18]))
    sizes = {
        "train": 8,
        "validation": 4,
        "test": 4,
        "patched": 3,
        "repeats": 2,
        "dcm_batch": 4,
        "lam": 0.05,
        "epochs": 4,
    }
    return dataclasses.replace(settings, desiderata=tuple(files), **sizes)


def test_desiderata_are_split_alike_and_each_use_has_prompts_of_its_own(with_desiderata, tokenizer):
    data = PairsData(with_desiderata, tokenizer)
    data.check(CONFIG, {"contexts", "desiderata"})
    assert data.desiderata == ("asked", "scene") and data.variants == ()
    for name, path in zip(data.desiderata, with_desiderata.desiderata, strict=True):
        whole = jm.read_pairs(path, tokenizer)
        found = {use: rows_in(part, whole) for use, part in data.desideratum(name).items()}
        assert {use: len(rows) for use, rows in found.items()} == {"train": 8, "validation": 4, "test": 4}
        assert len({row for rows in found.values() for row in rows}) == 16
        repeats = [rows_in(data.patching(name, repeat), whole) for repeat in range(3)]
        assert all(len(rows) == 3 and set(rows) < set(found["test"]) for rows in repeats)
        assert repeats[0] != repeats[1] or repeats[1] != repeats[2]
    few = PairsData(dataclasses.replace(with_desiderata, train=1000, validation=500, test=500), tokenizer)
    assert {use: len(part) for use, part in few.desideratum("asked").items()} == {
        "train": 10,
        "validation": 4,
        "test": 4,
    }
    odd = PairsData(dataclasses.replace(with_desiderata, train=1, validation=1, test=1000), tokenizer)
    assert {use: len(part) for use, part in odd.desideratum("scene").items()} == {
        "train": 1,
        "validation": 1,
        "test": 16,
    }


def test_dcm_and_activation_patching_on_desiderata_of_files(with_desiderata, tokenizer, tmp_path):
    folder = StudyFolder.open(tmp_path / "out", with_desiderata)
    stages = ("discovery", "minimality", *OF_DESIDERATA)
    results = run(with_desiderata, folder, only=stages)
    assert results["left_out"] == []
    data, tuned = PairsData(with_desiderata, tokenizer), jm.load(with_desiderata.paths["tuned"])
    circuit = jm.Circuit.load(tmp_path / "out" / "circuits" / "tuned.json")
    found = results["dcm"]["tuned"]
    assert set(found) == {group for group, heads in circuit.groups.items() if heads} and len(found) > 1
    for group in list(found)[:2]:
        assert list(found[group]) == ["asked", "scene"]
        for name, entry in found[group].items():
            role, parts = circuit.roles[group], data.desideratum(name)
            trained = jm.dcm.train(tuned, parts["train"], circuit.groups[group], role, lam=0.05, batch_size=4, epochs=4)
            chosen = jm.dcm.select(tuned, trained, parts["validation"], role)
            np.testing.assert_allclose(entry["mask"], chosen.mask, atol=1e-4)
            accuracy = jm.dcm.accuracy(tuned, parts["test"], chosen.heads, np.round(chosen.mask)[None], role)
            assert entry["test"] == accuracy[0]
            patched = results["activation_patching"]["tuned"][group][name]["tuned"]
            if chosen.selected:
                sets = [data.patching(name, repeat) for repeat in range(2)]
                assert patched["values"] == [
                    jm.patch_activations(tuned, x, {role: chosen.selected}).accuracy for x in sets
                ]
    best = {group: max(entry["test"] for entry in entries.values()) for group, entries in found.items()}
    assert max(best.values()) > 0.5, "masks that do nothing would all be alike"
    page = write_report(tmp_path, results, settings={}, versions={}, timings={}).read_text()
    assert "Left out" not in page and "these carry that information. Compare it with" in page
