"""Conversion takes little memory beside the parameters: reading, 1.2 x the largest of them + the largest shard at most.

Saving holds the largest parameter about twice: Orbax copies it to write it.
"""

import json
import math
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BYTES = {"F32": 4, "BF16": 2}
LARGE = {"width": 2048, "mlp_width": 5632, "vocab": 8000, "shards": 10}
LAYERS = {"F32": 5, "BF16": 3, "PyTorch": 3}  # 1.2 and 0.7 GB in float32
SMALL = {"width": 128, "mlp_width": 128, "layers": 1, "vocab": 10, "shards": 2}
MEMORY = Path("/proc/self/clear_refs")


def write_config(path: Path, width: int, mlp_width: int, layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Writes config.json of a Llama; returns the shapes of its tensors."""
    fields = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "intermediate_size": mlp_width,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    layer = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj.weight": (mlp_width, width) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": (width, mlp_width)}
    layer |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    blocks = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (vocab, width), **blocks, "model.norm.weight": (width,)} | {
        "lm_head.weight": (vocab, width)
    }


def write_sparse(path: Path, dtype: str, shards: int, **sizes: int) -> int:
    """Writes a checkpoint of zeros, as shards that take no space on the disk; returns the bytes of the largest.

    What is read is a page of zeros for every page of the file, as much memory as if there were data.
    """
    shapes = write_config(path, **sizes)
    names, weight_map = list(shapes), {}
    for i in range(shards):
        shard = path / f"model-{i + 1:05}-of-{shards:05}.safetensors"
        held = [name for j, name in enumerate(names) if j * shards // len(names) == i]
        weight_map |= dict.fromkeys(held, shard.name)
        write = _sparse_safetensors if dtype in BYTES else _sparse_bin
        write(shard if dtype in BYTES else shard.with_name(shard.stem + ".bin"), {n: shapes[n] for n in held}, dtype)
    if dtype not in BYTES:
        weight_map = {name: file.replace(".safetensors", ".bin") for name, file in weight_map.items()}
    index = "model.safetensors.index.json" if dtype in BYTES else "pytorch_model.bin.index.json"
    (path / index).write_text(json.dumps({"weight_map": weight_map}))
    return max((path / file).stat().st_size for file in weight_map.values())


def _sparse_safetensors(shard: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with shard.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _sparse_bin(shard: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    import torch

    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape) for name, shape in shapes.items()}, shard)


@pytest.mark.skipif(not MEMORY.exists(), reason="only Linux says how much memory a process had at most")
def test_conversion_takes_little_memory_beside_the_parameters(tmp_path):
    kinds = ["F32", "BF16", "PyTorch"] if find_spec("torch") else ["F32", "BF16"]
    largest = {kind: write_sparse(tmp_path / kind, kind, layers=LAYERS[kind], **LARGE) for kind in kinds}
    for kind in kinds:
        write_sparse(tmp_path / f"small {kind}", kind, **SMALL)
    small = ",".join(str(tmp_path / f"small {kind}") for kind in kinds)
    large = [str(tmp_path / kind) for kind in kinds]
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), small, *large]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for path in large:
        shutil.rmtree(path, ignore_errors=True)  # pytest keeps folders of tests for a while; this one has gigabytes
    assert done.returncode == 0, done.stderr
    *read, saved = map(json.loads, done.stdout.splitlines())
    for kind, found in zip(kinds, read, strict=True):
        assert found["params"] > 2e8 * LAYERS[kind]
        bound = 1.2 * found["stacked"] + largest[kind]
        assert bound < 0.5 * found["params"]  # so that to hold, or to map, all of it would show
        assert found["reading"] <= bound, (kind, found, largest[kind])
    assert saved["saving"] <= 2.5 * saved["stacked"] < 0.6 * saved["params"], saved
