"""A server that takes what Weights & Biases' client sends, as far as a run's metrics, configuration and files go.

It stores a run's history by the line offsets that the client gives, answers how far a run has come, and takes uploads.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ecotone.testing.trackers import Shown


@dataclass
class Run:
    """A run as the server has it."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    exit: int | None = None
    shown: dict[str, Any] = field(default_factory=dict)


class Server:
    """The server's state, and its answers to what W&B's client asks in GraphQL."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.uploads: dict[str, bytes] = {}
        self.address = ""
        self.asked: list[str] = []
        self._artifacts: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(operation)
        with self._lock:
            method = getattr(self, f"_{operation}", None)
            return method(asked) if method else {}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take lines of a run's files, at the offsets that they are sent with."""
        run = self.runs[name]
        with self._lock:
            for file, part in sent.get("files", {}).items():
                if file == "wandb-history.jsonl":
                    run.history |= {part["offset"] + i: json.loads(line) for i, line in enumerate(part["content"])}
                elif file == "wandb-summary.json":
                    run.summary = json.loads(part["content"][-1])
            if sent.get("complete"):
                run.exit = sent.get("exitcode")

    def shown(self, name: str) -> Shown:
        """What the server's pages would show of a run."""
        run = self.runs[name]
        history: dict[str, list[tuple[int, float]]] = {}
        for _, row in sorted(run.history.items()):
            axis = next((key for key in row if key.endswith("_member")), "evaluations")
            for key, value in row.items():
                if not key.startswith("_") and key != axis and isinstance(value, float | int):
                    history.setdefault(key, []).append((row[axis], float(value)))
        history["evaluations"] = [(step, float(step)) for step, _ in history["failures"]]
        parameters = {key: entry["value"] for key, entry in run.config.items()}
        tables = run.artifacts.get("run_table", {})
        table = json.loads(tables["front_table.table.json"]) if tables else None
        front = table and (table["columns"], table["data"])
        files = frozenset(run.artifacts.get("search", {}))
        return Shown(history, run.summary, parameters, front, files, len(self.runs))

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(asked["name"])
        project = {"id": "project", "name": asked["project"], "entity": {"id": "entity", "name": "team"}}
        return {"model": {**project, "bucket": None if run is None else self._bucket(run)}}

    def _bucket(self, run: Run) -> dict[str, Any]:
        tail = [json.dumps(run.history[max(run.history)])] if run.history else []
        return {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.shown.get("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(run.config),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": run.config.get("_wandb", {}).get("value", {}).get("t", 1)}),
        }

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        inserted = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], Run(asked["name"]))
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        run.shown |= {key: asked[key] for key in ("displayName", "groupName", "tags") if asked.get(key)}
        project = {"id": "project", "name": asked["project"], "entity": {"id": "entity", "name": "team"}}
        bucket = {"id": f"id-{run.name}", "name": run.name, "project": project, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _Viewer(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        user = {"id": "user", "entity": "team", "username": "tester", "name": "Tester", "email": "", "admin": False}
        return {"viewer": {**user, "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def _ArtifactType(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": None}

    def _CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        wanted = asked["input"]
        self._artifacts.append(wanted)
        made = {"id": str(len(self._artifacts) - 1), "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createArtifactManifest": {"artifactManifest": self._manifest(asked["artifactID"])}}

    def _UpdateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        number = asked["artifactManifestID"].removeprefix("manifest-")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(number)}}

    def _manifest(self, number: str) -> dict[str, Any]:
        url = f"{self.address}/upload/manifest-{number}"
        return {"id": f"manifest-{number}", "file": {"id": number, "uploadUrl": url, "uploadHeaders": []}}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = [
            {
                "storagePath": file["name"],
                "uploadUrl": f"{self.address}/upload/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in asked["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        number = asked["artifactID"]
        wanted = self._artifacts[int(number)]
        files = {name.partition("/")[2]: body for name, body in self.uploads.items() if name.startswith(f"{number}/")}
        self.runs[wanted["runName"]].artifacts[wanted["artifactTypeName"]] = files
        return {"commitArtifact": {"artifact": {"id": number, "digest": wanted["digest"]}}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [{"name": name, "uploadUrl": f"{self.address}/upload/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": f"id-{asked['run']}", "uploadHeaders": [], "files": files}}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            found: dict[str, Any] = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                operation = asked.get("operationName") or asked["query"].split("(")[0].split()[1]
                found = {"data": server.answer(operation, asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            elif self.path.startswith("/upload/"):
                server.uploads[self.path.removeprefix("/upload/")] = body
            text = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _take  # noqa: N815

    return Handler


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on the loopback interface."""
    server = Server()
    web = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.address = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
