"""The models' files and the user's code as the workers find them: they must be the same everywhere, and stay so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ecotone.fitness.callables import is_installed
from ecotone.fitness.ray.events import reason
from ecotone.merging.models.files import RESTORE, ModelChangedError, after_death
from ecotone.populations.contents import Content, Record, Stamp, changes, contents
from ecotone.populations.errors import EcotoneError, InputError


def own_code() -> dict[Path, str]:
    """By path, the hashes of the modules that this process has imported, but for Ecotone's and installed ones."""
    named = {name: getattr(module, "__file__", None) or "" for name, module in [*sys.modules.items()]}
    own = {
        Path(file).resolve()
        for name, file in named.items()
        if file.endswith(".py") and name.partition(".")[0] != "ecotone" and not is_installed(file)
    }
    return {path: found.digest for path, found in contents(path for path in own if path.is_file()).items()}


@dataclass(frozen=True)
class Opened:
    """What a worker says once it has opened the models.

    Args:
        pid: The id of its process.
        node: The id of its node.
        host: The name of its machine.
        contents: The hashes of the models' files.
        mapped: The files of weights, which are mapped.
        code: By path, the hashes of the user's own modules that it has imported.
    """

    pid: int
    node: str
    host: str
    contents: Record
    mapped: Mapping[Path, Content]
    code: Mapping[Path, str] = field(default_factory=dict)


class SameModels:
    """Compares the models of each worker with those of the first one, and looks at them when a worker has died."""

    def __init__(self) -> None:
        self._first: Opened | None = None
        self._here: dict[Path, Content] = {}

    def refusal(self, opened: Opened) -> EcotoneError | None:
        """The error about a worker whose files have other bytes than the first one's; None where they are the same.

        Of code, the modules count that both have imported.
        """
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
        for path in self._first.code.keys() & opened.code.keys():
            if self._first.code[path] != opened.code[path]:
                return InputError(
                    f"{path}: it has other bytes on {opened.host} than the first worker found on {self._first.host}: "
                    "scores by both would be mixed.",
                    "Restore the file, or stop the run and begin another one.",
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
