"""The files of a search that trackers get at its end."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecotone.experiments.tracking.notes import say
from ecotone.experiments.tracking.subject import Subject
from ecotone.experiments.tracking.summary import Summary
from ecotone.populations import facts
from ecotone.populations.errors import JournalError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal, Row
from ecotone.populations.secrets import stripped


def write_artifacts(folder: Path, journal: Journal, subject: Subject, summary: Summary) -> None:
    """Write the files of a search into ``folder``.

    - ``recipe.yaml`` and ``environment.json``: what was run, and with which versions of what.
    - ``front.json`` (MLflow shows it as a table) and ``front.csv``: the front, a member a row, in the order of the
      steps of ``front/<objective>``.
    - ``genomes.json``: the front's genomes and those of the merges to compare with.
    - ``candidates.csv``: every candidate that was evaluated.
    - ``report.html``: what `ecotone compare --html` writes of a finished search with several objectives.
    """
    _write_json(folder / "front.json", summary.table)
    _write_csv(folder / "front.csv", summary.table["columns"], summary.table["data"])
    _write_json(folder / "genomes.json", _genomes(journal, subject, summary.front))
    _write_json(folder / "environment.json", _environment(journal))
    _write_candidates(folder / "candidates.csv", journal, subject)
    recipe = journal.path.parent / "recipe.yaml"
    if recipe.is_file():  # which older versions wrote as it was
        (folder / "recipe.yaml").write_text(stripped(recipe.read_text("utf-8")), "utf-8")
    if journal.fact(facts.STATE) == "finished" and len(subject.goals) > 1 and summary.front:
        _write_report(journal.path.parent, folder / "report.html")


def _write_report(directory: Path, path: Path) -> None:
    from ecotone.experiments.compare import compare
    from ecotone.experiments.pages import write
    from ecotone.experiments.runs import Run

    try:
        write(compare([Run(directory)]), path)
    except Exception as error:  # all else is worth having without it
        say(f"no report: {type(error).__name__}: {error}")


def _genomes(journal: Journal, subject: Subject, front: Sequence[Row]) -> dict[str, Any]:
    members = {}
    for row in front:
        genome = _genome(journal, row.number)
        members[str(row.number)] = {"digest": row.digest, "genome": genome}
    references = {name: json.loads(genome.to_json(residual=False)) for name, genome in journal.references()}
    return {"models": list(subject.models), "members": members, "references": references}


def _genome(journal: Journal, number: int) -> Any:
    """A genome as plain values, without its dense part; None when that was not kept and the rest says nothing."""
    try:
        genome: Genome = journal.trial(number).genome
    except JournalError:
        return None
    return json.loads(genome.to_json(residual=False))


def _environment(journal: Journal) -> dict[str, Any]:
    told = (facts.ALGORITHM, facts.SEED, facts.SIGNATURE, facts.VERSIONS)
    return {fact.name: journal.fact(fact) for fact in told}


def _write_candidates(path: Path, journal: Journal, subject: Subject) -> None:
    names = [goal.name for goal in subject.goals]
    columns = ["number", "parents", "digest", *names, "failure", "seconds"]
    _write_csv(path, columns, (_candidate(row, names) for row in journal.rows()))


def _candidate(row: Row, names: Sequence[str]) -> list[Any]:
    scores: Mapping[str, float] = row.scores or {}
    failure = "" if row.failure is None else f"{row.failure.kind}: {row.failure.message}"
    return [row.number, " ".join(map(str, row.parents)), row.digest, *map(scores.get, names), failure, row.seconds]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
