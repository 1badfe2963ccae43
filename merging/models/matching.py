"""Models of one architecture whose files name, or hold, other tensors, made alike.

Names may differ by the prefix of a base model, or by renames of older versions of transformers. One model may have its
output tied to its embeddings and another not. Some may hold tensors that the module does not take: layers for multi-
token prediction, a value head, a pooler. Nothing of it is dropped unless the recipe says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ecotone.merging.kernel.lazy import Source
from ecotone.merging.models import architectures
from ecotone.merging.models.layout import Layout, aliases_of
from ecotone.merging.models.model import Model, TensorInfo, Wrapper
from ecotone.merging.models.names import names_of
from ecotone.merging.models.ties import tied, tied_matrices, untied
from ecotone.populations.errors import CheckpointError, EcotoneError, InputError, closest

Unused: TypeAlias = Literal["merge", "base", "drop"]


@dataclass(frozen=True)
class Treatment:
    """The treatment of tensors that are not simply merged.

    Args:
        unused: What is done with tensors that the module does not take. ``merge`` merges them where all models have
            them, and else takes them from the base (or the first expert that has them); ``base`` always takes them from
            there; ``drop`` leaves them out.
        freeze: Patterns of tensors that are taken from the base (or the first expert): ``*.mlp.gate.weight``.
        only: Patterns of the tensors that are merged; all others are taken from the base (or the first expert).
        known: Whether the module is the one that the models' configuration names, so that it is known what it takes.
    """

    unused: Unused = "merge"
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    known: bool = False


MERGED = Treatment()
"""All floating-point tensors are merged."""


@dataclass(frozen=True)
class Renamed(Wrapper):
    """A model whose tensors have the names of another model's files, or that has a tied tensor once more.

    Args:
        names: By the name of each tensor, the model's own name of it. Two tensors may be one of the model's.
        splits: Whether tied tensors have names of their own, so that the configuration says so.
    """

    names: Mapping[str, str]
    splits: bool = False

    @property
    def change(self) -> str:
        """That names differ."""
        return "tied tensors stored one by one" if self.splits else "tensors of other names"

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, the shape and type of every tensor."""
        infos = self.model.tensors
        return {name: infos[own] for name, own in self.names.items()}

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The model's ``config.json``; it ties nothing where tied tensors are split."""
        config = self.model.config
        return untied(config) if config is not None and self.splits else config

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free text of the model's headers, without names of tied tensors where those are split."""
        metadata = self.model.metadata
        return {key: text for key, text in metadata.items() if key not in self.names} if self.splits else metadata

    @property
    def stored(self) -> bool:
        """The model's own answer: names cost nothing."""
        return self.model.stored

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, whole."""
        return self.model.tensor(self.names[name])

    def flat(self, name: str) -> Source:
        """The tensor ``name``, flat."""
        return self.model.flat(self.names[name])

    def holder(self, name: str) -> Model:
        """Itself where the model has another name for the tensor; else the model, or one in it."""
        return self.model.holder(name) if self.names[name] == name else self

    def working_bytes(self, name: str) -> int:
        """The model's own answer."""
        return self.model.working_bytes(self.names[name])


# -- names -----------------------------------------------------------------------------------------------------


def renamed(models: Sequence[Model]) -> list[Model]:
    """The models with the names of the first one's files, where transformers loads other names as the same tensors.

    Models whose names have nothing to do with the first one's are left as they are: they do not fit.

    Args:
        models: The base, if there is one, and the experts.
    """
    first, *others = models
    ours = set(first.tensors) - set(Layout.of(first).aliases)
    found: list[Model] = [first]
    module: nn.Module | None = None
    names: dict[Any, str] | None = None
    for other in others:
        theirs = set(other.tensors) - set(Layout.of(other).aliases)
        if ours <= theirs or theirs <= ours:
            found.append(other)
            continue
        if not (first.is_hugging_face and other.is_hugging_face):
            found.append(_with_prefix(other, ours, theirs))
            continue
        if names is None:
            module = _outlined(first)
            names = {place: name for place, name in _places(module, first).items() if name in ours}
        pairs = {names[place]: own for place, own in _places(module, other).items() if place in names and own in theirs}
        matched = {*pairs, *pairs.values()}
        rest = {own: own for own in other.tensors if own not in matched}
        found.append(Renamed(other, pairs | rest) if any(name != own for name, own in pairs.items()) else other)
    return found


def _with_prefix(model: Model, ours: Set[str], theirs: Set[str]) -> Model:
    """A model whose names are all wanted names after one prefix, or the other way round, with the wanted names."""
    for longer, shorter in ((theirs, ours), (ours, theirs)):
        parts = min(longer).split(".")
        for count in range(1, len(parts)):
            prefix = ".".join(parts[:count]) + "."
            if longer == {prefix + name for name in shorter}:
                pairs = {name: prefix + name for name in shorter}
                return Renamed(model, pairs if longer is theirs else {own: name for name, own in pairs.items()})
    return model


def _outlined(model: Model) -> nn.Module | None:
    """The module of a model; None if it cannot be made: the names that differ tell it better."""
    try:
        return architectures.outline(model)
    except EcotoneError:
        return None


def _places(module: nn.Module | None, model: Model) -> dict[Any, str]:
    """By its place in a module, the name of each tensor of a model; nothing if it does not fit there."""
    if module is None:
        return {}
    try:
        names = names_of(module, Layout.of(model))
    except EcotoneError:  # likewise
        return {}
    places: dict[Any, str] = {
        (place.target, place.shape, place.stride, place.offset): name for name, place in names.places.items()
    }
    for name, one in names.scattered.items():
        parts = tuple((target, *map(_fingerprint, pair)) for target, pair in one.parts.items())
        places[parts, one.pieces] = name
    return places


def _fingerprint(positions: Tensor) -> bytes:
    return blake2b(positions.numpy().tobytes(), digest_size=16).digest()


# -- ties ------------------------------------------------------------------------------------------------------


def split(models: Sequence[Model]) -> list[Model]:
    """The models with the same tensors tied: where one has a tensor of its own that another ties, none ties any.

    Args:
        models: The base, if there is one, and the experts; their tensors have the same names.

    Raises:
        CheckpointError: They are encoders with decoders: these compute otherwise where they are tied.
    """
    aliases = [aliases_of(model) for model in models]
    names = {name for model in models for name in model.tensors}
    ties = [{**ours, **tied(model, names)} for model, ours in zip(models, aliases, strict=True)]
    own = {name for model, ours in zip(models, aliases, strict=True) for name in model.tensors if name not in ours}
    apart = {name for pairs in ties for name in pairs if name in own and not name.endswith("bias")}
    if not apart:
        return list(models)
    return [_split(model, pairs, ours, apart) for model, pairs, ours in zip(models, ties, aliases, strict=True)]


def _split(model: Model, pairs: Mapping[str, str], aliases: Mapping[str, str], apart: Set[str] = frozenset()) -> Model:
    """A model with all that it ties as tensors of their own, because some (``apart``) are so in others."""
    lacking = {name: kept for name, kept in pairs.items() if name not in model.tensors or name in aliases}
    if not lacking:
        return model
    if (model.config or {}).get("is_encoder_decoder"):
        raise CheckpointError(
            f"{model.path}: expected {', '.join(sorted(apart))} as a tensor of its own, as another model of the merge "
            f"has it, found it tied to {next(iter(lacking.values()))}. Encoders with decoders that are tied compute "
            "otherwise.",
            "Give models that are all tied, or all untied.",
        )
    return Renamed(model, {name: name for name in model.tensors} | lacking, splits=True)


def with_own_outputs(model: Model) -> Model | None:
    """A tied model with its output as a tensor of its own; None for encoders with decoders, and where none is known."""
    if not tied_matrices(model) or (model.config or {}).get("is_encoder_decoder"):
        return None
    return _split(model, tied(model), aliases_of(model))


# -- tensors that are not merged ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """The tensors of a merge's models that are not merged.

    Args:
        kept: By name, the shape and type of those that are taken from the base, or from the first model that has them.
        dropped: Names of those that are left out.
        frozen: Names of those of ``kept`` that the recipe freezes.
    """

    kept: Mapping[str, TensorInfo] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    frozen: tuple[str, ...] = ()


NONE_APART = Apart()
"""All floating-point tensors are merged."""


def apart(models: Sequence[Model], treatment: Treatment, whose: Model | None = None) -> Apart:
    """The tensors of models that are not merged.

    Args:
        models: The base, if there is one, and the experts; names are those of the first, as far as it has them.
        treatment: What the recipe says of them.
        whose: The model whose config merges have, and so whose module takes tensors; None for the first.

    Raises:
        InputError: A pattern fits no tensor, or it is not known what the module takes.
    """
    if treatment.unused != "merge" and not treatment.known:
        raise InputError(
            f"models.unused: expected architecture: auto with {treatment.unused!r}, as only then it is known what the "
            "module takes."
        )
    infos: dict[str, TensorInfo] = {}
    for model in reversed(models):
        left_out = aliases_of(model)
        infos |= {name: info for name, info in model.tensors.items() if name not in left_out}
    frozen = _frozen(infos, aliases_of(models[0]), treatment)
    partial = {name for name in infos if not all(_same_shape(infos[name], model, name) for model in models)}
    asked = treatment.known and (bool(partial - frozen) or treatment.unused != "merge")
    unused = _unused(models, whose or models[0]) if asked else frozenset[str]()
    kept = {name for name in unused if treatment.unused == "base" or name in partial} | frozen
    dropped = unused - frozen if treatment.unused == "drop" else frozenset[str]()
    return Apart(
        {name: infos[name] for name in infos if name in kept and name not in dropped},
        dropped,
        tuple(name for name in infos if name in frozen),
    )


def _same_shape(info: TensorInfo, model: Model, name: str) -> bool:
    return name in model.tensors and model.tensors[name].shape == info.shape


def _unused(models: Sequence[Model], whose: Model) -> frozenset[str]:
    """Names of tensors, of any of the models, that the module of one of them does not take."""
    module = architectures.outline(whose)
    layout = Layout.of(whose)
    found = set(names_of(module, layout).unused) - set(layout.aliases)
    for model in models:
        layout = Layout.of(model)
        with suppress(EcotoneError):  # it lacks one that the module takes: the names tell it better
            found |= set(names_of(module, layout).unused) - set(layout.aliases)
    return frozenset(found)


def _frozen(infos: Mapping[str, TensorInfo], aliases: Mapping[str, str], treatment: Treatment) -> set[str]:
    """Names of the floating-point tensors that the recipe's patterns leave unmerged."""
    floats = {name for name, info in infos.items() if info.dtype.is_floating_point and info.size}
    frozen = {name for pattern in treatment.freeze for name in _fitting("freeze", pattern, floats, aliases)}
    if treatment.only:
        frozen |= floats - {name for pattern in treatment.only for name in _fitting("only", pattern, floats, aliases)}
    if floats and not floats - frozen:
        raise InputError(
            f"merge.{'only' if treatment.only else 'freeze'}: expected patterns that leave tensors to merge, found "
            f"none left of {len(floats):,}.",
            "Leave one out, or narrow it.",
        )
    return frozen


def _fitting(field: str, pattern: str, names: Iterable[str], aliases: Mapping[str, str]) -> set[str]:
    """The names that a pattern fits; tied tensors have the name of either."""
    found = {name for name in names if fnmatchcase(name, pattern)}
    found |= {kept for alias, kept in aliases.items() if fnmatchcase(alias, pattern)}
    if not found:
        close = closest(pattern, sorted(names))
        raise InputError(
            f"merge.{field}: expected a pattern of names of tensors, found {pattern!r}, which fits none.",
            f"`*` stands for any text, dots included; a name is {close or next(iter(names))!r}.",
        )
    return found
