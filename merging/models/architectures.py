"""The class of transformers that a checkpoint's configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ecotone.extras import how_to_install
from ecotone.merging.models.checkpoint import check_index
from ecotone.merging.models.configs import GENERATION
from ecotone.merging.models.model import Model
from ecotone.populations.errors import InputError, sentence, told

OLDEST = 5
"""The first major version of transformers whose conversions of checkpoints are followed."""
_REMEDY = "Give the architecture as a function that returns the module: architecture: {call: package.module:function}."

_CHOICES = "Choose the config of 'base' or 'first' (models.config)."


def named(checkpoint: Model) -> str:
    """The class that a checkpoint's ``config.json`` names.

    Raises:
        InputError: It names none.
    """
    config = checkpoint.config or {}
    nested = config.get("text_config")  # transformers 4 wrote there what class some vision-language models are of
    names = config.get("architectures") or (nested.get("architectures") if isinstance(nested, dict) else None)
    if not names:
        raise InputError(
            f"architecture: 'auto' needs a config.json that names its architectures, found none in {checkpoint.path}.",
            _REMEDY,
        )
    return str(names[0])


def _transformers() -> Any:
    """The package.

    Raises:
        InputError: It is not installed, or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("architecture: 'auto' needs transformers.", f"`{how_to_install('hf')}`.") from error
    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise InputError(
            f"architecture: 'auto' needs transformers {OLDEST} or newer, found {transformers.__version__}, which loads "
            "some checkpoints otherwise.",
            f"`{how_to_install('hf')}`. Or {_REMEDY[0].lower()}{_REMEDY[1:]}",
        )
    return transformers


def _class_of(checkpoint: Model) -> Any:
    """Transformers' class of that name."""
    name = named(checkpoint)
    transformers = _transformers()
    try:
        kind = getattr(transformers, name, None)
    except Exception as error:  # of the imports of any family
        raise InputError(f"architecture: {name} of transformers cannot be imported: {told(error)}.") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        config = checkpoint.config or {}
        own = " Its own code (auto_map) is never run." if config.get("auto_map") else ""
        raise InputError(
            f"architecture: transformers {transformers.__version__} has no {name!r} (model_type "
            f"{config.get('model_type')!r}), which {checkpoint.path} names.{own}",
            f"Install a transformers that has it. Or {_REMEDY[0].lower()}{_REMEDY[1:]}",
        )
    return kind


def outline(checkpoint: Model) -> nn.Module:
    """The module that ``auto`` makes of a checkpoint, without memory for its weights.

    Raises:
        InputError: There is no ``config.json``, or transformers is not installed, is too old, lacks the class, or
            cannot make it; or the index of the checkpoint's shards lacks what transformers reads.
    """
    kind = _class_of(checkpoint)
    check_index(checkpoint.files)
    try:
        with torch.device("meta"):
            module = _configured(kind, checkpoint)
        if hasattr(module, "tie_weights"):
            module.tie_weights()  # transformers 5.0 does not where there is no memory
    except Exception as error:  # of the code of any family
        raise InputError(
            f"architecture: {kind.__name__} cannot be made of the config.json in {checkpoint.path}: {told(error)}.",
            _REMEDY,
        ) from error
    assert isinstance(module, nn.Module)
    return module


def loaded(checkpoint: Model, dtype: torch.dtype | None) -> nn.Module:
    """The module that ``auto`` makes of a checkpoint, as ``from_pretrained`` loads it.

    Args:
        checkpoint: The model.
        dtype: Floating-point type of its tensors; None for that of the configuration.

    Raises:
        InputError: There is no ``config.json``, or transformers is not installed, is too old, lacks the class, or
            cannot load the checkpoint.
    """
    kind = _class_of(checkpoint)
    check_index(checkpoint.files)
    with _no_progress_bars(_transformers()):
        try:
            module = kind.from_pretrained(checkpoint.files, local_files_only=True, dtype=dtype or "auto")
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the code of any family
            raise InputError(
                f"architecture: {kind.__name__} of transformers cannot load {checkpoint.path}: {sentence(told(error))}",
                _REMEDY,
            ) from error
        _resize(module, checkpoint)
    assert isinstance(module, nn.Module)
    return module


def _configured(kind: Any, checkpoint: Model) -> Any:
    """A module of a class with the configuration of a checkpoint, and as many token embeddings as it has."""
    module = kind(kind.config_class.from_pretrained(checkpoint.files, local_files_only=True))
    _resize(module, checkpoint)
    return module


def _resize(module: Any, checkpoint: Model) -> None:
    if checkpoint.rows is not None:
        module.resize_token_embeddings(checkpoint.rows, mean_resizing=False)


def sharing(checkpoint: Model, module: nn.Module) -> nn.Module:
    """A module of a checkpoint's own config whose tensors are those of ``module``, as the same objects.

    So it computes with the weights that ``module`` has at the time. It takes the memory of the buffers that its config
    makes (such as the frequencies of rotary embeddings), and nothing else.

    Args:
        checkpoint: The model whose ``config.json`` and ``generation_config.json`` it has.
        module: A module that ``loaded`` has made of a model with tensors of the same names and shapes.

    Raises:
        InputError: transformers cannot make it, or its tensors have other names or shapes.
    """
    kind: Any = _class_of(checkpoint)
    if kind.config_class is getattr(type(module), "config_class", None):
        kind = type(module)  # with or without a head, as that of merges
    state = module.state_dict(keep_vars=True)
    like = next(tensor for tensor in state.values() if tensor.is_floating_point())
    try:
        with _without_parameters(), _default_type(like.dtype):
            made = _configured(kind, checkpoint)
    except Exception as error:  # of the code of any family
        raise InputError(
            f"config: {kind.__name__} cannot be made of the config.json in {checkpoint.path}: {told(error)}.", _CHOICES
        ) from error
    own = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    others = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != others:
        name = min({*own.items()} ^ {*others.items()})[0]
        raise InputError(
            f"config: by the config.json in {checkpoint.path}, {name!r} has shape {own.get(name)}; merges have "
            f"{others.get(name)}.",
            _CHOICES,
        )
    for part in made.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(like.device))
    made.requires_grad_(False).load_state_dict(state, assign=True)
    _generates_like(checkpoint, made)
    assert isinstance(made, nn.Module)
    return made.eval()


def _generates_like(checkpoint: Model, module: Any) -> None:
    """Give a module the generation config of a checkpoint, as ``from_pretrained`` does."""
    from transformers import GenerationConfig

    if getattr(module, "generation_config", None) is not None and (checkpoint.files / GENERATION).is_file():
        with suppress(OSError, TypeError, ValueError):  # one that cannot be read counts as none there, too
            module.generation_config = GenerationConfig.from_pretrained(checkpoint.files, local_files_only=True)


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Have modules keep shapes of parameters only: each loses its memory as it is given to its module."""

    def emptied(_module: nn.Module, _name: str, parameter: Any) -> Any:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _no_progress_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
