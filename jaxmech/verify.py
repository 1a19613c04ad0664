"""Whether a model computes here what it computes in transformers: the same prompts through both, site by site.

Owns the procedure and its report; `deviations` says how far numbers may be apart, `hf_sites` runs transformers' model.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import convert
from jaxmech import checkpoint, hf_sites, rope
from jaxmech.config import Config
from jaxmech.deviations import Activations, Comparison, compare_bfloat16, compare_float32, largest_deviation
from jaxmech.interventions import SITES
from jaxmech.loading import Model, check_tokens, load
from jaxmech.provenance import Provenance, hashing

FREQUENCY = 2e-6  # of each frequency: powers differ in the last bits, and "dynamic" takes them of a float32 base
SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
NO_TORCH = "torch is not installed; pip install torch"
NO_REFERENCE = "name the Hugging Face directory of the same model (--against)"


@dataclass(frozen=True)
class Check:
    """Something beside activations that holds or does not."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
      checks: of the checkpoint's parameters and of the files that it comes from.
      comparisons: in the order of computation, float32 first; none if numbers were not compared.
      notes: what was not compared, and why.
    """

    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that was looked at holds."""
        return all(found.ok for found in (*self.checks, *self.comparisons))

    @property
    def first_deviation(self) -> Comparison | None:
        """The first site that deviates, in the order of computation."""
        sites = (*SITES, "logits")
        return next((found for found in self.comparisons if found.site in sites and not found.ok), None)

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if first := self.first_deviation:
            return f"In the order of computation, the first that deviates is {first.where} ({first.dtype})."
        if bad := [found.site for found in self.comparisons if not found.ok]:
            return (
                f"No site deviates on these prompts, but {' and '.join(bad)} of RoPE do; on other prompts it will show."
            )
        if not self.ok:
            return f"Does not hold: {'; '.join(check.name for check in self.checks if not check.ok)}."
        return (
            "Agrees with transformers at every site of every layer." if self.comparisons else "What was checked holds."
        )

    def worst(self, dtype: str) -> list[Comparison]:
        """For each site that was compared in this dtype, the layer that deviates most."""
        by_site: dict[str, list[Comparison]] = {}
        for found in self.comparisons:
            if found.dtype == dtype:
                by_site.setdefault(found.site, []).append(found)
        return [max(layers, key=lambda found: found.excess) for layers in by_site.values()]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; a deviation that is not finite is null."""
        comparisons = [dataclasses.asdict(found) | {"ok": found.ok} for found in self.comparisons]
        for found in comparisons:
            found["deviation"] = found["deviation"] if np.isfinite(found["deviation"]) else None
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "first_deviation": None if self.first_deviation is None else self.first_deviation.where,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "notes": list(self.notes),
            "comparisons": comparisons,
        }


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    prompts: int = 2,
    length: int = 64,
    seed: int = 0,
    text: str | None = None,
) -> Report:
    """Compares a model with transformers' model of a Hugging Face directory, and its files with those it was made from.

    Without torch, or without such a directory, numbers are not compared; shapes, dtypes, finite values and stored
    hashes are checked in any case. One model is in memory at a time.

    Args:
      path: what `load` reads.
      against: Hugging Face directory of the same model; `path` itself if that is one and there is no adapter.
      adapter: as in `load`; `against` then holds the merged model.
      prompts, length, seed: so many prompts of so many random tokens.
      text: a prompt to take instead of random ones; needs a tokenizer in `path`.

    Raises:
      FileNotFoundError: a directory or a file in it is missing.
      ValueError: a model cannot be read, is damaged or not finite; they differ in size; or there are no prompts.
    """
    path, against = convert.local_path(path), None if against is None else convert.local_path(against)
    if against is None and adapter is None and (path / "config.json").is_file():
        against = path
    reference = None if against is None else _reference_config(against)
    compared = reference is not None and torch_installed()
    checks, notes = _check_files(path, against, compared=compared)
    if against is None or reference is None or not compared:
        if not checkpoint.is_checkpoint(path):
            load(path, "bfloat16", adapter)  # which checks every parameter
        reason = NO_REFERENCE if against is None else NO_TORCH
        return Report(checks, notes=(*notes, f"Numbers were not compared with transformers' model: {reason}."))
    model = load(path, adapter=adapter, precision="highest")
    config = model.config
    _check_sizes(config, reference, against)
    tokens = _tokens(model, prompts, length, seed, text)
    ours = _activations(model, tokens)
    del model
    half = _activations(load(path, "bfloat16", adapter), tokens)
    stored = _stored_dtype(path)
    if stored is not None:
        notes += (f"{path} stores {stored}, to which transformers' weights were rounded as well.",)
    comparisons = tuple(_compare(config, ours, half, against, tokens, stored))
    return Report(checks, comparisons, (*notes, *_unseen(config, tokens.shape[1])))


def torch_installed() -> bool:
    """Whether torch can be imported; it is not imported yet."""
    return find_spec("torch") is not None


def _stored_dtype(path: Path) -> str | None:
    """The dtype to which a conversion to Orbax has rounded the parameters at `path`; None if they are float32."""
    dtype = checkpoint.read_config(path).param_dtype if checkpoint.is_checkpoint(path) else "float32"
    return None if dtype == "float32" else dtype


def _reference_config(against: Path) -> Config:
    if checkpoint.is_checkpoint(against):
        raise ValueError(
            f"{against} is an Orbax checkpoint, which transformers does not read; name the Hugging Face directory."
        )
    return convert.read_config(against)


def _check_sizes(config: Config, reference: Config, against: Path) -> None:
    for name in SIZES:
        ours, theirs = getattr(config, name), getattr(reference, name)
        if ours != theirs:
            raise ValueError(f"{against} has {name}={theirs}, the model {ours}; name the directory of the same model.")


def _check_files(path: Path, against: Path | None, *, compared: bool) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Checks what an Orbax checkpoint at `path` holds, and whether it was made from the files at hand; and notes.

    Where numbers are compared, other files are no more than a note: the same model may be saved in other files.
    """
    checks = (Check("shapes, dtypes, finite values", True, "all parameters"),)  # where they are not, this raises
    if not checkpoint.is_checkpoint(path):
        return checks, ()
    checkpoint.check(path, finite=True)
    provenance = checkpoint.read_provenance(path)
    files = _source_files(provenance, against)
    if not any(file.is_file() for file in files.values()):
        source = provenance.source or "what it was converted from"
        return checks, (f"Hashes of files were not compared: {source} is not here; name its directory (--against).",)
    with hashing({name: file for name, file in files.items() if file.is_file()}) as hashes:
        found = hashes.result()
    changed = [str(files[name]) for name, stored in provenance.files.items() if found.get(name) != stored]
    if changed and compared:
        return checks, (f"{path} was converted from other files than {', '.join(changed)} (sha256).",)
    detail = f"missing or changed: {', '.join(changed)}" if changed else f"{len(files)} files"
    return (*checks, Check("sha256 of the files it was converted from", not changed, detail)), ()


def _source_files(provenance: Provenance, against: Path | None) -> dict[str, Path]:
    """Where the files that a checkpoint was made from should be, by the names under which their hashes are stored.

    If an adapter was merged, `against` holds the result, not a source.
    """
    folder = Path(provenance.source) if against is None or provenance.adapter else against
    adapter = Path(provenance.adapter)
    return {
        name: adapter / name.removeprefix("adapter/") if name.startswith("adapter/") else folder / name
        for name in provenance.files
    }


def _compare(
    config: Config, ours: Activations, half: Activations, against: Path, tokens: np.ndarray, stored: str | None
) -> Iterator[Comparison]:
    """All comparisons, in the order of computation. `half` are ours in bfloat16; `stored` see `_stored_dtype`."""
    theirs = hf_sites.load_hf(against, "float32", stored)
    yield from _compare_rope(config, theirs, tokens.shape[1])
    exact = hf_sites.activations(theirs, tokens)
    del theirs
    yield from compare_float32(ours, exact)
    theirs = hf_sites.load_hf(against, "bfloat16")
    kinds = ("eager", "sdpa") if hf_sites.has_sdpa(theirs) else ("eager",)
    yield from compare_bfloat16(half, exact, [hf_sites.activations(theirs, tokens, kind) for kind in kinds])


def _compare_rope(config: Config, theirs: Any, length: int) -> Iterator[Comparison]:
    """RoPE's numbers themselves, since short prompts hide how far off they are at long ones."""
    frequencies, factors = [], []
    for layer in range(config.num_layers):
        ours = config.rope_of(layer)
        if ours.kind == "none":
            continue
        for tokens in [length] + ([2 * int(ours.longest)] if ours.longest < float("inf") else []):
            frequency, factor = hf_sites.rotation(theirs, layer, tokens)
            found = rope.inverse_frequencies(ours, config.head_dim, tokens)
            frequencies.append(largest_deviation(found / frequency, np.ones_like(frequency)))
            factors.append(abs(ours.attention_factor / factor - 1))
    if frequencies:
        yield Comparison("float32", "inv_freq", None, max(frequencies), FREQUENCY)
        yield Comparison("float32", "attention_factor", None, max(factors), FREQUENCY)


def _activations(model: Model, tokens: np.ndarray) -> Activations:
    logits, captured = model(tokens, capture=SITES)
    return {site: np.asarray(x, np.float32) for site, x in (captured | {"logits": logits}).items()}


def _tokens(model: Model, prompts: int, length: int, seed: int, text: str | None) -> np.ndarray:
    """The prompts, int32 [B, T]."""
    if text is not None:
        if model.tokenizer is None:
            raise ValueError(f"text={text!r}, but the model holds no tokenizer; copy tokenizer.json there.")
        tokens = np.array([model.tokenizer(text)["input_ids"]], np.int32)
        if not tokens.size:
            raise ValueError(f"text={text!r} has no tokens; give a longer one.")
        return check_tokens(model.config, tokens, any_length=True)
    for name, value in (("prompts", prompts), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}={value}; expected 1 or more.")
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (prompts, length), np.int32)


def _unseen(config: Config, length: int) -> tuple[str, ...]:
    """Notes on what prompts of that length cannot show."""
    if config.window and length <= config.window:
        return (
            f"Prompts of {length} tokens lie within the attention windows of {config.window} tokens; to compare these "
            f"too, give --length {config.window + 1} or more.",
        )
    return ()
