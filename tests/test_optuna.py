"""Optuna's samplers behind our protocol: exact resume through the journal, failures, settings, and what they find."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from managing import begun, ended
from numpy.typing import ArrayLike, NDArray
from processes import same_arithmetic
from pydantic import ValidationError

from ecotone.fitness.pools import Batch, Completed
from ecotone.populations.errors import InputError
from ecotone.populations.fronts import hypervolume, ranks
from ecotone.populations.genome import Genome
from ecotone.populations.gram import GramTable
from ecotone.populations.journal import Journal
from ecotone.populations.population import ElitistArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.manager import Schedule
from ecotone.search.optuna_search import GP_COEFFICIENTS, OptunaSearch, OptunaSettings, Sampler
from ecotone.search.random_search import RandomSearch

optuna = pytest.importorskip("optuna")

SIZE = 12
VECTORS = np.random.default_rng(1).standard_normal((3, SIZE)).astype(np.float32)
NAMES = ("a", "b", "c")
SPACE = Space(
    NAMES, ("t",), np.array([0, SIZE]), ("t",), np.array([0, SIZE]), GramTable.from_vectors(VECTORS), np.eye(3), NAMES
)
BOX = CoefficientBox.of(SPACE, "model", 0.0, 1.0)
GOALS = (Goal("near a"), Goal("far from b", "minimize"))
TAKEN = Outcome(accepted=True)
SMALL: dict[str, dict[str, Any]] = {
    "tpe": {"startup": 6},
    "gp": {"startup": 5, "history": 8},
    "nsga2": {"population": 6},
    "nsga3": {"population": 6},
    "cma_es": {"population": 5},
    "random": {},
    "qmc": {},
}
every_sampler = pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name for name in get_args(Sampler)]
)
learning = pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "cma_es", "gp"])


def chosen(sampler: str, **settings: Any) -> OptunaSettings:
    return OptunaSettings(sampler=sampler, **{**SMALL[sampler], **settings})  # type: ignore[arg-type]


def made(
    sampler: str, seed: int = 3, goals: tuple[Goal, ...] = GOALS, seeds: ArrayLike | None = None, **settings: Any
) -> OptunaSearch:
    return OptunaSearch(BOX, goals, seed, chosen(sampler, **settings), seeds)


def scores(point: NDArray[np.float64]) -> tuple[float, float]:
    """Merges of two models that score well on one thing each, with a front between them."""
    return float(np.exp(-((point - [0.9, 0.1, 0.3]) ** 2).sum())), float(((point - [0.1, 0.8, 0.3]) ** 2).sum())


def scored(trial: Trial) -> Evaluation:
    near, far = scores(trial.genome.coefficients.ravel())
    return Evaluation({"near a": near, "far from b": far})


def sometimes(trial: Trial) -> Evaluation:
    """The tenth fails, and the last but one of every eight."""
    if trial.number == 10 or trial.number % 8 == 6:
        return Evaluation.failed("not finite", "NaN")
    return scored(trial)


def digests(trials: list[Trial]) -> list[str]:
    return [trial.genome.digest for trial in trials]


def carried_out(
    search: Any, evaluations: int, flying: int = 1, score: Callable[[Trial], Evaluation] = sometimes
) -> list[Trial]:
    """The trials of a search with ``flying`` of them in flight; it never waits."""
    trials = search.ask(flying)
    told = 0
    while len(trials) < evaluations:
        search.tell(trials[told], score(trials[told]), TAKEN)
        told += 1
        asked = search.ask(1)
        assert len(asked) == 1
        trials += asked
    return trials


def points(trials: list[Trial]) -> NDArray[np.float64]:
    return np.array([trial.genome.coefficients.ravel() for trial in trials])


# -- exact resume --------------------------------------------------------------------------------------------


class Crash(BaseException):
    """A kill -9, as far as one process can have it."""


class Simulated:
    """A pool that answers out of order, and crashes after so many steps."""

    slots = 2

    def __init__(self, steps: int | None = None) -> None:
        self._flying: list[Batch] = []
        self._steps = steps

    def start(self) -> Space:
        return SPACE

    def _step(self) -> None:
        if self._steps is not None:
            self._steps -= 1
            if self._steps < 0:
                raise Crash

    def submit(self, batch: Batch) -> None:
        self._step()
        self._flying.append(batch)

    def completed(self, timeout: float | None = None) -> Completed:
        self._step()
        batch = self._flying.pop()  # the youngest first
        return [(batch, [sometimes(trial) for trial in batch.trials])]

    def close(self) -> None:
        self._flying = []

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def managed(sampler: str, path: Path, steps: int | None = None, evaluations: int = 40) -> str:
    """Run or resume a search; the digest of its journal."""
    search = made(sampler, seeds=np.eye(3))
    schedule = Schedule(evaluations=evaluations, batch=2, in_flight=6)
    ended(begun(path, search, ElitistArchive(GOALS, 5), GOALS, Simulated(steps), schedule))
    with Journal.open(path) as journal:
        return journal.digest()


@every_sampler
def test_killed_and_resumed_it_is_the_same_search(sampler: str, tmp_path: Path) -> None:
    evaluations = 16 if sampler == "gp" else 40
    whole = managed(sampler, tmp_path / "whole" / "j.sqlite", evaluations=evaluations)
    for steps in (12,) if sampler == "gp" else (5, 13, 22, 31):
        path = tmp_path / str(steps) / "j.sqlite"
        with pytest.raises(Crash):
            managed(sampler, path, steps, evaluations)
        assert managed(sampler, path, evaluations=evaluations) == whole
    with Journal.open(tmp_path / "whole" / "j.sqlite") as journal:
        rows = list(journal.rows())
    assert len(rows) == evaluations
    assert rows[10].failure is not None


def test_a_raised_budget_goes_on_where_it_ended(tmp_path: Path) -> None:
    path, asked = tmp_path / "j.sqlite", []
    for evaluations in (20, 40):
        managed("tpe", path, evaluations=evaluations)
        with Journal.open(path) as journal:
            asked.append([row.digest for row in journal.rows()])
    assert [len(rows) for rows in asked] == [20, 40]
    assert asked[1][:20] == asked[0]


@every_sampler
@pytest.mark.parametrize("at", [2, 9, 14])
def test_restored_from_its_state_it_goes_on_with_the_same_trials(sampler: str, at: int) -> None:
    """The conformance suite has this for all but the Gaussian process; here with more trials than it is shown, too."""
    through = made(sampler, seeds=np.eye(3))
    first = carried_out(through, at, flying=2)
    state = json.loads(json.dumps(through.state()))  # plain values
    resumed = made(sampler, seeds=np.eye(3))
    resumed.restore(state)
    for search in (through, resumed):
        search.tell(first[-2], scored(first[-2]), TAKEN)
    assert digests(carried_out(through, 3)) == digests(carried_out(resumed, 3))


@pytest.mark.slow
def test_another_process_proposes_the_same_trials() -> None:
    """The conformance suite has this for all but the Gaussian process."""
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('test_optuna', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['test_optuna'] = module\n"
        "spec.loader.exec_module(module)\n"
        f"print(json.dumps(module.digests(module.carried_out(module.made('gp'), 10, 2))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONHASHSEED": "5", "PATH": "", "PYTHONPATH": str(Path(__file__).parent), **same_arithmetic()},
    )
    assert json.loads(done.stdout) == digests(carried_out(made("gp"), 10, 2))


@learning
def test_how_asks_are_grouped_does_not_matter(sampler: str) -> None:
    one, other = made(sampler), made(sampler)
    for search in (one, other):
        carried_out(search, 8)
    assert digests(one.ask(3)) == [digests(other.ask(1))[0] for _ in range(3)]


@every_sampler
def test_the_seed_decides(sampler: str) -> None:
    assert digests(made(sampler, 1).ask(6)) == digests(made(sampler, 1).ask(6))
    assert set(digests(made(sampler, 1).ask(6))).isdisjoint(digests(made(sampler, 2).ask(6)))


def test_global_generators_are_not_touched() -> None:
    import torch

    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr,index]
    carried_out(made("gp"), 9)
    carried_out(made("tpe"), 9)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # type: ignore[union-attr,index]


# -- what they find ------------------------------------------------------------------------------------------


def found(trials: list[Trial]) -> float:
    """Hypervolume of trials that scored."""
    rows = [sometimes(trial).scores for trial in trials]
    return hypervolume([[row["near a"], -row["far from b"]] for row in rows if row], [0.0, -1.5])


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "nsga3"])
def test_learning_beats_chance(sampler: str) -> None:
    """Although a candidate in eight fails."""
    evaluations, flying, seeds = (18, 1, 1) if sampler == "gp" else (90, 3, 3)
    learned = [found(carried_out(made(sampler, seed), evaluations, flying)) for seed in range(seeds)]
    drawn = [found(carried_out(RandomSearch(BOX, seed), evaluations, flying)) for seed in range(seeds)]
    assert np.mean(learned) > np.mean(drawn)


def test_cma_es_climbs_the_mean_of_the_scores() -> None:
    trials = carried_out(made("cma_es", 0), 200)
    values = [near - far for near, far in map(scores, points(trials))]
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 21)] * 3), axis=-1).reshape(-1, 3)
    best = max(near - far for near, far in map(scores, grid))
    assert max(values) > best - 1e-3
    assert np.mean(values[-20:]) > np.mean(values[:20])


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "cma_es"])
def test_maximising_is_minimising_the_negated_scores(sampler: str) -> None:
    def negated(trial: Trial) -> Evaluation:
        evaluation = sometimes(trial)
        flipped = {name: -value for name, value in evaluation.scores.items()}
        return Evaluation(flipped, failure=evaluation.failure)

    goals = (Goal("near a", "minimize"), Goal("far from b"))
    as_is, flipped = carried_out(made(sampler), 30), carried_out(made(sampler, goals=goals), 30, score=negated)
    assert np.array_equal(points(as_is), points(flipped))


@pytest.mark.parametrize("settings", [{}, {"multivariate": False}, {"constant_liar": False}])
def test_trials_in_flight_together_differ(settings: dict[str, Any]) -> None:
    search = made("tpe", **settings)
    carried_out(search, 40, score=scored)
    together = points(search.ask(8))
    apart = np.linalg.norm(together[:, None] - together, axis=-1)[np.triu_indices(8, 1)]
    assert apart.min() > 0.01


@pytest.mark.slow
def test_gp_keeps_away_from_what_is_in_flight() -> None:
    search = made("gp", history=30)
    carried_out(search, 10, score=scored)
    together = points(search.ask(4))
    apart = np.linalg.norm(together[:, None] - together, axis=-1)[np.triu_indices(4, 1)]
    assert apart.min() > 0.02


def test_qmc_points_are_spread_evenly() -> None:
    """64 Sobol points have exactly half of them in the lower half of every coefficient; random ones seldom do."""
    halves = (points(OptunaSearch(BOX, GOALS, 0, chosen("qmc")).ask(64)) < 0.5).sum(axis=0)
    assert halves.tolist() == [32, 32, 32]


@every_sampler
def test_seeds_come_first_and_trials_stay_in_the_box(sampler: str) -> None:
    box = CoefficientBox(np.array([0, 5, SIZE]), 2, 0.2, 1.5)
    search = OptunaSearch(box, GOALS, 0, chosen(sampler), [[1.0, 0.2, 0.5, 3.0], [0.3, 1.0, 1.0, 1.0]])
    trials = search.ask(3)
    for trial in trials:
        search.tell(trial, Evaluation({"near a": 0.5, "far from b": float(trial.number)}), TAKEN)
    trials += search.ask(9)
    assert points(trials)[:2].tolist() == [[1.0, 0.2, 0.5, 1.5], [0.3, 1.0, 1.0, 1.0]]
    assert points(trials).min() >= 0.2
    assert points(trials).max() <= 1.5
    assert all(trial.genome.sources == 2 for trial in trials)


def test_gp_is_fitted_to_the_best_fronts_and_the_latest() -> None:
    search = made("gp", startup=2, history=10)
    rng = np.random.default_rng(0)
    state = search.state()
    state["trials"] = [
        {"state": "COMPLETE", "point": rng.random(3).tolist(), "values": rng.random(2).tolist(), "notes": {}}
        for _ in range(40)
    ]
    search.restore(state | {"next": 40})
    shown = search._shown()
    kept = [tuple(trial.values) for trial in shown.trials]
    all_values = [tuple(record["values"]) for record in state["trials"]]
    assert len(kept) == 10
    assert set(kept) <= set(all_values)
    rank = ranks(np.array(all_values))
    front = {all_values[i] for i in np.flatnonzero(rank == 0)}
    assert len(front & set(kept)) >= min(5, len(front))
    assert len(set(all_values[-7:]) & set(kept)) >= 5
    trial = search.ask(1)[0]
    assert trial.number == 40
    search.tell(trial, scored(trial), TAKEN)
    assert len(search._study.trials) == 41


# -- failures, settings, silence -----------------------------------------------------------------------------


@every_sampler
def test_it_survives_that_everything_fails(sampler: str) -> None:
    search = made(sampler)
    trials = carried_out(search, 20, 3, score=lambda _: Evaluation.failed("exception", "no"))
    assert len(set(digests(trials))) == 20


@pytest.mark.parametrize(
    ("sampler", "settings", "theirs"),
    [
        ("tpe", {}, {"_n_startup_trials": 6, "_multivariate": True, "_constant_liar": True}),
        ("tpe", {"multivariate": False, "constant_liar": False}, {"_multivariate": False, "_constant_liar": False}),
        ("gp", {"startup": 4}, {"_n_startup_trials": 4}),
        ("nsga2", {"population": 12}, {"population_size": 12}),
        ("nsga3", {"population": 12}, {"population_size": 12}),
        ("cma_es", {"population": 7, "separable": True, "startup": 3}, {"_popsize": 7, "_use_separable_cma": True}),
    ],
)
def test_settings_reach_optuna(sampler: str, settings: dict[str, Any], theirs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeded = made(sampler, **settings)._seeded(5)
    assert {name: getattr(seeded, name) for name in theirs} == theirs


def test_without_the_joint_model_each_coefficient_is_drawn_from_its_own() -> None:
    """As Optuna's own sampler does: the space it infers for joint sampling is empty."""
    search = made("tpe", multivariate=False)
    carried_out(search, 12)
    trial = search._study.trials[0]
    assert search._seeded(0).infer_relative_search_space(search._study, trial) == {}
    assert len(made("tpe")._seeded(0).infer_relative_search_space(search._study, trial)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "nsga3", "goals": GOALS[:1]}, r"nsga3 expects two objectives or more, found 1.*cma_es"),
        ({"sampler": "gp", "population": 8}, r"search\.population: sampler gp has no such setting.*startup, history"),
        ({"sampler": "random", "startup": 3}, r"search\.startup: sampler random has no such setting.*none"),
        ({"sampler": "gp", "history": 5}, r"search\.history: expected at least 10 \(startup\), found 5"),
        ({"seeds": np.eye(2)}, r"seeds: expected shape \(n, 3\), found \(2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    given = {"goals": GOALS, "seeds": None} | change
    goals, seeds = given.pop("goals"), given.pop("seeds")
    with pytest.raises(InputError, match=message):
        OptunaSearch(BOX, goals, 0, OptunaSettings(**given), seeds)


@pytest.mark.parametrize("change", [{"sampler": "tpee"}, {"startup": 0}, {"population": 1}, {"history": 1}])
def test_what_no_sampler_takes_is_refused_by_the_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        OptunaSettings(**change)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(change)]


def test_too_many_coefficients_for_gp_and_too_few_for_cma_es_are_refused() -> None:
    blocks = CoefficientBox(np.arange(33), 3)
    with pytest.raises(InputError, match=rf"gp models at most {GP_COEFFICIENTS} coefficients, found 96.*nsga2"):
        OptunaSearch(blocks, GOALS, 0, chosen("gp"))
    assert len(OptunaSearch(blocks, GOALS, 0, chosen("tpe")).ask(1)) == 1
    with pytest.raises(InputError, match="cma_es expects two coefficients or more, found 1"):
        OptunaSearch(CoefficientBox(np.array([0, 5]), 1), GOALS, 0, chosen("cma_es"))


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"Optuna is not installed.*pip install .*\[optuna\]'"):
        OptunaSearch(BOX, GOALS, 0)


@every_sampler
def test_optuna_is_silent_and_its_verbosity_stays(sampler: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            carried_out(made(sampler), 9)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_genomes_are_the_boxs() -> None:
    trial = made("random").ask(1)[0]
    assert isinstance(trial.genome, Genome)
    assert BOX.point(trial.genome).tolist() == points([trial])[0].tolist()
