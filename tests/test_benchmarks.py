"""The benchmark scripts run, and their counts of operations are those that XLA counts."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmech as jm
from jaxmech import path_patching

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bench_methods  # noqa: E402
import bench_path_patching  # noqa: E402
import flops  # noqa: E402
import gpu_7b  # noqa: E402
import gpu_study  # noqa: E402
import kernels  # noqa: E402
import measuring  # noqa: E402
import precision  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402


def test_benchmark_and_report_run_on_the_tiny_shape(tmp_path, monkeypatch, capsys):
    out, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["bench", "--shape", "tiny", "--runs", "1", "--comparisons", "", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_path_patching.main()
    result = json.loads(out.read_text())
    assert [stage["name"][0] for stage in result["stages"]] == ["1", "2", "3", "4"]
    for stage in result["stages"]:
        assert stage["seconds"] > 0 and 0 < stage["cone_flops"] < stage["naive_flops"]
    monkeypatch.setattr(sys, "argv", ["report", str(out), "--chart", str(chart)])
    capsys.readouterr()
    report.main()
    printed = capsys.readouterr().out
    assert "| 4 struct_reader |" in printed and "8 boxes prompts x 57 tokens" in printed
    assert chart.stat().st_size > 10_000


def test_a_whole_study_of_random_models_runs_on_the_tiny_shape(tmp_path, monkeypatch):
    out = tmp_path / "study.json"
    monkeypatch.setattr(sys, "argv", ["gpu_study", "--shape", "tiny", "--quick", "--once", "--out", str(out)])
    gpu_study.main()
    found = json.loads(out.read_text())["with compilation"]
    assert 0 < sum(sum(parts.values()) for parts in found["stages"].values()) <= found["seconds"]
    timed = ("discovery", "minimality", "dcm", "activation_patching", "cmap", "knockout")
    assert all(min(found["stages"][stage].values()) > 0 for stage in timed)
    expected = gpu_study.sizes(shapes.groups(shapes.SHAPES["tiny"].config))
    for heads in found["heads"].values():
        assert heads["found"]["struct_reader"] == expected["struct_reader"], "the chain did not come to its end"
        assert heads["found"].keys() == heads["kept"].keys() == expected.keys()


def test_a_study_without_sweeps_comes_to_its_end(tmp_path, monkeypatch):
    out = tmp_path / "study.json"
    options = ["--shape", "tiny", "--quick", "--share", "0.5", "--no-sweeps", "--once", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_study", *options])
    gpu_study.main()
    result = json.loads(out.read_text())
    assert result["settings"]["scenes"] == 6 and not result["sweeps"]
    for heads in result["with compilation"]["heads"].values():
        assert heads["found"] == {"value_fetcher": 4, "pos_transmitter": 4, "pos_detector": 4, "struct_reader": 4}


def test_a_share_of_no_prompts_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_study", "--share", "0"])
    with pytest.raises(SystemExit):
        gpu_study.main()
    assert "--share is 0.0; expected a number above 0 and at most 1" in capsys.readouterr().err


def test_a_study_that_has_no_time_left_says_what_is_done(tmp_path, monkeypatch, capsys):
    out = tmp_path / "study.json"
    options = ["--shape", "tiny", "--quick", "--once", "--minutes", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_study", *options])
    gpu_study.main()
    found = json.loads(out.read_text())["with compilation"]
    assert found["cut_off"] and "seconds" not in found and "cut_off" in capsys.readouterr().out


def test_a_precision_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    out, broken = tmp_path / "precision.json", {"dtype": "float32", "precision": "of a watch"}
    monkeypatch.setattr(precision, "PRECISIONS", {"float32": precision.PRECISIONS["float32"], "TF32": broken})
    options = ["--scenes", "0", "--shapes", "tiny", "--stages", "1", "--prompts", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["precision", *options])
    precision.main()
    rows = json.loads(out.read_text())["models"]["tiny"]
    assert rows["float32"]["stages"][0]["top_k"] == 1 and "of a watch" in rows["TF32"]["error"]
    assert "| tiny | TF32 | failed: ValueError: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["precision", *options, "--minutes", "0"])
    precision.main()
    assert "tiny: no time left for float32." in capsys.readouterr().out


@pytest.fixture
def one_thread():
    """The model is tiny: more threads of PyTorch, if it is there, only wait for each other."""
    if not find_spec("torch"):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_benchmark_of_the_methods_and_its_report_run_on_the_tiny_shape(tmp_path, monkeypatch, capsys):
    """Where PyTorch is installed, the results are those of the reference."""
    out = tmp_path / "bench.json"
    arguments = ["bench", "--shape", "tiny", "--runs", "1", "--reference-runs", "1", "--dcm-prompts", "32"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--cmap-heads", "3", "--out", str(out)])
    bench_methods.main()
    result = json.loads(out.read_text())
    circuits = ["circuit evaluation", "circuits, other tokens left alone"]
    names = [*circuits, "DCM", "DCM, 8 lambdas", "CMAP", "knockout"]
    assert [method["name"] for method in result["methods"]] == names
    assert [method["units"] for method in result["methods"]] == [32, 32, 4, 32, 16, 4]
    for method in result["methods"]:
        assert method["seconds"] > 0 and (method["reference"] is not None) == bool(find_spec("torch"))
        if reference := method["reference"]:
            assert 0 < reference["largest_relative_difference"] < 1e-4
            assert reference["units"] == {"DCM, 8 lambdas": 4, "CMAP": 3}.get(method["name"], method["units"])
            assert reference["ratio"] == reference["seconds"] / method["seconds"]
    monkeypatch.setattr(sys, "argv", ["report", str(out)])
    capsys.readouterr()
    report.main()
    printed = capsys.readouterr().out
    assert "| knockout | 4 first layers |" in printed and "32 random ones for DCM" in printed
    assert not find_spec("torch") or "extrapolated from 3 heads" in printed


def run_gpu_7b(monkeypatch, out: Path, *options: str) -> tuple[str | int | None, dict[str, dict]]:
    """Runs the script on the tiny shape; what it ends with, and its rows by name."""
    sizes = ["--shapes", "tiny", "--parts", "stages,circuits,knockout,profile", "--sample", "2", "--prompts", "8"]
    sizes += ["--circuits", "3", "--circuit-prompts", "8", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_7b", *sizes, "--out", str(out), *options])
    with pytest.raises(SystemExit) as ended:
        gpu_7b.main()
    rows = json.loads(out.read_text())["shapes"]["tiny"]["rows"] if out.exists() else []
    return ended.value.code, {row["name"]: row for row in rows}


@pytest.mark.usefixtures("one_thread")
def test_what_a_gpu_is_to_do_runs_on_the_tiny_shape_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    assert run_gpu_7b(monkeypatch, out, "--minutes", "0") == (0, {})
    assert "no time left for stage 1 value_fetcher" in capsys.readouterr().out

    with monkeypatch.context() as broken:
        broken.setattr(gpu_7b.bench_methods, "knockout", lambda *arguments: 1 / 0)
        code, before = run_gpu_7b(monkeypatch, out)
    assert code == "Failed: knockout." and before["knockout"]["error"] == "ZeroDivisionError: division by zero"
    assert "- knockout: failed, ZeroDivisionError" in capsys.readouterr().out

    code, rows = run_gpu_7b(monkeypatch, out)
    assert code == 0
    assert {name for name, row in rows.items() if row != before[name]} == {"knockout"}, "the others are kept"
    stages = [f"stage {stage.name}" for stage in shapes.stages(shapes.SHAPES["tiny"].config)]
    timed = [*stages, "circuit evaluation", "knockout"]
    profiles = [f"profile of {name}" for name in stages]
    assert list(rows) == [*stages[:3], *profiles, "circuit evaluation", stages[3], "knockout"], "the last is done again"
    for name in timed:
        assert rows[name]["seconds"] > 0 and (rows[name]["reference"] is not None) == bool(find_spec("torch"))
        assert not rows[name]["reference"] or rows[name]["reference"]["largest_relative_difference"] < 1e-4
    for name in stages:
        assert rows[f"profile of {name}"]["functions"]["jit_sender_outcomes"]["kinds"]["matrix products"] > 0
    printed = capsys.readouterr().out
    assert (
        "| stage 4 struct_reader |" in printed
        and "- profile of stage 2 pos_transmitter: jit_sender_outcomes" in printed
    )

    code, _ = run_gpu_7b(monkeypatch, out, "--runs", "2")
    assert "is of another machine or of other options" in str(code)


def test_one_call_compiles_all_that_a_stage_is_timed_with(monkeypatch):
    """Also where a sweep has several calls."""
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": 40, "live": 320})
    shape = dataclasses.replace(shapes.SHAPES["tiny"], prompts=7)
    model, compiled = shapes.random_model(shape.config), (path_patching.prepare, path_patching.sender_outcomes)
    for stage in shapes.stages(shape.config):
        bench = gpu_7b.StageBench(lambda: model, lambda: None, shapes.pairs(shape), stage, argparse.Namespace(), 1.0)
        before = [function._cache_size() for function in compiled]
        bench.one_call()
        after = [function._cache_size() for function in compiled]
        assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1]
        bench.sweep()
        assert [function._cache_size() for function in compiled] == after


@pytest.mark.skipif(not find_spec("torch"), reason="compares with PyTorch")
def test_scores_are_checked_in_float32_against_full_forwards_and_pytorch(monkeypatch):
    found = gpu_7b.check(shapes.SHAPES["tiny"], sample=2)["differences"]
    assert list(found) == ["last logits", "query_box v", "last logits, PyTorch", "query_box v, PyTorch"]
    assert all(0 < x["largest_difference"] < 1e-4 * x["largest_score"] for x in found.values())
    whole = gpu_7b.check_whole(shapes.SHAPES["tiny"])["differences"]
    assert [name[0] for name in whole] == ["1", "2", "3"]
    assert all(0 < x["largest_difference"] < 1e-4 * x["largest_score"] for x in whole.values())
    monkeypatch.setattr(gpu_7b, "ALLOWED", 1e-9)
    monkeypatch.setattr(gpu_7b, "ROUNDING", 1e-9)
    with pytest.raises(RuntimeError, match="scores differ by more than rounding, last logits: "):
        gpu_7b.check(shapes.SHAPES["tiny"], sample=0)


def test_what_a_gpu_is_to_measure_is_one_command(tmp_path):
    """With no time at all, so that nothing is; a whole study would load its models before it looks at the time."""
    bin = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "MINUTES": "0"}
    command = ["sh", str(Path(__file__).parent.parent / "benchmarks" / "gpu.sh"), str(tmp_path), "7b 8b precision"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **bin})
    assert done.returncode == 0, done.stderr
    for skipped in (
        "7b: no time left for stage 4 struct_reader",
        "8b: no time left for DCM",
        "1b: no time left for TF32",
    ):
        assert skipped in done.stdout


def test_kernels_of_a_trace_are_those_that_ran(tmp_path):
    """A loop that multiplies matrices seven times: seven products, and the loop itself is no kernel."""

    @jax.jit
    def powers(x):
        return jax.lax.fori_loop(0, 7, lambda i, y: jax.numpy.tanh(y @ x), x)

    x = jax.numpy.full((256, 256), 0.01)
    jax.block_until_ready(powers(x))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(powers(x))
    found = kernels.summary(tmp_path)["jit_powers"]
    products = [runs for operation, name, _, runs in found["longest"] if "dot" in operation or "ynn" in operation]
    assert products == [7]
    assert found["kinds"]["matrix products"] <= found["busy"]
    assert not any("while" in operation for operation, *_ in found["longest"])
    with pytest.raises(ValueError, match="no kernels"):
        kernels.summary(tmp_path / "nothing")


def test_no_run_begins_when_the_time_is_over():
    runs = []
    assert len(measuring.timed(lambda: runs.append(1), 5)) == 5
    assert len(measuring.timed(lambda: runs.append(1), 5, seconds=0)) == 1
    assert measuring.timed(lambda: runs.append(1), 0) == [] and len(runs) == 6


def test_ratios_are_rounded_down():
    assert [report.floor(x) for x in (39.99, 10.0, 9.99, 0.96)] == ["39", "10", "9.9", "0.9"]


def test_benchmark_prompts_have_the_structure_of_the_task():
    pairs = shapes.pairs(shapes.SHAPES["tiny"])
    rows = np.arange(len(pairs))
    labels = pairs.clean[rows, pairs.positions["query_box"]]
    np.testing.assert_array_equal(pairs.clean[rows, pairs.positions["prev_query_box"]], labels)
    assert len(np.unique(pairs.clean[:, :-6], axis=0)) == 2, "eight prompts of two scenes"
    assert len(np.unique(shapes.pairs(shapes.SHAPES["tiny"], boxes=False).clean[:, :6], axis=0)) == 8


def unrolled(low, high, body, carry):
    for i in range(int(low), int(high)):
        carry = body(i, carry)
    return carry


def unrolled_scan(body, carry, xs):
    results = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, y = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        results.append(y)
    return carry, jax.tree.map(lambda *ys: jax.numpy.stack(ys), *results)


@pytest.mark.parametrize(
    ("sender", "receivers", "via"),
    [
        ("last", None, None),
        ("last", [(2, 0), (3, 1)], "q"),
        ("query_box", [(1, 0), (2, 5)], "v"),
        ("prev_query_box", [(1, 0), (2, 5)], "v"),
    ],
)
def test_the_flops_of_the_cone_are_those_that_xla_counts(monkeypatch, sender, receivers, via):
    """XLA counts a loop's body once, so loops are unrolled here; with many heads, the clean row hardly counts."""
    sizes = {"vocab_size": 512, "width": 128, "num_layers": 4, "num_heads": 32, "num_kv_heads": 32, "head_dim": 4}
    shape = shapes.Shape(jm.Config(**sizes, mlp_width=512), prompts=7, tokens=57)
    model, pairs = shapes.random_model(shape.config), shapes.pairs(shape)
    work = bench_path_patching.sweep_sizes(model, pairs, shapes.Stage("", sender, receivers, via))
    monkeypatch.setattr(path_patching, "TOKENS_PER_CALL", {"frozen": 1, "live": 1})  # one layer's senders a call
    plan = path_patching.plan(model, pairs, sender, receivers, via)
    batch, mask = plan.batch(plan.batches.rows[0]), plan.receivers
    live = mask is not None
    inputs = path_patching.prepare(model.config, model.weights, batch, live=live)
    monkeypatch.setattr(jax.lax, "fori_loop", unrolled)
    monkeypatch.setattr(jax.lax, "scan", unrolled_scan)

    def counted(function, *arguments) -> float:
        with jax.ensure_compile_time_eval():
            return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    def step(call):
        run = path_patching.sender_outcomes.__wrapped__
        return lambda weights, inputs: run(model.config, weights, inputs, call, mask, via=via)

    total = counted(lambda w, b: path_patching.prepare.__wrapped__(model.config, w, b, live=live), model.weights, batch)
    total += sum(counted(step(call), model.weights, inputs) for call in plan.calls)
    assert abs(total / flops.cone(model.config, work) - 1) < 0.1


def test_an_unknown_word_of_a_list_is_refused_with_those_that_are_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--comparisons", "hooks,hoks"])
    with pytest.raises(SystemExit):
        bench_path_patching.main()
    assert "unknown: 'hoks'; expected some of hooks, reachable, lean" in capsys.readouterr().err
