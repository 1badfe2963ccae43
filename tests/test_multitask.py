"""The benchmark of merges for several tasks, on digits with few steps: who sees what, what is chosen, what is kept."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ecotone.experiments import compose
from ecotone.experiments.runs import Run

pytest.importorskip("sklearn")
FAST = ["--problems", "digits", "--seeds", "1", "--rates", "0.01,0.3", "--set", "prepare.arguments.epochs=2"]


@pytest.fixture
def multitask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a budget of seconds."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    module = importlib.import_module("multitask")
    monkeypatch.setitem(module.PROBLEMS, "digits", module.Problem("digits", "digits-adamerging.yaml", 32, 4))
    return module


@pytest.mark.slow
def test_what_is_tried_chosen_and_kept(multitask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "experts,average,lambda,m2n2,tensor,supervised,expert_merging"
    arguments = [*FAST, "--methods", names, "--cache", str(tmp_path / "kept"), "--out", str(tmp_path / "first.json")]
    rows: list[dict[str, Any]] = []
    row = multitask.row

    def kept(*wanted: Any) -> dict[str, Any]:
        rows.append(row(*wanted))
        return rows[-1]

    monkeypatch.setattr(multitask, "row", kept)
    multitask.main(arguments)
    record = json.loads((tmp_path / "first.json").read_text())
    assert [(one["seed"], one["method"]) for one in record["rows"]] == [(1, name) for name in names.split(",")]
    for one, written in zip(rows, record["rows"], strict=True):
        assert written == {key: value for key, value in one.items() if key != "tries"}
        best = max(one["tries"], key=lambda tried: sum(tried["search"].values()))
        assert (one["search"], one["test"]) == (best["search"], best["test"])
        assert list(one["test"]) == ["odd", "above_four", "remainder", "enclosed"]
    lines = {line["method"]: line for line in record["summary"]["digits"]}
    assert (lines["average"]["gap"][0], lines["experts"]["gap"][0]) == (0, 1)
    assert lines["m2n2"]["cost"] == 32
    assert lines["lambda"]["cost"] == len(multitask.LAMBDAS)
    assert 10 < lines["tensor"]["cost"] < 20  # of two rates, 5 checks each and 4 steps of 16 of 449 images
    assert [line["setting"] for line in record["details"]["digits"]][:2] == ["rate 0.01", "rate 0.3"]
    tries = next(one["tries"] for one in rows if one["method"] == "lambda")
    average = next(one for one in rows if one["method"] == "average")
    weaker, same, stronger = tries[1]["test"], average["test"], tries[2]["test"]  # lambda .2, .25 and .3
    assert any(weaker[task] != same[task] or same[task] != stronger[task] for task in same)

    table = (tmp_path / "first.md").read_text()
    assert "| AdaMerging, layer-wise | rate 0.3 |" in table
    for folder in (tmp_path / "kept").iterdir():
        assert Run(folder).held_out_goals == ()  # no search has test data

    monkeypatch.setattr(multitask, "finished", None)
    multitask.main([*arguments[:-1], str(tmp_path / "second.json")])
    assert (tmp_path / "second.json").read_text() == (tmp_path / "first.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["digits", "text"])
def test_the_recipe_of_every_search_fits(
    multitask: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def searched(case: Any, setting: Any, settings: Any) -> dict[str, Any]:
        recipe = case.recipe({**settings, "objectives.held_out": []})
        compose.check_search(recipe)
        found.append(recipe)
        return {}

    monkeypatch.undo()  # with the problem's own budget
    monkeypatch.setattr(multitask, "searched", searched)
    monkeypatch.setattr(multitask, "fixed", lambda *_, **__: dict.fromkeys(multitask.PARTS, dict.fromkeys(case.tasks)))
    case = multitask.Case(problem, 7, (0.001, 0.01), {"merge.dtype": "bfloat16"}, tmp_path)
    for method in multitask.METHODS.values():
        method.tries(case)
    assert len({multitask.recipe_key(recipe) for recipe in found}) == len(found) == 24
    assert {recipe.search.algorithm for recipe in found} >= {"map", "m2n2", "map+adamerging", "expert_merging"}
    for recipe in found:
        assert (recipe.seed, recipe.prepare.arguments["seed"], recipe.merge.dtype) == (7, 7, "bfloat16")
        assert recipe.objectives.held_out == ()


def test_means_and_errors_are_over_seeds(multitask: Any) -> None:
    scores = {
        "experts": [(0.8, 0.9), (0.6, 0.9)],
        "average": [(0.6, 0.7), (0.6, 0.7)],
        "tensor": [(0.8, 0.7), (0.6, 0.8)],
    }
    rows = []
    for method, pairs in scores.items():
        for seed, (first, second) in enumerate(pairs):
            found = {"test": {"a": first, "b": second}, "search": {"a": 0.5, "b": 0.5}, "cost": seed}
            tried = {**found, "setting": {"rate": 0.01}, "last": found, "check": seed + 3}
            rows.append({"problem": "digits", "seed": seed, "method": method, **found, "tries": [tried]})
    lines = {line["method"]: line for line in multitask.summary(rows, "digits")}
    assert lines["tensor"]["tasks"]["a"] == pytest.approx((0.7, 0.1))
    assert lines["tensor"]["tasks"]["b"] == pytest.approx((0.75, 0.05))
    assert lines["tensor"]["mean"] == pytest.approx((0.725, 0.025))
    assert lines["tensor"]["gap"] == pytest.approx((0.5, 0.0))  # half of .2, and half of .1
    assert lines["tensor"]["cost"] == 0.5
    text = multitask.markdown(rows)
    assert "| AdaMerging, layer-wise | .700 ± .100 | .750 ± .050 | .725 ± .025 | .50 ± .00 | 0 |" in text
    assert (
        "| AdaMerging, layer-wise | rate 0.01 | .500 ± .000 | .725 ± .025 | .500 ± .000 | .725 ± .025 | 3, 4 |" in text
    )


def test_numbers_of_a_table(multitask: Any) -> None:
    assert multitask.number(multitask.spread([0.25])) == ".250"
    assert multitask.number(multitask.spread([0.7, 0.8])) == ".750 ± .050"
    assert multitask.number((-0.5, 0.125), 2) == "-.50 ± .12"
    assert multitask.number((1.0, math.nan)) == "1.000"
    assert multitask.number((10.25, math.nan)) == "10.250"


def test_results_are_kept_whole(multitask: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.json"
    with pytest.raises(TypeError, match="not JSON serializable"):
        multitask.kept(file, lambda: {"score": 0.5, "wrong": object()})
    assert not list(tmp_path.iterdir())
    assert multitask.kept(file, lambda: {"score": 0.5}) == {"score": 0.5}
    assert multitask.kept(file, lambda: {"score": 0.6}) == {"score": 0.5}
    assert list(file.parent.iterdir()) == [file]


def test_an_unknown_method_is_refused(multitask: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        multitask.main(["--methods", "averag"])
    assert "unknown: averag; known: experts, base, average" in capsys.readouterr().err
