"""Ray clusters of several nodes on this machine, for tests that lose parts of them for real.

A node is a raylet with agents and workers of its own. Everything listens on the loopback address only and is ended by
its id. Searches on them are processes of their own: in this one Ray may have been imported with other settings.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

# A lost node is known to be lost after two seconds instead of fourteen.
HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 1024**2}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # despite its name, 0 keeps Ray from other addresses everywhere


class Machines:
    """A head that takes no workers, and nodes that take some.

    Args:
        nodes: How many there are at first.
        room: Workers that a node takes.
    """

    def __init__(self, nodes: int = 2, room: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self._room = room
        self._before = os.environ.get(LOOPBACK)
        os.environ[LOOPBACK] = "0"
        head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = str(self._cluster.address)
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add()

    def add(self) -> Any:
        """One more node."""
        self.nodes.append(self._cluster.add_node(num_cpus=self._room, **NODE))
        return self.nodes[-1]

    def workers(self) -> list[psutil.Process]:
        """Of all nodes."""
        children = [child for node in self.nodes for child in psutil.Process(_raylet(node).pid).children()]
        return [child for child in children if "RemoteWorker" in child.name()]

    def lose(self, node: Any) -> None:
        """Kill a node's raylet (-9). What depended on it finds out by itself."""
        self.nodes.remove(node)
        _kill(_raylet(node))

    def drain(self, node: Any) -> subprocess.Popen[bytes]:
        """Have the head tell a node to go within an hour, as on a spot notice or SIGTERM at the node.

        Returns:
            The raylet, which ends once nobody works there.
        """
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        self.nodes.remove(node)
        deadline = int((time.time() + 3600) * 1000)
        accepted, _ = GcsClient(address=self.address).drain_node(
            node.node_id, DRAIN_NODE_REASON_PREEMPTION, "a test", deadline
        )
        assert accepted
        return _raylet(node)

    def lose_head(self) -> None:
        """Kill all that the head runs (-9)."""
        for processes in self._cluster.head_node.all_processes.values():
            for one in processes:
                _kill(one.process)

    def lose_home(self) -> None:
        """Kill the raylet of the head's machine (-9), which searches are attached to; the head itself goes on."""
        _kill(_raylet(self._cluster.head_node))

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cluster.shutdown()
        if self._before is None:
            del os.environ[LOOPBACK]
        else:
            os.environ[LOOPBACK] = self._before


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    [raylet] = node.all_processes["raylet"]
    process: subprocess.Popen[bytes] = raylet.process
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()  # what watches it takes a zombie for alive


def isolated(program: list[str]) -> list[str]:
    """The program with a loopback-only network and process ids of its own, all of which end with it. Takes root."""
    return ["unshare", "-n", "-p", "-f", "--mount-proc", "bash", "-c", 'ip link set lo up; "$@"', "_", *program]


def autoscaled(nodes: int) -> dict[str, Any]:
    """The configuration of a head whose autoscaler adds at most so many nodes, raylets beside it, with a CPU each."""
    from ray.cluster_utils import FAKE_HEAD_NODE_ID

    lists = ("setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    memory = NODE["object_store_memory"]
    return {
        "cluster_name": "fake",
        "max_workers": nodes,
        "idle_timeout_minutes": 1,
        "upscaling_speed": 9999,
        "provider": {"type": "fake_multinode", "disable_node_updaters": True, "head_node_id": FAKE_HEAD_NODE_ID},
        "auth": {},
        "head_node_type": "ray.head.default",  # the provider takes no other
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": 0, "object_store_memory": memory},
                "node_config": {},
                "max_workers": 0,
            },
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": memory},
                "node_config": {},
                "min_workers": 0,
                "max_workers": nodes,
            },
        },
        **{f"{name}_commands": [] for name in lists},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }


@dataclass(frozen=True)
class Books:
    """What a journal holds: how many trials were asked for, and when each that is measured was."""

    asked: int
    measured: dict[int, float]

    @classmethod
    def of(cls, run: Path) -> Books:
        """Read and check a journal under strict order, also while it is written: it is whole, and nothing in it is
        missing or there twice.
        """
        with contextlib.closing(sqlite3.connect(f"file:{run / 'journal.sqlite'}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")
            [(sound,)] = connection.execute("PRAGMA integrity_check")
            events = connection.execute("SELECT kind, batch FROM events ORDER BY seq").fetchall()
            trials = dict(connection.execute("SELECT number, batch FROM trials ORDER BY number"))
            measured = dict(connection.execute("SELECT number, time FROM evaluations"))
        assert sound == "ok"
        asked = [batch for kind, batch in events if kind == "ask"]
        told = [batch for kind, batch in events if kind == "tell"]
        assert asked == list(range(len(asked)))
        assert told == list(range(len(told)))
        assert list(trials) == list(range(len(trials)))
        assert sorted(set(trials.values())) == asked
        assert measured.keys() >= {number for number, batch in trials.items() if batch < len(told)}
        assert measured.keys() <= trials.keys()
        return cls(len(trials), measured)

    def kept_by(self, later: Books) -> bool:
        """Whether nothing that was measured has been measured again since."""
        return self.measured.items() <= later.measured.items()

    def recovered(self, later: Books) -> bool:
        """Whether all that was asked for is measured by then."""
        return len(later.measured.keys() & set(range(self.asked))) == self.asked
