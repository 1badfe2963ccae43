"""Real faults: kill -9, Ctrl-C, a full disk, a dead worker. Then the same result, and nothing paid twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from processes import ROOT, Ecotone, killed, started, wait_until
from safetensors.numpy import save_file

from ecotone.experiments import compose
from ecotone.experiments.exports import verify
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.populations.errors import JournalError

EVALUATIONS = 240
TRIED = 2  # before a run begins: the first and the last expert
# The search's objective writes a line a call, so that what was paid can be counted.
TOYS = """
import os, time
import numpy as np

PROBES = np.random.default_rng(0).standard_normal((64, 27))


def right(model, log="", delay=0.0):
    vector = np.concatenate([tensor.numpy().ravel() for tensor in model.values()]).astype(np.float64)
    answers = PROBES @ vector > 0.3
    time.sleep(delay)
    if log:
        with open(log, "a") as file:
            file.write(vector.tobytes().hex()[:32] + "\\n")
    return float(answers.mean()), answers
"""
SEARCHES: dict[str, dict[str, Any]] = {
    "m2n2": {"algorithm": "m2n2", "archive": 6},
    "m2n2-dense": {"algorithm": "m2n2", "archive": 6, "mutation": 0.05},
    "cma_es": {"algorithm": "cma_es"},
}


def toy_recipe(folder: Path, kind: str = "m2n2", delay: float = 0.006, **others: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fault_toys.py").write_text(TOYS)
    for name in ("left", "right"):
        rng = np.random.default_rng(len(name))
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")

    def objective(**arguments: Any) -> dict[str, Any]:
        return {"name": "right", "type": "call", "call": "fault_toys:right", "arguments": arguments}

    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [objective(log=str(folder / "calls"), delay=delay)], "held_out": [objective()]},
        "search": SEARCHES[kind],
        "scoring": {"batch": 4, "in_flight": 8},
        "budget": {"evaluations": EVALUATIONS},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def calls(folder: Path) -> list[str]:
    """What the search's objective was called with."""
    log = folder / "calls"
    return log.read_text().splitlines() if log.exists() else []


def digest(run: Path) -> str:
    return str(Run(run).status()["digest"])


def recorded(run: Path) -> list[int]:
    with Run(run).journal() as journal:
        return [row.number for row in journal.rows()]


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys can be imported in this process, too."""
    (tmp_path / "fault_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The digest of a search that nothing happened to, in this process, without the delays."""
    known: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = digest(launch(Recipe.from_yaml(toy_recipe(folder, kind, 0.0)), folder / "run").directory)
        return known[kind]

    return of


# -- kill -9 -------------------------------------------------------------------------------------------------

QUICK = "m2n2-dense"


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == QUICK else pytest.mark.slow) for k in SEARCHES])
def test_killed_twice_and_resumed_it_is_the_same_search_at_the_same_price(
    kind: str, tmp_path: Path, undisturbed: Callable[[str], str]
) -> None:
    moments = random.Random(kind)
    first, second = moments.randint(3, 60), moments.randint(70, 140)
    recipe, run = toy_recipe(tmp_path, kind), tmp_path / "run"
    killed("run", recipe, "--out", run, when=lambda: len(calls(tmp_path)) >= first)
    assert Run(run).status()["state"] == "killed"
    paid = recorded(run)
    before = len(calls(tmp_path))
    assert paid == list(range(len(paid)))
    assert before - len(paid) <= 8  # only what was in flight is lost
    if kind == "m2n2-dense":
        export_everything_shown(run, tmp_path)

    killed("resume", run, when=lambda: len(calls(tmp_path)) >= second)
    again = recorded(run)
    assert again[: len(paid)] == paid
    between = len(calls(tmp_path))
    assert between - before - (len(again) - len(paid)) <= 8

    finished = resume(run).status()
    assert finished["state"] == "finished"
    assert finished["digest"] == undisturbed(kind)
    # The rest, and for the closing table the average of the models; M2N2 has scored the models themselves.
    references = 1 if kind == "m2n2" else 3
    assert len(calls(tmp_path)) - between == EVALUATIONS - len(again) + references


def export_everything_shown(run: Path, folder: Path) -> None:
    """All that a killed run lists can be exported without resuming it."""
    for member in Run(run).front():
        target = Run(run).export(member.id, folder / f"member-{member.id}")
        assert all(one.difference == 0 for one in verify(target))
    assert Run(run).export("best", folder / "best.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-scratch", "digits-specialists"])
def test_ready_recipes_survive_kills_at_any_moment(name: str, tmp_path: Path) -> None:
    """Killed after random times: while it starts, replays, searches, or judges."""
    recipe, run = ROOT / "experiments" / "recipes" / f"{name}.yaml", tmp_path / "run"
    journal = run / "journal.sqlite"
    settings = {"budget.evaluations": 3000, "runtime.pool": "serial", "tracking.mlflow": False}
    options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    moments, kills = random.Random(name), 0
    killed("run", recipe, "--out", run, *options, when=lambda: journal.exists() and bool(recorded_or_none(run)))
    while True:
        kills += 1
        before = recorded(run)
        with started("resume", run) as process:
            try:
                process.wait(timeout=moments.uniform(1.5, 5.0) + kills)  # even a slow machine gets there
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert recorded(run)[: len(before)] == before
    whole = launch(Recipe.from_yaml(recipe, settings), tmp_path / "whole")
    assert kills > 1
    assert Run(run).status()["state"] == "finished"
    assert digest(run) == whole.status()["digest"]
    assert [m.record() for m in Run(run).front()] == [m.record() for m in whole.front()]


def recorded_or_none(run: Path) -> list[int]:
    """As ``recorded``; nothing while the journal is being begun."""
    with contextlib.suppress(JournalError):
        return recorded(run)
    return []


def test_killed_while_the_front_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], str]
) -> None:
    """Everything is searched, nothing is judged: resuming only judges."""
    from ecotone.experiments import running

    def dying(*arguments: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    recipe = Recipe.from_yaml(toy_recipe(tmp_path, delay=0.0))
    with monkeypatch.context() as patched:
        patched.setattr(running, "_judge", dying)
        with pytest.raises(KeyboardInterrupt):
            launch(recipe, run)
    assert all(member.held_out is None for member in Run(run).front())
    assert len(calls(tmp_path)) == EVALUATIONS + TRIED
    resume(run)
    assert len(calls(tmp_path)) == EVALUATIONS + TRIED + 1  # and the average
    assert all(member.held_out is not None for member in Run(run).front())
    assert digest(run) == undisturbed("m2n2")
    resume(run)
    assert len(calls(tmp_path)) == EVALUATIONS + TRIED + 1


def test_two_drivers_of_one_run(tmp_path: Path) -> None:
    recipe, run = toy_recipe(tmp_path), tmp_path / "run"
    with started("run", recipe, "--out", run) as process:
        wait_until(lambda: len(calls(tmp_path)) >= 5, process)
        with pytest.raises(JournalError, match=f"being written by process {process.pid}"):
            resume(run)
        status = Run(run).status()
        assert status["state"] == "running"
        assert process.poll() is None


# -- Ctrl-C --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopping_is_clean_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, undisturbed: Callable[[str], str]
) -> None:
    recipe, run = toy_recipe(tmp_path), tmp_path / "run"
    with started("run", recipe, "--out", run) as process:
        wait_until(lambda: len(calls(tmp_path)) >= 20, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"ecotone resume {run}" in err
    assert "Traceback" not in out + err
    assert Run(run).status()["state"] == "interrupted"
    assert resume(run).status()["digest"] == undisturbed("m2n2")
    assert len(calls(tmp_path)) <= EVALUATIONS + TRIED + 1 + 8


# -- a full disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("left", [400_000, 150_000])
@pytest.mark.parametrize("kind", ["m2n2", "m2n2-dense"])
def test_a_disk_that_fills_up(
    kind: str,
    left: int,
    small_disk: Path,
    tmp_path: Path,
    ecotone: Ecotone,
    undisturbed: Callable[[str], str],
) -> None:
    recipe, run = toy_recipe(tmp_path, kind, delay=0.0), small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (2 * 1024 * 1024 - left))
    said = ecotone("run", recipe, "--out", run)
    assert said.code == 1
    assert "error: " in said.err
    assert "Traceback" not in said.err
    assert "journal.sqlite: the journal cannot be written" in said.err
    assert f"Free some space, then `ecotone resume {run}`" in said.err
    paid = len(recorded(run))
    assert 0 < paid < EVALUATIONS
    assert ecotone("resume", run).code == 1  # still full
    filler.unlink()
    assert ecotone("resume", run).code == 0
    assert digest(run) == undisturbed(kind)


def test_a_disk_that_is_full_from_the_start(small_disk: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while filler.write(b"x" * 4096):
            filler.flush()
    said = ecotone("run", toy_recipe(tmp_path, delay=0.0), "--out", small_disk / "run")
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "No space left" in said.err or "full" in said.err


@pytest.mark.parametrize("left", [500_000, 350_000])
def test_a_disk_that_fills_up_under_a_run_at_a_url(
    left: int,
    small_disk: Path,
    tmp_path: Path,
    ecotone: Ecotone,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], str],
) -> None:
    """Where it is written before it is copied; what was copied is whole, and the run goes on anywhere."""
    url = f"file://{tmp_path}/store/run"
    runtime = {"pool": "serial", "mirror_every": 0.05, "lease": 1.0}
    recipe = toy_recipe(tmp_path, "m2n2-dense", delay=0.002, runtime=runtime)
    monkeypatch.setenv("ECOTONE_CACHE", str(small_disk))
    (small_disk / "filler").write_bytes(b"x" * (2 * 1024 * 1024 - left))
    said = ecotone("run", recipe, "--out", url)
    assert said.code == 1
    assert "the journal cannot be written" in said.err
    assert "Traceback" not in said.err
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "elsewhere"))
    with Run(url).journal() as journal:
        known = journal.counts()[1]
    paid = len(calls(tmp_path))
    assert known <= paid < EVALUATIONS
    finished = resume(url)
    assert digest(finished.directory) == undisturbed("m2n2-dense")
    assert len(calls(tmp_path)) - paid == EVALUATIONS - known + 3


def test_a_directory_that_is_read_only(small_disk: Path, tmp_path: Path, ecotone: Ecotone) -> None:
    """A finished run is read there as it is; running and resuming there is refused."""
    recipe, run = toy_recipe(tmp_path, delay=0.0), small_disk / "run"
    assert ecotone("run", recipe, "--out", run).code == 0
    before, front = digest(run), ecotone("front", run, "--json").json
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert digest(run) == before
    assert ecotone("front", run, "--json").json == front
    assert ecotone("export", run, "--member", "best", "--to", tmp_path / "best").code == 0
    for command in (("resume", run), ("run", recipe, "--out", small_disk / "other")):
        said = ecotone(*command)
        assert said.code == 1
        assert "Read-only file system" in said.err
        assert "permissions" in said.err
        assert "Traceback" not in said.err


# -- the same everywhere -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_process_finds_the_same(tmp_path: Path, undisturbed: Callable[[str], str]) -> None:
    with started("run", toy_recipe(tmp_path, "m2n2-dense", 0.0), "--out", tmp_path / "run", "--json") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["digest"] == undisturbed("m2n2-dense")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ray_workers_find_the_same_even_if_one_is_killed(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], str]
) -> None:
    pytest.importorskip("ray")
    pools: list[Any] = []
    make = compose.make_pool

    def noted(*arguments: Any) -> Any:
        pools.append(make(*arguments))
        return pools[-1]

    monkeypatch.setattr(compose, "make_pool", noted)
    killed: list[int] = []

    def observe(progress: Any) -> None:
        if progress.evaluations >= 40 and not killed:
            killed.append(pools[0].pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    recipe = Recipe.from_yaml(toy_recipe(tmp_path), {"runtime": {"pool": "ray", "workers": workers}})
    before = signal.getsignal(signal.SIGTERM)
    status = launch(recipe, tmp_path / "run", observe=observe, folders=(str(tmp_path),)).status()
    assert signal.getsignal(signal.SIGTERM) == before
    assert killed
    assert (status["state"], status["failures"]) == ("finished", 0)
    assert status["digest"] == undisturbed("m2n2")


@pytest.mark.slow
def test_a_driver_with_ray_workers_drains(tmp_path: Path, undisturbed: Callable[[str], str]) -> None:
    pytest.importorskip("ray")
    recipe, run = toy_recipe(tmp_path, delay=0.02), tmp_path / "run"
    with started("run", recipe, "--out", run, "--workers", 2) as process:
        wait_until(lambda: len(calls(tmp_path)) >= 30, process, 180)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert Run(run).status()["state"] == "interrupted"
    with Run(run).journal() as journal:
        assert TRIED + journal.counts()[1] == len(calls(tmp_path))  # what was in flight was waited for
    assert resume(run, {"runtime.pool": "serial"}).status()["digest"] == undisturbed("m2n2")


@pytest.mark.slow
def test_a_driver_with_ray_workers_is_killed(tmp_path: Path, undisturbed: Callable[[str], str]) -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("ray")
    recipe, run = toy_recipe(tmp_path, delay=0.02), tmp_path / "run"

    def workers_of(process: subprocess.Popen[str]) -> list[Any]:
        family = psutil.Process(process.pid).children(recursive=True)
        return [one for one in family if "RemoteWorker" in one.name()]

    with started("run", recipe, "--out", run, "--workers", 2) as process:
        wait_until(lambda: len(calls(tmp_path)) >= 30 and len(workers_of(process)) == 2, process, 180)
        workers = workers_of(process)
        process.kill()
        process.wait()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive  # nobody goes on scoring; Ray's own agents notice a little later
    assert resume(run, {"runtime.pool": "serial"}).status()["digest"] == undisturbed("m2n2")
