"""What MAP, Bayesian MAP, nested MAP, NSGA and Optuna's samplers say of themselves, and what they make of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from test_docstring_examples import GOALS, NAMES, space

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Goal
from ecotone.search.bayesian_map import BayesianMap, BayesianMapSettings
from ecotone.search.coefficients import Setting
from ecotone.search.kinds import Context, SearchSettings
from ecotone.search.map import MapSearch, MapSettings
from ecotone.search.nested_map import NestedMapSearch, NestedMapSettings
from ecotone.search.nsga import Nsga, NsgaSettings
from ecotone.search.optuna_search import OptunaSearch, OptunaSettings
from ecotone.search.racing import RaceSettings, Racing
from ecotone.search.registry import SEARCHES

SPACE = space()
KINDS: dict[str, Any] = {
    "map": (MapSettings, MapSearch),
    "bayesian_map": (BayesianMapSettings, BayesianMap),
    "nested_map": (NestedMapSettings, NestedMapSearch),
    "nsga2": (NsgaSettings, Nsga),
    "nsga3": (NsgaSettings, Nsga),
    "optuna": (OptunaSettings, OptunaSearch),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def context(**others: Any) -> Context:
    return Context(**({"space": SPACE, "goals": GOALS, "seed": 3} | others))


def settings(name: str, **given: Any) -> SearchSettings:
    found: SearchSettings = SEARCHES.get(name, "search.algorithm").model_validate({"algorithm": name, **given})
    return found


def points(search: Any, count: int) -> list[list[float]]:
    return [trial.genome.coefficients[0].tolist() for trial in search.ask(count)]


@every_kind
def test_the_registry_knows_it_and_it_makes_its_search(name: str) -> None:
    part = settings(name, archive=7)
    search, population = part.make(context())
    assert isinstance(part, KINDS[name][0])
    assert isinstance(search, KINDS[name][1])
    assert search.settings == part  # type: ignore[attr-defined]
    assert population.capacity == 7  # type: ignore[attr-defined]
    assert len(search.ask(2)) == 2


@pytest.mark.parametrize(
    ("name", "given", "objectives"),
    [
        ("map", {}, 2),
        ("bayesian_map", {}, 2),
        ("nested_map", {}, 2),
        ("nsga2", {}, 1),
        ("nsga3", {}, 2),
        ("optuna", {}, 1),
        ("optuna", {"sampler": "nsga2"}, 1),
        ("optuna", {"sampler": "nsga3"}, 2),
    ],
)
def test_the_fewest_objectives_are_those_that_it_can_be_made_for(
    name: str, given: dict[str, Any], objectives: int
) -> None:
    part = settings(name, **given)
    assert part.needs().objectives == objectives
    if objectives > 1 and name != "nested_map":  # which has one for each model
        with pytest.raises(InputError, match=r"two (objectives )?or more"):
            part.make(context(goals=GOALS[:1]))
    elif objectives == 1:
        assert part.make(context(goals=GOALS[:1]))[0].ask(1)


@every_kind
def test_what_can_begin_with_merges_scores_them_first(name: str) -> None:
    part = settings(name)
    if name == "nested_map":
        assert part.begins().refusal == "nested_map builds its tree from the models themselves"
        return
    assert part.begins().refusal == ""
    starts = (Genome.uniform(24, [0.25, 0.5, 0.75]), Genome.uniform(24, [0.5, 0.0, 1.0]))
    assert points(part.make(context(starts=starts))[0], 2) == [[0.25, 0.5, 0.75], [0.5, 0.0, 1.0]]


@pytest.mark.parametrize("name", ["nsga2", "nsga3", "optuna"])
def test_without_merges_to_begin_with_the_models_come_first(name: str) -> None:
    first = [*np.eye(3).tolist(), pytest.approx([1 / 3, 1 / 3, 1 / 3])]
    assert points(settings(name).make(context())[0], 4) == first
    assert points(settings(name, models_first=False).make(context())[0], 4) != first


@every_kind
def test_the_operators_settings_are_searched_by_all_but_nested_map(name: str) -> None:
    part = settings(name, high=1.0)
    searched = context(searched=(Setting("density", 0.25, 0.75),))
    assert part.searches_settings == (name != "nested_map")
    if name == "nested_map":
        with pytest.raises(InputError, match="searches over coefficients alone, found bounds for density"):
            part.make(searched)
        return
    (trial,) = part.make(searched)[0].ask(1)
    assert 0.25 <= float(trial.genome.parameters["density"]) <= 0.75


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("map", {}, "; 20 samples before it proposes anything"),
        ("map", {"samples": 12}, "; 12 samples before it proposes anything"),
        ("bayesian_map", {}, "; 8 samples before it proposes anything"),
        ("nested_map", {"front": 3}, "; 2 pairs of 12 samples and 3 members of a front"),
        ("nsga2", {}, ""),
        ("optuna", {}, ""),
    ],
)
def test_it_tells_its_bounds_and_its_samples(name: str, given: dict[str, Any], told: str) -> None:
    part, of = settings(name, high=1.5, **given), context()
    assert part.describe(part.make(of)[0], of) == f", each from 0 to 1.5{told}"
    assert part.describe(None, of) == ", each from 0 to 1.5"


@pytest.mark.parametrize(("name", "design"), [("map", 20), ("bayesian_map", 8)])
def test_a_budget_that_the_samples_use_up_is_refused(name: str, design: int) -> None:
    part = settings(name)
    assert part.make(context(evaluations=design + 1))[0].ask(1)
    with pytest.raises(InputError, match=rf"budget.evaluations: expected more than .*{design}.* samples .*{design}\."):
        part.make(context(evaluations=design))


def test_nested_map_asks_for_the_budget_of_its_whole_tree() -> None:
    assert settings("nested_map").make(context(evaluations=31))[0].ask(1)
    with pytest.raises(InputError, match=r"nested MAP of 3 models needs 31.*found 30"):
        settings("nested_map").make(context(evaluations=30))


def test_nsga_races_where_it_is_told_to() -> None:
    race = RaceSettings(fidelities=(0.3,), group=4)
    search, population = settings("nsga2", race=race.model_dump()).make(context(limits={NAMES[0]: (0.0, 1.0)}))
    assert isinstance(search, Racing)
    assert search.population is population
    assert (search.settings, search.own_parents) == (race, True)


def test_bayesian_map_counts_from_the_reference_of_each_objective() -> None:
    reference = {goal.name: float(index) for index, goal in enumerate(GOALS)}
    shuffled = dict(reversed(reference.items()))
    search: Any = settings("bayesian_map", reference=shuffled).make(context())[0]
    assert search.reference.tolist() == [0.0, 1.0, 2.0]
    others = (*GOALS[:2], Goal("another"))
    with pytest.raises(InputError, match=r"search.reference: expected a score for each of the objectives \["):
        settings("bayesian_map", reference=reference).make(context(goals=others))


def test_the_settings_load_neither_optimisers_nor_the_parts_of_scipy() -> None:
    """They are looked at for every recipe, and by commands that search for nothing."""
    code = f"""
import sys
from ecotone.search.registry import SEARCHES
for name in {list(KINDS)!r}:
    SEARCHES.get(name, "search.algorithm").model_json_schema()
print([name for name in ("optuna", "pymoo", "scipy.linalg", "scipy.optimize", "scipy.spatial", "scipy.stats")
       if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
