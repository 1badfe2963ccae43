"""What trials want: scores, gradients, statistics; what each says of itself, and the facts of a run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecotone.populations import facts
from ecotone.populations.facts import FACTS
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.rows import wish_of, wish_text
from ecotone.populations.samples import Sample
from ecotone.populations.trial import (
    WISHES,
    Evaluation,
    Gathered,
    Goal,
    Gradient,
    Scores,
    Statistics,
    Tally,
    Trial,
    Wish,
)
from ecotone.search.manager import Progress

HALF = Scores(sample=Sample(3, 0.25, 0.5, {"acc": np.ones(2)}))
REST = Scores(sample=Sample(3, 0.5, 1.0))
MAGNITUDE = Statistics("magnitude", ("math", "code"), {"examples": 8})


@pytest.mark.parametrize(
    ("wants", "scored", "cost", "tally"),
    [
        (Scores(), True, 1.0, "evaluations"),
        (Scores("held_out"), True, 1.0, "evaluations"),
        (HALF, False, 0.25, "samples"),
        (REST, True, 0.5, "evaluations"),
        (Gradient(("a", "b"), 3, (0.5, 2.0)), False, 0.0, "gradients"),
        (MAGNITUDE, False, 0.0, "statistics"),
    ],
)
def test_wishes_say_what_they_cost_and_count_as(wants: Wish, scored: bool, cost: float, tally: Tally) -> None:
    trial = Trial(0, Genome.uniform(4, [1.0]), wants=wants)
    assert (trial.scored, trial.cost, wants.tally) == (scored, cost, tally)
    assert trial.sample is (wants.sample if isinstance(wants, Scores) else None)
    assert trial.gradient is (wants if isinstance(wants, Gradient) else None)
    progress = Progress()
    progress.count(wants)
    assert (getattr(progress, tally), progress.told, progress.spent) == (1, 1, cost)


@pytest.mark.parametrize("wants", [Scores(), Scores("held_out"), Gradient.of("a", 3, 0.1), MAGNITUDE])
def test_wishes_come_back_from_the_journal(wants: Wish) -> None:
    text = wish_text(wants)
    assert wish_of(text) == wants == pickle.loads(pickle.dumps(wants))
    assert WISHES[json.loads(text)["sort"]] is type(wants)
    assert text == wish_text(pickle.loads(pickle.dumps(wants)))


def test_texts_of_wishes_are_those_that_migrations_write() -> None:
    """Measurements are found by them."""
    assert wish_text(Scores()) == '{"sort": "scores"}'
    assert wish_text(Scores("held_out")) == '{"sort": "scores", "subset": "held_out"}'
    assert wish_text(HALF) == '{"reaches": 0.5, "sort": "scores"}'
    assert wish_of(wish_text(HALF)) == Scores()  # the seed and what was seen are rebuilt by replay


def test_statistics_come_back_and_are_part_of_the_digest(tmp_path: Path) -> None:
    genome, digests = Genome.uniform(4, [1.0]), []
    kept = Gathered("k", "d1", 2, 96)
    for number, one in enumerate((kept, kept, Gathered("k", "d2", 2, 96), Gathered("other", "d1", 2, 96))):
        trial = Trial(0, genome, wants=MAGNITUDE)
        with Journal.create(tmp_path / f"{number}.sqlite") as journal:
            journal.asked(0, 1, [trial])
            journal.arrived([(trial, Evaluation({}, statistics=one, items=8, seconds=2.0))])
            journal.measured(genome, MAGNITUDE, Evaluation({}, statistics=one))
            journal.measured(genome, Scores(), Evaluation({"acc": 0.5}))
        with Journal.open(tmp_path / f"{number}.sqlite") as journal:
            [(_, found)] = journal.evaluations()
            assert (found.statistics, found.items, found.scores) == (one, 8, {})
            assert journal.trial(0) == trial
            assert list(journal.rows()) == []
            [row] = journal.rows(unscored=True)
            assert (row.wants, row.statistics, row.scored, row.partial) == (MAGNITUDE, one.digest, False, False)
            assert journal.evaluation_of(genome.digest) is None  # it was not scored
            assert [(digest, wants) for digest, wants, _ in journal.statistics()] == [(genome.digest, MAGNITUDE)]
            measured = journal.measurement(genome.digest, MAGNITUDE)
            assert measured is not None
            assert measured.statistics == one
            assert journal.measurement(genome.digest, Statistics("magnitude", ("math",))) is None
            digests.append(journal.digest())
    assert digests[0] == digests[1] == digests[3] != digests[2]


# -- facts ---------------------------------------------------------------------------------------------------


def test_each_fact_is_declared_once_and_told_of() -> None:
    assert len({fact.name for fact in FACTS}) == len(FACTS)
    assert {id(fact) for fact in FACTS} == {id(one) for one in vars(facts).values() if isinstance(one, facts.Fact)}
    assert all(fact.about.endswith(".") for fact in FACTS)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        (facts.NAME, "ünï\n'\"%"),
        (facts.SEED, 7),
        (facts.ELAPSED, 0.1 + 0.2),
        (facts.GOALS, (Goal("acc"), Goal("loss", "minimize"))),
        (facts.MODELS, ("a", "b")),
        (facts.GEOMETRY, [[1.0, 1 / 3], [1 / 3, 2.0]]),
        (facts.BUDGET, {"evaluations": 60, "seconds": None}),
        (facts.SYS_PATH, ()),
    ],
    ids=lambda value: value.name if isinstance(value, facts.Fact) else "",
)
def test_facts_come_back_as_what_they_were(tmp_path: Path, fact: facts.Fact[Any], value: Any) -> None:
    with Journal.create(tmp_path / "journal.sqlite") as journal:
        assert journal.fact(fact) is None
        journal.note(fact, value)
        assert journal.fact(fact) == value
        assert type(journal.fact(fact)) is type(value)


def test_a_report_may_hold_arrays(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal.sqlite") as journal:
        journal.note(facts.REPORT, {"front": np.eye(2)})
        assert journal.fact(facts.REPORT) == {"front": [[1.0, 0.0], [0.0, 1.0]]}
