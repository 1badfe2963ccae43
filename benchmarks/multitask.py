"""One model for four tasks: what each way of merging four experts of one base scores on examples it has not seen.

    python benchmarks/multitask.py                                  # digits, seeds 0-2
    python benchmarks/multitask.py --problems text --cache runs/multitask
    python benchmarks/multitask.py --problems digits,text --methods average,tensor --seeds 0-4 --rates 0.01

``digits``: four questions about a handwritten digit (``experiments/recipes/digits-adamerging.yaml``). ``text``: four
kinds of short text (``text-adamerging.yaml``). Tasks have frozen heads; only the encoders are merged. A seed decides
the experts' training, the split of the texts and the search.

A method learns from the recipe's search part alone: searches that need scores see its accuracies, gradient searches
its inputs without labels (``text`` has other texts for that). Whatever is chosen (a lambda, a learning rate of
``--rates``, a regulariser, which of a run's merges) is the one with the best mean accuracy there, and the test part
scores what was chosen. The first table has test accuracies by task, their mean, and how much is closed of the gap
between the average and the experts, each on its own task: means over seeds and their standard errors. ``cost`` is
in evaluations of all search examples, over all that a method tried: an example costs one forward pass, or three when
its gradient is wanted (four when an expert is asked too). The second table has the gradient searches by setting: the
merge of the best check, at which check that was (0 is the start, 10 the end; after MAP they are counted on from its
evaluations), and the merge of the last step, which no label has chosen.

Writes ``benchmarks/results/multitask.json`` and ``multitask.md``. Digits take minutes on two cores. Texts take hours;
with ``--cache`` what is finished is kept, and a search that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
    cost_of,
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
from ecotone.experiments.recipe import parse_settings
from ecotone.populations.genome import Genome


@dataclass(frozen=True)
class Problem:
    """A recipe, and how much a method may spend on it.

    Args:
        title: For tables.
        recipe: Its file.
        evaluations: Merges that a search by scores may score.
        steps: Of a gradient search, which with their checks cost about as much.
        samples: What MAP fits its surrogates to; None leaves it to MAP.
    """

    title: str
    recipe: str
    evaluations: int = 60
    steps: int = 500
    samples: int | None = None


PROBLEMS = {
    "digits": Problem("four questions about a digit", "digits-adamerging.yaml"),
    "text": Problem("four kinds of text", "text-adamerging.yaml", evaluations=30, steps=200, samples=16),
}
CHECKS = 10  # of a gradient search, besides the first
LAMBDAS = [round(0.1 * i, 1) for i in range(1, 16)]
RATES = [0.001, 0.01]  # the paper's, and ten times that
REGULARISERS = [5.0, 0.1]  # of Expert Merging: its own, and one that leaves coefficients freer


@dataclass(frozen=True)
class Case:
    """A problem with one seed.

    Args:
        name: The problem's.
        seed: Of experts and search.
        rates: Learning rates to try.
        given: Settings of the recipe from the command line.
        folder: Where runs are kept.
    """

    name: str
    seed: int
    rates: tuple[float, ...]
    given: Mapping[str, Any]
    folder: Path

    @property
    def problem(self) -> Problem:
        """What it is made from."""
        return PROBLEMS[self.name]

    def recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The problem's, for this seed."""
        seeds = {"seed": self.seed, "prepare.arguments.seed": self.seed, "tracking.mlflow": False}
        return Recipe.from_yaml(RECIPES / self.problem.recipe, {**seeds, **settings, **self.given})

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks; expert k was tuned for task k."""
        return [objective.name for objective in self.recipe({}).objectives.search]


# -- methods -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way of merging.

    Args:
        title: For tables.
        tries: What it finds for a case, a record for each of its settings; the best on the search part counts.
        detailed: Whether its settings are told one by one, in the second table.
    """

    title: str
    tries: Callable[[Case], list[Found]]
    detailed: bool = False


def base(case: Case) -> list[Found]:
    return [fixed(case, np.zeros(len(case.tasks)))]


def average(case: Case) -> list[Found]:
    return [fixed(case, np.full(len(case.tasks), 1 / len(case.tasks)))]


def experts(case: Case) -> list[Found]:
    """Each expert on its own task, as if all could be kept."""
    found = [fixed(case, row) for row in np.eye(len(case.tasks))]
    own = {part: {task: one[part][task] for task, one in zip(case.tasks, found, strict=True)} for part in PARTS}
    return [{"setting": {}, **own, "cost": 0.0, "seconds": 0.0}]


def one_lambda(merge: Mapping[str, Any]) -> Callable[[Case], list[Found]]:
    """The sum of all task vectors times one number."""

    def tries(case: Case) -> list[Found]:
        return [fixed(case, np.full(len(case.tasks), value), {"lambda": value}, merge, cost=1.0) for value in LAMBDAS]

    return tries


def by_scores(search: Mapping[str, Any]) -> Callable[[Case], list[Found]]:
    """A search that sees accuracies."""

    def tries(case: Case) -> list[Found]:
        budget = case.problem.evaluations
        return [searched(case, {}, {"search": sized(case, search), "calibration": [], "budget.evaluations": budget})]

    return tries


def sized(case: Case, search: Mapping[str, Any]) -> dict[str, Any]:
    """A search with as many samples as the problem says, if it is MAP."""
    own = case.problem.samples is not None and search["algorithm"] == "map"
    return {**search, "samples": case.problem.samples} if own else dict(search)


def by_gradient(search: Mapping[str, Any], **settings: Any) -> Callable[[Case], list[Found]]:
    """AdaMerging, at each of the learning rates."""

    def tries(case: Case) -> list[Found]:
        return [
            searched(case, {"rate": rate}, {"search": descent(case, rate=rate, **search), **settings})
            for rate in case.rates
        ]

    return tries


def descent(case: Case, share: float = 1.0, **settings: Any) -> dict[str, Any]:
    """AdaMerging with a share of the problem's steps."""
    steps = max(1, round(share * case.problem.steps))
    return {"algorithm": "adamerging", "steps": steps, "check_every": -(-steps // CHECKS), **settings}


def supervised(case: Case) -> list[Found]:
    """Tensor by tensor by the cross-entropy of the search part's labels, which the checks see too."""
    objectives = case.recipe({}).objectives.search
    settings: dict[str, Any] = {f"calibration.{i}.loss": "cross_entropy" for i in range(len(objectives))}
    for i, objective in enumerate(objectives):
        settings[f"calibration.{i}.data"] = objective.model_dump()["data"]
    return by_gradient({}, **settings)(case)


def expert_merging(case: Case) -> list[Found]:
    """Coefficients by which the merge behaves like the experts on unlabelled examples, each on its own task."""
    return [
        searched(case, {"regulariser": weight}, distilled(case, descent(case), hidden=1.0, regulariser=weight))
        for weight in REGULARISERS
    ]


def expert_merging_plus(case: Case) -> list[Found]:
    """The same in chunks, half of the steps to find out which matter; with and without hidden layers."""
    own = {"regulariser": 0.0, "rate": 0.1, "chunks": 16}
    return [
        searched(case, {"hidden": hidden}, distilled(case, descent(case, share=0.5), hidden=hidden, **own))
        for hidden in (0.0, 1.0)
    ]


def expert_merging_free(case: Case) -> list[Found]:
    """The same in chunks with free coefficients: no sigmoid, no clip, no regulariser."""
    own = {"coefficients": "free", "chunks": 16}
    return [
        searched(case, {"hidden": hidden}, distilled(case, descent(case, share=0.5), hidden=hidden, **own))
        for hidden in (0.0, 1.0)
    ]


def distilled(case: Case, search: Mapping[str, Any], hidden: float, **own: Any) -> dict[str, Any]:
    """Settings of a recipe for Expert Merging."""
    losses: dict[str, Any] = {}
    for i in range(len(case.tasks)):
        losses |= {f"calibration.{i}.loss": "distillation", f"calibration.{i}.hidden": hidden}
    return {"search": {**search, "algorithm": "expert_merging", **own}, **losses}


def refined(case: Case) -> list[Found]:
    """M2N2 whose children, every fourth, learn a little from unlabelled examples before they are scored."""
    search = {"algorithm": "m2n2", "refine": {"every": 4, "steps": 5, "rate": 0.01}}
    return [searched(case, {}, {"search": search, "budget.evaluations": case.problem.evaluations})]


def then_adamerging(search: Mapping[str, Any]) -> Callable[[Case], list[Found]]:
    """Two thirds of the budget for coefficients of models, then a third of the steps from the best of them."""

    def tries(case: Case) -> list[Found]:
        first = case.problem.evaluations * 2 // 3
        found = []
        for rate in case.rates:
            last = descent(case, share=1 / 3, granularity="tensor", rate=rate, start="best")
            chain = {
                "search": [{**sized(case, search), "evaluations": first}, last],
                "budget.evaluations": first + CHECKS + 1,
            }
            found.append(searched(case, {"rate": rate}, chain))
        return found

    return tries


MAP = {"algorithm": "map", "granularity": "model", "low": 0.0, "high": 1.5}
BAYESIAN_MAP = MAP | {"algorithm": "bayesian_map"}
TIES = {"merge.operator": "ties_vectors"}
METHODS = {
    "experts": Method("experts, each on its own task", experts),
    "base": Method("base", base),
    "average": Method("average", average),
    "lambda": Method("task arithmetic, one lambda", one_lambda({})),
    "ties": Method("TIES vectors, one lambda", one_lambda(TIES)),
    "map": Method("MAP", by_scores(MAP)),
    "bayesian_map": Method("Bayesian MAP", by_scores(BAYESIAN_MAP)),
    "m2n2": Method("M2N2", by_scores({"algorithm": "m2n2"})),
    "m2n2_refined": Method("M2N2, every fourth child refined", refined),
    "model": Method("AdaMerging, task-wise", by_gradient({"granularity": "model"}), True),
    "block": Method("AdaMerging, by block", by_gradient({"granularity": "block"}), True),
    "tensor": Method("AdaMerging, layer-wise", by_gradient({"granularity": "tensor"}), True),
    "plus": Method("AdaMerging++, layer-wise", by_gradient({"granularity": "tensor"}, **TIES), True),
    "supervised": Method("cross-entropy of labels, layer-wise", supervised, True),
    "expert_merging": Method("Expert Merging", expert_merging, True),
    "expert_merging_plus": Method("Expert Merging++", expert_merging_plus, True),
    "expert_merging_free": Method("Expert Merging++, free coefficients", expert_merging_free, True),
    "map_tensor": Method("MAP, then AdaMerging layer-wise", then_adamerging(MAP), True),
    "bayesian_map_tensor": Method("Bayesian MAP, then AdaMerging layer-wise", then_adamerging(BAYESIAN_MAP), True),
}


# -- measuring -----------------------------------------------------------------------------------------------


def fixed(
    case: Case,
    coefficients: Any,
    setting: Mapping[str, Any] | None = None,
    merge: Mapping[str, Any] | None = None,
    cost: float = 0.0,
) -> Found:
    """Scores of the merge with (K,) coefficients."""
    judge = judge_of(case.recipe(merge or {}))
    genome = Genome.uniform(judge.size, np.asarray(coefficients, np.float64))
    scores = {part: judge.scores(genome, part) for part in PARTS}
    return {"setting": dict(setting or {}), **scores, "cost": cost, "seconds": 0.0}


def searched(case: Case, setting: Mapping[str, Any], settings: Mapping[str, Any]) -> Found:
    """What a search finds: its best merge, and the last that it scored. It has no test data."""
    recipe = case.recipe({**settings, "objectives.held_out": []})
    folder = case.folder / f"{case.name}-{case.seed}-{recipe_key(recipe)}"

    def result() -> Found:
        run = finished(recipe, folder)
        judge = judge_of(case.recipe({key: value for key, value in settings.items() if key.startswith("merge")}))
        with run.journal() as journal:
            scored = [row.number for row in journal.rows() if row.failure is None]
        number = int(run.status()["best"]["id"])
        best, last = run.trial(number).genome, run.trial(scored[-1]).genome
        found: Found = {part: judge.scores(best, part) for part in PARTS}
        found["last"] = {part: judge.scores(last, part) for part in PARTS}
        found["check"] = scored.index(number)
        status = run.status()
        return found | {"cost": cost_of(run, recipe), "seconds": status["seconds"], "digest": status["digest"]}

    return {**kept(folder / "found.json", result), "setting": dict(setting)}


# -- tables --------------------------------------------------------------------------------------------------


def chosen(tries: Sequence[Found]) -> Found:
    """The best on the search part; of equals the first."""
    return max(tries, key=lambda one: mean(one["search"]))


def row(case: Case, name: str) -> dict[str, Any]:
    """What one method finds for one problem and seed."""
    tries = METHODS[name].tries(case)
    best = chosen(tries)
    found = {"problem": case.name, "seed": case.seed, "method": name, "setting": best["setting"]}
    found |= {part: best[part] for part in PARTS}
    found |= {total: sum(one[total] for one in tries) for total in ("cost", "seconds")}
    print(f"{case.name} {case.seed} {name}: {mean(best['search']):.4f} {mean(best['test']):.4f}", flush=True)
    return {**found, "tries": tries}


def summary(rows: Sequence[Mapping[str, Any]], problem: str) -> list[dict[str, Any]]:
    """A line a method: means over seeds and standard errors, of each task, of all, and of the share of the gap."""
    mine = [one for one in rows if one["problem"] == problem]
    means = {(one["method"], one["seed"]): mean(one["test"]) for one in mine}
    lines = []
    for name in dict.fromkeys(one["method"] for one in mine):
        found = [one for one in mine if one["method"] == name]
        tasks = {task: spread([one["test"][task] for one in found]) for task in found[0]["test"]}
        line = {"method": name, "tasks": tasks, "mean": spread([mean(one["test"]) for one in found])}
        if {"average", "experts"} <= {method for method, _ in means}:
            line["gap"] = spread([closed(means, name, one["seed"]) for one in found])
        lines.append(line | {"cost": statistics.fmean(one["cost"] for one in found)})
    return lines


def closed(means: Mapping[tuple[str, int], float], name: str, seed: int) -> float:
    low, high = means["average", seed], means["experts", seed]
    return (means[name, seed] - low) / (high - low)


def details(rows: Sequence[Mapping[str, Any]], problem: str) -> list[dict[str, Any]]:
    """A line for each setting of the gradient searches: mean accuracies of their best and last merges."""
    found: dict[tuple[str, str], list[Found]] = {}
    for one in rows:
        if one["problem"] == problem and METHODS[one["method"]].detailed:
            for tried in one["tries"]:
                text = ", ".join(f"{key} {value}" for key, value in tried["setting"].items())
                found.setdefault((one["method"], text), []).append(tried)
    return [
        {
            "method": method,
            "setting": setting,
            **{f"best {part}": spread([mean(one[part]) for one in tries]) for part in PARTS},
            **{f"last {part}": spread([mean(one["last"][part]) for one in tries]) for part in PARTS},
            "checks": [one["check"] for one in tries],
        }
        for (method, setting), tries in found.items()
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(
        part for problem in dict.fromkeys(one["problem"] for one in rows) for part in told(rows, problem)
    )


def told(rows: Sequence[Mapping[str, Any]], problem: str) -> list[str]:
    seeds = sorted({one["seed"] for one in rows if one["problem"] == problem})
    lines = summary(rows, problem)
    tasks = list(lines[0]["tasks"])
    header = ["method", *tasks, "mean", "gap closed", "cost"]
    body = [
        [
            METHODS[line["method"]].title,
            *(number(line["tasks"][task]) for task in tasks),
            number(line["mean"]),
            number(line["gap"], 2) if "gap" in line else "",
            f"{line['cost']:.0f}",
        ]
        for line in lines
    ]
    found = [f"{PROBLEMS[problem].title}: test accuracy, seeds {', '.join(map(str, seeds))}", table(header, body)]
    fine = details(rows, problem)
    if fine:
        parts = [f"{which} {part}" for which in ("best", "last") for part in PARTS]
        header = ["method", "setting", "best check, search", "test", "last, search", "test", "best at, by seed"]
        body = [
            [
                METHODS[one["method"]].title,
                one["setting"],
                *(number(one[part]) for part in parts),
                ", ".join(map(str, one["checks"])),
            ]
            for one in fine
        ]
        found += [f"{PROBLEMS[problem].title}: mean accuracy by setting", table(header, body)]
    return found


# -- command line --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    given = parse_settings(options.settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        rows = [
            row(Case(problem, seed, tuple(options.rates), given, folder), method)
            for problem, seed, method in product(options.problems, options.seeds, options.methods)
        ]
    print(f"\n{markdown(rows)}")
    save(options.out, {"seeds": options.seeds, "rates": options.rates, "given": given}, rows)


def save(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the tables as ``.md``, and as JSON beside what was chosen for each problem, seed and method."""
    problems = list(dict.fromkeys(one["problem"] for one in rows))
    record = {
        "settings": settings,
        "summary": {problem: summary(rows, problem) for problem in problems},
        "details": {problem: details(rows, problem) for problem in problems},
        "rows": [{key: value for key, value in one.items() if key != "tries"} for one in rows],
    }
    written(out, record, markdown(rows))


def parser() -> argparse.ArgumentParser:
    from fronts import names_of

    found = parser_of(__doc__, METHODS, HERE / "results" / "multitask.json")
    found.add_argument("--problems", type=names_of(PROBLEMS), default=["digits"], help=f"of {','.join(PROBLEMS)}")
    found.add_argument("--rates", type=lambda text: [float(one) for one in text.split(",")], default=RATES)
    return found


if __name__ == "__main__":
    main()
