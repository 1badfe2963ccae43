"""One small language model of three: how well each way of merging experts of SmolLM2 predicts texts it has not seen.

    python benchmarks/smollm2.py --cache runs/smollm2                    # seeds 0-2 of each search
    python benchmarks/smollm2.py --cache runs/smollm2 --methods m2n2,cma_es --seeds 0 --evaluations 20

Models and texts are those of ``experiments/recipes/smollm2-m2n2.yaml``, ``smollm2-map.yaml`` and
``smollm2-cma_es.yaml``: SmolLM2-135M-Instruct out of 4 bits, and experts of it for definitions of nouns, descriptions
of Debian packages and fortune cookies, the last a LoRA adapter. The recipes differ in the search alone, and the experts
are the same for all seeds: a seed decides the search.

All methods choose by the mean, over the three kinds, of the likelihood of the recipes' search texts: 8 documents of
definitions, 8 of packages and 4 of fortunes, which are longer. Searches may score as many merges as ``--evaluations``
says; for the single lambda there are ten. What is chosen is then scored once, in bits per byte, on held-out texts: 64,
64 and 32 documents, each of eight texts. The table has, by kind and in the mean, bits per byte (means over the seeds of
the search, and their standard errors), and by how much a method is below the best single lambda on the same documents:
the mean over documents and its standard error, each kind with the same weight. Of the front that Bayesian MAP finds it
is the merge with the best mean.

Runs in this process, on one core; processes that share ``--cache`` may have a seed each. Scoring a merge takes about
four seconds where the CPU has matrix units for bfloat16, and half a minute on the held-out texts: 40 minutes for all,
after the experts have been tuned, once, in some minutes. With ``--cache`` what is finished is kept, and a search that
was stopped goes on where it was. Writes ``benchmarks/results/smollm2.json`` and ``smollm2.md``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from merges import (
    HERE,
    PARTS,
    RECIPES,
    Found,
    finished,
    judge_of,
    kept,
    mean,
    number,
    parser_of,
    recipe_key,
    spread,
    table,
    written,
)

from ecotone import Recipe
from ecotone.experiments.recipe import Objectives, parse_settings
from ecotone.populations.genome import Genome

DOMAINS = ("glosses", "packages", "fortunes")
HELD_OUT = (64, 64, 32)  # documents of each
LAMBDAS = [round(0.1 * i, 1) for i in range(1, 11)]
BUDGET = 40  # evaluations of a search


@dataclass(frozen=True)
class Case:
    """What is compared, with one seed of the searches.

    Args:
        seed: Of the searches.
        evaluations: Merges that a search may score.
        given: Settings of the recipes from the command line.
        folder: Where results are kept.
    """

    seed: int
    evaluations: int
    given: Mapping[str, Any]
    folder: Path

    def recipe(self, name: str, settings: Mapping[str, Any] | None = None) -> Recipe:
        """``smollm2-NAME.yaml``, held-out texts as many as are scored here."""
        texts = {f"objectives.held_out.{i}.limit": count for i, count in enumerate(HELD_OUT)}
        where = {"runtime.pool": "serial", "tracking.mlflow": False}
        return Recipe.from_yaml(RECIPES / f"smollm2-{name}.yaml", {**texts, **where, **(settings or {}), **self.given})

    def uniform(self, coefficients: Sequence[float]) -> Genome:
        """The merge with one coefficient an expert."""
        return Genome.uniform(judge_of(self.recipe("m2n2")).size, np.asarray(coefficients, np.float64))

    def measured(self, genome: Genome, part: str) -> Found:
        """What a merge scores on one part, by domain, and on each document."""
        recipe = self.recipe("m2n2")

        def result() -> Found:
            evaluation = judge_of(recipe).evaluation(genome, part)
            documents = {name: np.round(values, 5).tolist() for name, values in evaluation.per_example.items()}
            return {"scores": dict(evaluation.scores), "documents": documents}

        return kept(self.folder / f"{part}-{recipe_key(recipe)}-{genome.digest[:16]}.json", result)


# -- methods -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way of merging.

    Args:
        title: For tables.
        find: What it finds.
        seeded: Whether that depends on the seed.
    """

    title: str
    find: Callable[[Case], Found]
    seeded: bool = False


def told(case: Case, genome: Genome, evaluations: int = 0, **more: Any) -> Found:
    """A record of a merge: its mean coefficients, and what it scores."""
    search, test = (case.measured(genome, part) for part in PARTS)
    coefficients = np.average(genome.coefficients, axis=0, weights=np.diff(genome.boundaries))
    scores = {"search": search["scores"], "test": test["scores"], "documents": test["documents"]}
    return {"coefficients": coefficients.round(4).tolist(), **scores, "evaluations": evaluations, **more}


def fixed(*coefficients: float) -> Callable[[Case], Found]:
    """The merge with these coefficients."""
    return lambda case: told(case, case.uniform(coefficients))


def experts(case: Case) -> Found:
    """Each expert on its own domain, as if all could be kept."""
    found = [told(case, case.uniform(row)) for row in np.eye(len(DOMAINS))]
    own = {
        part: {domain: one[part][domain] for domain, one in zip(DOMAINS, found, strict=True)}
        for part in ("search", "test", "documents")
    }
    return {"coefficients": None, **own, "evaluations": 0}


def best_lambda(case: Case) -> Found:
    """The sum of all task vectors times the number that the search texts choose."""
    found = {value: case.uniform([value] * len(DOMAINS)) for value in LAMBDAS}
    best = max(found, key=lambda value: mean(case.measured(found[value], "search")["scores"]))
    return told(case, found[best], len(LAMBDAS))


def searched(name: str) -> Callable[[Case], Found]:
    """The best that the search of ``smollm2-NAME.yaml`` finds; it has no held-out texts."""

    def find(case: Case) -> Found:
        recipe = case.recipe(name, {"seed": case.seed, "budget.evaluations": case.evaluations})
        recipe = recipe.model_copy(update={"objectives": Objectives(search=recipe.objectives.search)})
        folder = case.folder / f"{name}-{case.seed}-{recipe_key(recipe)}"

        def result() -> Found:
            run = finished(recipe, folder)
            status, best = run.status(), run.trial("best").genome
            facts = {key: status[key] for key in ("seconds", "digest")}
            return told(case, best, status["evaluations"], segments=best.segments, **facts)

        return kept(folder / "found.json", result)

    return find


METHODS = {
    "base": Method("base", fixed(0.0, 0.0, 0.0)),
    "glosses": Method("expert of definitions", fixed(1.0, 0.0, 0.0)),
    "packages": Method("expert of packages", fixed(0.0, 1.0, 0.0)),
    "fortunes": Method("expert of fortunes (LoRA)", fixed(0.0, 0.0, 1.0)),
    "experts": Method("experts, each on its own domain", experts),
    "average": Method("average", fixed(1 / 3, 1 / 3, 1 / 3)),
    "lambda": Method("task arithmetic, one lambda", best_lambda),
    "m2n2": Method("M2N2", searched("m2n2"), True),
    "bayesian_map": Method("Bayesian MAP", searched("map"), True),
    "cma_es": Method("CMA-ES", searched("cma_es"), True),
}


# -- tables --------------------------------------------------------------------------------------------------


def row(case: Case, name: str) -> dict[str, Any]:
    """What one method finds, with one seed if it depends on it."""
    found = METHODS[name].find(case)
    seed = case.seed if METHODS[name].seeded else None
    print(f"{name} {'' if seed is None else seed}: {mean(found['search']):.4f} {mean(found['test']):.4f}", flush=True)
    return {"method": name, "seed": seed, **found}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a method: bits per byte by domain and in the mean, and how far below those of the best single lambda."""
    reference = next((one for one in rows if one["method"] == "lambda"), None)
    lines = []
    for name in dict.fromkeys(one["method"] for one in rows):
        mine = [one for one in rows if one["method"] == name]
        line: dict[str, Any] = {"method": name, "seeds": [one["seed"] for one in mine]}
        line["domains"] = {domain: spread([one["test"][domain] for one in mine]) for domain in DOMAINS}
        line["mean"] = spread([mean(one["test"]) for one in mine])
        line["search"] = spread([mean(one["search"]) for one in mine])
        if reference is not None and name != "lambda":
            line["below"] = below(mine, reference["documents"])
        lines.append(line | {"evaluations": max(one["evaluations"] for one in mine)})
    return lines


def below(rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """How much fewer bits per byte than the reference, document by document: a mean of domains, and its error."""
    found = []
    for domain in DOMAINS:
        means = np.mean([one["documents"][domain] for one in rows], axis=0)
        found.append(spread((np.asarray(reference[domain]) - means).tolist()))
    values, errors = np.transpose(found)
    return float(values.mean()), float(np.linalg.norm(errors) / len(errors))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = summary(rows)
    seeds = sorted({one["seed"] for one in rows if one["seed"] is not None})
    counts = " + ".join(str(len(values)) for values in rows[0]["documents"].values())
    title = f"Bits per byte on {counts} held-out documents" + (f", seeds {', '.join(map(str, seeds))}" if seeds else "")
    body = [
        [
            METHODS[line["method"]].title,
            *(number(line["domains"][domain]) for domain in DOMAINS),
            number(line["mean"]),
            number(line["below"], 4) if "below" in line else "",
            str(line["evaluations"]),
        ]
        for line in lines
    ]
    header = ["method", *DOMAINS, "mean", "below the best lambda, by document", "evaluations"]
    return f"{title}\n\n{table(header, body)}"


# -- command line --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    given = parse_settings(options.settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        cases = [Case(seed, options.evaluations, given, folder) for seed in options.seeds]
        rows = [row(case, name) for name in options.methods for case in (cases if METHODS[name].seeded else cases[:1])]
    print(f"\n{markdown(rows)}")
    save(options.out, {"evaluations": options.evaluations, "seeds": options.seeds, "given": given}, rows)


def save(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table as ``.md``, and as JSON beside what each method found with each seed."""
    found = [{key: value for key, value in one.items() if key != "documents"} for one in rows]
    record = {"settings": settings, "summary": summary(rows), "rows": found}
    written(out, record, markdown(rows))


def parser() -> argparse.ArgumentParser:
    found = parser_of(__doc__, METHODS, HERE / "results" / "smollm2.json")
    found.add_argument("--evaluations", type=int, default=BUDGET, help="merges that a search may score")
    return found


if __name__ == "__main__":
    main()
