"""Programs compiled for devices that are not there: every kernel of every method, and what is read from their text."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import compile_only  # noqa: E402
import hlo  # noqa: E402
import shapes  # noqa: E402
import targets  # noqa: E402

import jaxmech as jm  # noqa: E402
from jaxmech import compiled_sizes, memory  # noqa: E402
from jaxmech.model import abstract_params  # noqa: E402

PROGRAM = """
%slice_of_weights (parameter_0: f32[10,20,30], parameter_1: s32[]) -> f32[1,20,30] {
  %parameter_0 = f32[10,20,30] parameter(0)
  %parameter_1 = s32[] parameter(1)
  ROOT %part = f32[1,20,30] dynamic-slice(%parameter_0, %parameter_1), dynamic_slice_sizes={1,20,30}
}

%kept (parameter_0: f32[10,5,30], parameter_1: f32[5,30], parameter_2: s32[]) -> f32[10,5,30] {
  %parameter_0 = f32[10,5,30] parameter(0)
  %parameter_1 = f32[5,30] parameter(1)
  %new = f32[1,5,30] bitcast(%parameter_1)
  %parameter_2 = s32[] parameter(2)
  ROOT %updated = f32[10,5,30] dynamic-update-slice(%parameter_0, %new, %parameter_2), metadata={op_name="keep"}
}

%body (carry: (s32[], f32[10,20,30], f32[5,20], f32[10,5,30])) -> (s32[], f32[10,20,30], f32[5,20], f32[10,5,30]) {
  %carry = (s32[], f32[10,20,30], f32[5,20], f32[10,5,30]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %weights = f32[10,20,30] get-tuple-element(%carry), index=1
  %x = f32[5,20] get-tuple-element(%carry), index=2
  %results = f32[10,5,30] get-tuple-element(%carry), index=3
  %fusion-start = ((f32[10,20,30], s32[]), f32[1,20,30], u32[]) fusion-start(%weights, %i), calls=%slice_of_weights
  %w = f32[1,20,30] fusion-done(%fusion-start)
  %w.1 = f32[20,30] bitcast(%w)
  %product = f32[5,30] dot(%x, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all = f32[10,5,30] fusion(%results, %product, %i), kind=kLoop, calls=%kept, metadata={op_name="keep"}
  ROOT %next = (s32[], f32[10,20,30], f32[5,20], f32[10,5,30]) tuple(%i, %weights, %x, %all)
}
"""


def test_products_and_moved_bytes_of_a_loop_are_counted():
    """A slice of weights is read and written once, a result is written where it belongs, and no whole array counts."""
    (cost,) = hlo.costs(PROGRAM)
    assert (cost.name, cost.flops) == ("body", 2 * 5 * 20 * 30)
    moved = {x.name: (count, x.source) for count, x in cost.moved}
    of_index = 4
    assert moved == {
        "fusion-start": (4 * 2 * 20 * 30 + of_index, ""),
        "all": (4 * 2 * 5 * 30 + of_index, "keep"),
    }
    assert cost.bytes_moved == 4 * (2 * 20 * 30 + 2 * 5 * 30 + 2)


@pytest.fixture
def this_device(monkeypatch):
    """A target that needs no other compiler; what the script plans by is put back."""

    @dataclasses.dataclass(frozen=True)
    class Here(targets.Target):
        def device(self):
            return jax.devices()[0]

    monkeypatch.setitem(targets.TARGETS, "here", Here(8 * targets.GIB, "cpu", "", {}, {}))
    monkeypatch.setattr(memory, "CPU_BUDGET", memory.CPU_BUDGET)
    monkeypatch.setitem(compiled_sizes.ALIGNMENT, "cpu", compiled_sizes.ALIGNMENT["cpu"])


@pytest.mark.usefixtures("this_device")
def test_every_kernel_of_every_method_is_compiled_and_none_is_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "plans.json"
    sizes = ["--prompts", "8", "--circuit-prompts", "8", "--circuits", "4", "--dcm-prompts", "32"]
    slow = ["--rate", "1e6", "--bandwidth", "1e6"]  # a device so slow that no body takes too little time to be listed
    arguments = ["compile_only", "--target", "here", "--shapes", "tiny", "--hlo", str(tmp_path / "hlo")]
    monkeypatch.setattr(sys, "argv", [*arguments, *sizes, *slow, "--out", str(out)])
    compile_only.main()
    kernels = json.loads(out.read_text())["shapes"]["tiny"]["kernels"]
    stages = ["1 value_fetcher", "2 pos_transmitter", "3 pos_detector", "4 struct_reader"]
    alone = "circuits, other tokens left alone"
    methods = ["circuits", alone, "DCM", "DCM of a study", "CMAP of groups", "CMAP of heads", "knockout"]
    assert {kernel["work"] for kernel in kernels} == {f"stage {name}" for name in stages} | set(methods)
    printed = capsys.readouterr().out
    for kernel in kernels:
        assert kernel["calls"] >= 1 and kernel["compile_seconds"] > 0
        assert kernel["fits"] and kernel["result_bytes"] > 0
        multiplies = sum(body["flops"] for body in kernel["bodies"]) > 0
        assert multiplies != (kernel["kernel"] in ("_in_order", "_stacked", "_unpatched")), kernel["kernel"]
        assert kernel["argument_bytes"] > 0 or not multiplies
        assert f"{kernel['work']}: {kernel['kernel']} x {kernel['calls']}, compiled in" in printed
    assert len(list((tmp_path / "hlo").iterdir())) == len(kernels)


@pytest.mark.usefixtures("this_device")
def test_every_shape_of_a_function_is_a_kernel_of_its_own():
    """Also of those that take no config: masks of groups in other layers."""
    shape = dataclasses.replace(shapes.SHAPES["tiny"], prompts=8)
    model = jm.Model(shape.config, abstract_params(shape.config))
    groups = {"a": {"last": [(2, 1)]}, "b": {"query_box": [(1, 0)]}, "c": {"query_box": [(1, 3), (3, 1)]}}
    with compile_only.recorded(targets.TARGETS["here"]) as record:
        runs = jm.dcm.train_many(model, {"": shapes.pairs(shape)}, groups, batch_size=4)
    names = [kernel.name for kernel in record.kernels.values()]
    assert [names.count(name) for name in ("_unpatched", "_train", "_run_base")] == [2, 2, 1]
    assert {key[1]: len(run.mask) for key, run in runs.items()} == {"a": 1, "b": 1, "c": 2}


def test_a_model_that_does_not_fit_is_refused_and_changes_nothing(monkeypatch):
    before = memory.CPU_BUDGET
    monkeypatch.setattr(sys, "argv", ["compile_only", "--target", "v6e", "--shapes", "8b"])
    with pytest.raises(SystemExit, match="v6e has 32 GiB; the models of 8b do not fit."):
        compile_only.main()
    assert memory.CPU_BUDGET == before
