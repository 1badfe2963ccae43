"""Runs as jobs of a Ray cluster: what is sent and said, by a job server that only remembers; and the README's section
on clusters, word by word, on a real head of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from zipfile import ZipFile

import numpy as np
import psutil
import pytest
import yaml
from processes import ROOT, Ecotone, same_arithmetic
from safetensors.numpy import save_file

from ecotone.experiments import jobs, storage
from ecotone.experiments.jobs import JobServer
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
from ecotone.experiments.runs import Run
from ecotone.extras import how_to_install
from ecotone.populations import facts
from ecotone.populations.errors import EcotoneError, InputError, JournalError, PoolError
from ecotone.populations.sealed import unseal

ADDRESS = "http://127.0.0.1:8265"
RECIPE = ROOT / "experiments" / "recipes" / "digits-specialists.yaml"


@dataclass
class Remembering:
    """A job server's client that keeps what it is given; ``fails`` is raised by every call."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    fails: Exception | None = None
    lines: str = ""
    starting: int = 0

    def submit_job(self, **job: Any) -> str:
        self._try()
        if self.starting:
            self.starting -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job.")
        self.sent.append(job)
        self.states[job["submission_id"]] = "RUNNING"
        return str(job["submission_id"])

    def list_jobs(self) -> list[Any]:
        self._try()
        driver = SimpleNamespace(submission_id=None, metadata=None)
        foreign = self._details({"submission_id": "raysubmit_1", "metadata": {"job_name": "theirs"}}, 0)
        return [driver, foreign, *(self._details(job, at + 1) for at, job in reversed(list(enumerate(self.sent))))]

    def get_job_info(self, id: str) -> Any:
        return next(job for job in self.list_jobs() if job.submission_id == id)

    def stop_job(self, id: str) -> bool:
        self.states[id] = "STOPPED"
        return True

    def get_job_logs(self, id: str) -> str:
        return self.lines

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        for start in range(0, len(self.lines), 7):
            await asyncio.sleep(0)
            yield self.lines[start : start + 7]
        self.states[id] = "SUCCEEDED"

    def _details(self, job: dict[str, Any], at: int) -> Any:
        state = self.states.get(job["submission_id"], "RUNNING")
        return SimpleNamespace(**job, status=state, start_time=at * 1000, end_time=None, message="")

    def _try(self) -> None:
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Remembering:
    there = Remembering()
    monkeypatch.setattr(jobs, "_client", lambda address: there)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    return there


def recipe_in(folder: Path, **others: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy.yaml"
    path.write_text(RECIPE.read_text().replace("digits-specialists", "toy"))
    return path


# -- what is sent ---------------------------------------------------------------------------------------------


def test_a_recipe_of_the_checkout_travels_with_the_checkout(client: Remembering, ecotone: Ecotone) -> None:
    said = ecotone("submit", RECIPE, "--name", "first", "--set", "seed=3", "--set", "runtime.grace=50")
    assert said.code == 0, said.err
    (job,) = client.sent
    assert job["submission_id"] == "first"
    assert job["entrypoint"] == (
        "exec python -m ecotone.experiments.cli run experiments/recipes/digits-specialists.yaml "
        '--out "$HOME"/ecotone-runs/first --log json --set=runtime.pool=ray --set=runtime.address=auto '
        "--set=seed=3 --set=runtime.grace=50"
    )
    assert job["entrypoint_num_cpus"] == 0
    environment = job["runtime_env"]
    assert environment["working_dir"] == str(ROOT)
    assert {".git", ".venv*", "/runs"} <= set(environment["excludes"])
    assert "py_modules" not in environment
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "170", "ECOTONE_JOB": "first"}
    assert "ecotone stop first" in said.out
    assert "ecotone resume first --address http://127.0.0.1:8265" in said.out
    assert "ssh -N -L 8265:127.0.0.1:8265 HEAD" in said.out


def test_a_recipe_elsewhere_travels_with_its_folder_and_this_ecotone(
    client: Remembering, ecotone: Ecotone, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path / "mine")
    said = ecotone("submit", recipe, "--out", "s3://bucket/a run", "--json")
    assert said.code == 0, said.err
    (job,) = client.sent
    assert re.fullmatch(r"toy-\d{8}-\d{6}", job["submission_id"])
    assert " run toy.yaml --out 's3://bucket/a run' " in job["entrypoint"]
    assert job["runtime_env"]["working_dir"] == str(tmp_path / "mine")
    (module,) = map(Path, job["runtime_env"]["py_modules"])
    assert module.name == "ecotone"
    assert all((module / name / "__init__.py").exists() for name in jobs.PACKAGES[1:])
    assert said.json["out"] == "s3://bucket/a run"
    assert said.json["state"] == "pending"


def test_a_folder_and_variables_may_be_named(
    client: Remembering, ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the cluster's")
    recipe = recipe_in(tmp_path / "mine" / "deep")
    options = ("--set", "tracking.uri=http://me:hidden@host", "--out", "s3://me:hidden@bucket/run")
    said = ecotone("submit", recipe, "--folder", tmp_path / "mine", "--env", "HF_TOKEN", "--env", "HF_HOME", *options)
    assert said.code == 0, said.err
    (job,) = client.sent
    assert " run deep/toy.yaml " in job["entrypoint"]
    assert " --out s3://bucket/run " in job["entrypoint"]
    assert "tracking.uri=" in job["entrypoint"]
    assert "hidden" not in f"{said}{client.sent}"
    given = job["runtime_env"]["env_vars"]
    assert given["HF_HOME"] == "/models"
    for name in ("HF_TOKEN", "ECOTONE_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ECOTONE_SEALED", given["ECOTONE_SEALED"])
    unseal()
    assert os.environ["HF_TOKEN"] == "hidden"
    known = {"http://host": "http://me:hidden@host", "s3://bucket/run": "s3://me:hidden@bucket/run"}
    assert json.loads(os.environ["ECOTONE_CREDENTIALS"]) == known
    monkeypatch.delenv("ECOTONE_CREDENTIALS")
    assert "ECOTONE_SEALED" not in os.environ
    changed = f"A{given['ECOTONE_SEALED'][1:]}" if given["ECOTONE_SEALED"][0] != "A" else "B"
    for text, token in ((given["ECOTONE_SEALED"], "another"), (changed, "the cluster's"), ("?", "the cluster's")):
        monkeypatch.setenv("ECOTONE_SEALED", text)
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        unseal()
        said = ecotone("jobs")
        assert said.code == 1
        assert "sealed with another token" in said.err
    monkeypatch.delenv("ECOTONE_SEALED")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # then nothing can be sealed, and anybody may run anything there
    command = ("submit", recipe, "--folder", tmp_path / "mine", "--name", "second", "--env", "HF_TOKEN")
    assert ecotone(*command).code == 0
    assert client.sent[-1]["runtime_env"]["env_vars"]["HF_TOKEN"] == "hidden"


def test_a_resumed_run_keeps_its_name_directory_and_folder(
    client: Remembering, ecotone: Ecotone, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path / "mine")
    assert ecotone("submit", recipe, "--name", "first", "--out", "/shared/first", "--set", "runtime.grace=90").code == 0
    for named in ("first", "/shared/first"):
        refused = ecotone("resume", named, "--address", ADDRESS)
        assert refused.code == 1
        assert "it is running, as job first" in refused.err
    assert ecotone("stop", "first").code == 0
    for number in (2, 3):
        said = ecotone("resume", "first", "--address", ADDRESS, "--set", "budget.evaluations=9", "--workers", 3)
        assert said.code == 0, said.err
        job = client.sent[-1]
        assert job["submission_id"] == f"first-{number}"
        assert " resume /shared/first --log json " in job["entrypoint"]
        assert job["entrypoint"].endswith("--set=budget.evaluations=9 --set=runtime.workers=3")
        assert job["runtime_env"]["working_dir"] == str(tmp_path / "mine")
        assert job["metadata"]["ecotone"] == "first"
        assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "210"
        client.states[f"first-{number}"] = "FAILED"
    table = ecotone("jobs").out
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["first", "first", "stopped"],
        ["first", "first-2", "failed"],
        ["first", "first-3", "failed"],
    ]
    assert [job["job"] for job in ecotone("jobs", "--json").json] == ["first", "first-2", "first-3"]


def test_a_new_head_resumes_from_a_directory(client: Remembering, ecotone: Ecotone) -> None:
    said = ecotone("resume", "s3://bucket/runs/first/", "--address", ADDRESS)
    assert said.code == 0, said.err
    (job,) = client.sent
    assert job["submission_id"] == "first"
    assert job["runtime_env"]["working_dir"] == str(ROOT)  # holds this process's working directory


def test_logs_in_words_as_they_are_and_followed(client: Remembering, ecotone: Ecotone) -> None:
    line = '{"time": "2026-01-02T03:04:05.678+00:00", "level": "info", "event": "run_started", "message": "Begun."}'
    client.lines = f"Running entrypoint\n{line}\nlast"
    assert ecotone("submit", RECIPE, "--name", "first").code == 0
    words = "Running entrypoint\n2026-01-02 03:04:05 info: Begun.\nlast\n"
    assert ecotone("logs", "first").out == words
    assert ecotone("logs", "first", "--json").out == client.lines + "\n"
    followed = ecotone("logs", "first", "--follow")
    assert followed.out == words
    assert "first: succeeded." in followed.err


TOYS = """
import time
import numpy as np

PROBES = np.random.default_rng(0).standard_normal((64, 27))


def right(model, delay=0.0):
    vector = np.concatenate([tensor.numpy().ravel() for tensor in model.values()])
    answers = PROBES @ vector > 0.3
    time.sleep(delay)
    return float(answers.mean()), answers
"""


def toys(folder: Path, delay: float = 0.0, **others: Any) -> Path:
    """A recipe with its own function and models in ``folder``."""
    folder.mkdir(parents=True)
    (folder / "job_toys.py").write_text(TOYS)
    for seed, name in enumerate(("left", "right")):
        rng = np.random.default_rng(seed)
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")
    objective = {"name": "right", "type": "call", "call": "job_toys:right", "arguments": {"delay": delay}}
    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [objective]},
        "budget": {"evaluations": 40},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
        **others,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


@pytest.mark.slow
def test_a_resumed_job_finds_what_travelled_elsewhere(tmp_path: Path) -> None:
    """The recipe's functions and models are where the new job was unpacked; the old place is gone."""
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    toys(old / "recipes")

    def job(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return _said(*arguments, folder=folder, ECOTONE_JOB="toy")

    begun = job("run", "recipes/toy.yaml", "--out", str(run), "--log", "json", folder=old)
    assert begun.returncode == 0, begun.stderr
    assert [json.loads(line)["event"] for line in begun.stdout.splitlines()][-1] == "run_ended"
    old.rename(new)
    again = job("resume", str(run), "--log", "json", "--set", "budget.evaluations=60", folder=new)
    assert again.returncode == 0, again.stderr
    known = Run(run).status()
    assert (known["evaluations"], known["failures"], known["state"]) == (60, 0, "finished")
    with Run(run).journal() as journal:
        assert str(old) not in str(journal.fact(facts.RECIPE)) + str(journal.fact(facts.SYS_PATH))


@pytest.mark.parametrize("whole", [True, False], ids=["working_dir", "py_modules"])
def test_what_travels_holds_the_linked_packages(
    client: Remembering, ecotone: Ecotone, tmp_path: Path, whole: bool
) -> None:
    """Ray's own packing follows links: unpacked elsewhere, ``ecotone`` is whole and runs from there."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    recipe = RECIPE if whole else recipe_in(tmp_path / "mine")
    assert ecotone("submit", recipe, "--name", "first").code == 0
    environment = client.sent[0]["runtime_env"]
    folder = environment["working_dir"] if whole else environment["py_modules"][0]
    packaging._zip_files(folder, environment["excludes"], str(tmp_path / "all.zip"), True, not whole)
    place = tmp_path / "unpacked"
    with ZipFile(tmp_path / "all.zip") as packed:
        packed.extractall(place)
    for name in jobs.PACKAGES[1:]:
        here = {file.relative_to(ROOT) for file in (ROOT / name).rglob("*") if file.suffix in (".py", ".yaml")}
        assert len(here) > 5
        assert all((place / "ecotone" / file).is_file() for file in here)
    code = "import ecotone.search.m2n2 as m, ecotone.experiments.cli; print(m.__file__)"
    variables = {**os.environ, "PYTHONPATH": str(place)}
    found = subprocess.run([sys.executable, "-c", code], cwd=place, env=variables, capture_output=True, text=True)
    assert found.stdout.strip() == str(place / "ecotone" / "search" / "m2n2.py"), found.stderr


def test_a_head_that_was_just_started_is_waited_for(client: Remembering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL", 0.0)
    client.starting = 3
    JobServer(ADDRESS).submit(RECIPE, "first")
    assert len(client.sent) == 1
    client.starting = 10**9
    monkeypatch.setattr(jobs, "_STARTING", 0.0)
    with pytest.raises(PoolError, match="No available agent"):
        JobServer(ADDRESS).submit(RECIPE, "second")


# -- what is refused ------------------------------------------------------------------------------------------


def test_names_places_and_folders_are_checked_before_anything_is_sent(
    client: Remembering, ecotone: Ecotone, tmp_path: Path
) -> None:
    assert ecotone("submit", RECIPE, "--name", "first").code == 0
    for arguments, words in (
        (["submit", RECIPE, "--name", "first"], "has a run 'first' already (running)"),
        (["submit", RECIPE, "--name", "a/b"], "--name: expected letters"),
        (["submit", RECIPE, "--out", "runs/x"], "--out: expected a URL, or a path on the head"),
        (["submit", RECIPE, "--folder", tmp_path], "--folder: expected one that holds"),
        (["submit", RECIPE, "--folder", tmp_path / "none"], "--folder: expected a folder of this machine"),
        (["submit", RECIPE, "--folder", "/"], "holds your home"),
        (["submit", RECIPE, "--env", "NO_SUCH_VARIABLE"], "--env: NO_SUCH_VARIABLE is not set here"),
        (["submit", RECIPE, "--set", "sede=3"], "Did you mean 'seed'?"),
        (["submit", tmp_path / "none.yaml"], "no such recipe"),
        (["submit", RECIPE, "--address", "127.0.0.1:8265"], "--address: expected http://HOST:PORT"),
        (["stop", "frist"], "Did you mean 'first'?"),
        (["logs", "other"], "knows no run of that name"),
        (["resume", "frist", "--address", ADDRESS], "Did you mean 'first'?"),
        (["resume", "first", "--address", ADDRESS, "--set", "runtime.wrokers=3"], "Did you mean 'workers'?"),
        (["resume", "first", "--address", ADDRESS, "--set", "runtime.grace=long"], "runtime.grace"),
        (["resume", "first", "--address", ADDRESS, "--set", "seed=3"], "a resumed run keeps"),
        (["resume", "runs/x", "--env", "PATH"], "--env: expected with the http:// address"),
        (["run", RECIPE, "--address", ADDRESS], "ecotone submit"),
    ):
        said = ecotone(*arguments)
        assert said.code == 1, arguments
        assert words in said.err, said.err
        assert "Traceback" not in said.err
    assert len(client.sent) == 1
    assert ecotone("submit", RECIPE, "--nmae", "x").code == 2


def test_a_run_that_has_ended_is_not_stopped(client: Remembering, ecotone: Ecotone) -> None:
    assert ecotone("submit", RECIPE, "--name", "first").code == 0
    said = ecotone("stop", "first")
    assert (said.code, said.out.splitlines()[0]) == (0, "first has stopped.")
    assert f"ecotone resume first --address {ADDRESS}" in said.out
    again = ecotone("stop", "first")
    assert again.code == 1
    assert "it is not running; it has stopped" in again.err


def test_a_head_that_knows_no_runs(client: Remembering, ecotone: Ecotone) -> None:
    assert "knows no runs" in ecotone("jobs").out
    assert ecotone("jobs", "--json").json == []
    assert "has forgotten its jobs" in ecotone("stop", "first").err


class AuthenticationError(Exception):
    """Of the name that Ray's has."""


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (AuthenticationError("Authentication failed: Forbidden"), PoolError, "not the cluster's (403)"),
        (AuthenticationError("Authentication required: Unauthorized"), PoolError, "this machine has none (401)"),
        (AuthenticationError("couldn't find an authentication token"), PoolError, "RAY_AUTH_TOKEN_PATH"),
        (ConnectionError("Failed to connect"), PoolError, "ssh -N -L 8265:127.0.0.1:8265 HEAD"),
        (RuntimeError("Request failed with status code 500: no\nmore"), PoolError, "status code 500: no"),
        (ValueError("Package size (600MiB) exceeds the maximum size of 512MiB"), InputError, ".rayignore"),
        (
            RuntimeError("Request failed with status code 413: Maximum request body size 104857600 exceeded.."),
            InputError,
            "size 104857600 exceeded). Keep models on the hub or on a disk",
        ),
        (ImportError("No module named 'ray'"), PoolError, how_to_install("ray")),
    ],
)
def test_what_the_client_raises_is_told_in_words(
    client: Remembering, error: Exception, kind: type[EcotoneError], words: str
) -> None:
    client.fails = error
    with pytest.raises(kind) as raised:
        JobServer(ADDRESS).submit(RECIPE, "first")
    assert words in str(raised.value)
    assert raised.value.remedy


class Open(BaseHTTPRequestHandler):
    """A job server that asks for no token, or for one."""

    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("code", [200, 401])
def test_a_cluster_that_takes_jobs_from_anybody_is_told_of(
    code: int, client: Remembering, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Open, "code", code)
    with HTTPServer(("127.0.0.1", 0), Open) as server:
        threading.Thread(target=server.serve_forever).start()
        said = ecotone("submit", RECIPE, "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert said.code == 0
    assert ("Warning: " in said.err) == (code == 200)


def test_the_tunnel_leads_to_the_host_of_the_address() -> None:
    assert jobs.tunnel("http://10.0.0.5:9000") == "ssh -N -L 9000:127.0.0.1:9000 10.0.0.5"
    assert jobs.tunnel("http://localhost") == "ssh -N -L 8265:127.0.0.1:8265 HEAD"


def test_nobody_answers_at_a_real_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's own client, in a process of its own: it keeps the token it has read."""
    (tmp_path / "token").write_text("0" * 64)
    said = _said("jobs", "--address", "http://127.0.0.1:9", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert said.returncode == 1
    assert "http://127.0.0.1:9: no Ray cluster answers." in said.stderr
    assert "Traceback" not in said.stderr


def _said(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "ecotone.experiments.cli", *arguments]
    known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(program, check=False, capture_output=True, text=True, cwd=folder, env=known)


# -- the README's section, on a real head ---------------------------------------------------------------------


def section(title: str) -> list[str]:
    """The commands of the shell blocks of a section of the README."""
    text = (ROOT / "README.md").read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


@dataclass
class Shell:
    """A user's shell in the checkout, with a home of its own; ``export`` lasts."""

    environment: dict[str, str]
    said: list[str] = field(default_factory=list)

    def __call__(self, line: str, code: int = 0, **others: str) -> str:
        if line.startswith("export "):
            self.environment |= dict(word.split("=", 1) for word in line.split()[1:])
            return ""
        ended = subprocess.run(
            ["bash", "-c", line], check=False, capture_output=True, text=True, timeout=900,
            cwd=ROOT, env={**self.environment, **others},
        )  # fmt: skip
        assert ended.returncode == code, f"{line}: {ended.stdout}{ended.stderr}"
        self.said.append(f"$ {line}\n{ended.stdout}{ended.stderr}")
        return ended.stdout + ended.stderr


def free_ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


@contextlib.contextmanager
def head(start: str, shell: Shell, port: int) -> Iterator[Path]:
    """The cluster that the line ``start`` starts, on ports and in a folder of its own; killed by its ids at the end."""
    temporary = tempfile.mkdtemp(prefix="ecotone-", dir="/tmp")  # short: sockets have paths of 107 bytes
    gcs, agent, client = free_ports(3)
    options = (
        f"--block --num-cpus=2 --object-store-memory=100000000 --temp-dir={temporary} --port={gcs} "
        f"--dashboard-port={port} --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    )
    program = subprocess.Popen(
        ["bash", "-c", f"exec {start} {options}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=shell.environment, cwd=ROOT,
    )  # fmt: skip
    try:
        yield Path(temporary)
    finally:
        top = psutil.Process(program.pid)
        family = [*top.children(recursive=True), top]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        program.wait()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(temporary, ignore_errors=True)


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_cluster_section_of_the_readme_works_word_by_word(tmp_path: Path) -> None:
    pytest.importorskip("ray.dashboard.modules.job.job_head", reason="a head takes jobs only with ray[default]")
    lines = section("On a Ray cluster")
    (start,) = [line for line in lines if line.startswith("ray start --head")]
    verbs = [line.split()[1] for line in lines if line.startswith("ecotone ")]
    assert verbs == ["submit", "jobs", "logs", "status", "stop", "resume", "logs", "front"]
    (port,) = free_ports(1)
    address, run = f"http://127.0.0.1:{port}", tmp_path / "ecotone-runs" / "digits"
    shell = a_shell(tmp_path, port)

    def evaluations() -> int:
        with contextlib.suppress(JournalError):
            return int(Run(run).status()["evaluations"])
        return 0

    exports, token = lines[: lines.index(start)]  # `a_shell` has run them
    assert exports.startswith("export ")
    assert token == "(umask 077; ray get-auth-token --generate)"
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
    with head(start, shell, port):
        until(lambda: shell_works(shell))
        for line in lines[lines.index(start) + 1 :]:
            if line.startswith(("ecotone status", "ecotone stop")):
                until(lambda: evaluations() > 0)
            said = shell(line.replace(ADDRESS, address))
            if line.startswith("ecotone status"):
                assert "running" in said
            if line.startswith("ecotone stop"):
                assert "digits has stopped." in said
                stopped = Run(run).status()
                assert stopped["state"] == "interrupted"
                assert 0 < stopped["evaluations"] < 20_000
        finished = Run(run).status()
        assert (finished["state"], finished["evaluations"]) == ("finished", 20_000)
        assert "digits: succeeded." in shell.said[-2]
        assert [job["state"] for job in json.loads(shell("ecotone jobs --json"))] == ["stopped", "succeeded"]
        events = [json.loads(line)["event"] for line in (run / "log.jsonl").read_text().splitlines()]
        assert {"run_started", "draining", "run_resumed", "worker_ready", "progress"} <= set(events)
        assert events.count("run_ended") == 2

        refusals(shell, address, tmp_path)
    print("\n".join(shell.said))

    undisturbed = launch(
        Recipe.from_yaml(RECIPE, {"runtime.pool": "serial", "tracking.mlflow": False}), tmp_path / "undisturbed"
    )
    assert finished["digest"] == undisturbed.status()["digest"]


@pytest.mark.slow
def test_a_new_head_goes_on_from_the_url_alone(tmp_path: Path) -> None:
    """A recipe that is in no checkout, with its own function and models; the first head is killed with all it has."""
    pytest.importorskip("ray.dashboard.modules.job.job_head", reason="a head takes jobs only with ray[default]")
    settings = {"scoring": {"batch": 4, "in_flight": 8}, "budget": {"evaluations": 240}}
    recipe = toys(tmp_path / "mine", delay=0.05, **settings, runtime={"workers": 2, "mirror_every": 0.5, "lease": 3.0})
    url = f"file://{tmp_path}/bucket/toy"
    start = next(line for line in section("On a Ray cluster") if line.startswith("ray start --head"))

    def copied() -> int:
        with contextlib.suppress(EcotoneError):
            return int(Run(storage.fetched(url)).status()["evaluations"])
        return 0

    for number in (1, 2):
        (port,) = free_ports(1)
        shell = a_shell(tmp_path / f"home-{number}", port)  # each machine has its own disk
        with head(start, shell, port):
            until(lambda: shell_works(shell))  # noqa: B023 - called at once
            if number == 1:
                shell(f"ecotone submit {recipe} --name toy --out {url}")
                until(lambda: copied() > 40)
            else:
                # Another head has another key, and so the run is another user's for it.
                shell(f"ecotone resume {url} --address http://127.0.0.1:{port} --folder {recipe.parent} --trust")
                print(shell("ecotone logs toy --follow"))
    finished = Run(storage.fetched(url)).status()
    assert (finished["state"], finished["evaluations"], finished["failures"]) == ("finished", 240, 0)
    whole = toys(tmp_path / "whole", **settings)
    undisturbed = launch(Recipe.from_yaml(whole), tmp_path / "run", folders=(str(whole.parent),))
    assert finished["digest"] == undisturbed.status()["digest"]


@pytest.mark.slow
def test_secrets_of_a_job_reach_its_workers_and_nobody_else(tmp_path: Path) -> None:
    """A variable and the password in the tracker's URL, of which Ray's tables, logs and processes have nothing."""
    pytest.importorskip("ray.dashboard.modules.job.job_head", reason="a head takes jobs only with ray[default]")
    recipe = toys(tmp_path / "mine", runtime={"workers": 1}, scoring={"batch": 4, "in_flight": 8})
    code = "import os\nassert len(os.environ['PLANTED_TOKEN']) == 10, 'no token'\n"
    (recipe.parent / "job_toys.py").write_text(code + (recipe.parent / "job_toys.py").read_text())
    start = next(line for line in section("On a Ray cluster") if line.startswith("ray start --head"))
    (port,) = free_ports(1)
    shell, out, seen, over = a_shell(tmp_path / "home", port), tmp_path / "out", set(), threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    seen.add(" ".join(process.cmdline()))

    tracking = "--set tracking.mlflow=true --set tracking.uri=http://me:planted-82@127.0.0.1:9/"
    with head(start, shell, port) as session:
        until(lambda: shell_works(shell))
        command = f"ecotone submit {recipe} --name toy --out {out} --env PLANTED_TOKEN {tracking}"
        said = shell(command, PLANTED_TOKEN="planted-81")

        looking = threading.Thread(target=look, daemon=True)  # after the command that has the secret in its arguments
        looking.start()
        said += shell("ecotone logs toy --follow")
        over.set()
        looking.join()
        said += shell("ecotone logs toy") + shell("ecotone jobs --json")
        listed = urlopen(
            Request(f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {token_of(shell)}"})
        ).read()
        files = [file for file in session.rglob("*") if file.is_file() and not file.is_symlink()]
        leaks = [str(file) for file in files if b"planted-8" in file.read_bytes()]
    assert (Run(out).status()["state"], Run(out).status()["failures"]) == ("finished", 0), said
    assert "PLANTED_TOKEN" not in listed.decode()
    assert b"ECOTONE_SEALED" in listed
    assert b"planted-8" not in listed
    assert "planted-8" not in said
    assert leaks == []
    assert any("ecotone.experiments.cli run toy.yaml" in line for line in seen)
    assert [line for line in seen if "planted-8" in line] == []
    kept = tmp_path / "home" / ".config" / "ecotone" / "credentials.json"  # of the head, for `resume`
    assert "planted-82" in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def token_of(shell: Shell) -> str:
    return (Path(shell.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()


def a_shell(home: Path, port: int) -> Shell:
    """In the checkout, with a home of its own and the job server at ``port``."""
    home.mkdir(exist_ok=True)
    kept = ("LANG", "RAY_USAGE_STATS_ENABLED", "OMP_NUM_THREADS", "PYTHONPATH")
    keep = {key: os.environ[key] for key in kept if key in os.environ}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    keep |= same_arithmetic()
    shell = Shell({**keep, "HOME": str(home), "PATH": path, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"})
    for line in section("On a Ray cluster")[:2]:
        shell(line)
    return shell


def shell_works(shell: Shell) -> bool:
    """Whether the head answers."""
    with contextlib.suppress(AssertionError):
        return "knows no runs" in shell("ecotone jobs")
    return False


def refusals(shell: Shell, address: str, folder: Path) -> None:
    """What the real server refuses, and Ray's client raises then, in words."""
    (folder / "token").write_text("0" * 64)
    wrong, none = {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}, {"HOME": str(folder / "none")}
    for line, words, others in (
        ("ecotone jobs", f"{address}: the token here is not the cluster's (403).", wrong),
        ("ecotone jobs", f"{address}: its jobs need the cluster's token, and this machine has none (401).", none),
        ("ecotone stop digist", "Did you mean 'digits'?", {}),
        ("ecotone stop digits", "it is not running; it has finished", {}),
        ("ecotone submit experiments/recipes/digits-specialists.yaml --name digits", "has a run 'digits' already", {}),
    ):
        assert words in shell(line, 1, **others)
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{address}/api/jobs/")
