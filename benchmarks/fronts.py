"""Fronts of merged specialists: how much hypervolume each search has after 30, 60, 120 and 240 evaluations.

    python benchmarks/fronts.py                                    # all problems, seeds 10-14
    python benchmarks/fronts.py --whole --problems three           # every image left guides the search
    python benchmarks/fronts.py --problems three,four --algorithms bayesian_map,nsga2 --seeds 0-9

``three`` and ``four``: specialists of groups of digits are trained from one random start (64-256-10 ReLU, pixels
/ 16, 900 random images, Adam 1e-3, batches of 32, 60 epochs); the accuracies on each group's images, ten ways, are the
objectives. Half of the images left guide the search, the other half tells what its front is worth elsewhere; with
``--whole`` all guide it. A seed decides images, training and search. ``text``: the encoders of
``experiments/recipes/text-map.yaml`` (MiniLM, three ways of classifying short texts) in bfloat16, scored on the first
200 search examples of each kind, and the first 200 held-out ones; a seed decides the search.

Everywhere ``theta0 + sum_k c_k tau_k`` is searched over ``c`` in [0, 1.5]^K, and every search is asked for batches of
five through the protocol, which are told at once. A figure is the hypervolume of the front found as a share of a
reference's: of the front of a grid, of 16 values a coefficient for three groups and 8 for texts, and of all
searches together for four groups. It counts from accuracy 0 for digits, whose random start knows nothing, and for
texts from the worst that base and experts score on each kind. The held-out share takes the same fronts, chosen by
the search's scores, and scores both on the other examples. Means over seeds, and their standard errors.

On two cores the digits take minutes, but for Optuna's GP: an hour or more. For four objectives it would also take
12 GB and most of its time for page faults, because it forms its acquisition function of 2,048 points at once; here
it does so for four at a time, to the same values. A candidate of ``text`` takes about a second, so that all its
searches take hours (``--cache`` keeps those that are finished, ``--jobs`` runs several at a time), and its encoders
are tuned first, once, in some minutes. Writes ``benchmarks/results/fronts.json`` and ``fronts.svg``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from problems import HIGH, LOW, PROBLEMS, SIDES, TITLES, Scorer, box, scorers, sources
from seeds import numbers

from ecotone.populations.files import written_whole
from ecotone.populations.fronts import hypervolume, non_dominated
from ecotone.populations.genome import Floats
from ecotone.populations.trial import Evaluation, Goal, Outcome
from ecotone.search.bayesian_map import BayesianMap, BayesianMapSettings
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.map import MapSearch
from ecotone.search.nsga import Nsga
from ecotone.search.optuna_search import OptunaSearch, OptunaSettings
from ecotone.search.protocol import Search
from ecotone.search.random_search import RandomSearch

RESULTS = Path(__file__).parent / "results"
BUDGETS = (30, 60, 120, 240)
BATCH = 5
BINS = BayesianMapSettings(acquisition="bins", patience=None)
Maker = Callable[[CoefficientBox, Sequence[Goal], int], Search]
ALGORITHMS: dict[str, Maker] = {
    "bayesian_map": lambda box, goals, seed: BayesianMap(box, goals, seed, BayesianMapSettings(patience=None)),
    "paper's bins": lambda box, goals, seed: BayesianMap(box, goals, seed, BINS),
    "map": lambda box, goals, seed: MapSearch(box, goals, seed, evaluations=BUDGETS[-1]),
    "optuna tpe": lambda box, goals, seed: OptunaSearch(box, goals, seed, seeds=models_first(box)),
    "optuna gp": lambda box, goals, seed: gaussian_process(box, goals, seed),
    "nsga2": lambda box, goals, seed: Nsga(box, goals, seed, seeds=models_first(box)),
    "random": lambda box, goals, seed: RandomSearch(box, seed),
}


def gaussian_process(box: CoefficientBox, goals: Sequence[Goal], seed: int) -> Search:
    """Optuna's GP, its acquisition function in small parts."""
    _in_parts()
    return OptunaSearch(box, goals, seed, OptunaSettings(sampler="gp"), models_first(box))


@lru_cache(maxsize=1)
def _in_parts() -> None:
    """Have Optuna form the improvement of hypervolume of a few points at a time, with and without points pending."""
    import torch
    from optuna._gp import acqf

    def parted(improvement: Callable[..., Any]) -> Callable[..., Any]:
        def one_by_one(*place: Any, Y_post: Any, **boxes: Any) -> Any:  # noqa: N803
            if Y_post.ndim < 3:  # of one point
                return improvement(*place, Y_post, **boxes)
            return torch.cat([improvement(*place, part, **boxes) for part in Y_post.split(4)])

        return one_by_one

    alone = parted(acqf.logehvi)
    pending = parted(acqf._PerSampleParetoBaseline.compute_per_sample_log_hvi)
    acqf.logehvi = alone
    acqf._PerSampleParetoBaseline.compute_per_sample_log_hvi = lambda self, posterior: pending(self, Y_post=posterior)


def models_first(box: CoefficientBox) -> Floats:
    """Each model alone, then their average: what recipes let a search that learns nothing from it begin with."""
    return np.vstack([np.eye(box.size), np.full(box.size, 1.0 / box.size)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=names_of(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--algorithms", type=names_of(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=numbers, default=numbers("10-14"), help="such as 10-14 or 0,3,8-11")
    parser.add_argument("--whole", action="store_true", help="all examples guide the search; nothing is held out")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--cache", type=Path, help="folder that keeps finished searches, for the next time")
    parser.add_argument("--out", type=Path, default=RESULTS / "fronts.json")
    options = parser.parse_args()
    whole, cache = options.whole, options.cache
    with ProcessPoolExecutor(options.jobs) as pool:
        grids = {
            (problem, seed): pool.submit(grid, problem, seed, whole, cache)
            for problem, seed in product(options.problems, options.seeds)
            if problem in SIDES
        }
        chosen = product(options.problems, options.seeds, options.algorithms)
        runs = list(pool.map(run, *zip(*((*one, whole, cache) for one in chosen), strict=True)))
        references = {key: found.result() for key, found in grids.items()}
    rows = shares(runs, references)
    report(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"whole": whole, "seeds": options.seeds, "batch": BATCH}
    record = {"settings": settings, "summary": summary(rows), "rows": rows}
    written_whole(options.out, json.dumps(record, indent=1) + "\n")
    picture(rows, options.out.with_suffix(".svg"))


# -- running -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Merges and what they scored.

    Args:
        problem: Its name.
        seed: Of the problem and the search.
        name: Of the search, or ``grid``.
        floor: (2, M) scores from which hypervolume counts: on the search's examples and on the held-out ones.
        points: (N, K) coefficients in the order of measurement.
        scores: (N, M) on the examples that guide the search.
        elsewhere: (N, M) on the held-out ones, for members of the front at one of the budgets; NaN for others.
        seconds: What asking and telling took.
    """

    problem: str
    seed: int
    name: str
    floor: Floats
    points: Floats
    scores: Floats
    elsewhere: Floats
    seconds: float

    def volumes(self, budget: int) -> tuple[float, float]:
        """Hypervolumes of the front after ``budget`` evaluations, on the search's and the held-out examples."""
        front = non_dominated(self.scores[:budget])
        parts = (self.scores[:budget][front], self.elsewhere[:budget][front])
        here, there = (
            float("nan") if np.isnan(floor).any() else hypervolume(scores, floor)
            for scores, floor in zip(parts, self.floor, strict=True)
        )
        return here, there


def run(problem: str, seed: int, name: str, whole: bool, cache: Path | None) -> Measured:
    """One search to the largest budget."""

    def searching(guide: Scorer) -> tuple[Floats, Floats, float]:
        goals = [Goal(f"task-{i}") for i in range(sources(problem))]
        return searched(ALGORITHMS[name](box(problem), goals, seed), guide, goals)

    return measured(problem, seed, name, whole, cache, searching)


def grid(problem: str, seed: int, whole: bool, cache: Path | None) -> Measured:
    """Every merge of the problem's grid; texts are the same for all seeds."""

    def all_points(guide: Scorer) -> tuple[Floats, Floats, float]:
        points = np.array(list(product(np.linspace(LOW, HIGH, SIDES[problem]), repeat=sources(problem))))
        return points, guide(points), 0.0

    return measured(problem, 0 if problem == "text" else seed, "grid", whole, cache, all_points)


def measured(
    problem: str,
    seed: int,
    name: str,
    whole: bool,
    cache: Path | None,
    measure: Callable[[Scorer], tuple[Floats, Floats, float]],
) -> Measured:
    """What ``measure`` finds, with the held-out scores of its fronts; from the cache where it is known."""
    kept = cache and cache / f"{problem}-{seed}-{'-'.join(name.split())}{'-whole' * whole}.npz"
    if kept and kept.exists():
        with np.load(kept) as stored:
            return Measured(problem, seed, name, **{key: stored[key] for key in stored.files})
    guide, held_out = scorers(problem, seed, whole)
    points, scores, seconds = measure(guide)
    budgets = {*BUDGETS, len(points)} if name != "grid" else {len(points)}
    rows = sorted({row for budget in budgets for row in np.flatnonzero(non_dominated(scores[:budget])).tolist()})
    elsewhere = np.full_like(scores, np.nan)
    floor = np.full((2, scores.shape[1]), np.nan)
    floor[0] = worst(problem, guide)
    if held_out is not None:
        elsewhere[rows] = held_out(points[rows])
        floor[1] = worst(problem, held_out)
    found = {"floor": floor, "points": points, "scores": scores, "elsewhere": elsewhere, "seconds": np.array(seconds)}
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        stored = io.BytesIO()
        np.savez(stored, **found)
        written_whole(kept, stored.getvalue())
    print(f"{problem} {seed} {name}: {seconds:.0f} s", flush=True)
    return Measured(problem, seed, name, **found)


def worst(problem: str, score: Scorer) -> Floats | float:
    """From where hypervolume counts: 0 for digits, for texts (M,) the worst of base and experts."""
    size = sources(problem)
    return score(np.vstack([np.zeros(size), np.eye(size)])).min(axis=0) if problem == "text" else 0.0


def searched(search: Search, guide: Scorer, goals: Sequence[Goal]) -> tuple[Floats, Floats, float]:
    """(N, K) points, (N, M) scores, and the seconds that asking and telling took."""
    points: list[Floats] = []
    scores: list[Floats] = []
    seconds = 0.0
    while len(points) < BUDGETS[-1]:
        began = time.perf_counter()
        trials = search.ask(min(BATCH, BUDGETS[-1] - len(points)))
        seconds += time.perf_counter() - began
        batch = np.array([trial.genome.coefficients.ravel() for trial in trials])
        results = guide(batch)
        began = time.perf_counter()
        for trial, row in zip(trials, results, strict=True):
            named = dict(zip((goal.name for goal in goals), map(float, row), strict=True))
            search.tell(trial, Evaluation(named), Outcome(True))
        seconds += time.perf_counter() - began
        points.extend(batch)
        scores.extend(results)
    return np.array(points), np.array(scores), seconds


# -- figures -------------------------------------------------------------------------------------------------


def shares(runs: list[Measured], grids: dict[tuple[str, int], Measured]) -> list[dict[str, Any]]:
    """One row a run: hypervolumes as shares of the reference front's, on the search's examples and the others."""
    rows = []
    for one in runs:
        best = grids.get((one.problem, one.seed)) or together([r for r in runs if _rivals(r, one)])
        found = [np.divide(one.volumes(budget), best.volumes(len(best.points))) for budget in BUDGETS]
        here, there = np.array(found).T.tolist()
        row = {"problem": one.problem, "seed": one.seed, "algorithm": one.name, "search": here}
        rows.append(row | {"held out": [] if np.isnan(there).any() else there, "seconds": float(one.seconds)})
    return rows


def _rivals(one: Measured, other: Measured) -> bool:
    return (one.problem, one.seed) == (other.problem, other.seed)


def together(runs: list[Measured]) -> Measured:
    """All that several searches of one problem measured."""
    points, scores, elsewhere = (
        np.concatenate([getattr(one, field) for one in runs]) for field in ("points", "scores", "elsewhere")
    )
    return Measured(runs[0].problem, runs[0].seed, "all", runs[0].floor, points, scores, elsewhere, 0.0)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By problem, algorithm and part: means over seeds and their standard errors at each budget."""
    found: dict[str, Any] = {}
    for row in rows:
        for part in ("search", "held out"):
            if row[part]:
                entry = found.setdefault(row["problem"], {}).setdefault(row["algorithm"], {})
                entry.setdefault(part, []).append(row[part])
    for algorithms in found.values():
        for entry in algorithms.values():
            for part, values in entry.items():
                table = np.array(values)
                error = table.std(axis=0, ddof=1) / np.sqrt(len(table)) if len(table) > 1 else 0 * table[0]
                entry[part] = {"mean": table.mean(axis=0).tolist(), "standard error": error.tolist()}
    return found


def report(rows: list[dict[str, Any]]) -> None:
    for problem, algorithms in summary(rows).items():
        for part in ("search", "held out"):
            entries = {name: entry[part] for name, entry in algorithms.items() if part in entry}
            if not entries:
                continue
            print(f"\n{TITLES[problem]}, {part}")
            print(f"{'evaluations':<16}" + "".join(f"{budget:>14}" for budget in BUDGETS))
            for name, entry in entries.items():
                pairs = zip(entry["mean"], entry["standard error"], strict=True)
                print(f"{name:<16}" + "".join(f"{mean:>8.3f} ±{error:.3f}" for mean, error in pairs))


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares over evaluations, a panel for each problem and part."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "fronts", "svg.fonttype": "none"})
    from matplotlib import pyplot

    found = summary(rows)
    panels = [(p, part) for p in found for part in ("search", "held out") if part in next(iter(found[p].values()))]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, sharey=True)
    for axis, (problem, part) in zip(axes[0], panels, strict=True):
        for name, entry in found[problem].items():
            axis.errorbar(BUDGETS, entry[part]["mean"], entry[part]["standard error"], marker="o", ms=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        axis.set_title(f"{TITLES[problem]}, {'search' if part == 'search' else 'held out'}", fontsize=10)
        axis.set_xlabel("evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the reference hypervolume")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), metadata={"Date": None})
    written_whole(path, drawn.getvalue())


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Parser of ``a,b`` with each of them known."""

    def parsed(text: str) -> list[str]:
        found = text.split(",")
        wrong = [name for name in found if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(wrong)}; known: {', '.join(known)}")
        return found

    return parsed


if __name__ == "__main__":
    main()
