"""How much a search's result depends on its seed: a recipe run with many seeds, and mean, median and spread of them.

    python benchmarks/seeds.py                                        # digits-scratch, seeds 0-23
    python benchmarks/seeds.py --set search.alpha=0 --seeds 0-7       # the same as a plain genetic algorithm
    python benchmarks/seeds.py --recipe my.yaml --seeds 0-4,10

Evolution from random models is a lottery: most runs join all niches early, some late, and a mean over three or
four seeds says little. Prints the best member's mean scores a seed, on the data that guided the search and on the
held-out data, and writes them to ``benchmarks/results/seeds-NAME[-SETTINGS].json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ecotone.populations.files import written_whole

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("RAY_AUTH_MODE", "token")

HERE = Path(__file__).parent
RECIPE = HERE.parent / "experiments" / "recipes" / "digits-scratch.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seeds", type=numbers, default=numbers("0-23"), help="such as 0-23 or 0,3,8-11")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'seed':>6} {'search':>8} {'held out':>9} {'cand./s':>8}")
    for seed in options.seeds:
        rows.append(run(options.recipe, options.settings, seed))
        print("{seed:>6} {search:>8.3f} {held_out:>9.3f} {rate:>8.0f}".format(**rows[-1]), flush=True)
    summary = {part: spread([row[part] for row in rows]) for part in ("search", "held_out")}
    for part, values in summary.items():
        print(f"{part:>9}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    name = "-".join(["seeds", options.recipe.stem, *(text.replace("=", "-") for text in options.settings)])
    out = options.out or HERE / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"recipe": options.recipe.name, "settings": options.settings, "summary": summary, "runs": rows}
    written_whole(out, json.dumps(record, indent=1) + "\n")


def run(recipe_file: Path, settings: list[str], seed: int) -> dict[str, Any]:
    """One run without tracking: the best member's mean scores."""
    from ecotone import Recipe, launch
    from ecotone.experiments.recipe import parse_settings

    chosen = parse_settings([*settings, f"seed={seed}", "tracking.mlflow=false"])
    with tempfile.TemporaryDirectory() as folder:
        finished = launch(Recipe.from_yaml(recipe_file, chosen), Path(folder) / "run")
        best, status = finished.best(), finished.status()
    assert best is not None
    assert best.scores is not None
    held_out = statistics.fmean(best.held_out.values()) if best.held_out else float("nan")
    rate = status["evaluations_per_second"]
    return {"seed": seed, "search": statistics.fmean(best.scores.values()), "held_out": held_out, "rate": rate}


def spread(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {
        "mean": statistics.fmean(values),
        "standard error": error,
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
    }


def numbers(text: str) -> list[int]:
    """``0-3,8`` as [0, 1, 2, 3, 8]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


if __name__ == "__main__":
    main()
