"""Chains of sweeps: what a stage is, and how chains are read and checked."""

import dataclasses
import json

import numpy as np
import pytest

import jaxmech as jm
from jaxmech.chain import check_chain

CHAIN = (
    jm.Stage("readers", "last", k=3),
    jm.Stage("senders", "last", "readers", "q", k=2),
    jm.Stage("early", "early", "senders", "v", k=2),
)


def test_the_default_chain_is_that_of_the_paper():
    assert [(s.group, s.sender, s.receivers, s.via, s.k) for s in jm.PAPER_CHAIN] == [
        ("value_fetcher", "last", None, None, 20),
        ("pos_transmitter", "last", "value_fetcher", "q", 5),
        ("pos_detector", "query_box", "pos_transmitter", "v", 10),
        ("struct_reader", "prev_query_box", "pos_detector", "v", 5),
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "no stages"),
        ((CHAIN[0], CHAIN[0]), "'readers' occurs twice"),
        ((CHAIN[1], CHAIN[0]), r"'senders': there is no earlier group readers for its receivers.* before it are \[\]"),
        (
            (CHAIN[0], jm.Stage("a", "last", ("x", "readers", "y"), "q")),
            r"no earlier group x and y .* are \['readers'\]",
        ),
    ],
)
def test_chains_that_do_not_fit_together_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        check_chain(stages)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("a", "last", None, "q"), "stage 'a': receivers=None with via='q'"),
        (("a", "last", "readers"), "receivers='readers' with via=None"),
        (("a", "last", "readers", "z"), "with via='z'; expected via 'q', 'k' or 'v'"),
        (("a", "last", [(3, 1)], "q"), r"receivers=\[\(3, 1\)\]; expected the name of an earlier group, or a list"),
        (("a", "last", (), "q"), r"receivers=\(\); expected the name of an earlier group"),
        (("a", "last", 3, "q"), "receivers=3; expected the name of an earlier group"),
        (("a", "last", ("b", "b"), "q"), r"receivers=\('b', 'b'\) names a group twice"),
        (("a", 0), "sender=0; expected the name of a role"),
        (("a", "last", None, None, 0), "k=0; expected a whole number"),
        (("../a", "last"), r"group '\.\./a': files and arrays are named by groups"),
        (("a/b", "last"), "group 'a/b': files and arrays are named by groups"),
        (("file", "last"), "group 'file': numpy.savez has this name for itself"),
        ((3, "last"), "group 3: files and arrays are named by groups"),
    ],
)
def test_a_stage_without_meaning_is_refused_where_it_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        jm.Stage(*fields)


def test_a_stage_is_the_same_however_it_was_given():
    assert jm.Stage("a", "last", ["b"], "q") == jm.Stage("a", "last", "b", "q", k=np.int64(5))
    assert jm.Stage("a", "last", ["b", "c"], "q").receivers == ("b", "c")
    assert jm.Stage("a", "last", ["b", "c"], "q").reads == "q of b and c"
    json.dumps(dataclasses.asdict(jm.Stage("a", "last", ["b", "c"], "q", k=np.int64(5))))


def test_a_chain_is_read_from_toml(tmp_path):
    (tmp_path / "chain.toml").write_text(
        '[[stage]]\ngroup = "readers"\nsender = "last"\nk = 3\n\n'
        '[[stage]]\ngroup = "senders"\nsender = "last"\nreceivers = "readers"\nvia = "q"\nk = 2\n'
    )
    assert jm.read_chain(tmp_path / "chain.toml") == CHAIN[:2]
    with open(tmp_path / "chain.toml", "a") as file:
        file.write('[[stage]]\ngroup = "early"\nsender = "early"\nreceivers = ["readers", "senders"]\nvia = "v"\n')
    assert jm.read_chain(tmp_path / "chain.toml")[2] == jm.Stage("early", "early", ("readers", "senders"), "v")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage = [", "not a chain"),
        ('[[stage]]\ngroup = "a"\n', "sender"),
        ('[[stage]]\ngroup = "a"\nsender = "last"\ncolour = "red"\n', "colour"),
        ('[[stage]]\ngroup = "a"\nsender = "last"\nvia = "z"\n', "via='z'"),
        ('[[stages]]\ngroup = "a"\nsender = "last"\n', r"unknown tables \['stages'\]"),
    ],
)
def test_a_bad_chain_file_is_named(tmp_path, text, message):
    (tmp_path / "chain.toml").write_text(text)
    with pytest.raises(ValueError, match=f"chain.toml.*{message}"):
        jm.read_chain(tmp_path / "chain.toml")
