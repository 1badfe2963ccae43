"""Checkpoints out: any genome as a Hugging Face directory or a plain safetensors file.

The merged weights are computed and written a few megabytes at a time, so a model of any size can be exported in
little memory. Everything is written under a temporary name, synchronised with the disk, and renamed when complete. What
a killed export left is removed by the next one to the same folder.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ecotone.merging.adapters import MergedAdapter
from ecotone.merging.companions import Companion, companions
from ecotone.merging.kernel.lazy import fill, formed
from ecotone.merging.kernel.materialise import Mixture, mix
from ecotone.merging.models import headers, tokenizers
from ecotone.merging.models.checkpoint import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model, TensorInfo
from ecotone.merging.models.refused import MERGEABLE
from ecotone.merging.models.ties import tied_matrices, untied
from ecotone.merging.placement import apart
from ecotone.merging.sources import Sources
from ecotone.populations import files
from ecotone.populations.errors import EcotoneError, InputError
from ecotone.populations.genome import Genome

BUFFER_BYTES = 8 * 2**20
CARD = "README.md"
RECORD = "ecotone.json"
_log = logging.getLogger("ecotone")


def export_directory(
    sources: Sources,
    genome: Genome,
    directory: str | Path,
    card: str,
    record: Mapping[str, Any],
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a merged model that ``from_pretrained`` loads.

    The configuration is the one that the merge was scored with. Generation config, processors, tokenizer, chat
    template and licences come from the base, or from the first expert that has them (``ecotone.merging.companions``),
    the tokenizer of united vocabularies from the model with the most tokens; code and weights in other formats do not.

    Args:
        sources: The models of the merge; the one the files come from must be a Hugging Face directory.
        genome: The merge.
        directory: The folder to write to. It must not exist or be empty.
        card: The model card, written to ``README.md``.
        record: The history of the model (lineage, scores), written to ``ecotone.json``.
        dtype: Type of the weights (``"bfloat16"``, ...); by default each tensor keeps its own.
        shard_bytes: Largest size of one weights file; a larger tensor has a file of its own.

    Returns:
        The directory.

    Raises:
        InputError: The genome does not fit, the target is not empty, there is no configuration, the type is not a
            floating-point type, or the disk is too full.
    """
    target = _empty(directory)
    configured = sources.configured_for(genome)
    if not configured.is_hugging_face:
        raise InputError(
            f"{configured.path}: expected a Hugging Face directory with a config.json to take the configuration "
            "from, found plain weights.",
            "Export to a .safetensors file instead.",
        )
    writer = _Writer.of(sources, genome, dtype)
    with _renamed(target, writer.nbytes) as partial:
        for companion in companions(sources, genome):
            companion.write(partial)
        _write_json(partial / "config.json", _config(_as_stored(configured, sources.layout), writer.dtype))
        writer.write_shards(partial, shard_bytes)
        describe(partial, card, record)
    return target


def export_plain_directory(
    sources: Sources,
    genome: Genome,
    directory: str | Path,
    card: str,
    record: Mapping[str, Any],
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write a merged state dict as a directory of one weights file, its card and its record.

    For models that are no Hugging Face directories; arguments, result and errors as for ``export_directory``.
    """
    target = _empty(directory)
    writer = _Writer.of(sources, genome, dtype)
    with _renamed(target, writer.nbytes) as partial:
        metadata = {"ecotone": json.dumps({"record": RECORD}), **sources.layout.aliases}
        writer.write(partial / SINGLE, list(writer.entries), metadata)
        describe(partial, card, record)
    return target


def export_file(
    sources: Sources,
    genome: Genome,
    path: str | Path,
    record: Mapping[str, Any],
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write a merged state dict to one safetensors file.

    Args:
        sources: The models of the merge.
        genome: The merge.
        path: The file to write; it must not exist, and its directory must.
        record: The history of the model, stored as JSON under ``ecotone`` in the file's metadata.
        dtype: Type of the weights; by default each tensor keeps its own.

    Returns:
        The path.

    Raises:
        InputError: The genome does not fit, the file exists, the type is not a floating-point type, or the disk is
            too full.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: expected a path that ends in .safetensors.")
    if target.exists():
        raise InputError(f"{target}: the file exists.", "Choose another name, or remove it.")
    writer = _Writer.of(sources, genome, dtype)
    with _renamed(target, writer.nbytes, folder=False) as partial:
        writer.write(partial, list(writer.entries), {"ecotone": json.dumps(record), **sources.layout.aliases})
    return target


def export_adapter(
    merged: MergedAdapter,
    directory: str | Path,
    tokenizer: Path,
    card: str,
    record: Mapping[str, Any],
    measured: Callable[[Path], tuple[str, Mapping[str, Any]]] | None = None,
) -> Path:
    """Write a merge of adapters as an adapter that PEFT loads, with its card and its record.

    Args:
        merged: The adapter.
        directory: The folder to write to. It must not exist or be empty.
        tokenizer: The folder of the merge's tokenizer, which is copied if there is one.
        card: The model card.
        record: The history of the model.
        measured: Given the folder of the finished adapter, before it has its name, gives another card and record.

    Returns:
        The directory.

    Raises:
        InputError: The target is not empty, or the disk is too full.
    """
    target = _empty(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(target, sum(tensor.nbytes for tensor in merged.tensors.values())) as partial:
        for name in tokenizers.files(tokenizer):
            Companion(name, tokenizer / name).write(partial)
        _write_json(partial / ADAPTER_CONFIG, merged.config)
        save_file(dict(merged.tensors), partial / ADAPTER, {"format": "pt"})
        describe(partial, card, record)
        if measured is not None:
            describe(partial, *measured(partial))
    return target


@dataclass(frozen=True)
class _Writer:
    """Writes the tensors of one merge.

    Args:
        sources: The models.
        mixture: The merge.
        dtype: Type of the merged tensors, None for their own.
        cut: The merge as a model of its own, where the recipe cuts updates to a rank.
    """

    sources: Sources
    mixture: Mixture
    dtype: torch.dtype | None
    cut: Model | None = None

    @classmethod
    def of(cls, sources: Sources, genome: Genome, dtype: torch.dtype | str | None) -> _Writer:
        """The writer of a genome's merge."""
        cut = None if sources.rank is None else sources.cut(genome)
        return cls(sources.tuned(genome), sources.mixture(genome), _dtype(dtype), cut)

    @property
    def entries(self) -> dict[str, TensorInfo]:
        """The written tensors, by name: merged tensors, then buffers. Wide types come first to align all."""
        layout = self.sources.layout
        merged = {name: TensorInfo(info.shape, self.dtype or info.dtype) for name, info in layout.parameters.items()}
        copied = {
            name: TensorInfo(info.shape, self.dtype or info.dtype) if name in layout.kept else info
            for name, info in layout.buffers.items()
        }
        return dict(sorted((merged | copied).items(), key=lambda item: -item[1].dtype.itemsize))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.entries.values())

    def write_shards(self, directory: Path, shard_bytes: int) -> None:
        """Write ``model.safetensors``, or several shards and their index."""
        shards = _shards(self.entries, shard_bytes)
        if len(shards) == 1:
            self.write(directory / SINGLE, shards[0], {})
            return
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self.write(directory / file, names, {})
            weight_map.update(dict.fromkeys(names, file))
        _write_json(directory / INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})

    def write(self, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        """Write one safetensors file of some of the tensors."""
        known = self.entries
        entries = {name: known[name] for name in names}
        first, _ = headers.written(entries, metadata)
        with path.open("wb") as file:
            file.write(first)
            for name, info in entries.items():
                self._write_tensor(file, name, info)

    def _write_tensor(self, file: BinaryIO, name: str, info: TensorInfo) -> None:
        layout = self.sources.layout
        if name in layout.buffers:
            source = self.sources.giver(name).flat(name)
            for low in range(0, info.size, BUFFER_BYTES):
                part = formed(source[low : low + BUFFER_BYTES]).to(info.dtype).contiguous()
                file.write(part.view(torch.uint8).numpy().data)
            return
        start, _ = layout.span(name)
        stretch = self.sources.stretch(name)
        cut = None if self.cut is None else self.cut.flat(name)
        length = BUFFER_BYTES // info.dtype.itemsize
        buffer = torch.empty(min(length, info.size), dtype=info.dtype)
        for low in range(0, info.size, length):
            part = buffer[: min(length, info.size - low)]
            piece = slice(low, low + part.numel())
            if cut is not None:
                fill(part, cut[piece])
            else:
                mix(stretch[piece], start + low, [self.mixture], [part], self.sources.large)
            file.write(part.view(torch.uint8).numpy().data)


def _shards(entries: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in entries.items():
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards


@contextmanager
def _renamed(target: Path, nbytes: int, folder: bool = True) -> Iterator[Path]:
    """A draft beside ``target``, renamed to it on success and removed otherwise.

    On success everything is on the disk before it has its name, and the name is before the export returns.
    """
    if not target.parent.is_dir():
        raise InputError(f"{target}: its directory {target.parent} does not exist.", "Create it first.")
    for left in files.abandoned(target.parent):
        _log.warning("%s: removed what an export that was killed had left behind.", left)
        files.remove(left)
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        wanted, found = apart(nbytes, free)
        raise InputError(
            f"{target}: expected {wanted} of free disk, found {found}.",
            "Free some space or export to another disk.",
        )
    try:
        with files.drafted(target, folder) as partial:
            yield partial
            files.all_synchronised(partial)
            files.moved(partial, target, exclusive=True)
            files.synchronised(target.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.ENOTEMPTY:
            raise InputError(
                f"{target}: something else was written there meanwhile, which is kept.", "Export to another path."
            ) from error
        raise EcotoneError(
            f"{target}: the export could not be written ({error}).",
            "Nothing was left behind. Free some space, or export to another disk.",
        ) from error


def check_target(target: Path) -> None:
    """Refuse a place that an export may not be written to: a file that exists, or a folder that is not empty.

    Raises:
        InputError: It is one.
    """
    if target.suffix == ".safetensors" and target.exists():
        raise InputError(f"{target}: the file exists.", "Choose another name, or remove it.")
    _empty(target)


def _empty(directory: str | Path) -> Path:
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: expected a new or empty directory to export to.", "Choose another, or remove it.")
    return target


def describe(directory: Path, card: str, record: Mapping[str, Any]) -> None:
    """Write an export's model card and its record."""
    files.written_whole(directory / CARD, card)
    _write_json(directory / RECORD, record)


def _as_stored(model: Model, layout: Layout) -> Mapping[str, Any]:
    """A model's configuration. It ties nothing if the export stores an output of its own.

    Encoders with decoders keep what it says: they compute otherwise where it says that they are tied.
    """
    config = model.config or {}
    own = any(name in layout.parameters or name in layout.buffers for name in tied_matrices(model))
    return untied(config) if own and not config.get("is_encoder_decoder") else config


def _config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The configuration with the type of the weights set (``dtype``; ``torch_dtype`` before transformers 4.56)."""
    updated = dict(config)
    if dtype is not None:
        key = "dtype" if "dtype" in updated else "torch_dtype"
        updated[key] = str(dtype).removeprefix("torch.")
    return updated


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    files.written_whole(path, json.dumps(record, indent=2) + "\n")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    known = {str(kind).removeprefix("torch."): kind for kind in MERGEABLE}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise InputError(f"dtype: expected one of {', '.join(known)}, found {name!r}.")
    return known[name]
