"""Trackers behind one protocol: the conformance suite over ours, several at once, and what recipes say of them."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb_logs

from ecotone.experiments import tracking
from ecotone.experiments.tracking.mlflow.store import opened
from ecotone.testing.trackers import Shown, TrackerSuite

pytest.importorskip("mlflow")
pytest.importorskip("wandb")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making one takes seconds, so tests copy it."""
    directory = tmp_path_factory.mktemp("store")
    opened(tracking.default_uri(directory))
    return directory / "mlflow.db"


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    """The directory of runs, with its embedded store."""
    directory = tmp_path / "runs"
    directory.mkdir()
    shutil.copyfile(empty_store, directory / "mlflow.db")
    return directory


# -- the conformance suite -----------------------------------------------------------------------------------


class Mlflow:
    """MLflow's embedded store."""

    tracker = "mlflow"
    settings: ClassVar[Mapping[str, Any]] = {"uri": None, "experiment": "merges"}

    def down(self) -> Mapping[str, Any]:
        return {"uri": f"http://127.0.0.1:{free_port()}"}

    def shown(self, directory: Path) -> Shown:
        from mlflow import MlflowClient

        known = tracking.status(directory)
        client = MlflowClient(tracking_uri=known["uri"])
        run = client.get_run(known["run_id"])
        history = {
            key: [(one.step, one.value) for one in client.get_metric_history(known["run_id"], key)]
            for key in run.data.metrics
        }
        files = {file.path for file in client.list_artifacts(known["run_id"])} - {"images"}
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        table = json.loads((folder / "front.json").read_text())
        same = client.search_runs([known["experiment_id"]])
        front = (table["columns"], table["data"])
        return Shown(history, run.data.metrics, run.data.params, front, frozenset(files), len(same))


class TestMlflow(TrackerSuite):
    @pytest.fixture
    def case(self, runs: Path) -> Mlflow:
        return Mlflow()


class Wandb:
    """W&B, written into the run directory."""

    tracker = "wandb"
    settings: ClassVar[Mapping[str, Any]] = {"mode": "offline", "project": "merges"}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def down(self) -> Mapping[str, Any]:
        return {"mode": "online"}

    def shown(self, directory: Path) -> Shown:
        logs = wandb_logs.logs(directory)
        assert all(map(wandb_logs.whole, logs)), "broken logs are taken away"
        run_id = tracking.status(directory, "wandb")["run_id"]
        (log,) = wandb_logs.logs(directory, run_id)
        return wandb_logs.shown(log, len(logs))


class TestWandb(TrackerSuite):
    @pytest.fixture
    def case(self, monkeypatch: pytest.MonkeyPatch) -> Wandb:
        return Wandb(monkeypatch)
