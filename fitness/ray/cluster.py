"""The Ray cluster under a pool: connecting, places for workers, nodes that leave, a silent head, shutting down."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from ecotone.extras import how_to_install
from ecotone.fitness.ray.events import event, log, reason
from ecotone.fitness.ray.starting import start
from ecotone.populations.errors import PoolError

Clock: TypeAlias = Callable[[], float]
"""Seconds from any beginning, as ``time.monotonic``."""

_PLACED = 120.0  # seconds within which a worker has a place on a cluster of our own
_GROWN = 3600.0  # on another, where machines may have to be started first
LOOK_EVERY = 1.0  # seconds between looks at the cluster
_FIRST_WORD, _NEXT_WORD = 10.0, 60.0  # seconds before the first and the following warnings that no worker has a place
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # after which Ray ends a process whose head is gone
_FAREWELL = 20.0  # seconds before that in which a search can still say why it ends


class Cluster:
    """A Ray cluster that is connected to, or started on this machine.

    Args:
        address: The address of a running cluster. None starts a cluster on this machine, or uses the cluster that this
            process is connected to.
        asked: Resources that each worker holds, by name.
        clock: Tells the time.

    Attributes:
        ray: The module, once connected.
        home: The id of the node that this process is on, once connected.
    """

    home: str

    def __init__(self, address: str | None, asked: Mapping[str, float], clock: Clock) -> None:
        self.ray: Any = None
        self.home = ""
        self._address = address
        self._asked = asked
        self._clock = clock
        self._owned = False
        self._draining: Callable[..., Collection[str]] = lambda timeout: ()
        self._silent_since: float | None = None

    # -- beginning and end -------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect, unless this process is connected already.

        Raises:
            PoolError: Ray is not installed, or the cluster cannot be reached or started.
        """
        self.ray = _ray(local=self._address is None)
        if not self.ray.is_initialized():
            start(self.ray, self._address)
            self._owned = True
        self.home = self.ray.get_runtime_context().get_node_id()
        self._draining = _draining_of(self.ray)

    def shut_down(self) -> None:
        """End the cluster if it was started here, or the connection if it was made here."""
        if self._owned:
            try:
                self.ray.shutdown()
            except Exception as error:  # its processes end with this one
                event(logging.WARNING, "shutdown_failed", f"Ray could not be shut down ({reason(error)}).")

    # -- places ------------------------------------------------------------------------------------------

    @property
    def start_timeout(self) -> float:
        """Seconds within which a worker usually has a place."""
        return _PLACED if self._cannot_grow else _GROWN

    def check_place(self) -> None:
        """Refuse at once what a cluster of our own, which cannot grow, has no place for.

        Raises:
            PoolError: No node is large enough for a worker.
        """
        if self._cannot_grow and not any(self._fits(node) for node in self._nodes()):
            raise PoolError(self.no_place("no worker can be placed"), "Ask for less, or name a larger cluster.")

    def no_place(self, what: str) -> str:
        """A sentence: ``what``, then what each worker asks for and what the nodes have."""
        asked = ", ".join(f"{amount:g} {name}" for name, amount in self._asked.items() if amount)
        nodes = [", ".join(f"{n.get(name, 0.0):g} {name}" for name in self._asked) for n in self._nodes()]
        return f"pool: {what}: each asks for {asked or 'nothing'}, and the cluster's nodes have {'; '.join(nodes)}."

    @property
    def _cannot_grow(self) -> bool:
        return self._owned and self._address is None

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _fits(self, node: Mapping[str, float]) -> bool:
        return all(node.get(name, 0.0) >= amount for name, amount in self._asked.items())

    # -- nodes and the head ------------------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """Whether the head did not answer when it was asked last."""
        return self._silent_since is not None

    def leaving(self) -> Collection[str]:
        """Ids of the nodes that are to go, as the head says; none while it does not answer.

        Raises:
            PoolError: The head has not answered for so long that Ray would end this process soon, without a word.
        """
        try:
            nodes = self._draining(timeout=1.0)
        except Exception as error:
            self._check_silence(error)
            return ()
        self._silent_since = None
        return nodes

    def _check_silence(self, error: Exception) -> None:
        now = self._clock()
        self._silent_since = now if self._silent_since is None else self._silent_since
        silent = now - self._silent_since
        limit = float(os.environ.get(_RECONNECT, "60"))
        if silent > max(limit / 2, limit - _FAREWELL):
            raise PoolError(
                f"pool: the cluster's head has not answered for {silent:.0f} s ({reason(error)}).",
                "Start a cluster, then resume the run there.",
            ) from error

    def check_home(self) -> None:
        """Refuse to go on without a node of our own: every actor dies with its owner's node.

        Raises:
            PoolError: The node is gone.
        """
        if self.silent:
            return  # nobody to ask
        if not any(node["NodeID"] == self.home for node in self.ray.nodes() if node["Alive"]):
            raise PoolError("pool: the Ray node that the search runs on has died.", "Resume the run on another node.")

    # -- actors and results ------------------------------------------------------------------------------

    def arrived(self, ref: Any) -> bool:
        """Whether a result, or the error in its place, is there."""
        return bool(self.ray.wait([ref], num_returns=1, timeout=0, fetch_local=False)[0])

    def kill(self, actor: Any) -> None:
        """End an actor's process. While the head is silent it is left: workers end with this process."""
        if self.silent:
            return  # killing would wait for the head
        try:
            self.ray.kill(actor, no_restart=True)
        except Exception as error:  # the cluster may be gone already
            log.debug("killing a worker: %s", error)


class PlaceWait:
    """How long no worker has had a place: it is told of, and ends in an error.

    Args:
        cluster: The cluster that has the places.
        timeout: Seconds after which no place is an error; None is what is usual on the cluster.
        clock: Tells the time.
    """

    def __init__(self, cluster: Cluster, timeout: float | None, clock: Clock) -> None:
        self._cluster = cluster
        self._timeout = timeout
        self._clock = clock
        self._told_at = -math.inf
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since = self._clock()

    def check(self, placed: bool) -> None:
        """Warn after a while, and again.

        Args:
            placed: A worker has a place now, and opens the models, which may take any time.

        Raises:
            PoolError: It has taken too long.
        """
        limit = self._cluster.start_timeout if self._timeout is None else self._timeout
        now = self._clock()
        if placed:
            self._since = now
        waited = now - self._since
        if waited > limit:
            raise PoolError(
                self._cluster.no_place(f"no worker had a place within {limit:g} s"),
                "Ask for less, add nodes, or raise runtime.start_timeout.",
            )
        if waited >= _FIRST_WORD and now - self._told_at >= _NEXT_WORD:
            self._told_at = now
            sentence = self._cluster.no_place("no worker has a place yet")
            event(logging.WARNING, "waiting", f"{sentence} Waiting up to {limit:g} s.", seconds=waited)


def _draining_of(ray: Any) -> Callable[..., Collection[str]]:
    """Asks the head for the ids of the nodes that are to go: spot notices, SIGTERM at a node, `ray drain-node`.

    Ray's libraries find out in the same way; it has no public name.
    """
    try:
        asked: Callable[..., Collection[str]] = ray._private.worker.global_worker.gcs_client.get_draining_nodes
    except AttributeError:
        return lambda timeout: ()
    return asked


def _ray(local: bool) -> Any:
    """Ray, imported with the settings it reads then: no usage reports, tokens, and loopback where the cluster is ours.

    Where somebody has imported it before, their settings hold: half of them changed afterwards would not fit the rest.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if local:
            # Despite its name it holds on every system: without clusters, Ray listens on the loopback address only.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise PoolError(
            "pool: Ray is not installed.", f"`{how_to_install('ray')}`, or --set runtime.pool=serial."
        ) from error
    return ray
