"""Runs as jobs of a Ray cluster: what is sent and said, by a job server that only remembers; and the README's section
on clusters, word by word, on a real head of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from processes import ROOT, Ecotone
from safetensors.numpy import save_file

from experiments import jobs
from experiments.jobs import JobServer
from experiments.runs import Run
from populations.errors import EcotoneError, InputError, PoolError

ADDRESS = "http://127.0.0.1:8265"
RECIPE = ROOT / "experiments" / "recipes" / "digits-specialists.yaml"


@dataclass
class Remembering:
    """A job server's client that keeps what it is given; ``fails`` is raised by every call."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    fails: Exception | None = None
    lines: str = ""

    def submit_job(self, **job: Any) -> str:
        self._try()
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
        "exec python -m experiments.cli run experiments/recipes/digits-specialists.yaml "
        '--out "$HOME"/ecotone-runs/first --log json --set=runtime.pool=ray --set=runtime.address=auto '
        "--set=seed=3 --set=runtime.grace=50"
    )
    assert job["entrypoint_num_cpus"] == 0
    environment = job["runtime_env"]
    assert environment["working_dir"] == str(ROOT)
    assert {".git", ".venv*", "runs"} <= set(environment["excludes"])
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
    assert {Path(path).name for path in job["runtime_env"]["py_modules"]} == set(jobs.PACKAGES)
    assert all(Path(path, "__init__.py").exists() for path in job["runtime_env"]["py_modules"])
    assert said.json["out"] == "s3://bucket/a run"
    assert said.json["state"] == "pending"


def test_a_folder_and_variables_may_be_named(
    client: Remembering, ecotone: Ecotone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden")
    recipe = recipe_in(tmp_path / "mine" / "deep")
    said = ecotone("submit", recipe, "--folder", tmp_path / "mine", "--env", "HF_TOKEN")
    assert said.code == 0, said.err
    (job,) = client.sent
    assert " run deep/toy.yaml " in job["entrypoint"]
    assert job["runtime_env"]["env_vars"]["HF_TOKEN"] == "hidden"
    assert "hidden" not in said.out


def test_a_resumed_run_keeps_its_name_directory_and_folder(
    client: Remembering, ecotone: Ecotone, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path / "mine")
    assert ecotone("submit", recipe, "--name", "first", "--out", "/shared/first").code == 0
    refused = ecotone("resume", "first", "--address", ADDRESS)
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
import numpy as np

PROBES = np.random.default_rng(0).standard_normal((64, 27))


def right(model):
    vector = np.concatenate([tensor.numpy().ravel() for tensor in model.values()])
    answers = PROBES @ vector > 0.3
    return float(answers.mean()), answers
"""


def test_a_resumed_job_finds_what_travelled_elsewhere(tmp_path: Path) -> None:
    """The recipe's functions and models are where the new job was unpacked; the old place is gone."""
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    (old / "recipes").mkdir(parents=True)
    (old / "recipes" / "job_toys.py").write_text(TOYS)
    for seed, name in enumerate(("left", "right")):
        rng = np.random.default_rng(seed)
        tensors = {"w": rng.standard_normal((8, 3)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        save_file(tensors, old / "recipes" / f"{name}.safetensors")
    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [{"name": "right", "type": "call", "call": "job_toys:right"}]},
        "budget": {"evaluations": 40},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (old / "recipes" / "toy.yaml").write_text(yaml.safe_dump(record))

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
        assert str(old) not in str(journal.fact("recipe")) + str(journal.fact("sys_path"))


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
        (["submit", RECIPE, "--env", "NO_SUCH_VARIABLE"], "--env: NO_SUCH_VARIABLE is not set here"),
        (["submit", RECIPE, "--set", "sede=3"], "Did you mean 'seed'?"),
        (["submit", tmp_path / "none.yaml"], "no such recipe"),
        (["submit", RECIPE, "--address", "127.0.0.1:8265"], "--address: expected http://HOST:PORT"),
        (["stop", "frist"], "Did you mean 'first'?"),
        (["logs", "other"], "knows no run of that name"),
        (["resume", "frist", "--address", ADDRESS], "Did you mean 'first'?"),
        (["resume", "runs/x", "--folder", tmp_path], "--folder, --env: expected with the http:// address"),
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
        (AuthenticationError("Authentication required: Unauthorized"), PoolError, "there is none here (401)"),
        (AuthenticationError("couldn't find an authentication token"), PoolError, "RAY_AUTH_TOKEN_PATH"),
        (ConnectionError("Failed to connect"), PoolError, "ssh -N -L 8265:127.0.0.1:8265 HEAD"),
        (RuntimeError("Request failed with status code 500: no\nmore"), PoolError, "status code 500: no"),
        (ValueError("Package size (600MiB) exceeds the maximum size of 512MiB"), InputError, ".rayignore"),
        (ImportError("No module named 'ray'"), PoolError, "pip install 'ecotone[ray]'"),
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
    program = [sys.executable, "-m", "experiments.cli", *arguments]
    known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(program, check=False, capture_output=True, text=True, cwd=folder, env=known)
