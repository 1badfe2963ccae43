"""Trackers behind one protocol: the conformance suite over ours, several at once, and what recipes say of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import wandb_logs
import wandb_server
import yaml
from processes import Ecotone
from safetensors.numpy import save_file

from ecotone.experiments import checks, tracking
from ecotone.experiments.cli import _failure
from ecotone.experiments.exports import verify
from ecotone.experiments.fields import explained_path, page
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.experiments.tracking.mlflow.server import free_port
from ecotone.experiments.tracking.notes import sole_mirror
from ecotone.experiments.tracking.protocol import TrackerSettings
from ecotone.experiments.tracking.settings import TrackingSettings
from ecotone.experiments.tracking.wandb import WandbSettings
from ecotone.extras import how_to_install
from ecotone.populations import facts
from ecotone.populations.errors import InputError
from ecotone.populations.journal import Journal
from ecotone.testing import trackers
from ecotone.testing.trackers import COUNT, Shown, TrackerSuite, a_run, best, finish, noted, tell

pytest.importorskip("mlflow")
pytest.importorskip("wandb")


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

    @contextlib.contextmanager
    def down(self) -> Iterator[Mapping[str, Any]]:
        yield {"uri": f"http://127.0.0.1:{free_port(0)}"}

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
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    @contextlib.contextmanager
    def down(self) -> Iterator[Mapping[str, Any]]:
        with self.monkeypatch.context() as patch:
            patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port(0)}")
            yield {"mode": "online"}

    def shown(self, directory: Path) -> Shown:
        return self.shown_in(directory)

    @staticmethod
    def shown_in(directory: Path) -> Shown:
        logs = wandb_logs.logs(directory)
        assert all(map(wandb_logs.whole, logs)), "broken logs are taken away"
        run_id = tracking.status(directory, "wandb")["run_id"]
        (log,) = wandb_logs.logs(directory, run_id)
        return wandb_logs.shown(log, len(logs))


class TestWandb(TrackerSuite):
    @pytest.fixture
    def case(self, monkeypatch: pytest.MonkeyPatch) -> Wandb:
        return Wandb(monkeypatch)


class WandbOnline(Wandb):
    """W&B on a server."""

    settings: ClassVar[Mapping[str, Any]] = {"mode": "online", "project": "merges"}

    def __init__(self, server: wandb_server.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.server = server
        monkeypatch.setenv("WANDB_BASE_URL", server.address)

    def shown(self, directory: Path) -> Shown:
        return self.server.shown(str(tracking.status(directory, "wandb")["run_id"]))


@pytest.mark.slow
class TestWandbOnline(TrackerSuite):
    @pytest.fixture
    def case(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbOnline]:
        with wandb_server.serving() as server:
            yield WandbOnline(server, monkeypatch)


# -- several at once -----------------------------------------------------------------------------------------

BOTH = {"mlflow": dict(Mlflow.settings), "wandb": dict(Wandb.settings)}


@pytest.fixture
def started() -> Iterator[Callable[[Path, str], subprocess.Popen[bytes]]]:
    """``tracking.start`` for this process's run, whose processes are gone after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(directory: Path, tracker: str) -> subprocess.Popen[bytes]:
        processes.append(tracking.start(directory, os.getpid(), tracker))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], object]) -> None:
    """Wait for an event; the time is only there so that a test that fails ends."""
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def whole(directory: Path, tracker: str) -> None:
    shown = {"mlflow": Mlflow().shown, "wandb": Wandb.shown_in}[tracker](directory)
    history = trackers.without_rates(shown.history)
    wanted = trackers.expected(COUNT, range(1, COUNT + 1))
    assert {key: history[key] for key in ("acc", "loss", "front/acc", "hypervolume", "evaluations")} == {
        key: wanted[key] for key in ("acc", "loss", "front/acc", "hypervolume", "evaluations")
    }
    assert shown.files == trackers.FILES


@pytest.mark.slow
def test_each_has_a_process_of_its_own(runs: Path, started: Callable[[Path, str], subprocess.Popen[bytes]]) -> None:
    """Both follow one search to its end; one of them is ended in the middle, and the next one goes on."""
    directory = runs / "one"
    with Journal.create(directory / "journal.sqlite", noted(COUNT, tracking=json.dumps(BOTH))) as journal:
        (directory / "recipe.yaml").write_text("seed: 3\n")
        tell(journal, 0, 20)
        processes = {name: started(directory, name) for name in BOTH}
        for name in BOTH:
            eventually(lambda name=name: tracking.status(directory, name)["mirrored"] == 20)
        processes["wandb"].terminate()
        assert processes["wandb"].wait() == 0
        assert tracking.status(directory, "mlflow")["mirroring"]
        assert not tracking.status(directory, "wandb")["mirroring"]
        processes["wandb"] = started(directory, "wandb")
        tell(journal, 20, COUNT)
        finish(journal, [best(COUNT)])
        assert [process.wait() for process in processes.values()] == [0, 0]
    for name in BOTH:
        assert tracking.status(directory, name)["complete"]
        whole(directory, name)


@pytest.mark.slow
def test_one_that_hangs_holds_up_nothing(runs: Path, started: Callable[[Path, str], subprocess.Popen[bytes]]) -> None:
    """A server that takes connections and never answers: the other tracker has all, and later this one too."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        directory = a_run(runs, COUNT, COUNT, tracking=json.dumps({**BOTH, "mlflow": {"uri": uri}}))
        hanging = started(directory, "mlflow")
        eventually(lambda: tracking.status(directory, "mlflow")["mirroring"])
        assert started(directory, "wandb").wait() == 0
        assert hanging.poll() is None
        assert not tracking.status(directory, "mlflow")["complete"]
        whole(directory, "wandb")
        hanging.kill()
        hanging.wait()
    assert tracking.mirror(directory, "mlflow", BOTH["mlflow"] | {"uri": tracking.default_uri(runs)}).complete
    whole(directory, "mlflow")


@pytest.mark.slow
def test_a_search_is_tracked_by_both(tmp_path: Path, empty_store: Path, ecotone: Ecotone) -> None:
    """From the recipe to `status` and `sync`: one server is down, and the search neither waits for it nor fails."""
    (tmp_path / "tracked_toys.py").write_text("def left(model):\n    return -float(abs(model['w']).sum())\n")
    for number in (1, 2):
        save_file({"w": np.full((2, 2), number, np.float32)}, tmp_path / f"{number}.safetensors")
    record = {
        "name": "toy",
        "models": {"experts": ["1.safetensors", "2.safetensors"]},
        "objectives": {"search": [{"name": "left", "type": "call", "call": "tracked_toys:left"}]},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 6},
        "runtime": {"pool": "serial"},
        "tracking": {"uri": f"http://127.0.0.1:{free_port(0)}", "wandb": {"mode": "offline"}},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(record))
    run = tmp_path / "runs" / "toy"
    said = ecotone("run", tmp_path / "toy.yaml", "--out", run)
    assert said.code == 0, said.err
    silent = "the tracking server at 127.0.0.1 does not answer"
    sync = f"When that is mended, `ecotone sync {run}` sends the rest."
    assert f"MLflow does not have everything yet: {silent}. {sync}" in said.err
    for process in psutil.Process().children():  # the mirror that still tries
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile, as may those of other tests
            if str(run) in process.cmdline():
                process.terminate()
                process.wait()
    known = ecotone("status", run, "--json").json["tracking"]
    assert (known["wandb"]["mirrored"], known["wandb"]["error"]) == (6, None)
    assert known["wandb"]["page"].startswith(f"wandb sync {run}/wandb/offline-run-")
    assert (known["mlflow"]["mirrored"], known["mlflow"]["error"]) == (0, silent)
    said = ecotone("sync", run)
    assert (said.code, "mlflow: http://127.0.0.1" in said.err) == (1, True)
    assert f"{silent}. Nothing is lost: try again when it is back." in said.err
    assert "wandb has 6 evaluations" in said.out
    assert ecotone("sync", run, "--tracker", "wandb", "--json").json["wandb"]["complete"]
    said = ecotone("sync", run, "--tracker", "wandbe")
    assert (said.code, said.err.splitlines()) == (
        1,
        ["error: tracker: expected one of mlflow, wandb, found 'wandbe'.", "Did you mean 'wandb'?"],
    )
    pages = ecotone("ui", run, "--json").json["pages"]
    assert pages == {"wandb": known["wandb"]["page"]}


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    monkeypatch.setattr(WandbSettings, "packages", ("no_such_package",))
    directory = a_run(runs, 5, 5, tracking=json.dumps(BOTH))
    with pytest.raises(tracking.TrackingError, match=r"Weights & Biases is not installed.*pip install.*\[wandb\]"):
        tracking.start(directory, os.getpid(), "wandb")
    reports = tracking.mirror_all(directory)
    assert reports["mlflow"].complete


# -- recipes -------------------------------------------------------------------------------------------------


PLAIN: dict[str, Any] = {
    "name": "toy",
    "models": {"experts": ["1.safetensors"]},
    "objectives": {"search": [{"name": "left", "type": "call", "call": "m:f"}]},
    "budget": {"evaluations": 6},
}


class ToySettings(TrackerSettings):
    """A tracker of another package.

    Attributes:
        path: Where to.
    """

    path: str = "here"

    title: ClassVar[str] = "Toy"
    packages: ClassVar[tuple[str, ...]] = ("json",)
    lacks: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def install(cls) -> str:
        return "pip install toy"

    def describe(self) -> str:
        return self.path

    def place(self, directory: Path) -> str:
        return self.path

    def open(self, subject: Any, directory: Path, memory: Any) -> Any:
        raise OSError("not today")


@pytest.fixture
def toy() -> Iterator[None]:
    tracking.TRACKERS.register("toy", ToySettings)
    yield
    tracking.TRACKERS.forget("toy")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["mlflow"]),
        ({"mlflow": False}, []),
        ({"wandb": True}, ["mlflow", "wandb"]),
        ({"mlflow": False, "wandb": {"project": "p"}}, ["wandb"]),
        ({"wandb": False}, ["mlflow"]),
        ({"toy": True}, ["mlflow", "toy"]),
        ({"toy": {"path": "there"}, "wandb": True}, ["mlflow", "wandb", "toy"]),
        ({"toy": False}, ["mlflow"]),
    ],
)
def test_what_recipes_name_is_on(toy: None, given: dict[str, Any], names: list[str]) -> None:
    settings = TrackingSettings.model_validate(given)
    assert list(settings.trackers) == names
    record = settings.model_dump(mode="json")
    assert TrackingSettings.model_validate(record) == settings
    assert list(settings.recorded()) == names


def test_a_tracker_of_another_package_is_mirrored_to_like_ours(toy: None, runs: Path) -> None:
    settings = TrackingSettings.model_validate({"toy": {"path": "there"}})
    directory = a_run(runs, 5, 5, tracking=json.dumps(settings.recorded()))
    reports = tracking.mirror_all(directory)
    assert (reports["toy"].uri, reports["toy"].error) == ("there", "not today")
    assert reports["mlflow"].complete
    assert list(tracking.statuses(directory)) == ["mlflow", "toy"]


def test_the_schema_has_every_tracker(toy: None) -> None:
    """Switched by ``true`` or set in full, those of other packages too, each with its texts."""
    shapes = Recipe.model_json_schema()["$defs"]
    for name, field in (("wandb", "project"), ("toy", "path")):
        accepted = shapes["TrackingSettings"]["properties"][name]["anyOf"]
        assert {"type": "boolean"} in accepted
        full = [shapes[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in accepted]
        (shape,) = (one for one in full if "properties" in one)
        assert shape["properties"][field]["description"]


def test_every_tracker_is_explained(toy: None) -> None:
    (whole,), (path,) = explained_path("tracking.toy"), explained_path("tracking.toy.path")
    assert whole.text == "A tracker of another package."
    assert (whole.type, whole.default) == ("true or false or a mapping of the fields below or none", "none")
    assert (path.text, path.default) == ("Where to.", '"here"')
    assert "| `tracking.toy` |" in page()
    assert "## tracking.toy" in page()
    assert "| `tracking.toy.path` |" in page()


def test_a_recipe_is_told_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WandbSettings, "packages", ("no_such_package",))
    record = {**PLAIN, "tracking": {"uri": "http://user:secret@host:1", "wandb": {"mode": "offline"}}}
    found = {one.subject: one.text for one in checks._trackers(Recipe.from_record(record))}
    assert found["tracking.mlflow"] == "experiment 'ecotone' of http://host:1"
    project, missing, *lacks = found["tracking.wandb"].split("; ")
    assert project == "project 'ecotone', offline"
    assert missing == f"not installed: `{how_to_install('wandb')}`"
    assert lacks[0] == "`ecotone ui` serves no pages for it"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"wandb": {"projct": "p"}}, "tracking.wandb.projct: unknown key. Did you mean 'project'?"),
        ({"wandb": {"mode": "sometimes"}}, "tracking.wandb.mode: "),
        ({"wandb": "yes"}, "tracking.wandb: "),
        ({"wandbe": True}, "tracking.wandbe: unknown key. Did you mean 'wandb'?"),
        ({"toy": {"path": 3}}, "tracking.toy.path: input should be a valid string, found 3."),
        ({"toy": {"pat": "p"}}, "tracking.toy.pat: unknown key. Did you mean 'path'?"),
        ({"toy": "yes"}, "tracking.toy: "),
        ({"uri": "ftp://x"}, "tracking.uri: expected a path, or a URI of http, https, file, sqlite, "),
        ({"uri": "localhost:5000"}, "found 'localhost:5000'."),
        ({"experiment": ""}, "tracking.experiment: expected a name of 1 to 500 characters, found ''."),
        ({"wandb": {"project": "a/b?c d"}}, "tracking.wandb.project: expected a name without any of /\\#?%:, found"),
        ({"wandb": {"project": "a" * 129}}, "tracking.wandb.project: expected a name of 1 to 128 characters, found"),
        ({"wandb": {"entity": "me/you"}}, "tracking.wandb.entity: expected a name without any of "),
        ({"zzz": True}, " If another package has this tracker, install that package."),
    ],
)
def test_wrong_trackers_are_refused_in_words(toy: None, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_record({**PLAIN, "tracking": given})
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(TrackingSettings.model_fields.keys() - {"mlflow", "wandb"}))
def test_a_tracker_that_is_named_like_a_field_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"tracker '{name}': `tracking` has a field of that name"):
        tracking.TRACKERS.register(name, ToySettings)


def test_a_recorded_tracker_that_is_gone_is_kept(toy: None) -> None:
    """Whether its package is gone or has other settings now; what is given anew is checked like any."""
    begun = Recipe.from_record({**PLAIN, "tracking": {"toy": {"path": "there"}}})
    record = begun.record()
    later = {**record, "tracking": {**record["tracking"], "toy": {"place": "there"}}}
    assert list(Recipe.read_back(record, "").tracking.warnings()) == []
    (line,) = Recipe.read_back(later, "").tracking.warnings()
    assert line.startswith("Warning: tracking.toy.place: unknown key. Known: path; ")
    tracking.TRACKERS.forget("toy")
    gone = Recipe.read_back(record, "")
    assert list(gone.tracking.warnings()) == [
        "Warning: tracking.toy: no installed package has this tracker; the run is not mirrored there."
    ]
    assert (gone.record(), gone.signature) == (record, begun.signature)
    assert gone.tracking.recorded({"toy": {"path": "/there"}})["toy"] == {"path": "/there"}
    assert Recipe.read_back(record, "", {"tracking.toy": False}).record()["tracking"]["toy"] is None
    for key in ("tracking.toy.path", "tracking.zzz"):
        with pytest.raises(InputError, match="unknown key"):
            Recipe.read_back(record, "", {key: "x"})


def test_a_run_goes_on_without_a_tracker_that_is_gone(
    toy: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gone_toys.py").write_text("def left(model):\n    return -float(abs(model['w']).sum())\n")
    for number in (1, 2):
        save_file({"w": np.full((2, 2), number, np.float32)}, tmp_path / f"{number}.safetensors")
    objective = {"name": "left", "type": "call", "call": "./gone_toys.py:left"}
    record = {
        **PLAIN,
        "models": {"experts": ["1.safetensors", "2.safetensors"]},
        "objectives": {"search": [objective]},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False, "toy": True},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**record, "search": {"algorithm": "random"}}))
    run = launch(Recipe.from_yaml(tmp_path / "toy.yaml"), tmp_path / "run")
    tracking.TRACKERS.forget("toy")
    said: list[str] = []
    assert resume(run, {"budget.evaluations": 8}, notify=said.append).status()["evaluations"] == 8
    assert said[0].startswith("Warning: tracking.toy: no installed package has this tracker")
    assert verify(run.export("best", tmp_path / "merged"))
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == said[:1] * 2
    with run.journal() as journal:
        assert journal.fact(facts.TRACKING) == {"toy": {"path": "here"}}


def test_a_tracker_that_does_not_say_all_of_itself_is_refused() -> None:
    class Half(TrackerSettings):
        """Half a tracker."""

        url: str

        title: ClassVar[str] = "Half"

    with pytest.raises(InputError, match="lacks packages, install, lacks, describe, place, open"):
        tracking.TRACKERS.register("half", Half)
    with pytest.raises(InputError, match="expected a subclass of TrackerSettings"):
        tracking.TRACKERS.register("half", dict)  # type: ignore[arg-type]


def test_a_tracker_that_was_off_goes_where_the_recipe_says(runs: Path, tmp_path: Path) -> None:
    settings = TrackingSettings.model_validate({"mlflow": False, "uri": tracking.default_uri(runs), "experiment": "x"})
    recipe = json.dumps({"tracking": settings.model_dump(mode="json")})
    directory = a_run(tmp_path / "elsewhere", 5, 5, tracking=json.dumps(settings.recorded()), recipe=recipe)
    (report,) = tracking.mirror_all(directory).values()
    assert (report.error, report.uri) == (None, tracking.default_uri(runs))
    assert tracking.status(directory)["experiment"] == "x"


NEVER: dict[str, Any] = {"uri": "ftp://x", "experiment": "", "wandb": {"project": "a/b"}}


def test_a_run_that_began_with_settings_that_never_work_is_read_back() -> None:
    record = {**Recipe.from_record(PLAIN).record(), "tracking": NEVER}
    assert Recipe.read_back(record, "").tracking.uri == "ftp://x"
    for key, value in (("tracking.uri", "ftp://y"), ("tracking.wandb.project", "b/c")):
        with pytest.raises(InputError, match=f"{key}: expected"):
            Recipe.read_back(record, "", {key: value})


def test_the_uri_of_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://x")
    with pytest.raises(InputError, match=r"\$MLFLOW_TRACKING_URI: expected a path, or a URI of .*, found 'ftp://x'\."):
        TrackingSettings().recorded()


@pytest.mark.parametrize(
    "uri", ["runs/mlruns", "/m", "postgresql+psycopg2://u@h/d", "databricks://p", "file:///m", "mssql+pyodbc://x"]
)
def test_uris_that_mlflow_takes_are_taken(uri: str) -> None:
    assert TrackingSettings(uri=uri).uri == uri.replace("u@", "")  # a user name is not recorded


@pytest.mark.parametrize(
    ("settings", "error", "remedy"),
    [
        ({"toy": {}}, "not today", "Nothing is lost: mend that, then try again."),
        ({"gone": {}}, "tracking.gone: no installed package has this tracker.", "Install the package that has it."),
        (
            {"wandb": NEVER["wandb"]},
            "tracking.wandb.project: expected a name without any",
            "Change it: `ecotone resume",
        ),
    ],
)
def test_the_remedy_fits_the_error(toy: None, runs: Path, settings: dict[str, Any], error: str, remedy: str) -> None:
    (report,) = tracking.mirror_all(a_run(runs, 3, 3, tracking=json.dumps(settings))).values()
    assert (report.error or "").startswith(error)
    assert report.remedy.startswith(remedy)


def test_a_run_that_another_process_mirrors_is_waited_for(toy: None, runs: Path) -> None:
    directory = a_run(runs, 3, 3, tracking=json.dumps({"toy": {}}))
    with sole_mirror(directory, "toy", 0):
        report = tracking.mirror(directory, "toy", patience=0)
    assert (report.error, report.remedy[:17]) == ("another process is mirroring this run", "Wait until it has")


def test_a_sentence_ends_once() -> None:
    report = tracking.MirrorReport("there", error="No API key. Run `wandb login`.", remedy="Then try again.")
    assert _failure("wandb", report) == "wandb: there: No API key. Run `wandb login`. Then try again."
    assert _failure("toy", tracking.MirrorReport("", error="not today")) == "toy: not today."


def test_notes_of_old_runs_are_read(runs: Path) -> None:
    """As they were when MLflow was the only tracker: its entries, and nothing else."""
    directory = a_run(runs, 5, 5)
    first = tracking.mirror(directory)
    notes = json.loads((directory / "tracking.json").read_text())
    (directory / "tracking.json").write_text(json.dumps(notes["mlflow"]))
    assert tracking.status(directory)["run_id"] == first.run_id
    assert tracking.mirror(directory).logged == 0
    assert list(tracking.statuses(directory)) == ["mlflow"]


# -- Weights & Biases ----------------------------------------------------------------------------------------


def test_the_mode_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, mode in (("offline", "offline"), ("dryrun", "offline"), ("online", "online"), ("", "online")):
        monkeypatch.setenv("WANDB_MODE", value)
        recorded = WandbSettings().recorded()
        assert recorded.mode == mode
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(InputError, match=r"WANDB_MODE: expected online or offline, found 'disabled'"):
        WandbSettings().recorded()
    assert WandbSettings(mode="offline").recorded().mode == "offline"


def test_a_log_that_is_for_sync_has_what_a_run_is_known_by(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, group, tag; steps that charts use; and nothing of this machine's but the run directory."""
    directory = a_run(runs, 20, 20, tracking=json.dumps({"wandb": dict(Wandb.settings)}))
    report = tracking.mirror(directory, "wandb")
    (log,) = wandb_logs.logs(directory)
    found = list(wandb_logs.records(log))
    (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == (report.run_id, "merges", "m2n2 seed 3, digits")
    assert (run.run_group, list(run.tags)) == ("digits", ["m2n2"])
    axes = {one.metric.name: one.metric.step_metric for one in found if one.WhichOneof("record_type") == "metric"}
    assert (axes["acc"], axes["front/acc"], axes["front_table"]) == ("evaluations", "front_member", "evaluations")
    config = wandb_logs.shown(log, 1).parameters
    assert config["ecotone"]["run_dir"] == str(directory)
    assert config["ecotone"]["objectives"] == "acc, loss"
    staged = [path for path in (directory / "wandb" / "data").rglob("*") if path.is_file()]
    assert staged, "files wait beside the log, not in the user's home"


def test_a_folder_that_recipes_name_has_the_logs(runs: Path, tmp_path: Path) -> None:
    settings = TrackingSettings.model_validate(
        {"mlflow": False, "wandb": {"mode": "offline", "dir": str(tmp_path / "kept")}}
    )
    directory = a_run(runs, 5, 5, tracking=json.dumps(settings.recorded()))
    (report,) = tracking.mirror_all(directory).values()
    assert (report.error, report.uri) == (None, str(tmp_path / "kept" / "wandb"))
    assert len(wandb_logs.logs(tmp_path / "kept")) == 1
    assert not (directory / "wandb").exists()
