"""What a change costs a search: whole runs of two checkouts of Ecotone, in turn.

    python benchmarks/overhead.py --before ../ecotone-before            # a second checkout, as by `git worktree add`
    python benchmarks/overhead.py --before ../ecotone-before --pairs 3 --only digits

Two searches, each in one process (``runtime.pool: serial``), so that its processor time is all of the search's:

- digits: the recipe digits-specialists, 4000 evaluations of a network of 50,000 weights
- llama: a Llama of 25 million weights with three experts and a base, 200 questions of multiple choice, 12 evaluations

Each pair runs both checkouts on the same recipe, in an order that changes from pair to pair. Compared are the seconds
of the search (as `ecotone status` has them) and the processor seconds of the whole command, ``start`` included. Both
runs of a pair must have the same digest. ``ratio`` is after by before, the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import yaml
from candidate_cost import invented, parse, write_models, write_questions
from materialise import save

HERE = Path(__file__).parent
RUN = """
import json, resource, sys
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
status = launch(Recipe.from_yaml(sys.argv[1]), sys.argv[2]).status()
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"search": status["seconds"], "processor": used.ru_utime + used.ru_stime, "digest": status["digest"]}))
"""
MEASURES = ("search", "processor")


def digits(folder: Path) -> Path:
    """The recipe of the search over digits."""
    record = yaml.safe_load((HERE.parent / "experiments" / "recipes" / "digits-specialists.yaml").read_text())
    record |= {"runtime": {"pool": "serial"}, "budget": {"evaluations": 4000}, "tracking": {"mlflow": False}}
    return written(folder / "digits.yaml", record)


def llama(folder: Path) -> Path:
    """The recipe of the search over language models, with the models and questions that it needs."""
    settings, vocabulary = parse([]), invented(2000)
    write_models(folder, vocabulary, settings)
    write_questions(folder, 20, vocabulary, settings)
    objective = {"name": "right", "type": "multiple_choice", "data": str(folder / "questions.jsonl")}
    record = {
        "name": "llama",
        "models": {
            "base": str(folder / "0"),
            "experts": [str(folder / str(n)) for n in (1, 2, 3)],
            "architecture": "auto",
        },
        "merge": {"operator": "task_arithmetic"},
        "objectives": {"search": [objective]},
        "search": {"algorithm": "random"},
        "scoring": {"batch": 4, "in_flight": 4, "threads": 1, "device": "cpu"},
        "budget": {"evaluations": 12},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    return written(folder / "llama.yaml", record)


def written(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(record), "utf-8")
    return path


SEARCHES = {"digits": digits, "llama": llama}


def measured(checkout: Path, recipe: Path, out: Path) -> dict[str, Any]:
    """One run of a checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "ECOTONE_CACHE": str(out.parent / "cache"),
        "ECOTONE_KEY_FILE": str(out.parent / "key"),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", RUN, str(recipe), str(out)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compared(name: str, folder: Path, before: Path, pairs: int) -> dict[str, Any]:
    """The row of a search."""
    after = HERE.parent
    recipe, found = SEARCHES[name](folder), []
    for checkout in (before, after):  # caches filled, files read
        measured(checkout, recipe, folder / f"first-{checkout is before}")
    for number in range(pairs):
        sides = {"before": before, "after": after}
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        pair = {side: measured(sides[side], recipe, folder / f"{number}-{side}") for side in order}
        if pair["before"]["digest"] != pair["after"]["digest"]:
            raise RuntimeError(f"{name}: the digests differ: {pair}")
        found.append(pair)
        ratios = {measure: round(pair["after"][measure] / pair["before"][measure], 4) for measure in MEASURES}
        print(f"{name} pair {number}: {ratios}", flush=True)
    ratio = {m: statistics.median(pair["after"][m] / pair["before"][m] for pair in found) for m in MEASURES}
    print(f"{name}: " + ", ".join(f"{measure} {value:.4f}" for measure, value in ratio.items()), flush=True)
    return {"search": name, "ratio": ratio, "pairs": found}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("--before", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    options = parser.parse_args(words)
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
            rows.append(compared(name, Path(folder), options.before.resolve(), options.pairs))
    options.before, options.after = (revision(checkout) for checkout in (options.before, HERE.parent))
    save("overhead", options, rows)


def revision(checkout: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
