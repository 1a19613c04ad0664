"""`Model`, the bundle of config, parameters and tokenizer that every method takes, and `load`, which makes one."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import convert
from jaxmech import checkpoint
from jaxmech.config import Config
from jaxmech.interventions import Interventions
from jaxmech.model import Llama, Params, check_capture, check_params, forward, unembed
from jaxmech.pairs import Pairs
from jaxmech.sharding import parameter_shardings


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder with its parameters and tokenizer.

    A pytree of its parameters: give it to functions under `jax.jit` as an argument. They can use a model from around
    them, too, but then all weights become constants of the program, which for a large one takes minutes to compile and
    the memory several times. Models of one config are alike as trees, whatever their tokenizers are, so that they share
    what is compiled and `jax.tree.map` takes several; a model that a jitted function returns may have the tokenizer of
    the first one that it was called with.

    `params` is {"params": tree}, what `module.init` would return, for users of jit, vmap and grad:
    `model.module.apply(model.params, tokens, interventions, capture)`. NumPy arrays in it are put on the device.
    """

    config: Config
    params: Any
    tokenizer: Any = None

    def __post_init__(self):
        """ValueError if the parameters are not those of the config: they would be used wrongly, or in part."""
        if not isinstance(self.params, Mapping) or set(self.params) != {"params"}:
            found = list(self.params) if isinstance(self.params, Mapping) else type(self.params).__name__
            raise ValueError(f"Model: params is {found}; expected {{'params': tree}}, as module.init returns it.")
        check_params(self.config, self.params, dtypes=False)
        on_device = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, self.params)
        object.__setattr__(self, "params", on_device)

    def __repr__(self) -> str:
        c = self.config
        shape = f"{c.num_layers} layers, {c.num_heads} heads, width {c.width}, vocabulary {c.vocab_size}"
        return f"Model({c.family}, {shape}, {c.dtype})"

    @property
    def module(self) -> Llama:
        """The Flax module that declares `params`."""
        return Llama(self.config)

    @property
    def weights(self) -> Params:
        """The parameter tree itself, as the pure functions of `jaxmech.model` take it."""
        return self.params["params"]

    def __call__(
        self,
        tokens: jax.Array | np.ndarray,
        interventions: Interventions | None = None,
        capture: Sequence[str] = (),
        *,
        capture_at: jax.Array | np.ndarray | None = None,
        logits_at: jax.Array | np.ndarray | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and captured activations; see `jaxmech.model.Llama.__call__`. Compiled once per shape.

        Args:
          tokens: token ids, int [B, T], right-padded; inside jit, where they are traced, ids are not checked.
          interventions: what to patch or knock out.
          capture: sites to return.
          capture_at: int [B, P]; return activations at these positions of each prompt only, [L, B, P, ...].
          logits_at: int [B]; compute logits at this position of each prompt only, [B, V]. Logits of all tokens of many
            prompts and a large vocabulary need much memory.
          remat: for gradients through large models: the backward pass keeps each layer's input alone and computes the
            layer again, a third more work in a fraction of the memory.

        Raises:
          ValueError: ids outside the vocabulary, an unknown site, positions outside the prompts, or an intervention
            that fails its check.
        """
        tokens = check_tokens(self.config, tokens, any_length=True)
        if interventions is not None:
            if not isinstance(interventions, Interventions):
                raise TypeError(
                    f"interventions is a {type(interventions).__name__}; expected jm.Interventions(z=jm.Patch(...))."
                )
            interventions.check(self.config, tokens.shape)  # values are concrete here, inside jit they are not
        capture = check_capture(capture)
        _check_positions("capture_at", capture_at, tokens.shape, axes=2)
        _check_positions("logits_at", logits_at, tokens.shape, axes=1)
        arguments = self.config, self.weights, tokens, interventions, capture_at, logits_at
        return _apply(*arguments, capture=capture, remat=bool(remat))

    def unembed(self, resid: jax.Array | np.ndarray) -> jax.Array:
        """Logits, float32 [..., V], of a residual stream `resid` [..., D], as if it were the last: the logit lens.

        Includes the final norm. For what a part of the stream adds to them, take the difference of two streams' logits.

        Raises:
          ValueError: the last axis is not that of a stream.
        """
        if np.shape(resid)[-1:] != (self.config.width,):
            raise ValueError(f"resid has shape {np.shape(resid)}; expected [..., D] with D = {self.config.width}.")
        return _unembed(self.config, self.weights, jnp.asarray(resid, self.config.compute_dtype))


@dataclass(frozen=True)
class _Static:
    """What a model is beside its parameters; equal to that of another model of the same config."""

    config: Config
    tokenizer: Any = field(compare=False)


def _with_params(static: _Static, children: Iterable[Any]) -> Model:
    """A model as it is inside of jit and grad, where parameters are anything: neither checked nor put on a device."""
    model, (params,) = object.__new__(Model), children
    for name, value in {"config": static.config, "tokenizer": static.tokenizer, "params": params}.items():
        object.__setattr__(model, name, value)
    return model


jax.tree_util.register_pytree_with_keys(
    Model,
    lambda model: ([(jax.tree_util.GetAttrKey("params"), model.params)], _Static(model.config, model.tokenizer)),
    _with_params,
)


@partial(jax.jit, static_argnames=("config", "capture", "remat"))
def _apply(config: Config, weights: Params, tokens, interventions, capture_at, logits_at, capture, remat):
    options = {"capture": capture, "capture_at": capture_at, "logits_at": logits_at, "remat": remat}
    return forward(config, weights, tokens, interventions, **options)


_unembed = partial(jax.jit, static_argnames="config")(unembed)


def _check_positions(name: str, positions: Any, tokens_shape: tuple[int, ...], axes: int) -> None:
    """ValueError unless they are None or positions in each prompt; inside jit, only their shape is checked."""
    if positions is None:
        return
    count, length = tokens_shape
    shape, dtype = np.shape(positions), jax.numpy.result_type(positions)
    if len(shape) != axes or shape[0] != count or not np.issubdtype(dtype, np.integer):
        expected = f"integers [{count}{', P' * (axes - 1)}]"
        raise ValueError(f"{name} has shape {shape} and dtype {dtype}; expected {expected}.")
    if isinstance(positions, Tracer):
        return
    positions = np.asarray(positions)  # an operator of JAX's would be traced where one is closed over inside jit
    least, most = positions.min(), positions.max()
    if least < 0 or most >= length:
        raise ValueError(f"{name} reaches from {least} to {most}; the prompts have positions 0..{length - 1}.")


def check_tokens(config: Config, tokens: jax.Array | np.ndarray, *, any_length: bool = False) -> Any:
    """Token ids [B, T] as int32. Warns once of prompts longer than the context that the model's config states.

    Args:
      any_length: allow prompts so long that their RoPE frequencies depend on their length ("dynamic", "longrope"); the
        methods, in which prompts of different lengths share one cache, do not.

    Raises:
      ValueError: the rank is wrong, an id lies outside the vocabulary, or the prompts are too long.
    """
    traced = isinstance(tokens, Tracer)
    tokens = tokens if traced else np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; expected integers [B, T].")
    if not traced and tokens.size and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
        raise ValueError(
            f"token ids reach from {tokens.min()} to {tokens.max()}; this model's vocabulary has ids "
            f"0..{config.vocab_size - 1}. Were the prompts made with another tokenizer?"
        )
    rope = min(config.ropes, key=lambda rope: rope.longest)
    if not any_length and tokens.shape[1] > rope.longest:
        raise ValueError(
            f"The prompts have {tokens.shape[1]} tokens. This model's RoPE ({rope.kind}) depends on the length of "
            f"prompts over {rope.longest} tokens, and the methods do not support that; shorten the prompts."
        )
    if not traced and tokens.shape[1] > (context := _context(config)):
        _warn_of_length(tokens.shape[1], context)
    return tokens.astype(np.int32)


def _context(config: Config) -> int:
    """Context length in tokens. Of a scaled RoPE, checkpoints state it with or without the scaling: the longer one."""
    rope = config.rope
    before = config.max_positions if rope.kind in ("linear", "dynamic") else rope.original_max_positions
    return max(config.max_positions, int(rope.factor * before) if rope.kind not in ("default", "none") else 0)


@lru_cache  # one sweep checks its prompts many times
def _warn_of_length(length: int, context: int) -> None:
    warnings.warn(
        f"The prompts have {length} tokens, more than the context of {context} that this model's config states "
        "(max_positions). Unless it was trained on as many, what it says of them means little; shorten the prompts.",
        stacklevel=4,
    )


def check_prompts(config: Config, pairs: Pairs) -> np.ndarray:
    """The clean prompts of `pairs` as `check_tokens` has them; ValueError if a label lies outside the vocabulary."""
    if (labels := pairs.labels).max() >= config.vocab_size:
        raise ValueError(
            f"labels reach from {labels.min()} to {labels.max()}; this model's vocabulary has ids "
            f"0..{config.vocab_size - 1}. Were the pairs made with another tokenizer?"
        )
    return check_tokens(config, pairs.clean)


def load(
    path: str | Path,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    *,
    precision: str = "highest",
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> Model:
    """Loads a Hugging Face checkpoint (safetensors or PyTorch's files), Meta's, or one that `python -m convert` wrote.

    Args:
      path: local directory, or name of a model on the Hugging Face Hub ("organisation/model"), which is downloaded to
        its cache, without any code; a directory that exists is preferred.
      dtype: dtype of parameters and activations, "float32", "bfloat16" or "float16".
      adapter: directory, or name on the Hub, of a LoRA adapter that PEFT saved, for a Hugging Face directory; it is
        merged in, in float32, before parameters are cast. If it holds a tokenizer, that is the model's.
      precision: how products of float32 numbers are computed: "highest" in float32, "BF16_BF16_F32_X3" and others
        faster on GPUs and TPUs; see `jaxmech.Config` and docs/precision.md.
      mesh: devices that hold the model and run all methods, as copies, split, or both (see `jaxmech.sharding`);
        parameters are split as they are read, so that the model need not fit on one. Make it with `jaxmech.make_mesh`.
        None: one device.
      tokenizer: in place of the checkpoint's own, which is not read then: a Hugging Face tokenizer, or a directory that
        one was saved in.
      revision: branch, tag or commit of a model on the Hub, such as a step of its training; None: the main branch.

    Returns:
      The model; `tokenizer` is None if the directory holds none.

    Raises:
      FileNotFoundError: the directory or a file in it is missing, or the Hub has no such model.
      OSError: the Hub cannot be reached.
      ValueError: the checkpoint is damaged or describes a model that is not supported, the adapter does not fit it, no
        tokenizer is where `tokenizer` says, or the mesh has no axis "model".
    """
    path, adapter = convert.local_path(path, revision), None if adapter is None else convert.local_path(adapter)
    changes = {"dtype": dtype, "param_dtype": dtype, "precision": precision}
    config, tokenizer = describe(path, adapter, tokenizer, **changes)  # first: what is refused is refused at once
    shardings = None if mesh is None else parameter_shardings(config, mesh)
    if checkpoint.is_checkpoint(path):
        return Model(config, checkpoint.read_params(path, config, shardings), tokenizer)
    return Model(config, convert.read_params(path, config, adapter=adapter, shardings=shardings), tokenizer)


def describe(path: Path, adapter: Path | None = None, tokenizer: Any = None, **changes: Any) -> tuple[Config, Any]:
    """Config and tokenizer of the checkpoint in the directory `path`, of which no weights are read.

    Args:
      adapter: directory of an adapter that is merged into it.
      tokenizer: in place of its own; see `load`.
      changes: fields of `Config`, such as dtype.

    Raises:
      As `load`.
    """
    own = path
    if checkpoint.is_checkpoint(path):
        if adapter is not None:
            raise ValueError(
                f"{path} is an Orbax checkpoint, adapter {adapter} is for one of Hugging Face. Merge it when that is "
                "converted: python -m convert --model BASE --adapter DIR --out OUT."
            )
        config, own = checkpoint.read_config(path).replace(**changes), path / checkpoint.TOKENIZER
    else:
        config = convert.read_config(path, adapter, **changes)
    if tokenizer is None:
        return config, convert.read_tokenizer(own, config, adapter)
    if not isinstance(tokenizer, str | Path):
        return config, tokenizer
    if (found := convert.read_tokenizer(Path(tokenizer), config)) is None:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} is no directory with a tokenizer; expected one, or a tokenizer such as "
            "AutoTokenizer.from_pretrained(...)."
        )
    return config, found
