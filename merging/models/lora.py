"""LoRA adapters as PEFT stores them (Hu et al. 2022, arXiv:2106.09685), opened as low-rank sources.

    expert = base + scale * B @ A      scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

No merged copy exists, on disk or in memory: a piece of the expert is formed when it is read, in float32 (float64 where
the base is), and rounded nowhere in between. The sum over the r ranks is taken in their order, each product and each
sum rounded once, then added to the base; so a piece has the same bits however the tensor is cut and wherever it is
formed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecotone.merging.kernel import compiled
from ecotone.merging.kernel.lazy import Source, formed
from ecotone.merging.kernel.materialise import CHUNK, DEVICE_SPAN, SMALL
from ecotone.merging.models.checkpoint import ADAPTER, ADAPTER_CONFIG, Checkpoint, default_name, located
from ecotone.merging.models.layout import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Layout, is_vocabulary, tied_embedding
from ecotone.merging.models.model import Model, TensorInfo, mergekit_place
from ecotone.populations.errors import CheckpointError, nearest

_FACTOR = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(weight|bias))?")
_NO_LORA = re.compile(r"\.lora_magnitude_vector|\.trainable_tokens|\.lora_E$|\.lora_variant|\.hada_|\.ia3_|\.vera_")
_CHANGED = (  # options with which an adapter is not base + scale * B @ A
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base


@dataclass(frozen=True, eq=False)
class LowRank:
    """A stretch of a flattened matrix ``base + left @ right`` that is formed when it is read.

    Args:
        base: (N,) of any floating-point type; it may itself be formed as it is read.
        left: (R, r) in the type in which it is formed.
        right: (r, C) of that type, contiguous.
        start: The stretch's position in the flattened (R, C) matrix.
        large: Whether it is part of a model large enough for compiled loops.
    """

    base: Source
    left: Tensor
    right: Tensor
    start: int = 0
    large: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is formed."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The device on which it is formed."""
        return self.left.device

    def numel(self) -> int:
        """N."""
        return self.base.numel()

    def __getitem__(self, part: slice) -> LowRank:
        low, _, _ = part.indices(self.numel())
        return replace(self, base=self.base[part], start=self.start + low)

    def to(self, device: torch.device) -> LowRank:
        """The same on another device: the base's elements and the factors go there."""
        return replace(self, base=self.base.to(device), left=self.left.to(device), right=self.right.to(device))

    def formed(self) -> Tensor:
        """(N,) the elements."""
        out = formed(self.base).to(self.dtype, copy=True)
        here = out.device.type == "cpu"
        if not (here and self.large and compiled.add_product(out, self.left, self.right, self.start)):
            for rows, columns, part in _blocks(
                self.start, out.numel(), self.right.shape[1], CHUNK if here else DEVICE_SPAN
            ):
                left, right = self.left[rows], self.right[:, columns]
                total = left[:, :1] * right[:1]
                term = torch.empty_like(total)
                for k in range(1, right.shape[0]):
                    total += torch.mul(left[:, k : k + 1], right[k], out=term)
                out[part] += total.view(-1)
        return out


def _blocks(start: int, size: int, columns: int, span: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, columns and place in the stretch of blocks of a matrix that together are ``size`` of its flat elements."""
    at = 0
    while at < size:
        row, column = divmod(start + at, columns)
        whole = min(size - at, span) // columns
        if column == 0 and whole:
            rows, across = whole, columns
        else:
            rows, across = 1, min(columns - column, size - at)
        yield slice(row, row + rows), slice(column, column + across), slice(at, at + rows * across)
        at += rows * across


@dataclass(frozen=True)
class Factors:
    """The two factors whose product an adapter adds to one tensor of the base.

    Args:
        left: Name of the factor that has the tensor's rows.
        right: Name of the factor that has the tensor's columns; None for a bias, which is added as it is.
        scale: The number that the product is multiplied by.
        transposed: Whether the stored product is the tensor's transpose.
    """

    left: str
    right: str | None
    scale: float
    transposed: bool = False


@dataclass(frozen=True)
class Adapter:
    """An expert that is a base and a LoRA adapter. Use ``Adapter.open``.

    Args:
        path: The adapter's directory.
        name: The expert's name in reports.
        base: The model it was trained on.
        weights: The adapter's own tensors.
        factors: By tensor of the base, what is added to it.
        whole: By tensor of the base, the name of what the adapter stores in its place.
    """

    path: Path
    name: str
    base: Model
    weights: Checkpoint
    factors: Mapping[str, Factors]
    whole: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path, base: Model, name: str | None = None) -> Adapter:
        """Open an adapter; only headers are read (and, of tied embeddings that it stores twice, the bytes).

        Args:
            path: A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
            base: The model it was trained on.
            name: The expert's name in reports; the directory's name by default.

        Raises:
            CheckpointError: It cannot be read, is not plain LoRA, or does not fit the base.
        """
        place = located(path)
        stored = Checkpoint.open(_weights(place), name or default_name(place))
        return cls(place, stored.name, base, stored, *_Reader(place, base, stored).read())

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The base's ``config.json``."""
        return self.base.config

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free text of the base's headers."""
        return self.base.metadata

    @property
    def is_hugging_face(self) -> bool:
        """Whether the base is a directory with a ``config.json``."""
        return self.base.is_hugging_face

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's own tensors."""
        return self.weights.nbytes

    @property
    def stored(self) -> bool:
        """False: the tensors that it changes are computed when they are read."""
        return False

    @property
    def rows(self) -> int | None:
        """Rows of the input embedding, where the adapter stores it with another number than the base's files have."""
        kept = [(name, key) for name, key in self.whole.items() if name.endswith(INPUT_EMBEDDINGS)]
        rows = [(self.weights.tensors[key].shape[0], self.base.tensors[name].shape[0]) for name, key in kept]
        return next((ours for ours, theirs in rows if ours != theirs), self.base.rows)

    @property
    def files(self) -> Path:
        """The base's: an adapter has no ``config.json``."""
        return self.base.files

    @property
    def tokenizer(self) -> Path:
        """The adapter's directory."""
        return self.path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, the shape and type of the expert's tensors; the type is the one they are formed in."""
        left_out = Layout.of(self.base).aliases
        infos = {name: info for name, info in self.base.tensors.items() if name not in left_out}
        infos |= {name: self.weights.tensors[key] for name, key in self.whole.items()}
        infos |= {name: TensorInfo(infos[name].shape, _kind(infos[name].dtype)) for name in self.factors}
        return infos

    @cached_property
    def _large(self) -> bool:
        return 2 * sum(info.size for info in self.base.tensors.values()) > SMALL

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, whole; it is in memory if the adapter changes it."""
        return formed(self.flat(name)).view(self.tensors[name].shape)

    def flat(self, name: str) -> Source:
        """The tensor ``name``, flat: mapped if the adapter leaves it as it is or stores it whole."""
        base = self.weights.flat(self.whole[name]) if name in self.whole else self.base.flat(name)
        if name not in self.factors:
            return base
        factors, kind = self.factors[name], _kind(base.dtype)
        left = self._matrix(factors.left, kind, factors.transposed)
        right = left.new_ones(1, 1) if factors.right is None else self._matrix(factors.right, kind, factors.transposed)
        return LowRank(base, (left * factors.scale).contiguous(), right.contiguous(), large=self._large)

    def holder(self, name: str) -> Model:
        """Itself where it changes the tensor or stores it whole; else the base, or the model in it."""
        return self if name in self.factors or name in self.whole else self.base.holder(name)

    def working_bytes(self, name: str) -> int:
        """Bytes of the factors in the type in which they are multiplied, and the bytes that the base takes."""
        base = 0 if name in self.whole else self.base.working_bytes(name)
        if name not in self.factors:
            return base
        factors = self.factors[name]
        keys = [key for key in (factors.left, factors.right) if key is not None]
        width = _kind(self.tensors[name].dtype).itemsize
        return base + width * sum(self.weights.tensors[key].size for key in keys)

    def mergekit_reference(self) -> str:
        """The base's reference, a plus sign and its own.

        Raises:
            InputError: mergekit cannot express the base, or would read a path otherwise.
        """
        return f"{self.base.mergekit_reference()}+{mergekit_place(self.path)}"

    def record(self) -> Mapping[str, Any]:
        """Its name and path, and the record of its base."""
        return {"name": self.name, "path": str(self.path), "change": "a LoRA adapter", "of": self.base.record()}

    def named(self, name: str) -> Adapter:
        """The same expert under another name."""
        return replace(self, name=name)

    def _matrix(self, name: str, kind: torch.dtype, transposed: bool) -> Tensor:
        factor = self.weights.tensor(name).to(kind)
        matrix = factor.reshape(len(factor), -1)
        return matrix.T if transposed else matrix


def _kind(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weights(place: Path) -> Path:
    if (place / ADAPTER).is_file():
        return place / ADAPTER
    pickled = place / "adapter_model.bin"
    if pickled.is_file():
        return pickled  # refused as a pickle, with the way to convert it
    raise CheckpointError(
        f"{place}: expected {ADAPTER} beside {ADAPTER_CONFIG}, found none.", "Save the adapter again."
    )


class _Reader:
    """Reads an adapter's headers and configuration, and checks them against its base."""

    def __init__(self, place: Path, base: Model, stored: Checkpoint) -> None:
        self.place, self.base, self.stored = place, base, stored
        self.config = _config(place)
        self.aliases = {**Layout.of(base).aliases, **self._outputs()}

    def _outputs(self) -> dict[str, str]:
        """Outputs that the adapter names and a tied base does not store, and the embedding in their place."""
        kept = tied_embedding(self.base)
        if kept is None:
            return {}
        names = {_target(key) for key in self.stored.tensors} - set(self.base.tensors)
        return {name: kept for name in names if name.endswith(OUTPUT_EMBEDDINGS)}

    def read(self) -> tuple[dict[str, Factors], dict[str, str]]:
        """The adapter's factors and whole tensors, by the name of the base's tensor."""
        modules: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in self.stored.tensors:
            match = _FACTOR.fullmatch(key)
            if match is None:
                if _NO_LORA.search(key):
                    raise self._refused(f"its tensor {key!r} belongs to no plain LoRA")
                whole[self._known(_module(key), key)] = key
                continue
            part = match[2] + (".bias" if match[3] == "bias" else "")
            parts = modules.setdefault(_module(match[1]), {})
            if part in parts:
                raise self._refused(f"it holds two adapters, {parts[part]!r} and {key!r}")
            parts[part] = key
        for name, key in whole.items():
            self._check_whole(name, key)
        factors: dict[str, Factors] = {}
        for module, parts in modules.items():
            factors |= self._factors(module, parts, whole)
        self._check_ties(factors, whole)
        return factors, {name: key for name, key in whole.items() if name not in self.aliases}

    def _factors(self, module: str, parts: Mapping[str, str], whole: Mapping[str, str]) -> dict[str, Factors]:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for lacking, given in ((first, second), (second, first)):
            if lacking not in parts:
                raise CheckpointError(
                    f"{self.stored.path}: module {module!r}: expected {lacking} beside {parts.get(given, given)!r}, "
                    "found none.",
                    "Save or download the adapter again.",
                )
        a, b = self.stored.tensors[parts[first]].shape, self.stored.tensors[parts[second]].shape
        name = self._known(f"{module}.weight", parts[first])
        shape = self.stored.tensors[whole[name]].shape if name in whole else self._shape(name)
        rank = self._rank(module, parts[first], a)
        transposed = embedding or bool(self.config.get("fan_in_fan_out"))
        product = (b[0], *a[1:]) if b else ()
        fits = len(a) > 1 and len(b) > 1 and b[1] == rank and all(extent == 1 for extent in b[2:])
        if not fits or (product[::-1] if transposed else product) != shape:
            remedy = "Is it the base the adapter was trained on?"
            if fits and (product if transposed else product[::-1]) == shape:
                remedy = f"Does fan_in_fan_out in {ADAPTER_CONFIG} say how the base stores its weights?"
            raise CheckpointError(
                f"{self.stored.path}: the adapter's factors of {name!r}, {a} and {b}, do not make the base's "
                f"shape {shape}.",
                remedy,
            )
        scale = self._scale(module, rank)
        left, right = (first, second) if transposed else (second, first)
        found = {name: Factors(parts[left], parts[right], scale, transposed)}
        if "lora_B.bias" in parts:
            found |= self._bias(module, parts["lora_B.bias"], scale)
        return found

    def _bias(self, module: str, key: str, scale: float) -> dict[str, Factors]:
        name = self._known(f"{module}.bias", key)
        found, expected = self.stored.tensors[key].shape, self._shape(name)
        if found != expected:
            raise self._misshapen(key, found, name, expected)
        return {name: Factors(key, None, scale)}

    def _check_whole(self, name: str, key: str) -> None:
        found, expected = self.stored.tensors[key].shape, self._shape(name)
        if found != expected and not (is_vocabulary(name) and found[1:] == expected[1:]):
            raise self._misshapen(key, found, name, expected)

    def _check_ties(self, factors: Mapping[str, Factors], whole: dict[str, str]) -> None:
        """Refuse an adapter that unties weights that the base has tied."""
        embedding = tied_embedding(self.base)
        for kept in {*self.aliases.values(), *([embedding] if embedding else [])}:
            group = [name for name, place in self.aliases.items() if place == kept]
            changed = [name for name in (kept, *group) if name in factors]
            stored = [name for name in (kept, *group) if name in whole]
            if not changed and not stored:
                continue
            alike = len(stored) > 1 and stored[0] == kept and all(self._same(whole, kept, name) for name in stored)
            if changed or not (alike or self.config.get("ensure_weight_tying")):
                names = " and ".join(repr(name) for name in changed or stored)
                raise CheckpointError(
                    f"{self.place}: the adapter changes {names}, and the base {self.base.name!r} has {kept!r} tied to "
                    "its output: together they are no tied model.",
                    "Merge the adapter into an untied copy of the base (tie_word_embeddings: false), and untie all "
                    "models of the merge.",
                )
            whole.setdefault(kept, whole[stored[0]])

    def _same(self, whole: Mapping[str, str], alias: str, kept: str) -> bool:
        one, other = self.stored.flat(whole[alias]), self.stored.flat(whole[kept])
        return one.dtype == other.dtype and torch.equal(one, other)

    def _known(self, name: str, key: str) -> str:
        """``name`` if the base has a tensor of that name, tied or not."""
        if name in self.base.tensors or name in self.aliases:
            return name
        raise CheckpointError(
            f"{self.stored.path}: the adapter's tensor {key!r} is meant for {name!r}, which the base "
            f"{self.base.name!r} ({self.base.path}) has not.",
            f"{nearest(name, tuple(self.base.tensors))} Is it the base the adapter was trained on?",
        )

    def _rank(self, module: str, key: str, shape: tuple[int, ...]) -> int:
        rank = shape[0] if shape else 0
        expected = self._pattern("rank_pattern", module, self.config.get("r"))
        if rank < 1:
            raise CheckpointError(
                f"{self.stored.path}: tensor {key!r}: expected a rank of at least 1, found the shape {shape}.",
                "Save the adapter again, gathered from all of its shards.",
            )
        if rank != expected:
            raise CheckpointError(
                f"{self.stored.path}: tensor {key!r} has rank {rank}, {ADAPTER_CONFIG} says {expected}.",
                "Do the two files belong together?",
            )
        return rank

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.place / ADAPTER_CONFIG}: lora_alpha: expected a number, found {alpha!r}.")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern(self, field: str, module: str, default: object) -> object:
        """The value of the first pattern that fits the end of a module's name."""
        for pattern, value in (self.config.get(field) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return default

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of the base's tensor, which may be left out as a tied one."""
        return self.base.tensors[self.aliases.get(name, name)].shape

    def _misshapen(self, key: str, found: tuple[int, ...], name: str, expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.stored.path}: tensor {key!r} has shape {found}, the base's {name!r} has {expected}.",
            "Is it the base the adapter was trained on?",
        )

    def _refused(self, reason: str) -> CheckpointError:
        return _refused(self.place, reason)


def _target(key: str) -> str:
    """The base's name of the weight that one of PEFT's tensors is meant for."""
    match = _FACTOR.fullmatch(key)
    return _module(key) if match is None else f"{_module(match[1])}.weight"


def _module(key: str) -> str:
    """A name of PEFT's as the base has it."""
    name = key.removeprefix("base_model.model.")
    return re.sub(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.|$)", "", name)


def _refused(place: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{place}: expected a plain LoRA adapter (base + scale * B @ A), but {reason}.",
        'Merge it into its base and give the result: python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{place}').merge_and_unload().save_pretrained('{place.name}-merged')\"",
    )


def _config(place: Path) -> dict[str, Any]:
    path = place / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON ({error}).", "Download or save the adapter again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(config).__name__}.")
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind != "LORA":
        raise _refused(place, f"its {ADAPTER_CONFIG} says peft_type {kind!r}")
    for option in _CHANGED:
        if config.get(option):
            raise _refused(place, f"its {ADAPTER_CONFIG} sets {option}")
    if start.startswith(_OTHER_BASES):
        raise _refused(place, f"its {ADAPTER_CONFIG} says init_lora_weights {start!r}, which changes the base")
    return config
