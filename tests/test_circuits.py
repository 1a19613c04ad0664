"""Circuits: what they hold, and how they are written and read."""

import dataclasses
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_chain import CHAIN

import jaxmech as jm
from jaxmech.run_folder import RunFolder


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([3], "group 'a' holds 3; expected a list of \\(layer, head\\)"),
        ((3, 6), "group 'a' holds 3; expected"),
        (3, "group 'a' holds 3; expected"),
        ("36", "group 'a' holds '36'; expected"),
        (["36"], "group 'a' holds '36'; expected"),
        ([(3, 6, 1)], r"holds \(3, 6, 1\); expected"),
        ([(3, -1)], r"holds \(3, -1\); expected .* from 0 on"),
        ([(3.0, 1.0)], r"holds \(3.0, 1.0\); expected .* whole numbers"),
        ([(True, False)], r"holds \(True, False\); expected .* whole numbers"),
        ([(3, 1), (2, 0), [3, 1]], r"group 'a' holds \[\(3, 1\)\] more than once"),
    ],
)
def test_what_is_no_head_or_is_there_twice_is_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        jm.Circuit({"a": heads}, {"a": "last"})


@pytest.mark.parametrize("heads", [[[3, 1], [2, 0]], np.array([[3, 1], [2, 0]]), ((np.int64(3), np.uint8(1)), (2, 0))])
def test_heads_are_tuples_of_numbers_whatever_they_were(heads, tmp_path):
    circuit = jm.Circuit({"a": heads, "b": iter([(0, 0)])}, {"a": "last", "b": "last"})
    assert circuit.groups == {"a": [(3, 1), (2, 0)], "b": [(0, 0)]}
    assert all(type(x) is int for head in circuit.groups["a"] for x in head)
    assert circuit.heads_by_role == {"last": [(3, 1), (2, 0), (0, 0)]}
    assert circuit.without({"a": [[3, 1]]}).groups["a"] == [(2, 0)]
    circuit.save(tmp_path / "circuit.json")
    assert jm.Circuit.load(tmp_path / "circuit.json") == circuit


def test_a_circuit_is_shown_in_one_line():
    circuit = jm.Circuit({"movers": [(3, 1), (2, 0)], "readers": []}, {"movers": "last", "readers": "early"})
    assert repr(circuit) == "Circuit(movers: 2 at last, readers: 0 at early)"
    assert repr(replace(circuit, stopped="Stage 'x' found no head.")).endswith("early; stopped early)")


def test_a_head_in_two_groups_of_one_role_acts_there_once():
    groups = {"a": [(0, 1), (2, 3)], "b": [(2, 3), (1, 1)], "c": [(2, 3)]}
    circuit = jm.Circuit(groups, {"a": "last", "b": "last", "c": "early"})
    assert circuit.heads_by_role == {"last": [(0, 1), (2, 3), (1, 1)], "early": [(2, 3)]}
    assert circuit.without({"a": [[2, 3]], "c": [[2, 3]]}).groups == {"a": [(0, 1)], "b": [(2, 3), (1, 1)], "c": []}
    lists = jm.Circuit({"a": [[0, 1], [2, 3]]}, {"a": "last"})
    assert lists.without({"a": [[2, 3]]}).groups == {"a": [(0, 1)]}, "as JSON has heads"


def test_a_circuit_is_saved_as_in_the_paper_and_read_back(tmp_path):
    circuit = jm.Circuit({"value_fetcher": [(3, 1), (2, 0)]}, {"value_fetcher": "last"})
    circuit.save(tmp_path / "new" / "circuit.json")
    assert json.loads((tmp_path / "new" / "circuit.json").read_text()) == {"value_fetcher": [[3, 1], [2, 0]]}
    loaded = jm.Circuit.load(tmp_path / "new" / "circuit.json")
    assert (loaded.groups, loaded.roles) == (circuit.groups, circuit.roles)


def test_a_circuit_file_can_say_where_its_groups_act(tmp_path):
    circuit = jm.Circuit({"movers": [(3, 1), (2, 0)], "none": []}, {"movers": "last", "none": "early"})
    circuit.save(tmp_path / "with_roles.json", roles=True)
    found = json.loads((tmp_path / "with_roles.json").read_text())
    assert found == {"groups": {"movers": [[3, 1], [2, 0]], "none": []}, "roles": {"movers": "last", "none": "early"}}
    circuit.save(tmp_path / "paper.json", roles=False)
    chain = [jm.Stage("movers", "last"), jm.Stage("none", "early", "movers", "q"), jm.Stage("more", "last")]
    for file, options in (
        ("with_roles.json", {}),
        ("with_roles.json", {"chain": chain}),
        ("with_roles.json", {"roles": circuit.roles}),
        ("paper.json", {"chain": chain}),
        ("paper.json", {"roles": circuit.roles | {"more": "last"}}),
    ):
        assert jm.Circuit.load(tmp_path / file, **options) == circuit
    with pytest.raises(ValueError, match=r"says that groups act at .*; the roles given differ: {'none': 'last'}"):
        jm.Circuit.load(tmp_path / "with_roles.json", roles={"movers": "last", "none": "last"})
    with pytest.raises(ValueError, match="chain and roles are given; expected one of them"):
        jm.Circuit.load(tmp_path / "paper.json", chain, roles=circuit.roles)
    with pytest.raises(ValueError, match=r"roles are known of \['movers'\]"):
        jm.Circuit.load(tmp_path / "paper.json", roles={"movers": "last"})


@pytest.mark.parametrize(
    ("roles", "form"),
    [
        ({"value_fetcher": "last", "struct_reader": "prev_query_box"}, "of the paper"),
        ({"value_fetcher": "last", "struct_reader": "query_box"}, "with roles"),
        ({"value_fetcher": "last", "movers": "last"}, "with roles"),
    ],
)
def test_what_is_saved_can_be_loaded_without_more(tmp_path, roles, form):
    circuit = jm.Circuit({group: [(3, 1), (2, 0)] for group in roles}, roles)
    circuit.save(tmp_path / "circuit.json")
    assert jm.Circuit.load(tmp_path / "circuit.json") == circuit
    assert ("roles" in json.loads((tmp_path / "circuit.json").read_text())) == (form == "with roles")


def test_the_error_says_how_to_load_the_circuit_of_another_chain(tmp_path):
    circuit = jm.Circuit({"readers": [(3, 1)], "early": [(2, 0)]}, {"readers": "last", "early": "early"})
    run = RunFolder.open(tmp_path, {"stages": [dataclasses.asdict(stage) for stage in CHAIN]})
    run.begin()
    circuit.save(tmp_path / "circuit.json", roles=False)
    with pytest.raises(ValueError, match="roles are known of .*give the chain that found them") as error:
        jm.Circuit.load(tmp_path / "circuit.json")
    code = re.search(r"Circuit\.load\(.*\)", str(error.value))
    assert code and eval(f"jm.{code.group()}") == circuit
    for damaged in ("", "[]", '{"stages": 3}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"roles=\{'readers': '\.\.\.', 'early': '\.\.\.'\}\)"):
            jm.Circuit.load(tmp_path / "circuit.json")


def test_groups_of_a_paper_file_can_have_any_name(tmp_path):
    circuit = jm.Circuit({"groups": [(3, 1)], "roles": [(2, 0)]}, {"groups": "last", "roles": "last"})
    circuit.save(tmp_path / "circuit.json", roles=False)
    assert jm.Circuit.load(tmp_path / "circuit.json", roles=circuit.roles) == circuit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a circuit file"),
        ("[1]", "not a circuit file"),
        ('{"value_fetcher": [[1]]}', "not a circuit file"),
        ('{"value_fetcher": [["1", "2"]]}', r"holds \['1', '2'\]; expected a list of \(layer, head\)"),
        ('{"value_fetcher": [[1, 2], [1, 2]]}', "more than once"),
        ('{"groups": {"a": [[1, 2]]}, "roles": {"b": "last"}}', r"expected one for each of \['a'\]"),
        ('{"groups": {"a": [[1, 2]]}, "roles": {"a": 3}}', "expected one for each"),
        ('{"groups": {"a": [[1]]}, "roles": {"a": "last"}}', "not a circuit file"),
        ('{"value_fetcher": [[-1, 2]]}', r"holds \[-1, 2\]; expected"),
        ('{"value_fetcher": [[1, -2]]}', r"holds \[1, -2\]; expected"),
        ('{"induction": [[1, 2]]}', r"groups \['induction'\].*give the chain"),
    ],
)
def test_a_bad_circuit_file_is_named(tmp_path, text, message):
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(ValueError, match=f"circuit.json.*{message}"):
        jm.Circuit.load(tmp_path / "circuit.json")


def test_overlap_is_precision_and_recall_by_group():
    ours = jm.Circuit(
        {"a": [(0, 1), (2, 3), (1, 1)], "b": [], "c": [(0, 0)], "d": [(1, 2)], "e": []}, dict.fromkeys("abcde", "last")
    )
    theirs = {"d": [(2, 1)], "b": [(0, 0)], "a": [(2, 3), (0, 2), (0, 1), (3, 3)], "c": [], "f": []}
    theirs = jm.Circuit(theirs, dict.fromkeys("abcdf", "last"))
    found = jm.overlap(ours, theirs)
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"] == (2 / 3, 2 / 4)
    assert found["d"] == (0.0, 0.0)
    np.testing.assert_array_equal(found["b"], [np.nan, 0])
    np.testing.assert_array_equal(found["c"], [0, np.nan])
    assert jm.overlap(ours, ours)["a"] == (1.0, 1.0)
