"""Ray that does not start: tried again where that is safe, ended where it came up in part, and told in words."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from ecotone.fitness.ray import cluster as clusters
from ecotone.fitness.ray.pool import RayPool
from ecotone.fitness.ray.starting import PAUSES, start
from ecotone.fitness.runtime import Runtime
from ecotone.fitness.specs import WorkerSpec
from ecotone.populations.errors import PoolError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


class Node:
    """A node of Ray that raises while it is made."""

    def __init__(self, error: BaseException, killed: list[str]) -> None:
        self._killed = killed
        raise error

    def kill_all_processes(self, check_alive: bool = True, allow_graceful: bool = False, wait: bool = False) -> None:
        self._killed.append("node")


class Ray:
    """A Ray whose first starts fail with the given errors."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.ended: list[str] = []
        self.begun = 0
        self.job_config = type("module", (), {"JobConfig": type("JobConfig", (), {})})

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.begun += 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        if self.errors:
            Node(self.errors.pop(0), self.ended)

    def shutdown(self) -> None:
        self.ended.append("ray")


def test_a_cluster_of_our_own_is_tried_again_after_pauses_and_leftovers_are_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray, pauses, before = (
        Ray(Exception(LATE), RuntimeError("Failed to start GCS")),
        [],
        signal.getsignal(signal.SIGTERM),
    )
    start(ray, None, pauses.append)
    assert (ray.begun, tuple(pauses)) == (3, PAUSES)
    assert ray.ended == ["node", "ray"] * 2
    assert signal.getsignal(signal.SIGTERM) == before
    told = [(record.event, record.getMessage()) for record in caplog.records]  # type: ignore[attr-defined]
    assert told[0] == ("start_failed", f"Ray did not start ({LATE}); trying again in 3 s.")


def test_after_three_attempts_it_is_an_error_with_a_remedy() -> None:
    ray = Ray(*(Exception(LATE) for _ in range(5)))
    with pytest.raises(
        PoolError, match=r"a local Ray cluster cannot be started \(The current node timed out"
    ) as caught:
        start(ray, None, lambda seconds: None)
    assert "runtime.pool=serial" in caught.value.remedy
    assert ray.begun == 3
    assert ray.ended == ["node", "ray"] * 3


@pytest.mark.parametrize(
    ("address", "error", "begun"),
    [
        ("10.0.0.1:6379", ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"), 1),
        ("10.0.0.1:6379", Exception("Head node temp_dir not found in NodeInfo"), 3),
        (None, ValueError("no such resource"), 1),
        (None, ImportError("no module named grpc"), 1),
        (None, TimeoutError("Timed out while waiting for GCS"), 3),
    ],
)
def test_what_does_not_pass_is_not_tried_again(address: str | None, error: Exception, begun: int) -> None:
    ray = Ray(*(type(error)(*error.args) for _ in range(3)))
    with pytest.raises(PoolError) as caught:
        start(ray, address, lambda seconds: None)
    assert ray.begun == begun
    assert str(error) in caught.value.message
    assert caught.value.remedy


def test_ctrl_c_ends_what_was_started_and_is_no_failure() -> None:
    ray = Ray(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        start(ray, None, lambda seconds: None)
    assert ray.ended == ["node", "ray"]


@pytest.mark.parametrize("place", ["nodes", "get_runtime_context"])
def test_whatever_ray_raises_once_it_is_connected_is_told_in_words(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    class LostError(Exception):
        """An error of Ray's own."""

    class Connected(Ray):
        def get_runtime_context(self) -> Any:
            if place == "get_runtime_context":
                raise LostError("System error: Broken pipe")
            return type("Context", (), {"get_node_id": lambda self: "home"})()

        def nodes(self) -> Any:
            raise LostError("System error: Broken pipe")

        def shutdown(self) -> None:
            super().shutdown()
            raise LostError("not running")

    ray = Connected()
    monkeypatch.setattr(clusters, "_ray", lambda local: ray)
    pool = RayPool(WorkerSpec(experts=("a",), base=None, operator="linear"), Runtime(workers=1))
    with pytest.raises(
        PoolError, match=r"the workers could not be started: Ray raised LostError \(System error: Broken pipe\)"
    ):
        pool.start()
    assert ray.ended == ["ray"]


@pytest.mark.slow
def test_the_processes_of_a_node_that_did_not_come_up_are_gone_before_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    from ray._private.node import Node as RayNode

    monkeypatch.setattr(clusters, "_ray", lambda local: ray)
    started: list[psutil.Process] = []
    names: list[str] = []
    goes_on = RayNode.start_ray_processes

    def late(self: Any) -> None:
        goes_on(self)
        if not started:
            of_ray = ("gcs_server", "raylet")
            started.extend(one for one in psutil.Process(os.getpid()).children(recursive=True) if one.name() in of_ray)
            names.extend(one.name() for one in started)
            raise Exception(LATE)

    monkeypatch.setattr(RayNode, "start_ray_processes", late)
    left: list[psutil.Process] = []

    def pause(seconds: float) -> None:
        left.extend(one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE)

    try:
        start(ray, None, pause)
        assert {"gcs_server", "raylet"} <= set(names)
        assert left == []
        assert ray.get(ray.put(3)) == 3
    finally:
        ray.shutdown()
