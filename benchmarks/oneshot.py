"""One-shot merges by operator: as published, with one tuned lambda, and as the vectors that a search goes on from.

    python benchmarks/oneshot.py                                   # all operators, two families of digits, seeds 0-2
    python benchmarks/oneshot.py --operators task_arithmetic ties:density=0.1 dare --family digits-adamerging --seeds 0
    python benchmarks/oneshot.py --family text --cache runs/oneshot --set runtime.threads=2 --no-search

A family is a ready recipe with four experts of one base: ``digits-adamerging`` (four questions about the same images),
``digits-apart`` (four views of a digit: every task has inputs of its own) and ``text`` (``text-adamerging``, MiniLM). A
seed decides the experts' training, the split of the texts and the search. Tasks have frozen heads; only the encoders
are merged.

Every operator on task vectors merges ``base + sum_k c_k v_k``. The table has three merges of each:

- at c = 1, the published merge: nothing is tuned, and no label is seen. (Of ``linear``, which has no base, it is the
  average, and other coefficients count in multiples of that.)
- at one lambda for all models, the best of 11 by the mean accuracy on the search part; of equals the nearest to 1.
- the best of a search by the same accuracy: Bayesian MAP of 60 evaluations, one coefficient a model, in [0, 2]. The
  merge at c = 1 counts as its first evaluation. ``--set search={...}`` takes another search.

- and, with ``--learn``, coefficients by gradient: Expert Merging with free coefficients, 64 chunks a tensor, from the
  merge at c = 1. It learns from the experts' outputs without labels, and the best of its checks on the search part
  counts.

All are scored on the test part, which guides nothing: means over seeds, standard errors, and the share that is
closed of the gap between the experts' average and the experts, each on its own task. ``preparing`` is how many seconds
longer it takes to make a worker and have its first score than for task arithmetic; nothing is cached then. An
evaluation is a merge, scored on the search part of all tasks. An operator that refuses a family is listed with its
reason.

Writes ``benchmarks/results/oneshot.json`` and ``oneshot.md``. An operator takes seconds a seed on digits. On texts an
evaluation takes many seconds, and a search tens of minutes; ``--set prepare.arguments.search=200`` has fewer search
texts. With ``--cache`` what is finished is kept, and a search that was stopped goes on; name another folder after a
change of the code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from merges import (
    HERE,
    PARTS,
    RECIPES,
    Found,
    Judge,
    cost_of,
    finished,
    kept,
    mean,
    number,
    recipe_key,
    spread,
    table,
    written,
)
from seeds import numbers

from ecotone import Recipe
from ecotone.experiments import compose, preparation
from ecotone.experiments.recipe import parse_settings
from ecotone.merging import operators
from ecotone.populations.errors import EcotoneError, InputError
from ecotone.populations.folders import cache_folder
from ecotone.populations.genome import Floats, Genome

FAMILIES = {
    "digits-adamerging": "digits-adamerging.yaml",
    "digits-apart": "digits-apart.yaml",
    "text": "text-adamerging.yaml",
}
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
EVALUATIONS = 60  # of the search, the merge at c = 1 among them
REACH = 2.0  # the search's highest coefficient
PLAIN = "task_arithmetic"  # what preparing is compared with
LEARNING = {"algorithm": "expert_merging", "coefficients": "free", "chunks": 64, "steps": 200, "check_every": 20}
DISTILLED = {"loss": "distillation", "hidden": 0.0}  # to the experts' logits
ROWS = {"text": 32}  # in a batch of each task while coefficients are learned
MERGES = {"one": "c = 1", "tuned": "lambda", "searched": "searched", "learned": "learned"}

SECONDS = {"preparing": "", "in evaluations": "", "evaluation": "", "search": "searched", "learning": "learned"}
"""Columns of a table after the scores, and the merge without which a column is left out."""


@dataclass(frozen=True, eq=False)
class Case:
    """An operator on the models of one family and seed.

    Args:
        family: The name of the family.
        seed: The seed of experts and search.
        operator: Its name, and after a colon its settings: ``ties:density=0.1,combine=sum``.
        given: Settings of the recipe from the command line.
        kept_in: The folder that keeps results.
        search: Whether a search goes on from the operator's vectors.
        learning: Settings of the coefficients by gradient; None leaves them out.
    """

    family: str
    seed: int
    operator: str
    given: Mapping[str, Any]
    kept_in: Path
    search: bool = True
    learning: Mapping[str, Any] | None = None

    @cached_property
    def merge(self) -> tuple[str, dict[str, Any]]:
        """The operator's name and settings."""
        name, _, settings = self.operator.partition(":")
        return name, parse_settings(settings.split(",") if settings else [], "--operators", "ties:density=0.1")

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks; expert k was tuned for task k."""
        return [objective.name for objective in Recipe.from_yaml(self._file).objectives.search]

    @cached_property
    def unit(self) -> Floats:
        """(K,) coefficients of the published merge."""
        operator = operators.get(self.merge[0], self.merge[1])
        columns = operator.columns(self.tasks)
        return np.ones(len(columns)) if operator.needs_base else operator.seeds(len(self.tasks)).mean(axis=0)

    @cached_property
    def folder(self) -> Path:
        """The place of what is kept of this case."""
        return self.kept_in / f"{self.family}-{self.seed}-{self.merge[0]}-{recipe_key(self.recipe())}"

    @property
    def _file(self) -> Path:
        return RECIPES / FAMILIES[self.family]

    def recipe(self, held_out: bool = True) -> Recipe:
        """The family's recipe with the operator and the search, and without held-out data if it is for the search."""
        name, settings = self.merge
        low, high = 0.0, REACH * float(self.unit.max())
        changes: dict[str, Any] = {
            "seed": self.seed,
            "prepare.arguments.seed": self.seed,
            "merge": {"operator": name, **settings},
            "search": {"algorithm": "bayesian_map", "granularity": "model", "low": low, "high": high},
            "budget.evaluations": EVALUATIONS - 1,
            "runtime": {"pool": "serial"},
            "tracking.mlflow": False,
            **({} if held_out else {"objectives.held_out": []}),
            **self.given,
        }
        try:
            return Recipe.from_yaml(self._file, changes)
        except InputError as error:
            if not error.message.startswith("calibration: "):
                raise
        return Recipe.from_yaml(self._file, {**changes, "calibration": []})  # nothing has a use for it

    def learner(self) -> Recipe:
        """The family's recipe with coefficients by gradient, without held-out data.

        Raises:
            InputError: The operator mixes no vectors that a gradient could weigh.
        """
        changes: dict[str, Any] = {"search": dict(self.learning or {}), "budget.evaluations": 1000}
        for i in range(len(self.tasks)):
            changes |= {f"calibration.{i}.{key}": value for key, value in DISTILLED.items()}
            changes[f"calibration.{i}.batch"] = ROWS.get(self.family, 512)
        return replace(self, given={**changes, **self.given}).recipe(held_out=False)

    def judge(self) -> Judge:
        """A judge of the operator's merges. Its worker has the calibration tasks, so it can prepare."""
        recipe = self.recipe()
        return Judge(compose.worker_spec(recipe, preparation.prepare(recipe)))


# -- measuring -----------------------------------------------------------------------------------------------


def row(case: Case) -> Found:
    """The three merges of one operator for one family and seed; the reason where it refuses them."""
    about = {"family": case.family, "seed": case.seed, "operator": case.operator}
    try:
        shot = kept(case.folder / "shot.json", lambda: one_shot(case))
        found = kept(case.folder / "searched.json", lambda: searched(case, shot)) if case.search else {}
        if case.learning is not None:
            found |= kept(case.folder / f"learned-{recipe_key(case.learner())}.json", lambda: learned(case))
    except EcotoneError as error:
        print(f"{case.family} {case.seed} {case.operator}: {error}", flush=True)
        return {**about, "error": error.message}
    figures = [f"{mean(one['test']):.4f}" for merge, one in {**shot, **found}.items() if merge in MERGES]
    print(f"{case.family} {case.seed} {case.operator}: {', '.join(figures)}", flush=True)
    return {**about, **shot, **found}


def one_shot(case: Case) -> Found:
    """The merges at c = 1 and at the best lambda, and what they took."""
    shutil.rmtree(case.folder, ignore_errors=True)
    judge = case.judge()
    with caching_in(case.folder / "cache"):
        first, took = timed(judge, genome_of(judge, case.unit))
    scored, seconds = {1.0: first}, []
    for value in LAMBDAS:
        if value not in scored:
            scored[value], passed = timed(judge, genome_of(judge, value * case.unit))
            seconds.append(passed)
    best = max(LAMBDAS, key=lambda value: (mean(scored[value]), -abs(value - 1)))
    evaluation = statistics.median(seconds)
    return {
        "one": both(judge, genome_of(judge, case.unit)),
        "lambda": best,
        "tuned": both(judge, genome_of(judge, best * case.unit)),
        "lambdas": {str(value): mean(scored[value]) for value in LAMBDAS},
        "ready": took - evaluation,
        "evaluation": evaluation,
    }


def searched(case: Case, shot: Found) -> Found:
    """The best merge of the search, which has no test data; the merge at c = 1 is one of its own."""
    began = time.perf_counter()
    with caching_in(case.folder / "cache"):
        run = finished(case.recipe(held_out=False), case.folder / "run")
        passed, evaluations = time.perf_counter() - began, run.status()["evaluations"]
        best = run.trial(int(run.status()["best"]["id"])).genome
        judge = case.judge()
        found = both(judge, best)
    if case.learning is None:
        shutil.rmtree(case.folder / "cache", ignore_errors=True)
    coefficients = best.coefficients.tolist()
    if mean(shot["one"]["search"]) >= mean(found["search"]):
        found, coefficients = shot["one"], [case.unit.tolist()]
    return {"searched": found, "coefficients": coefficients, "seconds": passed, "evaluations": 1 + evaluations}


def learned(case: Case) -> Found:
    """The best check of the coefficients by gradient; the first check is the merge that they begin with."""
    began, recipe = time.perf_counter(), case.learner()
    with caching_in(case.folder / "cache"):
        run = finished(recipe, case.folder / f"learning-{recipe_key(recipe)}")
        passed = time.perf_counter() - began
        found = both(case.judge(), run.trial(int(run.status()["best"]["id"])).genome)
    shutil.rmtree(case.folder / "cache", ignore_errors=True)
    return {"learned": found, "learning": passed, "cost": cost_of(run, recipe)}


def reference(family: str, seed: int, given: Mapping[str, Any], folder: Path) -> Found:
    """Experts on their own tasks, base and average; and the seconds until a worker that prepares nothing is ready."""
    case = Case(family, seed, PLAIN, given, folder)

    def result() -> Found:
        judge = case.judge()
        timed(judge, genome_of(judge, case.unit))  # files and data have been read once from here on
        judge = case.judge()
        took = timed(judge, genome_of(judge, case.unit))[1]
        again = timed(judge, genome_of(judge, 0.5 * case.unit))[1]
        rows = np.eye(len(case.tasks))
        own = {
            task: judge.scores(genome_of(judge, one), "test")[task] for task, one in zip(case.tasks, rows, strict=True)
        }
        return {
            "experts": own,
            "base": judge.scores(genome_of(judge, 0 * case.unit), "test"),
            "average": judge.scores(genome_of(judge, rows.mean(axis=0)), "test"),
            "ready": took - again,
        }

    about = {"family": family, "seed": seed}
    return {**about, **kept(folder / f"{family}-{seed}-reference-{recipe_key(case.recipe())}.json", result)}


def genome_of(judge: Judge, coefficients: Any) -> Genome:
    """The merge with (K,) coefficients."""
    return Genome.uniform(judge.size, np.asarray(coefficients, np.float64))


def timed(judge: Judge, genome: Genome) -> tuple[dict[str, float], float]:
    """Scores on the search part, and the seconds that it took."""
    began = time.perf_counter()
    scores = judge.scores(genome, "search")
    return scores, time.perf_counter() - began


def both(judge: Judge, genome: Genome) -> dict[str, dict[str, float]]:
    """Scores on the search part and on the test part."""
    return {part: judge.scores(genome, part) for part in PARTS}


@contextlib.contextmanager
def caching_in(folder: Path) -> Iterator[None]:
    """Have what is prepared of models kept in a folder of its own; the models are where they were."""
    models, before = cache_folder() / "prepared", os.environ.get("ECOTONE_CACHE")
    for made in (models, folder):
        made.mkdir(parents=True, exist_ok=True)
    if not (folder / "prepared").is_symlink():
        (folder / "prepared").symlink_to(models.resolve())
    os.environ["ECOTONE_CACHE"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["ECOTONE_CACHE"]
        else:
            os.environ["ECOTONE_CACHE"] = before


# -- tables --------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Found], references: Sequence[Found], family: str) -> dict[str, Any]:
    """Means over seeds and their standard errors: of the references, and a line for each operator."""
    known = {one["seed"]: one for one in references if one["family"] == family}
    mine = [one for one in rows if one["family"] == family]
    lines = []
    for operator in dict.fromkeys(one["operator"] for one in mine):
        found = [one for one in mine if one["operator"] == operator]
        wrong = [one["error"] for one in found if "error" in one]
        lines.append({"operator": operator, "error": wrong[0]} if wrong else line(operator, found, known))
    models = {name: spread([mean(one[name]) for one in known.values()]) for name in ("experts", "average", "base")}
    return {"seeds": list(known), "models": models, "lines": lines}


def line(operator: str, found: Sequence[Found], known: Mapping[int, Found]) -> dict[str, Any]:
    """An operator's line."""
    preparing = [max(0.0, one["ready"] - known[one["seed"]]["ready"]) for one in found]
    evaluation = statistics.fmean(one["evaluation"] for one in found)
    merges = [merge for merge in MERGES if merge in found[0]]
    spent = {"one": 0, "tuned": len(LAMBDAS), "searched": max(one.get("evaluations", 0) for one in found)}
    spent["learned"] = round(statistics.fmean(one.get("cost", 0) for one in found))
    return {
        "operator": operator,
        **{merge: spread([mean(one[merge]["test"]) for one in found]) for merge in merges},
        "gaps": {merge: spread([closed(one, merge, known[one["seed"]]) for one in found]) for merge in merges},
        "lambdas": [one["lambda"] for one in found],
        "preparing": statistics.fmean(preparing),
        "evaluation": evaluation,
        "preparing in evaluations": statistics.fmean(preparing) / evaluation,
        "search": statistics.fmean(one.get("seconds", 0) for one in found),
        "learning": statistics.fmean(one.get("learning", 0) for one in found),
        "evaluations": {merge: spent[merge] for merge in merges},
    }


def closed(found: Found, merge: str, models: Found) -> float:
    """The share of the gap between the average and the experts."""
    low, high = mean(models["average"]), mean(models["experts"])
    return (mean(found[merge]["test"]) - low) / (high - low)


def told(family: str, found: Mapping[str, Any]) -> str:
    """A family's table in Markdown."""
    seeds = ", ".join(map(str, found["seeds"]))
    models = ", ".join(f"{name} {number(one)}" for name, one in found["models"].items())
    spent = next((one["evaluations"] for one in found["lines"] if "error" not in one), {})
    header = ["operator", *(cell for merge in spent for cell in (MERGES[merge], "gap closed")), "lambda by seed"]
    timed = [name for name, merge in SECONDS.items() if merge in ("", *spent)]
    header += [name if name.startswith("in ") else f"{name}, s" for name in timed]
    body = [
        [one["operator"], one["error"].replace("|", "/"), *[""] * (len(header) - 2)]
        if "error" in one
        else cells(one, timed)
        for one in found["lines"]
    ]
    title = f"{family}: mean test accuracy, seeds {seeds} ({models})."
    if spent:
        title += f" Evaluations: {', '.join(f'{count} for {MERGES[merge]}' for merge, count in spent.items())}."
    return f"{title}\n\n{table(header, body)}"


def cells(one: Mapping[str, Any], timed: Sequence[str]) -> list[str]:
    """An operator's line in a table, with the columns of ``SECONDS`` that are named."""
    scores = [cell for merge, gap in one["gaps"].items() for cell in (number(one[merge]), number(gap, 2))]
    lambdas = ", ".join(f"{value:g}" for value in one["lambdas"])
    figures = [one["preparing in evaluations" if name == "in evaluations" else name] for name in timed]
    return [one["operator"], *scores, lambdas, *(f"{figure:.3g}" for figure in figures)]


# -- command line --------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = operators.OPERATORS.names()
    found.add_argument("--operators", nargs="+", default=list(names), metavar="NAME[:SETTING=VALUE,...]")
    found.add_argument("--family", nargs="+", choices=list(FAMILIES), default=["digits-adamerging", "digits-apart"])
    found.add_argument("--seeds", type=numbers, default=numbers("0-2"), help="such as 0-23 or 0,3,8-11")
    found.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="of the recipe")
    found.add_argument("--no-search", action="store_false", dest="search", help="leave the searches out")
    found.add_argument("--learn", action="store_true", help="learn coefficients by gradient, too")
    found.add_argument("--steps", type=int, default=LEARNING["steps"], help="of the gradient")
    found.add_argument("--cache", type=Path, help="folder that keeps runs, for the next time")
    found.add_argument("--out", type=Path, default=HERE / "results" / "oneshot.json")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    given = parse_settings(options.settings)
    rows, references = [], []
    steps = {"steps": options.steps, "check_every": max(1, options.steps // 10)}
    learning = {**LEARNING, **steps} if options.learn else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        for family, seed in product(options.family, options.seeds):
            references.append(reference(family, seed, given, folder))
            cases = (Case(family, seed, name, given, folder, options.search, learning) for name in options.operators)
            rows += map(row, cases)
    families = {family: summary(rows, references, family) for family in options.family}
    text = "\n\n".join(told(family, found) for family, found in families.items())
    print(f"\n{text}")
    record = {"lambdas": LAMBDAS, "given": given, "summary": families, "references": references, "rows": rows}
    written(options.out, record, text)


if __name__ == "__main__":
    main()
