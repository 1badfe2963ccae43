"""Fronts of digit specialists: how much hypervolume each search has after 30, 60, 120 and 240 evaluations.

    python benchmarks/fronts.py                                    # three and four groups, seeds 10-14
    python benchmarks/fronts.py --whole --problems three           # every image left guides the search
    python benchmarks/fronts.py --algorithms bayesian_map,nsga2 --seeds 0-9

Specialists of groups of digits are trained from one random start (64-256-10 ReLU, pixels / 16, 900 random images,
Adam 1e-3, batches of 32, 60 epochs); ``theta0 + sum_k c_k tau_k`` is searched over ``c`` in [0, 1.5]^K, with the
accuracy on each group's images, ten ways, as the objectives. Half of the images left guide the search, the
other half tells what its front is worth elsewhere; with ``--whole`` all guide it. A seed decides images,
training and search. Every search is asked for batches of five through the protocol, which are told at once.

A figure is the hypervolume of the front found, from ``--reference``, as a share of a reference's: the front of a grid
of 16 values a coefficient for three groups, of all searches together for four. The held-out share takes the same
fronts, chosen by the search's scores, and scores both on the other images. Means over seeds, and their
standard errors. Optuna's GP takes a good part of an hour for the ten searches, everything else minutes. Writes
``benchmarks/results/fronts.json`` and ``fronts.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from seeds import numbers

from populations.fronts import hypervolume, non_dominated
from populations.genome import Floats
from populations.trial import Evaluation, Goal, Outcome
from search.bayesian_map import BayesianMap
from search.coefficients import CoefficientBox
from search.map import MapSearch
from search.nsga import Nsga
from search.optuna_search import OptunaSearch
from search.protocol import Search
from search.random_search import RandomSearch

RESULTS = Path(__file__).parent / "results"
BUDGETS = (30, 60, 120, 240)
BATCH = 5
LOW, HIGH, SIDE = 0.0, 1.5, 16
PROBLEMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "three": ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9)),
    "four": ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9)),
}
Maker = Callable[[CoefficientBox, Sequence[Goal], int], Search]
ALGORITHMS: dict[str, Maker] = {
    "bayesian_map": lambda box, goals, seed: BayesianMap(box, goals, seed, patience=None),
    "paper's bins": lambda box, goals, seed: BayesianMap(box, goals, seed, acquisition="bins", patience=None),
    "map": lambda box, goals, seed: MapSearch(box, goals, seed, evaluations=BUDGETS[-1]),
    "optuna tpe": lambda box, goals, seed: OptunaSearch(box, goals, seed, "tpe", seeds=models_first(box)),
    "optuna gp": lambda box, goals, seed: OptunaSearch(box, goals, seed, "gp", seeds=models_first(box)),
    "nsga2": lambda box, goals, seed: Nsga(box, goals, seed, seeds=models_first(box)),
    "random": lambda box, goals, seed: RandomSearch(box, seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=names_of(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--algorithms", type=names_of(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=numbers, default=numbers("10-14"), help="such as 10-14 or 0,3,8-11")
    parser.add_argument("--whole", action="store_true", help="all images left guide the search; nothing is held out")
    parser.add_argument("--reference", type=float, default=0.0, help="accuracy from which hypervolume counts")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--cache", type=Path, help="folder that keeps finished searches, for the next time")
    parser.add_argument("--out", type=Path, default=RESULTS / "fronts.json")
    options = parser.parse_args()
    jobs = [
        (problem, seed, name, options.whole, options.cache)
        for problem, seed, name in product(options.problems, options.seeds, options.algorithms)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(run, *zip(*jobs, strict=True)))
    rows = shares(runs, options.reference)
    report(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"whole": options.whole, "reference": options.reference, "seeds": options.seeds, "batch": BATCH}
    record = {"settings": settings, "summary": summary(rows), "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    picture(rows, options.out.with_suffix(".svg"))


# -- the problem ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scorer:
    """Accuracies of merges on some images.

    Args:
        hidden: (K+1, N, H) what the base and each task vector give to the hidden layer's inputs.
        output: (K+1, C, H) weights of the last layer of the base and the task vectors.
        bias: (K+1, C) its biases.
        labels: (N,) digits.
        groups: Digits of each objective.
    """

    hidden: Floats
    output: Floats
    bias: Floats
    labels: Floats
    groups: tuple[tuple[int, ...], ...]

    def __call__(self, points: Floats) -> Floats:
        """(n, M) accuracies at ``points`` (n, K)."""
        return np.array([self.one(point) for point in points])

    def one(self, point: Floats) -> Floats:
        """(M,) accuracies at ``point`` (K,)."""
        weights = np.concatenate([[1.0], point]).astype(np.float32)
        layer = np.maximum(weights @ self.hidden.reshape(len(weights), -1), 0).reshape(self.hidden.shape[1:])
        logits = layer @ np.tensordot(weights, self.output, 1).T + weights @ self.bias
        right = logits.argmax(axis=1) == self.labels
        return np.array([right[np.isin(self.labels, group)].mean() for group in self.groups])


@lru_cache(maxsize=2)
def scorers(problem: str, seed: int, whole: bool) -> tuple[Scorer, Scorer | None]:
    """What guides the search, and what is held out from it."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, order = (images / 16).astype(np.float32), np.random.default_rng(seed).permutation(len(labels))
    base, vectors = trained(images[order[:900]], labels[order[:900]], PROBLEMS[problem], seed)
    rest = order[900:]
    parts = [rest] if whole else [rest[::2], rest[1::2]]
    found = [scorer(base, vectors, images[part], labels[part], PROBLEMS[problem]) for part in parts]
    return found[0], None if whole else found[1]


def trained(images: Any, labels: Any, groups: Sequence[Sequence[int]], seed: int) -> tuple[Any, list[Any]]:
    """Parameters of the random start, and of each specialist less those."""
    import torch

    from experiments.digits import mlp

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    base = mlp()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    vectors = []
    for group in groups:
        base.load_state_dict(start)
        mine = np.isin(labels, group)
        inputs, targets = torch.from_numpy(images[mine]), torch.from_numpy(labels[mine])
        optimiser = torch.optim.Adam(base.parameters(), lr=1e-3)
        for _ in range(60):
            for rows in torch.randperm(len(targets)).split(32):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(base(inputs[rows]), targets[rows]).backward()
                optimiser.step()
        vectors.append({name: (tensor - start[name]).numpy() for name, tensor in base.state_dict().items()})
    return {name: tensor.numpy() for name, tensor in start.items()}, vectors


def scorer(base: Any, vectors: list[Any], images: Any, labels: Any, groups: tuple[tuple[int, ...], ...]) -> Scorer:
    layers = [base, *vectors]
    hidden = np.stack([images @ layer["0.weight"].T + layer["0.bias"] for layer in layers])
    output, bias = (np.stack([layer[name] for layer in layers]) for name in ("2.weight", "2.bias"))
    return Scorer(hidden, output, bias, labels, groups)


def models_first(box: CoefficientBox) -> Floats:
    """Each model alone, then their average: what recipes let a search that learns nothing from it begin with."""
    return np.vstack([np.eye(box.size), np.full(box.size, 1.0 / box.size)])


# -- running -------------------------------------------------------------------------------------------------


def run(problem: str, seed: int, name: str, whole: bool, cache: Path | None) -> dict[str, Any]:
    """One search to the largest budget: its scores in order, those of its fronts held out, and seconds asking."""
    guide, held_out = scorers(problem, seed, whole)
    kept = cache and cache / f"{problem}-{seed}-{'-'.join(name.split())}{'-whole' * whole}.npz"
    if kept and kept.exists():
        stored = np.load(kept)
        points, scores, seconds = stored["points"], stored["scores"], float(stored["seconds"])
    else:
        size = len(PROBLEMS[problem])
        box = CoefficientBox(np.array([0, 1]), size, LOW, HIGH)
        goals = [Goal(f"group-{i}") for i in range(size)]
        points, scores, seconds = searched(ALGORITHMS[name](box, goals, seed), guide, goals)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez(kept, points=points, scores=scores, seconds=seconds)
    fronts = {budget: points[:budget][non_dominated(scores[:budget])] for budget in BUDGETS}
    elsewhere = {} if held_out is None else {budget: held_out(front) for budget, front in fronts.items()}
    print(f"{problem} {seed} {name}: {seconds:.0f} s", flush=True)
    return {
        "problem": problem,
        "seed": seed,
        "algorithm": name,
        "whole": whole,
        "points": points,
        "scores": scores,
        "held out": elsewhere,
        "seconds": seconds,
    }


def searched(search: Search, guide: Scorer, goals: Sequence[Goal]) -> tuple[Floats, Floats, float]:
    """(N, K) points, (N, M) scores, and the seconds that asking and telling took."""
    points: list[Floats] = []
    scores: list[Floats] = []
    seconds = 0.0
    while len(points) < BUDGETS[-1]:
        began = time.perf_counter()
        trials = search.ask(min(BATCH, BUDGETS[-1] - len(points)))
        seconds += time.perf_counter() - began
        for trial in trials:
            points.append(trial.genome.coefficients.ravel())
            scores.append(guide.one(points[-1]))
            measured = dict(zip((goal.name for goal in goals), map(float, scores[-1]), strict=True))
            began = time.perf_counter()
            search.tell(trial, Evaluation(measured), Outcome(True))
            seconds += time.perf_counter() - began
    return np.array(points), np.array(scores), seconds


# -- figures -------------------------------------------------------------------------------------------------


def shares(runs: list[dict[str, Any]], reference: float) -> list[dict[str, Any]]:
    """One row a run: hypervolumes as shares of the reference front's, on the search's images and the others."""
    rows = []
    for one in runs:
        rivals = [other for other in runs if (other["problem"], other["seed"]) == (one["problem"], one["seed"])]
        best, best_elsewhere = reference_volumes(one["problem"], one["seed"], one["whole"], rivals, reference)
        rows.append(
            {
                "problem": one["problem"],
                "seed": one["seed"],
                "algorithm": one["algorithm"],
                "search": [volume(one["scores"][:budget], reference) / best for budget in BUDGETS],
                "held out": [volume(one["held out"][b], reference) / best_elsewhere for b in one["held out"]],
                "seconds": one["seconds"],
            }
        )
    return rows


REFERENCES: dict[tuple[str, int], tuple[Floats, Floats | None]] = {}


def reference_volumes(
    problem: str, seed: int, whole: bool, rivals: list[dict[str, Any]], reference: float
) -> tuple[float, float]:
    """Hypervolumes of the front of the grid (three groups) or of all searches together (four)."""
    if (problem, seed) not in REFERENCES:
        guide, held_out = scorers(problem, seed, whole)
        size = len(PROBLEMS[problem])
        if size <= 3:
            points = np.array(list(product(np.linspace(LOW, HIGH, SIDE), repeat=size)))
            scores = guide(points)
        else:
            points = np.concatenate([one["points"] for one in rivals])
            scores = np.concatenate([one["scores"] for one in rivals])
        front = non_dominated(scores)
        REFERENCES[problem, seed] = scores[front], None if held_out is None else held_out(points[front])
    scores, elsewhere = REFERENCES[problem, seed]
    return volume(scores, reference), float("nan") if elsewhere is None else volume(elsewhere, reference)


def volume(scores: Floats, reference: float) -> float:
    return hypervolume(scores, np.full(scores.shape[1], reference))


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
            print(f"\n{problem} groups, {part}")
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
        axis.set_title(f"{problem} groups, {'search' if part == 'search' else 'held-out'} images", fontsize=10)
        axis.set_xlabel("evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the reference hypervolume")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def names_of(known: dict[str, Any]) -> Callable[[str], list[str]]:
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
