"""`ecotone export --register`: what MLflow's registry gets, and that what cannot be registered is refused in words."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from processes import Ecotone
from safetensors.numpy import save_file

from ecotone.experiments import running, tracking
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.tracking import MirrorReport, notes
from ecotone.experiments.tracking.mlflow.model_registry import Registrar
from ecotone.experiments.tracking.mlflow.server import await_answer, free_port, serving
from ecotone.experiments.tracking.mlflow.server import stop as stop_server

mlflow = pytest.importorskip("mlflow")

MODULE = """
def flat(model):
    return sum(float(p.sum()) for p in model.values())

def left(model):
    return 1 / (1 + flat(model) ** 2)

def right(model):
    return 1 / (1 + (flat(model) - 3) ** 2)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run that is in the embedded store beside it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "registry_toys.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        save_file({"w": rng.standard_normal((4, 3)).astype(np.float32)}, folder / f"{name}.safetensors")
    calls = [{"name": name, "type": "call", "call": f"registry_toys:{name}"} for name in ("left", "right")]
    record = {
        "name": "toy",
        "models": {"experts": ["one.safetensors", "two.safetensors"]},
        "objectives": {"search": calls, "held_out": calls},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 12},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(record))
    running.launch(Recipe.from_yaml(folder / "toy.yaml"), folder / "run", folders=(str(folder),))
    assert tracking.mirror(folder / "run").complete
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change; its store is its own."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copyfile(finished / "mlflow.db", tmp_path / "mlflow.db")
    (tmp_path / "run" / "tracking.json").unlink()
    assert tracking.mirror(tmp_path / "run").error is None
    return tmp_path


def client(runs: Path) -> Any:
    return mlflow.MlflowClient(tracking_uri=tracking.default_uri(runs))


@pytest.mark.slow
def test_a_member_becomes_a_version_with_an_alias(ecotone: Ecotone, runs: Path) -> None:
    member = ecotone("front", runs / "run", "--json").json["members"][-1]
    for version in ("1", "2"):
        said = ecotone(
            *("export", runs / "run", "--member", member["id"], "--to", runs / f"merged-{version}"),
            *("--register", "toy-merge", "--alias", "champion", "--json"),
        )
        assert said.json["registered"] == {
            "name": "toy-merge",
            "version": version,
            "alias": "champion",
            "uri": "models:/toy-merge@champion",
            "uploaded": True,
        }
    there = client(runs)
    found = there.get_model_version_by_alias("toy-merge", "champion")
    assert (str(found.version), found.run_id) == ("2", tracking.status(runs / "run")["run_id"])
    assert (found.tags["ecotone.member"], found.tags["ecotone.path"]) == (str(member["id"]), str(runs / "merged-2"))
    scores = json.loads(found.tags["ecotone.scores"])
    assert float(scores["search/left"]) == pytest.approx(member["scores"]["left"], rel=1e-5)
    assert float(scores["held_out/right"]) == pytest.approx(member["held_out"]["right"], rel=1e-5)
    assert f"Member {member['id']} of the search toy (random)." in found.description
    fetched = Path(mlflow.artifacts.download_artifacts(there.get_model_version_download_uri("toy-merge", "2")))
    files = sorted(path.name for path in (runs / "merged-2").iterdir())
    assert sorted(path.name for path in fetched.iterdir()) == files
    assert "model.safetensors" in files
    for name in files:
        assert (fetched / name).read_bytes() == (runs / "merged-2" / name).read_bytes()


def test_a_single_file_is_registered_too(ecotone: Ecotone, runs: Path) -> None:
    file = runs / "merged.safetensors"
    said = ecotone("export", runs / "run", "--to", file, "--register", "toy merge", "--json")
    assert said.json["registered"]["uri"] == "models:/toy merge/1"
    source = Path(client(runs).get_model_version("toy merge", "1").source)
    assert (source / file.name).read_bytes() == file.read_bytes()


def test_large_weights_stay_where_they_are(runs: Path, finished: Path) -> None:
    from ecotone.experiments.runs import Run

    registrar = Registrar(runs / "run", "large", limit=100)
    path = Run(runs / "run").export("best", runs / "merged")
    made = registrar.register(path)
    assert not made.uploaded
    version = client(runs).get_model_version("large", made.version)
    assert (version.tags["ecotone.uploaded"], version.tags["ecotone.path"]) == ("false", str(path))
    assert int(version.tags["ecotone.bytes"]) == sum(file.stat().st_size for file in path.rglob("*"))
    assert sorted(file.name for file in Path(version.source).iterdir()) == ["README.md", "ecotone.json"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--register", "a/b"], ["without / and :", "'a/b'"]),
        (["--register", " "], ["--register: expected a name"]),
        (["--register", "a", "--alias", "v2"], ["--alias", "'v2'"]),
        (["--register", "a", "--alias", "Latest"], ["--alias", "'Latest'"]),
        (["--register", "a", "--alias", "a b"], ["--alias", "'a b'"]),
        (["--alias", "champion"], ["Give --register NAME too"]),
    ],
)
def test_names_that_mlflow_refuses_write_nothing(
    ecotone: Ecotone, finished: Path, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    error = ecotone("export", finished / "run", "--to", tmp_path / "merged", *options).err
    assert "Traceback" not in error
    assert all(part in error for part in parts)
    assert not (tmp_path / "merged").exists()


def test_a_run_that_mlflow_does_not_have(ecotone: Ecotone, runs: Path) -> None:
    run_id = tracking.status(runs / "run")["run_id"]
    client(runs).delete_run(run_id)
    error = ecotone("export", runs / "run", "--to", runs / "merged", "--register", "a").err
    assert f"{run_id} was deleted" in error
    (runs / "run" / "tracking.json").unlink()
    error = ecotone("export", runs / "run", "--to", runs / "merged", "--register", "a").err
    assert "MLflow does not have the run" in error
    assert "ecotone sync" in error
    assert not (runs / "merged").exists()


def test_a_server_that_is_down(ecotone: Ecotone, runs: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    known = tracking.status(runs / "run")
    notes.note(runs / "run", "mlflow", MirrorReport(uri, known["experiment_id"], known["run_id"]), {})
    error = ecotone("export", runs / "run", "--to", runs / "merged", "--register", "a").err
    assert "the tracking server at 127.0.0.1 does not answer" in error
    assert not (runs / "merged").exists()


@pytest.mark.slow
def test_a_tracking_server_gets_the_weights(runs: Path) -> None:
    from ecotone.experiments.runs import Run

    port = free_port(0)
    uri = f"http://127.0.0.1:{port}"
    process = serving(tracking.default_uri(runs), runs / "run", port)
    try:
        await_answer(process, port)
        report = tracking.mirror(runs / "run", changes={"uri": uri, "experiment": "served"})
        assert (report.error, report.complete) == (None, True)
        made = Registrar(runs / "run", "served", "champion").register(Run(runs / "run").export("best", runs / "merged"))
        assert (made.uploaded, made.uri) == (True, "models:/served@champion")
        there = mlflow.MlflowClient(tracking_uri=uri)
        place = there.get_model_version_download_uri("served", made.version)
        fetched = mlflow.artifacts.download_artifacts(place, tracking_uri=uri)
        assert (Path(fetched) / "model.safetensors").read_bytes() == (runs / "merged/model.safetensors").read_bytes()
    finally:
        stop_server(process)
