"""Which tensors a model ties: an output and the input embedding, mostly.

transformers' class says it, as its module is made of the model's configuration. Where transformers does not know the
class, the usual names of embeddings and outputs say it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from ecotone.merging.kernel.lazy import formed
from ecotone.merging.models.model import Model
from ecotone.populations.errors import EcotoneError

INPUT_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")

_AT_ONCE = 2**24  # elements that are compared in one step
_EQUAL: dict[Any, bool] = {}  # of tensors of files as they were, found once in a process
_OF_CLASSES: dict[tuple[Path, str, int], dict[str, str] | None] = {}  # found once in a process


def tied(model: Model, names: Iterable[str] = ()) -> dict[str, str]:
    """The tensors that a model's configuration ties to others.

    Args:
        model: A Hugging Face model; others tie nothing.
        names: Names that other files have for tensors, which its own may lack.

    Returns:
        By the name of a tensor, which its files may lack, the name of the stored tensor that takes its place.
    """
    config = model.config or {}
    if not config or _says(config) is False:
        return {}
    of_class = _of_class(model, frozenset(names))
    if of_class is not None:
        return of_class
    inputs = _inputs(model) if _says(config) else []
    others = inputs[1:] if inputs and inputs[0].endswith("shared.weight") else []
    outputs = [name for name in (*model.tensors, *names) if name.endswith(OUTPUT_EMBEDDINGS)]
    return dict.fromkeys([*others, *outputs], inputs[0]) if inputs else {}


def tied_matrices(model: Model) -> dict[str, str]:
    """Those of ``tied`` that are no biases. If one of them is another tensor in a file, nothing is tied there."""
    return {name: kept for name, kept in tied(model).items() if not name.endswith("bias")}


def tied_embedding(model: Model) -> str | None:
    """The input embedding that is the output's, too, as the ``config.json`` says, or None."""
    found = next(iter(tied_matrices(model).values()), None)
    if found is None and _says(model.config or {}) and _of_class(model, frozenset()) is None:
        return next(iter(_inputs(model)), None)
    return found


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that ties no output to the embeddings."""
    parts = {key: untied(part) for key, part in config.items() if isinstance(part, Mapping) and _says(part)}
    return {**config, **parts, "tie_word_embeddings": False}


def equal(model: Model, one: str, other: str) -> bool:
    """Whether two tensors hold the same bytes: only such are tied, whatever the configuration says."""
    key = (_as_it_is(model.path), one, other)
    if key not in _EQUAL or not model.stored:  # of what is formed, others may have the path, too
        left, right = model.flat(one), model.flat(other)
        pieces = (slice(at, at + _AT_ONCE) for at in range(0, left.numel(), _AT_ONCE))
        _EQUAL[key] = all(torch.equal(formed(left[piece]), formed(right[piece])) for piece in pieces)
    return _EQUAL[key]


def _as_it_is(path: Path) -> tuple[Any, ...]:
    """A path, and what tells its weights from others that are written there later."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    stats = (file.stat() for file in files)
    return (path, *((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


def _says(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration says that the output is tied; None if it says nothing of it."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    said = config.get("tie_word_embeddings", nested)
    return None if said is None else bool(said)


def _of_class(model: Model, names: Set[str]) -> dict[str, str] | None:
    """What transformers' class ties; None where it is not known."""
    key = (
        model.files,
        json.dumps(model.config, sort_keys=True, default=str),
        hash((frozenset(model.tensors), frozenset(names))),
    )
    if key not in _OF_CLASSES:
        try:
            _OF_CLASSES[key] = _found(model, names)
        except EcotoneError:
            _OF_CLASSES[key] = None
    return _OF_CLASSES[key]


def _found(model: Model, others: Set[str]) -> dict[str, str]:
    from ecotone.merging.models import architectures, names  # import configs and layouts, which import this

    module: Any = architectures.outline(model)
    pairs = getattr(module, "all_tied_weights_keys", None) or {}
    stored = names.stored_names(module, model.tensors) if pairs else {}
    called = {**names.stored_names(module, others), **stored} if pairs and others else stored
    found: dict[str, str] = {}
    for name, kept in pairs.items():
        if kept in stored:
            found[called.get(name, name)] = stored[kept]
        elif name in stored:  # transformers ties them the other way round
            found[called.get(kept, kept)] = stored[name]
    return found


def _inputs(model: Model) -> list[str]:
    """Names of the input embeddings, the likeliest first, by their usual endings."""
    return sorted((name for name in model.tensors if name.endswith(INPUT_EMBEDDINGS)), key=_rank)


def _rank(name: str) -> tuple[int, int, str]:
    ending = next(index for index, suffix in enumerate(INPUT_EMBEDDINGS) if name.endswith(suffix))
    return ending, name.count("."), name
