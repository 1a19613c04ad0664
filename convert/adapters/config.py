"""PEFT's adapter_config.json: which modules of a base an adapter changes, and by how much.

Every field of the file is read, known to have no effect on inference, or refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from convert.json_files import Fields, read_fields, refuse_unknown
from convert.multimodal import Spelling

Names = tuple[str, ...] | str  # ends of modules' names, or one regular expression of whole names
T = TypeVar("T")

FILE = "adapter_config.json"
# Fields without effect on a forward pass: bookkeeping, training, and how the tensors were started.
IGNORED = frozenset(
    """auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config lora_dropout
    lora_ga_config megatron_core merge_weights peft_version qalora_group_size revision runtime_config
    velora_config""".split()
)
READ = frozenset(
    """peft_type task_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora target_modules exclude_modules
    layers_to_transform layers_pattern modules_to_save ensure_weight_tying bias lora_bias init_lora_weights""".split()
)
# Fields that change what the adapter computes in ways that are not supported, unless they are null, false or empty.
UNSUPPORTED = frozenset(
    """alora_invocation_tokens arrow_config enable_lora fan_in_fan_out kasa_config layer_replication megatron_config
    monteclora_config target_parameters trainable_token_indices use_bdlora use_qalora""".split()
)
# Others ("pissa", "olora", "corda", "loftq", "lora_ga") take from the base's weights what they put into the adapter.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
BIASES = ("none", "all", "lora_only")
MERGE = "Merge the adapter with PEFT (merge_and_unload, save_pretrained), if it can be merged, and give that model."


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says.

    Attributes:
      rank, alpha: of a module's LoRA, where no pattern says otherwise.
      rank_pattern, alpha_pattern: the same by regular expression of the ends of modules' names; the first match counts.
      rslora: the scale is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732), not alpha / rank.
      dora: weights have a magnitude that is trained on its own (Liu et al. 2024, arXiv:2402.09353).
      targets, excluded: modules that have LoRA, and among those modules that have none; targets None: it is not said.
      layers: only modules in these layers have LoRA; empty: no matter where they are.
      layers_pattern: names of lists of layers, as regular expressions; empty: any.
      saved: ends of the names of modules whose tensors the adapter replaces.
      tying: where the base ties unembedding and embedding, the adapter changes both alike.
      bias: biases that the adapter replaces: "none", "all", or those of modules with LoRA, "lora_only".
      lora_bias: LoRA adds to the biases of its modules as well.
      base: what the adapter was trained on, for messages.
      spelling: how it names the decoder's modules; all methods take the names that a decoder alone has.
    """

    rank: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    targets: Names | None = None
    excluded: Names = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tying: bool = False
    bias: str = "none"
    lora_bias: bool = False
    base: str | None = None
    spelling: Spelling = Spelling()

    def rank_of(self, module: str) -> int:
        """Rank of the module's LoRA."""
        return _by_pattern(self.rank_pattern, self.spelling.theirs(module), self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of the product of the module's two LoRA matrices."""
        rank, own = self.rank_of(module), self.spelling.theirs(module)
        return _by_pattern(self.alpha_pattern, own, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether the adapter replaces the module's tensors (PEFT `_set_trainable`)."""
        return self.spelling.theirs(module).endswith(self.saved)

    def has_lora(self, module: str) -> bool:
        """Whether the module is to have LoRA (PEFT `check_target_module_exists`)."""
        module = self.spelling.theirs(module)
        if self.targets is None or not _names(self.targets, module) or _names(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if not self.layers or isinstance(self.targets, str) or module in self.targets:
            return True
        pattern = "|".join(self.layers_pattern) or r"[^.]*"
        layer = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers


def is_adapter(path: Path) -> bool:
    """Whether the directory `path` is an adapter's."""
    return (Path(path) / FILE).is_file()


def read_adapter_config(path: Path) -> AdapterConfig:
    """The config of the adapter directory `path`.

    Raises:
      FileNotFoundError: no such directory, or no adapter_config.json in it.
      ValueError: adapter_config.json is not JSON or describes an adapter that is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"No adapter directory at {path}. Give a local directory that holds {FILE} and adapter_model.safetensors."
        )
    file = path / FILE
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise FileNotFoundError(f"{path} holds no {FILE} (found: {found}); is it an adapter that PEFT saved?")
    fields = read_fields(file)
    try:
        return adapter_config(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def adapter_config(fields: Fields) -> AdapterConfig:
    """An `AdapterConfig` from the fields of adapter_config.json. ValueError names what is unknown or unsupported."""
    _check_supported(fields)
    given = {name: value for name, value in fields.items() if value is not None}
    targets = given.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = r".*_proj"  # what linear layers other than the unembedding are called in all families
    return AdapterConfig(
        rank=_positive("r", given.get("r", 8), int),
        alpha=_positive("lora_alpha", given.get("lora_alpha", 8), (int, float)),
        rank_pattern=_patterns("rank_pattern", given, int),
        alpha_pattern=_patterns("alpha_pattern", given, (int, float)),
        rslora=bool(given.get("use_rslora")),
        dora=bool(given.get("use_dora")),
        targets=None if targets is None else _names_of("target_modules", targets),
        excluded=_names_of("exclude_modules", given.get("exclude_modules", [])),
        layers=_list_of("layers_to_transform", given.get("layers_to_transform", []), int),
        layers_pattern=_list_of("layers_pattern", given.get("layers_pattern") or [], str),
        saved=_list_of("modules_to_save", given.get("modules_to_save", []), str),
        tying=bool(given.get("ensure_weight_tying")),
        bias=given.get("bias", "none"),
        lora_bias=bool(given.get("lora_bias")),
        base=given.get("base_model_name_or_path"),
    )


def _check_supported(fields: Fields) -> None:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={fields.get('peft_type')!r} is not supported; expected 'LORA'. {MERGE}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"task_type={fields['task_type']!r} is not supported; choose an adapter that was trained for 'CAUSAL_LM'."
        )
    refuse_unknown(fields, READ | IGNORED | UNSUPPORTED, what="adapter")
    for name in sorted(UNSUPPORTED & fields.keys()):
        if fields[name]:
            raise ValueError(f"{name}={fields[name]!r} is not supported; expected null or false. {MERGE}")
    start = fields.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} is not supported: it takes from the base's weights what the adapter then "
            "holds. Save the adapter as plain LoRA (PEFT's save_pretrained with "
            f"path_initial_model_for_weight_conversion), or: {MERGE}"
        )
    if fields.get("bias", "none") not in BIASES:
        raise ValueError(f"bias={fields['bias']!r} is not supported; expected one of {', '.join(map(repr, BIASES))}.")


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value whose key matches the end of the module's name (PEFT `get_pattern_key`)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(names: Names, module: str) -> bool:
    """Whether `names` name the module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _names_of(name: str, value: Any) -> Names:
    if isinstance(value, str):
        _check_pattern(name, value)
        return value
    return _list_of(name, value, str)


def _list_of(name: str, value: Any, kind: type[T]) -> tuple[T, ...]:
    """A list as a tuple; one element alone, where PEFT allows that, as a tuple of it."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, kind) for each in values):
        raise ValueError(f"{name}={value!r}; expected a list of {'numbers' if kind is int else 'names'}.")
    return tuple(values)


def _patterns(name: str, fields: Fields, kind: Any) -> dict[str, Any]:
    patterns = fields.get(name, {})
    if not isinstance(patterns, dict):
        raise ValueError(f"{name}={patterns!r}; expected an object, regular expression to number.")
    for key, value in patterns.items():
        _check_pattern(name, key)
        _positive(f"{name}[{key!r}]", value, kind)
    return patterns


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error}).") from error


def _positive(name: str, value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
        raise ValueError(f"{name}={value!r}; expected a positive {'integer' if kind is int else 'number'}.")
    return value
