"""Statistics on disk: one safetensors file each, named by all that it depends on, whole or not there."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from xxhash import xxh3_128

from ecotone.merging.models import headers
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.files import synchronised
from ecotone.populations.folders import cache_folder
from ecotone.populations.trial import Gathered

_log = logging.getLogger("ecotone")


class Cache:
    """Statistics by key, in a folder of this machine.

    Args:
        folder: The folder that holds them; None is ``statistics`` in ``$ECOTONE_CACHE``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder: Path = cache_folder() / "statistics" if folder is None else folder

    def file(self, key: str) -> Path:
        """The path of the statistics of that key, whether they exist or not."""
        return self.folder / f"{key}.safetensors"

    def find(self, key: str) -> Gathered | None:
        """The statistics under ``key``; None when there are none. A damaged file is logged and counts as missing."""
        tensors = self._whole(key)
        return None if tensors is None else gathered(key, tensors)

    def holds(self, wanted: Gathered) -> bool:
        """Whether the cache holds exactly the wanted statistics, undamaged."""
        return self.find(wanted.key) == wanted

    def read(self, wanted: Gathered) -> dict[str, Tensor]:
        """The tensors, by the layers' names.

        Raises:
            InputError: They do not lie here, or others do.
        """
        tensors = self._whole(wanted.key)
        if tensors is None or gathered(wanted.key, tensors) != wanted:
            raise InputError(
                f"{self.file(wanted.key)}: expected the statistics of digest {wanted.digest}, found none or others.",
                "Gather them again: `ecotone statistics`.",
            )
        return tensors

    def _whole(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under ``key``; None unless the file is as it was written."""
        file = self.file(key)
        if file.name != f"{key}.safetensors" or not file.exists():  # a journal from elsewhere may name any path
            return None
        try:
            headers.read(file)
            tensors = load_file(file)
            with safe_open(file, "pt") as opened:
                recorded = (opened.metadata() or {}).get("digest")
        except (OSError, SafetensorError, CheckpointError, ValueError, KeyError) as error:
            _log.warning("%s cannot be read (%s); it is made again.", file, error)
            return None
        if digest_of(tensors) != recorded:
            _log.warning("%s is damaged: its numbers are not those that were written; it is made again.", file)
            return None
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Gathered:
        """Keep ``tensors`` under ``key``; they appear whole or not at all.

        Args:
            key: All that they depend on.
            tensors: By the layers' names, on the CPU.
            about: Free text for the file's header.

        Raises:
            InputError: The folder cannot be written.
        """
        record, file = gathered(key, tensors), self.file(key)
        draft = file.with_name(f".{key}-{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                draft,
                {
                    **about,
                    "digest": record.digest,
                },
            )
            synchronised(draft)
            draft.replace(file)
            synchronised(self.folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise InputError(
                f"{self.folder}: cannot be written ({error}).",
                "Statistics are kept there; $ECOTONE_CACHE names another folder.",
            ) from error
        return record


def gathered(key: str, tensors: Mapping[str, Tensor]) -> Gathered:
    """The journal's record of ``tensors``: key, digest, count and size."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Gathered(key, digest_of(tensors), len(tensors), nbytes)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and numbers, as 32 hexadecimal digits."""
    hasher = xxh3_128()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
