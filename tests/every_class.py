"""Every model type of transformers, at the sizes of its default configuration, without weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

from ecotone.merging.models.names import Names, fitted

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "depth")
_OF_LAYERS = ("layer_types", "mlp_layer_types")
FEW = 4


class CannotBeMadeError(Exception):
    """The default configuration makes no module here."""


@cache
def classes() -> dict[str, tuple[str, ...]]:
    """By model type, the names of its classes. Those that do most come first: they generate, or have another head."""
    found: dict[str, set[str]] = {}
    for mapping in (getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")):
        for key, names in mapping.items():
            found.setdefault(key, set()).update((names,) if isinstance(names, str) else names)
    kinds = {
        key: tuple(sorted((one for one in names if one and not one.endswith("Config")), key=_rank, reverse=True))
        for key, names in found.items()
    }
    return {key: names for key, names in sorted(kinds.items()) if names}


def _rank(name: str) -> tuple[int, str]:
    return 4 * ("ForConditionalGeneration" in name) + 3 * ("ForCausalLM" in name) + 2 * ("For" in name), name


def module_of(names: Sequence[str]) -> Any:
    """The module of the first class that can be made, on the meta device, with a few layers.

    Raises:
        CannotBeMadeError: Default configurations make none, or need a package that is not installed.
    """
    reasons = []
    for name in names:
        with suppress_as(reasons):
            return _one(name)
    raise CannotBeMadeError(reasons[0])


@contextmanager
def suppress_as(reasons: list[str]) -> Iterator[None]:
    try:
        yield
    except CannotBeMadeError as error:
        reasons.append(str(error))


def _one(name: str) -> Any:
    try:
        kind = getattr(transformers, name)
        config = kind.config_class()
    except Exception as error:
        raise CannotBeMadeError(_words(error)) from error
    shortened(config)
    try:
        return _made(kind, config)
    except Exception:
        return _in_full(kind)


def _in_full(kind: Any) -> Any:
    """With all layers, where the configuration does not allow for fewer."""
    try:
        return _made(kind, kind.config_class())
    except Exception as error:
        raise CannotBeMadeError(_words(error)) from error


def _made(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        made = kind(config)
    made.tie_weights()  # which a module of transformers 5.0 does only when it is loaded
    return made


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:100]


def shortened(config: Any, depth: int = 0) -> None:
    """Have few layers, in all parts of a configuration, as far as it allows for them."""
    for name in (*_LAYERS, *_OF_LAYERS):
        value = getattr(config, name, None)
        with suppress(AttributeError, NotImplementedError):  # one that follows from others
            if isinstance(value, int) and value > FEW:
                setattr(config, name, FEW)
            elif isinstance(value, list):
                setattr(config, name, value[:FEW])
    for part in list(vars(config).values()):
        if hasattr(part, "model_type") and depth < 3:
            shortened(part, depth + 1)


def fit(names: Sequence[str]) -> tuple[Names, set[str]]:
    """The correspondence of tensors of one of these classes with those that transformers saves, and their names."""
    module = module_of(names)
    tied = set(module.all_tied_weights_keys)
    saved = revert_weight_conversion(module, dict(module.state_dict()))
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items() if key not in tied}
    return fitted(module, shapes), set(shapes)
