"""Nested MAP: each pair finds what the preferences want on its plane, and the tree says so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Evaluation, Goal, Outcome
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.nested_map import NestedMapSearch, NestedMapSettings
from ecotone.search.surrogates import Link

TOLD = Outcome(accepted=True)


def box(sources: int, low: float = 0.0, high: float = 1.5, segments: int = 1) -> CoefficientBox:
    return CoefficientBox(np.arange(segments + 1), sources, low, high)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"m{i}" for i in range(count))


def goals(count: int) -> tuple[Goal, ...]:
    return tuple(Goal(f"g{i}") for i in range(count))


class Tasks:
    """K accuracies: each rises to its own model's best coefficient and falls with what the others add."""

    def __init__(self, count: int, seed: int = 0, between: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        self.best = rng.uniform(0.6, 1.2, count)
        self.height = rng.uniform(1.0, 3.0, count)
        self.between = between * rng.uniform(0.5, 1.5, (count, count)) * (1 - np.eye(count))

    def __call__(self, points: Floats) -> Floats:
        latent = self.height - 4 * (points - self.best) ** 2 - points**2 @ self.between.T
        return Link("sigmoid").forward(latent)


def run(search: NestedMapSearch, tasks: Any, batch: int = 5, fails: tuple[int, ...] = ()) -> list[Floats]:
    """Everything told; the points by trial number."""
    points = []
    while not search.done:
        trials = search.ask(batch)
        assert trials
        for trial in trials:
            assert trial.number == len(points)
            points.append(search.box.point(trial.genome))
            scores = tasks(points[-1][None])[0]
            named = {goal.name: float(s) for goal, s in zip(search.goals, scores, strict=True)}
            bad = Evaluation.failed("exception", "no")
            search.tell(trial, bad if trial.number in fails else Evaluation(named), TOLD)
    assert search.ask(3) == []
    return points


def make(count: int, evaluations: int | None = None, **settings: Any) -> NestedMapSearch:
    return NestedMapSearch(box(count), goals(count), 0, names(count), NestedMapSettings(**settings), evaluations)


def walk(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *(below for child in node.get("children", ()) for below in walk(child))]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (0.2, 0.8)])
def test_two_models_end_at_the_preferred_point_of_their_plane(weights: tuple[float, float]) -> None:
    """Noise-free link(quadratic) tasks: surrogates are exact, so it is the dense grid's best."""
    tasks, search = Tasks(2, between=1.0), make(2, preference=dict(zip(("g0", "g1"), weights, strict=True)))
    points = run(search, tasks)
    assert len(points) == 2 + 10 + 4
    side = np.linspace(0, 1.5, 601)
    grid = np.stack([axis.ravel() for axis in np.meshgrid(side, side)], axis=1)
    values = tasks(grid) @ np.array(weights) / sum(weights)
    root = search.report()["tree"][0]
    assert root["value"] == pytest.approx(values.max(), abs=1e-4)
    assert points[root["number"]] == pytest.approx(grid[np.argmax(values)], abs=0.03)
    assert root["leave_one_out"] == pytest.approx({"g0": 0.0, "g1": 0.0}, abs=1e-8)


@pytest.mark.slow
def test_every_pair_is_the_best_of_its_plane_and_the_root_is_near_the_best_of_all() -> None:
    tasks, search = Tasks(5), make(5)
    points = run(search, tasks)
    assert len(points) == 5 + 4 * 14
    (root,) = search.report()["tree"]
    merged = [node for node in walk(root) if "children" in node]
    assert len(merged) == 4
    rng = np.random.default_rng(0)
    for node in merged:
        planes = np.array([list(child["coefficients"].values()) for child in node["children"]])
        assert np.array(node["shares"]) @ planes == pytest.approx(points[node["number"]])
        columns = [int(name[1:]) for name in node["models"]]
        others = np.clip(rng.uniform(0, 1.5, (4000, 2)) @ planes, 0, 1.5)
        assert node["value"] > tasks(others)[:, columns].mean(axis=1).max() - 2e-3
    anywhere = tasks(rng.uniform(0, 1.5, (200_000, 5))).mean(axis=1).max()
    assert root["value"] > anywhere - 0.02
    assert root["value"] > tasks(np.full((1, 5), 0.2)).mean() + 0.15  # the plain average
    assert root["models"] == list(names(5))


def test_the_closest_are_merged_first() -> None:
    """Accuracies .9, .1, .88 and .45 by themselves: the first and third are a pair."""

    def tasks(points: Floats) -> Floats:
        return np.array([0.9, 0.1, 0.88, 0.45]) * (1 - 0.5 * (points - 1) ** 2) - 0.02 * points @ (1 - np.eye(4))

    search = make(4, links="identity")
    run(search, tasks)
    assert (search._pairs[0].first, search._pairs[0].second) == (0, 2)
    assert (search._pairs[1].first, search._pairs[1].second) == (1, 3)
    assert (search._pairs[2].first, search._pairs[2].second) == (4, 5)


@pytest.mark.slow
def test_preferences_lead_the_whole_tree() -> None:
    tasks, scores = Tasks(4, between=1.5), {}
    for favoured in range(4):
        search = make(4, preference={f"g{favoured}": 10.0})
        run(search, tasks)
        scores[favoured] = search.report()["tree"][0]["scores"]
    for favoured in range(4):
        name = f"g{favoured}"
        assert scores[favoured][name] > max(scores[other][name] for other in range(4) if other != favoured) + 0.05


def test_losses_and_scores_in_different_units() -> None:
    tasks = Tasks(3)

    def mixed(points: Floats) -> Floats:
        scores = tasks(points)
        scores[:, 1] = 1000 * (1 - scores[:, 1])  # minimised, and large
        return scores

    kinds = (Goal("g0"), Goal("g1", "minimize"), Goal("g2"))
    search = NestedMapSearch(box(3), kinds, 0, names(3))
    run(search, mixed)
    root = search.report()["tree"][0]
    plain = make(3)
    run(plain, tasks)
    best = plain.report()["tree"][0]["scores"]
    assert root["scores"]["g0"] > best["g0"] - 0.1
    assert root["scores"]["g1"] < 1000 * (1 - best["g1"] + 0.1)
    assert root["scores"]["g2"] > best["g2"] - 0.1


def test_owners_say_which_model_an_objective_belongs_to() -> None:
    tasks = Tasks(3)

    def shuffled(points: Floats) -> Floats:
        return tasks(points)[:, [2, 0, 1, 2]]

    four = tuple(Goal(name) for name in ("c", "a", "b", "c2"))
    owners = {"c": "m2", "a": "m0", "b": "m1", "c2": "m2"}
    search = NestedMapSearch(box(3), four, 0, names(3), NestedMapSettings(owners=owners))
    run(search, shuffled)
    report = search.report()
    assert report["owners"] == owners
    leaves = {node["models"][0]: node for node in walk(report["tree"][0]) if "children" not in node}
    assert leaves["m2"]["value"] == pytest.approx(leaves["m2"]["scores"]["c"])
    assert report["tree"][0]["value"] > 0.6


def test_failures_are_survived() -> None:
    tasks, search = Tasks(3), make(3)
    points = run(search, tasks, fails=(1, *range(4, 11), 20))
    assert len(points) == 3 + (10 + 1 + 4) + 14  # of the first pair five points are left, and six are needed
    root = search.report()["tree"][0]
    assert root["value"] > 0.6
    failed = [node for node in walk(root) if node["scores"] is None]
    assert [node["models"] for node in failed] == [["m1"]]
    json.dumps(search.report(), allow_nan=False)


@pytest.mark.slow
def test_sixteen_models() -> None:
    tasks, search = Tasks(16, between=0.05), make(16)
    points = run(search, tasks, batch=16)
    assert len(points) == 16 + 15 * 14
    root = search.report()["tree"][0]
    assert len(root["models"]) == 16
    average = tasks(np.full((1, 16), 1 / 16)).mean()
    alone = tasks(np.eye(16)).mean(axis=1).max()
    assert root["value"] > max(average, alone) + 0.3


def test_the_report_grows_with_the_tree() -> None:
    search, tasks = make(3), Tasks(3)
    assert search.report()["tree"] == []
    shown = []
    while not search.done:
        for trial in search.ask(4):
            scores = tasks(search.box.point(trial.genome)[None])[0]
            search.tell(trial, Evaluation({f"g{i}": float(s) for i, s in enumerate(scores)}), TOLD)
        report = search.report()
        assert json.loads(json.dumps(report)) == report
        shown.append(sorted(len(node["models"]) for node in report["tree"]))
        assert sum(shown[-1]) in (3, min(3, len(search._points)))
    assert [1, 1, 1] in shown
    assert [1, 2] in shown
    assert shown[-1] == [3]
    member = report["tree"][0]["members"][0]
    assert member["predicted"] == pytest.approx(member["measured"], abs=1e-8)


def test_merges_stay_in_the_box() -> None:
    def rising(points: Floats) -> Floats:
        return points + 0.01 * points.sum(axis=1, keepdims=True)

    for low, high in ((0.0, 1.2), (-1.0, 1.0)):
        search = NestedMapSearch(box(3, low, high), goals(3), 0, names(3))
        points = np.array(run(search, rising))
        assert points.min() >= low
        assert points.max() <= high
        assert points[search.report()["tree"][0]["number"]] == pytest.approx(np.full(3, high), abs=0.02)


def test_refusals_say_what_to_do() -> None:
    def refused(
        match: str,
        sources: int = 3,
        goal: int = 3,
        within: CoefficientBox | None = None,
        evaluations: int | None = None,
        **settings: Any,
    ) -> None:
        chosen = NestedMapSettings(**settings)
        with pytest.raises(InputError, match=match):
            NestedMapSearch(within or box(sources), goals(goal), 0, names(sources), chosen, evaluations)

    refused(r"two or more models, found 1", sources=1, goal=1)
    refused(r"2 objectives for 3 models.*owners", goal=2)
    refused(r"no model 'm7'", owners={"g0": "m0", "g1": "m1", "g2": "m7"})
    refused(r"no objective 'h'", owners={"h": "m0"})
    refused(r"model 'm2' has no objective", goal=2, owners={"g0": "m0", "g1": "m1"})
    refused(r"objective 'g3' has no model", goal=4, owners={"g0": "m0", "g1": "m1", "g2": "m2"})
    refused(r"one coefficient a model, found 2 segments", within=box(3, segments=2))
    refused(r"0 and 1 must lie between them, found 0 and 0.8", within=box(3, 0.0, 0.8))
    refused(r"preference: there is no objective 'g9'", preference={"g9": 1.0})
    refused(r"preference: expected weights of at least 0.*g1=-1", preference={"g1": -1.0})
    refused(r"samples: expected at least 6 a pair.*found 5", samples=5)
    refused(r"3 models needs 31.*found 30.*least for 3 models is 13", evaluations=30)
    with pytest.raises(ValidationError, match="front"):
        NestedMapSettings(front=0)
    with pytest.raises(ValidationError, match=r"preference\.g0"):
        NestedMapSettings(preference={"g0": math.nan})
    assert make(3, evaluations=31).samples == 12
    assert make(3, evaluations=13, samples=6, front=1).front == 1


@pytest.mark.slow
@pytest.mark.parametrize(("evaluations", "more"), [(None, 12), (36, 5), (31, 0)])
def test_an_objective_that_never_changes_guides_nothing_and_the_report_says_so(
    evaluations: int | None, more: int
) -> None:
    tasks, search = Tasks(3), make(3, evaluations)

    def stuck(points: Floats) -> Floats:
        scores = tasks(points)
        scores[:, 1] = 0.25
        return scores

    run(search, stuck)
    assert search.state()["pairs"][0][3] == 3 + 10 + more  # the first trial on the first pair's front
    report = search.report()
    (warning,) = report["warnings"]
    assert warning.startswith("objectives.search.g1: the score is the same (0.25) at all ")
    assert report["tree"][0]["leave_one_out"]["g1"] == 0.0
