"""Checkpoints on disk: safetensors files and Hugging Face directories, headers first, weights memory-mapped.

A safetensors file is eight bytes (the header's length), a JSON header with the type, shape and place of every
tensor, then the tensors' bytes (https://github.com/huggingface/safetensors#format). Opening reads headers only;
``tensor`` maps the file copy-on-write, so writing to a tensor never changes the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecotone.merging.models import headers, hub
from ecotone.merging.models.model import TensorInfo, mergekit_place
from ecotone.populations.contents import Stamp
from ecotone.populations.errors import CheckpointError, can_be_pasted, shown, told
from ecotone.populations.parsing import LARGEST, MalformedError, foreign_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its path and its header.

    Args:
        path: The file.
        tensors: By name, what each tensor is.
        places: By name, the first byte of the tensor in the file.
        metadata: The header's free text.

    Attributes:
        stamp: The file's status when its header was read; None if it is not there.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, int]
    metadata: Mapping[str, str]
    stamp: Stamp | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        with suppress(OSError):
            object.__setattr__(self, "stamp", Stamp.of(self.path))

    @cached_property
    def _bytes(self) -> Tensor:
        with self.path.open("rb") as file:
            if self.stamp is None or Stamp.of(file.fileno())[:3] != self.stamp[:3]:
                raise CheckpointError(
                    f"{self.path}: expected the file whose header was read, found another one in its place.",
                    "Leave models alone while they are read, and start again.",
                )
            if hasattr(mmap, "MAP_PRIVATE"):
                # Copy-on-write, and no memory reserved for copies that are never made.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            else:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def map(self) -> None:
        """Map the file now, so that another file put in its place later is not read with this header.

        Raises:
            CheckpointError: There is another one in its place already.
        """
        assert self._bytes is not None

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, mapped."""
        info, start = self.tensors[name], self.places[name]
        if info.size == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        data = self._bytes[start : start + info.nbytes]
        if start % info.dtype.itemsize:  # only files of other writers; torch cannot view unaligned bytes
            data = data.clone()
        return data.view(info.dtype).view(info.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights on disk, opened without reading one. Use ``Checkpoint.open``.

    Args:
        path: The file or directory it was opened from.
        name: Its name in reports.
        shards: Its safetensors files.
        config: The model's ``config.json``, None for a plain state dict.
    """

    path: Path
    name: str
    shards: tuple[Shard, ...]
    config: Mapping[str, Any] | None = None
    _home: Mapping[str, Shard] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, name: str | None = None) -> Checkpoint:
        """Open a safetensors file or a (Hugging Face) directory; only headers are read.

        Args:
            path: A ``.safetensors`` file, or a directory that holds ``model.safetensors``, or
                ``model.safetensors.index.json`` and its shards, or exactly one ``.safetensors`` file; or a
                repository of the Hugging Face hub (``ecotone.merging.models.hub``).
            name: Its name in reports; the directory's or the file's name by default.

        Raises:
            CheckpointError: The file is missing, is not safetensors (pickles run code when loaded), is
                corrupt or truncated, or a shard is missing or holds other tensors than the index says.
        """
        place = located(path)
        directory = place if place.is_dir() else None
        shards = _directory_shards(place) if directory else (read_header(place),)
        home: dict[str, Shard] = {}
        for shard in shards:
            for tensor in shard.tensors:
                if tensor in home:
                    raise CheckpointError(
                        f"{place}: tensor {tensor!r} is stored in both {home[tensor].path.name} and {shard.path.name}.",
                        "Export the model again.",
                    )
                home[tensor] = shard
        if not home:
            raise CheckpointError(f"{place}: expected tensors, found none.", "Export the model again.")
        return cls(place, name or default_name(place), shards, _config(directory), home)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """By name, the shape and type of every tensor."""
        return {name: shard.tensors[name] for name, shard in self._home.items()}

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The headers' free text."""
        return {key: value for shard in self.shards for key, value in shard.metadata.items()}

    @property
    def is_hugging_face(self) -> bool:
        """True for a directory with a ``config.json``."""
        return self.config is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def stored(self) -> bool:
        """True: tensors are read as the files hold them."""
        return True

    @property
    def rows(self) -> int | None:
        """None: the embeddings are as its files have them."""
        return None

    @property
    def files(self) -> Path:
        """The file or directory it was opened from."""
        return self.path

    @property
    def tokenizer(self) -> Path:
        """The file or directory it was opened from."""
        return self.path

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name``, memory-mapped copy-on-write."""
        return self._home[name].tensor(name)

    def flat(self, name: str) -> Tensor:
        """The tensor ``name``, flat."""
        return self.tensor(name).reshape(-1)

    def holder(self, name: str) -> Checkpoint:
        """Itself."""
        return self

    def working_bytes(self, name: str) -> int:
        """0: tensors are mapped."""
        return 0

    def mergekit_reference(self) -> str:
        """Its path, or its repository in the hub and commit.

        Raises:
            InputError: The path has a character that mergekit reads otherwise.
        """
        return mergekit_place(self.path)

    def record(self) -> Mapping[str, Any]:
        """Its name and path."""
        return {"name": self.name, "path": str(self.path)}

    def named(self, name: str) -> Checkpoint:
        """The same checkpoint under another name."""
        return replace(self, name=name)


def read_header(path: Path) -> Shard:
    """The header of a safetensors file.

    Raises:
        CheckpointError: The file is a pickle, is not safetensors, is corrupt or truncated, or cannot be read.
    """
    try:
        _refuse_other_formats(path)
        header = headers.read(path)
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: expected a file, found a link that leads nowhere ({path.readlink()}).",
                "Download or copy the model again.",
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}).", "Check the file and its permissions."
        ) from error
    return Shard(path, header.tensors, header.places, header.metadata)


def located(path: str | Path) -> Path:
    """The file or directory that a path or the name of a hub's repository (``ecotone.merging.models.hub``) means.

    Raises:
        CheckpointError: There is no such file (the nearest name is given), or the hub does not give the repository.
    """
    place = hub.snapshot(Path(path).expanduser())
    if place.exists():
        return place
    siblings = sorted(p.name for p in place.parent.iterdir()) if place.parent.is_dir() else []
    close = get_close_matches(place.name, siblings, n=1, cutoff=0.6)
    if close:
        raise CheckpointError(f"{place}: no such file or directory.", f"Did you mean {str(place.parent / close[0])!r}?")
    if hub.is_repository(str(path)):
        return hub.located(str(path))
    remedy = "Check the path; in a recipe it is relative to the recipe's folder."
    raise CheckpointError(f"{place}: no such file or directory.", remedy)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no model."""
    models = (path / SINGLE, path / INDEX)
    return (path / ADAPTER_CONFIG).is_file() and not any(model.is_file() for model in models)


def is_safetensors(path: Path) -> bool:
    """Whether a path is a file that begins with a header of safetensors, or is named so."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            length, start = int.from_bytes(file.read(8), "little"), file.read(1)
        return start == b"{" and length <= min(path.stat().st_size - 8, headers.HEADER_LIMIT)
    except OSError:
        return False


def _refuse_other_formats(path: Path) -> None:
    if path.suffix.lower() == ".gguf":
        raise _gguf(path)
    if not path.is_file():
        return  # reading a pipe might never end
    with path.open("rb") as file:
        start = file.read(2)
    zipped_or_pickled = start == b"PK" or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))
    if path.suffix.lower() in PICKLES or (zipped_or_pickled and path.suffix.lower() != ".safetensors"):
        raise _pickle(path, [path])


def _pickle(path: Path, files: Sequence[Path]) -> CheckpointError:
    first = files[0]
    return CheckpointError(
        f"{path}: expected safetensors, found a pickle ({first.name}), which can run any code when it is loaded.",
        "If you trust it, convert it to safetensors."
        if not can_be_pasted(first)
        else f'If you trust it, convert it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{first}', weights_only=True), '{first.with_suffix('.safetensors')}')\"",
    )


def _gguf(file: Path) -> CheckpointError:
    folder = str(file.parent / file.stem)
    return CheckpointError(
        f"{file}: expected safetensors, found GGUF, which holds quantised weights.",
        "Give the checkpoint that it was made from."
        if not can_be_pasted(file)
        else "Give the checkpoint that it was made from, or convert it (pip install transformers gguf accelerate): "
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[k.from_pretrained('{file.parent}', gguf_file='{file.name}').save_pretrained('{folder}') for k in (M, T)]\"",
    )


def _directory_shards(path: Path) -> tuple[Shard, ...]:
    if (path / SINGLE).is_file():  # transformers, too, prefers it to an index
        return (read_header(path / SINGLE),)
    if (path / INDEX).is_file():
        return _indexed_shards(path)
    if is_adapter(path):
        raise CheckpointError(
            f"{path}: expected a full model, found a LoRA adapter.",
            "Give it as an expert beside its base, or merge it first with the program that made it (PEFT: "
            "merge_and_unload(), then save_pretrained()).",
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return (read_header(files[0]),)
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise CheckpointError(
            f"{path}: expected {SINGLE}, {INDEX} or exactly one .safetensors file, found {len(files)}: {names}.",
            f"Add the index, or give one file's path, such as {files[0]}.",
        )
    pickles = sorted(file for file in path.iterdir() if file.suffix.lower() in PICKLES and file.is_file())
    if pickles:
        raise _pickle(path, pickles)
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise _gguf(ggufs[0])
    raise CheckpointError(
        f"{path}: expected {SINGLE}, {INDEX} or one .safetensors file, found none.", "Is it the right directory?"
    )


def _indexed_shards(path: Path) -> tuple[Shard, ...]:
    weight_map = _weight_map(path)
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).is_absolute() or ".." in Path(file).parts or shown(file) != file:
            raise CheckpointError(
                f"{path / INDEX}: expected shards beside the index or in folders beside it, found {file!r}.",
                "Move them there and write their names into the index.",
            )
    missing = [file for file in files if not _is_file(path / file)]
    if missing:
        raise _missing_shards(path, weight_map, missing)
    shards = tuple(read_header(path / file) for file in files)
    stored = {name for shard in shards for name in shard.tensors}
    lacking = sorted(weight_map.keys() - stored)
    if lacking:
        raise CheckpointError(
            f"{path}: expected the tensors that {INDEX} names, found no {lacking[0]!r} in its shards"
            f"{_and_more(len(lacking), 'tensor')}. Is the index one of another save?",
            "Download or export the model again.",
        )
    return shards


def _is_file(path: Path) -> bool:
    """Whether a path that a stranger wrote is a file's; it may be none that a disk can hold."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _weight_map(path: Path) -> dict[str, str]:
    """By the tensor, the file that the index of a directory names."""
    try:
        weight_map: dict[str, str] = foreign_object(path / INDEX, headers.HEADER_LIMIT)["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("a file's name is no text")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path / INDEX}: expected a JSON object whose weight_map gives the file of each tensor ({told(error)}).",
            "Download or export the model again.",
        ) from error
    return weight_map


def _missing_shards(path: Path, weight_map: Mapping[str, str], missing: Sequence[str]) -> CheckpointError:
    """Of shards that an index names: were they renamed, or never written?"""
    message = f"{path}: the shard {missing[0]!r}, named in {INDEX}, is missing{_and_more(len(missing), 'shard')}"
    held, renamed = {}, {}
    for file in _unread(path):
        with suppress(CheckpointError):  # it may be no model
            held[file] = read_header(path / file).tensors.keys()
    for shard in missing:
        wanted = {name for name, place in weight_map.items() if place == shard}
        found = [file for file, names in held.items() if wanted and wanted <= names]
        if found:
            renamed[shard] = found[0]
    if not renamed:
        return CheckpointError(f"{message}.", "Download or export the model again.")
    shard, file = next(iter(renamed.items()))
    rest = "" if len(renamed) == len(missing) else " Others were not found under any name: download the model again."
    return CheckpointError(
        f"{message}, and {file!r} beside it holds its tensors.", f"Rename {file} to {shard}, and so on.{rest}"
    )


def _and_more(count: int, noun: str) -> str:
    return "" if count == 1 else f" (the first of {count} such {noun}s)"


def _unread(path: Path) -> list[str]:
    """Names of safetensors files of a directory that opening it does not read; none where it has one form alone."""
    if (path / SINGLE).is_file():
        read = {SINGLE}
    elif (path / INDEX).is_file():
        read = set(_weight_map(path).values())
    else:
        return []
    files = sorted(file.name for file in path.glob("*.safetensors"))
    return [file for file in files if file not in read and file != ADAPTER and not file.startswith("consolidated")]


def unread(model: Path) -> str:
    """Words on safetensors files of a model's directory that are not read; empty where there is none.

    An index beside ``model.safetensors`` is not, as with transformers; nor is a shard that the index does not name.
    """
    files = _unread(model) if model.is_dir() else []
    if not files:
        return ""
    few = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    return f"{SINGLE if (model / SINGLE).is_file() else INDEX} is read; not read: {few}"


def check_index(path: Path) -> None:
    """Refuse a directory whose index of shards has no ``metadata``, which transformers reads and we do not.

    Raises:
        CheckpointError: It has none. The message has a command that adds it.
    """
    index = path / INDEX
    if not path.is_dir() or (path / SINGLE).is_file() or not index.is_file():
        return
    metadata = json_object(index, "Download or export the model again.", headers.HEADER_LIMIT).get("metadata")
    if not isinstance(metadata, dict):
        found = "none" if metadata is None else f"a {type(metadata).__name__}"
        code = (
            f"import json, pathlib; p = pathlib.Path({str(index)!r}); "
            "p.write_text(json.dumps(dict(json.loads(p.read_text()), metadata={})))"
        )
        raise CheckpointError(
            f"{index}: metadata: expected an object, without which transformers does not load the shards, "
            f"found {found}.",
            f'Add an empty one: python -c "{code}"' if can_be_pasted(index) else "Add an empty one.",
        )


def _config(directory: Path | None) -> dict[str, Any] | None:
    if directory is None or not (directory / "config.json").is_file():
        return None
    return json_object(directory / "config.json", "Download or export the model again.")


def json_object(path: Path, remedy: str, limit: int = LARGEST) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        remedy: What to do about a file that is no JSON.
        limit: The most bytes of it.

    Raises:
        CheckpointError: It cannot be read, is no JSON, or holds another value than an object.
    """
    try:
        return foreign_object(path, limit)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).", remedy) from error
    except MalformedError as error:
        raise CheckpointError(f"{path}: {error}.", remedy) from error


def default_name(path: Path) -> str:
    """The name of a model in reports: that of its repository, its directory or its file."""
    of_hub = hub.name_of(path)
    if of_hub:
        return shown(of_hub)
    resolved = path.resolve()
    if resolved.is_dir():
        return shown(resolved.name)
    return shown(resolved.parent.name if resolved.stem == "model" else resolved.stem)
