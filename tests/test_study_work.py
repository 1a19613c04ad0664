"""What a study computes, counted without computing it."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bench_path_patching  # noqa: E402
import flops  # noqa: E402
import shapes  # noqa: E402
import study_work  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import compiled_sizes, memory, path_patching  # noqa: E402
from jaxmech.model import abstract_params  # noqa: E402


@pytest.mark.parametrize(
    ("sender", "receivers", "via"),
    [("last", None, None), ("query_box", [(1, 0), (2, 5)], "v"), ("prev_query_box", [(1, 0), (2, 5)], "v")],
)
def test_the_products_of_sweeps_are_those_of_the_cone(sender, receivers, via, monkeypatch):
    """Nothing is run: the weights have no data."""
    sizes = {"vocab_size": 512, "width": 128, "num_layers": 4, "num_heads": 32, "num_kv_heads": 32, "head_dim": 4}
    shape = shapes.Shape(jm.Config(**sizes, mlp_width=512), prompts=7, tokens=57)
    model, pairs = jm.Model(shape.config, abstract_params(shape.config)), shapes.pairs(shape)
    expected = flops.cone(
        shape.config, bench_path_patching.sweep_sizes(model, pairs, shapes.Stage("", sender, receivers, via))
    )
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": 1, "live": 1})  # one layer's senders a call
    with study_work.counted(shape.config) as counts:
        for programs in (2, 0):
            jm.path_patch(model, pairs, sender, receivers, via)
            found = counts.taken()
            assert set(found) == {"prepare", "sender_outcomes"}
            assert sum(x["flops"] for x in found.values()) == pytest.approx(expected, rel=0.1)
            assert sum(x["programs"] for x in found.values()) == programs
    assert not counts.taken()


def test_loops_count_as_often_as_they_run():
    def function(x, start, offset):
        def double(i, x):
            return x @ x

        x = jax.lax.fori_loop(start, 9, double, x)  # 5
        x = jax.lax.fori_loop(start + offset.max(), 10, double, x)  # 3
        x = jax.lax.scan(lambda x, _: (jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x), None), x, None, length=4)[0]
        return jax.lax.fori_loop(x[0, 0].astype(int), 10, double, x), jnp.einsum("ab,ab->b", x, x)  # not known; 3 * 3

    inputs = np.ones((3, 3), np.float32), 4, np.array([1, 3])
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    assert study_work.flops_of(jaxpr, inputs, unknown=14) == 2 * (27 * (5 + 3 + 4 + 7) + 9)


def test_the_work_of_a_study_is_counted_by_stage(tmp_path, monkeypatch, capsys):
    out = tmp_path / "work.json"
    monkeypatch.setattr(memory, "CPU_BUDGET", memory.CPU_BUDGET)  # both are changed
    monkeypatch.setitem(compiled_sizes.ALIGNMENT, "cpu", 1)
    monkeypatch.setattr(sys, "argv", ["study_work", "--shape", "tiny", "--share", "0.04", "--out", str(out)])
    study_work.main()
    stages = json.loads(out.read_text())["stages"]
    for part in ("base", "tuned"):
        assert set(stages[f"dcm of {part}"]) >= {"_train", "run_stretch", "_run_base", "_answers"}
        assert stages[f"discovery of {part}"]["sender_outcomes"]["flops"] > 0
    programs = {stage: sum(x["programs"] for x in functions.values()) for stage, functions in stages.items()}
    again = [stage for stage in programs if stage.endswith("of tuned") and not stage.startswith("cmap")]
    assert sum(programs.values()) > 50 and not any(programs[stage] for stage in again)
    assert "| together | 0.0 | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["study_work", "--shape", "7b", "--memory", "20"])
    with pytest.raises(SystemExit):
        study_work.main()
    assert "2 models of 12.6 GiB do not fit 20 GiB" in capsys.readouterr().err
