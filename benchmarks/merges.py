"""What the benchmarks of merges share: results that are kept, searches that go on, a judge of any merge, tables."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from ecotone import Recipe, Run, launch, resume
from ecotone.experiments import compose, preparation
from ecotone.fitness.opening import open_sources
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.populations.files import written_whole
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Evaluation, Scores, Subset, Trial

HERE = Path(__file__).parent
RECIPES = HERE.parent / "experiments" / "recipes"
PARTS: dict[str, Subset] = {"search": "search", "test": "held_out"}
ByObjective: TypeAlias = dict[str, float]
Found: TypeAlias = dict[str, Any]  # what a method, or one try of it, found


# -- runs ----------------------------------------------------------------------------------------------------


def kept(file: Path, make: Callable[[], Found]) -> Found:
    """What ``make`` returns, from ``file`` where it is there; it is written whole or not at all."""
    if not file.exists():
        text = json.dumps(make())
        file.parent.mkdir(parents=True, exist_ok=True)
        written_whole(file, text)
    found: Found = json.loads(file.read_text())
    return found


def finished(recipe: Recipe, folder: Path) -> Run:
    """The search, begun or gone on with."""
    return resume(folder) if (folder / "journal.sqlite").exists() else launch(recipe, folder)


def recipe_key(recipe: Recipe) -> str:
    """Of all but where it runs."""
    record = {key: value for key, value in recipe.record().items() if key not in ("runtime", "tracking")}
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=6).hexdigest()


def cost_of(run: Run, recipe: Recipe) -> float:
    """Of all trials, in evaluations of the search examples."""
    passes = 4 if any(task.loss == "distillation" for task in recipe.calibration) else 3
    with run.journal() as journal:
        evaluations = [one for _, one in journal.evaluations() if one.ok]
    whole = next(one.items for one in evaluations if one.gradient is None)
    return sum(one.items * (1 if one.gradient is None else passes) for one in evaluations) / whole


@dataclass(frozen=True, eq=False)
class Judge:
    """Scores merges of one recipe's models by its objectives, one at a time."""

    spec: WorkerSpec
    known: dict[tuple[str, str], Evaluation] = field(default_factory=dict)

    @cached_property
    def size(self) -> int:
        """Parameters of a merge, from the headers of the models."""
        return open_sources(self.spec).layout.size

    @cached_property
    def worker(self) -> Worker:
        """Made when something is to be scored."""
        return Worker(self.spec)

    def evaluation(self, genome: Genome, part: str) -> Evaluation:
        """Scores by objective, and by example where objectives have them."""
        key = (genome.digest, part)
        if key not in self.known:
            [evaluation] = self.worker.measure([Trial(0, genome, wants=Scores(PARTS[part]))])
            if evaluation.failure is not None:
                raise RuntimeError(evaluation.failure)
            self.known[key] = evaluation
        return self.known[key]

    def scores(self, genome: Genome, part: str) -> ByObjective:
        """Scores by objective."""
        return dict(self.evaluation(genome, part).scores)


def judge_of(recipe: Recipe) -> Judge:
    """The judge of a recipe, kept for the next time."""
    return _judge(recipe.model_dump_json())


@lru_cache(maxsize=2)
def _judge(recipe_json: str) -> Judge:
    recipe = Recipe.model_validate_json(recipe_json)
    return Judge(replace(compose.worker_spec(recipe, preparation.prepare(recipe)), calibration=()))


# -- tables --------------------------------------------------------------------------------------------------


def mean(scores: Mapping[str, float]) -> float:
    return statistics.fmean(scores.values())


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN for one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def number(found: tuple[float, float], digits: int = 3) -> str:
    value, error = (re.sub(r"^(-?)0\.", r"\1.", f"{one:.{digits}f}") for one in found)
    return value if error == "nan" else f"{value} ± {error}"


def plain(value: Any) -> Any:
    """``value`` with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def written(out: Path, record: Mapping[str, Any], text: str) -> None:
    """Write a record as JSON, and tables beside it as ``.md``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    written_whole(out, json.dumps(plain(record), indent=1) + "\n")
    written_whole(out.with_suffix(".md"), text + "\n")


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


# -- command line --------------------------------------------------------------------------------------------


def parser_of(doc: str, methods: Mapping[str, Any], out: Path) -> argparse.ArgumentParser:
    """The options that all have."""
    from fronts import names_of
    from seeds import numbers

    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--methods", type=names_of(methods), default=list(methods), help=f"of {','.join(methods)}")
    found.add_argument("--seeds", type=numbers, default=numbers("0-2"), help="such as 0-23 or 0,3,8-11")
    found.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="of the recipe")
    found.add_argument("--cache", type=Path, help="folder that keeps runs, for the next time")
    found.add_argument("--out", type=Path, default=out)
    return found
