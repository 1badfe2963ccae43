"""Planted secrets: no file of a run, no argument of a process, and nothing that is printed has them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from processes import ROOT
from safetensors.numpy import save_file

pytestmark = pytest.mark.slow

USER, PASSWORD, TOKEN, SIGNATURE = "plantedUser71", "planted%40Pass72", "plantedToken73", "plantedSig74"
SECRETS = (USER, PASSWORD, "planted@Pass72", TOKEN, SIGNATURE)

METRIC = '''
import time

def score(model, url="", data=""):
    """Fails now and then, as clients do: with the whole URL."""
    time.sleep(0.05)
    assert "planted%40Pass72" in data, data
    total = sum(float(tensor.sum()) for tensor in model.values())
    if int(abs(total) * 1000) % 5 == 0:
        raise ConnectionError(f"HTTPSConnectionPool: {data} does not answer to planted@Pass72")
    return 1 / (1 + abs(total - 1))
'''

VAULT = '''
"""A file system with user, password and signature in its URLs, which it says in all of its errors."""
import fsspec
from fsspec.implementations.local import LocalFileSystem
from pathlib import Path
from urllib.parse import urlsplit

class Vault(LocalFileSystem):
    protocol = "vault"
    cachable = False

    def __init__(self, whole="", **options):
        super().__init__(**options)
        self.whole = whole

    @staticmethod
    def _get_kwargs_from_urls(url):
        return {"whole": url}

    @classmethod
    def _strip_protocol(cls, path):
        return urlsplit(path).path.rstrip("/") if "://" in path else path

    def invalidate_cache(self, path=None):
        if "planted%40Pass72@" not in self.whole or "plantedSig74" not in self.whole:
            raise PermissionError(f"{self.whole}: no such user")
        if (Path(__file__).parent / "closed").exists():
            raise ConnectionError(f"{self.whole}: 503 for user plantedUser71 with planted@Pass72")

fsspec.register_implementation("vault", Vault)
'''


@dataclass
class Watch:
    """Looks at the arguments of all processes of a command again and again, and for secrets in files."""

    folder: Path
    environment: dict[str, str]
    arguments: set[str] = field(default_factory=set)

    def run(self, *command: object, code: int | None = 0, after: Path | None = None) -> str:
        """What a command prints.

        Args:
            command: For ``ecotone``.
            code: The exit status that is expected; None for any.
            after: Until this is there, the command itself may have what was typed in its arguments.
        """
        program = [sys.executable, "-m", "ecotone.experiments.cli", *map(str, command)]
        with (self.folder / "said").open("w+") as said:
            process = subprocess.Popen(program, env=self.environment, cwd=self.folder, stdout=said, stderr=said)
            while process.poll() is None:
                self._look(process.pid, itself=after is None or after.exists())
                time.sleep(0.02)
            said.seek(0)
            text = said.read()
        assert code is None or process.returncode == code, text
        return text

    def _look(self, pid: int, itself: bool) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            for one in [*([process] if itself else []), *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    self.arguments.add(" ".join(one.cmdline()))

    def leaks(self, folder: Path, *but: str) -> list[str]:
        """The files below ``folder``, but for those of the user, that have a secret."""
        found = []
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink() and file.name not in but:
                content = file.read_bytes()
                found += [f"{file}: {secret}" for secret in SECRETS if secret.encode() in content]
        return found


class Refusing(BaseHTTPRequestHandler):
    """A tracking server that refuses, and says all that it was sent."""

    seen: list[str] = []  # noqa: RUF012 - of the one server

    def do_GET(self) -> None:
        sent = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        self.seen.append(sent)
        words = json.dumps({"error_code": "PERMISSION_DENIED", "message": f"{sent} may not {self.path}"}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    do_POST = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(VAULT)
    environment = {
        **os.environ,
        "ECOTONE_CONFIG": str(tmp_path / "config"),
        "ECOTONE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": f"{ROOT}:{site}",
        "PYTHONDONTWRITEBYTECODE": "1",  # that of the user's own files has what they have
    }
    for name in ("MLFLOW_TRACKING_URI", "ECOTONE_CREDENTIALS"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="e-") as sessions:  # Ray's sockets have short paths
        yield Watch(tmp_path, {**environment, "RAY_TMPDIR": sessions})


def toy_recipe(folder: Path, **others: Any) -> Path:
    """A recipe whose objective has a URL with secrets."""
    folder.mkdir()
    (folder / "metric.py").write_text(METRIC)
    for number, name in enumerate(("left", "right")):
        weight = np.random.default_rng(number).standard_normal((8, 4)).astype(np.float32)
        save_file({"weight": weight}, folder / f"{name}.safetensors")
    data = f"https://{USER}:{PASSWORD}@data.example/set?rows=9&X-Amz-Signature={SIGNATURE}"
    record = {
        "name": "toy",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {
            "search": [{"name": "f", "type": "call", "call": "./metric.py:score", "arguments": {"data": data}}]
        },
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 20},
        **others,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(record))
    return folder / "toy.yaml"


def modes(folder: Path) -> dict[str, int]:
    """The modes of the files and folders below ``folder`` that others may read."""
    found = {str(file.relative_to(folder)): stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*")}
    return {name: mode for name, mode in found.items() if mode & 0o077}


def test_a_run_in_mlflow_with_ray_has_none_of_them(watch: Watch, tmp_path: Path) -> None:
    recipe, runs = toy_recipe(tmp_path / "mine"), tmp_path / "runs"
    before = os.umask(0o022)
    try:
        said = watch.run("run", recipe, "--out", runs / "toy", "--workers", 1)
        said += watch.run("status", runs / "toy", "--json")
        assert "ConnectionError: HTTPSConnectionPool: https://data.example/set does not answer to ***" in said
        said += watch.run("front", runs / "toy")
        said += watch.run("resume", runs / "toy", "--set", "budget.evaluations=30", "--log", "json", "--workers", 0)
        said += watch.run("sync", runs / "toy")
        said += watch.run("export", runs / "toy", "--to", tmp_path / "merged")
        said += watch.run("export", runs / "toy", "--to", tmp_path / "merged.safetensors")
        said += watch.run("verify", tmp_path / "merged")
    finally:
        os.umask(before)
    assert "credentials.json" in said
    assert json.loads((tmp_path / "merged" / "ecotone.json").read_text())["recipe"]["seed"] == 0
    assert not any(secret in said for secret in SECRETS), said
    assert watch.leaks(tmp_path, "toy.yaml", "metric.py", "sitecustomize.py", "credentials.json") == []
    assert list(Path(watch.environment["RAY_TMPDIR"]).rglob("*.log"))
    assert watch.leaks(Path(watch.environment["RAY_TMPDIR"])) == []
    assert any("ecotone.experiments.tracking" in line for line in watch.arguments)
    assert [line for line in watch.arguments if any(secret in line for secret in SECRETS)] == []
    open_to_others = {name for name in modes(runs) if not name.startswith("mlartifacts/")}  # whose folder is closed
    assert open_to_others == set()
    assert "budget:\n  evaluations: 30" in (runs / "toy" / "recipe.yaml").read_text()
    assert stat.S_IMODE((tmp_path / "merged" / "ecotone.json").stat().st_mode) == 0o644


def test_a_run_at_a_url_and_a_server_that_refuses_have_none_of_them(
    watch: Watch, tmp_path: Path, refusing: str
) -> None:
    recipe = toy_recipe(tmp_path / "mine", runtime={"pool": "serial", "lease": 2, "mirror_every": 0.1})
    out, tracker = f"vault://host{tmp_path}/store/toy", f"http://{refusing}"
    whole = f"vault://{USER}:{PASSWORD}@host{tmp_path}/store/toy?sig={SIGNATURE}"
    tracking = f"tracking.uri=http://{USER}:{PASSWORD}@{refusing}/?token={TOKEN}"
    command = ("run", recipe, "--out", whole, "--set", tracking)
    said = watch.run(*command, after=tmp_path / "store" / "toy")
    assert f"copied to {out}." in said
    assert f"{USER}:planted@Pass72" in Refusing.seen
    Refusing.seen.clear()
    for again in ("status", "front", "sync"):
        said += watch.run(again, out, code=None)
    assert f"{USER}:planted@Pass72" in Refusing.seen
    assert f"mlflow: {tracker}" in said
    said += watch.run("resume", out, "--set", "budget.evaluations=25")
    (tmp_path / "site" / "closed").touch()
    for again in (("status", out), ("resume", out), command):
        said += watch.run(*again, code=1, after=tmp_path / "never")
    (tmp_path / "site" / "closed").unlink()
    (tmp_path / "config" / "credentials.json").unlink()
    for again in (("status", out), ("resume", out)):
        said += watch.run(*again, code=1)
    assert "FSSPEC_VAULT_USERNAME" in said
    missing = watch.run("resume", whole, code=None, after=tmp_path / "never")
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in missing
    said += missing
    assert "Traceback" not in said
    assert not any(secret in said for secret in SECRETS), said
    assert watch.leaks(tmp_path, "toy.yaml", "metric.py", "sitecustomize.py", "credentials.json") == []
    assert [line for line in watch.arguments if any(secret in line for secret in SECRETS)] == []
    assert modes(tmp_path / "cache" / "runs") == {}
