"""The benchmark of one-shot merges, on digits with little training: what is scored on which part, chosen and kept."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
QUICK = ["--family", "digits-apart", "--seeds", "1", "--set", "prepare.arguments.epochs=1"]
QUICK += ["--set", "prepare.arguments.pretraining=1"]


@pytest.fixture
def oneshot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    module = importlib.import_module("oneshot")
    monkeypatch.setattr(module, "EVALUATIONS", 16)
    return module


def mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


@pytest.mark.slow
def test_what_is_scored_chosen_and_kept(oneshot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = os.environ.get("ECOTONE_CACHE")
    arguments = [*QUICK, "--cache", str(tmp_path / "kept"), "--operators", "linear", "task_arithmetic"]
    arguments += ["ties:density=1.0,combine=sum", "slerp", "tsv"]
    oneshot.main([*arguments, "--out", str(tmp_path / "first.json")])
    assert os.environ.get("ECOTONE_CACHE") == cache
    record = json.loads((tmp_path / "first.json").read_text())
    rows = {one["operator"].partition(":")[0]: one for one in record["rows"]}
    assert list(rows) == ["linear", "task_arithmetic", "ties", "slerp", "tsv"]
    assert "slerp interpolates between two models, found 4" in rows["slerp"]["error"]
    assert "found 'tsv'" in rows["tsv"]["error"]

    (reference,) = record["references"]
    linear, plain = rows["linear"], rows["task_arithmetic"]
    assert linear["one"]["test"] == reference["average"]  # what the published merge of a sum of models is
    for one in (linear, plain, rows["ties"]):
        assert list(one["one"]["test"]) == ["plain", "turned", "negative", "scrambled"]
        assert one["lambdas"][str(one["lambda"])] == max(one["lambdas"].values())
        assert mean(one["tuned"]["search"]) == pytest.approx(one["lambdas"][str(one["lambda"])])
        assert mean(one["one"]["search"]) == pytest.approx(one["lambdas"]["1.0"])
        assert mean(one["searched"]["search"]) >= mean(one["one"]["search"])
        assert 0 < one["evaluation"] < one["seconds"]
        assert one["evaluations"] == 16

    lines = {one["operator"]: one for one in record["summary"]["digits-apart"]["lines"]}
    low, high = mean(reference["average"]), mean(reference["experts"])
    assert lines["linear"]["gaps"]["one"][0] == 0
    found = lines["task_arithmetic"]
    assert found["gaps"]["tuned"][0] == pytest.approx((mean(plain["tuned"]["test"]) - low) / (high - low))
    assert found["evaluations"] == {"one": 0, "tuned": 11, "searched": 16}
    assert not list((tmp_path / "kept").glob("*/cache"))  # what was prepared is not kept

    monkeypatch.setattr(oneshot, "one_shot", None)
    monkeypatch.setattr(oneshot, "finished", None)
    oneshot.main([*arguments, "--out", str(tmp_path / "second.json")])
    assert (tmp_path / "second.json").read_text() == (tmp_path / "first.json").read_text()


def test_a_search_has_no_test_data_and_the_operator_s_own_range(oneshot: Any, tmp_path: Path) -> None:
    given = {"merge.dtype": "bfloat16", "search.high": 1.5}
    case = oneshot.Case("digits-adamerging", 7, "ties:density=0.1", given, tmp_path)
    recipe = case.recipe(held_out=False)
    assert recipe.objectives.held_out == ()
    assert (recipe.seed, recipe.prepare.arguments["seed"], recipe.budget.evaluations) == (7, 7, 15)
    assert (recipe.merge.operator, recipe.merge.dtype) == ("ties", "bfloat16")
    assert recipe.merge.settings == {"density": 0.1}
    assert (recipe.search.low, recipe.search.high) == (0.0, 1.5)
    assert case.unit.tolist() == [1, 1, 1, 1]
    average = oneshot.Case("digits-adamerging", 7, "linear", {}, tmp_path)
    assert average.unit.tolist() == [0.25, 0.25, 0.25, 0.25]
    assert (average.recipe().search.low, average.recipe().search.high) == (0.0, 0.5)
    assert len(average.recipe().objectives.held_out) == 4
    with pytest.raises(Exception, match="density"):
        oneshot.Case("digits-adamerging", 7, "ties:density=2", {}, tmp_path).recipe()


def found(seed: int, value: float, ready: float) -> dict[str, Any]:
    scores = {"search": {"a": 0.5, "b": 0.5}, "test": {"a": value, "b": value}}
    about = {"family": "digits-apart", "seed": seed, "operator": "kfac", "ready": ready, "evaluation": 0.5}
    merges = {"one": scores, "tuned": scores, "searched": scores}
    return {**about, **merges, "lambda": 0.8, "seconds": 3.0, "evaluations": 60}


def test_means_and_errors_are_over_seeds(oneshot: Any) -> None:
    models = {"experts": {"a": 0.9, "b": 1.0}, "average": {"a": 0.7, "b": 0.8}, "base": {"a": 0.5, "b": 0.5}}
    references = [{"family": "digits-apart", "seed": seed, "ready": 1.0, **models} for seed in (0, 1)]
    rows = [found(0, 0.8, 3.0), found(1, 0.9, 2.0)]
    refused = {"family": "digits-apart", "seed": 0, "operator": "slerp", "error": "two | models"}
    summary = oneshot.summary([*rows, refused], references, "digits-apart")
    line, other = summary["lines"]
    assert line["one"] == pytest.approx((0.85, 0.05))
    assert line["gaps"]["tuned"] == pytest.approx((0.5, 0.25))
    assert (line["preparing"], line["preparing in evaluations"]) == (1.5, 3.0)
    assert other == {"operator": "slerp", "error": "two | models"}
    text = oneshot.told("digits-apart", summary)
    assert "experts .950 ± .000, average .750 ± .000, base .500 ± .000" in text
    assert "Evaluations: 0 for c = 1, 11 for lambda, 60 for searched." in text
    cells = ".850 ± .050 | .50 ± .25 |"
    assert f"| kfac | {cells} {cells} {cells} 0.8, 0.8 | 1.5 | 3 | 0.5 | 3 |" in text
    assert "| slerp | two / models |" in text
    assert {len(row.strip("|").split("|")) for row in text.splitlines()[2:]} == {12}

    unsearched = [{key: one[key] for key in one if key not in ("searched", "seconds", "evaluations")} for one in rows]
    text = oneshot.told("digits-apart", oneshot.summary([*unsearched, refused], references, "digits-apart"))
    assert f"| kfac | {cells} {cells} 0.8, 0.8 | 1.5 | 3 | 0.5 |" in text
    assert {len(row.strip("|").split("|")) for row in text.splitlines()[2:]} == {9}

    learned = [{**one, "learned": one["one"], "learning": 7.0, "cost": 90.4} for one in unsearched]
    text = oneshot.told("digits-apart", oneshot.summary(learned, references, "digits-apart"))
    assert "11 for lambda, 90 for learned." in text
    assert f"| kfac | {cells} {cells} {cells} 0.8, 0.8 | 1.5 | 3 | 0.5 | 7 |" in text


def test_lambda_is_chosen_on_the_search_part_near_one(oneshot: Any, tmp_path: Path) -> None:
    class Known:
        """A judge of whom all scores are known."""

        size = 1

        def scores(self, genome: Any, part: str) -> dict[str, float]:
            value = genome.coefficients[0, 0]
            return {"a": float(0.4 <= value <= 0.8) if part == "search" else value}

    case = oneshot.Case("digits-apart", 0, "task_arithmetic", {}, tmp_path)
    object.__setattr__(case, "judge", Known)
    shot = oneshot.one_shot(case)
    assert shot["lambda"] == 0.8
    assert (shot["tuned"]["test"], shot["one"]["test"]) == ({"a": 0.8}, {"a": 1.0})
