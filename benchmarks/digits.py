"""Candidates a second on digits-scratch, from end to end, beside the bare forward pass in the same run.

    python benchmarks/digits.py [--evaluations 4000] [--quick]

It runs the recipe ``digits-scratch`` in strict order, without tracking, on SerialPool as it is and on RayPool with
two workers of one thread and batches of 16, and measures, on this machine and in this run:

- candidates a second of the whole search (breeding, journal, pool, scoring, niches), from first ask to last tell;
- candidates a second of scoring alone: the same stacks of the same size through the same objective, nothing else,
  with the same number of threads or processes;
- the share of the search's time that is not scoring, 1 - search rate / scoring rate.

It also times the way the public code works, one candidate asked for and scored at a time. Writes
``benchmarks/results/digits.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ecotone.populations.files import written_whole

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("RAY_AUTH_MODE", "token")

RECIPE = Path(__file__).parents[1] / "experiments" / "recipes" / "digits-scratch.yaml"


def search_rate(settings: dict[str, Any]) -> dict[str, float]:
    """Run the recipe; candidates a second and the best training accuracy."""
    from ecotone import Recipe, launch

    recipe = Recipe.from_yaml(RECIPE, {"tracking.mlflow": False, **settings})
    with tempfile.TemporaryDirectory() as folder:
        status = launch(recipe, Path(folder) / "run").status()
    return {"rate": status["evaluations_per_second"], "best": status["best"]["scores"]["accuracy"]}


def scoring_rate(batch: int, threads: int, seconds: float) -> float:
    """Candidates a second of stacking and scoring ``batch`` dense genomes over and over, in this process."""
    import numpy as np

    from ecotone import Recipe
    from ecotone.experiments import compose, preparation
    from ecotone.fitness.worker import Worker
    from ecotone.populations.genome import Genome
    from ecotone.populations.trial import Trial

    recipe = Recipe.from_yaml(RECIPE, {"scoring.threads": threads})
    worker = Worker(compose.worker_spec(recipe, preparation.prepare(recipe)))
    space = worker.space()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((batch, space.size), np.float32) * np.float32(0.05)
    trials = [Trial(i, Genome.dense(vector, space.dimension)) for i, vector in enumerate(vectors)]
    worker.measure(trials)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        worker.measure(trials)
        count += batch
    return count / (time.perf_counter() - began)


def scoring_rate_of_processes(batch: int, threads: int, processes: int, seconds: float) -> float:
    """The same in several processes at once; their rates added."""
    command = [sys.executable, __file__, "--score", str(batch), str(threads), str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=4000)
    parser.add_argument("--quick", action="store_true", help="500 evaluations, for a look")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits.json")
    parser.add_argument("--score", nargs=3, metavar=("BATCH", "THREADS", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        print(scoring_rate(int(options.score[0]), int(options.score[1]), float(options.score[2])))
        return
    evaluations = 500 if options.quick else options.evaluations
    seconds = 1.0 if options.quick else 4.0
    from ecotone import Recipe

    scoring = Recipe.from_yaml(RECIPE).scoring
    # Workers of one thread each; a parcel has to be worth its post, so their batches are larger.
    parcels = {"scoring.batch": 16, "scoring.in_flight": 64, "scoring.threads": 1}
    cases = {
        "SerialPool": ({"runtime.pool": "serial"}, scoring.window, scoring.threads, 1),
        "RayPool, 2 workers": ({"runtime.pool": "ray", "runtime.workers": 2, **parcels}, 16, 1, 2),
    }
    single = {"scoring.batch": 1, "scoring.in_flight": 1, "runtime.pool": "serial"}
    rows = [{"case": "one at a time", **search_rate({**single, "budget.evaluations": max(300, evaluations // 4)})}]
    for name, (settings, batch, threads, processes) in cases.items():
        before = scoring_rate_of_processes(batch, threads, processes, seconds)
        found = search_rate({**settings, "budget.evaluations": evaluations})
        after = scoring_rate_of_processes(batch, threads, processes, seconds)
        alone = (before + after) / 2  # the machine's speed drifts: measured on both sides of the search
        rows.append({"case": name, **found, "scoring alone": alone, "outside scoring": 1 - found["rate"] / alone})
    report(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "scoring": scoring.model_dump(), "rows": rows}
    written_whole(options.out, json.dumps(record, indent=1))


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'case':<20} {'cand./s':>8} {'scoring alone':>14} {'outside scoring':>16} {'best':>6}")
    for row in rows:
        alone, outside = row.get("scoring alone"), row.get("outside scoring")
        print(
            f"{row['case']:<20} {row['rate']:>8.0f} {'' if alone is None else f'{alone:.0f}':>14} "
            f"{'' if outside is None else f'{outside:.0%}':>16} {row['best']:>6.3f}"
        )


def machine() -> dict[str, Any]:
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
