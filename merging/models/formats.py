"""Checkpoint formats: what a path may be, and how a model is opened from it.

A format of another package is an entry point of the group ``ecotone.formats``. It is asked before ours, whose
directories it may refine. What no format takes is refused in words, with the way to convert it: pickles run any code
when they are loaded, and GGUF files hold quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ecotone.merging.models import hub
from ecotone.merging.models.checkpoint import Checkpoint, is_adapter, is_safetensors, located
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.lora_reader import refuse_other_adapters
from ecotone.merging.models.model import Model, declared
from ecotone.populations.errors import CheckpointError, EcotoneError, InputError
from ecotone.registry import Registry, blamed


class Format(Protocol):
    """A kind of checkpoint. It is made without arguments."""

    @property
    def title(self) -> str:
        """The name of the format in messages: ``LoRA adapter``."""
        ...

    @property
    def describe(self) -> str:
        """One sentence that describes the format."""
        ...

    @property
    def limits(self) -> tuple[str, ...]:
        """The limits of the format, one sentence for each."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether it is opened beside the model that it was trained on."""
        ...

    def owns(self, path: str) -> bool:
        """Whether a path, or another name of a model in a recipe, is of this format. Reads no weight."""
        ...

    def open(self, path: str, base: Model | None) -> Model:
        """Open it; only headers are read.

        Args:
            path: A path that ``owns`` has accepted.
            base: The model it was trained on; given where it ``needs_base``.

        Raises:
            CheckpointError: It cannot be read.
        """
        ...


SAYS = tuple(name for name in vars(Format) if not name.startswith("_"))
"""The attributes and methods that every format must have."""


def check_declared(name: str, kind: Any) -> None:
    """Raise ``InputError`` unless a format has all declarations."""
    if not callable(kind):
        raise InputError(f"checkpoint format {name!r}: expected a class, found {kind!r}.")
    lacking = [each for each in SAYS if not hasattr(kind, each)]
    if lacking:
        raise InputError(
            f"checkpoint format {name!r}: expected {', '.join(SAYS)}, found no {', '.join(lacking)}.",
            "ecotone.merging.models.formats.Format says what each is.",
        )


_OURS = {
    "safetensors": "ecotone.merging.models.formats:SafetensorsFile",
    "hugging_face": "ecotone.merging.models.formats:HuggingFaceDirectory",
    "lora": "ecotone.merging.models.formats:LoraAdapter",
    "hub": "ecotone.merging.models.formats:HubRepository",
}
FORMATS: Registry[Callable[[], Format]] = Registry("checkpoint format", "ecotone.formats", _OURS, check_declared)


def opened(path: str | Path, base: Model | None = None, field: str = "base") -> Model:
    """Open a model; only headers are read.

    Args:
        path: Its path, or its repository in the Hugging Face hub.
        base: The model it was trained on, where there is one.
        field: The recipe's field that gives the base, for messages.

    Raises:
        InputError: Its format needs a base and there is none, two plug-ins take the path, or what one gives does not
            say all that a model must.
        CheckpointError: It cannot be read, or it is of no format.
    """
    place = _in_cache(path)
    kind = format_of(place)
    if kind is None:
        return Checkpoint.open(place)  # says what it is and how it is converted
    if kind.needs_base and base is None:
        raise InputError(f"{field}: the expert {place!r} is a {kind.title} and needs the model it was trained on.")
    with blamed(f"{place}: the checkpoint format {kind.title!r}", type(kind), "open"):
        return declared(kind.open(place, base))


def opened_whole(path: str | Path) -> Model:
    """Open a model that needs no other model, such as a base. Raises the errors of ``opened``."""
    kind = format_of(_in_cache(path))
    if kind is not None and kind.needs_base:
        raise CheckpointError(
            f"{path}: expected a full model, found a {kind.title}.",
            "Give it as an expert beside its base, or merge it into its base first and give the result.",
        )
    return opened(path)


def _in_cache(path: str | Path) -> str:
    """A path, or the snapshot where it is a repository's folder in the hub's cache."""
    place = Path(path).expanduser()
    found = hub.snapshot(place)
    return str(path) if found is place else str(found)


def format_of(path: str) -> Format | None:
    """The format that a path is of, or None.

    Raises:
        InputError: Formats of two other packages take it; or none takes it, and one of another package has raised.
    """
    owners, raised = dict[str, Format](), list[EcotoneError]()
    for name, kind in FORMATS.usable().items():
        if name in _OURS:
            continue
        subject = f"{path}: the checkpoint format {name!r}"
        try:
            with blamed(subject, kind, "__init__"):
                made = kind()
            with blamed(subject, kind, "owns"):
                if made.owns(path):
                    owners[name] = made
        except EcotoneError as error:
            raised.append(error)
    if len(owners) > 1:
        raise InputError(
            f"{path}: the checkpoint formats {' and '.join(owners)} both take it.", "Uninstall one of them."
        )
    ours = (FORMATS.get(name, "format")() for name in _OURS)
    found = next(iter(owners.values()), None) or next((one for one in ours if one.owns(path)), None)
    if found is None and raised:
        raise raised[0]
    return found


class SafetensorsFile:
    """One file of weights."""

    title = "safetensors file"
    describe = "A state dict in one file of the safetensors format."
    limits: tuple[str, ...] = (
        "It has no configuration and no tokenizer: the recipe names its architecture, and mergekit does not take it.",
        "Weights must be float64, float32, float16 or bfloat16: quantised ones are refused.",
    )
    needs_base = False

    def owns(self, path: str) -> bool:
        """Whether it is a file with a header of safetensors, or named so."""
        return is_safetensors(Path(path).expanduser())

    def open(self, path: str, base: Model | None) -> Model:
        """The checkpoint."""
        return _no_adapter(Checkpoint.open(path))


class HuggingFaceDirectory:
    """A directory that ``save_pretrained`` has written, or of one file of weights."""

    title = "Hugging Face directory"
    describe = "A directory of model.safetensors, of shards and their index, or of one .safetensors file."
    limits: tuple[str, ...] = (
        "Pickles (.bin, .pt) in it are not loaded: they run any code.",
        "Code in it is not run (trust_remote_code): transformers must have the architecture.",
        "Quantised weights are refused.",
    )
    needs_base = False

    def owns(self, path: str) -> bool:
        """Whether it is a directory, and not that of an adapter."""
        place = Path(path).expanduser()
        return place.is_dir() and not is_adapter(place)

    def open(self, path: str, base: Model | None) -> Model:
        """The checkpoint."""
        return _no_adapter(Checkpoint.open(path))


def _no_adapter(checkpoint: Checkpoint) -> Checkpoint:
    refuse_other_adapters(checkpoint.path, checkpoint.tensors)
    return checkpoint


class LoraAdapter:
    """A directory that PEFT has written."""

    title = "LoRA adapter"
    describe = "A low-rank adapter of PEFT's, formed with its base as it is read; no merged copy exists."
    limits: tuple[str, ...] = (
        "DoRA reads each changed tensor once more, for the lengths of its rows, before the first merge.",
        "Other adapters (IA3, LoHa, ...) and initialisations that change the base are refused: merge them first.",
        "mergekit merges it into its base first: an export to mergekit differs in last bits.",
    )
    needs_base = True

    def owns(self, path: str) -> bool:
        """Whether it is a directory of an adapter without a model."""
        return is_adapter(Path(path).expanduser())

    def open(self, path: str, base: Model | None) -> Model:
        """The expert: the base and the adapter."""
        assert base is not None
        return Adapter.open(path, base)


class HubRepository:
    """A repository of the Hugging Face hub; its files are downloaded once, to the hub's cache."""

    title = "repository of the Hugging Face hub"
    describe = "organisation/name or organisation/name@revision: a directory or an adapter, downloaded once."
    limits: tuple[str, ...] = (
        "Only a commit always means the same weights; a branch may move.",
        "Without a network only what is in the hub's cache is found.",
    )
    needs_base = False

    def owns(self, path: str) -> bool:
        """Whether it has the form of a repository's name, and nothing of that name is on the disk."""
        return hub.is_repository(path) and not Path(path).expanduser().exists()

    def open(self, path: str, base: Model | None) -> Model:
        """The model that is in it."""
        return opened(located(path), base)
