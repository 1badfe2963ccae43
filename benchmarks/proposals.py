"""How long a proposal takes: what workers would wait for, were nothing proposed ahead.

    OMP_NUM_THREADS=1 python benchmarks/proposals.py                   # every search and sampler, about ten minutes
    OMP_NUM_THREADS=1 python benchmarks/proposals.py --only tpe gp --coefficients 10 --trials 100

CPU milliseconds a trial on one thread: the median of several batches of ``--batch`` trials, asked
for when so many have been scored and another batch is in flight. Sampler ``gp`` is left out above its limit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ecotone.populations.errors import InputError
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.nsga import Nsga, NsgaSettings
from ecotone.search.optuna_search import OptunaSearch, OptunaSettings
from ecotone.search.protocol import Search

SEARCHES: dict[str, NsgaSettings | OptunaSettings] = {
    "native nsga2": NsgaSettings(),
    "native nsga3": NsgaSettings(algorithm="nsga3"),
    "tpe": OptunaSettings(sampler="tpe"),
    "tpe, not multivariate": OptunaSettings(sampler="tpe", multivariate=False),
    "gp": OptunaSettings(sampler="gp"),
    "nsga2": OptunaSettings(sampler="nsga2"),
    "nsga3": OptunaSettings(sampler="nsga3"),
    "cma_es": OptunaSettings(sampler="cma_es"),
    "random": OptunaSettings(sampler="random"),
    "qmc": OptunaSettings(sampler="qmc"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("--only", nargs="*", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--coefficients", nargs="*", type=int, default=[10, 96])
    parser.add_argument("--trials", nargs="*", type=int, default=[100, 1000])
    parser.add_argument("--objectives", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'search':24}{'D':>6}{'trials':>8}{'ms a proposal':>16}")
    with threadpool_limits(limits=1):
        for name in arguments.only:
            for coefficients in arguments.coefficients:
                for trials in arguments.trials:
                    row = measured(name, coefficients, trials, arguments)
                    text = "refused" if row is None else f"{1000 * row:.1f}"
                    print(f"{name:24}{coefficients:>6}{trials:>8}{text:>16}", flush=True)


def measured(name: str, coefficients: int, trials: int, arguments: argparse.Namespace) -> float | None:
    """CPU seconds a proposal; None when the search refuses so many coefficients."""
    try:
        search = prepared(name, CoefficientBox(np.array([0, 1]), coefficients), trials, arguments.objectives)
    except InputError:
        return None
    flying = search.ask(arguments.batch)
    seconds = []
    for _ in range(arguments.repeats):
        start = time.process_time()
        asked = search.ask(arguments.batch)
        seconds.append((time.process_time() - start) / len(asked))
        for trial in flying:
            tell(search, trial, arguments.objectives)
        flying = asked
    return statistics.median(seconds)


def prepared(name: str, box: CoefficientBox, trials: int, objectives: int) -> Search:
    """A search that has been told so many trials."""
    settings, goals = SEARCHES[name], [Goal(str(i)) for i in range(objectives)]
    if isinstance(settings, NsgaSettings):
        search: Search = Nsga(box, goals, 0, settings)
    else:
        search = OptunaSearch(box, goals, 0, settings)
    if name.startswith(("tpe", "gp")):  # they know only points and scores: spare the time to propose these
        points = np.random.default_rng(0).random((trials, box.size))
        records = [
            {"state": "COMPLETE", "point": point.tolist(), "values": scores(point, objectives).tolist(), "notes": {}}
            for point in points
        ]
        search.restore({"next": trials, "trials": records, "notes": {}})
        return search
    for _ in range(trials):
        tell(search, search.ask(1)[0], objectives)
    return search


def scores(point: np.ndarray, objectives: int) -> np.ndarray:
    """(M,) that disagree on where the optimum is: each on its own share of the coefficients."""
    wanted = 0.3 + 0.4 * (np.arange(len(point)) % objectives == np.arange(objectives)[:, None])
    return -((point - wanted) ** 2).mean(axis=1)


def tell(search: Search, trial: Trial, objectives: int) -> None:
    found = scores(trial.genome.coefficients.ravel(), objectives)
    search.tell(trial, Evaluation({str(i): float(s) for i, s in enumerate(found)}), Outcome(accepted=True))


if __name__ == "__main__":
    main()
