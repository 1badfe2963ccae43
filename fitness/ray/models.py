"""The models' files as the workers find them: they must be the same everywhere, and stay so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ecotone.fitness.ray.events import reason
from ecotone.merging.models.files import RESTORE, ModelChangedError, after_death
from ecotone.populations.contents import Content, Record, Stamp, changes


@dataclass(frozen=True)
class Opened:
    """What a worker says once it has opened the models.

    Args:
        pid: The id of its process.
        node: The id of its node.
        host: The name of its machine.
        contents: The hashes of the models' files.
        mapped: The files of weights, which are mapped.
    """

    pid: int
    node: str
    host: str
    contents: Record
    mapped: Mapping[Path, Content]


class SameModels:
    """Compares the models of each worker with those of the first one, and looks at them when a worker has died."""

    def __init__(self) -> None:
        self._first: Opened | None = None
        self._here: dict[Path, Content] = {}

    def refusal(self, opened: Opened) -> ModelChangedError | None:
        """The error about a worker whose files have other bytes than the first one's; None where they are the same."""
        if self._first is None:
            self._first = opened
            self._here = {
                path: replace(found, stamp=Stamp.of(path)) for path, found in opened.mapped.items() if path.is_file()
            }
            return None
        for change in changes(self._first.contents, opened.contents):
            return ModelChangedError(
                f"{change.where}: {change.file} on {opened.host} is not that of the first worker, on "
                f"{self._first.host}: xxh3_128 {change.now or 'of no file'} there, {change.was or 'of no file'} here.",
                "Give all nodes the same files, best on a file system that they share.",
            )
        return None

    def check_after_death(self, error: Exception) -> None:
        """Look at the files, as far as they lie on this machine, after a worker has died.

        Raises:
            ModelChangedError: One has changed: reading a mapped file that was cut short ends a process by SIGBUS.
        """
        if found := after_death(self._here):
            raise ModelChangedError(
                f"A worker died ({reason(error)}) of a model's file that has changed while it was mapped: {found}.",
                RESTORE,
            )
