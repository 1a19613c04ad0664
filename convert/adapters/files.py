"""The tensors of an adapter directory, by what they change in the base, and the config of base and adapter together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.adapters.config import AdapterConfig, read_adapter_config
from convert.families import TABLES
from convert.multimodal import IMAGES, Spelling, spelling_of
from convert.safetensors_files import SafeTensors
from convert.tensors import Tensors
from convert.torch_files import TorchFiles
from jaxmech.config import Config

SAFETENSORS, TORCH = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # PeftModel and LoraModel around the base
LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B = "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"
# The adapter's name, such as "default", stands in the names of tensors or does not, depending on what wrote them.
_LORA = re.compile(
    rf"(?P<module>.+)\.(?P<part>{LORA_A}|{LORA_B}|{EMBEDDING_A}|{EMBEDDING_B}|{MAGNITUDE})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.(?P<wrapper>base_layer|original_module|modules_to_save)(?:\.(?P<adapter>[^.]+))?)?"
    r"\.(?P<leaf>weight|bias)"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, its tensors not read yet.

    Attributes:
      path: the directory.
      config: what adapter_config.json says.
      tensors: the adapter's own.
      whole: {tensor of the base: tensor that replaces it}.
      lora: {module of the base: {part of its LoRA: tensor}}.
    """

    path: Path
    config: AdapterConfig
    tensors: Tensors
    whole: Mapping[str, str]
    lora: Mapping[str, Mapping[str, str]]

    @classmethod
    def open(cls, path: Path) -> "Adapter":
        """The adapter in the directory `path`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: the adapter is damaged or not supported.
        """
        path = Path(path)
        config, tensors = read_adapter_config(path), _open(path)
        whole: dict[str, list[str]] = {}
        lora: dict[str, dict[str, list[str]]] = {}
        adapters = set()
        names = {name: name.removeprefix(PREFIX) for name in sorted(tensors.names)}
        spelling = spelling_of(names.values())
        if spelling != Spelling():
            names = {name: spelling.ours(own) for name, own in names.items() if not own.startswith(IMAGES)}
        for name, own in names.items():
            if found := _LORA.fullmatch(own):
                part = f"{found['part']}.bias" if found["leaf"] == "bias" else found["part"]
                lora.setdefault(found["module"], {}).setdefault(part, []).append(name)
            elif found := _WHOLE.fullmatch(own):
                whole.setdefault(f"{found['module']}.{found['leaf']}", []).append(name)
            else:
                raise ValueError(
                    f"{tensors.file(name)} holds {name}, which is no tensor of a LoRA adapter. It would be ignored "
                    "silently, so it is refused; is the file the adapter's own?"
                )
            adapters |= {found["adapter"]} - {None}
        if len(adapters) > 1:
            raise ValueError(
                f"{path} holds several adapters, {', '.join(sorted(adapters))}; save the one that is meant by itself."
            )
        only_whole = {target: _only(tensors, names) for target, names in whole.items()}
        only_lora = {
            module: {part: _only(tensors, names) for part, names in parts.items()} for module, parts in lora.items()
        }
        return cls(path, replace(config, spelling=spelling), tensors, only_whole, only_lora)

    def adapted(self, base: Config) -> Config:
        """The base's config with the adapter's vocabulary, and not tied where the adapter sets the two tied apart.

        PEFT gives an adapted module weights of its own: where it adapts one of embedding and unembedding that are tied
        in the base, the other keeps the base's (PEFT issue 2777).

        Raises:
          ValueError: embedding and unembedding are not of one vocabulary.
        """
        embed, unembed = ends(base)
        tied = base.tie_embeddings and not any(self._owns(name.removesuffix(".weight")) for name in (embed, unembed))
        rows = {name: base.vocab_size for name in (embed, unembed)}
        replaced = self.replaced(base)
        rows |= {name: self.tensors.shape(replaced[name])[0] for name in rows.keys() & replaced.keys()}
        if not tied and rows[embed] != rows[unembed]:
            raise ValueError(
                f"{self.path}: with the adapter, {embed} has {rows[embed]} rows and {unembed} {rows[unembed]}; "
                f"expected one vocabulary (that of the base is {base.vocab_size}). Save both with the adapter: PEFT's "
                "save_pretrained with save_embedding_layers=True."
            )
        return base.replace(vocab_size=rows[embed], tie_embeddings=tied)

    def replaced(self, base: Config) -> Mapping[str, str]:
        """{tensor of the base: tensor that replaces it}: `whole`, and what the base ties to one of them.

        What PEFT does not give weights of its own it sets in place, in both of two tied modules.
        """
        replaced, (embed, unembed) = dict(self.whole), ends(base)
        for one, other in ((embed, unembed), (unembed, embed)):
            if base.tie_embeddings and one in self.whole and not self.config.saves(one.removesuffix(".weight")):
                replaced.setdefault(other, self.whole[one])
        return replaced

    def _owns(self, module: str) -> bool:
        """Whether PEFT gives the module weights of its own, and does not only set those of the base."""
        return module in self.lora or self.config.saves(module)


def ends(config: Config) -> tuple[str, str]:
    """Names of the embedding and the unembedding in a checkpoint."""
    table = TABLES[config.family]
    return table["embed"].name, table["unembed"].name


def _open(path: Path) -> Tensors:
    for name, reader in ((SAFETENSORS, SafeTensors), (TORCH, TorchFiles)):
        if (path / name).is_file():
            return reader(path, name)
    found = ", ".join(sorted(p.name for p in path.iterdir()))
    raise FileNotFoundError(
        f"{path} holds neither {SAFETENSORS} nor {TORCH} (found: {found}). Save the adapter with save_pretrained."
    )


def _only(tensors: Tensors, names: list[str]) -> str:
    """The one of several tensors that mean the same; `original_module` is what the adapter has another one for."""
    copies = [name for name in names if ".original_module." not in name]
    if not copies:
        raise ValueError(
            f"{tensors.file(names[0])} holds {names[0]}, but not what the adapter has in its place; it was not saved "
            "whole. Save it with save_pretrained."
        )
    for name in copies[1:]:
        if not np.array_equal(tensors.read(name), tensors.read(copies[0])):
            raise ValueError(
                f"{tensors.file(name)} holds {copies[0]} and {name}, which mean the same, but differ; expected one of "
                "them. Save the adapter with save_pretrained."
            )
    return copies[0]
