"""Eight devices equal one: parameters split over a mesh, and every method on them, with heads that divide and not."""

import sys
import warnings

import jax
import numpy as np
import pytest
from conftest import TOLERANCES, assert_close
from jax.sharding import AxisType, PartitionSpec

import convert
import jaxmech as jm
from convert.families import TABLES, axis_sizes
from jaxmech import checkpoint, memory, path_patching
from jaxmech.model import forward, parameter_shapes
from jaxmech.sharding import AXES, devices_of, over_rows, parameter_axes, row_devices

TOKENS = np.arange(36).reshape(3, 12)
HEADS = [(0, 1), (1, 4), (2, 3), (2, 5)]
SIZES = {"num_layers": 3, "num_heads": 8, "width": 16, "head_dim": 4, "mlp_width": 24, "vocab_size": 64}
MODELS = {
    "all divide": {"num_kv_heads": 8, "attention_bias": True},
    "kv heads do not divide": {"num_kv_heads": 2, "qk_norm": "all", "pre_norm": False, "post_norm": True},
}
OTHERS = {
    "kv heads do not divide, norm of each head, tied": {"num_kv_heads": 4, "qk_norm": "head", "tie_embeddings": True},
    "no heads divide": {"num_heads": 6, "num_kv_heads": 3, "mlp_bias": True},
}
SPLIT = {  # position of the axis that is split over eight devices, in a model of MHA
    "embed": 0,
    "unembed": 1,
    "q": 2,
    "k": 2,
    "v": 2,
    "o": 1,
    "q_bias": 1,
    "k_bias": 1,
    "v_bias": 1,
    "q_norm": 1,
    "k_norm": 1,
    "gate": 2,
    "up": 2,
    "down": 1,
    "gate_bias": 1,
    "up_bias": 1,
}
EVERYTHING = {
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "qk_norm": "all",
    "post_norm": True,
}


def split(model: jm.Model, mesh: jax.sharding.Mesh) -> jm.Model:
    """The same model over the devices of a mesh."""
    return jm.Model(model.config, {"params": jax.device_put(model.weights, jm.parameter_shardings(model.config, mesh))})


@pytest.fixture(params=MODELS)
def one(request, random_model) -> jm.Model:
    """A model on one device."""
    return random_model(**SIZES | (MODELS | OTHERS)[request.param])


@pytest.fixture
def eight(one) -> jm.Model:
    """The same on eight."""
    return split(one, jm.make_mesh())


def assert_placed(weights, config: jm.Config, mesh: jax.sharding.Mesh) -> None:
    """Every parameter lies as the table says, and a device holds no more of it than its part."""
    found = jax.tree.map(lambda x: x.sharding, weights)
    assert found == jm.parameter_shardings(config, mesh)
    q = weights["blocks"]["q"]
    assert {x.data.shape[2] for x in q.addressable_shards} == {config.num_heads // mesh.shape["model"]}


def test_the_table_names_every_parameter_and_its_axes():
    assert AXES.keys() == {name for table in TABLES.values() for name in table}
    for style in ("all", "head"):
        config = jm.Config(**SIZES, num_kv_heads=2, **EVERYTHING | {"qk_norm": style})
        sizes = axis_sizes(config) | {"L": config.num_layers}
        shapes = parameter_shapes(config)
        for name, shape in {**shapes.pop("blocks"), **shapes}.items():
            assert shape == tuple(sizes[letter] for letter in parameter_axes(config, name)), name


def test_heads_hidden_units_and_the_vocabulary_are_split_where_they_divide():
    config = jm.Config(**SIZES, num_kv_heads=8, **EVERYTHING)
    shardings = jm.parameter_shardings(config, jm.make_mesh())
    for name, sharding in {**shardings.pop("blocks"), **shardings}.items():
        place = [i for i, axis in enumerate(sharding.spec) if axis is not None]
        assert place == ([SPLIT[name]] if name in SPLIT else []), name
    few = jm.parameter_shardings(config.replace(num_kv_heads=2, vocab_size=63, qk_norm="head"), jm.make_mesh())
    whole = {name for name, x in {**few.pop("blocks"), **few}.items() if x.is_fully_replicated}
    kept = {"q", "o", "q_bias", "gate", "up", "down", "gate_bias", "up_bias"}
    assert whole == AXES.keys() - kept


@pytest.mark.parametrize("one", MODELS | OTHERS, indirect=True)
def test_logits_and_activations_equal_those_of_one_device(one, eight):
    sites = ("q", "k", "v", "pattern", "z", "resid_post")
    patch = jm.Interventions(z=jm.Patch(jm.head_weights(one.config, HEADS), np.full(1, 0.5, np.float32)))
    (expected, captured), (found, same) = (model(TOKENS, patch, sites) for model in (one, eight))
    assert_close(found, expected, TOLERANCES.recompiled)
    for site in sites:
        assert_close(same[site], captured[site], TOLERANCES.recompiled)


def test_path_patching_through_receivers_equals_that_on_one_device(one, eight, random_pairs):
    pairs, sweep = random_pairs(one), ("early", [(1, 5), (2, 1)], "v")
    found, expected = (jm.path_patch(model, pairs, *sweep).per_example for model in (eight, one))
    assert_close(found, expected, TOLERANCES.cone)


def test_circuits_equal_those_on_one_device(one, eight, random_pairs):
    pairs, circuits = random_pairs(one), [{"last": HEADS, "early": [(0, 0)]}, {"query_box": [(1, 5)]}]
    means = jm.mean_activations(one, random_pairs(one, seed=5, unequal=False).clean)
    found, expected = (jm.evaluate(model, pairs, circuits, means).logits for model in (eight, one))
    assert_close(found, expected, TOLERANCES.cone)


@pytest.mark.parametrize("one", ["kv heads do not divide"], indirect=True)
def test_path_patching_to_the_logits_equals_that_on_one_device(one, eight, random_pairs):
    pairs = random_pairs(one)
    found, expected = (jm.path_patch(model, pairs).per_example for model in (eight, one))
    assert_close(found, expected, TOLERANCES.cone)


@pytest.mark.parametrize("one", ["kv heads do not divide"], indirect=True)
def test_a_dcm_training_equals_that_on_one_device(one, eight, random_pairs):
    pairs = random_pairs(one, count=6)
    found, expected = (jm.dcm.train(model, pairs, HEADS, batch_size=3, epochs=2).history for model in (eight, one))
    assert (expected.mask[-1] < 1).any()
    assert_close(found.mask, expected.mask, TOLERANCES.cone)
    assert_close(found.loss, expected.loss, TOLERANCES.cone)


@pytest.mark.parametrize("one", ["kv heads do not divide"], indirect=True)
def test_knockout_equals_that_on_one_device(one, eight, random_pairs):
    pairs = random_pairs(one)
    found, expected = (jm.knockout(model, pairs).logits for model in (eight, one))
    assert_close(found, expected, TOLERANCES.cone)


@pytest.mark.parametrize("one", ["kv heads do not divide"], indirect=True)
def test_cross_model_patching_equals_that_on_one_device(one, eight, random_pairs):
    pairs, heads = random_pairs(one), {"last": HEADS, "query_box": [(1, 2)]}
    tuned = jm.Model(one.config, jax.tree.map(lambda x: x * 1.1, one.params))
    expected = jm.cmap(one, tuned, pairs, heads, ("q", "z")).logits
    found = jm.cmap(eight, split(tuned, jm.make_mesh()), pairs, heads, ("q", "z")).logits
    assert_close(found, expected, TOLERANCES.cone)


def trained(model: jm.Model, pairs: jm.Pairs) -> np.ndarray:
    """Losses of three trainings, and accuracies of eight masks."""
    options = {"lams": (0.01, 0.1, 1.0), "role": "early", "epochs": 2, "batch_size": 3}
    runs = jm.dcm.train_many(model, {"": pairs}, {"": HEADS}, **options)
    masks = np.eye(8, len(HEADS))
    return np.append([run.history.loss for run in runs.values()], jm.dcm.accuracy(model, pairs, HEADS, masks, "early"))


@pytest.mark.parametrize(
    ("copies", "dtype"),
    [(8, "float32"), (8, "bfloat16"), (4, "float32")],
    ids=["float32", "bfloat16", "of two devices"],
)
def test_copies_of_a_model_share_the_rows_of_every_sweep(random_model, random_pairs, monkeypatch, copies, dtype):
    one = random_model(**SIZES, num_kv_heads=8, dtype=dtype)
    many = split(one, jm.make_mesh(rows=copies))
    assert row_devices(many.weights) == copies and row_devices(one.weights) == 1
    pairs, circuits = random_pairs(one), [{"last": HEADS[:i], "early": HEADS[i:]} for i in range(4)]
    means = jm.mean_activations(one, random_pairs(one, seed=5, unequal=False).clean)
    tuned = jm.Model(one.config, jax.tree.map(lambda x: x * 1.1, one.params))
    split_rows = []

    def watched(weights, rows):
        found = over_rows(weights, rows)
        if weights is many.weights:
            split_rows.extend(x.sharding.spec for x in jax.tree.leaves(found) if isinstance(x, jax.Array))
        return found

    for name, module in list(sys.modules.items()):
        if name.startswith("jaxmech.") and hasattr(module, "over_rows"):
            monkeypatch.setattr(module, "over_rows", watched)

    def scores(found):
        # In bfloat16, what is rounded is not the change of the probability, which may be small, but the probability.
        return found.per_example + (dtype == "bfloat16")

    sweeps = {
        "to the logits": lambda model: scores(jm.path_patch(model, pairs)),
        "through receivers": lambda model: scores(jm.path_patch(model, pairs, "early", [(1, 5), (2, 1)], "v")),
        "at two roles": lambda model: scores(jm.path_patch(model, pairs, ["early", "last"], [(1, 5), (2, 1)], "v")),
        "circuits": lambda model: jm.evaluate(model, pairs, circuits, means).logits,
        "circuits in full passes": lambda model: jm.evaluate(model, pairs, circuits, means, False).logits,
        "heads": lambda model: scores(jm.cmap_heads(model, tuned, pairs, "query_box").scores),
        "knockout": lambda model: jm.knockout(model, pairs).logits,
        "means": lambda model: jm.mean_activations(model, pairs.clean, batch_size=3),
        "clean prompts": lambda model: jm.predict(model, pairs, batch_size=3).logits,
        "trainings": lambda model: trained(model, pairs),
        "collected activations": lambda model: jm.collect(model, pairs, ["last"]).values["z"],
        "tuned activations": lambda model: jm.cmap(model, tuned, pairs, circuits[1], ("q", "z")).logits,
        "activation patching": lambda model: jm.patch_activations(model, pairs, circuits[1]).logits,
    }
    tolerance = TOLERANCES.cone if dtype == "float32" else TOLERANCES.bfloat16
    for name, sweep in sweeps.items():
        split_rows.clear()
        found = sweep(many)
        assert split_rows and set(split_rows) == {PartitionSpec("rows")}, name
        assert_close(found, sweep(one), tolerance)


def test_a_copy_does_its_own_rows_alone(random_model, random_pairs):
    """No device asks another for anything, and each does an eighth."""
    one = random_model(**SIZES, num_kv_heads=8)
    many, pairs = split(one, jm.make_mesh(rows=8)), random_pairs(one)

    def compiled(model):
        plan = path_patching.plan(model, pairs, "early", [(1, 5), (2, 1)], "v")
        inputs = path_patching.prepare(model.config, model.weights, plan.batch(plan.batches.rows[0]), live=True)
        senders = np.arange(64) % 16  # as many rows for one device as for eight
        call = plan.calls[0]._replace(senders=over_rows(model.weights, senders))
        arguments = model.config, model.weights, inputs, call, plan.receivers
        return path_patching.sender_outcomes.lower(*arguments, via="v").compile()

    alone, shared = compiled(one), compiled(many)
    assert "all-reduce" not in shared.as_text() and "all-gather" not in shared.as_text()
    assert shared.cost_analysis()["flops"] < alone.cost_analysis()["flops"] / 4


@pytest.mark.parametrize("rows", [0, 3, 16])
def test_copies_that_do_not_divide_the_devices_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows={rows}, but there are 8 devices; expected a divisor"):
        jm.make_mesh(rows=rows)


def test_devices_share_the_work(random_model):
    model = random_model(**SIZES, num_kv_heads=8)

    def operations(weights) -> float:
        compiled = jax.jit(forward, static_argnums=0).lower(model.config, weights, TOKENS).compile()
        return compiled.cost_analysis()["flops"]

    assert operations(split(model, jm.make_mesh()).weights) < operations(model.weights) / 4


def test_a_mesh_may_have_other_axes(random_model):
    model = random_model(**SIZES, num_kv_heads=2)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spread = split(model, mesh)
    assert_placed(spread.weights, model.config, mesh)
    assert_close(spread(TOKENS)[0], model(TOKENS)[0], TOLERANCES.recompiled)


@pytest.mark.parametrize("kind", ["Hugging Face", "Orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_loaded_onto_a_mesh(tmp_path, random_model, kind, dtype):
    model = random_model(**SIZES, num_kv_heads=2)
    write = convert.write_hf if kind == "Hugging Face" else checkpoint.save
    write(tmp_path / "model", model.config, model.params)
    mesh = jm.make_mesh(jax.devices()[2:6])
    found = jm.load(tmp_path / "model", dtype, mesh=mesh)
    assert_placed(found.weights, model.config, mesh)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        assert x.dtype == dtype and np.array_equal(x, y.astype(dtype))


@pytest.mark.parametrize(
    ("axes", "kind", "words"),
    [
        (("data",), AxisType.Auto, ["'data'", "expected one named 'model'", "make_mesh"]),
        (("model",), AxisType.Explicit, ["Explicit", "expected Auto", "make_mesh"]),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused(axes, kind, words):
    mesh = jax.make_mesh((8,), axes, axis_types=(kind,))
    with pytest.raises(ValueError) as error:
        jm.parameter_shardings(jm.Config(**SIZES, num_kv_heads=2), mesh)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("one", ["kv heads do not divide"], indirect=True)
def test_two_models_may_lie_on_different_devices(one, random_pairs):
    """As two large models do: each alone on a device, or each split over its own."""
    pairs, devices = random_pairs(one), jax.devices()
    heads = {"last": HEADS, "early": [(0, 0)]}
    expected = jm.cmap(one, one, pairs, heads, ("q", "v")).logits
    swept = jm.cmap_heads(one, one, pairs, "early").scores.per_example
    elsewhere = jm.Model(one.config, jax.device_put(one.params, devices[1]))
    meshes = [jm.make_mesh(devices[:2]), jm.make_mesh(devices[2:6], rows=2)]
    for base, tuned in ((one, elsewhere), (elsewhere, one), tuple(split(one, mesh) for mesh in meshes)):
        assert_close(jm.cmap(base, tuned, pairs, heads, ("q", "v")).logits, expected, TOLERANCES.recompiled)
        found = jm.cmap_heads(base, tuned, pairs, "early").scores.per_example
        np.testing.assert_allclose(found, swept, atol=1e-5)
    with pytest.raises(ValueError, match="load them onto the same devices"):
        jm.cmap(one, elsewhere, pairs, heads, compat="paper")


def test_the_device_with_the_least_free_memory_counts(one, monkeypatch):
    """That of the model, wherever it lies."""
    on = jm.Model(one.config, jax.device_put(one.params, jax.devices()[3]))
    assert [device.id for device in devices_of(on.weights)] == [3]
    assert len(devices_of(split(one, jm.make_mesh()).weights)) == 8
    assert not devices_of(jax.tree.map(np.asarray, one.weights)), "NumPy arrays lie on no device"

    class Device:
        def __init__(self, used: int):
            self.memory_stats = lambda: {"bytes_limit": 100, "bytes_in_use": used}

    monkeypatch.setattr(memory, "devices_of", lambda weights: [Device(20), Device(60)])
    assert memory.budget(on.weights) == int(memory.DEVICE_FRACTION * 40)


def test_an_accelerator_that_does_not_report_its_memory_is_warned_of_once(one, monkeypatch):
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return None  # as with XLA_PYTHON_CLIENT_ALLOCATOR=platform

    memory._warn_of_no_limit.cache_clear()
    monkeypatch.setattr(memory, "devices_of", lambda weights: [Device(), Device()])
    with pytest.warns(UserWarning, match="gpu does not report .* 1 GiB of activations .* Give batch_size") as caught:
        assert [memory.budget(one.weights) for _ in range(2)] == [memory.CPU_BUDGET] * 2
    assert len(caught) == 1
    monkeypatch.undo()
    with warnings.catch_warnings(action="error"):
        memory._warn_of_no_limit.cache_clear()
        assert memory.budget(one.weights) == memory.CPU_BUDGET, "a CPU need not report any"
