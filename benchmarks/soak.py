"""A hundred kills (-9) in one search on a Ray cluster: of workers, of nodes and of the search itself.

    python benchmarks/soak.py                     # or: make soak; about a quarter of an hour on two idle cores
    python benchmarks/soak.py --kills 10 --seed 1

The cluster is a head and two nodes on this machine (``tests/ray_clusters.py``); what is killed and after how many more
evaluations is drawn from the seed. A lost node is replaced, a killed search resumed. After each kill the journal must
be whole, without a gap or a repetition, and keep what it had. After the last the search is told to stop (SIGTERM) and
resumed for a few more evaluations; then its digest must be that of the same search undisturbed. The time lost is that
from a kill until all that was in flight then is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from materialise import save
from processes import started
from ray_clusters import Books, Machines
from test_faults import calls, digest, toy_recipe

from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch

KINDS = ("worker", "node", "search")
WORKERS = 2
APART = (8, 32)  # evaluations from one kill to the next
IN_FLIGHT = 8
REST = 40  # evaluations after the last kill
DELAY = 0.05  # seconds an evaluation
PATIENCE = 300.0  # seconds for anything to happen


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=Path(__file__).name)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        rows = soaked(Path(folder), options.kills, options.seed)
    report(rows)
    save("soak", options, rows)


class Soak:
    """A search on a cluster, in a process of its own, that is disturbed."""

    def __init__(self, folder: Path, machines: Machines, recipe: Path, seed: int) -> None:
        self.run = folder / "run"
        self._folder = folder
        self._machines = machines
        self._rng = random.Random(seed)
        self._stack = contextlib.ExitStack()
        self._options = [f"--set=runtime.{name}={value}" for name, value in runtime(machines).items()]
        self._go_on("run", recipe, "--out", self.run)

    def _go_on(self, *command: object) -> None:
        self._stack.close()
        self._process: subprocess.Popen[str] = self._stack.enter_context(started(*command, *self._options))

    def kill(self) -> dict[str, Any]:
        """Wait for some evaluations, kill something, have it replaced; returns what it was and the seconds lost."""
        kind, more = self._rng.choice(KINDS), self._rng.randint(*APART)
        called = len(calls(self._folder))
        self._until(lambda: len(calls(self._folder)) >= called + more)
        before, since = self.books(), time.monotonic()
        getattr(self, f"_kill_{kind}")()
        flying = self.books()
        self._until(lambda: flying.recovered(self.books()))
        seconds = time.monotonic() - since
        assert before.kept_by(flying)
        assert flying.kept_by(self.books())
        return {"kind": kind, "at": len(before.measured), "seconds": round(seconds, 2)}

    def _kill_worker(self) -> None:
        self._until(lambda: bool(self._machines.workers()))
        self._rng.choice(self._machines.workers()).kill()

    def _kill_node(self) -> None:
        self._machines.lose(self._rng.choice(self._machines.nodes))
        self._machines.add()

    def _kill_search(self) -> None:
        self._process.kill()
        self._process.wait()
        self.books()
        self._go_on("resume", self.run)

    def books(self) -> Books:
        """The journal, checked."""
        return Books.of(self.run)

    def finish(self) -> int:
        """Stop the search, and have it end a few evaluations later; returns how many that makes."""
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE)
        before = self.books()
        evaluations = before.asked + REST
        self._go_on("resume", self.run, f"--set=budget.evaluations={evaluations}")
        _, err = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0, err
        assert before.kept_by(self.books())
        return evaluations

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if self._process.poll() is not None:
                raise AssertionError(f"the search ended early: {self._process.communicate()[1]}")
            assert time.monotonic() < end, "it takes too long"
            time.sleep(0.05)

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def runtime(machines: Machines) -> dict[str, Any]:
    return {"pool": "ray", "address": machines.address, "workers": WORKERS, "attempts": 1000}


def soaked(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Disturb a search so many times and check all it must keep to; returns a row a kill."""
    calm, disturbed, rows = folder / "calm", folder / "disturbed", []
    recipe = toy_recipe(disturbed, delay=DELAY, budget={"evaluations": 1_000_000})
    with Machines(nodes=2) as machines, Soak(disturbed, machines, recipe, seed) as soak:
        for number in range(kills):
            rows.append(soak.kill())
            print(f"{number + 1:>4}  {rows[-1]['kind']:<8}{rows[-1]['seconds']:>8.1f} s", flush=True)
        evaluations = soak.finish()
    same = Recipe.from_yaml(toy_recipe(calm, delay=0.0, budget={"evaluations": evaluations}))
    expected = digest(launch(same, calm / "run", folders=(str(calm),)).directory)
    assert digest(soak.run) == expected
    again = len(calls(disturbed)) - len(calls(calm))
    print(f"{evaluations} evaluations; {again} calls of the objective were lost in flight, at most {IN_FLIGHT} a kill")
    assert 0 <= again <= IN_FLIGHT * (kills + 1)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """The time lost, by what was killed."""
    for kind, lost in by_kind(rows):
        median = statistics.median(lost)
        print(f"{kind:<8}{len(lost):>4} kills  {median:6.1f} s lost in the median, {max(lost):.1f} s at most")


def by_kind(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    for kind in KINDS:
        lost = [row["seconds"] for row in rows if row["kind"] == kind]
        if lost:
            yield kind, lost


if __name__ == "__main__":
    main()
