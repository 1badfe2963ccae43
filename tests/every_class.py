"""Every model type of transformers, at the sizes of its default configuration, without weights."""

from contextlib import suppress
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
def classes() -> dict[str, str]:
    """By model type, the name of its class that does the most: generates, or classifies, or is the bare model."""
    found: dict[str, tuple[int, str]] = {}
    for mapping in (getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")):
        for key, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                if isinstance(name, str) and name:
                    found[key] = max(found.get(key, (0, "")), (_rank(name), name))
    return {key: name for key, (_, name) in sorted(found.items())}


def _rank(name: str) -> int:
    return 4 * ("ForConditionalGeneration" in name) + 3 * ("ForCausalLM" in name) + 2 * ("For" in name)


def module_of(name: str) -> Any:
    """The module on the meta device, with a few layers.

    Raises:
        CannotBeMadeError: Its default configuration makes none, or it needs a package that is not installed.
    """
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
        return kind(config)


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


def fit(name: str) -> tuple[Names, set[str]]:
    """The correspondence of a class's tensors with those that transformers saves, and the names of the saved ones."""
    module = module_of(name)
    tied = set(module.all_tied_weights_keys)
    saved = revert_weight_conversion(module, dict(module.state_dict()))
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items() if key not in tied}
    return fitted(module, shapes), set(shapes)
