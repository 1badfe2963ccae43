"""The few lines of Python of the README, on the ready recipes."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import ecotone
from ecotone import Recipe, Run, launch, resume
from ecotone.experiments.compose import worker_spec
from ecotone.experiments.exports import verify
from ecotone.experiments.preparation import prepare
from ecotone.populations import facts
from ecotone.populations.errors import InputError, JournalError

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "experiments" / "recipes"
QUICK: dict[str, Any] = {"runtime.pool": "serial", "tracking.mlflow": False}


@pytest.fixture(scope="module")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short search over the two specialists; read only."""
    recipe = Recipe.from_yaml(RECIPES / "digits-specialists.yaml", QUICK | {"budget.evaluations": 250})
    return launch(recipe, tmp_path_factory.mktemp("specialists") / "run")


def example() -> str:
    """The code in the package's docstring."""
    return textwrap.dedent((ecotone.__doc__ or "").split("::", 1)[1])


def test_the_docstrings_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written, only without Ray and MLflow and shorter."""
    text = example()
    text = text.replace('"budget.evaluations": 500', f'"budget.evaluations": 40, **{QUICK!r}')
    assert QUICK.__repr__() in text
    text = text.replace("experiments/recipes/", f"{RECIPES}/")
    monkeypatch.chdir(tmp_path)
    printed: list[tuple[Any, ...]] = []
    exec(compile(text, "docstring", "exec"), {"print": lambda *values: printed.append(values)})
    assert printed
    for number, scores, held_out in printed:
        assert 0 <= number < 40
        assert set(scores) == set(held_out) == {"low", "high"}
    assert all(one.difference == 0 for one in verify(tmp_path / "merged"))


def test_a_merge_of_specialists_beats_both_and_their_average(specialists: Run) -> None:
    best, references = specialists.best(), {r.id: r for r in specialists.references()}
    assert best is not None
    assert set(references) == {"low", "high", "average"}

    def mean(scores: Any) -> float:
        return float(np.mean(list(scores.values())))

    for reference in references.values():
        assert mean(best.scores) > mean(reference.scores)
        assert mean(best.held_out) > mean(reference.held_out)
    assert mean(references["low"].scores) == pytest.approx(0.5, abs=0.02)  # it knows its own digits only
    assert mean(best.scores) > 0.9


def test_reading_a_run(specialists: Run) -> None:
    status, front, best = specialists.status(), specialists.front(), specialists.best()
    assert best is not None
    assert status["state"] == "finished"
    assert status["best"] == {"id": best.id, "scores": best.scores}
    assert status["front_size"] == len(front)
    assert front[0].id == best.id
    trial = specialists.trial("best")
    assert trial.number == best.id
    assert specialists.trial(str(best.id)) == trial
    assert specialists.scored(trial.number) == best
    assert best.parents == trial.parents
    with specialists.journal() as journal:
        evaluation = journal.evaluation(trial.number)
        assert evaluation is not None
        assert {name: len(values) for name, values in evaluation.per_example.items()} == {"low": 223, "high": 226}
    with pytest.raises(InputError, match="has not been scored"):
        specialists.scored(10**6)
    with pytest.raises(JournalError, match="no journal there"):
        Run(specialists.directory / "nowhere")


def test_an_export_is_the_merge_that_was_scored(specialists: Run, tmp_path: Path) -> None:
    path = specialists.export("best", tmp_path / "best.safetensors")
    assert all(one.difference == 0 for one in verify(path))
    genome, merged = specialists.trial("best").genome, load_file(path)
    with specialists.journal() as journal:
        recorded = Recipe.from_record(journal.fact(facts.RECIPE))
    experts = [load_file(file) for file in worker_spec(recorded, prepare(recorded)).experts]
    flat = [np.concatenate([expert[name].ravel() for name in sorted(expert)]) for expert in experts]
    weights = np.repeat(genome.coefficients, np.diff(genome.boundaries), axis=0)
    wanted = sum(weights[:, k] * flat[k] for k in range(len(flat)))
    assert np.concatenate([merged[name].ravel() for name in sorted(merged)]) == pytest.approx(wanted, abs=1e-6)


def test_resuming_with_a_larger_budget(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(RECIPES / "digits-scratch.yaml", QUICK | {"budget.evaluations": 60})
    seen: list[int] = []
    said: list[str] = []
    run = launch(recipe, tmp_path / "run", observe=lambda p: seen.append(p.evaluations), notify=said.append)
    assert seen[-1] == 60
    assert any("held-out" in text for text in said)
    again = resume(run, {"budget.evaluations": 120})
    assert again.directory == run.directory
    assert again.status()["evaluations"] == 120
    assert all(member.held_out is not None for member in again.front())
    exported = again.export("best", tmp_path / "best")
    assert all(one.difference == 0 for one in verify(exported))
    with pytest.raises(InputError, match="a run is there already"):
        launch(recipe, tmp_path / "run")


@pytest.mark.parametrize("algorithm", ["random", "cma_es", "sep_cma_es"])
def test_other_searches_on_the_same_recipe(algorithm: str, tmp_path: Path) -> None:
    settings = QUICK | {
        "budget.evaluations": 60,
        "search": {"algorithm": algorithm, "granularity": "tensor", "archive": 5},
        "merge.operator": "task_arithmetic",
        "models.base": "prepared:base.safetensors",
    }
    run = launch(Recipe.from_yaml(RECIPES / "digits-specialists.yaml", settings), tmp_path / "run")
    assert run.status()["evaluations"] == 60
    assert [r.id for r in run.references()] == ["base", "low", "high", "average"]
    path = run.export("best", tmp_path / "best")
    assert all(one.difference == 0 for one in verify(path))


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("mutation", [0.0, 0.001])
def test_the_first_trials_are_the_models_themselves(operator: str, mutation: float, tmp_path: Path) -> None:
    """Under every operator, also as dense vectors: they score what the models score."""
    settings = QUICK | {"budget.evaluations": 30, "search.mutation": mutation, "merge.operator": operator}
    if operator == "task_arithmetic":
        settings["models.base"] = "prepared:base.safetensors"
    run = launch(Recipe.from_yaml(RECIPES / "digits-specialists.yaml", settings), tmp_path / "run")
    references = {reference.id: reference for reference in run.references()}
    with run.journal() as journal:
        rows = list(journal.rows())
    assert rows[0].scores == references["low"].scores
    assert rows[1].scores == references["high"].scores
    assert max(sum((row.scores or {}).values()) for row in rows) > 1.2  # children are merges, not noise
    assert all(one.difference == 0 for one in verify(run.export("best", tmp_path / "best")))


def test_two_seeds_are_two_searches_and_one_is_one(tmp_path: Path) -> None:
    digests = []
    for index, seed in enumerate((1, 1, 2)):
        settings = QUICK | {"budget.evaluations": 40, "seed": seed, "prepare.arguments.seed": 0}
        recipe = Recipe.from_yaml(RECIPES / "digits-specialists.yaml", settings)
        digests.append(launch(recipe, tmp_path / str(index)).status()["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_importing_the_package_is_light() -> None:
    heavy = "'torch', 'ray', 'mlflow', 'pydantic', 'numpy'"
    program = f"import sys, ecotone, ecotone.experiments.cli; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        ecotone.lunch  # noqa: B018


def test_every_public_name_is_documented() -> None:
    for name in ecotone.__all__:
        assert getattr(ecotone, name).__doc__
    assert re.search(r"from ecotone import Recipe, launch", ecotone.__doc__ or "")


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.S | re.M)


def test_the_readme_shows_the_docstrings_example() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    shown = [[line for line in block.splitlines() if line.strip()] for block in blocks("python")]
    assert lines in shown


def test_the_readmes_recipe_is_one() -> None:
    recipe = next(record for record in map(yaml.safe_load, blocks("yaml")) if isinstance(record, dict))
    assert Recipe.from_record(recipe).name == "digits-specialists"


def test_a_recipe_s_functions_are_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever Python was started."""
    from test_cli import toy_recipe

    path = toy_recipe(tmp_path / "mine", budget={"evaluations": 8})
    module = tmp_path / "mine" / "cli_toys.py"
    module.rename(module.with_name("found_in_its_folder.py"))
    path.write_text(path.read_text().replace("cli_toys", "found_in_its_folder"))
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_yaml(path)
    assert launch(recipe, "run").status()["failures"] == 0
    assert recipe.folder == tmp_path / "mine"
    assert Recipe.from_record(recipe.record()).folder is None


def test_a_run_makes_operator_and_search_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made from the models' headers, checked, and then carried out."""
    from test_cli import toy_recipe

    from ecotone.experiments import compose
    from ecotone.search import cma_es

    made: list[str] = []

    def counting(name: str, function: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            made.append(name)
            return function(*arguments, **named)

        return counted

    monkeypatch.setattr(compose, "check_operator", counting("operator", compose.check_operator))
    monkeypatch.setattr(cma_es, "CmaEs", counting("search", cma_es.CmaEs))
    recipe = toy_recipe(tmp_path, search={"algorithm": "cma_es"}, budget={"evaluations": 12})
    assert launch(Recipe.from_yaml(recipe), tmp_path / "run").status()["evaluations"] == 12
    assert sorted(made) == ["operator", "search"]
