import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from ecotone.merging.models import hub
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub")
constants, errors, utils = (pytest.importorskip(f"huggingface_hub.{part}") for part in ("constants", "errors", "utils"))
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in the hub's layout with two revisions of one repository; the hub itself is out of reach."""
    folder = tmp_path / "cache" / "models--org--tiny"
    for value, (revision, commit) in enumerate(COMMITS.items()):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file({"layers.0.weight": torch.full((2, 3), float(value))}, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
        reference = folder / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def test_repositories_are_read_from_the_cache(cache):
    for text, value in (("org/tiny", 0), ("org/tiny@main", 0), ("org/tiny@v2", 1), (f"org/tiny@{COMMITS['v2']}", 1)):
        checkpoint = Checkpoint.open(text)
        assert checkpoint.name == "tiny"
        assert checkpoint.is_hugging_face
        assert float(checkpoint.tensor("layers.0.weight")[0, 0]) == value
    assert hub.located("org/tiny@v2") == cache / "snapshots" / COMMITS["v2"]
    assert Sources.open(["org/tiny", "org/tiny@v2"], "org/tiny").names == ("tiny", "tiny-2")


def test_adapters_come_from_the_hub_too(cache):
    snapshot = cache.parent / "models--org--low" / "snapshots" / COMMITS["main"]
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMITS["main"])
    factors = {"layers.0.lora_A.weight": torch.ones(1, 3), "layers.0.lora_B.weight": torch.ones(2, 1)}
    save_file(factors, snapshot / "adapter_model.safetensors")
    (snapshot / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    sources = Sources.open(["org/low"], "org/tiny")
    assert sources.names == ("low",)
    assert torch.equal(sources.experts[0].tensor("layers.0.weight"), torch.full((2, 3), 2.0))


def test_a_file_or_folder_of_that_name_comes_first(cache, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    save_file({"x": torch.zeros(2)}, tmp_path / "org" / "tiny" / "model.safetensors")
    assert set(Checkpoint.open("org/tiny").tensors) == {"x"}
    with pytest.raises(CheckpointError, match="Did you mean 'org/tiny'"):
        Checkpoint.open("org/tinny")


@pytest.mark.parametrize("text", ["org/other", "org/tiny@v3", f"org/tiny@{'c' * 40}"])
def test_what_is_not_in_the_cache_needs_the_hub(cache, text):
    with pytest.raises(CheckpointError, match="out of reach") as caught:
        Checkpoint.open(text)
    name, _, revision = text.partition("@")
    assert caught.value.remedy.endswith(f"hf download {name}" + (f" --revision {revision}" if revision else ""))


def answer(kind: str) -> Exception:
    response = Mock(status_code=404, headers={})
    return getattr(errors, kind)("not there", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", r"no such public repository.*hf auth login"),
        ("RevisionNotFoundError", r"org/new of the Hugging Face hub has no revision 'v9'.*commits/main"),
        ("GatedRepoError", r"permitted users only.*Ask for access at https://huggingface\.co/org/new"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(cache, monkeypatch, kind, message):
    def refuse(*_, **__):
        raise answer(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("org/new@v9")


def test_a_broken_connection_is_said_in_words(cache, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("proxy says no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"org/new: could not be downloaded \(proxy says no\)"):
        Checkpoint.open("org/new")


def test_only_weights_configuration_and_tokenizer_are_asked_for(cache, monkeypatch, tmp_path):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path / "empty")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"found none in the repository; pickles.*from_pretrained\('org/new'\)"):
        Checkpoint.open("org/new@v9")
    assert (asked["repository"], asked["revision"]) == ("org/new", "v9")
    wanted = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "LICENSE"]
    others = [
        "pytorch_model.bin",
        "modeling_own.py",
        "original/model.safetensors",
        "consolidated.safetensors",
        "x.gguf",
    ]
    chosen = utils.filter_repo_objects(
        wanted + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == wanted


@pytest.mark.parametrize(
    "text", ["/org/tiny", "org/tiny.safetensors", "a/b/c", "tiny", "../tiny", "org/tiny@", "org/x.gguf"]
)
def test_other_paths_are_no_repositories(cache, text):
    assert not hub.is_repository(text)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint.open(text)


def test_only_snapshots_have_a_repository_s_name(cache):
    assert hub.name_of(cache / "snapshots" / COMMITS["v2"]) == "tiny"
    assert hub.name_of(cache / "snapshots" / COMMITS["v2"] / "model.safetensors") == "tiny"
    assert hub.name_of(Path("snapshots/x")) == ""


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, slow enough that whoever asks at the same time finds the download going on."""

    files: ClassVar[dict[str, bytes]] = {}
    downloads: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.rpartition("/")[2]
        answer, headers = self.files.get(name), {"X-Repo-Commit": COMMITS["main"], "ETag": f'"{name}"'}
        if self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": file} for file in self.files]
            record = {"id": "org/tiny", "sha": COMMITS["main"], "siblings": siblings}
            tree = [{"type": "file", "path": file, "size": len(data), "oid": file} for file, data in self.files.items()]
            answer = json.dumps(tree if "/tree/" in self.path else record).encode()
            headers = {"Content-Type": "application/json"}
        elif body and answer is not None:
            self.downloads.append(name)
            time.sleep(1.0)
        self.send_response(200 if answer is not None else 404)
        for key, value in {**headers, "Content-Length": str(len(answer or b""))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and answer is not None:
            self.wfile.write(answer)

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.slow
def test_workers_that_open_a_repository_at_once_download_it_once(tmp_path, monkeypatch):
    save_file({"w": torch.arange(6.0)}, tmp_path / "model.safetensors")
    files = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "config.json": b"{}"}
    monkeypatch.setattr(Hub, "files", files)
    monkeypatch.setattr(Hub, "downloads", [])
    reading = "print(Checkpoint.open('org/tiny').tensor('w').sum().item())"
    program = f"from ecotone.merging.models.checkpoint import Checkpoint; {reading}"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", program], env=variables, cwd=tmp_path, stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        said = [worker.communicate(timeout=120)[0] for worker in workers]
        server.shutdown()
    assert said == ["15.0\n"] * 4
    assert sorted(Hub.downloads) == ["config.json", "model.safetensors"]
