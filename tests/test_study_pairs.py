"""The study of another task than boxes, of pairs from a file: the methods' own numbers, without DCM."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from pairs_task import records, write_task
from tokenizers import Tokenizer

import jaxmech as jm
from jaxmech import cli
from jaxmech.report import write_report
from jaxmech.study import STAGES, Settings, StudyFolder, run
from jaxmech.study.pairs_data import PairsData

DESIDERATA = ("dcm", "activation_patching")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, records(10))
    return folder


@pytest.fixture(scope="module")
def settings(task) -> Settings:
    return Settings(
        base=jm.demo.path("base"),
        tuned=(jm.demo.path("tuned"),),
        pairs=task / "pairs.jsonl",
        chain=jm.read_chain(task / "chain.toml"),
        min_effect=0.01,
        metric="logit_difference",
        random_circuits=2,
        random_subsets=2,
        components=("z",),
        single_head_prompts=5,
        seed=2,
    )


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


def test_every_stage_but_those_of_desiderata_says_what_the_methods_say(settings, data, done, results):
    assert results["left_out"] == list(DESIDERATA)
    assert set(STAGES) - set(results) == set(DESIDERATA)
    assert results["prompts"] == 14 and results["chance"] is None
    models = {name: jm.load(path) for name, path in settings.paths.items()}
    circuits = {name: jm.Circuit.load(done.path / "circuits" / f"{name}.json") for name in models}
    for name, model in models.items():
        assert results["accuracy"][name]["accuracy"] == jm.accuracy(model, data.pairs)
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
        with pytest.raises(ValueError, match="use the desiderata of boxes prompts; .*pairs.jsonl has none"):
            run(settings, StudyFolder.open(done.path, settings), **options)


def test_the_command_makes_a_report_that_says_what_is_left_out(task, tmp_path, capsys):
    files = ["--pairs", str(task / "pairs.jsonl"), "--chain", str(task / "chain.toml")]
    models = ["--base", str(jm.demo.path("base")), "--tuned", str(jm.demo.path("tuned"))]
    cli.main(
        ["study", *models, *files, "--out", str(tmp_path / "quick"), "--quick", "--prompts", "4", "--only", "accuracy"]
    )
    assert "Accuracy on 4 prompts" in capsys.readouterr().out
    page = (tmp_path / "quick" / "report.html").read_text()
    assert page.count("Left out: it needs the counterfactual prompts of the boxes task.") == 2
    assert "Naming any object" not in page


def test_the_report_gives_scores_in_units_of_their_metric(results, tmp_path):
    page = write_report(tmp_path, results, settings={}, versions={}, timings={}).read_text().replace("&#39;", "'")
    assert page.count("mean change of the right answer's logit minus the wrong one's") == 2
    score = results["discovery"]["tuned"]["heads"]["movers"][0]
    number = f"{score['score']:+.3f} [{score['low']:.3f}, {score['high']:.3f}]".replace("-", "\N{MINUS SIGN}")
    assert number in page and "score, %" not in page
    layer, head = score["head"]
    assert f"{layer}.{head}\N{NO-BREAK SPACE}({number.split()[0]})" in page


def with_other_numbers(folder: Path) -> Path:
    """The tuned model with a tokenizer that has another number for a word of the prompts."""
    shutil.copytree(jm.demo.path("tuned"), folder)
    tokenizer = jm.load(jm.demo.path("tuned")).tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words["contains"], words["the"] = words["the"], words["contains"]
    Tokenizer.from_str(json.dumps(state)).save(str(folder / "tokenizer.json"))
    return folder


BAD = {
    "data, too": ({"data": Path("data.jsonl")}, records(2), "go without data and compat"),
    "compat": ({"compat": "paper"}, records(2), "go without data and compat"),
    "no prompts": ({"prompts": 0}, records(2), "prompts=0; expected at least 1"),
    "no wrong answers": ({}, [line | {"wrong_answer": None} for line in records(2)], 'has no "wrong_answer"'),
    "a metric": ({"metric": "accuracy"}, records(2), "metric='accuracy'; expected probability, log_probability or, of"),
    "the logit difference of boxes prompts": ({"pairs": None}, records(2), "metric='logit_difference'; expected"),
    "no corrupt prompts": ({}, [{"clean": "The fig is", "answer": "in"}] * 4, 'has no "corrupt" prompts'),
    "two pairs": ({}, records(1), "has 2 pairs; a study needs at least 3"),
    "no file": ({"pairs": Path("none.jsonl")}, records(2), "There is no file none.jsonl"),
    "a role of the chain": (
        {},
        [line | {"roles": {}, "corrupt_roles": {}} for line in records(2)],
        "sender 'asked'; these prompts have the roles last",
    ),
    "the default chain": ({"chain": jm.PAPER_CHAIN}, records(2), "of the default chain has the sender 'query_box'"),
    "edges": ({"edges": (("last", "object"),)}, records(2), r"edges has \('last', 'object'\); expected roles of these"),
    "an answer": ({}, [*records(2), records(1)[0] | {"answer": "fig jar"}], "'fig jar' is 2 tokens behind"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_study_that_cannot_end_does_not_begin(settings, tmp_path, name):
    change, lines, message = BAD[name]
    write_task(tmp_path, lines)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        changed = dataclasses.replace(settings, **({"pairs": tmp_path / "pairs.jsonl"} | change))
        run(changed, StudyFolder.open(tmp_path / "out", changed))
    assert not (tmp_path / "out").exists()


def test_tokenizers_must_read_these_prompts_alike(settings, tmp_path):
    other = dataclasses.replace(settings, tuned=(with_other_numbers(tmp_path / "other"),))
    with pytest.raises(ValueError, match="tokenizer of .*other reads .* models of a study must share one tokenizer"):
        StudyFolder.open(tmp_path / "out", other)
