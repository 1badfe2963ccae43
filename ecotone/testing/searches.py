"""A conformance suite for search algorithms.

The author of a search gives its tests a subclass with the searches::

    from ecotone.testing.searches import SearchConformance, made
    from my_package import MySettings

    class TestMine(SearchConformance):
        searches = {"mine": made(MySettings(algorithm="mine"))}
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.population import Population
from ecotone.populations.samples import Sample, error_of_mean
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Outcome, Scores, Trial
from ecotone.search.kinds import Context, Pair, SearchSettings
from ecotone.search.protocol import Search, numbered

Made: TypeAlias = Callable[[int], Pair]
"""Gives a search and its population for a seed."""

SIZE = 24
GOALS = (Goal("solved"), Goal("length", "minimize"), Goal("some"))
TASKS = ("odd", "even")
VECTORS: NDArray[np.float32] = np.random.default_rng(3).standard_normal((3, SIZE)).astype(np.float32)
PROBES = np.random.default_rng(4).standard_normal((30, SIZE))


def space_of(
    vectors: NDArray[np.float32],
    blocks: tuple[int, ...] = (0, 10, SIZE),
    tensors: tuple[str, str, str] = ("a", "b", "c"),
) -> Space:
    """Small models of three tensors, whose weights are the rows of ``vectors`` (K, 24), and their geometry."""
    names = tuple(f"model-{i}" for i in range(len(vectors)))
    return Space(
        names,
        tensors,
        np.array([0, 4, 10, SIZE]),
        tuple(f"block-{i}" for i in range(len(blocks) - 1)),
        np.array(blocks),
        GramTable.from_vectors(vectors),
        np.eye(len(vectors)),
        names,
        vectors,
    )


SPACE = space_of(VECTORS)
WOVEN = space_of(VECTORS, tensors=("h.0.attn.qkv", "h.0.mlp.up", "h.1.attn.qkv"))
"""The same models, with two components: the first and the last tensor are attention."""


def made(
    settings: SearchSettings, goals: tuple[Goal, ...] = GOALS, evaluations: int | None = None, space: Space = SPACE
) -> Made:
    """The algorithm of ``settings`` over three small models, on as many of ``goals`` as it asks for, one at least."""
    needs = settings.needs()
    fit = [goal for goal in goals if not (needs.maximised and goal.direction == "minimize")]
    chosen = tuple(fit[: max(1, needs.objectives)])
    tasks = TASKS if needs.gradients else ()
    limits = {"solved": (0.0, 1.0)}
    return lambda seed: settings.make(Context(space, chosen, seed, evaluations, tasks, limits=limits))


def expanded(genome: Genome, vectors: NDArray[np.float32] = VECTORS) -> NDArray[np.float64]:
    """(n,) the weights that a genome stands for."""
    if genome.residual is not None:
        return genome.residual.astype(np.float64)
    found: NDArray[np.float64] = (np.repeat(genome.coefficients, np.diff(genome.boundaries), axis=0) * vectors.T).sum(1)
    return found


def differentiated(trial: Trial) -> Evaluation:
    """The losses of a gradient trial, half squared distances to a point of its task and step, and their gradient."""
    assert trial.gradient is not None
    if trial.number == 25:
        return Evaluation.failed("not finite", "unlucky")
    coefficients, batch = trial.genome.coefficients, trial.gradient
    losses, gradient = {}, np.zeros(coefficients.shape)
    for task, weight in zip(batch.tasks, batch.weights, strict=True):
        away = coefficients - np.random.default_rng([len(task), batch.step]).standard_normal(coefficients.shape)
        losses[task] = 0.5 * float(np.sum(away**2))
        gradient += weight * away
    details = {Evaluation.detail_of(task, "diversity"): 0.5 for task in batch.tasks}
    return Evaluation(losses, details=details, gradient=gradient)


def of_sample(sample: Sample | None, whole: Evaluation) -> Evaluation:
    """The evaluation that a worker gives a trial on a sample of the examples, computed from its scores on all examples.

    Scores are means of the examples' scores.
    """
    if sample is None or not whole.ok:
        return whole
    scores, errors, per_example, items = {}, {}, {}, 0
    for name, values in whole.per_example.items():
        now = values[sample.now(len(values))]
        joined = np.concatenate([sample.seen[name], now]) if sample.start else now
        assert np.array_equal(joined, values[sample.then(len(values))])
        mean = (
            np.count_nonzero(joined) / joined.size if joined.dtype == np.bool_ else float(joined.mean(dtype=np.float64))
        )
        scores[name], errors[name] = mean, error_of_mean(joined, len(values))
        per_example[name] = joined if sample.partial else values
        items += len(now)
    return Evaluation(scores, per_example, items=items, errors=errors if sample.partial else {})


def scored(trial: Trial) -> Evaluation:
    """Scores with real-valued examples, or a gradient; now and then a failure (never of one of the first seven)."""
    if trial.gradient is not None:
        return differentiated(trial)
    if trial.number % 11 == 7:
        return Evaluation.failed("exception", "ValueError: unlucky")
    weights = expanded(trial.genome)
    values = 1 / (1 + np.exp(-PROBES @ weights))
    scores = {"solved": values.mean(), "length": weights @ weights, "some": values[:10].mean()}
    found = Evaluation({name: float(score) for name, score in scores.items()}, {"solved": values})
    return of_sample(trial.sample, found)


def offered(population: Population, trial: Trial, evaluation: Evaluation) -> Outcome:
    """Add an evaluation to the population. Only a trial that is scored on all examples may join it."""
    return population.add(trial, evaluation) if trial.scored else Outcome(accepted=False)


ODD: Mapping[str, Callable[[int, dict[str, float]], dict[str, float] | None]] = {
    "constant": lambda number, usual: {"solved": 0.5, "length": 2.0, "some": 0.0},
    "one constant": lambda number, usual: {**usual, "length": 2.0},
    "huge": lambda number, usual: {**usual, "length": 1e300 * usual["length"], "some": -1e300 * usual["some"]},
    "largest": lambda number, usual: {**usual, "length": 1.7e308 * (-1) ** number, "some": -1.7e308 * (-1) ** number},
    "tiny": lambda number, usual: {**usual, "length": 1 + 1e-15 * usual["length"], "some": 1e-300 * usual["some"]},
    "steps": lambda number, usual: {**usual, "length": float(number % 7 == 0), "some": float(usual["some"] > 0.5)},
    "collinear": lambda number, usual: {**usual, "length": 1 - usual["solved"], "some": usual["solved"]},
    "outlier": lambda number, usual: {**usual, "length": 1e99 if number == 9 else usual["length"]},
    "large outlier": lambda number, usual: {**usual, "length": 1e49 if number == 9 else usual["length"]},
    "rare": lambda number, usual: usual if number % 5 == 0 else None,
    "none": lambda number, usual: None,
}
"""Scores that an objective may give, and from which there is little to learn; None is a failure.

By name, from a trial's number and its usual scores.
"""


def odd(name: str) -> Callable[[Trial], Evaluation]:
    """Gives trials the ``ODD`` scores of that name. Those by example, and gradients, are as usual."""

    def score(trial: Trial) -> Evaluation:
        whole = scored(trial)
        if trial.gradient is not None or not whole.ok or trial.sample is not None:
            return whole
        scores = ODD[name](trial.number, dict(whole.scores))
        return Evaluation.failed("exception", "odd") if scores is None else Evaluation(scores, whole.per_example)

    return score


@dataclass
class Driver:
    """A strict loop, as the manager's: a window in flight, told in order. Everything it does is written down.

    Args:
        search: The search.
        population: Its population.
        batch: Trials asked for together.
        window: The most trials in flight.
        score: What a trial scores.
    """

    search: Search
    population: Population
    batch: int = 3
    window: int = 7
    score: Callable[[Trial], Evaluation] = scored
    flying: deque[Trial] = field(default_factory=deque)
    asked: int = 0
    log: list[tuple[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def ask(self, count: int) -> None:
        """Ask for ``count`` trials."""
        trials = self.search.ask(count)
        assert len(trials) <= count
        assert numbered(self.asked, trials)
        self.asked += len(trials)
        self.flying += trials
        if trials:
            self.log.append(("ask", count))
            self.digests += [trial.genome.digest for trial in trials]

    def tell(self) -> None:
        """Score and tell the oldest trial in flight."""
        trial = self.flying.popleft()
        evaluation = self.score(trial)
        outcome = offered(self.population, trial, evaluation)
        self.search.tell(trial, evaluation, outcome)
        self.log.append(("tell", (trial, evaluation, outcome)))

    def to(self, trials: int) -> Driver:
        """Go on until so many trials were asked for."""
        while self.asked < trials:
            if len(self.flying) + self.batch <= self.window:
                self.ask(min(self.batch, trials - self.asked))
            assert self.flying, "it waits although everything is told"
            self.tell()
        return self


def members(population: Population) -> list[int]:
    """Numbers of the population's members."""
    return [member.trial.number for member in population.members]


def to_text(state: Mapping[str, Any]) -> str:
    """The state as JSON; fails on anything that is not a number, text, an array, or a list or dict of these."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.bool_ | np.integer | np.floating):
            return value.item()
        if isinstance(value, np.ndarray):
            assert value.dtype.kind in "biuf"
            return {"array": base64.b64encode(value.tobytes()).decode(), "type": value.dtype.str, "shape": value.shape}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        assert isinstance(value, dict), f"{type(value)} is no plain value"
        return {"pairs": [[plain(key), plain(one)] for key, one in value.items()]}

    return json.dumps(plain(state))


def from_text(text: str) -> Any:
    """The state of ``to_text``."""

    def back(value: Any) -> Any:
        if isinstance(value, list):
            return [back(one) for one in value]
        if isinstance(value, dict) and "array" in value:
            flat = np.frombuffer(base64.b64decode(value["array"]), value["type"]).copy()
            return flat.reshape(value["shape"])
        if isinstance(value, dict):
            return {back(key): back(one) for key, one in value["pairs"]}
        return value

    return back(json.loads(text))


class SearchConformance:
    """Inherit it, and give ``searches``.

    Attributes:
        searches: By name, what gives a search and its population for a seed (``made``).
        never_wait: Names (or their beginnings) of searches that always have something to ask for.
        per_merge: By name, how many trials may have one merge: tasks whose gradients are asked for one by one, samples.
        restarts_at: After how many trials a search is restored from its state.
    """

    searches: ClassVar[Mapping[str, Made]] = {}
    never_wait: ClassVar[tuple[str, ...]] = ()
    per_merge: ClassVar[Mapping[str, int]] = {}
    restarts_at: ClassVar[tuple[int, ...]] = (3, 17, 20, 21, 40)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test over every search."""
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", list(self.searches))
        if "at" in metafunc.fixturenames:
            metafunc.parametrize("at", self.restarts_at)
        if "scores" in metafunc.fixturenames:
            metafunc.parametrize("scores", list(ODD))

    def driver(self, kind: str, seed: int = 0) -> Driver:
        """A new search under a strict loop."""
        return Driver(*self.searches[kind](seed))

    def test_trials_are_numbered_and_fit_the_space(self, kind: str) -> None:
        """They are numbered from 0, have parents before them, and are not all alike."""
        driver = self.driver(kind).to(60)
        trials = [entry[1][0] for entry in driver.log if entry[0] == "tell"]
        assert [trial.number for trial in trials] == list(range(len(trials)))
        for trial in trials:
            assert (trial.genome.size, trial.genome.sources) == (SIZE, 3)
            assert all(parent < trial.number for parent in trial.parents)
            assert trial.gradient or trial.wants == Scores(sample=trial.sample)
        assert len(set(driver.digests)) > 30 / self.per_merge.get(kind, 1)

    def test_asking_while_it_waits_changes_nothing(self, kind: str) -> None:
        """A search that waits for results gives no trials, and asking again leaves its state as it was."""
        eager, patient = self.driver(kind), self.driver(kind)
        waits = 0
        while eager.asked < 60:
            before = -1
            while before < eager.asked < 60:
                before = eager.asked
                eager.ask(5)
            if eager.asked < 60:  # it waits for results
                waits += 1
                state = to_text(eager.search.state())
                assert [eager.search.ask(n) for n in (1, 7, 1)] == [[], [], []]
                assert to_text(eager.search.state()) == state
            while patient.asked < eager.asked:
                patient.ask(min(5, eager.asked - patient.asked))
            for _ in range(len(eager.flying)):
                eager.tell()
                patient.tell()
        assert eager.digests == patient.digests
        assert waits == 0 if kind.startswith(self.never_wait) and self.never_wait else waits > 0 or not self.never_wait

    def test_the_seed_decides(self, kind: str) -> None:
        """The same seed gives the same trials, another seed others."""
        assert self.driver(kind, 1).to(60).digests == self.driver(kind, 1).to(60).digests
        assert self.driver(kind, 1).to(60).digests != self.driver(kind, 2).to(60).digests

    def test_global_generators_are_neither_used_nor_moved(self, kind: str) -> None:
        """NumPy's global generator is left alone."""
        np.random.seed(1)
        first = self.driver(kind).to(40).digests
        after = np.random.random()
        np.random.seed(1)
        assert np.random.random() == after
        np.random.seed(2)
        assert self.driver(kind).to(40).digests == first

    def test_odd_scores_end_no_search(self, kind: str, scores: str) -> None:
        """Whatever the scores, it goes on or says that it is done; its report holds numbers that JSON can hold.

        A search that has learned nothing because everything failed may wait; the manager ends it.
        """
        driver = Driver(*self.searches[kind](0), score=odd(scores))
        search, waits = driver.search, False
        while driver.asked < 60 and not search.done and not waits:
            if len(driver.flying) + driver.batch <= driver.window:
                driver.ask(driver.batch)
            waits = not driver.flying
            if not waits:
                driver.tell()
        assert not waits or search.done or scores == "none"
        while driver.flying:
            driver.tell()
        report: dict[str, Any] = getattr(search, "report", dict)()
        json.dumps(json.loads(to_text(report)), allow_nan=False)

    def test_replaying_the_same_calls_proposes_the_same_trials(self, kind: str) -> None:
        """A search depends on its arguments and calls alone: a journal's replay rebuilds it."""
        driver = self.driver(kind).to(80)
        search, population = self.searches[kind](0)
        digests: list[str] = []
        for call, argument in driver.log:
            if call == "ask":
                digests += [trial.genome.digest for trial in search.ask(argument)]
            else:
                trial, evaluation, outcome = argument
                assert offered(population, trial, evaluation) == outcome
                search.tell(trial, evaluation, outcome)
        assert digests == driver.digests

    def test_restored_from_its_state_it_goes_on_with_the_same_trials(self, kind: str, at: int) -> None:
        """Also in the middle of a generation, with trials in flight."""
        through, resumed = self.driver(kind).to(at), self.driver(kind)
        resumed.search.restore(from_text(to_text(through.search.state())))
        resumed.population.restore(through.population.state())
        resumed.flying, resumed.asked = deque(through.flying), through.asked
        resumed.digests = list(through.digests)
        through.to(90)
        resumed.to(90)
        assert resumed.digests == through.digests
        assert members(resumed.population) == members(through.population)

    def test_a_state_does_not_change_afterwards(self, kind: str) -> None:
        """``state`` gives copies."""
        driver = self.driver(kind).to(20)
        state = driver.search.state()
        text = to_text(state)
        driver.to(60)
        assert to_text(state) == text

    def test_it_survives_that_everything_fails(self, kind: str) -> None:
        """A bad candidate is a result: nothing is accepted, and nothing is raised."""
        search, population = self.searches[kind](0)
        for _ in range(8):
            for trial in search.ask(4):
                failed = Evaluation.failed("not finite", "NaN")
                outcome = offered(population, trial, failed)
                assert outcome == Outcome(accepted=False)
                search.tell(trial, failed, outcome)
        assert not population.members


def digests_of(searches: Mapping[str, Made], seed: int, trials: int) -> dict[str, list[str]]:
    """By name, the digests of the first trials: another process must propose the same ones."""
    return {kind: Driver(*make(seed)).to(trials).digests for kind, make in searches.items()}
