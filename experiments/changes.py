"""What has changed since a run began: files of models, code and data, and versions of packages.

A run's scores are comparable as long as nothing changes that they depend on. So the hashes of all such files are in its
journal. `resume` and `export` refuse a change. With ``--accept-changes`` they go on, and the journal, the tables, the
trackers and the exports say so from then on.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ecotone.experiments import compose, fingerprints
from ecotone.experiments.accepted import accepted_changes, in_words
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.storage import JOURNAL, url_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging.models.checkpoint import located
from ecotone.merging.models.files import ModelChangedError
from ecotone.merging.sources import Sources
from ecotone.populations import contents, facts
from ecotone.populations.contents import Change, Record
from ecotone.populations.errors import InputError
from ecotone.populations.journal import Journal
from ecotone.populations.space import Space

if TYPE_CHECKING:
    from ecotone.experiments.runs import Run

_log = logging.getLogger("ecotone")
_REMEDY = "Restore it, start a new run, or go on with other scores from here on: --accept-changes."
_SHOWN = 5


def opening(recipe: Recipe, spec: WorkerSpec, space: Space, before: Record) -> list[facts.Note]:
    """The facts of a new run on what its scores depend on.

    Args:
        recipe: The recipe.
        spec: The spec of its workers.
        space: The models, as a worker has opened them.
        before: The fingerprints from before anything was scored. Data that scoring itself changes are left out: a log
            that a function writes is none.
    """
    after = fingerprints.fingerprints(recipe, spec)
    written = {(one.where, one.file) for one in contents.changes(before, after)}
    kept = {
        where: {name: one for name, one in files.items() if one["sort"] == "code" or (where, name) not in written}
        for where, files in before.items()
    }
    return [
        facts.CONTENTS.note(space.contents),
        facts.FINGERPRINTS.note(kept),
        facts.VERSIONS.note(_versions(recipe, spec)),
    ]


class Comparison:
    """A run's files as its journal has them, and as they are.

    Args:
        journal: The journal; open for writing where changes may be accepted.
        recipe: The run's recipe.
        spec: The spec of its workers.
        accept: Whether the user accepts changes.
        command: The command that compares: ``resume`` or ``export``.
        notify: Called with a sentence about what is told, and stops nothing.

    Attributes:
        found: The hashes of files as they are, by the name of the fact.
        versions: The versions of packages as they are, once code has been compared.
    """

    def __init__(
        self,
        journal: Journal,
        recipe: Recipe,
        spec: WorkerSpec,
        accept: bool,
        command: str,
        notify: Callable[[str], None],
    ) -> None:
        self.journal: Journal = journal
        self._recipe = recipe
        self._accept = accept
        self._command = command
        self._notify = notify
        self._spec = spec
        self.found: dict[str, Record] = {}
        self.versions: dict[str, str] = {}
        self._changes: list[tuple[facts.Fact[Mapping[str, Any]], Change]] = []

    def check_code(self) -> None:
        """Compare code and data, and tell of other versions of packages.

        Raises:
            InputError: Something has changed, and that is not accepted.
        """
        recorded = self.journal.fact(facts.FINGERPRINTS)
        created = None if recorded is not None else self.journal.fact(facts.CREATED)
        found = fingerprints.fingerprints(self._recipe, self._spec, before=created)
        self.found[facts.FINGERPRINTS.name] = found
        if recorded is not None:
            self._take(facts.FINGERPRINTS, code_changes(recorded, found))
        versions = self.journal.fact(facts.VERSIONS) or {}
        now = self.versions = _versions(self._recipe, self._spec)
        if texts := [
            f"{name} {was} -> {now.get(name, 'none')}" for name, was in versions.items() if now.get(name) != was
        ]:
            self._notify(f"Warning: other versions than when the run began: {', '.join(texts)}.")

    def check_models(self, found: Record) -> None:
        """Compare the files of models.

        Args:
            found: The hashes of the models' files now.

        Raises:
            InputError: One has changed, and that is not accepted.
        """
        recorded = self.journal.fact(facts.CONTENTS)
        self.found[facts.CONTENTS.name] = found
        if recorded is not None:
            self._take(facts.CONTENTS, contents.changes(recorded, found))

    def check_geometry(self, space: Space) -> None:
        """Compare the inner products, where no change of a model's file was accepted.

        Raises:
            InputError: They differ; or the search cannot be replayed with other models.
        """
        if not any(fact is facts.CONTENTS for fact, _ in self._changes):
            same_models(self.journal, space)
            return
        recorded = np.asarray(self.journal.fact(facts.GEOMETRY) or [])
        if recorded.shape != space.gram.prefix[-1].shape:
            raise InputError("models: expected as many models of the same layout as when the run began, found others.")
        needing = [one.algorithm for one in self._recipe.searches if one.needs().geometry or one.needs().vectors]
        if needing and self.journal.events():
            raise InputError(
                f"--accept-changes: {needing[0]} proposes merges by the models' weights, so with other weights it "
                "cannot propose the recorded ones again.",
                "Restore the models' files, or start a new run.",
            )

    def record(self, space: Space | None = None) -> list[dict[str, Any]]:
        """Write the accepted changes, and what the journal lacks, into the journal; returns the accepted changes.

        Args:
            space: The models, whose geometry is recorded anew where their files were accepted.
        """
        journal, accepted = self.journal, self._records()
        with journal.transaction():
            for fact in (facts.CONTENTS, facts.FINGERPRINTS):
                journal.note(fact, self.kept()[fact.name])
            if space is not None and any(fact is facts.CONTENTS for fact, _ in self._changes):
                journal.note(facts.GEOMETRY, space.gram.prefix[-1].tolist())
            if accepted:
                journal.note(facts.ACCEPTED, [*accepted_changes(journal), *accepted])
        for one in accepted:
            self._notify(f"Warning: accepted: {in_words(one)}.")
        return accepted

    def kept(self) -> dict[str, Record]:
        """The facts as the journal is to have them: as recorded, with the accepted changes; or else as found."""
        facts_of = {}
        for fact in (facts.CONTENTS, facts.FINGERPRINTS):
            recorded, mine = self.journal.fact(fact), [change for one, change in self._changes if one is fact]
            found = self.found[fact.name]
            facts_of[fact.name] = found if recorded is None else _applied(recorded, found, mine)
        return facts_of

    @property
    def accepted(self) -> list[dict[str, Any]]:
        """The accepted changes that are not in the journal."""
        return self._records()

    def _take(self, fact: facts.Fact[Mapping[str, Any]], found: Sequence[Change]) -> None:
        if found and not self._accept:
            more = f" (and {len(found) - 1} more: {_listed(found[1:])})" if len(found) > 1 else ""
            raise InputError(f"{found[0]}{more}.", _REMEDY)
        self._changes += [(fact, change) for change in found]

    def _records(self) -> list[dict[str, Any]]:
        if not self._changes:
            return []
        _, evaluations, _ = self.journal.counts()
        return [
            {
                "time": time.time(),
                "evaluations": evaluations,
                "command": self._command,
                "where": change.where,
                "file": change.file,
                "was": change.was,
                "now": change.now,
            }
            for _, change in self._changes
        ]


def late(journal: Journal, recipe: Recipe, spec: WorkerSpec) -> list[str]:
    """Warnings about code and data that have changed while a run was going: its newer workers had the newer files."""
    found = code_changes(journal.fact(facts.FINGERPRINTS) or {}, fingerprints.fingerprints(recipe, spec))
    return [f"Warning: {change}: workers that were started after that scored with it." for change in found]


def code_changes(recorded: Record, found: Record, *, elsewhere: bool = False) -> list[Change]:
    """The changes of code and data that count.

    Data that were not there before do not: a function may have written them. Nor does what is not there at all any more
    on this machine: who needs it fails in words.

    Args:
        recorded: The fingerprints as they were.
        found: The fingerprints now.
        elsewhere: Whether the record is of another machine, perhaps. Then only files count that are here, and none that
            the preparation step makes.
    """
    counting = []
    for change in contents.changes(recorded, found):
        was, now = (one.get(change.where, {}).get(change.file, {}) for one in (recorded, found))
        gone = change.now is None
        if elsewhere and (gone or change.was is None or was.get("prepared")):
            continue
        if change.was is None and now.get("sort") != "code":
            continue
        if was.get("sized") or now.get("sized"):
            if was.get("bytes") == now.get("bytes"):
                continue
        elif gone and (was.get("cut") or any(one.get("cut") for one in found.get(change.where, {}).values())):
            continue  # it may only be beyond what is looked at
        if not (gone and change.where not in found):
            counting.append(change)
    return counting


def check_record(record: Mapping[str, Any], recipe: Recipe, spec: WorkerSpec) -> None:
    """Refuse to compare the scores of an export with those of other code or data, as far as they lie here.

    Args:
        record: The record of the export; an older one has no fingerprints.
        recipe: Its recipe.
        spec: The spec of a worker that is to score it.

    Raises:
        InputError: Something has changed since the run began.
    """
    recorded = record.get("fingerprints")
    if not isinstance(recorded, Mapping):
        return
    for change in code_changes(recorded, fingerprints.fingerprints(recipe, spec), elsewhere=True):
        raise InputError(f"{change}.", "Restore it: other code or data give other scores.")


class ForExport:
    """The files that an export depends on, compared with a run's journal before it is written, and looked at after it.

    Args:
        run: The run.
        recipe: Its recipe.
        spec: The spec of its workers.
        sources: Its models, opened.
        accept: Whether the user accepts changes.

    Attributes:
        record: The part of the export's record on them.

    Raises:
        InputError: Something has changed since the run began, and that is not accepted.
    """

    def __init__(self, run: Run, recipe: Recipe, spec: WorkerSpec, sources: Sources, accept: bool) -> None:
        tokenizer = None if spec.tokenizer is None else located(spec.tokenizer)
        self._files = sources.files(tokenizer)
        self._file = run.directory / JOURNAL
        self._fetched = url_of(run.directory) is not None  # a copy, for reading
        with Journal.open(self._file) as journal:
            self._compared = Comparison(journal, recipe, spec, accept, "export", _log.warning)
            self._compared.check_code()
            self._compared.check_models(self._files.contents)
            self._accepted = self._compared.accepted
            self.record: dict[str, Any] = {
                "accepted_changes": [*accepted_changes(journal), *self._accepted],
                **self._compared.kept(),
            }

    @contextlib.contextmanager
    def watched(self, target: Path) -> Iterator[None]:
        """Remove ``target``, which is written inside, if a model's file has changed meanwhile.

        Accepted changes are written into the run's journal once the export is there.

        Raises:
            ModelChangedError: A file has changed.
            JournalError: Changes were accepted, and the run is going on.
        """
        with contextlib.ExitStack() as stack:
            if self._accepted and not self._fetched:
                self._compared.journal = stack.enter_context(Journal.open(self._file, write=True))
            yield
            try:
                self._files.look()
            except ModelChangedError:
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                raise
            if self._accepted and not self._fetched:
                self._compared.record()


def same_contents(journal: Journal, space: Space) -> None:
    """Refuse other files of models than the journal was begun with.

    Raises:
        InputError: One has changed.
    """
    for change in contents.changes(journal.fact(facts.CONTENTS) or space.contents, space.contents):
        raise InputError(f"{change}.", "Restore it, or choose another --out.")


def same_models(journal: Journal, space: Space) -> None:
    """Refuse to go on with other weights than the run began with: their inner products tell."""
    known = journal.fact(facts.GEOMETRY)
    if known is None:  # lost with a damaged journal, as `ecotone check --repair` has said
        return
    recorded = np.asarray(known)
    if recorded.shape != space.gram.prefix[-1].shape or not np.allclose(recorded, space.gram.prefix[-1], rtol=1e-6):
        raise InputError(
            "models: their weights are not those that the run began with (their inner products differ).",
            "Restore the files, or start a new run.",
        )


def _versions(recipe: Recipe, spec: WorkerSpec) -> dict[str, str]:
    return {**fingerprints.packages(recipe, spec), **compose.versions()}


def _listed(found: Sequence[Change]) -> str:
    return ", ".join(f"{one.where}: {one.file}" for one in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")


def _applied(recorded: Record, found: Record, accepted: Sequence[Change]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The record with the accepted changes put in, and no other."""
    record = {where: dict(files) for where, files in recorded.items()}
    for change in accepted:
        files = record.setdefault(change.where, {})
        if change.now is None:
            files.pop(change.file, None)
        else:
            files[change.file] = found[change.where][change.file]
    return record
