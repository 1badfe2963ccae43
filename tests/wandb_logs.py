"""Reading what Weights & Biases wrote into a folder, for tests: the run's own log, record by record.

The log has LevelDB's format after a header of seven bytes: blocks of 32 KiB of chunks, each with a CRC, a length and
whether it is a whole record (1) or the first, a middle or the last part of one (2, 3, 4).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecotone.testing.trackers import Shown

_BLOCK, _CHUNK, _HEADER = 32768, 7, 7


def logs(folder: Path, run_id: str = "*") -> list[Path]:
    """The logs of runs that were written offline, earlier ones first."""
    return sorted((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))


def records(log: Path) -> Iterator[Any]:
    """What was written, in order; a part that is cut off at the end is left out."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = log.read_bytes(), _HEADER, b""
    while place + _CHUNK <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _CHUNK:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + _CHUNK : place + _CHUNK + length]
        place += _CHUNK + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def whole(log: Path) -> bool:
    """Whether the log was brought to its end."""
    return any(record.WhichOneof("record_type") == "exit" for record in records(log))


def shown(log: Path, runs: int) -> Shown:
    """What `wandb sync` would send."""
    found = list(records(log))
    axes = {r.metric.name: r.metric.step_metric for r in found if r.WhichOneof("record_type") == "metric"}
    history: dict[str, list[tuple[int, float]]] = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = _values(record.history.item)
            for key, value in row.items():
                if axes.get(key) and isinstance(value, float | int):
                    history.setdefault(key, []).append((int(row[axes[key]]), float(value)))
    steps = {step for step, _ in history["failures"]}
    history["evaluations"] = [(step, float(step)) for step in sorted(steps)]
    return Shown(history, _summary(found), _config(found), _table(log, found), _files(found), runs)


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _summary(found: list[Any]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= _values(record.summary.update)
    return summary


def _config(found: list[Any]) -> dict[str, str]:
    config: dict[str, str] = {}
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            config |= _values((record.run.config if kind == "run" else record.config).update)
    return config


def _table(log: Path, found: list[Any]) -> Any:
    """The latest table, which lies beside the log."""
    files = sorted((log.parent / "files" / "media" / "table").glob("front_table_*.table.json"))
    if not files:
        return None
    table = json.loads(files[-1].read_text())
    return table["columns"], table["data"]


def _files(found: list[Any]) -> frozenset[str]:
    """Those of the last artifact that the search wrote; each lies where the log says."""
    searched = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "search"]
    contents = searched[-1].manifest.contents if searched else []
    assert all(Path(entry.local_path).is_file() for entry in contents)
    return frozenset(entry.path for entry in contents)
