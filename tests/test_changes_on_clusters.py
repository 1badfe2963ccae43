"""Models that change under workers on Ray, or are others on another node. Real clusters, real deaths."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from processes import started, wait_until
from safetensors.numpy import save_file

from ecotone.experiments import compose
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.runs import Run
from ecotone.merging.models.files import ModelChangedError
from ecotone.populations.errors import CheckpointError, InputError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOYS = """
import os, pathlib, signal, time

def near(model, mark, file, dies=True):
    # Cuts a file of weights short once the mark is there, and dies as reading it would have the process die.
    time.sleep(0.02)
    if pathlib.Path(mark).exists():
        pathlib.Path(mark).unlink()
        os.truncate(file, os.stat(file).st_size - 64)
        if dies: os.kill(os.getpid(), signal.SIGBUS)
    return 1 / (1 + float(((model["w"].numpy() - 0.5) ** 2).mean()))
"""


def recipe_of(folder, evaluations=80, **arguments):
    (folder / "toys.py").write_text(TOYS)
    for seed, name in enumerate(("left", "right")):
        weights = np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
        save_file({"w": weights}, folder / f"{name}.safetensors")
    arguments = {"mark": str(folder / "mark"), "file": str(folder / "left.safetensors"), **arguments}
    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [{"name": "near", "type": "call", "call": "./toys.py:near", "arguments": arguments}]},
        "search": {"algorithm": "cma_es"},
        "scoring": {"batch": 2, "in_flight": 8},
        "budget": {"evaluations": evaluations},
        "runtime": {"pool": "ray", "workers": 2},
        "tracking": {"mlflow": False},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


@pytest.mark.parametrize("dies", [True, False])
def test_a_file_that_is_cut_under_workers_ends_the_run_in_words(tmp_path, dies):
    pytest.importorskip("ray")
    recipe, file = Recipe.from_yaml(recipe_of(tmp_path, dies=dies)), tmp_path / "left.safetensors"
    shutil.copy(file, tmp_path / "kept")

    def observe(progress):
        if progress.evaluations == 40:
            (tmp_path / "mark").touch()

    with pytest.raises(ModelChangedError, match=r"left\.safetensors.* had \d+ bytes and has \d+"):
        launch(recipe, tmp_path / "run", observe=observe)
    status = Run(tmp_path / "run").status()
    assert (status["state"], status["failures"]) == ("failed", 0)
    assert 40 <= status["evaluations"] < 80
    shutil.copy(tmp_path / "kept", file)
    assert resume(tmp_path / "run", {"runtime.pool": "serial"}).status()["evaluations"] == 80


FAR = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams

settings = RayParams(
    gcs_address=sys.argv[1], redis_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=1, num_gpus=0,
    object_store_memory=100 * 1024**2, min_worker_port=0, max_worker_port=0, node_manager_port=0,
    include_log_monitor=False,
)
settings.dashboard_agent_listen_port = None
node = Node(settings, head=False, shutdown_at_exit=True, spawn_reaper=True)
print("ready", flush=True)
sys.stdin.read()
node.kill_all_processes(check_alive=False)
"""


def test_a_worker_with_other_code_takes_no_part(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    recipe, pools, make = Recipe.from_yaml(recipe_of(tmp_path, 1000)), [], compose.make_pool
    monkeypatch.setattr(compose, "make_pool", lambda *arguments: pools.append(make(*arguments)) or pools[-1])
    said, killed = [], []

    def observe(progress):
        if progress.evaluations >= 20 and len(pools[0].pids()) == 2 and not killed:
            with (tmp_path / "toys.py").open("a") as file:
                file.write("# changed\n")
            killed.append(pools[0].pids()[1])
            os.kill(killed[0], signal.SIGKILL)

    launch(recipe, tmp_path / "run", observe=observe, notify=said.append)
    status, log = Run(tmp_path / "run").status(), (tmp_path / "run" / "log.jsonl").read_text()
    assert (status["state"], status["evaluations"], status["failures"]) == ("finished", 1000, 0)
    assert killed
    assert "toys.py: it has other bytes on" in log
    assert any("toys.py has changed since the run began" in text for text in said)


def test_a_file_that_is_cut_under_this_process_is_told_and_refused_later(tmp_path):
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    with started("run", recipe, "--out", run, "--set", "runtime.pool=serial") as process:
        wait_until(lambda: (run / "log.jsonl").exists(), process)
        (tmp_path / "mark").touch()
        _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGBUS
    assert "a mapped file of a model was cut short" in said
    assert Run(run).status()["state"] == "killed"
    with pytest.raises(InputError, match=r"left\.safetensors has changed since the run began"):
        resume(run)  # the objective's argument is the same file
    with pytest.raises(CheckpointError, match=r"left\.safetensors: expected a complete safetensors file"):
        resume(run, accept_changes=True)


@contextlib.contextmanager
def far_node(address, other, file):
    """A node in a mount namespace of its own, whose processes see ``other`` at the path of ``file``."""
    node = f'mount --bind {other} {file} && exec {sys.executable} -c "$0" {address}'
    program = ["unshare", "-m", "bash", "-c", node, FAR]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        yield
        process.communicate(timeout=60)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting takes root")
def test_a_node_with_another_copy_takes_no_part(tmp_path):
    """A node in a mount namespace of its own has other bytes at the same path."""
    pytest.importorskip("ray")
    from ray_clusters import Machines

    recipe, run = recipe_of(tmp_path, 400), tmp_path / "run"
    shutil.copy(tmp_path / "right.safetensors", tmp_path / "other")
    with (
        Machines(nodes=1) as machines,
        far_node(machines.address, tmp_path / "other", tmp_path / "left.safetensors"),
        started("run", recipe, "--out", run, "--address", machines.address, "--workers", "2") as search,
    ):
        _, said = search.communicate(timeout=600)
        assert search.returncode == 0, said
    told = said + (run / "log.jsonl").read_text()
    assert re.search(r"models\.experts\[0\]: left\.safetensors on \S+ is not that of the first worker", told)
    status = Run(run).status()
    assert (status["state"], status["evaluations"], status["failures"]) == ("finished", 400, 0)
