"""The class of transformers that a checkpoint's configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ecotone.extras import how_to_install
from ecotone.merging.models.model import Model
from ecotone.populations.errors import InputError, told

_REMEDY = "Give the architecture as a function (package.module:function) that returns the module."


def named(checkpoint: Model) -> str:
    """The class that a checkpoint's ``config.json`` names.

    Raises:
        InputError: It names none.
    """
    names = (checkpoint.config or {}).get("architectures") or []
    if not names:
        raise InputError(
            f"architecture: 'auto' needs a config.json that names its architectures, found none in {checkpoint.path}.",
            _REMEDY,
        )
    return str(names[0])


def _class_of(checkpoint: Model) -> Any:
    """Transformers' class of that name."""
    name = named(checkpoint)
    try:
        import transformers
    except ImportError as error:
        raise InputError("architecture: 'auto' needs transformers.", f"`{how_to_install('hf')}`.") from error
    kind = getattr(transformers, name, None)
    if kind is None:
        version = transformers.__version__
        raise InputError(
            f"architecture: transformers {version} has no {name!r}, which {checkpoint.path} names.", _REMEDY
        )
    return kind


def outline(checkpoint: Model) -> nn.Module:
    """The module that ``auto`` makes of a checkpoint, without memory for its weights.

    Raises:
        InputError: There is no ``config.json``, or transformers is not installed, lacks the class, or cannot make it.
    """
    kind = _class_of(checkpoint)
    try:
        config = kind.config_class.from_pretrained(checkpoint.files, local_files_only=True)
        with torch.device("meta"):
            module = kind(config)
            if checkpoint.rows is not None:
                module.resize_token_embeddings(checkpoint.rows, mean_resizing=False)
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
        InputError: There is no ``config.json``, or transformers is not installed or lacks the class.
    """
    import transformers

    kind = _class_of(checkpoint)
    option = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    with _no_progress_bars(transformers):
        module = kind.from_pretrained(checkpoint.files, local_files_only=True, **{option: dtype or "auto"})
        if checkpoint.rows is not None:
            module.resize_token_embeddings(checkpoint.rows, mean_resizing=False)
    assert isinstance(module, nn.Module)
    return module


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


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
