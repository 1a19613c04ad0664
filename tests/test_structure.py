"""Imports go one way, README and recipes run as written, and nothing loads code it should not."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import NEEDS_TORCH

import jaxmech as jm

ROOT = Path(__file__).parent.parent

# From top to bottom: a module may import what stands in a later row, and within its own row.
ROWS = (
    ("jaxmech.cli", "jaxmech.cli_options", "jaxmech.cli_prompts"),
    ("jaxmech.report",),
    ("jaxmech.study",),
    ("jaxmech", "jaxmech.demo"),  # the package's own re-exports
    ("jaxmech.run_folder",),
    ("jaxmech.criteria",),
    ("jaxmech.discovery",),
    (
        "jaxmech.path_patching",
        "jaxmech.evaluation",
        "jaxmech.circuit_passes",
        "jaxmech.dcm",
        "jaxmech.cmap",
        "jaxmech.head_sweep",
        "jaxmech.knockout",
    ),
    ("jaxmech.collected", "jaxmech.ablation"),
    ("jaxmech.patching", "jaxmech.accuracy"),
    ("jaxmech.circuits",),
    ("jaxmech.boxes", "jaxmech.text_pairs", "jaxmech.chain"),
    ("jaxmech.gathered",),
    ("jaxmech.cone", "jaxmech.batches", "jaxmech.metrics", "jaxmech.scores", "jaxmech.memory", "jaxmech.compat"),
    ("jaxmech.predictions", "jaxmech.bootstrap", "jaxmech.shared_prefix", "jaxmech.prompt_trees", "jaxmech.suffixes"),
    ("jaxmech.verify",),
    ("jaxmech.loading", "jaxmech.deviations", "jaxmech.hf_sites"),
    ("convert",),
    ("jaxmech.checkpoint", "jaxmech.sharding", "jaxmech.provenance", "jaxmech.host_arrays"),
    ("jaxmech.model", "jaxmech.attention", "jaxmech.arithmetic", "jaxmech.rope", "jaxmech.interventions"),
    ("jaxmech.pairs", "jaxmech.config", "jaxmech.files"),
    ("jaxmech.tokenized", "jaxmech.compiled_sizes", "jaxmech.json_lines"),
)
# They read what PyTorch wrote, or run transformers' models; all else runs where it is not installed.
IMPORT_TORCH_WHEN_CALLED = ("jaxmech.hf_sites", "convert.torch_files")
SOURCES = sorted(path for top in ("jaxmech", "convert") for path in (ROOT / top).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def row(module: str) -> int:
    """Row of the longest name that `module` is or lies in."""
    places = {name: i for i, names in enumerate(ROWS) for name in names}
    while module not in places:
        module, _, rest = module.rpartition(".")
        assert rest, "a module that the rows do not name"
    return places[module]


def imports(path: Path) -> set[str]:
    """Modules of this project that the file imports, and the top names of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [name for name in inside if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
            folders = [name for name in inside if (ROOT / name.replace(".", "/") / "__init__.py").exists()]
            found |= set(files + folders) or {node.module or ""}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_one_way(path):
    module = module_name(path)
    for imported in imports(path):
        if imported.split(".")[0] in ("jaxmech", "convert"):
            assert row(imported) >= row(module), f"{module} imports {imported}, which stands above it"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_torch_stays_out_and_orbax_in_one_place(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert "torch" not in tops or module_name(path) in IMPORT_TORCH_WHEN_CALLED
    assert not tops & {"orbax", "tensorstore"} or module_name(path) == "jaxmech.checkpoint"


@pytest.mark.parametrize("module", IMPORT_TORCH_WHEN_CALLED)
def test_modules_that_need_torch_import_it_when_they_are_called(module):
    lines = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text().splitlines()
    found = [line for line in lines if re.match(r"\s*(import|from) torch\b", line)]
    assert found and all(line.startswith("    ") for line in found)


def test_every_module_says_what_it_owns():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def run(blocks: list[str]) -> dict:
    """The names that the blocks define, each with those of the ones before."""
    names: dict = {}
    for block in blocks:
        exec(compile(block, "a page", "exec"), names)
    return names


def test_the_recipes_run_as_written_and_find_what_the_methods_find():
    found = run(code_blocks("docs/recipes.md"))
    model, pairs = found["model"], found["pairs"]
    assert found["grid"].shape == (4, 8) and (found["grid"] - found["clean_outcome"]).min() < -5
    assert (found["lens"].argmax(-1)[-1] == pairs.labels).all(), "the prompts that the model answers right"
    assert np.corrcoef(found["estimate"].ravel(), found["exact"].ravel())[0, 1] > 0.4
    # The masks keep some heads, and not any others as many.
    z, mlp_out = found["kept"]["z"], found["kept"]["mlp_out"]
    others = [np.random.default_rng(seed).permutation(z.ravel()).reshape(z.shape) for seed in range(4)]
    _, swapped = model(pairs.corrupt, capture=("z", "mlp_out"))
    args = model, found["answers"], swapped
    lost = [float(found["divergence"](*args, {"z": x * 1.0, "mlp_out": mlp_out * 1.0})) for x in (z, *others)]
    assert 4 < z.sum() < 28 and lost[0] == pytest.approx(float(found["lost"]), rel=1e-3)
    assert lost[0] < min(lost[1:]) / 3
    # A head of the last layer has no path but that to the logits.
    direct = jm.path_patch(model, pairs, "last", metric="log_probability").mean
    np.testing.assert_allclose(found["exact"][-1], direct[-1], atol=1e-4)
    # Nor has its MLP, whose output is added to the stream.
    last, rows = pairs.positions["last"][:, None], np.arange(len(pairs))
    stream = model(pairs.clean, capture=("resid_mid",), capture_at=last)[1]["resid_mid"][-1]
    logits = model.unembed(stream + found["corrupt"]["mlp_out"][-1])[:, 0]
    expected = jax.nn.log_softmax(logits)[rows, pairs.labels].mean() - found["clean_outcome"]
    assert found["direct"][-1] == pytest.approx(float(expected), abs=1e-4) and expected < -1
    # One sender at one role is that of path_patch.
    receivers, (head,) = found["fetchers"], found["lookup"][:1]
    swept = jm.path_patch(model, pairs, "query_box", receivers, "v", metric="log_probability").mean[head]
    assert abs(swept) > 1e-3
    np.testing.assert_allclose(found["together"]([head], receivers, "v", ["query_box"]), swept, atol=1e-4)
    assert ((found["attention"] >= 0) & (found["attention"] <= 1)).all()


def test_the_examples_of_the_readme_run_as_written(capsys):
    blocks = code_blocks("README.md")
    assert len(blocks) == 3 and sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 10
    names = run(blocks)
    printed = capsys.readouterr().out
    assert re.match(r"accuracy 0\.\d\d\n\[\[", printed)
    assert names["lookup"].mean.min() < -0.5
    assert set(names["circuit"].groups) == {"movers", "readers"} and all(names["circuit"].groups.values())
    assert names["captured"]["pattern"].shape == (4, 70, 54, 8, 54)


def needs_torch(name: str, names: dict[str, Path]) -> bool:
    """Whether a file beside the tests imports PyTorch as it is imported itself, or what it imports there does."""
    for node in ast.parse(names[name].read_text()).body:
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        skips = isinstance(node, ast.Assign) and ast.unparse(node.value) == "pytest.importorskip('torch')"
        if skips or "torch" in [x.split(".")[0] for x in imported]:
            return True
        if any(needs_torch(x, names) for x in imported if x in names):
            return True
    return False


def test_the_tests_that_are_left_out_without_torch_are_those_that_import_it():
    names = {path.stem: path for path in (ROOT / "tests").glob("*.py")}
    found = [f"{name}.py" for name in sorted(names) if name.startswith("test_") and needs_torch(name, names)]
    assert found == list(NEEDS_TORCH)
