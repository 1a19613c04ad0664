"""Whether an adapter is one for this base: what it changes is there, has the right shape, and nothing is missing."""

from collections.abc import Collection, Mapping
from pathlib import Path

from convert.adapters.files import BIAS, EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B, MAGNITUDE, Adapter, ends
from convert.multimodal import Spelling, is_decoder
from convert.tensors import FLOATS
from jaxmech.config import Config


def check_fits(adapter: Adapter, config: Config, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks an adapter before anything is read.

    Args:
      config: the base's.
      path: where the base is, for messages.
      shapes: {tensor: shape} of the base; if its embeddings are tied, of both of them.

    Raises:
      ValueError: the adapter changes what the base does not have, a tensor has another shape or is not of floats, or
        something is missing that adapter_config.json speaks of.
    """
    embed, unembed = ends(config)
    if adapter.config.spelling != Spelling() and not is_decoder(config.family):
        raise ValueError(
            f"{adapter.path} is an adapter of a multimodal model, and the base {path}, of family {config.family!r}, is "
            f"not the decoder of one. {_advice(adapter)}"
        )
    if missing := sorted({embed, unembed} - shapes.keys()):
        raise ValueError(
            f"{path} has no {', '.join(missing)}, so it is not in Hugging Face's layout, as the base of an adapter "
            "must be. Give the base in that layout, or merge the adapter with PEFT."
        )
    vocab = adapter.adapted(config).vocab_size
    shapes = {**shapes, **{name: (vocab, *shapes[name][1:]) for name in (embed, unembed)}}
    _check_known(adapter, path, shapes.keys())
    replaced = adapter.replaced(config)
    for target, name in replaced.items():
        _check_tensor(adapter, name, shapes[target])
    for module in adapter.lora:
        _check_lora(adapter, module, shapes[f"{module}.weight"], embedding=f"{module}.weight" == embed)
    tied = {name.removesuffix(".weight") for name in (embed, unembed)} if config.tie_embeddings else set()
    _check_complete(adapter, path, shapes.keys(), replaced.keys(), tied)


def _check_known(adapter: Adapter, path: Path, names: Collection[str]) -> None:
    """The base has all that the adapter changes."""
    changed = {*adapter.whole, *(f"{module}.weight" for module in adapter.lora)}
    changed |= {f"{module}.bias" for module, parts in adapter.lora.items() if BIAS in parts}
    unknown = sorted(changed - {*names})
    if biases := [name for name in unknown if name.endswith(".bias") and name[:-4] + "weight" in names]:
        raise ValueError(
            f"{adapter.path} changes {len(biases)} biases that the base {path} does not have: {_some(biases)}. "
            f"Expected none there. {_advice(adapter)}"
        )
    if unknown:
        raise ValueError(
            f"{adapter.path} changes {len(unknown)} tensors that the base {path} does not have: {_some(unknown)}. It "
            f"is an adapter for another model. {_advice(adapter)}"
        )


def _check_tensor(adapter: Adapter, name: str, expected: tuple[int, ...]) -> None:
    tensors = adapter.tensors
    if tensors.shape(name) != expected:
        raise ValueError(
            f"{tensors.file(name)}: tensor {name} has shape {tensors.shape(name)}; expected {expected} with this base "
            f"and adapter_config.json. {_advice(adapter)}"
        )
    if tensors.dtype(name) not in FLOATS:
        raise ValueError(
            f"{tensors.file(name)}: tensor {name} has dtype {tensors.dtype(name)}; expected one of "
            f"{', '.join(FLOATS)}. Save the adapter unquantised."
        )


def _check_lora(adapter: Adapter, module: str, weight: tuple[int, ...], *, embedding: bool) -> None:
    """The parts of a module's LoRA are those that adapter_config.json calls for, and fit its weight."""
    config, found = adapter.config, adapter.lora[module]
    if len(weight) != 2:
        raise ValueError(f"{adapter.path} has LoRA in {module}, whose weight has shape {weight}; expected a matrix.")
    rank, (rows, columns) = config.rank_of(module), weight
    expected: dict[str, tuple[int, ...]]
    if embedding:
        expected = {EMBEDDING_A: (rank, rows), EMBEDDING_B: (columns, rank)}
    else:
        expected = {LORA_A: (rank, columns), LORA_B: (rows, rank)}
    if config.dora:
        expected[MAGNITUDE] = (columns if embedding else rows,)
    if config.lora_bias:
        expected[BIAS] = (rows,)
    if found.keys() != expected.keys():
        raise ValueError(
            f"{adapter.path} has {', '.join(sorted(found))} of {module}; by its adapter_config.json, expected "
            f"{', '.join(sorted(expected))}. Copy both files of the adapter again."
        )
    for part, name in found.items():
        _check_tensor(adapter, name, expected[part])


def _check_complete(
    adapter: Adapter, path: Path, names: Collection[str], replaced: Collection[str], tied: set[str]
) -> None:
    """All modules that adapter_config.json names have been changed, and no others."""
    config = adapter.config
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    lora = {module for module in modules if config.has_lora(module)}
    saved = {name for name in names if config.saves(name.rpartition(".")[0])}
    if config.tying:  # PEFT's ensure_weight_tying: what is done to the one is done to the other
        lora |= tied if lora & tied else set()
        saved |= {f"{module}.weight" for module in tied} if any(config.saves(module) for module in tied) else set()
    if config.bias == "all":
        saved |= {name for name in names if name.endswith(".bias")}
    if config.bias == "lora_only":
        saved |= {f"{module}.bias" for module in adapter.lora} & {*names}
    missing = sorted(saved - {*replaced})
    if config.targets is not None:
        missing += sorted(lora - adapter.lora.keys())
        if surplus := sorted(adapter.lora.keys() - lora):
            raise ValueError(
                f"{adapter.path} has LoRA in {len(surplus)} modules that its adapter_config.json does not name: "
                f"{_some(surplus)}. PEFT would ignore them; copy both files of the adapter again."
            )
    if missing:
        raise ValueError(
            f"{adapter.path} lacks tensors for {_some(missing)} of the base {path}, which its adapter_config.json "
            f"names. Either it was not saved whole, or it is for a smaller model. {_advice(adapter)}"
        )


def _advice(adapter: Adapter) -> str:
    base = "" if adapter.config.base is None else f", {adapter.config.base!r}"
    return f"Give the base that it was trained on{base}."


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
