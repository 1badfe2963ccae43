"""Clusters that lose workers, nodes, the search or the head, for real: the same result, nothing paid twice."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import ROOT, started, wait_until
from ray_clusters import NODE, Books, Machines, autoscaled, isolated
from test_faults import EVALUATIONS, TRIED, calls, digest, toy_recipe

from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
from ecotone.experiments.runs import Run

pytest.importorskip("ray")
BATCH = 4
REFERENCES = 1  # of the closing table: the average; M2N2 has scored the models


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the search that nothing happens to, in this process and without delays."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = Recipe.from_yaml(toy_recipe(folder, delay=0.0))
    return digest(launch(recipe, folder / "run", folders=(str(folder),)).directory)


def runtime(address: str, workers: int, **others: object) -> list[str]:
    """Options of the command line."""
    settings = {"pool": "ray", "address": address, "workers": workers, **others}
    return [f"--set=runtime.{name}={value}" for name, value in settings.items()]


def disturbed(folder: Path, options: list[str], act: Callable[[], object], undisturbed: str, delay: float) -> None:
    """Search; after 40 evaluations do something of which a worker dies; print when what was in flight then was there.

    The result is the same, nobody failed, and only the batch that the worker had was scored again.
    """
    recipe, run = toy_recipe(folder, delay=delay), folder / "run"
    with started("run", recipe, "--out", run, *options) as process:
        wait_until(lambda: len(calls(folder)) >= 40, process, 180)
        before, since = Books.of(run), time.monotonic()
        act()
        flying = Books.of(run)
        wait_until(lambda: flying.recovered(Books.of(run)), process, 180)
        print(f"what was in flight came after {time.monotonic() - since:.1f} s")
        _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    after, status = Books.of(run), Run(run).status()
    assert before.kept_by(after)
    assert (status["state"], status["failures"]) == ("finished", 0)
    assert status["digest"] == undisturbed
    assert 0 <= len(calls(folder)) - EVALUATIONS - TRIED - REFERENCES <= BATCH


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["node", "node replaced", "worker"])
def test_a_lost_worker_or_node_costs_time_only(lost: str, tmp_path: Path, undisturbed: str) -> None:
    with Machines(nodes=2) as machines:

        def act() -> None:
            if lost == "worker":
                machines.workers()[0].kill()
                return
            machines.lose(machines.nodes[0])
            if lost == "node replaced":
                machines.add()

        disturbed(tmp_path, runtime(machines.address, 2), act, undisturbed, delay=0.02)


@pytest.mark.slow
def test_a_node_told_to_go_hands_its_batch_on_and_ends(tmp_path: Path, undisturbed: str) -> None:
    """The pool leaves it at once, so it ends long before its hour is up."""
    with Machines(nodes=2) as machines:
        raylets = []

        def act() -> None:
            raylets.append(machines.drain(machines.nodes[0]))

        disturbed(tmp_path, runtime(machines.address, 2, attempts=1), act, undisturbed, delay=0.1)
        raylets[0].wait(timeout=180)


@pytest.mark.slow
def test_a_killed_search_resumes_on_the_same_cluster(tmp_path: Path, undisturbed: str) -> None:
    recipe, run = toy_recipe(tmp_path, delay=0.02), tmp_path / "run"
    with Machines(nodes=2) as machines:
        with started("run", recipe, "--out", run, *runtime(machines.address, 2)) as process:
            wait_until(lambda: len(calls(tmp_path)) >= 40, process, 180)
            workers, since = machines.workers(), time.monotonic()
            process.kill()
            process.wait()
        assert len(workers) == 2
        _, alive = psutil.wait_procs(workers, timeout=180)
        assert not alive  # nobody goes on scoring
        print(f"its workers ended after {time.monotonic() - since:.1f} s")
        resumed(tmp_path, [], undisturbed, "killed")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["head", "home"])
def test_a_search_that_loses_its_head_or_own_node_ends_and_resumes_on_another(
    lost: str, tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words without its head; without a node of its own Ray itself may end it first."""
    recipe, run = toy_recipe(tmp_path, delay=0.1), tmp_path / "run"
    with Machines(nodes=2) as machines:
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")  # instead of a minute
        with started("run", recipe, "--out", run, *runtime(machines.address, 2)) as process:
            wait_until(lambda: len(calls(tmp_path)) >= 40, process, 180)
            since = time.monotonic()
            getattr(machines, f"lose_{lost}")()
            _, err = process.communicate(timeout=180)
        print(f"it ended {time.monotonic() - since:.1f} s after its {lost}")
        assert process.returncode == 1
        assert "Traceback" not in err
        if lost == "head":
            assert "the cluster's head has not answered for" in err
            assert "Start a cluster, then resume the run there" in err
    with Machines(nodes=1) as machines:
        resumed(tmp_path, runtime(machines.address, 2), undisturbed, "failed", *(["killed"] * (lost == "home")))


def resumed(folder: Path, options: list[str], undisturbed: str, *states: str) -> None:
    """A run that ended early goes on to the same result, and scores only what it had not finished."""
    run = folder / "run"
    assert Run(run).status()["state"] in states
    before, called, since = Books.of(run), len(calls(folder)), time.monotonic()
    with started("resume", run, *options) as process:
        wait_until(lambda: len(calls(folder)) > called, process, 180)
        print(f"it went on {time.monotonic() - since:.1f} s after it was resumed")
        _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert before.kept_by(Books.of(run))
    assert digest(run) == undisturbed
    assert len(calls(folder)) - called == EVALUATIONS - len(before.measured) + REFERENCES


# Ray's own commands, which take addresses of a cluster that is reached from outside, in a network without an outside.
HEAD = """
import os, subprocess, sys, time
memory, option, *command = sys.argv[1:]
def ray(*options, **kind):
    program = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address=127.0.0.1"]
    memory_option = f"--object-store-memory={memory}"
    return subprocess.Popen([*program, *options, memory_option], stdout=subprocess.DEVNULL, **kind)
variables = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
fake = [f"--autoscaling-config={option}"] if option.endswith(".json") else []
head = ray("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", *fake, env=variables if fake else None)
assert head.wait() == 0
"""
AUTOSCALED = """
sys.exit(subprocess.run([sys.executable, "-m", "ecotone.experiments.cli", *command]).returncode)
"""
TOLD_TO_STOP = """
def node(port):
    return ray("--address=127.0.0.1:6379", "--num-cpus=1", "--block", f"--dashboard-agent-listen-port={port}")
def reach(count):
    while not os.path.exists(option) or len(open(option).readlines()) < count:
        assert search.poll() is None
        time.sleep(0.1)
first = node(52400)
search = subprocess.Popen([sys.executable, "-m", "ecotone.experiments.cli", *command])
reach(10)
second = node(52401)
reach(60)
began = time.monotonic()
first.terminate()
first.wait()
print(f"it ended after {time.monotonic() - began:.1f} s", file=sys.stderr)
assert time.monotonic() - began < 25  # it would give itself half a minute
sys.exit(search.wait())
"""


def in_isolation(script: str, option: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A cluster in a network of its own, and a command there."""
    if subprocess.run(isolated(["true"]), check=False, capture_output=True).returncode != 0:
        pytest.skip("processes cannot be isolated here")
    program = [sys.executable, "-c", HEAD + script, NODE["object_store_memory"], option, *command]
    words = isolated([str(word) for word in program])
    return subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_node_that_gets_sigterm_hands_its_batch_on_and_ends(tmp_path: Path, undisturbed: str) -> None:
    """As Kubernetes ends one: Ray then drains it by itself. Another joins late."""
    recipe, run, settings = toy_recipe(tmp_path, delay=0.1), tmp_path / "run", runtime("127.0.0.1:6379", 2, attempts=1)
    said = in_isolation(TOLD_TO_STOP, tmp_path / "calls", "run", recipe, "--out", run, "--log=json", *settings)
    assert said.returncode == 0, said.stderr
    print(said.stderr)
    assert digest(run) == undisturbed
    assert 0 <= len(calls(tmp_path)) - EVALUATIONS - TRIED - REFERENCES <= BATCH
    events = [json.loads(line)["event"] for line in said.stdout.splitlines()]
    assert "worker_retired" in events
    assert "worker_died" not in events


@pytest.mark.slow
def test_a_cluster_without_nodes_grows_to_two(tmp_path: Path, undisturbed: str) -> None:
    """By Ray's own autoscaler, which starts raylets where others start machines."""
    configuration, run = tmp_path / "autoscaler.json", tmp_path / "run"
    configuration.write_text(json.dumps(autoscaled(2)))
    recipe, settings = toy_recipe(tmp_path, delay=0.1), runtime("127.0.0.1:6379", 2)
    said = in_isolation(AUTOSCALED, configuration, "run", recipe, "--out", run, "--log=json", *settings)
    assert said.returncode == 0, said.stderr
    assert digest(run) == undisturbed
    events = [json.loads(line) for line in said.stdout.splitlines()]
    assert len({event["node"] for event in events if event["event"] == "worker_ready"}) == 2


@pytest.mark.slow
def test_a_soak_of_three_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    soak = importlib.import_module("soak")
    rows = soak.soaked(tmp_path, kills=3, seed=6)
    assert {kind for kind, _ in soak.by_kind(rows)} == {"search", "node", "worker"}
