"""The beginning of a run: nobody else begins one in its directory, and what an earlier attempt left there is kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ecotone.experiments.runs import Run
from ecotone.experiments.storage import FILES, JOURNAL, Place
from ecotone.populations.birth import born, claimed, unborn
from ecotone.populations.errors import InputError
from ecotone.populations.folders import OWN_FOLDER

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Beginning:
    """A directory that a run begins in.

    Args:
        directory: The run directory.
        lock: The lock of its journal, which the journal takes over.
        left: Whether an attempt that never began has left something there.
        notify: Called with a sentence when files are moved.
    """

    directory: Path
    lock: IO[str]
    left: bool
    notify: Callable[[str], None]

    def make_room(self, recipe: str) -> None:
        """Move the files of an attempt that never began into a folder ``unborn-1``, or the next number.

        Args:
            recipe: The text of the new ``recipe.yaml``: an equal one stays.

        Raises:
            InputError: They cannot be moved.
        """
        if not self.left:  # then such files are the user's own
            return
        found = [file for name in FILES if name != JOURNAL and (file := self.directory / name).is_file()]
        try:
            moved = [file for file in found if not (file.name == RECIPE and file.read_bytes() == recipe.encode())]
            if not moved:
                return
            folders = (self.directory / f"unborn-{number}" for number in itertools.count(1))
            aside = next(folder for folder in folders if not folder.exists())
            aside.mkdir(OWN_FOLDER)
            for file in moved:
                file.rename(aside / file.name)
        except OSError as error:
            raise InputError(
                f"{self.directory}: the files of an attempt that never began cannot be moved "
                f"({error.strerror or error}).",
                "Check the permissions and the space, or choose another --out.",
            ) from error
        self.notify(f"Its {', '.join(file.name for file in moved)}: now in {aside}.")


@contextlib.contextmanager
def begun(place: Place, notify: Callable[[str], None]) -> Iterator[Beginning]:
    """A directory without a run. Until the end no other process begins one there.

    Raises:
        InputError: A run is there, or statistics.
        JournalError: Another process writes there, or the directory cannot be written.
    """
    directory = place.directory
    journal = directory / JOURNAL
    _refuse_run(place)  # before anything is made there
    left = unborn(journal)
    with claimed(journal) as lock:
        _refuse_run(place)
        if left:
            notify(f"{place.where}: a run was to begin there and never did. This one takes its place.")
        recipe = directory / RECIPE
        ours = not recipe.exists()
        try:
            yield Beginning(directory, lock, left, notify)
        finally:
            with contextlib.suppress(OSError):
                if ours and not born(journal):  # nothing is left of a run that does not begin
                    recipe.unlink(missing_ok=True)


def _refuse_run(place: Place) -> None:
    directory = place.directory
    if not born(directory / JOURNAL):
        return
    if not Run(directory).goals:
        raise InputError(f"{directory}: expected no journal, found one of statistics.", "Choose another --out.")
    raise InputError(f"{directory}: a run is there already.", f"`ecotone resume {place.where}`, or another --out.")
